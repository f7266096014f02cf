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
from PIL import Image

from dflow.compress import png
from dflow.config import InputError

Array = NDArray[Any]

#: What a picture was: a picture in grey or colours, or an array of either type.
SOURCES = ("grey", "colour", "uint8", "uint16")
GREY, COLOUR, UINT8, UINT16 = range(4)

#: Formats of Pillow that it reads without rounding, or in which what it reads is what there is.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_CONVERTED = {"1": "L", "L": "L", "LA": "LA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA"}


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


def read(path: Path) -> Picture:
    """The values in a file.

    Raises:
        InputError: no picture, or one that cannot be read exactly.
        OSError: no such file.
    """
    data = path.read_bytes()
    if path.suffix.lower() == ".npy":
        return _array(path, data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _picture(path, data, image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; cut it, or give it as a .npy array") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged, truncated or no picture ({error})") from None


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


#: The drive of a path of Windows.
_DRIVE = re.compile("[A-Za-z]:")


def check_name(name: str) -> str | None:
    """What is wrong with a name of a file that is to be written into a folder, or None.

    A colon is allowed, but not in a drive (``C:``), nor on Windows, where it separates parts of a file.
    """
    if not name.strip() or name in (".", ".."):
        return "is none"
    if "/" in name or "\\" in name or _DRIVE.match(name) or (os.name == "nt" and ":" in name):
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


def _array(path: Path, data: bytes) -> Picture:
    try:
        values: Array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: damaged, truncated or no array ({error})") from None
    if values.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: an array of {values.dtype}; only uint8 and uint16 are compressed")
    if values.ndim not in (2, 3, 4) or not values.size:
        raise InputError(
            f"{path}: an array of shape {values.shape}; expected (H, W), (N, H, W) or (N, H, W, C), not empty"
        )
    depth = max(1, int(values.max()).bit_length())
    form = Form(_name(path), UINT8 if values.dtype == np.uint8 else UINT16, depth, values.shape)
    return Picture(form, values.reshape(form.full).astype(values.dtype.newbyteorder("="), copy=False))


def _picture(path: Path, data: bytes, image: Image.Image) -> Picture:
    kind, notes = image.format, []
    if kind not in _FORMATS:
        raise InputError(f"{path}: a picture of format {kind}; convert it to PNG")
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(
            f"{path}: holds several pictures; save each to a file of its own, or use a .npy array"
        )
    lost = [
        name for key, name in (("icc_profile", "ICC profile"), ("exif", "EXIF data")) if key in image.info
    ]
    if lost:
        notes.append(f"its {' and '.join(lost)} are not kept")
    if kind != "PNG":
        notes.append(f"a {kind} file: its pixels are kept, not its bytes")
    tiles: list[Any] = getattr(image, "tile", [])
    raw = [str(tile[3]) for tile in tiles]
    depth = 8
    if kind == "PNG" and png.depth_of(data) == 16:
        values, depth = png.read(data), 16
    elif image.mode.startswith("I;16") or (image.mode == "I" and all("I;16" in mode for mode in raw)):
        values = np.asarray(image).astype(np.uint16)[..., None]
        depth = 16
    elif (
        image.mode not in _CONVERTED
        or any(";16" in mode for mode in raw)
        or (kind == "PPM" and any(tile[0] != "raw" for tile in tiles))
    ):
        raise InputError(
            f"{path}: a {kind} file of mode {image.mode} ({', '.join(raw)}) cannot be read exactly; convert "
            "it to PNG, in grey or RGB"
        )
    else:
        mode, clear = _CONVERTED[image.mode], "transparency" in image.info
        if clear and mode in ("L", "RGB"):
            mode = "LA" if mode == "L" else "RGBA"
        if image.mode in ("P", "PA"):
            notes.append("its palette became colours")
        elif clear:
            notes.append("its transparent colour became an alpha channel")
        values = np.asarray(image.convert(mode))
        values = values.reshape(*values.shape[:2], -1)
        if mode == "L" and image.mode == "1":
            values, depth = values // 255, 1
        elif mode == "L" and kind == "PNG" and png.depth_of(data) in (2, 4):
            depth = png.depth_of(data)
            values = values // np.uint8(255 // ((1 << depth) - 1))
    if depth == 16:
        # A picture of 16 bits often has fewer; but one of 8 would come back as another.
        depth = max(9, int(values.max()).bit_length())
    plane, alpha = None, None
    if values.shape[2] in (2, 4):
        last, values = values[..., -1], values[..., :-1]
        alpha = int(last[0, 0])
        if (last != alpha).any():
            plane, alpha = last, -1
    source = GREY if values.shape[2] == 1 else COLOUR
    form = Form(_name(path), source, depth, values.shape[:2], alpha)
    return Picture(form, values[None], plane, tuple(notes))
