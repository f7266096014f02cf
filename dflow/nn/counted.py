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
from dflow.nn.recompute import Recomputable
from dflow.ops.counts import ContextReader, CountSource, CountTable, Pattern, RowReader, patterns_of
from dflow.ops.precision import at_least_float32

#: Numbers that the gate reads of each pattern.
_FEATURES = 5
#: Width of the gate.
_WIDTH = 96


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


class _Recalled:
    """Contexts that were looked up of late: a row of each tensor for every one; row 0 for those not met.

    The same contexts come again and again, and what a context needs beside its look-up is in memory then.

    Args:
        table: where they are looked up.
        K: size of the alphabet.
        patterns: number of contexts of an entry.
        dtype: of the tensors.

    Attributes:
        shares: relative frequency of each symbol, ``(rows, K)``.
        features: what the gate reads, ``(rows, features)``.
    """

    def __init__(self, table: CountTable, K: int, patterns: int, dtype: torch.dtype) -> None:
        self.K, self._dtype, self._read = K, dtype, RowReader(table)
        self._most = min(_REMEMBERED, _REMEMBERED_NUMBERS // K)
        self._clear()
        with torch.inference_mode(False):
            # Of one entry: what the gate reads, with no network beside it; a uniform law above the shares.
            self.inputs = torch.full((patterns * _FEATURES + 2,), -math.log(K), dtype=dtype)
            self.laws = torch.full((1 + patterns, K), 1 / K, dtype=dtype)
            self._parts = self.inputs[: patterns * _FEATURES].view(patterns, _FEATURES), self.laws[1:]

    def _clear(self) -> None:
        self._places: dict[int | None, int] = {None: 0}
        self._used = 1
        with torch.inference_mode(False):
            self.shares = torch.zeros(self._most, self.K, dtype=self._dtype)
            self.features = torch.zeros(self._most, _FEATURES, dtype=self._dtype)
            # Numbers are written one by one where that takes less time than a tensor of them.
            self._numbers: Any = self.shares.view(-1).numpy().data
            self._figures: Any = self.features.view(-1).numpy().data

    def read_one(self, keys: Sequence[int | None]) -> None:
        """Fill `inputs` and `laws` with the contexts of one entry."""
        index = torch.tensor(self.find([keys])[0])
        torch.index_select(self.features, 0, index, out=self._parts[0])
        torch.index_select(self.shares, 0, index, out=self._parts[1])

    def find(self, entries: Sequence[Sequence[int | None]]) -> list[list[int]]:
        """The row of each context by its hash, None for one that is not known.

        The rows hold until the next call.
        """
        if self._used + len(entries) * len(entries[0]) > self._most or len(self._places) > 4 * _REMEMBERED:
            self._clear()
        places = self._places
        return [[places[key] if key in places else self._add(key) for key in keys] for keys in entries]

    def _add(self, key: int | None) -> int:
        row = None if key is None else self._read(key)
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


class _Few:
    """The same for a few entries, each with the row of every pattern: long (entries, patterns)."""

    def __init__(self, rows: _Recalled, places: Tensor) -> None:
        self.met, flat = places > 0, places.view(-1)
        self.features = rows.features[flat]
        self.shares = rows.shares[flat].view(*places.shape, -1)

    def mixture(self, weights: Tensor) -> Tensor:
        """Sum of the relative frequencies of the patterns, weighted, (entries, K)."""
        weights = weights.reshape(-1, 1, weights.shape[-1]).to(self.shares.dtype)
        return torch.bmm(weights, self.shares)


#: The contexts of each table that were looked up of late, by precision and number of patterns.
_TABLES: WeakKeyDictionary[CountTable, dict[tuple[torch.dtype, int], _Recalled]] = WeakKeyDictionary()


def neighbours(symbols: Tensor, offsets: Sequence[int], K: int) -> Tensor:
    """The symbols at ``offsets`` from each entry, (batch, n, offsets), of (batch, n); K beyond the ends."""
    before, after = -min((0, *offsets)), max((0, *offsets))
    windows = F.pad(symbols, (before, after), value=K).unfold(1, before + 1 + after, 1)
    return windows[..., torch.tensor(offsets, device=symbols.device) + before]


class Counted(Recomputable):
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
        #: SHA-256 of the table, saved with the weights: these counts and no others belong to the model.
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))
        self._table: CountTable | None = None
        self.left_out: CountTable | None = None
        #: Counts to add in evaluation mode, such as those of the text before what is scored.
        self.also: CountSource | None = None

    @classmethod
    def of(cls, size: TransformerSize, K: int, both_sides: bool) -> Counted | None:
        """The mixture for a Transformer of symbols; None where its size counts nothing."""
        if not size.counts:
            return None
        return cls(K, size.hidden_size, *patterns_of(size.counts, both_sides), size.counts_dropout)

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
        """Log-probabilities ``(..., K)``.

        Args:
            logits: what the network says, ``(..., K)``.
            symbols: the symbols around each entry, int64 ``(..., columns)``; K where there is none or it is
                not known.
            h: features of the network, ``(..., hidden_size)``; None where it has none.
        """
        log_p = at_least_float32(logits).log_softmax(-1)
        entries = symbols.shape[:-1]
        few = (
            not self.training
            and self.also is None
            and symbols.device.type == "cpu"
            and 0 < entries.numel() <= min(self.few, _FEW_NUMBERS // self.K)
        )
        if few and not torch.is_grad_enabled():
            read: _Few | _Many = self._few(symbols.reshape(-1, symbols.shape[-1]).tolist(), log_p.dtype)
        else:
            read = _Many(self._counts(symbols).to(log_p.dtype))
        return self.recomputed(self._mixed, logits, log_p, read, h)

    def _mixed(self, logits: Tensor, log_p: Tensor, read: _Few | _Many, h: Tensor | None) -> Tensor:
        entries = logits.shape[:-1]
        patterns = len(self.patterns)
        features = read.features.to(log_p).view(*entries, patterns * _FEATURES)
        sure = torch.stack([(log_p.exp() * log_p).sum(-1), log_p.amax(-1)], -1)
        gate = self.features(torch.cat([features, sure], -1).to(logits.dtype))
        if self.hidden is not None and h is not None:
            gate = gate + self.hidden(h)
        weights = self.weights(F.gelu(self.inner(F.gelu(gate)))).to(log_p.dtype)
        met = F.pad(read.met.view(*entries, patterns), (1, 0), value=True)
        weights = weights.masked_fill(~met, -torch.inf).log_softmax(-1)
        counted = read.mixture(weights[..., 1:].exp()).to(log_p).view(log_p.shape)
        tiny = torch.finfo(log_p.dtype).tiny
        return torch.logaddexp(weights[..., :1] + log_p, counted.clamp(min=tiny).log())

    def _few(self, entries: list[list[int]], dtype: torch.dtype) -> _Few:
        """The counts of single entries, without a search for all at once."""
        rows = self._remembered(dtype)
        return _Few(rows, torch.tensor(rows.find([self._read.one(symbols) for symbols in entries])))

    def _remembered(self, dtype: torch.dtype) -> _Recalled:
        """The contexts of the table that were looked up of late, by whatever reads it."""
        several = _TABLES.setdefault(self.table, {})
        key = dtype, len(self.patterns)
        if key not in several:
            several[key] = _Recalled(self.table, self.K, len(self.patterns), dtype)
        return several[key]

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
        features = self.features
        rows = self._remembered(features.weight.dtype)
        rows.read_one(self._read.one(symbols))
        gate = F.gelu(torch.addmv(features.bias, features.weight, rows.inputs))
        gate = F.gelu(torch.addmv(self.inner.bias, self.inner.weight, gate))
        # The shares of a pattern that is not met are zeros, so that its weight changes a constant alone.
        weights = torch.addmv(self.weights.bias, self.weights.weight, gate).softmax(0)
        return torch.mv(rows.laws.t(), weights).log_()

    @torch.compiler.disable(reason="how many contexts are met depends on the text")  # type: ignore[untyped-decorator]
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
