r"""Local bits-back coding of reals: the grids that they lie on, and how a map is coded on them.

Reals live on grids, as integers ("symbols") with a step and an offset for each entry. A map f is not exact
on them; it is coded with bits that are borrowed from the stack: with x at hand, y is *popped* under a narrow
normal law about f(x), then x is *pushed* under one about f^-1(y), whose width is that of the first by the
slope of f. What the second costs more than the first borrows is ``-log2 |f'|``. A decoder pops x and pushes
y, and has the borrowed bits again.

Only couplings and autoregressive layers need that; the codes of all layers are in `dflow.coding.layers`,
those of densities in `dflow.coding.densities`.

Source: Ho, Lohn and Abbeel 2019, arXiv 1905.08500 (local bits-back).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dflow.coding.codes import Stack
from dflow.coding.normals import NormalCode

#: Values and log of the slope: a map on the entries that it changes.
Map = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CodingSettings:
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
        """The frame of some entries."""
        return Frame(self.step[index], self.offset[index])

    def put(self, index: Tensor, other: Frame) -> Frame:
        """This frame, but another one at some entries."""
        return Frame(*(a.index_copy(0, index, b) for a, b in zip(self, other, strict=True)))

    @classmethod
    def plain(cls, dim: int, step: float) -> Frame:
        """The same step for all, from 0 on."""
        return cls(torch.full((dim,), step, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64))


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
    forward, backward = maps
    moved = local_law(old.values(symbols), width, old, new, forward, encode).pop(stack).view(symbols.shape)
    code = local_law(new.values(moved), width, new, old, backward, not encode)
    stack.push(*code.intervals(symbols.flatten()))
    return moved


def local_law(values: Tensor, width: float, old: Frame, new: Frame, f: Map, narrow: bool) -> NormalCode:
    """The law on ``new`` about ``f(values)``, as wide as one of ``width`` on ``old`` by the slope of f."""
    mean, log_slope = f(values)
    # The narrower of both laws has the width, the other one that by the slope in steps; which is beyond all
    # floats where a mixture is flat.
    slope = (log_slope.exp() * (old.step / new.step)).clamp(1, 2.0**60)
    return NormalCode(new.units(mean).flatten(), (width * slope).flatten(), narrow)
