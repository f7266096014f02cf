"""What the header of a picture file says about its samples, before any of them is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dflow.data.arrays import Array

SAVE_EACH = "save each to a file of its own"


class Refused(Exception):
    """A whole file of a kind that is not read exactly.

    Attributes:
        way: what to do about it, where that is not to convert the file.
    """

    def __init__(self, reason: str, way: str | None = None) -> None:
        super().__init__(reason)
        self.way = way


@dataclass(frozen=True, eq=False)
class Layout:
    """How the samples of a file lie, and what they mean.

    Attributes:
        kind: name of the format: PNG, TIFF, JPEG, GIF, WEBP, BMP or PPM.
        size: ``(H, W)`` as stored.
        depth: bits of a sample: 1, 2, 4, 8 or 16.
        samples: of a pixel: 1 (grey, or a place in the palette), 2 (grey and alpha), 3 (red, green, blue) or
            4 (and alpha).
        palette: uint8 ``(n, 3)`` or, with alpha, ``(n, 4)``.
        key: the colour that is transparent.
        white: whether 0 is white and the largest value black.
        orientation: 1 to 8, as EXIF counts them: how a viewer turns the picture; 1 is not at all.
        lost: what else the file holds, one sentence a kind.
        decode: reads the samples ``(H, W, samples)`` without Pillow; None where only Pillow does.
        exact: whether Pillow reads the samples exactly.
        decode_first: whether ``decode`` reads the file and Pillow reads it again, and not the other way.
        data: makes the bytes to give to other readers, with nothing but samples in them; None: the file's.
    """

    kind: str
    size: tuple[int, int]
    depth: int
    samples: int
    palette: Array | None = None
    key: tuple[int, ...] | None = None
    white: bool = False
    orientation: int = 1
    lost: tuple[str, ...] = ()
    decode: Callable[[bytes], Array] | None = None
    exact: bool = True
    decode_first: bool = False
    data: Callable[[], bytes] | None = None

    @property
    def top(self) -> int:
        """The largest value of a sample."""
        return (1 << self.depth) - 1

    @property
    def losses(self) -> list[str]:
        """All that does not come back: ``lost``, and the orientation of a picture that viewers turn."""
        if self.orientation == 1:
            return list(self.lost)
        reason = f"viewers show it {_TURNS[self.orientation - 2]}; the pixels come back as stored"
        return [*self.lost, lost(f"orientation {self.orientation}", reason)]


def unpack(rows: Array, depth: int, width: int) -> Array:
    """Rows of bytes as samples ``(h, width)`` of 1, 2, 4 or 8 bits, the highest bits first.

    >>> unpack(np.array([[0b00011011]], np.uint8), 2, 4).tolist()
    [[0, 1, 2, 3]]
    """
    if depth == 8:
        return rows[:, :width]
    samples = [rows >> shift & ((1 << depth) - 1) for shift in range(8 - depth, -1, -depth)]
    return np.stack(samples, -1).reshape(len(rows), -1)[:, :width]


def lost(content: str, why: str = "") -> str:
    """The sentence that says that some content of a file does not come back."""
    return f"not kept: its {content}" + (f" ({why})" if why else "")


#: Why the loss of content that viewers use to show colours matters.
COLOURS_CHANGE = "viewers may show other colours without it"

_TURNS = (
    "mirrored", "turned by 180 degrees", "upside down and mirrored", "mirrored and turned",
    "turned by 90 degrees", "mirrored and turned", "turned by 270 degrees",
)  # fmt: skip


def turned(values: Array, orientation: int) -> Array:
    """Pixels ``(H, W, ...)`` as a viewer shows them; source: EXIF 3.0, tag 274.

    >>> turned(np.array([[1, 2], [3, 4]]), 6).tolist()
    [[3, 1], [4, 2]]
    """
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    # What remains is to mirror the picture left and right, and up and down.
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values
