r"""Local bits-back coding: a continuous flow with a dequantizer as a lossless code of integers.

    code = BitsBack(ready(model), dim)
    stream = push(code, x, given)            # x int64 (n, dim), given any bytes
    x, given = pop(code, n, stream.data, len(given))

An encoder pops the noise of the dequantizer, carries data and noise through the flow (`dflow.coding.layers`)
and pushes the latents; a decoder gets the data back, and the bits that were popped. In all a datum costs the
variational bound for the noise that was popped.

Bits can be borrowed only from a stack that holds some: the first image needs *auxiliary* bits. These are data
of the caller, which come back with the images, or pseudo-random ones, which are lost. A chain of images needs
them once.

Source: Ho, Lohn and Abbeel 2019, arXiv 1905.08500 (local bits-back); Frey and Hinton 1996 (bits back);
Townsend et al. 2019, arXiv 1901.04866 (with asymmetric numeral systems).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor

from dflow.coding.coder import Coder
from dflow.coding.codes import Bits, Code, Intervals, Stack, join
from dflow.coding.densities import Independent, density
from dflow.coding.layers import layers, move
from dflow.coding.local import CodingSettings, Frame
from dflow.coding.normals import NormalCode, Place, logit_normal, logits
from dflow.coding.tables import Tables
from dflow.core import Context
from dflow.dequantize import Dequantized, Dequantizer, FlowDequantizer, Hypercube, NormalDequantizer, Uniform

# -- dequantizers ------------------------------------------------------------------------------------------


class DequantizerNoise(Protocol):
    """A dequantizer on symbols: ``x 2^noise`` and a place in the cell."""

    def pop(self, x: Tensor, stack: Stack) -> Tensor:
        """Places in the cells of ``x``, int64 ``(n, dim)``, as the encoder needs them."""
        ...

    def push(self, place: Tensor, x: Tensor, stack: Stack) -> None:
        """Give the borrowed bits back."""
        ...


@singledispatch
def noise(dequantizer: Dequantizer, dim: int, settings: CodingSettings) -> DequantizerNoise:
    """What codes a dequantizer of ``dim`` entries. Register others here.

    Raises:
        ValueError: a dequantizer without a code.
    """
    raise ValueError(f"no code for the dequantizer {type(dequantizer).__name__} by local bits-back")


@noise.register
def _(dequantizer: Uniform, dim: int, settings: CodingSettings) -> DequantizerNoise:
    return _IndependentEntries(lambda x: Bits(torch.full((x.numel(),), settings.noise, dtype=torch.int64)))


@noise.register
def _(dequantizer: NormalDequantizer, dim: int, settings: CodingSettings) -> DequantizerNoise:
    if dequantizer.full:
        return _Full(dequantizer, settings.noise)

    def code(x: Tensor) -> Code:
        loc, log_scale = dequantizer.context(x)[..., :2].unbind(-1)
        return logit_normal(loc.flatten(), log_scale.exp().flatten(), settings.noise)

    # Exact: the places have the mass that the law has on them.
    return _IndependentEntries(code)


class _IndependentEntries:
    """Places that are independent, by their code given x."""

    def __init__(self, code: Callable[[Tensor], Code]) -> None:
        self.code = code

    def pop(self, x: Tensor, stack: Stack) -> Tensor:
        return self.code(x).pop(stack).view(x.shape)

    def push(self, place: Tensor, x: Tensor, stack: Stack) -> None:
        stack.push(*self.code(x).intervals(place.flatten()))


class _Full:
    """Entry by entry, each given the noise of those before it."""

    def __init__(self, dequantizer: NormalDequantizer, bits: int) -> None:
        self.dequantizer, self.bits = dequantizer, bits

    def pop(self, x: Tensor, stack: Stack) -> Tensor:
        place = torch.zeros_like(x)

        def pop_entry(i: int, code: Code) -> Tensor:
            place[:, i] = code.pop(stack)
            return place[:, i]

        self._walk(x, pop_entry)
        return place

    def push(self, place: Tensor, x: Tensor, stack: Stack) -> None:
        intervals: list[Intervals] = []

        def push_entry(i: int, code: Code) -> Tensor:
            intervals.append(code.intervals(place[:, i]))
            return place[:, i]

        self._walk(x, push_entry)
        stack.push(*join(intervals))

    def _walk(self, x: Tensor, place_of: Callable[[int, Code], Tensor]) -> None:
        params = self.dequantizer.context(x)
        eps = torch.zeros(x.shape, dtype=torch.float64)
        for i in range(x.shape[1]):
            loc = params[:, i, 0] + (params[:, i, 2 : 2 + i] * eps[:, :i]).sum(1)
            scale = params[:, i, 1].exp()
            z = middles(place_of(i, logit_normal(loc, scale, self.bits)), self.bits)
            eps[:, i] = (z - loc) / scale


@noise.register
def _(dequantizer: FlowDequantizer, dim: int, settings: CodingSettings) -> DequantizerNoise:
    return _FlowNoise(dequantizer, dim, settings)


class _FlowNoise:
    """Normal noise is popped and carried by the flow; a place is popped about where it comes to lie.

    The law of the place is logit-normal about z, no narrower than half a place, so that no place is outside
    of the cell; then z is pushed, normal about the middle of the place.
    """

    def __init__(self, dequantizer: FlowDequantizer, dim: int, settings: CodingSettings) -> None:
        self.dequantizer, self.settings = dequantizer, settings
        start = Frame.plain(dim, settings.step)
        self.base = Independent.standard(dim, start, narrow=True)
        self.layers, self.frame = layers(dequantizer.bijector, start, settings)

    def pop(self, x: Tensor, stack: Stack) -> Tensor:
        context = Context(given=(self.dequantizer.context(x),))
        symbols = move(self.layers, self.base.pop(len(x), stack, None), stack, context, True)
        place = self._places(symbols).pop(stack).view(x.shape)
        stack.push(*self._latents(place).intervals(symbols.flatten()))
        return place

    def push(self, place: Tensor, x: Tensor, stack: Stack) -> None:
        context = Context(given=(self.dequantizer.context(x),))
        symbols = self._latents(place).pop(stack).view(x.shape)
        stack.push(*self._places(symbols).intervals(place.flatten()))
        self.base.push(move(self.layers, symbols, stack, context, False), stack, None)

    def _places(self, symbols: Tensor) -> Place:
        z = self.frame.values(symbols).flatten()
        return logit_normal(z, self._scales(z)[0], self.settings.noise)

    def _latents(self, place: Tensor) -> NormalCode:
        z = middles(place, self.settings.noise).flatten()
        return NormalCode(self._units(z, place), self._scales(z)[1] / self._steps(place))

    def _units(self, z: Tensor, place: Tensor) -> Tensor:
        return self.frame.units(z.view(place.shape)).flatten()

    def _steps(self, place: Tensor) -> Tensor:
        return self.frame.step.expand(place.shape).flatten()

    def _scales(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of the law of z that a place is popped under, and of what is left of z when it is known."""
        u = z.sigmoid()
        # Of a place in z, held where the cell ends.
        width = 0.5**self.settings.noise / (u * (1 - u)).clamp(min=0.5 ** (self.settings.noise + 1))
        scale = (width / 2).clamp(min=0.5**self.settings.sigma)
        # Even within the place, and the law itself.
        return scale, (scale.square() + width.square() / 12).sqrt()


def middles(place: Tensor, bits: int) -> Tensor:
    """``logit((place + 1/2) / 2^bits)``, float64."""
    return logits(bits + 1)[2 * place + 1]


# -- models ------------------------------------------------------------------------------------------------


def ready(model: Dequantized) -> Dequantized:
    """A copy of a model to code with: in float64, in evaluation mode, without gradients, on the CPU."""
    return copy.deepcopy(model).cpu().double().eval().requires_grad_(False)


class BitsBack:
    """A dequantized flow, ready to code batches of rows.

    Args:
        model: what `ready` gave.
        dim: entries of a row.
        settings: see `CodingSettings`.

    Raises:
        ValueError: a layer or law that has no local code; cells that are not those of integers; a model
            that is not ready.
    """

    def __init__(self, model: Dequantized, dim: int, settings: CodingSettings | None = None) -> None:
        """See the class."""
        self.settings = settings or CodingSettings()
        if not isinstance(model.partition, Hypercube):
            raise ValueError(
                f"cells of {type(model.partition).__name__}; local bits-back codes integers in unit cells "
                "(partition hypercube)"
            )
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        if model.training or any(t.dtype != torch.float64 or t.is_cuda for t in tensors):
            raise ValueError("only what ready() gives is coded: in float64, in evaluation mode, on the CPU")
        self.model = model
        self.dim = dim
        self.noise = noise(self.model.dequantizer, dim, self.settings)
        step = 0.5**self.settings.noise
        self.frame = Frame.plain(dim, step)._replace(offset=torch.full((dim,), step / 2, dtype=torch.float64))
        self.density = density(self.model.density, self.frame, self.settings)

    @torch.no_grad()
    def dequantize(self, x: Tensor, stack: Stack) -> Tensor:
        """Symbols of v, int64 ``(n, dim)``, by noise from the stack; v is ``frame.values`` of them."""
        if x.dtype != torch.int64 or x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"expected int64 (n, {self.dim}), found {x.dtype} {tuple(x.shape)}")
        return (x << self.settings.noise) + self.noise.pop(x, stack)

    @torch.no_grad()
    def push(self, x: Tensor, stack: Stack) -> None:
        """Push ``x``, int64 ``(n, dim)``; the stack has to hold `borrowed` bits a row."""
        self.density.push(self.dequantize(x, stack), stack, None)

    @torch.no_grad()
    def pop(self, n: int, stack: Stack) -> Tensor:
        """The ``x`` pushed last, int64 ``(n, dim)``."""
        symbols = self.density.pop(n, stack, None)
        x, place = symbols >> self.settings.noise, symbols & ((1 << self.settings.noise) - 1)
        self.noise.push(place, x, stack)
        return x

    @property
    def borrowed(self) -> int:
        """Bits a row that are borrowed from the stack, at most but for chances of 1e-7."""
        return self.dim * (self.settings.noise + 2 * self.settings.grid + 24)


#: What a stack begins with, so that it is never empty and never begins with a zero word.
_HEAD = bytes(range(1, 9))

#: Rows coded together are one for this many coded before them, whose bits they borrow.
_EARNED = 16


@dataclass(frozen=True)
class Stream:
    """A chain of rows.

    Attributes:
        data: the stack.
        given: bits borrowed from data of the caller, which come back.
        random: pseudo-random bits borrowed beside them, which are lost.
    """

    data: bytes
    given: int
    random: int


def push(code: BitsBack, x: Tensor, given: bytes = b"", batch: int = 64) -> Stream:
    """Code the rows of ``x``, int64 ``(n, dim)``, in a chain.

    Args:
        code: the model.
        x: rows.
        given: bytes to borrow from, all of which come back; best those of compressed data. Where they are
            not enough pseudo-random ones follow.
        batch: rows that the networks see at a time, at most.

    Raises:
        ValueError: an ``x`` of another shape, or one whose latents no grid can hold; batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, found {batch}")
    chain = _LocalChain(_start(given))
    for rows in x.split(list(sizes(len(x), batch))):
        chain.ensure(len(rows) * code.borrowed)
        code.push(rows, chain)
    data, words = chain.without_unused()
    return Stream(data, 8 * len(given), 32 * words)


def pop(
    code: BitsBack, n: int, data: bytes, given: int = 0, batch: int = 64, random: int | None = None
) -> tuple[Tensor, bytes]:
    """The n rows and the bytes that `push` was given.

    Args:
        code: as of `push`.
        n: rows.
        data: the stack.
        given: number of bytes that were given.
        batch: as of `push`.
        random: pseudo-random bits that were borrowed, to be checked.

    Raises:
        ValueError: a stack that does not end as it began: it is damaged, or of another model.
    """
    if not 0 <= given <= len(data) - len(_HEAD):
        raise ValueError("too short for a stack")
    coder = Coder(data)
    batches = [code.pop(size, coder) for size in reversed(list(sizes(n, batch)))]
    remaining = coder.to_bytes()
    back = remaining[len(_HEAD) : len(_HEAD) + given]
    extra = len(remaining) - len(_start(bytes(given)))
    if extra < 0 or random not in (None, 8 * extra) or remaining != _start(back) + _random(extra):
        raise ValueError("the borrowed bits do not come back: it is damaged, or another model coded it")
    return torch.cat([torch.zeros(0, code.dim, dtype=torch.int64), *reversed(batches)]), back


def sizes(n: int, batch: int) -> Iterator[int]:
    """Rows that are coded together, from the first on.

    >>> list(sizes(40, 64))[-5:]
    [1, 2, 2, 2, 2]
    """
    done = 0
    while done < n:
        size = min(n - done, batch, max(1, done // _EARNED))
        yield size
        done += size


class _LocalChain(Coder):
    """A stack that never ends: pseudo-random words lie below it, as many as are needed."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.words, self.lowest = 0, self.num_below

    def ensure(self, bits: int) -> None:
        """Enough to pop that many bits."""
        missing = (bits - self.num_bits) // 32 + 1
        if missing > 0:
            new = _random(4 * (self.words + missing))[4 * self.words :]
            super().__init__(self.to_bytes() + new)
            self.words += missing

    def without_unused(self) -> tuple[bytes, int]:
        """The stack without the words that were never touched, and how many of them were."""
        unused = max(0, min(self.words, self.lowest + self.words))
        data = self.to_bytes()
        return data[: len(data) - 4 * unused], self.words - unused

    def pop_rows(self, counts: Tensor) -> Tensor:
        return self._watched(super().pop_rows(counts))

    def pop_shared(self, tables: Tables, amounts: Tensor) -> Tensor:
        return self._watched(super().pop_shared(tables, amounts))

    def pop_bits(self, widths: Tensor) -> Tensor:
        return self._watched(super().pop_bits(widths))

    def _watched(self, symbols: Tensor) -> Tensor:
        """``symbols``, which were popped; the lowest point of the stack is kept."""
        below = self.num_below
        if not below:
            raise ValueError("more bits are borrowed than there can be: the flow is too steep for its grid")
        self.lowest = min(self.lowest, below - self.words)
        return symbols


def _start(given: bytes) -> bytes:
    return _HEAD + given + bytes(-len(given) % 4)


def _random(n: int) -> bytes:
    """The first n bytes of a sequence that is the same everywhere."""
    return hashlib.shake_256(b"dflow bits-back").digest(n)
