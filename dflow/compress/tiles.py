"""Pictures as tiles of a model's shape and range, and back."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflow.compress.pixels import Form

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Grid:
    """How the values of a file lie in tiles.

    Attributes:
        full: ``(N, H, W, C)`` of the file.
        tile: ``(C, H, W)`` of a tile.
        planes: pictures, each of the model's channels, that one picture of the file becomes.
        used: channels of a tile that are read back.
        down: tiles in a column.
        across: tiles in a row.
    """

    full: tuple[int, int, int, int]
    tile: tuple[int, int, int]
    planes: int
    used: int
    down: int
    across: int

    @property
    def size(self) -> int:
        """Tiles of the file."""
        return self.full[0] * self.planes * self.down * self.across

    @functools.cached_property
    def _real(self) -> Array:
        """Which values of the tiles of a plane are of the file."""
        C, H, W = self.tile
        real = np.zeros((C, self.down * H, self.across * W), bool)
        real[: self.used, : self.full[1], : self.full[2]] = True
        return self._cut(real[None])

    def real(self, start: int, stop: int) -> Array:
        """The same of some tiles of the file, bool ``(n, dim)``."""
        return self._real[np.arange(start, stop) % (self.down * self.across)]

    def cut(self, values: Array) -> Array:
        """Values ``(N, H, W, C)`` as tiles ``(size, dim)``."""
        N, h, w, _ = self.full
        C, H, W = self.tile
        x = values.transpose(0, 3, 1, 2).reshape(N * self.planes, -1, h, w)
        x = np.broadcast_to(x, (len(x), C, h, w)) if x.shape[1] < C else x
        for axis, more in ((2, self.down * H - h), (3, self.across * W - w)):
            pad = [(0, more if i == axis else 0) for i in range(4)]
            x = np.pad(x, pad, "reflect" if x.shape[axis] > 1 else "edge")
        return self._cut(x)

    def _cut(self, x: Array) -> Array:
        C, H, W = self.tile
        x = x.reshape(len(x), C, self.down, H, self.across, W).transpose(0, 2, 4, 1, 3, 5)
        return np.ascontiguousarray(x).reshape(-1, C * H * W)

    def join(self, tiles: Array) -> Array:
        """The values of tiles."""
        N, h, w, c = self.full
        C, H, W = self.tile
        x = tiles.reshape(-1, self.down, self.across, C, H, W).transpose(0, 3, 1, 4, 2, 5)
        x = x.reshape(N * self.planes, C, self.down * H, self.across * W)[:, : self.used, :h, :w]
        return np.ascontiguousarray(x.reshape(N, c, h, w).transpose(0, 2, 3, 1))


def grid(form: Form, tile: tuple[int, int, int]) -> Grid:
    """How a file lies in tiles ``(C, H, W)``; ValueError where its channels are not the model's."""
    return _grid(form.full, tile)


@functools.lru_cache(8)
def _grid(full: tuple[int, int, int, int], tile: tuple[int, int, int]) -> Grid:
    (_, h, w, c), (C, H, W) = full, tile
    if c != C and C != 1 and c != 1:
        raise ValueError(
            f"{c} channels for a model of {C}; use a model of {c} or of 1, or save an array with "
            f"its channels as grey pictures: numpy.moveaxis(array, -1, 1).reshape(-1, {h}, {w}, 1)"
        )
    return Grid(full, tile, c if C == 1 else 1, C if c == C else 1, ceil(h / H), ceil(w / W))


def depth_of(form: Form, bits: int) -> int:
    """Bits of a value: those of an array are taken as they are where the model has as many or more."""
    return max(form.depth, bits) if form.is_array else form.depth


def to_model(values: Array, depth: int, bits: int) -> Array:
    """Values of ``depth`` bits as the model's."""
    if depth >= bits:
        values = values >> (depth - bits)
    else:
        values = values.astype(np.uint32) * ((1 << bits) - 1) // ((1 << depth) - 1)
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


def from_model(x: Array, depth: int, bits: int) -> Array:
    """The inverse of `to_model` but for the low bits, which are 0."""
    if depth >= bits:
        return x.astype(np.uint16) << (depth - bits)
    top = (1 << bits) - 1
    return ((x.astype(np.uint32) * ((1 << depth) - 1) + top - 1) // top).astype(np.uint16)
