"""Pictures and arrays as files hold them: every value comes back, whatever else the file held does not."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflow.config import InputError
from dflow.data import formats
from dflow.data.arrays import from_npy
from dflow.data.formats import png

Array = NDArray[Any]

#: What a picture was: a picture in grey or colours, or an array of either type.
SOURCES = ("grey", "colour", "uint8", "uint16")
GREY, COLOUR, UINT8, UINT16 = range(4)

#: What to do about a picture that cannot be read exactly.
_WAY = f"{formats.WAY}, or compress the array of its values as .npy"


@dataclass(frozen=True)
class Form:
    """What a file has to hold beside its values.

    Attributes:
        name: of the file, without its suffix.
        source: a place in `SOURCES`.
        depth: values are below ``2^depth``.
        dims: ``(H, W)`` of a picture; of an array ``(H, W)``, ``(N, H, W)`` or ``(N, H, W, C)``.
        alpha: None, one value for all pixels, or -1 for a plane of values.
    """

    name: str
    source: int
    depth: int
    dims: tuple[int, ...]
    alpha: int | None = None

    @property
    def is_array(self) -> bool:
        """Whether it comes back as a ``.npy`` file."""
        return self.source >= UINT8

    @property
    def full(self) -> tuple[int, int, int, int]:
        """``(N, H, W, C)``."""
        if not self.is_array:
            return (1, self.dims[0], self.dims[1], 3 if self.source == COLOUR else 1)
        n, h, w, c = (*((1,) if len(self.dims) == 2 else ()), *self.dims, 1)[:4]
        return n, h, w, c

    @property
    def file(self) -> str:
        """The name that it comes back by."""
        return self.name + (".npy" if self.is_array else ".png")

    @property
    def file_depth(self) -> int:
        """Bits a value of the file that it comes back as."""
        if self.is_array:
            return 8 if self.source == UINT8 else 16
        return next(d for d in (1, 2, 4, 8, 16) if d >= self.depth)


@dataclass(frozen=True, eq=False)
class Picture:
    """Values ``(N, H, W, C)``, uint8 or uint16; alpha ``(H, W)`` where it is a plane.

    ``notes`` tell what of the file is not kept.
    """

    form: Form
    values: Array
    alpha: Array | None = None
    notes: tuple[str, ...] = ()

    def preview(self) -> Array:
        """The first picture of it to look at, ``(H, W)`` or ``(H, W, 3)`` in 0..1."""
        depth = max(8, self.form.depth) if self.form.is_array else self.form.depth
        values: Array = self.values[0] / ((1 << depth) - 1)
        return values if values.shape[2] == 3 else values[..., 0]

    def same(self, other: Picture) -> bool:
        """Whether every value is the same."""
        if self.form != other.form or not np.array_equal(self.values, other.values):
            return False
        return self.alpha is other.alpha is None or np.array_equal(self.alpha, other.alpha)  # type: ignore[arg-type]


def read(path: Path, again: bool = False, name: str | None = None) -> Picture:
    """The values in a file.

    Args:
        path: of a picture, or of an array (``.npy``).
        again: read a picture by another way than the usual one, see `dflow.data.formats.read_again`.
        name: that its form has (default: that of the file, without its suffix).

    Raises:
        InputError: no picture, or one that cannot be read exactly.
        OSError: no such file.
    """
    data = path.read_bytes()
    if name is None:
        name = _name(path)
    if path.suffix.lower() in (".npy", ".npz"):
        return _array(path, data, name)
    return _picture(name, (formats.read_again if again else formats.read)(data, str(path), _WAY))


def write(picture: Picture) -> bytes:
    """The file: PNG or ``.npy``."""
    form = picture.form
    if form.is_array:
        buffer = io.BytesIO()
        values = picture.values.astype(np.uint8 if form.source == UINT8 else np.uint16)
        np.save(buffer, values.reshape(form.dims), allow_pickle=False)
        return buffer.getvalue()
    values = picture.values[0]
    if form.alpha is not None:
        plane = np.full(values.shape[:2], form.alpha) if picture.alpha is None else picture.alpha
        values = np.concatenate([values, plane[..., None].astype(values.dtype)], -1)
    return png.write(values, form.file_depth)


#: The beginning of a path of Windows with a drive.
DRIVE = re.compile("[A-Za-z]:")


def check_name(name: str) -> str | None:
    """What is wrong with a name of a file that is to be written into a folder, or None.

    A colon is allowed, but not in a drive (``C:``), nor on Windows, where it separates parts of a file.
    """
    if not name.strip() or name in (".", ".."):
        return "is not a file name"
    if "/" in name or "\\" in name or DRIVE.match(name) or (os.name == "nt" and ":" in name):
        return "names a place, not a file"
    if os.name == "nt" and name.rstrip(" .") != name:
        return "ends with a space or a dot, which Windows leaves out"
    if not name.isprintable():
        return "has characters that cannot be shown"
    return "is longer than 200 bytes" if len(name.encode("utf-8", "replace")) > 200 else None


def _name(path: Path) -> str:
    if wrong := check_name(path.stem):
        raise InputError(f"{str(path)!r}: its name {wrong}; rename the file")
    return path.stem


#: Last axes that may be the channels of a picture.
_CHANNELS = (1, 2, 3, 4)


def _array(path: Path, data: bytes, name: str) -> Picture:
    values = from_npy(data, path)
    if values.ndim not in (2, 3, 4) or not values.size:
        raise InputError(
            f"{path}: an array of shape {values.shape}; expected (H, W), (N, H, W) or (N, H, W, C), not empty"
        )
    if values.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"{path}: an array of {values.dtype}; only uint8 and uint16 are compressed: {_other_type(values)}"
        )
    if values.ndim == 3 and values.shape[2] in _CHANNELS and min(values.shape[:2]) > max(_CHANNELS):
        a, b, c = values.shape
        raise InputError(
            f"{path}: an array of shape {values.shape} may be one picture of {c} channels or {a} grey "
            f"pictures of {b} x {c}; save it as (1, {a}, {b}, {c}) for one picture (array[None]), or as "
            f"({a}, {b}, {c}, 1) for grey ones (array[..., None])"
        )
    depth = max(1, int(values.max()).bit_length())
    form = Form(name, UINT8 if values.dtype == np.uint8 else UINT16, depth, values.shape)
    return Picture(form, values.reshape(form.full))


def _other_type(values: Array) -> str:
    """How an array of another type is saved as one that is compressed, with nothing lost."""
    for kind in (np.uint8, np.uint16):
        if values.dtype.kind in "biu" and values.min() >= 0 and values.max() <= np.iinfo(kind).max:
            return f"save it as array.astype(numpy.{kind.__name__}), which holds all of its values"
    bits = "uint8" if values.dtype.itemsize == 1 else "uint16"
    return f"save its bits as array.view(numpy.{bits}), of which .view(array.dtype) gives the array back"


def _picture(name: str, stored: formats.StoredFormat) -> Picture:
    depth, plane, alpha = stored.depth, stored.alpha, None
    if depth == 16:
        # A picture of 16 bits often has fewer; but one of 8 would come back as another.
        largest = max(int(values.max()) for values in (stored.values, plane) if values is not None)
        depth = max(9, largest.bit_length())
    if plane is not None:
        alpha = int(plane[0, 0])
        alpha, plane = (-1, plane) if (plane != alpha).any() else (alpha, None)
    source = GREY if stored.values.shape[2] == 1 else COLOUR
    form = Form(name, source, depth, stored.values.shape[:2], alpha)
    return Picture(form, stored.values[None], plane, stored.notes)
