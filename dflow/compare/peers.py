"""The classical codecs, each at the settings at which it makes the smallest files.

Those of libraries that are not installed, or were built without the codec, stay in the table, with what to
install.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

Array = NDArray[Any]
T = TypeVar("T", bytes, Array)

#: How a codec that is missing is had.
INSTALL = "not installed (pip install dflow[codecs])"

#: The largest window that zstandard takes unasked.
ZSTD_LOG = 27


class Unavailable(Exception):
    """A codec cannot be had here, or does not take what it is given; says which."""


@dataclass(frozen=True)
class Codec(Generic[T]):
    """A codec at fixed settings.

    Attributes:
        name: of the codec.
        settings: at which it runs, in words.
        library: the distribution whose version is shown; empty for what Python brings.
        encode: data to bytes.
        decode: bytes to data, given data without entries of the same kind: what every format records for
            itself is how large a picture is, not all record whether it was grey.
        beside: bytes of what the decoder has beside the file: a training text, as the codec compresses it.
        beside: bytes of what the decoder has beside the file, a training text in its own words; None for
            nothing.
    """

    name: str
    settings: str
    library: str
    encode: Callable[[T], bytes]
    decode: Callable[[bytes, T], T]
    beside: Callable[[], int] | None = None


def library(name: str) -> Any:
    """A library of codecs; `Unavailable` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unavailable(INSTALL) from None


# -- text ------------------------------------------------------------------------------------------------


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def _zstd(data: bytes) -> bytes:
    z = library("zstandard")
    options = z.ZstdCompressionParameters.from_level(
        22, source_size=len(data), window_log=ZSTD_LOG, enable_ldm=True
    )
    return bytes(z.ZstdCompressor(compression_params=options).compress(data))


def _unzstd(data: bytes) -> bytes:
    decoder = library("zstandard").ZstdDecompressor(max_window_size=1 << ZSTD_LOG)
    return bytes(decoder.decompress(data))


def _brotli(data: bytes) -> bytes:
    b = library("brotli")
    return bytes(b.compress(data, mode=b.MODE_TEXT, quality=11, lgwin=24))


def _ppmd(order: int) -> Codec[bytes]:
    def encode(data: bytes) -> bytes:
        coder = library("pyppmd").Ppmd7Encoder(order, PPMD_MEMORY)
        # The stream itself does not say how long it is.
        return len(data).to_bytes(4, "little") + bytes(coder.encode(data) + coder.flush())

    def decode(data: bytes, _: bytes) -> bytes:
        size = int.from_bytes(data[:4], "little")
        coder = library("pyppmd").Ppmd7Decoder(order, PPMD_MEMORY)
        text = bytes(coder.decode(data[4:], size)) if size else b""
        # The library may ask for one byte more than the encoder wrote.
        while len(text) < size and not coder.eof and coder.needs_input:
            text += bytes(coder.decode(b"\0", size - len(text)))
        return text

    return Codec("PPMd", f"variant H, order {order}, 256 MiB", "pyppmd", encode, decode)


#: Memory of PPMd, bytes.
PPMD_MEMORY = 1 << 28


def raw_codecs() -> tuple[Codec[Array], ...]:
    """Codecs of bytes on the values of pictures as they are, one after another."""

    def wrap(codec: Codec[bytes]) -> Codec[Array]:
        def decode(data: bytes, like: Array) -> Array:
            values = np.frombuffer(codec.decode(data, b""), like.dtype)
            return values.reshape(-1, *like.shape[1:])

        settings = f"{codec.settings}, of the raw values"
        return Codec(codec.name, settings, codec.library, lambda p: codec.encode(p.tobytes()), decode)

    return tuple(wrap(codec) for codec in text_codecs() if codec.name in ("xz", "PPMd"))[:2]


def text_codecs() -> tuple[Codec[bytes], ...]:
    """Codecs of bytes, from the weakest on."""
    return (
        Codec("gzip", "-9", "", lambda d: gzip.compress(d, 9, mtime=0), lambda d, _: gzip.decompress(d)),
        Codec("bzip2", "-9", "", lambda d: bz2.compress(d, 9), lambda d, _: bz2.decompress(d)),
        Codec("xz", "-9e", "", _xz, lambda d, _: lzma.decompress(d)),
        Codec("zstd", f"--ultra -22 --long={ZSTD_LOG}", "zstandard", _zstd, lambda d, _: _unzstd(d)),
        Codec(
            "brotli",
            "quality 11, window 2^24, mode text",
            "brotli",
            _brotli,
            lambda d, _: bytes(library("brotli").decompress(d)),
        ),
        *map(_ppmd, (4, 6, 8, 12)),
    )


# -- pictures --------------------------------------------------------------------------------------------


def _saved(picture: Array, kind: str, **options: Any) -> bytes:
    if picture.dtype != np.uint8 and (picture.ndim == 3 or kind != "PNG"):
        what = "colours" if picture.ndim == 3 else "values"
        raise Unavailable(f"takes no {what} of {8 * picture.itemsize} bits")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def _opened(data: bytes, like: Array) -> Array:
    """A picture, in the depth and the colours of ``like``: some codecs store it in fewer where these do."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            return np.asarray(image).astype(like.dtype)
        modes = {2: "L"} if like.ndim == 2 else {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
        values = np.asarray(image.convert(modes[like.shape[-1] if like.ndim == 3 else 2]))
    # A depth of 16 bits is stored as 8 where both bytes of every value are alike.
    return values * np.uint16(257) if like.dtype == np.uint16 else values


def _png(picture: Array) -> bytes:
    return _saved(picture, "PNG", optimize=True)


def _oxipng(picture: Array) -> bytes:
    o = library("oxipng")
    return bytes(o.optimize_from_memory(_png(picture), level=6, strip=o.StripChunks.all()))


def _webp(picture: Array) -> bytes:
    if not features.check("webp"):
        raise Unavailable("this build of Pillow is without WebP")
    return _saved(picture, "WEBP", lossless=True, quality=100, method=6, exact=True)


def _imagecodecs(codec: str, picture: Array, **options: Any) -> bytes:
    installed = library("imagecodecs")
    if not getattr(installed, codec.upper()).available:
        raise Unavailable(f"this build of imagecodecs is without {codec}")
    return bytes(getattr(installed, f"{codec}_encode")(picture, **options))


def _decoder(codec: str) -> Callable[[bytes, Array], Array]:
    def decode(data: bytes, like: Array) -> Array:
        values: Array = np.asarray(getattr(library("imagecodecs"), f"{codec}_decode")(data))
        return values

    return decode


def _jxl(effort: int) -> Codec[Array]:
    def encode(picture: Array) -> bytes:
        return _imagecodecs("jpegxl", picture, lossless=True, effort=effort, usecontainer=False, numthreads=1)

    return Codec("JPEG XL", f"lossless, effort {effort}", "imagecodecs", encode, _decoder("jpegxl"))


def _jpeg2k(picture: Array) -> bytes:
    def encode(resolutions: int) -> bytes:
        return _imagecodecs(
            "jpeg2k", picture, level=0, reversible=True, codecformat="j2k", resolutions=resolutions
        )

    # Small pictures are smaller with fewer halvings than the usual five.
    most = max(1, min(6, min(picture.shape[:2]).bit_length()))
    return min((encode(r) for r in {most, max(1, most - 1), max(1, most - 2)}), key=len)


def picture_codecs() -> tuple[Codec[Array], ...]:
    """Codecs of pictures, ``(H, W)`` or ``(H, W, C)``, about from the weakest on."""
    return (
        Codec("PNG", "Pillow, optimize", "pillow", _png, _opened),
        # Its zopfli makes photographs 1 % smaller, and takes seventy times as long.
        Codec("PNG optimised", "oxipng -o6", "pyoxipng", _oxipng, _opened),
        Codec(
            "JPEG-LS",
            "lossless, no colour transform",
            "imagecodecs",
            lambda p: _imagecodecs("jpegls", p, level=0),
            _decoder("jpegls"),
        ),
        Codec(
            "JPEG 2000",
            "reversible, bare stream, best of 3 depths",
            "imagecodecs",
            _jpeg2k,
            _decoder("jpeg2k"),
        ),
        Codec("WebP", "lossless, quality 100, method 6", "pillow", _webp, _opened),
        # No effort is best on all: 10 is far ahead on drawings, 7 on the least photographs.
        *map(_jxl, (7, 9, 10)),
    )


def every() -> tuple[Codec[Any], ...]:
    """Those of texts, of pictures, and of values as they are."""
    return (*text_codecs(), *picture_codecs(), *raw_codecs())


def find(name: str, settings: str) -> Codec[Any]:
    """The codec of that name and settings.

    Raises:
        ValueError: no such codec.
    """
    for codec in every():
        if (codec.name, codec.settings) == (name, settings):
            return codec
    raise ValueError(f"no codec {name} ({settings})")
