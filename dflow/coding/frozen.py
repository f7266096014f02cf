"""Laws whose probabilities are integers that a file holds, so that a decoder does not compute them.

A mathematical library rounds otherwise on another machine, so the integers of a mixture of logistic laws
would differ there. Here such a law is cut into cells once, and the cells are kept.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from dflow.coding.codes import Bits, Golomb, Intervals, Shared, Stack, check_numbers, join
from dflow.coding.tables import LIMIT, Tables, integer_counts
from dflow.core import Context, Distribution
from dflow.distributions.logistic import LEAST, MOST, ConditionalLogistic, LogisticMixture

#: Standard scales on each side of a mixture that its cells cover.
_REACH = 12.0
#: A cell is cut in two as long as evenness within it could cost more than this, in bits a number.
_TOLERANCE = 2e-6
#: Most cells of a law; the tolerance is raised until they suffice.
_CELLS = 4096
#: Width of what is no cell: laws of fewer cells than others are filled up with these.
_NONE = 255


class MixtureTables(Tables):
    """T laws on the integers, each a window cut into cells, and a symbol at each end for what lies beyond.

    Symbol 0 is what lies below ``base``; symbol k a cell of ``2^widths[k - 1]`` equally likely integers,
    after the one before it; the last what lies above. Distances beyond have Golomb codes of the order given.

    Args:
        counts: as `integer_counts` gives them, ``(T, C + 2)``.
        base: the first integer of each window, int64 ``(T,)``.
        widths: of the cells, uint8 ``(T, C)``; 255 for no cell, after all others.
        orders: of the Golomb codes, uint8 ``(T,)``.

    Raises:
        ValueError: tensors that are not these.
    """

    base: Tensor
    widths: Tensor
    orders: Tensor
    ends: Tensor
    line: Tensor

    def __init__(self, counts: Tensor, base: Tensor, widths: Tensor, orders: Tensor) -> None:
        """See the class."""
        super().__init__(counts)
        T = len(counts)
        expected = {
            "base": (base, torch.int64, (T,)),
            "widths": (widths, torch.uint8, (T, self.K - 2)),
            "orders": (orders, torch.uint8, (T,)),
        }
        for name, (tensor, dtype, shape) in expected.items():
            if tensor.dtype != dtype or tensor.shape != shape:
                actual = f"found {tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"{name} must be {dtype} {shape}, {actual}")
            self.register_buffer(name, tensor.clone())
        none = widths == _NONE
        if bool((none[:, :-1] & ~none[:, 1:]).any()) or bool((widths[~none] > 44).any()):
            raise ValueError("widths of cells must be at most 44 bits, and 255 after the last")
        if bool((base.abs() > 8 * LIMIT).any()) or bool((orders > 44).any()):
            raise ValueError("windows must lie within the numbers that can be coded")
        sizes = torch.where(none, 0, 1 << torch.where(none, 0, widths).long())
        ends = torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
        if T and int(ends.max()) > 8 * LIMIT:
            raise ValueError("windows must lie within the numbers that can be coded")
        self.register_buffer("ends", ends, persistent=False)
        # The ends of all windows on one line, so that one search finds the cells of all numbers.
        self._stride = int(ends.max()) + 2 if T else 2
        if T * self._stride >= 1 << 62:
            raise ValueError(f"{T} windows of up to {self._stride - 2} integers are too many")
        line = ends + 1 + self._stride * torch.arange(T)[:, None]
        self.register_buffer("line", line.flatten(), persistent=False)

    def find(self, offset: Tensor, index: Tensor) -> Tensor:
        """Symbols of numbers at ``offset`` from the base of their law, int64 ``(n,)`` both."""
        total = self.ends[:, -1][index]
        key = torch.minimum(offset.clamp(min=-1), total) + 1 + self._stride * index
        return torch.searchsorted(self.line, key, right=True) - index * (self.K - 1)


def mixture_tables(loc: Tensor, log_scale: Tensor, log_weights: Tensor) -> MixtureTables:
    """Tables of mixtures of discretized logistic laws.

    A window holds every component to 12 scales on either side. Its cells are halved until evenness in each
    costs no more than 2e-6 bit a number: a component of scale s varies by a factor of ``exp((w - 1)/s)`` at
    most within w integers, and to take it for even there costs its mass times ``((w - 1)/s)^2 / 8`` nats at
    most (Hoeffding's lemma), or ``log w``; and a mixture no more than its components.

    Args:
        loc: means, floating ``(T, M)``.
        log_scale: logs of the scales, of the same shape; held in -12..30.
        log_weights: logs of the weights up to a constant, of the same shape.

    Raises:
        ValueError: parameters that are not finite, or shapes that do not agree.
    """
    params = [v.detach().cpu().double() for v in (loc, log_scale, log_weights)]
    if loc.ndim != 2 or any(v.shape != loc.shape for v in params):
        raise ValueError(f"expected (T, M) three times, found {[tuple(v.shape) for v in params]}")
    if not bool(torch.isfinite(torch.stack(params)).all()):
        raise ValueError("the parameters of a mixture of logistic laws are not finite")
    loc, scale, weights = (
        params[0].clamp(-LIMIT, LIMIT),
        params[1].clamp(LEAST, MOST).exp(),
        params[2].softmax(1),
    )
    low = (loc - _REACH * scale).amin(1).floor().clamp(min=-2 * LIMIT)
    high = (loc + _REACH * scale).amax(1).ceil().clamp(max=2 * LIMIT)
    sizes = torch.frexp(high - low).exponent.long()
    base = ((low + high) / 2).floor().long() - (1 << sizes >> 1)
    tolerance = _TOLERANCE
    entry, width = _cut(loc, scale, weights, base, sizes, tolerance)
    while int(torch.bincount(entry, minlength=1).max()) > _CELLS:
        tolerance *= 2
        entry, width = _cut(loc, scale, weights, base, sizes, tolerance)
    amounts = torch.bincount(entry, minlength=len(loc))
    widths = torch.full((len(loc), int(amounts.max())), _NONE, dtype=torch.uint8)
    widths[entry, torch.arange(len(entry)) - (amounts.cumsum(0) - amounts)[entry]] = width.to(torch.uint8)
    sizes = torch.where(widths == _NONE, 0, 1 << torch.where(widths == _NONE, 0, widths).long())
    edges = (base[:, None] + torch.nn.functional.pad(sizes.cumsum(1), (1, 0))).double()
    cdf = torch.zeros(edges.shape, dtype=torch.float64)
    for at, s, weight in zip(loc.unbind(1), scale.unbind(1), weights.unbind(1), strict=True):
        cdf += weight[:, None] * ((edges - 0.5 - at[:, None]) / s[:, None]).sigmoid()
    cdf = cdf.clamp(max=1)
    law = torch.cat([cdf[:, :1], cdf.diff(dim=1).clamp(min=0), 1 - cdf[:, -1:]], 1)
    orders = scale.amax(1).log2().floor().clamp(0, 40).to(torch.uint8)
    return MixtureTables(integer_counts(law), base, widths, orders)


def _cut(
    loc: Tensor, scale: Tensor, weights: Tensor, base: Tensor, sizes: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Law and width of each cell, in the order of laws and integers."""
    entry, start = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    done = []
    for width in range(int(sizes.max()), -1, -1):
        whole = (sizes == width).nonzero().flatten()
        entry, start = torch.cat([entry, whole]), torch.cat([start, base[whole]])
        a = (start[:, None].double() - 0.5 - loc[entry]) / scale[entry]
        b = a + (1 << width) / scale[entry]
        a, b = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)
        worst = (((1 << width) - 1) / scale[entry]).square() / (8 * math.log(2))
        cost = (weights[entry] * (b.sigmoid() - a.sigmoid()) * worst.clamp(max=width)).sum(1)
        split = cost > tolerance
        done.append((entry[~split], start[~split], torch.full_like(entry[~split], width)))
        entry = entry[split].repeat(2)
        start = torch.cat([start[split], start[split] + (1 << width >> 1)])
    entry, start, width_ = (torch.cat(v) for v in zip(*done, strict=True))
    order = start.argsort(stable=True)
    order = order[entry[order].argsort(stable=True)]
    return entry[order], width_[order]


class Cells:
    """Integers under the laws of `MixtureTables`: cells, then how far beyond, then the low bits.

    Args:
        tables: the laws.
        index: the law of each number, int64 ``(n,)``.
    """

    def __init__(self, tables: MixtureTables, index: Tensor) -> None:
        self.tables, self.index = tables, index.cpu()
        self._symbols = Shared(tables, self.index)

    def _beyond(self, symbol: Tensor) -> tuple[Tensor, Tensor, Golomb]:
        """Numbers beyond the window, the others, and the code of the first."""
        last = self.tables.K - 1
        beyond = ((symbol == 0) | (symbol == last)).nonzero().flatten()
        within = ((symbol != 0) & (symbol != last)).nonzero().flatten()
        return beyond, within, Golomb(self.tables.orders[self.index[beyond]].long())

    def _low(self, symbol: Tensor, within: Tensor) -> tuple[Tensor, Bits]:
        """Where cells begin, from the base on, and the code of the places in them."""
        row, cell = self.index[within], symbol[within] - 1
        widths = self.tables.widths[row, cell].long()
        return self.tables.ends[row, cell], Bits(torch.where(widths == _NONE, 0, widths))

    def intervals(self, x: Tensor) -> Intervals:
        """See `Code`; ValueError for a magnitude beyond 2^40."""
        check_numbers(x, len(self.index))
        offset = x - self.tables.base[self.index]
        symbol = self.tables.find(offset, self.index)
        beyond, within, far = self._beyond(symbol)
        begin, low = self._low(symbol, within)
        over = offset[beyond] - self.tables.ends[self.index[beyond], -1]
        return join(
            [
                self._symbols.intervals(symbol),
                far.intervals(torch.where(over < 0, -1 - offset[beyond], over)),
                low.intervals(offset[within] - begin),
            ]
        )

    def pop(self, stack: Stack) -> Tensor:
        """See `Code`."""
        symbol = self._symbols.pop(stack)
        beyond, within, far = self._beyond(symbol)
        distance = far.pop(stack)
        begin, low = self._low(symbol, within)
        end = self.tables.ends[self.index[beyond], -1]
        outside = torch.where(symbol[beyond] == 0, -1 - distance, end + distance)
        offset = torch.zeros_like(symbol).index_copy_(0, beyond, outside)
        offset.index_copy_(0, within, begin + low.pop(stack))
        return offset + self.tables.base[self.index]


class FrozenMixture(Distribution):
    """A `LogisticMixture` that is coded under tables; its ``log_prob`` is the mixture's own.

    Args:
        law: the mixture.
        tables: a table for each entry.

    Raises:
        ValueError: tables of another number.
    """

    def __init__(self, law: LogisticMixture, tables: MixtureTables) -> None:
        """See the class."""
        super().__init__()
        if len(tables) != law.dim:
            raise ValueError(f"{len(tables)} tables for a law of {law.dim} entries")
        self.law, self.tables = law, tables

    @staticmethod
    def freeze(law: LogisticMixture) -> dict[str, Tensor]:
        """The tables of ``law``, by the names of the arguments of `MixtureTables`."""
        with torch.no_grad():
            loc, log_scale, *log_weights = law.params()
        if not log_weights:
            loc, log_scale = loc[..., None], log_scale[..., None]
        tables = mixture_tables(loc[0], log_scale[0], log_weights[0][0] if log_weights else loc[0] * 0)
        counts = tables.cumulative.diff(dim=1)
        return {"counts": counts, "base": tables.base, "widths": tables.widths, "orders": tables.orders}

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """That of the mixture."""
        return self.law.log_prob(x, context)

    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of the mixture."""
        return self.law.sample(n, context, generator)


class FrozenLogistic(ConditionalLogistic):
    """A `ConditionalLogistic` whose logs of units are given, not computed.

    Args:
        law: that law; its net and buffers are shared.
        log_unit: float64, as the units of ``law``.

    Raises:
        ValueError: logs of another dtype or shape, or that are not those of the units within 1e-6.
    """

    log_unit: Tensor

    def __init__(self, law: ConditionalLogistic, log_unit: Tensor) -> None:
        """See the class."""
        super().__init__(law.net, law.dim, law.components)
        self.centre, self.unit = law.centre, law.unit
        if log_unit.dtype != torch.float64 or log_unit.shape != law.unit.shape:
            raise ValueError(
                f"log_unit must be float64 {tuple(law.unit.shape)}, found {log_unit.dtype} "
                f"{tuple(log_unit.shape)}"
            )
        if not bool(((log_unit - law.unit.double().log()).abs() < 1e-6).all()):
            raise ValueError("the logs of units are not those of this law")
        self.register_buffer("log_unit", log_unit.clone())

    @staticmethod
    def freeze(law: ConditionalLogistic) -> dict[str, Tensor]:
        """The logs of units of ``law``, in steps of 2^-40: made elsewhere they hardly ever differ."""
        return {"log_unit": (law.unit.detach().cpu().double().log() * 2**40).round() / 2**40}

    def _log_unit(self, dtype: torch.dtype) -> Tensor:
        return self.log_unit.to(dtype)


Freezable = LogisticMixture | ConditionalLogistic


def freeze(law: Freezable) -> dict[str, Tensor]:
    """What has to be kept of ``law``."""
    return FrozenMixture.freeze(law) if isinstance(law, LogisticMixture) else FrozenLogistic.freeze(law)


def frozen(law: Freezable, tables: dict[str, Tensor]) -> Distribution:
    """``law`` with what `freeze` gave.

    Raises:
        ValueError: other tensors.
    """
    mixture = isinstance(law, LogisticMixture)
    names = {"counts", "base", "widths", "orders"} if mixture else {"log_unit"}
    if tables.keys() != names:
        raise ValueError(f"expected {sorted(names)}, found {sorted(tables)}")
    if mixture:
        return FrozenMixture(cast(LogisticMixture, law), MixtureTables(**tables))
    return FrozenLogistic(cast(ConditionalLogistic, law), **tables)
