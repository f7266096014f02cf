"""The one place where a picture file is accepted and becomes exact integers.

What a file holds is decided by its own header, format by format, and all that is not known to be exact is
refused. Pillow then decodes the samples, or a reader of dflow where Pillow would round them; `read_again`
takes another way, so that a fault of either shows.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dflow.config import InputError
from dflow.data.arrays import Array
from dflow.data.formats import bmp, compact, png, pnm, tiff
from dflow.data.formats.layout import Layout, Refused

#: Endings of the names of files that may hold what is read here.
SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
#: Largest number of pixels of a picture: a file of some kilobytes may promise more than any memory has.
MAX_PIXELS = 1 << 27
WAY = "convert it to PNG, in grey or RGB"
#: How files of other formats begin.
_OTHERS = (
    (b"\0\0\1\0", "an icon"), (b"8BPS", "Photoshop"), (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"DDS ", "DDS"), (b"%PDF", "PDF"),
    (b"P7", "PAM"), (b"PF", "PFM"), (b"Pf", "PFM"), (b"v/1\1", "OpenEXR"), (b"#?RADIANCE", "Radiance HDR"),
    (b"<svg", "SVG"), (b"SIMPLE", "FITS"), (b"\x59\xa6\x6a\x95", "Sun raster"), (b"\1\xda", "SGI"),
)  # fmt: skip
#: Formats whose name follows ``ftyp``, as phones write them.
_BRANDS = {
    b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredFormat:
    """A picture as its file holds it.

    Attributes:
        layout: what the header says.
        values: ``(H, W, C)``, uint8 or uint16, C of 1 (grey) or 3 (red, green, blue); palettes are resolved.
        depth: values are below ``2^depth``: 1, 2, 4, 8 or 16.
        alpha: ``(H, W)`` in the same range, or None.
        notes: on content of the file that became something else, or is not kept: one sentence a kind.
    """

    layout: Layout
    values: Array
    depth: int
    alpha: Array | None
    notes: tuple[str, ...]


def read(data: bytes, name: str, way: str = WAY) -> StoredFormat:
    """The picture in a file.

    Args:
        data: the bytes of the file.
        name: of the file, for errors.
        way: what to do about a file that cannot be read exactly.

    Raises:
        InputError: damaged, no picture, too large a one, or one that cannot be read exactly.
    """
    return _read(data, name, way, _samples)


def read_again(data: bytes, name: str, way: str = WAY) -> StoredFormat:
    """The same by another way, where there is one.

    PNG (but for its filters), BMP and PNM are read by readers of dflow, TIFF by Pillow; PNG of 16 bits in
    colours, GIF and lossless WebP by ``imagecodecs`` if it is installed. All others are read once more in the
    same way: two decoders of JPEG may round differently.

    Raises:
        InputError: as of `read`.
    """
    return _read(data, name, way, _samples_again)


def _read(data: bytes, name: str, way: str, samples: Callable[[bytes, Layout], Array]) -> StoredFormat:
    with _errors(name, way):
        layout = _layout(data)
        H, W = layout.size
        if H * W > MAX_PIXELS:
            raise Refused(
                f"a picture of {W:,} x {H:,} pixels, more than {MAX_PIXELS:,}", "cut it into smaller ones"
            )
        return _picture(layout, samples(data, layout))


@contextmanager
def _errors(name: str, way: str) -> Iterator[None]:
    """Any error in reading a file becomes an `InputError` that names the file, and no warning is shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Refused as error:
        raise InputError(f"{name}: {error}, which is not read; {error.way or way}") from None
    except MemoryError:
        raise InputError(f"{name}: a picture that takes more memory than there is; cut it") from None
    # Decoders of damaged files raise errors of a dozen kinds, from struct.error to ZeroDivisionError.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (struct.error, IndexError)):
            reason = "cut off"
        raise InputError(
            f"{name}: damaged, truncated or no picture ({reason}); replace or remove it"
        ) from error


def _layout(data: bytes) -> Layout:
    if data.startswith(png.SIGNATURE):
        return png.layout(data)
    if tiff.is_tiff(data):
        return tiff.layout(data)
    if data.startswith(b"\xff\xd8\xff"):
        return compact.jpeg(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return compact.gif(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return compact.webp(data)
    if data.startswith(b"BM"):
        return bmp.layout(data)
    if pnm.is_pnm(data):
        return pnm.layout(data)
    kind = next((name for start, name in _OTHERS if data.startswith(start)), None)
    if data[4:8] == b"ftyp":
        kind = _BRANDS.get(data[8:12], "a video")
    if kind:
        raise Refused(f"a file of another format ({kind})")
    raise ValueError("it does not begin like a picture")


# -- samples ---------------------------------------------------------------------------------------------


def _samples(data: bytes, layout: Layout) -> Array:
    if layout.decode is not None and (layout.decode_first or not layout.exact):
        return layout.decode(data)
    return _pillow(data, layout)


def _samples_again(data: bytes, layout: Layout) -> Array:
    if layout.kind == "GIF" or (layout.kind == "WEBP" and b"VP8L" in data[:64]):
        return _imagecodecs(data, layout)
    if not layout.exact:
        # What is interlaced makes the library write to standard error.
        return _imagecodecs(data, layout) if layout.kind == "PNG" and not data[28] else _samples(data, layout)
    if layout.decode is not None and not layout.decode_first:
        return layout.decode(data)
    return _pillow(data, layout)


def _imagecodecs(data: bytes, layout: Layout) -> Array:
    """The samples by ``imagecodecs``, or as `_samples` reads them where it is not installed."""
    try:
        import imagecodecs
    except ImportError:
        return _samples(data, layout)
    data = layout.data() if layout.data else data
    if layout.kind == "GIF":
        values = imagecodecs.gif_decode(data, index=0, asrgb=False)
    else:
        values = (imagecodecs.png_decode if layout.kind == "PNG" else imagecodecs.webp_decode)(data)
    samples: Array = np.asarray(values).reshape(*layout.size, -1)
    return samples[..., : layout.samples]


def _pillow(data: bytes, layout: Layout) -> Array:
    """The samples ``(H, W, S)`` by Pillow; ValueError where its mode is not that of the header."""
    with Image.open(io.BytesIO(layout.data() if layout.data else data), formats=[layout.kind]) as image:
        size = image.size[::-1]
        if size != layout.size:
            raise ValueError(f"a picture of {size} pixels behind a header of {layout.size}")
        image.load()
        mode, values = image.mode, np.asarray(image)
    deep = layout.depth == 16
    modes = {1: ("I;16", "I;16B", "I") if deep else ("1", "L", "P"), 2: ("LA",), 3: ("RGB",), 4: ("RGBA",)}
    if mode not in modes[layout.samples] or (mode == "1") > (layout.depth == 1):
        raise ValueError(f"{layout.samples} samples of {layout.depth} bits, of which Pillow makes {mode}")
    values = values.astype(np.uint16 if deep else np.uint8).reshape(*size, -1)
    if layout.palette is not None:
        return values
    if mode == "L" and layout.depth < 8:
        # Pillow spreads them over 8 bits.
        values = np.floor_divide(values, np.uint8(255 // layout.top))
    return layout.top - values if layout.white else values


# -- values ----------------------------------------------------------------------------------------------


def _picture(layout: Layout, samples: Array) -> StoredFormat:
    """The picture of samples: palettes, transparent colours and values that count from white are resolved."""
    notes, values, depth, alpha = layout.losses, samples, layout.depth, None
    if layout.kind != "PNG":
        name = {"WEBP": "WebP", "PPM": "PNM"}.get(layout.kind, layout.kind)
        notes.append(f"a {name} file: its pixels are kept, not its bytes")
    if layout.white:
        values = (layout.top - values).astype(values.dtype)
        notes.append(f"its values, in which 0 is white, became {layout.top} minus each, in which 0 is black")
    if layout.palette is not None:
        if int(values.max()) >= len(layout.palette):
            raise ValueError(f"colour {values.max()} of a palette of {len(layout.palette)}")
        values, depth = layout.palette[values[..., 0]], 8
        notes.append("its palette became colours")
    elif layout.key is not None:
        alpha = (values != np.array(layout.key)).any(-1) * values.dtype.type(layout.top)
        notes.append("its transparent colour became an alpha channel")
        if depth < 8:
            scale, depth = np.uint8(255 // layout.top), 8
            values, alpha = values * scale, alpha * scale
            notes.append(f"its values of {layout.depth} bits became 8 bits, each times {scale}")
    if values.shape[2] in (2, 4):
        values, alpha = values[..., :-1], values[..., -1]
    return StoredFormat(layout, values, depth, alpha, tuple(notes))
