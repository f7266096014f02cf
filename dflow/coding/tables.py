"""Probabilities as integers: the one place where floats become frequencies.

A law is coded under integer counts that sum to ``2^24``, each at least 1. A decoder has to have the
very same counts, so those of `LogisticTables` are the same on every machine: they come from correctly
rounded decimals and from single IEEE operations, never from a mathematical library or a sum of floats.
"""

from __future__ import annotations

import functools
import hashlib
import math
from decimal import Decimal, localcontext

import torch
from torch import Tensor, nn

#: Bits of a frequency.
PRECISION = 24

#: Cells of a table beside its two tails.
WINDOW = 256

#: Largest magnitude of a number that can be coded.
LIMIT = 1 << 40

_LEVELS = 8  # scales an octave
# Fractions of the mean for each octave of scales: spacing h costs 0.02 (h / s)^2 bit for s >= 1/2 and
# 0.06 h^2 / s below, on average over the mean; the spacing of the scales costs 0.0007.
_LOG_FRACTIONS = (6, 5, 5, 4, 4, 3, 2, 1, 0)
_LOWEST = -5  # octave of the first of them
_HIGHEST = _LOWEST + len(_LOG_FRACTIONS)
# Below these only the two cells at the edge nearest to the mean have any mass: the law is that of one logit,
# the distance in scales. Steps of it cost 0.001 bit at the edge, and 0 where the mean is far from an edge.
_LEAST = -18
_LOGITS, _STEPS = 140, 8
# Scales beyond the tables are coded in cells of up to this many bits, evenly within.
_SHIFTS = 16


def integer_counts(probabilities: Tensor, precision: int = PRECISION) -> Tensor:
    """Counts ``(..., K)``, int32, that sum to ``2^precision`` exactly and are at least 1.

    ``1 + floor(p (2^precision - K))``; what is left over or missing goes to the largest, the first of equals.
    Without any sum of floats, so that it does not depend on the order of summation. Costs about
    ``K / 2^precision`` nats a symbol over the entropy. For K = 2 the least count is 2: an interval of all but
    one is beyond what the coder takes.

    Args:
        probabilities: floating ``(..., K)``, normalised; computed with in float64.
        precision: bits, at most 24; enough for 64 counts a symbol.

    Raises:
        ValueError: rows that are negative, not finite or do not sum to 1 within 1e-6; a K that does not fit.

    >>> integer_counts(torch.tensor([0.5, 0.25, 0.25]), 8)
    tensor([128,  64,  64], dtype=torch.int32)
    """
    K = probabilities.shape[-1]
    least = 2 if K == 2 else 1
    if not 1 <= precision <= PRECISION or K not in range(2, 1 + (1 << precision) // 64):
        raise ValueError(f"{K} symbols do not fit into counts of {precision} bits")
    p = probabilities.double()
    if p.numel() and not (float(p.min()) >= 0 and float((p.sum(-1) - 1).abs().max()) <= 1e-6):
        raise ValueError("probabilities must be finite, not negative and sum to 1 within 1e-6")
    total = 1 << precision
    counts = (p * (total - least * K)).int().add_(least)
    largest = counts.argmax(-1, keepdim=True)
    return counts.scatter_add_(-1, largest, total - counts.sum(-1, keepdim=True, dtype=torch.int32))


def logit_counts(logits: Tensor) -> Tensor:
    r"""Counts ``(..., K)``, int32, as of `integer_counts`, for the probabilities ``softmax(logits)``.

    Logits are taken in steps of 1/128 below the largest, which costs 4e-6 bit, and their exponentials from a
    table of rounded decimals; all else is arithmetic of integers, but for a quotient and a product, which
    IEEE 754 gives to the bit. So logits that differ by 1e-15, as those of one net in float64 do on two
    machines, give another count with probability 1e-13; without the steps it would be up to 2e-8.

    Args:
        logits: floating ``(..., K)``, up to a constant; computed with in float64.

    Raises:
        ValueError: logits that are not finite or minus infinity, or only the latter; a K that does not fit.

    >>> logit_counts(torch.tensor([0.0, -1e9]).double()).tolist()
    [16777214, 2]
    """
    K = logits.shape[-1]
    least = 2 if K == 2 else 1
    if K not in range(2, 1 + (1 << PRECISION) // 64):
        raise ValueError(f"{K} symbols do not fit into counts of {PRECISION} bits")
    rows = logits.reshape(-1, K)
    counts = torch.empty(rows.shape, dtype=torch.int32)
    total, pieces = 1 << PRECISION, max(1, _PIECE // K)
    # A piece at a time: what is between stays near the processor.
    for piece, out in zip(rows.split(pieces), counts.split(pieces), strict=True):
        piece = piece.double()
        mass = masses(piece, piece.amax(-1, keepdim=True), -1)
        # Sums of integers below 2^53 are exact, whatever their order; of more than 2^16 masses they are not.
        whole = mass.sum(-1, keepdim=True) if K <= 1 << 16 else mass.long().sum(-1, keepdim=True).double()
        share = (total - least * K) / whole
        torch.floor(mass.mul_(share), out=mass)
        out.copy_(mass.add_(least))
        missing = total - out.sum(-1, keepdim=True, dtype=torch.int32)
        out.scatter_add_(-1, out.argmax(-1, keepdim=True), missing)
    return counts.view(logits.shape)


def masses(logits: Tensor, top: Tensor, dim: int) -> Tensor:
    """Whole numbers in proportion to the soft-max along ``dim``, float64; the largest is ``2^EXPONENT``.

    Computed in the precision of the logits, whose largest are ``top``.

    Raises:
        ValueError: logits that are not finite or minus infinity, or only the latter.
    """
    # Whatever is no number comes up here, and so does an infinity.
    if not bool(top.isfinite().all()):
        raise ValueError("logits must be finite, or minus infinity where another is finite")
    weights = _exponentials()
    # The whole part of half a step more is the nearest step.
    place = torch.sub(top.mul(GRID).add_(0.5), logits, alpha=GRID).clamp_(max=len(weights) - 1)
    return weights.index_select(0, place.int().flatten()).view(place.shape)


#: Numbers of a piece: 256 KiB of float64.
_PIECE = 1 << 15
#: Steps of logits a nat.
GRID = 128
#: The largest of the masses, as a power of 2.
EXPONENT = 37


@functools.cache
def _exponentials() -> Tensor:
    """``2^EXPONENT exp(-i / 128)``, rounded, float64, up to the first that is 0."""
    with localcontext() as context:
        context.prec = 40
        weights: list[int] = []
        while not weights or weights[-1]:
            weight = Decimal(1 << EXPONENT) * (-Decimal(len(weights)) / GRID).exp()
            weights.append(int(weight.to_integral_value()))
    return torch.tensor(weights, dtype=torch.float64)


@functools.cache
def sigmoid_counts() -> Tensor:
    """``2^24 / (1 + exp(-i / 128))`` for i = -m..m, rounded, int32; m the first that comes within 2 of 2^24.

    None is below 2 or over 2^24 - 2: an interval of all but one is beyond what the coder takes.
    """
    whole = 1 << PRECISION
    with localcontext() as context:
        context.prec = 40
        upper: list[int] = []
        while not upper or upper[-1] < whole - 2:
            count = whole / (1 + (-Decimal(len(upper)) / GRID).exp())
            upper.append(min(whole - 2, int(count.to_integral_value())))
    half = torch.tensor(upper, dtype=torch.int32)
    return torch.cat([whole - half[1:].flip(0), half])


class Tables(nn.Module):
    """T laws over the symbols 0..K-1, shared by many numbers.

    Args:
        counts: as `integer_counts` gives them, ``(T, K)``.

    Attributes:
        cumulative: int32 ``(T, K + 1)``: symbol k has the interval from ``cumulative[t, k]`` to the next.

    Raises:
        ValueError: counts that are not.
    """

    cumulative: Tensor

    def __init__(self, counts: Tensor) -> None:
        """See the class."""
        super().__init__()
        check_counts(counts)
        cumulative = torch.zeros(len(counts), counts.shape[1] + 1, dtype=torch.int32)
        torch.cumsum(counts, 1, dtype=torch.int32, out=cumulative[:, 1:])
        self.register_buffer("cumulative", cumulative)

    @property
    def K(self) -> int:
        """Number of symbols."""
        return self.cumulative.shape[1] - 1

    def __len__(self) -> int:
        return len(self.cumulative)

    def fingerprint(self) -> str:
        """SHA-256 of the tables: a decoder needs the same."""
        text = f"{len(self)} {self.K} {self.cumulative.flatten().tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()


class LogisticTables(Tables):
    r"""Tables of the discretized logistic law ``P(x) = F(x + 1/2) - F(x - 1/2)``, F of mean loc and scale s.

    Scales are ``2^(l / 8)``, from 2^-5 on; means lie at 64 fractions of a unit for the least of these to 1
    for those from 8 on. A table has 256 cells of size 1 about the mean, and a symbol at each end for what
    lies beyond. Scales from 16 on take the tables of scales in [8, 16) with cells of a power of 2 integers,
    that are equally likely. Below 2^-5 there are tables of two cells, by the distance of the mean from their
    edge.

    Over the law itself this costs less than 0.002 bit a number on average over the mean, for scales from
    2^-18 to 2^20; others are taken for these.

    The tables are the same on every machine; see `fingerprint`.
    """

    def __init__(self) -> None:
        """1680 tables of 258 counts; 0.2 s. Use `logistic_tables`."""
        super().__init__(_logistic_counts())
        sizes = torch.tensor(_LOG_FRACTIONS).repeat_interleave(_LEVELS)
        self.register_buffer("log_fractions", sizes, persistent=False)
        self.register_buffer("starts", (1 << sizes).cumsum(0) - (1 << sizes), persistent=False)

    log_fractions: Tensor
    starts: Tensor

    def locate(self, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where numbers with these parameters are coded: table, base, shift and order, each int64 ``(n,)``.

        x lies in cell ``(x - base) >> shift`` of the table, 0 being that of the mean. Computed in float64,
        each step a single IEEE operation: the level of the scale is ``8 log2 s`` rounded, halves to even,
        and the mean a multiple of its fraction so rounded, or the half integer above its floor where the
        shift is not 0, or an integer where the table is one of two cells. Means beyond +-2^40 are taken for
        these. The order is that of the Golomb code that fits the tails, in cells.

        Raises:
            ValueError: parameters that are not finite, or shapes that are not ``(n,)``.
        """
        loc, log_scale = loc.detach().cpu().double(), log_scale.detach().cpu().double()
        if loc.ndim != 1 or loc.shape != log_scale.shape:
            raise ValueError(f"expected (n,) twice, found {tuple(loc.shape)} and {tuple(log_scale.shape)}")
        if not bool((torch.isfinite(loc) & torch.isfinite(log_scale)).all()):
            raise ValueError("the parameters of a logistic law are not finite")
        level = (log_scale * (_LEVELS / math.log(2))).round()
        level = level.clamp(_LEVELS * _LEAST, _LEVELS * (_HIGHEST + _SHIFTS) - 1).long()
        shift = (level // _LEVELS - _HIGHEST + 1).clamp(min=0)
        level = level - _LEVELS * shift
        sharp, row = level < _LEVELS * _LOWEST, (level - _LEVELS * _LOWEST).clamp(min=0)
        loc, size = loc.clamp(-LIMIT, LIMIT), self.log_fractions.cpu()[row]
        place = torch.where(shift > 0, loc.floor(), (loc * (1 << size)).round()).long()
        index = self.starts.cpu()[row] + (place & ((1 << size) - 1))
        base = (place >> size) + (shift > 0).long() - ((1 << shift) >> 1)
        if bool(sharp.any()):
            near = loc[sharp].round()
            side = loc[sharp] - near
            logit = (0.5 - side.abs()) * _rates()[level[sharp] - _LEVELS * _LEAST]
            step = (_STEPS * logit).round().clamp(max=_LOGITS - 1).long()
            index[sharp] = len(self) - 2 * _LOGITS + step + _LOGITS * (side < 0)
            base[sharp] = near.long()
        return index, base, shift, (level // _LEVELS).clamp(min=0)


@functools.cache
def logistic_tables() -> LogisticTables:
    """The tables, made once a process."""
    return LogisticTables()


def check_counts(counts: Tensor) -> None:
    """ValueError for other than ``(T, K)`` counts of at least 1 that sum to 2^24, each at most 2^24 - 2."""
    if counts.ndim != 2 or counts.is_floating_point() or counts.shape[1] < 2:
        raise ValueError(
            f"counts must be integers (T, K), K >= 2, found {counts.dtype} {tuple(counts.shape)}"
        )
    whole = counts.numel() == 0 or (
        int(counts.min()) >= (2 if counts.shape[1] == 2 else 1)
        and bool((counts.sum(1, dtype=torch.int32) == 1 << PRECISION).all())
    )
    if not whole:
        raise ValueError(f"counts must be at least 1 (2 if there are two) and sum to 2^{PRECISION}")


@functools.cache
def _rates() -> Tensor:
    """``1 / s`` of the scales below the octaves that have tables, float64."""
    with localcontext() as context:
        context.prec = 40
        scales = range(-_LEVELS * _LEAST, -_LEVELS * _LOWEST, -1)
        return torch.tensor([float(_octaves(scale)) for scale in scales], dtype=torch.float64)


def _octaves(level: int) -> Decimal:
    """``2^(level / 8)``, of roots and integer powers only."""
    return Decimal(2) ** (level // _LEVELS) * Decimal(2).sqrt().sqrt().sqrt() ** (level % _LEVELS)


def _logistic_counts() -> Tensor:
    near, far, ratio, later = [], [], [], []
    with localcontext() as context:
        context.prec = 40
        for octave, size in enumerate(_LOG_FRACTIONS):
            for step in range(_LEVELS):
                scale = _octaves(_LEVELS * (octave + _LOWEST) + step)
                for fraction in range(1 << size):
                    # Edges of cells lie at half integers less the fraction: the first that is not negative.
                    edge = Decimal(1) / 2 - Decimal(fraction) / (1 << size)
                    later.append(edge < 0)
                    edge += edge < 0
                    near.append(float((-edge / scale).exp()))
                    far.append(float(((edge - 1) / scale).exp()))
                ratio += [float((-1 / scale).exp())] * (1 << size)
        odds = torch.tensor(
            [float((-Decimal(i) / _STEPS).exp()) for i in range(_LOGITS)], dtype=torch.float64
        )
    above, below, factor = (torch.tensor(v, dtype=torch.float64) for v in (near, far, ratio))
    # exp(-|e| / s) of the edges e from there up, and from there down.
    up, down = [above], [below]
    for _ in range(WINDOW // 2 + 1):
        up.append(up[-1] * factor)
        down.append(down[-1] * factor)
    start = WINDOW // 2 + 1 + torch.tensor(later).long()
    place = torch.arange(WINDOW + 1) - start[:, None]
    upper = torch.stack(up, 1).gather(1, place.clamp(min=0))
    lower = torch.stack(down, 1).gather(1, (-1 - place).clamp(min=0))
    cdf = torch.where(place >= 0, 1 / (1 + upper), lower / (1 + lower))
    tail = upper[:, -1:] / (1 + upper[:, -1:])
    law = torch.cat([cdf[:, :1], cdf[:, 1:] - cdf[:, :-1], tail], 1)
    sharp = torch.zeros(2, _LOGITS, WINDOW + 2, dtype=torch.float64)
    centre = 1 + WINDOW // 2
    sharp[:, :, centre] = 1 / (1 + odds)
    sharp[0, :, centre + 1] = sharp[1, :, centre - 1] = odds / (1 + odds)
    return integer_counts(torch.cat([law, sharp.flatten(0, 1)]))
