r"""Bijectors of reals as codes of symbols on grids: the layers of local bits-back coding.

Couplings and autoregressive layers borrow bits (`dflow.coding.local`). Scaling by constants changes the step
and nothing else; a triangular matrix with ones on its diagonal adds to each symbol a rounded multiple of
others, which can be taken back. So ActNorm and 1x1 convolutions borrow nothing and cost nothing, however wide
or narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor

from dflow.bijectors import ActNorm, Autoregressive, Chain, Conv1x1, Coupling, Inverse, Permute, Reverse
from dflow.coding.codes import Bits, Stack, join
from dflow.coding.local import CodingSettings, Frame, Map, carry, local_law
from dflow.coding.normals import NormalCode
from dflow.core import Bijector, Context


class Layer(Protocol):
    """A map on symbols."""

    def move(self, symbols: Tensor, stack: Stack, context: Context | None, encode: bool) -> Tensor:
        """Data to latent as the encoder does, or back, which also undoes what that did to the stack."""
        ...


#: The codes of a bijector, and the frame of what comes out.
Layers = tuple[list[Layer], Frame]


def move(
    layers: Sequence[Layer], symbols: Tensor, stack: Stack, context: Context | None, encode: bool
) -> Tensor:
    """Symbols through all layers, or back."""
    for layer in layers if encode else reversed(layers):
        symbols = layer.move(symbols, stack, context, encode)
    return symbols


@singledispatch
def layers(bijector: Bijector, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    """What codes a bijector of symbols on ``frame``. Register others here.

    Args:
        bijector: in float64 and evaluation mode.
        frame: of what goes in.
        settings: see `CodingSettings`.
        inverted: code its inverse.

    Raises:
        ValueError: a bijector without a local code.
    """
    raise ValueError(f"no local code for {type(bijector).__name__}")


@layers.register
def _(bijector: Chain, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    codes: list[Layer] = []
    for inner in reversed(list(bijector)) if inverted else bijector:
        more, frame = layers(inner, frame, settings, inverted)
        codes += more
    return codes, frame


@layers.register
def _(bijector: Inverse, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    return layers(bijector.bijector, frame, settings, not inverted)


@layers.register
def _(bijector: Permute, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    index = bijector.permutation.cpu()
    return _ordered(index.argsort() if inverted else index, frame)


@layers.register
def _(bijector: Reverse, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    return _ordered(torch.arange(len(frame.step)).flip(0), frame)


def _ordered(index: Tensor, frame: Frame) -> Layers:
    return [_Order(index)], frame.at(index)


class _Order:
    """Other places."""

    def __init__(self, index: Tensor) -> None:
        self.index, self.inverse = index, index.argsort()

    def move(self, symbols: Tensor, stack: Stack, context: Context | None, encode: bool) -> Tensor:
        return symbols[:, self.index if encode else self.inverse]


# -- layers that borrow nothing --------------------------------------------------------------------------


@layers.register
def _(bijector: ActNorm, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    loc, scale = (
        v.detach().double().repeat_interleave(bijector.places)
        for v in (bijector.loc, bijector.log_scale.double().exp())
    )
    if inverted:
        return _settled(Frame(frame.step * scale, frame.offset * scale + loc), settings)
    return _settled(Frame(frame.step / scale, (frame.offset - loc) / scale), settings)


@layers.register
def _(bijector: Conv1x1, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    """``W = P L D U``, D a diagonal, which makes other steps, and ones on the diagonals of L and U."""
    lu = bijector.lu.detach().double()
    diagonal = bijector.sign.double() * lu.diagonal().exp()
    upper, lower = lu.triu(1) / diagonal[:, None], lu.tril(-1)
    entries = torch.arange(len(frame.step)).view(bijector.channels, bijector.places)
    order = entries[bijector.permutation].flatten()
    factor = diagonal.repeat_interleave(bijector.places)
    codes: list[Layer] = []
    if inverted:
        frame = frame.at(order.argsort())
        codes += [_Order(order.argsort()), _Lift(lower, frame, False, True), _Flip(factor)]
        frame = Frame(frame.step / factor.abs(), frame.offset / factor)
        codes.append(_Lift(upper, frame, True, True))
    else:
        codes += [_Lift(upper, frame, True, False), _Flip(factor)]
        frame = Frame(frame.step * factor.abs(), frame.offset * factor)
        codes += [_Lift(lower, frame, False, False), _Order(order)]
        frame = frame.at(order)
    more, frame = _settled(frame, settings)
    return codes + more, frame


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

    def move(self, symbols: Tensor, stack: Stack, context: Context | None, encode: bool) -> Tensor:
        solve, size = self.inverted == encode, len(self.weight)
        lifted = symbols.view(len(symbols), *self.frame.step.shape).clone()
        values = self.frame.values(lifted)
        # A row sees others as they are on the side of x.
        for i in range(size) if self.upper != solve else reversed(range(size)):
            others = slice(i + 1, size) if self.upper else slice(0, i)
            if others.start == others.stop:
                continue
            more = (self.weight[i, others, None] * values[:, others]).sum(1) / self.frame.step[i]
            lifted[:, i] += (-1 if solve else 1) * more.round().long()
            values[:, i] = lifted[:, i].double() * self.frame.step[i] + self.frame.offset[i]
        return lifted.flatten(1)


class _Flip:
    """The signs of symbols where a factor is negative."""

    def __init__(self, factor: Tensor) -> None:
        self.sign = factor.sign().long()

    def move(self, symbols: Tensor, stack: Stack, context: Context | None, encode: bool) -> Tensor:
        return symbols * self.sign


#: How much finer or coarser than the grid steps may become before they are made anew.
_FINER, _COARSER = 2.0**-8, 4.0


def _settled(frame: Frame, settings: CodingSettings) -> Layers:
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

    def move(self, symbols: Tensor, stack: Stack, context: Context | None, encode: bool) -> Tensor:
        more, less = (self.more, self.less) if encode else (self.less, self.more)
        cut, new = (Bits(bits.repeat(len(symbols))) for bits in (less, more))
        # First pop, then push, and so both ways: what is pushed has been popped by the other way, last.
        low = new.pop(stack).view(symbols.shape)
        stack.push(*cut.intervals(symbols.flatten()))
        return ((symbols >> less) << more) + low


# -- layers that borrow bits -----------------------------------------------------------------------------


@layers.register
def _(bijector: Coupling, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    hidden = bijector.hidden_index.cpu()
    new = frame.put(hidden, Frame.plain(len(hidden), settings.step))
    return [_Coupled(bijector, frame, new, settings.width, inverted)], new


class _Coupled:
    """Hidden entries, given those that are known."""

    def __init__(self, bijector: Coupling, old: Frame, new: Frame, width: float, inverted: bool) -> None:
        self.bijector, self.width, self.inverted = bijector, width, inverted
        self.old, self.new, self.index = old, new, bijector.hidden_index.cpu()

    def move(self, symbols: Tensor, stack: Stack, context: Context | None, encode: bool) -> Tensor:
        old, new = (self.old, self.new) if encode else (self.new, self.old)
        # What is known has the same frame before and after, so that the net sees the same bits.
        forward, inverse = _maps(self.bijector, self.bijector.params(old.values(symbols), context))
        maps = (forward, inverse) if encode != self.inverted else (inverse, forward)
        ends = old.at(self.index), new.at(self.index)
        hidden = carry(symbols[:, self.index], stack, self.width, *ends, maps, encode)
        return symbols.index_copy(1, self.index, hidden)


def _maps(bijector: Coupling | Autoregressive, params: Tensor) -> tuple[Map, Map]:
    family = bijector.elementwise
    return lambda x: family.forward(x, params), lambda z: family.inverse(z, params)


@layers.register
def _(bijector: Autoregressive, frame: Frame, settings: CodingSettings, inverted: bool = False) -> Layers:
    new = Frame.plain(bijector.dim, settings.step)
    ends = (new, frame) if inverted else (frame, new)
    return [_Sequential(bijector, *ends, settings.width, inverted)], new


class _Sequential:
    """All entries of z given x at once; x entry by entry, one call of the net each.

    Args:
        bijector: from x to z.
        old: frame of x.
        new: frame of z.
        width: of local laws.
        inverted: whether an encoder goes from z to x.
    """

    def __init__(
        self, bijector: Autoregressive, old: Frame, new: Frame, width: float, inverted: bool
    ) -> None:
        self.bijector, self.old, self.new, self.width, self.inverted = bijector, old, new, width, inverted

    def move(self, symbols: Tensor, stack: Stack, context: Context | None, encode: bool) -> Tensor:
        return (self._to_z if encode != self.inverted else self._to_x)(symbols, stack, context)

    def _to_z(self, x: Tensor, stack: Stack, context: Context | None) -> Tensor:
        params = self.bijector.params(self.old.values(x), context)
        z = self._latents(x, params).pop(stack).view(x.shape)
        codes = (self._entry(z, params, i) for i in range(self.bijector.dim))
        stack.push(*join([code.intervals(x[:, i]) for i, code in enumerate(codes)]))
        return z

    def _to_x(self, z: Tensor, stack: Stack, context: Context | None) -> Tensor:
        x = torch.zeros_like(z)
        for i in range(self.bijector.dim):
            # What comes later has no weight in the net's answer here, not even in its last bits.
            params = self.bijector.params(self.old.values(x), context)
            x[:, i] = self._entry(z, params, i).pop(stack)
        params = self.bijector.params(self.old.values(x), context)
        stack.push(*self._latents(x, params).intervals(z.flatten()))
        return x

    def _latents(self, x: Tensor, params: Tensor) -> NormalCode:
        forward, _ = _maps(self.bijector, params)
        return local_law(self.old.values(x), self.width, self.old, self.new, forward, not self.inverted)

    def _entry(self, z: Tensor, params: Tensor, i: int) -> NormalCode:
        _, inverse = _maps(self.bijector, params[:, i : i + 1])
        index = torch.tensor([i])
        old, new = self.old.at(index), self.new.at(index)
        return local_law(new.values(z[:, i : i + 1]), self.width, new, old, inverse, self.inverted)
