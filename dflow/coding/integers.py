"""Codes of integers under laws: windows, tables of cells, logistic laws and mixtures of them."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from dflow.coding.codes import Bernoulli, Bits, Edges, Golomb, Intervals, Shared, Stack, check_numbers, join
from dflow.coding.tables import LIMIT, LogisticTables, Tables, masses

#: Mixtures are coded in digits of this many bits.
_DIGIT = 2
_CELLS = 1 << _DIGIT

#: Standard scales on each side of a mixture that its cells cover. Beyond are 7e-4 of the numbers at most:
#: Golomb codes cost each of these a tenth of a bit over its law.
_REACH = 8.0


class WindowCode:
    """Integers of a window, each with a law of its own, and those beyond it by Golomb codes of order 0.

    First comes whether a number is the commonest one, which depends on one logit. The other logits are looked
    at only for numbers that are not: which of some groups of symbols, then which one of the group. See
    `ConditionalWindow`.

    Masses are whole numbers in proportion to probabilities (`masses`); sums of them are exact, whatever their
    order.

    Args:
        logits: of the tail below, each integer of the window, the tail above: ``(rows, entries, K + 2)``.
        start: to be added to them, ``(K + 2,)``; the largest is that of the commonest symbol.
        low: the first integer of the window of each entry, int64 ``(entries,)``.
    """

    def __init__(self, logits: Tensor, start: Tensor, low: Tensor) -> None:
        rows, self._entries, self._symbols = logits.shape
        self._logits, self._start = logits.detach().cpu(), start.cpu().to(logits.dtype)
        self._low, self._window = low.cpu().repeat(rows), self._symbols - 2
        self._common = int(start.argmax())
        # About as many groups as symbols of a group: 17 of 16 for 258.
        self._size = math.isqrt(self._symbols)
        self._groups = -(-self._symbols // self._size)
        self._is_common = Bernoulli(self._logits[..., self._common].flatten() + self._start[self._common])

    def _others(self, index: Tensor) -> tuple[Tensor, Edges]:
        """Masses of numbers that are not the common one, ``(n, groups, symbols of one)``; which group."""
        values = torch.full((len(index), self._groups * self._size), -math.inf, dtype=self._logits.dtype)
        logits = self._logits[index // self._entries, index % self._entries]
        torch.add(logits, self._start, out=values[:, : self._symbols])
        values[:, self._common] = -math.inf
        mass = masses(values, values.amax(1, keepdim=True), 1).unflatten(1, (self._groups, self._size))
        return mass, Edges(_below(mass.sum(2)))

    @staticmethod
    def _member(mass: Tensor, group: Tensor) -> Edges:
        """Which symbol of its group."""
        return Edges(_below(mass[torch.arange(len(group)), group]))

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a magnitude beyond 2^40."""
        check_numbers(x, len(self._low))
        offset = x - self._low
        symbol = offset.clamp(-1, self._window) + 1
        is_common = symbol == self._common
        others = (~is_common).nonzero().flatten()
        group, member = symbol[others] // self._size, symbol[others] % self._size
        mass, groups = self._others(others)
        _, tails = _tails(offset, self._window)
        return join(
            [
                self._is_common.intervals(is_common.long()),
                groups.intervals(group),
                self._member(mass, group).intervals(member),
                Golomb(torch.zeros_like(tails)).intervals(tails),
            ]
        )

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        others = (self._is_common.pop(stack) == 0).nonzero().flatten()
        mass, groups = self._others(others)
        group = groups.pop(stack)
        other = self._size * group + self._member(mass, group).pop(stack)
        symbol = torch.full_like(self._low, self._common).index_copy_(0, others, other)
        return self._low + _pop_tails(symbol - 1, self._window, torch.zeros_like(symbol), stack)


class Binned:
    """Integers in cells of tables: `LogisticTables`, `NormalTables`.

    First the cells, sorted by table, then how far those beyond the window lie, then the low bits.

    Args:
        tables: whose first and last symbols are the tails.
        index: the table of each number, int64 ``(n,)``.
        base: x lies in cell ``(x - base) >> shift`` of it, 0 being the first above the middle.
        shift: see ``base``.
        orders: of the Golomb codes of the tails, in cells.
        narrow: no more than ``2^orders`` cells are beyond the window on either side; others come out wrong.
    """

    def __init__(
        self,
        tables: Tables,
        index: Tensor,
        base: Tensor,
        shift: Tensor,
        orders: Tensor,
        narrow: bool = False,
    ) -> None:
        self.base, self.shift, self.orders = base, shift, orders
        self.window, self._tail = tables.K - 2, Bits if narrow else Golomb
        self._cells, self._low = Shared(tables, index), Bits(shift)

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a magnitude beyond 2^40."""
        check_numbers(x, len(self.base))
        offset = x - self.base
        cell = (offset >> self.shift) + self.window // 2
        beyond, tails = _tails(cell, self.window)
        return join(
            [
                self._cells.intervals(cell.clamp(-1, self.window) + 1),
                self._tail(self.orders[beyond]).intervals(tails),
                self._low.intervals(offset),
            ]
        )

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        cell = _pop_tails(self._cells.pop(stack) - 1, self.window, self.orders, stack, self._tail)
        cell -= self.window // 2
        return (cell << self.shift) + self._low.pop(stack) + self.base


class LogisticCode(Binned):
    """Integers under discretized logistic laws, by the tables that come nearest: see `LogisticTables`.

    Args:
        tables: usually `dflow.coding.tables.logistic_tables`.
        loc: means, floating ``(n,)``.
        log_scale: logs of the scales, floating ``(n,)``.
    """

    def __init__(self, tables: LogisticTables, loc: Tensor, log_scale: Tensor) -> None:
        super().__init__(tables, *tables.locate(loc, log_scale))


class MixtureCode:
    r"""Integers under mixtures of discretized logistic laws, digit by digit in base 4.

    A window holds every component to 8 scales on either side. First comes which of 4 cells of it a number
    lies in, or which tail; a cell of several integers is cut again until one is left. Each digit has its
    exact conditional law, so that mixtures of any kind cost a rounding to 24 bits a digit over the ideal, at
    the price of a short row of probabilities for each number and digit.

    Args:
        loc: means, floating ``(T, M)``.
        log_scale: logs of the scales, floating ``(T, M)``; held in -12..30.
        log_weights: logs of the weights up to a constant, floating ``(T, M)``.
        index: the mixture of each number, int64 ``(n,)``.

    Raises:
        ValueError: parameters that are not finite, or shapes that do not agree.
    """

    def __init__(self, loc: Tensor, log_scale: Tensor, log_weights: Tensor, index: Tensor) -> None:
        if loc.ndim != 2 or any(v.shape != loc.shape for v in (log_scale, log_weights)):
            shapes = [tuple(v.shape) for v in (loc, log_scale, log_weights)]
            raise ValueError(f"expected (T, M) three times, found {shapes}")
        # Component by component and edge by edge: each operation runs along all numbers.
        params = [v.detach().cpu().double().T.contiguous() for v in (loc, log_scale, log_weights)]
        # What is no number comes up at both ends.
        if loc.numel() and not all(math.isfinite(end) for v in params for end in v.aminmax()):
            raise ValueError("the parameters of a mixture of logistic laws are not finite")
        loc, scale, self.index = params[0].clamp(-LIMIT, LIMIT), params[1].clamp(-12, 30).exp_(), index.cpu()
        low = torch.sub(loc, scale, alpha=_REACH).amin(0).floor_()
        high = torch.add(loc, scale, alpha=_REACH).amax(0).ceil_()
        span = float((high - low).max()) / _CELLS if loc.numel() else 1.0
        # One width for all: cells cost no precision, they are cut again.
        self.shift = max(0, math.ceil(math.log2(max(1.0, span))))
        base = low.add_(high).div_(2).floor_().long() - ((_CELLS // 2) << self.shift)
        orders = torch.frexp(scale.amax(0)).exponent.long().sub_(1).clamp_(min=0)
        law: tuple[Tensor, ...] = (loc, 1 / scale, params[2].softmax(0))
        below = _cdf(base + (torch.arange(_CELLS + 1) << self.shift)[:, None], law)
        if not torch.equal(self.index, torch.arange(loc.shape[1])):
            law, below = tuple(v[:, self.index] for v in law), below[:, self.index]
            base, orders = base[self.index], orders[self.index]
        self._law, self._base, self._orders, self._below = law, base, orders, _rising(below)
        zero = torch.zeros_like(below[:1])
        self._cells = Edges(torch.cat([zero, self._below, zero + 1]))

    def _within(self, within: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Laws and masses below the edges of some numbers."""
        if len(within) == len(self.index):
            return self._law, self._below
        return tuple(v[:, within] for v in self._law), self._below[:, within]

    def _digits(self) -> list[tuple[int, int]]:
        return [(width, min(_DIGIT, width)) for width in range(self.shift, 0, -_DIGIT)]

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a magnitude beyond 2^40."""
        check_numbers(x, len(self.index))
        offset = x - self._base
        # Beyond the window there are no cells: distances are those of integers.
        beyond, tails = _tails(offset, _CELLS << self.shift)
        intervals = [
            self._cells.intervals((offset >> self.shift).clamp(-1, _CELLS) + 1),
            Golomb(self._orders[beyond]).intervals(tails),
        ]
        within = (~beyond).nonzero().flatten()
        x, offset = x[within], offset[within]
        law, below = self._within(within)
        ends = _ends(below, offset >> self.shift)
        for width, bits in self._digits():
            start = x - (offset & ((1 << width) - 1))
            below = _digit(start, ends, width, bits, law)
            digit = (x - start) >> (width - bits)
            intervals.append(Edges(below).intervals(digit))
            ends = _ends(below, digit)
        return join(intervals)

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        cell = self._cells.pop(stack) - 1
        within = ((cell >= 0) & (cell < _CELLS)).nonzero().flatten()
        offset = torch.where(cell < 0, -1, cell << self.shift)
        x = _pop_tails(offset, _CELLS << self.shift, self._orders, stack) + self._base
        start = x[within]
        law, below = self._within(within)
        ends = _ends(below, cell[within])
        for width, bits in self._digits():
            below = _digit(start, ends, width, bits, law)
            digit = Edges(below).pop(stack)
            start, ends = start + (digit << (width - bits)), _ends(below, digit)
        return x.index_copy(0, within, start)


def _cdf(edges: Tensor, law: tuple[Tensor, ...]) -> Tensor:
    """Mass below the integers ``edges`` ``(E, n)`` under mixtures: loc, 1 / scale and weights ``(M, n)``."""
    # Integers less a half would be float32.
    mass, edges = torch.zeros(edges.shape, dtype=torch.float64), edges.double() - 0.5
    for loc, rate, weight in zip(*law, strict=True):
        mass.addcmul_(weight, (edges - loc).mul_(rate).sigmoid_())
    return mass.clamp_(max=1)


def _rising(below: Tensor) -> Tensor:
    """Masses below edges ``(E, n)``, with the last bits of each no lower than those of the one before."""
    for before, after in pairwise(below):
        torch.maximum(before, after, out=after)
    return below


def _digit(start: Tensor, ends: Tensor, width: int, bits: int, law: tuple[Tensor, ...]) -> Tensor:
    """Masses below the edges of ``2^bits`` equal runs of the ``2^width`` integers from ``start`` on.

    ``ends`` ``(2, n)`` are those below the first and the last edge.
    """
    inner = _cdf(start + (torch.arange(1, 1 << bits) << (width - bits))[:, None], law)
    # The last is where it was: an edge before it that lies higher by its last bits comes down to it.
    return torch.cat([ends[:1], _rising(torch.clamp(inner, min=ends[:1], max=ends[1:])), ends[1:]])


def _ends(below: Tensor, digit: Tensor) -> Tensor:
    """The mass below the edges on both sides of a digit, ``(2, n)``."""
    return below.gather(0, torch.stack([digit, digit + 1]))


def _below(mass: Tensor) -> Tensor:
    """Masses below the edges between symbols ``(K + 1, n)``, of their own ``(n, K)``."""
    return torch.nn.functional.pad(mass.T.cumsum(0), (0, 0, 1, 0))


def _tails(offset: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Which offsets are outside ``0..end-1``, and how far."""
    beyond = (offset < 0) | (offset >= end)
    return beyond, torch.where(offset < 0, -1 - offset, offset - end)[beyond]


def _pop_tails(
    offset: Tensor, end: int, orders: Tensor, stack: Stack, tail: type[Bits] | type[Golomb] = Golomb
) -> Tensor:
    """The offsets, those at -1 and at ``end`` moved out to where they are."""
    beyond = ((offset < 0) | (offset >= end)).nonzero().flatten()
    tails = tail(orders[beyond]).pop(stack)
    return offset.index_add(0, beyond, torch.where(offset[beyond] < 0, -tails, tails))
