"""Codes of symbols under counts, and of integers by bits; `dflow.coding.integers` has those under laws.

A code turns numbers into intervals in the order in which they are popped, and pops them again. What is
pushed is one array of intervals, whatever the alphabets.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from dflow.coding.tables import GRID, LIMIT, PRECISION, Tables, integer_counts, sigmoid_counts

#: Raw bits are coded in pieces of this many.
_PIECE = 16

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
        """Start and size of the intervals of ``x``, integers ``(n,)``, in the order of popping."""
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


class RowsCode:
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


class Edges:
    """Symbols that have a law each, given by the mass below the edges between them.

    Symbol k lies between edges k and k + 1, and has the counts from ``c_k`` to ``c_{k + 1}``, with
    ``c_k = l k + floor((b_k - b_0) (2^24 - l K) / (b_K - b_0) + 1/2)`` and l = 1, or 2 if K = 2: each step a
    single operation of IEEE 754, no sum. Where all edges are the same, symbols are equally
    likely.

    Args:
        below: masses up to a constant, float64 ``(K + 1, n)``, that never fall along the edges.
    """

    def __init__(self, below: Tensor) -> None:
        self.K, total = len(below) - 1, below[-1] - below[0]
        if below.numel() and not bool((total > 0).all()):
            even = torch.arange(self.K + 1, dtype=below.dtype)[:, None].expand_as(below)
            below = torch.where(total > 0, below, even)
            total = below[-1] - below[0]
        self._below, self._total = below, total

    def _counts(self, edge: Tensor, below: Tensor) -> Tensor:
        least = 2 if self.K == 2 else 1
        share = ((1 << PRECISION) - least * self.K) / self._total
        return (below - self._below[0]).mul_(share).add_(0.5).int().add_(edge, alpha=least)

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a symbol that is not in 0..K-1."""
        _check_symbols(x, self._below.shape[1], self.K)
        edges = torch.stack([x, x + 1])
        start, stop = self._counts(edges, self._below.gather(0, edges))
        return start, stop - start

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        edges = torch.arange(self.K + 1)[:, None]
        return stack.pop_rows(self._counts(edges, self._below).diff(dim=0).T)


class Bernoulli:
    """0 and 1, 1 with probability ``1 / (1 + exp(-logit))``.

    Logits are taken in steps of 1/128, and counts from a table of rounded decimals: see `logit_counts`.

    Args:
        logits: floating ``(n,)``.

    Raises:
        ValueError: a logit that is not finite.
    """

    def __init__(self, logits: Tensor) -> None:
        counts = sigmoid_counts()
        middle = len(counts) // 2
        if not bool(logits.isfinite().all()):
            raise ValueError("logits must be finite")
        step = logits.mul(GRID).round_().clamp_(-middle, middle).int().add_(middle)
        self._zeros = (1 << PRECISION) - counts.index_select(0, step)

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a symbol that is neither."""
        _check_symbols(x, len(self._zeros), 2)
        start = x.int() * self._zeros
        return start, torch.where(x > 0, (1 << PRECISION) - start, self._zeros)

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        return stack.pop_rows(torch.stack([self._zeros, (1 << PRECISION) - self._zeros], 1))


class Bits:
    """Numbers below ``2^widths``, all equally likely; widths int64 ``(n,)``, 0 for no bits at all."""

    def __init__(self, widths: Tensor) -> None:
        self.widths = widths
        most = int(widths.max()) if len(widths) else 0
        self._pieces = []
        for low in range(0, most, _PIECE):
            place = (widths > low).nonzero().flatten()
            self._pieces.append((low, place, (widths[place] - low).clamp(max=_PIECE)))

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`."""
        intervals = []
        for low, place, width in self._pieces:
            bits = (x[place] >> low) & ((1 << width) - 1)
            intervals.append((bits << (PRECISION - width), 1 << (PRECISION - width)))
        return join(intervals)

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
        within = x - (((1 << q) - 1) << self.orders)
        return join([self._shared().intervals(q), Bits(q + self.orders).intervals(within)])

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        q = self._shared().pop(stack)
        return (((1 << q) - 1) << self.orders) + Bits(q + self.orders).pop(stack)


def join(intervals: list[Intervals]) -> Intervals:
    """Intervals one after another."""
    if not intervals:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    starts, sizes = zip(*intervals, strict=True)
    return torch.cat(starts), torch.cat(sizes)


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
