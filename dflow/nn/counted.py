"""The law of an entry as a mixture of what a network says and of what was counted in the training text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.config import InputError
from dflow.nn.attention import TransformerSize
from dflow.ops.counts import ContextReader, CountSource, CountTable, Pattern, RowReader, patterns_of

#: Numbers that the gate reads of each pattern.
_FEATURES = 5
#: Width of the gate.
_WIDTH = 96


#: How sure a mixture is, is read from the largest of its log-probabilities, by a perceptron of this width.
_TOP, _SURENESS_WIDTH = 4, 32
#: Most entries whose counts are looked up one by one, and most numbers that these may have.
_FEW, _FEW_NUMBERS = 64, 1 << 14
#: Most contexts that are remembered, and most numbers.
_REMEMBERED, _REMEMBERED_NUMBERS = 1 << 16, 1 << 22


class _Many:
    """The counts of many entries, (..., patterns, K): what the gate reads of them, and their mixture."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        total = counts.sum(-1)
        self.met, self.times = total > 0, total.clamp(min=1)
        self.features = torch.stack(
            [
                total.log1p() / 4,
                (counts > 0).sum(-1).to(counts.dtype).log1p() / 2,
                (counts == 1).sum(-1) / self.times,
                counts.amax(-1) / self.times,
                self.met.to(counts.dtype),
            ],
            -1,
        )

    def mixture(self, weights: Tensor) -> Tensor:
        """Sum of the relative frequencies of the patterns, weighted, (..., K)."""
        return ((weights / self.times)[..., None, :] @ self.counts)[..., 0, :]


class _Entry:
    """Buffers of one entry: what its gate reads, and the laws that it mixes, at first with a uniform one.

    Attributes:
        inputs: of the gate, (patterns * features + 2,).
        laws: of the network and of each pattern, (1 + patterns, K).
        features, entropy, highest: parts of `inputs`.
        network, shares: parts of `laws`.
    """

    def __init__(self, K: int, patterns: int, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self.inputs = torch.full((patterns * _FEATURES + 2,), -math.log(K), dtype=dtype)
            self.laws = torch.full((1 + patterns, K), 1 / K, dtype=dtype)
            self.features = self.inputs[:-2].view(patterns, _FEATURES)
            self.entropy, self.highest = self.inputs[-2], self.inputs[-1]
            self.network, self.shares, self.mixed = self.laws[0], self.laws[1:], self.laws.t()


class _Recalled:
    """Contexts that were looked up of late: a row of each tensor for every one; row 0 for those not met.

    The same contexts come again and again, and what a context needs beside its look-up is in memory then.

    Args:
        table: where they are looked up.
        K: size of the alphabet.
        patterns: number of contexts of an entry.
        dtype: of the tensors.

    Attributes:
        table: where they are looked up.
        shares: relative frequency of each symbol, ``(rows, K)``.
        features: what the gate reads, ``(rows, features)``.
    """

    def __init__(self, table: CountTable, K: int, patterns: int, dtype: torch.dtype) -> None:
        self.table, self.K, self._dtype, self.look_up = table, K, dtype, RowReader(table)
        self._most = min(_REMEMBERED, _REMEMBERED_NUMBERS // K)
        self._clear()
        #: Buffers of one entry: by counts alone, and beside what a network says.
        self.alone, self.beside = _Entry(K, patterns, dtype), _Entry(K, patterns, dtype)

    def _clear(self) -> None:
        self._places: dict[int | None, int] = {None: 0}
        self._used = 1
        with torch.inference_mode(False):
            self.shares = torch.zeros(self._most, self.K, dtype=self._dtype)
            self.features = torch.zeros(self._most, _FEATURES, dtype=self._dtype)
            # Numbers are written one by one where that takes less time than a tensor of them.
            self._numbers: Any = self.shares.view(-1).numpy().data
            self._figures: Any = self.features.view(-1).numpy().data

    def read_one(self, keys: Sequence[int | None], entry: _Entry) -> None:
        """Fill the buffers of an entry."""
        index = self._find([keys])
        torch.index_select(self.features, 0, index, out=entry.features)
        torch.index_select(self.shares, 0, index, out=entry.shares)

    def read(self, entries: Sequence[Sequence[int | None]]) -> tuple[Tensor, Tensor]:
        """What the gate reads of entries, (entries, patterns * features), and shares (entries, patterns, K).

        Args:
            entries: hashes of the contexts of each entry, None for one whose symbols are not all known.
        """
        index, n = self._find(entries), len(entries)
        return self.features[index].view(n, -1), self.shares[index].view(n, -1, self.K)

    def _find(self, entries: Sequence[Sequence[int | None]]) -> Tensor:
        """The row of each context, one entry after another; rows hold until the next call."""
        if self._used + len(entries) * len(entries[0]) > self._most or len(self._places) > 4 * _REMEMBERED:
            self._clear()
        places = self._places
        return torch.tensor(
            [places[key] if key in places else self._add(key) for keys in entries for key in keys]
        )

    def _add(self, key: int | None) -> int:
        row = None if key is None else self.look_up(key)
        self._places[key] = place = 0 if row is None else self._used
        if row is None:
            return 0
        self._used += 1
        symbols, counts = row
        total, numbers, begin = sum(counts), self._numbers, place * self.K
        for symbol, times in zip(symbols, counts, strict=True):
            numbers[begin + symbol] = times / total
        features = (
            math.log1p(total) / 4, math.log1p(len(symbols)) / 2, counts.count(1) / total,
            max(counts) / total, 1.0,
        )  # fmt: skip
        for i, feature in enumerate(features, place * _FEATURES):
            self._figures[i] = feature
        return place


#: The contexts of each table that were looked up of late, by precision and number of patterns.
_TABLES: WeakKeyDictionary[CountTable, dict[tuple[torch.dtype, int], _Recalled]] = WeakKeyDictionary()


def neighbours(symbols: Tensor, offsets: Sequence[int], K: int) -> Tensor:
    """The symbols at ``offsets`` from each entry, (batch, n, offsets), of (batch, n); K beyond the ends."""
    before, after = -min((0, *offsets)), max((0, *offsets))
    windows = F.pad(symbols, (before, after), value=K).unfold(1, before + 1 + after, 1)
    return windows[..., torch.tensor(offsets, device=symbols.device) + before]


def _sureness(log_p: Tensor) -> Tensor:
    """How sure laws (..., K) are, (..., 2): minus the entropy, and the highest log-probability."""
    return torch.stack([(log_p.exp() * log_p).sum(-1), log_p.amax(-1)], -1)


def _joined(log_p: Tensor, counted: Tensor) -> Tensor:
    """The logarithm of the sum of a law by its logarithm and of another, which may have zeros."""
    tiny = torch.finfo(log_p.dtype).tiny
    return torch.logaddexp(log_p, counted.clamp(min=tiny).log())


class Counted(nn.Module):
    r"""Mixes the law that a network gives an entry with counts of the training text.

    .. math:: p(x) = w_0 \operatorname{softmax}(z)_x + \sum_j w_j \frac{n_j(x)}{n_j}

    Pattern j of offsets is met where the symbols at all of its offsets are known and stand there ``n_j >= 1``
    times in the training text, with x in their middle ``n_j(x)`` times. The weights w are a soft-max over the
    network and the patterns that are met. A perceptron gives them, the gate: it reads the network's features,
    how sure the network is, and of each pattern how often it was met, with how many symbols, how many of them
    once, and how often with the commonest. So p is exactly normalised, whatever was counted.

    What is trained to read counts must not have been counted: it would learn to trust them too much. Training
    sets `left_out` to the table of the part that a batch comes from, whose counts are subtracted in training
    mode.

    Args:
        K: size of the alphabet.
        hidden_size: features that the network has for an entry, 0 for none.
        offsets: offsets from an entry of the columns of symbols that are read.
        patterns: patterns over these offsets.
        dropout: in training, share of the entries for which nothing is counted: there the network learns to
            stand alone, as it must where no pattern is met.
        few: most entries whose counts are looked up one by one, without tensors. The last bits of p depend on
            the way of the lookup: 0 where an arg-max of p selects a map.
        more: further numbers that the network gives for an entry behind its K logits, as the weights of
            `dflow.distributions.Spectra`. They also depend on how sure the mixture is; their gradients train
            no part of it.

    Source: the mixture of orders by learned weights is that of interpolated n-grams (Jelinek and Mercer
    1980), with weights by the context as in the mixing of PAQ (Mahoney 2005).
    """

    digest: Tensor

    def __init__(
        self,
        K: int,
        hidden_size: int,
        offsets: Sequence[int],
        patterns: Sequence[Pattern],
        dropout: float = 0.0,
        few: int = _FEW,
        more: int = 0,
    ) -> None:
        """See the class."""
        super().__init__()
        self.K, self.offsets, self.patterns, self.dropout = K, tuple(offsets), tuple(patterns), dropout
        self.few = few
        self._read = ContextReader(K, offsets, patterns)
        self.features = nn.Linear(len(patterns) * _FEATURES + 2, _WIDTH)
        self.hidden = nn.Linear(hidden_size, _WIDTH, bias=False) if hidden_size else None
        self.inner = nn.Linear(_WIDTH, _WIDTH)
        self.weights = nn.Linear(_WIDTH, 1 + len(patterns))
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        self.sureness = None
        if more:
            outer = nn.Linear(_SURENESS_WIDTH, more)
            nn.init.zeros_(outer.weight)
            self.sureness = nn.Sequential(nn.Linear(min(K, _TOP) + 1, _SURENESS_WIDTH), nn.GELU(), outer)
        #: SHA-256 of the table, saved with the weights: these counts and no others belong to the model.
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))
        self._table: CountTable | None = None
        self._rows: _Recalled | None = None
        self.left_out: CountTable | None = None
        #: Counts to add in evaluation mode, such as those of the text before what is scored.
        self.also: CountSource | None = None

    @classmethod
    def of(cls, size: TransformerSize, K: int, both_sides: bool, more: int = 0) -> Counted | None:
        """The mixture for a Transformer of symbols; None where its size counts nothing."""
        if not size.counts:
            return None
        patterns = patterns_of(size.counts, both_sides)
        return cls(K, size.hidden_size, *patterns, size.counts_dropout, more=more)

    @property
    def table(self) -> CountTable:
        """The counts of the training text.

        Raises:
            InputError: the model has not been given counts yet.
        """
        if self._table is None:
            raise InputError(
                "this model reads counts of its training text, and has none yet; train it by `dflow train`, "
                "or load it from its folder"
            )
        return self._table

    @property
    def has_table(self) -> bool:
        """Whether there are counts."""
        return self._table is not None

    def use(self, table: CountTable) -> None:
        """Read these counts, and no others from now on: their digest is saved with the weights."""
        self._table = table
        self.digest.copy_(torch.frombuffer(bytearray(table.digest()), dtype=torch.uint8))

    def forward(self, logits: Tensor, symbols: Tensor, h: Tensor | None = None) -> Tensor:
        """Log-probabilities ``(..., K)``, and behind them what else the network gives.

        Args:
            logits: what the network says, ``(..., K + more)``.
            symbols: the symbols around each entry, int64 ``(..., columns)``; K where there is none or it is
                not known.
            h: features of the network, ``(..., hidden_size)``; None where it has none.
        """
        if self.sureness is None:
            return self._law(logits, symbols, h)
        log_p, more = self._law(logits[..., : self.K], symbols, h), logits[..., self.K :]
        p = log_p.detach()
        sure = torch.cat([p.topk(min(self.K, _TOP)).values, (p.exp() * p).sum(-1, keepdim=True)], -1)
        return torch.cat([log_p, more + self.sureness(sure.to(more.dtype))], -1)

    def _law(self, logits: Tensor, symbols: Tensor, h: Tensor | None) -> Tensor:
        """Log-probabilities of the mixture."""
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        if not self._few(symbols):
            read = _Many(self._counts(symbols).to(log_p.dtype))
        elif self.also is not None or log_p.dtype != logits.dtype or torch.is_grad_enabled():
            read = _Many(self._few_counts(symbols).to(log_p.dtype))
        elif symbols.numel() == symbols.shape[-1]:
            line = None if h is None else h.reshape(-1)
            return self.one(logits.reshape(-1), symbols.reshape(-1).tolist(), line).view(logits.shape)
        else:
            return self._recalled(log_p, symbols, h)
        entries, patterns = symbols.shape[:-1], len(self.patterns)
        features = read.features.view(*entries, patterns * _FEATURES)
        gate = self.features(torch.cat([features, _sureness(log_p)], -1).to(logits.dtype))
        if self.hidden is not None and h is not None:
            gate = gate + self.hidden(h)
        weights = self.weights(F.gelu(self.inner(F.gelu(gate)))).to(log_p.dtype)
        met = F.pad(read.met, (1, 0), value=True)
        weights = weights.masked_fill(~met, -torch.inf).log_softmax(-1)
        return _joined(weights[..., :1] + log_p, read.mixture(weights[..., 1:].exp()))

    def _few(self, symbols: Tensor) -> bool:
        """Whether entries are looked up one by one."""
        few = min(self.few, _FEW_NUMBERS // self.K)
        return not self.training and symbols.device.type == "cpu" and 0 < symbols[..., 0].numel() <= few

    def _recalled(self, log_p: Tensor, symbols: Tensor, h: Tensor | None) -> Tensor:
        """`_law` for a few entries in as few operations as possible, from contexts that are remembered."""
        rows, outer = self._remembered(log_p.dtype), self.features
        features, shares = rows.read([*map(self._read.one, symbols.flatten(0, -2).tolist())])
        lines, seen = log_p.reshape(-1, self.K), features.shape[1]
        gate = torch.addmm(outer.bias, features, outer.weight[:, :seen].t())
        gate.addmm_(_sureness(lines), outer.weight[:, seen:].t())
        if self.hidden is not None and h is not None:
            gate.addmm_(h.reshape(len(lines), -1), self.hidden.weight.t())
        weights = self.weights(F.gelu(self.inner(F.gelu(gate)))).log_softmax(-1)
        counted = torch.bmm(weights[:, None, 1:].exp(), shares)[:, 0]
        # The shares of a pattern that is not met are zeros, so that its weight changes a constant alone.
        return _joined(weights[:, :1] + lines, counted).log_softmax(-1).view(log_p.shape)

    def _few_counts(self, symbols: Tensor) -> Tensor:
        """`_counts` in evaluation mode, by single look-ups."""
        read, begin = self._remembered(torch.float32).look_up, 0
        places, numbers = list[int](), list[int]()
        for entry in symbols.flatten(0, -2).tolist():
            for key in self._read.one(entry):
                if key is not None:
                    row = read(key)
                    for symbols_met, counts in (
                        *(() if row is None else (row,)),
                        *(() if self.also is None else self.also.rows(key)),
                    ):
                        places += [begin + symbol for symbol in symbols_met]
                        numbers += counts
                begin += self.K
        index = torch.tensor(places, dtype=torch.int64)
        sums = torch.bincount(index, torch.tensor(numbers, dtype=torch.float32), begin)
        return sums.view(*symbols.shape[:-1], len(self.patterns), self.K)

    def _remembered(self, dtype: torch.dtype) -> _Recalled:
        """The contexts of the table that were looked up of late, by whatever reads it."""
        rows = self._rows
        if rows is None or rows.table is not self.table or rows.shares.dtype != dtype:
            several = _TABLES.setdefault(self.table, {})
            key = dtype, len(self.patterns)
            if key not in several:
                several[key] = _Recalled(self.table, self.K, len(self.patterns), dtype)
            self._rows = rows = several[key]
        return rows

    def share(self, other: Counted) -> None:
        """Read the table of another mixture in place of an equal one, so that one is in memory."""
        if self.has_table and other.has_table and torch.equal(self.digest.cpu(), other.digest.cpu()):
            self._table = other.table

    def alone(self, symbols: Sequence[int]) -> Tensor:
        """Logits (K,) of one entry by counts alone: `forward` of equal logits, up to a constant.

        It takes a fraction of the time of `forward`, and is for the CPU, evaluation mode and no gradients.

        Args:
            symbols: the symbols around the entry, one for each column; K at places without a symbol.
        """
        rows = self._remembered(self.features.weight.dtype)
        rows.read_one(self._read.one(symbols), rows.alone)
        return self._mixture(rows.alone, None)

    def one(self, logits: Tensor, symbols: Sequence[int], h: Tensor | None = None) -> Tensor:
        """The mixture of one entry: logits (K,), the symbols around it, features (hidden_size,)."""
        rows = self._remembered(logits.dtype)
        entry = rows.beside
        rows.read_one(self._read.one(symbols), entry)
        log_p = logits.log_softmax(0)
        torch.exp(log_p, out=entry.network)
        torch.dot(entry.network, log_p, out=entry.entropy)
        torch.amax(log_p, 0, out=entry.highest)
        return self._mixture(entry, h).log_softmax(0)

    def _mixture(self, entry: _Entry, h: Tensor | None) -> Tensor:
        outer, inner, weights = self.features, self.inner, self.weights
        gate = torch.addmv(outer.bias, outer.weight, entry.inputs)
        if self.hidden is not None and h is not None:
            gate.addmv_(self.hidden.weight, h)
        gate = torch.addmv(inner.bias, inner.weight, F.gelu(gate))
        # The shares of a pattern that is not met are zeros, so that its weight changes a constant alone.
        shares = torch.addmv(weights.bias, weights.weight, F.gelu(gate)).softmax(0)
        tiny = torch.finfo(shares.dtype).tiny
        return torch.mv(entry.mixed, shares).clamp_(min=tiny).log_()

    def _counts(self, symbols: Tensor) -> Tensor:
        """Counts of all symbols in the contexts of entries, float32 ``(..., patterns, K)``."""
        keys, present = self._read(symbols)
        if self.training and self.dropout:
            present = present & (
                torch.rand(present.shape[:-1], device=present.device)[..., None] >= self.dropout
            )
        counts = self._on(self.table, symbols.device).dense(keys, present, self.K)
        if self.training and self.left_out is not None:
            counts -= self._on(self.left_out, symbols.device).dense(keys, present, self.K)
        if not self.training and self.also is not None:
            counts += self.also.dense(keys, present, self.K)
        return counts

    def _on(self, table: CountTable, device: torch.device) -> CountTable:
        """The table on a device. It is no buffer, which processes would exchange at each step."""
        if table.keys.device == device:
            return table
        moved = table.to(device)
        if table is self._table:
            self._table = moved
        else:
            self.left_out = moved
        return moved
