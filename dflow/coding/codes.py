"""Codes of numbers: symbols under counts, integers under logistic laws and mixtures of them.

A code turns numbers into intervals in the order in which they are popped, and pops them again. What is
pushed is one array of intervals, whatever the alphabets.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import torch
from torch import Tensor

from dflow.coding.tables import LIMIT, PRECISION, LogisticTables, Tables, integer_counts, logit_counts, masses

#: Mixtures are coded in digits of this many bits.
_DIGIT = 2
_CELLS = 1 << _DIGIT

#: Raw bits are coded in pieces of this many.
_PIECE = 16

#: Logits that are looked at together: 1 MiB of float64.
_BLOCK = 1 << 17

#: Standard scales on each side of a mixture that its cells cover.
_REACH = 12.0

Intervals = tuple[Tensor, Tensor]


class Stack(Protocol):
    """What a code needs of a coder: `dflow.coding.coder.Coder`, or the reference."""

    def push(self, start: Tensor, size: Tensor) -> None:
        """Push intervals, the last first."""

    def pop_rows(self, counts: Tensor) -> Tensor:
        """A symbol under each row."""
        ...

    def pop_shared(self, tables: Tables, amounts: Tensor) -> Tensor:
        """So many symbols under each table, in the order of tables."""
        ...

    def pop_bits(self, widths: Tensor) -> Tensor:
        """Numbers of 1..16 bits."""
        ...


class Code(Protocol):
    """n numbers that are coded together."""

    def intervals(self, x: Tensor) -> Intervals:
        """Start and size of the intervals of ``x``, int64 ``(n,)``, in the order of popping."""
        ...

    def pop(self, stack: Stack) -> Tensor:
        """The numbers, int64 ``(n,)``."""
        ...


class Shared:
    """Symbols of which many have the same law.

    They are sorted by law: the coder runs through those of one without looking up the next.

    Args:
        tables: the laws.
        index: the law of each symbol, int64 ``(n,)``.
    """

    def __init__(self, tables: Tables, index: Tensor) -> None:
        self.tables, self.index = tables, index.cpu()
        # Short integers are sorted several times faster.
        short = torch.int16 if len(tables) <= 1 << 15 else torch.int32
        self._order = torch.sort(self.index.to(short), stable=True).indices

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a symbol that is not in 0..K-1."""
        _check_symbols(x, len(self.index), self.tables.K)
        place = (self.index * (self.tables.K + 1) + x)[self._order]
        line = self.tables.cumulative.cpu().flatten()
        start = line[place]
        return start, line[place + 1] - start

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        amounts = torch.bincount(self.index, minlength=len(self.tables))
        return torch.empty_like(self._order).index_copy_(
            0, self._order, stack.pop_shared(self.tables, amounts)
        )


class Rows:
    """Symbols that have a law each: `integer_counts`, ``(n, K)``."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts.cpu()

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a symbol that is not in 0..K-1."""
        _check_symbols(x, *self.counts.shape)
        size = self.counts.gather(1, x[:, None])
        start = self.counts.cumsum(1, dtype=torch.int32).gather(1, x[:, None]) - size
        return start.squeeze(1), size.squeeze(1)

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        return stack.pop_rows(self.counts)


class Bits:
    """Numbers below ``2^widths`` as they are; widths int64 ``(n,)``, 0 for no bits at all."""

    def __init__(self, widths: Tensor) -> None:
        self.widths = widths
        most = int(widths.max()) if len(widths) else 0
        self._pieces = []
        for low in range(0, most, _PIECE):
            place = (widths > low).nonzero().flatten()
            self._pieces.append((low, place, (widths[place] - low).clamp(max=_PIECE)))

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`."""
        parts = []
        for low, place, width in self._pieces:
            piece = (x[place] >> low) & ((1 << width) - 1)
            parts.append((piece << (PRECISION - width), 1 << (PRECISION - width)))
        return join(parts)

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        x = torch.zeros_like(self.widths)
        for low, place, width in self._pieces:
            x[place] += stack.pop_bits(width) << low
        return x


class Golomb:
    """Numbers from 0 on, by exponential Golomb codes of the orders given, int64 ``(n,)``.

    ``x >> order`` is in ``2^q - 1 .. 2^(q + 1) - 2`` with probability ``2^-(q + 1)``, evenly within.
    """

    def __init__(self, orders: Tensor) -> None:
        self.orders = orders

    @staticmethod
    @functools.cache
    def _classes() -> Tables:
        classes = 1 + (8 * LIMIT).bit_length()
        law = 2.0 ** -torch.arange(1, classes + 1, dtype=torch.float64)
        law[-1] *= 2
        return Tables(integer_counts(law[None]))

    def _shared(self) -> Shared:
        return Shared(self._classes(), torch.zeros_like(self.orders))

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`."""
        # The exponent of a float64 is exact for integers below 2^53.
        q = torch.frexp(((x >> self.orders) + 1).double()).exponent.long() - 1
        rest = x - (((1 << q) - 1) << self.orders)
        return join([self._shared().intervals(q), Bits(q + self.orders).intervals(rest)])

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        q = self._shared().pop(stack)
        return (((1 << q) - 1) << self.orders) + Bits(q + self.orders).pop(stack)


class Window:
    """Integers of a window, each with a law of its own, and those beyond it by Golomb codes of order 0.

    First comes whether a number is the one that data have most often. Where that is most of them, as in
    pictures on a plain ground, whole laws are made for few.

    Args:
        logits: of the tail below, each integer of the window, the tail above: ``(rows, entries, K + 2)``;
            fastest where entries lie side by side in memory.
        start: to be added to them, ``(K + 2,)``: logs of how often each is in data.
        low: the first integer of the window of each entry, int64 ``(entries,)``.
    """

    def __init__(self, logits: Tensor, start: Tensor, low: Tensor) -> None:
        self._logits, self._start, self._common = logits.detach().cpu(), start.cpu(), int(start.argmax())
        self._low, self._window = low.cpu().repeat(len(logits)), len(start) - 2
        # Some rows at a time, that stay near the processor.
        size = max(1, _BLOCK // self._logits[:1].numel())
        share = torch.cat([self._share(part.transpose(1, 2)) for part in self._logits.split(size)])
        total = 1 << PRECISION
        count = share.flatten().mul_(total).int().clamp_(2, total - 2)
        self._first = Rows(torch.stack([total - count, count], 1))

    def _share(self, logits: Tensor) -> Tensor:
        """That of the common symbol, of ``(rows, symbols, entries)``; sums of whole numbers are exact."""
        values = logits.float().add_(self._start.float()[:, None])
        mass = masses(values, values.amax(1, keepdim=True), 1)
        return mass[:, self._common] / mass.sum(1)

    def _others(self, index: Tensor) -> Code:
        """The code of symbols that are not the common one."""
        entries = self._logits.shape[1]
        rows = self._logits[index // entries, index % entries].add_(self._start)
        rows[:, self._common] = -math.inf
        return Rows(logit_counts(rows))

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a magnitude beyond 2^40."""
        check_numbers(x, len(self._low))
        offset = x - self._low
        symbol = offset.clamp(-1, self._window) + 1
        is_common = symbol == self._common
        others = (~is_common).nonzero().flatten()
        _, tails = _tails(offset, self._window)
        return join(
            [
                self._first.intervals(is_common.long()),
                self._others(others).intervals(symbol[others]),
                Golomb(torch.zeros_like(tails)).intervals(tails),
            ]
        )

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        others = (self._first.pop(stack) == 0).nonzero().flatten()
        symbol = torch.full_like(self._low, self._common)
        symbol.index_copy_(0, others, self._others(others).pop(stack))
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


class Logistic(Binned):
    """Integers under discretized logistic laws, by the tables that come nearest: see `LogisticTables`.

    Args:
        tables: usually `dflow.coding.tables.logistic_tables`.
        loc: means, floating ``(n,)``.
        log_scale: logs of the scales, floating ``(n,)``.
    """

    def __init__(self, tables: LogisticTables, loc: Tensor, log_scale: Tensor) -> None:
        super().__init__(tables, *tables.locate(loc, log_scale))


class Mixture:
    r"""Integers under mixtures of discretized logistic laws, digit by digit in base 4.

    A window holds every component to 12 scales on either side. First comes which of 4 cells of it a number
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
        given = [v.detach().cpu().double() for v in (loc, log_scale, log_weights)]
        if loc.ndim != 2 or any(v.shape != loc.shape for v in given):
            raise ValueError(f"expected (T, M) three times, found {[tuple(v.shape) for v in given]}")
        if not bool(torch.isfinite(torch.stack(given)).all()):
            raise ValueError("the parameters of a mixture of logistic laws are not finite")
        loc, scale, self.index = given[0].clamp(-LIMIT, LIMIT), given[1].clamp(-12, 30).exp(), index.cpu()
        low = (loc - _REACH * scale).amin(1).floor()
        high = (loc + _REACH * scale).amax(1).ceil()
        span = float((high - low).max()) / _CELLS if len(loc) else 1.0
        # One width for all: cells cost no precision, they are cut again.
        self.shift = max(0, math.ceil(math.log2(max(1.0, span))))
        base = ((low + high) / 2).floor().long() - ((_CELLS // 2) << self.shift)
        orders = scale.amax(1).log2().floor().long().clamp(min=0)
        # Component by component and edge by edge: each operation runs along all numbers.
        law = tuple(v.T.contiguous() for v in (loc, 1 / scale, given[2].softmax(1)))
        below = _cdf(base + (torch.arange(_CELLS + 1) << self.shift)[:, None], law)
        counts = integer_counts(_law(below, True))
        if torch.equal(self.index, torch.arange(len(loc))):
            self._law, self._base, self._orders, self._below = law, base, orders, below
        else:
            self._law, self._base = tuple(v[:, self.index] for v in law), base[self.index]
            self._orders, self._below, counts = orders[self.index], below[:, self.index], counts[self.index]
        self._cells = Rows(counts)

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
        parts = [
            self._cells.intervals((offset >> self.shift).clamp(-1, _CELLS) + 1),
            Golomb(self._orders[beyond]).intervals(tails),
        ]
        within = (~beyond).nonzero().flatten()
        x, offset = x[within], offset[within]
        law, below = self._within(within)
        ends = _ends(below, offset >> self.shift)
        for width, digit in self._digits():
            first = x - (offset & ((1 << width) - 1))
            code, below = _digit(first, ends, width, digit, law)
            part = (x - first) >> (width - digit)
            parts.append(code.intervals(part))
            ends = _ends(below, part)
        return join(parts)

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        cell = self._cells.pop(stack) - 1
        within = ((cell >= 0) & (cell < _CELLS)).nonzero().flatten()
        offset = torch.where(cell < 0, -1, cell << self.shift)
        x = _pop_tails(offset, _CELLS << self.shift, self._orders, stack) + self._base
        first = x[within]
        law, below = self._within(within)
        ends = _ends(below, cell[within])
        for width, digit in self._digits():
            code, below = _digit(first, ends, width, digit, law)
            part = code.pop(stack)
            first, ends = first + (part << (width - digit)), _ends(below, part)
        return x.index_copy(0, within, first)


def _cdf(edges: Tensor, law: tuple[Tensor, ...]) -> Tensor:
    """Mass below the integers ``edges`` ``(E, n)`` under mixtures: loc, 1 / scale and weights ``(M, n)``."""
    # Integers less a half would be float32.
    found, edges = torch.zeros(edges.shape, dtype=torch.float64), edges.double() - 0.5
    for loc, rate, weight in zip(*law, strict=True):
        found.addcmul_(weight, (edges - loc).mul_(rate).sigmoid_())
    return found.clamp_(max=1)


def _law(below: Tensor, tails: bool) -> Tensor:
    """Masses between edges, ``(n, K)``, of those below them, ``(E, n)``; and those of both tails."""
    cells = below.diff(dim=0).clamp_(min=0)
    return (torch.cat([below[:1], cells, 1 - below[-1:]]) if tails else cells).T.contiguous()


def _digit(
    first: Tensor, ends: Tensor, width: int, digit: int, law: tuple[Tensor, ...]
) -> tuple[Rows, Tensor]:
    """Code of which of ``2^digit`` parts of the ``2^width`` integers from ``first`` on holds a number.

    And the mass below the edges of the parts; ``ends`` ``(2, n)`` is that below the first and the last.
    """
    inner = _cdf(first + (torch.arange(1, 1 << digit) << (width - digit))[:, None], law)
    below = torch.cat([ends[:1], inner, ends[1:]])
    cells = _law(below, False)
    total = cells.sum(1, keepdim=True)
    return Rows(integer_counts(torch.where(total > 0, cells / total, 0.5**digit))), below


def _ends(below: Tensor, part: Tensor) -> Tensor:
    """The mass below the first and the last edge of a part, ``(2, n)``."""
    return below.gather(0, torch.stack([part, part + 1]))


def join(parts: list[Intervals]) -> Intervals:
    """Intervals one after another."""
    if not parts:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    starts, sizes = zip(*parts, strict=True)
    return torch.cat(starts), torch.cat(sizes)


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


def _check_symbols(x: Tensor, n: int, K: int) -> None:
    if x.shape != (n,) or x.dtype != torch.int64:
        raise ValueError(f"expected int64 ({n},), found {x.dtype} {tuple(x.shape)}")
    if n and (int(x.min()) < 0 or int(x.max()) >= K):
        raise ValueError(f"symbols must lie in 0..{K - 1}, found {int(x.min())}..{int(x.max())}")


def check_numbers(x: Tensor, n: int) -> None:
    """ValueError for what is not int64 ``(n,)`` within +-2^40."""
    if x.shape != (n,) or x.dtype != torch.int64:
        raise ValueError(f"expected int64 ({n},), found {x.dtype} {tuple(x.shape)}")
    if n and max(-int(x.min()), int(x.max())) > LIMIT:
        raise ValueError(f"numbers must lie in +-2^40, found {int(x.min())}..{int(x.max())}")
