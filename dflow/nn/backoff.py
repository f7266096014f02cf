"""Counts alone as a network without a weight: every order of n-grams, trusted as much as it has been seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dflow.nn.counted import Counted, loops
from dflow.nn.ngram import NgramNet, NgramState
from dflow.ops.counts import ContextReader, RowReader, patterns_of
from dflow.ops.devices import widen

#: How much more often a context is followed by a symbol that is new to it than in the counted text. Measured
#: on PTB: 1.660, 1.493, 1.386 and 1.336 bits with 1, 2, 4 and 8; an n-gram law that was trained has 1.319.
_NEW = 8.0
#: Most contexts that are remembered.
_REMEMBERED = 1 << 16

#: More symbols than this are added up in tensors.
_FEW = 16


@dataclass(frozen=True)
class _Shares:
    """A context: the share of what is new to it, and its symbols with their shares."""

    new: float
    symbols: list[int]
    shares: list[float]
    #: The same, where they are many.
    tensors: tuple[Tensor, Tensor] | None


class BackoffNet(NgramNet):
    r"""Logits of each entry from how often symbols followed the ones before it in a table of counts.

    .. math:: p_j(x) = \frac{n_j(x) + 8 d_j \, p_{j - 1}(x)}{n_j + 8 d_j}

    where the last j symbols stand ``n_j`` times in the counted text, before ``d_j`` different ones; where
    they do not, p is that of fewer symbols, and at last uniform. It is for drafts
    (`dflow.distributions.drafted`): it needs the counts of another model and no training.

    Args:
        counted: a mixture with a table, whose contexts of symbols before an entry are read.

    Source: the smoothing of Witten and Bell 1991 (IEEE Transactions on Information Theory 37), with a factor.
    """

    def __init__(self, counted: Counted) -> None:
        """See the class."""
        nn.Module.__init__(self)
        self.K, self.table = counted.K, counted.table
        self.counts = max((len(p) for p in counted.patterns if all(o < 0 for o in p)), default=0)
        self.offsets, self.patterns = patterns_of(self.counts, False)
        self._read = ContextReader(self.K, self.offsets, self.patterns)
        self._row: RowReader | None = None
        self._rows: dict[int, _Shares | None] = {}

    def start(self, batch: int, context: object = None) -> NgramState:
        """State before the first `step` of ``batch`` sequences."""
        return NgramState(torch.full((batch, self.counts), self.K, device=self.table.keys.device))

    @property
    def single_cost(self) -> float:
        """See `NgramNet.single_cost`."""
        return 0.01 if loops() else 0.08

    def single(self, before: Sequence[int]) -> Tensor:
        """See `NgramNet.single`."""
        rows = list[_Shares]()
        for key in self._read.one(self._last(before)):
            if (row := self._find(key)) is None:
                break
            rows.append(row)
        few, rest, p = defaultdict[int, float](float), 1.0, torch.zeros(self.K, dtype=torch.float64)
        for row in reversed(rows):
            if row.tensors is not None:
                p.index_add_(0, *row.tensors, alpha=rest)
            for symbol, share in zip(row.symbols, row.shares, strict=True):
                few[symbol] += rest * share
            rest *= row.new
        if few:
            p.index_add_(0, torch.tensor([*few]), torch.tensor([*few.values()], dtype=torch.float64))
        return p.add_(rest / self.K).log_()

    def draft(self, before: Sequence[int], gumbel: Tensor) -> list[int]:
        """See `NgramNet.draft`."""
        line = [*before[-self.counts :]] if self.counts else []
        begin = len(line)
        if loops() is None:
            for noise in gumbel:
                line.append(int((self.single(line) + noise).argmax()))
            return line[begin:]
        if self._row is None:
            self._row = RowReader(self.table)
        symbols, offsets = torch.tensor([*line, *[self.K] * len(gumbel)]), torch.tensor(self.offsets)
        reading = self._read.factors.cpu().numpy(), self._read.bits
        arrays = offsets.numpy(), symbols.numpy(), begin, gumbel.numpy(), _NEW
        loops().back_off(self._row.arrays, reading, *arrays)
        drafted: list[int] = symbols[begin:].tolist()
        return drafted

    def _find(self, key: int | None) -> _Shares | None:
        if key is None:
            return None
        if key in self._rows:
            return self._rows[key]
        if len(self._rows) >= _REMEMBERED:
            self._rows.clear()
        if self._row is None:
            self._row = RowReader(self.table)
        counts = self._row(key)
        row = None
        if counts is not None:
            total = sum(counts.counts) + (new := _NEW * len(counts.symbols))
            shares, tensors = [count / total for count in counts.counts], None
            if len(shares) > _FEW:
                tensors = torch.tensor(counts.symbols), torch.tensor(shares, dtype=torch.float64)
            few = counts.symbols if tensors is None else []
            row = _Shares(new / total, few, shares[: len(few)], tensors)
        self._rows[key] = row
        return row

    def _logits(self, symbols: Tensor) -> Tensor:
        keys, known = self._read(symbols)
        counts = widen(self.table.dense(keys, known, self.K))
        p = torch.full_like(counts[..., 0, :], 1 / self.K)
        for j in range(len(self.patterns)):
            n = counts[..., j, :]
            new = _NEW * (n > 0).sum(-1, keepdim=True)
            total = n.sum(-1, keepdim=True) + new
            p = torch.where(new > 0, (n + new * p) / total.clamp(min=1), p)
        return p.log()
