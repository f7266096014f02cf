"""The law of an entry as a mixture of what a network says and of what was counted in the training text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

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
#: How sure a mixture is, is read from the largest of its log-probabilities, by a perceptron of this width.
_TOP, _SURENESS_WIDTH = 4, 32
#: Most entries whose counts are looked up one by one, and most numbers that these may have.
_FEW, _FEW_NUMBERS = 64, 1 << 14


@cache
def loops() -> Any:
    """`dflow.nn.loops`; None where numba is not installed."""
    return import_module("dflow.nn.loops") if find_spec("numba") else None


class _Read:
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
        self._reader: tuple[CountTable, RowReader] | None = None
        self._looped: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None
        self.left_out: CountTable | None = None
        #: Whether a few entries are looked up by compiled loops, where numba is installed.
        self.compiled = True
        #: Counts to add in evaluation mode, such as those of the text before what is scored.
        self.also: CountSource | None = None

    @classmethod
    def of(cls, size: TransformerSize, K: int, both_sides: bool, more: int = 0) -> Counted | None:
        """The mixture for a Transformer of symbols; None where its size counts nothing."""
        if not size.counts:
            return None
        patterns = patterns_of(size.counts, both_sides)
        return cls(K, size.hidden_size, *patterns, size.counts_dropout, more=more)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made at the first look-up, which a copy makes anew."""
        return self.__dict__ | {"_reader": None, "_looped": None}

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
        log_p = at_least_float32(logits).log_softmax(-1)
        few = self._few(symbols)
        if few and not torch.is_grad_enabled() and (arrays := self._arrays(logits.dtype)) is not None:
            return self._by_loops(arrays, log_p, symbols, h)
        read = _Read((self._few_counts(symbols) if few else self._counts(symbols)).to(log_p.dtype))
        return self.recomputed(self._mixed, logits, log_p, read, h)

    def _mixed(self, logits: Tensor, log_p: Tensor, read: _Read, h: Tensor | None) -> Tensor:
        entries, patterns = logits.shape[:-1], len(self.patterns)
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
        if torch.compiler.is_compiling():
            return False
        return not self.training and symbols.device.type == "cpu" and 0 < symbols[..., 0].numel() <= few

    def _arrays(self, dtype: torch.dtype) -> tuple[Any, ...] | None:
        """The table, how it is read and the weights of the gate, for loops; None where tensors are used."""
        single = dtype == self.features.weight.dtype == torch.float32
        if not (single and self.compiled) or self.also is not None or loops() is None:
            return None
        layers, hidden = (self.features, self.inner, self.weights), self.hidden
        # Arrays share the memory of weights, and hold until these are moved.
        key = self.table, *(layer.weight.data_ptr() for layer in layers), hidden and hidden.weight.data_ptr()
        if self._looped is None or self._looped[0] != key:
            gate = [p.detach().numpy() for layer in layers for p in (layer.weight, layer.bias)]
            of_hidden = layers[0].weight[:, :0] if hidden is None else hidden.weight
            reading = self._read.factors.cpu().numpy(), self._read.bits
            self._looped = key, (self._rows().arrays, reading, (*gate, of_hidden.detach().numpy()))
        return self._looped[1]

    def _by_loops(self, arrays: tuple[Any, ...], log_p: Tensor, symbols: Tensor, h: Tensor | None) -> Tensor:
        """`_law` for a few entries by compiled loops."""
        n = symbols[..., 0].numel()
        out = torch.empty(n, self.K)
        if h is None or self.hidden is None:
            h = log_p.new_empty(n, 0)
        inputs = (x.reshape(n, x.shape[-1]).contiguous().numpy() for x in (symbols, log_p, h))
        loops().mix(*arrays, *inputs, out.numpy())
        return out.view(log_p.shape)

    def draft(self, before: Sequence[int], gumbel: Tensor) -> list[int]:
        """Symbols one after another, each the most probable one after Gumbel noise, by counts alone.

        For contexts of symbols before an entry, on the CPU and in evaluation mode.

        Args:
            before: the symbols before the first; those further away than the offsets may be missing.
            gumbel: noise, float64 ``(drafted, K)``.
        """
        reach = -min(self.offsets)
        line = [*before[-reach:]]
        begin, arrays = len(line), self._arrays(self.features.weight.dtype)
        if arrays is None:
            for noise in gumbel:
                columns = [self.K] * max(0, reach - len(line)) + line[-reach:]
                columns = [columns[offset + reach] for offset in self.offsets]
                law = self(self.features.weight.new_zeros(self.K), torch.tensor(columns))
                line.append(int((law + noise).argmax()))
            return line[begin:]
        symbols = torch.tensor([*line, *[self.K] * len(gumbel)])
        offsets = torch.tensor(self.offsets)
        loops().draft(*arrays, offsets.numpy(), symbols.numpy(), begin, gumbel.numpy())
        drafted: list[int] = symbols[begin:].tolist()
        return drafted

    def _few_counts(self, symbols: Tensor) -> Tensor:
        """`_counts` in evaluation mode, by single look-ups."""
        read, begin = self._rows(), 0
        places, numbers = list[int](), list[int]()
        for entry in symbols.reshape(-1, symbols.shape[-1]).tolist():
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

    def _rows(self) -> RowReader:
        if self._reader is None or self._reader[0] is not self.table:
            self._reader = self.table, RowReader(self.table)
        return self._reader[1]

    def share(self, other: Counted) -> None:
        """Read the table of another mixture in place of an equal one, so that one is in memory."""
        if self.has_table and other.has_table and torch.equal(self.digest.cpu(), other.digest.cpu()):
            self._table = other.table

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


def leave_uncompiled() -> None:
    """Keep torch.compile out of look-ups of counts; for those who import it anyway, which takes a second."""
    reason = "how many contexts are met depends on the text"
    Counted._counts = torch.compiler.disable(Counted._counts, reason=reason)  # type: ignore[method-assign]
