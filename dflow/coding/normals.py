"""Codes of numbers on a grid under normal laws, and of noise in a cell of an image's values.

Counts come from correctly rounded decimals and from single IEEE operations, as those of `LogisticTables`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import torch
from torch import Tensor

from dflow.coding.codes import Code, Intervals, RowsCode, Stack, join
from dflow.coding.integers import Binned
from dflow.coding.tables import LIMIT, Tables, integer_counts

#: Cells of a table on each side of the mean. Each has a count at least: the more of them lie where there is
#: no mass, the more often is one popped, and what then has to be coded for it lies far off.
_HALF = 160
#: Scales an octave of those from 16 cells on, which have cells of a power of 2 integers: 7e-6 bit on average.
_WIDE, _OCTAVE = 64, 4
#: Scales an octave from 1/2 to 16, and logs of the fractions of the mean for each of these octaves.
_NARROW, _LOWEST, _LOG_FRACTIONS = 8, -1, (5, 4, 3, 2, 1)

#: Bits that noise in a cell is coded by at a time.
_DIGIT = 4


class NormalTables(Tables):
    r"""Tables of a normal law on the integers, ``P(x) = Phi((x + 1/2 - m) / s) - Phi((x - 1/2 - m) / s)``.

    Scales from 16 on have 64 tables of scales in [16, 32) and cells of ``2^shift`` equally likely integers;
    the mean is the half integer above its floor. Scales in [1/2, 16) have 8 tables an octave and 32 to 2
    fractions of the mean; those below 1/2 are taken for 1/2. Each has 320 cells, 5 to 10 standard deviations
    on either side where they are wide, and a symbol at each end for what lies beyond.

    For scales from 64 on this costs 1e-4 to 3e-4 bit a number, mostly because the law is even within a cell.
    """

    def __init__(self) -> None:
        """560 tables of 322 counts. Use `normal_tables`."""
        super().__init__(_normal_counts())

    @staticmethod
    def locate(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `Binned` needs, each int64 ``(n,)``: table, base, shift, order.

        Args:
            loc: means ``(n,)``, float64; beyond +-2^40 taken for these.
            scale: standard deviations, of the same shape; beyond 2^39 taken for this.

        Raises:
            ValueError: parameters that are not finite, or shapes that are not ``(n,)``.
        """
        if loc.ndim != 1 or loc.shape != scale.shape:
            raise ValueError(f"expected (n,) twice, found {tuple(loc.shape)} and {tuple(scale.shape)}")
        if not bool((torch.isfinite(loc) & torch.isfinite(scale)).all()):
            raise ValueError("the parameters of a normal law are not finite")
        loc, scale = loc.double().clamp(-LIMIT, LIMIT), scale.double().clamp(0.5, 2.0**39)
        mantissa, exponent = torch.frexp(scale)
        octave = exponent.long() - 1  # scale = 2^octave * (2 mantissa)
        place = 2 * mantissa - 1
        shift = (octave - _OCTAVE).clamp(min=0)
        index = (place * _WIDE).long()
        base = loc.floor().long() + 1
        narrow = octave < _OCTAVE
        if bool(narrow.any()):
            low = octave[narrow] - _LOWEST
            size = torch.tensor(_LOG_FRACTIONS)[low]
            starts = [_WIDE]
            for log in _LOG_FRACTIONS:
                starts.append(starts[-1] + (_NARROW << log))
            mean = (loc[narrow] * (1 << size)).round().long()
            level = (place[narrow] * _NARROW).long()
            index[narrow] = torch.tensor(starts)[low] + (level << size) + (mean & ((1 << size) - 1))
            base[narrow] = mean >> size
        return index, base, shift, (octave - 2).clamp(0, 2)


@functools.cache
def normal_tables() -> NormalTables:
    """The tables, made once a process."""
    return NormalTables()


class NormalCode(Binned):
    """Integers under normal laws: see `NormalTables`.

    Args:
        loc: means, float64 ``(n,)``.
        scale: standard deviations, float64 ``(n,)``.
        narrow: draws of it lie in its window and 4 cells beyond, no other numbers can be pushed.
    """

    def __init__(self, loc: Tensor, scale: Tensor, narrow: bool = False) -> None:
        tables = normal_tables()
        super().__init__(tables, *tables.locate(loc, scale), narrow)


#: Mass below the points ``i / 2^bits`` of a cell: int64 ``(E, n)`` to float64 of that shape.
Cdf = Callable[[Tensor], Tensor]


class Place:
    """Where in its cell each of n numbers lies, 0..2^bits - 1, digit by digit under any law of the cell.

    Args:
        cdf: of the law; never falls.
        n: numbers.
        bits: of a place.
    """

    def __init__(self, cdf: Cdf, n: int, bits: int) -> None:
        self.cdf, self.n = cdf, n
        self._digits = [(width, min(_DIGIT, width)) for width in range(bits, 0, -_DIGIT)]

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`."""
        start, intervals = torch.zeros(self.n, dtype=torch.int64), []
        for width, bits in self._digits:
            symbol = (x >> (width - bits)) & ((1 << bits) - 1)
            intervals.append(self._code(start, width, bits).intervals(symbol))
            start = start + (symbol << (width - bits))
        return join(intervals)

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        start = torch.zeros(self.n, dtype=torch.int64)
        for width, bits in self._digits:
            start = start + (self._code(start, width, bits).pop(stack) << (width - bits))
        return start

    def _code(self, start: Tensor, width: int, bits: int) -> Code:
        edges = self.cdf(start + (torch.arange((1 << bits) + 1) << (width - bits))[:, None])
        cells = edges.diff(dim=0).clamp_(min=0)
        # Row by row, so that no library chooses the order.
        total = functools.reduce(torch.add, cells.unbind())
        return RowsCode(integer_counts(torch.where(total > 0, cells / total, 0.5**bits).T.contiguous()))


@functools.cache
def logits(bits: int) -> Tensor:
    """``log(i / (2^bits - i))`` for i in 0..2^bits, float64, infinite at the ends."""
    # Of one half exactly the negative of the other.
    half = [math.log(i / ((1 << bits) - i)) for i in range(1, 1 << (bits - 1))] if bits else []
    upper = [-value for value in reversed(half)]
    middle = [0.0] if bits else []
    return torch.tensor([-math.inf, *half, *middle, *upper, math.inf], dtype=torch.float64)


def logit_normal(loc: Tensor, scale: Tensor, bits: int) -> Place:
    """Place in a cell of ``sigmoid(z)``, z normal: ``loc`` and ``scale`` float64 ``(n,)``."""
    line = logits(bits)

    def cdf(place: Tensor) -> Tensor:
        below: Tensor = torch.special.ndtr((line[place] - loc) / scale)
        return below

    return Place(cdf, len(loc), bits)


def _normal_counts() -> Tensor:
    """Masses of cells by Simpson's rule, on points that are reached from the middle by recurrence."""
    half = Decimal("0.5")
    counts = [_counts([(16 * (1 + (i + half) / _WIDE), -half) for i in range(_WIDE)], 2)]
    for octave, log in enumerate(_LOG_FRACTIONS):
        laws = [
            (Decimal(2) ** (octave + _LOWEST) * (1 + (i + half) / _NARROW), Decimal(f) / (1 << log))
            for i in range(_NARROW)
            for f in range(1 << log)
        ]
        counts.append(_counts(laws, 32 >> octave))
    return torch.cat(counts)


def _counts(laws: list[tuple[Decimal, Decimal]], steps: int) -> Tensor:
    """Counts for scales and means, in cells ``[i - 1/2, i + 1/2)``, each integrated in so many steps."""
    start, up, down, turn = [], [], [], []
    with localcontext() as context:
        context.prec = 40
        for scale, mean in laws:
            # phi(a + j d) = phi(a) exp(-a d)^j exp(-d^2 / 2)^(j^2), a the lower edge of cell 0.
            a, d = (Decimal("-0.5") - mean) / scale, 1 / (scale * steps)
            start.append(float((-a * a / 2).exp() * d))
            up.append(float((-a * d - d * d / 2).exp()))
            down.append(float((a * d - d * d / 2).exp()))
            turn.append(float((-d * d).exp()))
        simpson = float(1 / (3 * (2 * Decimal("3.14159265358979323846264338327950288")).sqrt()))
    middle, above, below, factor = (torch.tensor(v, dtype=torch.float64) for v in (start, up, down, turn))
    halves = []
    for ratio in (above, below):
        points, value = [middle], middle
        for _ in range(_HALF * steps):
            value, ratio = value * ratio, ratio * factor
            points.append(value)
        line = torch.stack(points, 1)
        mass = torch.zeros(len(laws), _HALF, dtype=torch.float64)
        for j in range(steps + 1):
            weight = 1 if j in (0, steps) else 4 if j % 2 else 2
            mass = mass + weight * line[:, j : j + _HALF * steps - steps + 1 : steps]
        halves.append(mass * simpson)
    tail = torch.zeros(len(laws), 1, dtype=torch.float64)
    return integer_counts(torch.cat([tail, halves[1].flip(1), halves[0], tail], 1))
