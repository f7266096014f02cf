r"""Reals on grids, and maps and densities of them as codes: the layers of local bits-back coding.

Reals live on grids, as integers ("symbols") with a step and an offset for each entry. A map f is not exact
on them; it is coded with bits that are lent by the stack: with x at hand, y is *popped* under a narrow normal
law about f(x), then x is *pushed* under one about f^-1(y), whose width is that of the first by the slope of
f. What the second costs more than the first lends is ``-log2 |f'|``. Who decodes pops x and pushes y, and
has the lent bits again.

Only couplings and autoregressive layers need that. Scaling by constants changes the step and nothing else; a
triangular matrix with ones on its diagonal adds to each symbol a rounded multiple of others, which can be
taken back. So ActNorm and 1x1 convolutions lend nothing and cost nothing, however wide or narrow.

Source: Ho, Lohn and Abbeel 2019, arXiv 1905.08500 (local bits-back).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dflow.bijectors import ActNorm, Autoregressive, Chain, Conv1x1, Coupling, Inverse, Permute, Reverse
from dflow.coding.codes import Bits, Stack, join
from dflow.coding.normals import Normal
from dflow.core import Bijector, Context, Distribution
from dflow.distributions import ConditionalNormal, CovarianceNormal, StandardNormal
from dflow.distributions import Normal as NormalLaw
from dflow.flows import Flow, Split

#: Values and log of the slope: a map on the entries that it changes.
Map = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """How finely reals are taken.

    Attributes:
        grid: latents lie on multiples of ``2^-grid``, about.
        sigma: local laws have a standard deviation of ``2^-sigma``; where f is steep y's is larger, where it
            is flat x's.
        noise: bits of the noise of an entry: ``2^noise`` places in a cell.

    Raises:
        ValueError: a grid not in 4..30, a sigma that is not 4 less or smaller (a law has 16 steps at least),
            noise not in 1..16.
    """

    grid: int = 18
    sigma: int = 14
    noise: int = 12

    def __post_init__(self) -> None:
        """See the class."""
        if not (4 <= self.grid <= 30 and 0 <= self.sigma <= self.grid - 4 and 1 <= self.noise <= 16):
            raise ValueError(
                f"grid 2^-{self.grid} must lie in 2^-30..2^-4, sigma 2^-{self.sigma} in "
                f"2^-{self.grid - 4}..1 and noise of {self.noise} bits in 1..16"
            )

    @property
    def width(self) -> float:
        """Standard deviation of a local law in steps, at least."""
        return float(1 << (self.grid - self.sigma))

    @property
    def step(self) -> float:
        """Of the grid."""
        return 0.5**self.grid


class Frame(NamedTuple):
    """What symbols ``(n, dim)`` mean: ``symbols * step + offset``, each float64 ``(dim,)``."""

    step: Tensor
    offset: Tensor

    def values(self, symbols: Tensor) -> Tensor:
        """Reals of symbols."""
        return symbols.double() * self.step + self.offset

    def units(self, values: Tensor) -> Tensor:
        """Reals counted in steps."""
        return (values - self.offset) / self.step

    def at(self, index: Tensor) -> Frame:
        """That of some entries."""
        return Frame(self.step[index], self.offset[index])

    def put(self, index: Tensor, other: Frame) -> Frame:
        """With another one at some entries."""
        return Frame(*(a.index_copy(0, index, b) for a, b in zip(self, other, strict=True)))

    @classmethod
    def plain(cls, dim: int, step: float) -> Frame:
        """The same step for all, from 0 on."""
        return cls(torch.full((dim,), step, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64))


class Layer(Protocol):
    """A map on symbols."""

    def there(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        """Data to latent, as the encoder does."""
        ...

    def back(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        """Latent to data: takes back what `there` did, and what it did to the stack."""
        ...


class Law(Protocol):
    """A density on symbols."""

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        """Push symbols ``(n, dim)``."""
        ...

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        """Pop as many rows."""
        ...


def carry(
    symbols: Tensor, stack: Stack, width: float, old: Frame, new: Frame, maps: tuple[Map, Map], encode: bool
) -> Tensor:
    """Symbols on ``new`` in the place of those on ``old``.

    They are popped under a law about the first map's value and these pushed under one about the second's.
    With old and new, the maps, and ``encode``, changed about it is its own inverse.

    What an encoder pops is narrow: a stack that is not as random as it should be, after data that fit the
    model badly, must not throw it far off. What it pushes may lie anywhere.

    >>> from dflow.coding.coder import Coder
    >>> coder, old, new = Coder(bytes(range(64))), Frame.plain(1, 0.25), Frame.plain(1, 0.5)
    >>> double, halve = (lambda x: (2 * x, x * 0 + 0.7)), (lambda y: (y / 2, y * 0 - 0.7))
    >>> x = torch.tensor([[5]])
    >>> y = carry(x, coder, 64.0, old, new, (double, halve), True)
    >>> carry(y, coder, 64.0, new, old, (halve, double), False), coder.to_bytes() == bytes(range(64))
    (tensor([[5]]), True)
    """
    there, back = maps
    found = _local(old.values(symbols), width, old, new, there, encode).pop(stack).view(symbols.shape)
    code = _local(new.values(found), width, new, old, back, not encode)
    stack.push(*code.intervals(symbols.flatten()))
    return found


def _local(values: Tensor, width: float, old: Frame, new: Frame, f: Map, narrow: bool) -> Normal:
    mean, log_slope = f(values)
    # The narrower of both laws has the width, the other one that by the slope in steps; which is beyond all
    # floats where a mixture is flat.
    slope = (log_slope.exp() * (old.step / new.step)).clamp(1, 2.0**60)
    return Normal(new.units(mean).flatten(), (width * slope).flatten(), narrow)


# -- bijectors ---------------------------------------------------------------------------------------------


@singledispatch
def layers(
    bijector: Bijector, frame: Frame, settings: Settings, inverted: bool = False
) -> tuple[list[Layer], Frame]:
    """What codes a bijector of symbols on ``frame``, and the frame of what comes out. Register others here.

    Args:
        bijector: in float64 and evaluation mode.
        frame: of what goes in.
        settings: see `Settings`.
        inverted: code its inverse.

    Raises:
        ValueError: a bijector without a local code.
    """
    raise ValueError(f"no local code for {type(bijector).__name__}")


@layers.register
def _(bijector: Chain, frame: Frame, settings: Settings, inverted: bool = False) -> tuple[list[Layer], Frame]:
    found: list[Layer] = []
    for part in reversed(list(bijector)) if inverted else bijector:
        more, frame = layers(part, frame, settings, inverted)
        found += more
    return found, frame


@layers.register
def _(
    bijector: Inverse, frame: Frame, settings: Settings, inverted: bool = False
) -> tuple[list[Layer], Frame]:
    return layers(bijector.bijector, frame, settings, not inverted)


@layers.register
def _(
    bijector: Permute, frame: Frame, settings: Settings, inverted: bool = False
) -> tuple[list[Layer], Frame]:
    index = bijector.permutation.cpu()
    return _ordered(index.argsort() if inverted else index, frame)


@layers.register
def _(
    bijector: Reverse, frame: Frame, settings: Settings, inverted: bool = False
) -> tuple[list[Layer], Frame]:
    return _ordered(torch.arange(len(frame.step)).flip(0), frame)


def _ordered(index: Tensor, frame: Frame) -> tuple[list[Layer], Frame]:
    return [_Order(index)], frame.at(index)


class _Order:
    """Other places."""

    def __init__(self, index: Tensor) -> None:
        self.index, self.inverse = index, index.argsort()

    def there(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return symbols[:, self.index]

    def back(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return symbols[:, self.inverse]


@layers.register
def _(
    bijector: ActNorm, frame: Frame, settings: Settings, inverted: bool = False
) -> tuple[list[Layer], Frame]:
    loc, scale = (
        v.detach().double().repeat_interleave(bijector.places)
        for v in (bijector.loc, bijector.log_scale.double().exp())
    )
    if inverted:
        frame = Frame(frame.step * scale, frame.offset * scale + loc)
    else:
        frame = Frame(frame.step / scale, (frame.offset - loc) / scale)
    return _settled(frame, settings)


@layers.register
def _(
    bijector: Conv1x1, frame: Frame, settings: Settings, inverted: bool = False
) -> tuple[list[Layer], Frame]:
    """``W = P L D U``, D a diagonal, which makes other steps, and ones on the diagonals of L and U."""
    lu = bijector.lu.detach().double()
    diagonal = bijector.sign.double() * lu.diagonal().exp()
    upper, lower = lu.triu(1) / diagonal[:, None], lu.tril(-1)
    entries = torch.arange(len(frame.step)).view(bijector.channels, bijector.places)
    order = entries[bijector.permutation].flatten()
    factor = diagonal.repeat_interleave(bijector.places)
    found: list[Layer] = []
    if inverted:
        frame = frame.at(order.argsort())
        found += [_Order(order.argsort()), _Lift(lower, frame, False, True), _Flip(factor)]
        frame = Frame(frame.step / factor.abs(), frame.offset / factor)
        found.append(_Lift(upper, frame, True, True))
    else:
        found += [_Lift(upper, frame, True, False), _Flip(factor)]
        frame = Frame(frame.step * factor.abs(), frame.offset * factor)
        found += [_Lift(lower, frame, False, False), _Order(order)]
        frame = frame.at(order)
    more, frame = _settled(frame, settings)
    return found + more, frame


class _Lift:
    """``k_i + round(sum_j W_ij v_j / step_i)``, W strictly triangular: exact on symbols, both ways.

    Args:
        weight: ``(C, C)``.
        frame: of ``C * places`` entries.
        upper: j runs behind i, else before.
        inverted: solve instead of multiply.
    """

    def __init__(self, weight: Tensor, frame: Frame, upper: bool, inverted: bool) -> None:
        self.weight, size = weight, len(weight)
        self.frame = Frame(*(v.view(size, -1) for v in frame))
        self.upper, self.inverted = upper, inverted

    def there(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return self._lift(symbols, self.inverted)

    def back(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return self._lift(symbols, not self.inverted)

    def _lift(self, symbols: Tensor, solve: bool) -> Tensor:
        found = symbols.view(len(symbols), *self.frame.step.shape).clone()
        values, size = self.frame.values(found), len(self.weight)
        # A row sees others as they are on the side of x.
        for i in range(size) if self.upper != solve else reversed(range(size)):
            others = slice(i + 1, size) if self.upper else slice(0, i)
            if others.start == others.stop:
                continue
            more = (self.weight[i, others, None] * values[:, others]).sum(1) / self.frame.step[i]
            found[:, i] += (-1 if solve else 1) * more.round().long()
            values[:, i] = found[:, i].double() * self.frame.step[i] + self.frame.offset[i]
        return found.flatten(1)


class _Flip:
    """The signs of symbols where a factor is negative."""

    def __init__(self, factor: Tensor) -> None:
        self.sign = factor.sign().long()

    def there(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return symbols * self.sign

    back = there


#: How much finer or coarser than the grid steps may become before they are made anew.
_FINER, _COARSER = 2.0**-8, 4.0


def _settled(frame: Frame, settings: Settings) -> tuple[list[Layer], Frame]:
    ratio = frame.step / settings.step
    off = (ratio < _FINER) | (ratio > _COARSER)
    if not bool(off.any()):
        return [], frame
    bits = torch.where(off, torch.frexp(ratio).exponent.long(), 0)
    step = torch.ldexp(frame.step, -bits)
    # The middle of what a coarse symbol stands for stays where it is.
    return [_Settle(bits)], Frame(step, frame.offset + (step - frame.step) / 2)


class _Settle:
    """Finer steps by bits from the stack behind those of the symbol, coarser ones by giving it the last bits.

    Args:
        bits: to append, of each entry, or if negative to cut off.
    """

    def __init__(self, bits: Tensor) -> None:
        self.more, self.less = bits.clamp(min=0), (-bits).clamp(min=0)

    def there(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return self._shift(symbols, stack, self.more, self.less)

    def back(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return self._shift(symbols, stack, self.less, self.more)

    def _shift(self, symbols: Tensor, stack: Stack, more: Tensor, less: Tensor) -> Tensor:
        cut, new = (Bits(bits.repeat(len(symbols))) for bits in (less, more))
        # First pop, then push, and so both ways: what is pushed has been popped by the other way, last.
        low = new.pop(stack).view(symbols.shape)
        stack.push(*cut.intervals(symbols.flatten()))
        return ((symbols >> less) << more) + low


@layers.register
def _(
    bijector: Coupling, frame: Frame, settings: Settings, inverted: bool = False
) -> tuple[list[Layer], Frame]:
    hidden = bijector.hidden_index.cpu()
    new = frame.put(hidden, Frame.plain(len(hidden), settings.step))
    return [_Coupled(bijector, frame, new, settings.width, inverted)], new


class _Coupled:
    """Hidden entries, given those that are known."""

    def __init__(self, bijector: Coupling, old: Frame, new: Frame, width: float, inverted: bool) -> None:
        self.bijector, self.width, self.inverted = bijector, width, inverted
        self.old, self.new, self.index = old, new, bijector.hidden_index.cpu()

    def there(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return self._to(symbols, stack, context, True)

    def back(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        return self._to(symbols, stack, context, False)

    def _to(self, symbols: Tensor, stack: Stack, context: Context | None, encode: bool) -> Tensor:
        old, new = (self.old, self.new) if encode else (self.new, self.old)
        # What is known has the same frame before and after, so that the net sees the same bits.
        forward, inverse = _maps(self.bijector, self.bijector.params(old.values(symbols), context))
        maps = (forward, inverse) if encode != self.inverted else (inverse, forward)
        ends = old.at(self.index), new.at(self.index)
        found = carry(symbols[:, self.index], stack, self.width, *ends, maps, encode)
        return symbols.index_copy(1, self.index, found)


def _maps(bijector: Coupling | Autoregressive, params: Tensor) -> tuple[Map, Map]:
    family = bijector.elementwise
    return lambda x: family.forward(x, params), lambda z: family.inverse(z, params)


@layers.register
def _(
    bijector: Autoregressive, frame: Frame, settings: Settings, inverted: bool = False
) -> tuple[list[Layer], Frame]:
    new = Frame.plain(bijector.dim, settings.step)
    if inverted:
        made = _Sequential(bijector, new, frame, settings.width, False)
        return [_Turned(made)], new
    return [_Sequential(bijector, frame, new, settings.width, True)], new


class _Sequential:
    """All entries of z given x at once; x entry by entry, one call of the net each.

    ``encode`` tells whether `there` is what an encoder does.
    """

    def __init__(self, bijector: Autoregressive, old: Frame, new: Frame, width: float, encode: bool) -> None:
        self.bijector, self.old, self.new, self.width, self.encode = bijector, old, new, width, encode

    def there(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        params = self.bijector.params(self.old.values(symbols), context)
        found = self._latents(symbols, params).pop(stack).view(symbols.shape)
        codes = (self._entry(found, params, i) for i in range(self.bijector.dim))
        stack.push(*join([code.intervals(symbols[:, i]) for i, code in enumerate(codes)]))
        return found

    def back(self, symbols: Tensor, stack: Stack, context: Context | None) -> Tensor:
        found = torch.zeros_like(symbols)
        for i in range(self.bijector.dim):
            # What comes later has no weight in the net's answer here, not even in its last bits.
            params = self.bijector.params(self.old.values(found), context)
            found[:, i] = self._entry(symbols, params, i).pop(stack)
        params = self.bijector.params(self.old.values(found), context)
        stack.push(*self._latents(found, params).intervals(symbols.flatten()))
        return found

    def _latents(self, symbols: Tensor, params: Tensor) -> Normal:
        forward, _ = _maps(self.bijector, params)
        return _local(self.old.values(symbols), self.width, self.old, self.new, forward, self.encode)

    def _entry(self, symbols: Tensor, params: Tensor, i: int) -> Normal:
        _, inverse = _maps(self.bijector, params[:, i : i + 1])
        here = torch.tensor([i])
        old, new = self.old.at(here), self.new.at(here)
        values = new.values(symbols[:, i : i + 1])
        return _local(values, self.width, new, old, inverse, not self.encode)


class _Turned:
    """A layer the other way round."""

    def __init__(self, layer: Layer) -> None:
        self.there, self.back = layer.back, layer.there


# -- densities ---------------------------------------------------------------------------------------------


@singledispatch
def density(law: Distribution, frame: Frame, settings: Settings) -> Law:
    """What codes a density of symbols on ``frame``. Register others here.

    Raises:
        ValueError: a density without a code.
    """
    raise ValueError(f"no code for a density {type(law).__name__} by local bits-back")


@density.register
def _(law: Flow, frame: Frame, settings: Settings) -> Law:
    found, out = layers(law.bijector, frame, settings)
    return _Flowing(found, density(law.base, out, settings))


class _Flowing:
    def __init__(self, layers: Sequence[Layer], base: Law) -> None:
        self.layers, self.base = layers, base

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        for layer in self.layers:
            symbols = layer.there(symbols, stack, context)
        self.base.push(symbols, stack, context)

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        symbols = self.base.pop(n, stack, context)
        for layer in reversed(self.layers):
            symbols = layer.back(symbols, stack, context)
        return symbols


@density.register
def _(law: Split, frame: Frame, settings: Settings) -> Law:
    return _Parts(law, frame, settings)


class _Parts:
    def __init__(self, law: Split, frame: Frame, settings: Settings) -> None:
        self.law, self.kept, self.rest = law, law.kept_index.cpu(), law.rest_index.cpu()
        self.frame = frame.at(self.kept)
        self.base = density(law.base, self.frame, settings)
        self.conditional = density(law.conditional, frame.at(self.rest), settings)

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        kept = symbols[:, self.kept]
        own, given = self.law.contexts(self.frame.values(kept), context)
        self.conditional.push(symbols[:, self.rest], stack, given)
        self.base.push(kept, stack, own)

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        kept = self.base.pop(n, stack, self.law.contexts(None, context)[0])
        given = self.law.contexts(self.frame.values(kept), context)[1]
        return self.law.join(kept, self.conditional.pop(n, stack, given))


class Independent:
    """Entries that are independent, by means and standard deviations ``(n or 1, dim)`` given the context."""

    def __init__(
        self, params: Callable[[Context | None], tuple[Tensor, Tensor]], frame: Frame, narrow: bool = False
    ) -> None:
        self.params, self.frame, self.narrow = params, frame, narrow

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        """See `Law`."""
        stack.push(*self._code(len(symbols), context).intervals(symbols.flatten()))

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        """See `Law`."""
        return self._code(n, context).pop(stack).view(n, -1)

    def _code(self, n: int, context: Context | None) -> Normal:
        loc, scale = self.params(context)
        place = self.frame.units(loc), scale / self.frame.step
        loc, scale = (v.expand(n, -1).flatten() for v in place)
        return Normal(loc, scale, self.narrow)


@density.register
def _(law: StandardNormal, frame: Frame, settings: Settings) -> Law:
    one = torch.ones(1, law.dim, dtype=torch.float64)
    return Independent(lambda context: (0 * one, one), frame)


@density.register
def _(law: NormalLaw, frame: Frame, settings: Settings) -> Law:
    L, loc = (v.detach().double() for v in law.conditionals())
    return Independent(lambda context: (loc[None], 1 / L[None]), frame)


@density.register
def _(law: ConditionalNormal, frame: Frame, settings: Settings) -> Law:
    def params(context: Context | None) -> tuple[Tensor, Tensor]:
        loc, log_scale = law.params(context)
        # Beyond any grid all the same.
        return loc.double(), log_scale.double().clamp(max=100).exp()

    return Independent(params, frame)


@density.register
def _(law: CovarianceNormal, frame: Frame, settings: Settings) -> Law:
    return _Covaried(law, frame)


class _Covaried:
    """From the last entry to the first, each given those after it."""

    def __init__(self, law: CovarianceNormal, frame: Frame) -> None:
        L, loc = (v.detach().double() for v in law.conditionals())
        self.scale = 1 / L.diagonal()
        self.weight, self.loc, self.frame = (L * self.scale).T.contiguous(), loc, frame

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        centred, parts = self.frame.values(symbols) - self.loc, []
        for i in reversed(range(len(self.loc))):
            parts.append(self._code(centred, i).intervals(symbols[:, i]))
        stack.push(*join(parts))

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        found = torch.zeros(n, len(self.loc), dtype=torch.int64)
        centred = torch.zeros(found.shape, dtype=torch.float64)
        for i in reversed(range(len(self.loc))):
            found[:, i] = self._code(centred, i).pop(stack)
            centred[:, i] = found[:, i].double() * self.frame.step[i] + self.frame.offset[i] - self.loc[i]
        return found

    def _code(self, centred: Tensor, i: int) -> Normal:
        mean = self.loc[i] - (centred[:, i + 1 :] * self.weight[i, i + 1 :]).sum(1)
        step = self.frame.step[i]
        return Normal((mean - self.frame.offset[i]) / step, (self.scale[i] / step).expand(len(mean)))
