"""Values of pictures that no model codes: packed to their bits, and stored beside what a model codes."""

from __future__ import annotations

import zlib
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflow.coding.container import Container, Damaged, crc32
from dflow.compress.dfl import inflate
from dflow.compress.pixels import Form, Picture
from dflow.compress.tiles import depth_of

Array = NDArray[Any]

#: What errors are about.
_BESIDE = "what is stored beside the model"


def to_bytes(values: Array) -> bytes:
    """Values of 8 bits, or of 16 little-endian."""
    return values.astype("<u2" if values.dtype.itemsize > 1 else np.uint8).tobytes()


def pack(values: Array, bits: int, effort: int) -> bytes:
    """Values below ``2^bits``, packed; deflated where that is shorter."""
    wide = values.astype(">u2").view(np.uint8).reshape(-1, 2)
    packed = np.packbits(np.unpackbits(wide, axis=1)[:, 16 - bits :]).tobytes()
    return min(packed, zlib.compress(packed, effort), key=len)


def unpack(data: bytes, n: int, bits: int) -> Array:
    """The inverse, of ``n`` values; `Damaged` where it holds others."""
    size = ceil(n * bits / 8)
    if len(data) != size:
        data = _inflate(data, size, "its packed values are")
    wide = np.zeros((n, 16), np.uint8)
    wide[:, 16 - bits :] = np.unpackbits(np.frombuffer(data, np.uint8), count=n * bits).reshape(n, bits)
    return np.packbits(wide, axis=1).view(">u2").ravel().astype(np.uint16)


def _inflate(data: bytes, size: int, what: str) -> bytes:
    """Deflated data of a known size."""
    plain = inflate(data, size, what)
    if len(plain) != size:
        raise Damaged(f"{what} damaged, or too short")
    return plain


# -- low bits and planes of alpha ------------------------------------------------------------------------


def _low_bits(form: Form, bits: int) -> int:
    """Bits of a value that a model of ``bits`` has no room for."""
    return max(0, depth_of(form, bits) - bits)


def _type(depth: int) -> Any:
    return np.uint8 if depth <= 8 else np.dtype("<u2")


def extra(picture: Picture, bits: int) -> bytes:
    """What goes beside a model of ``bits``: low bits and the plane of alpha."""
    low, data = _low_bits(picture.form, bits), b""
    if low:
        data = (picture.values & np.uint16((1 << low) - 1)).astype(_type(low)).tobytes()
    if picture.alpha is not None:
        data += picture.alpha.astype(_type(picture.form.file_depth)).tobytes()
    return data


def extra_size(form: Form, bits: int) -> int:
    """Bytes of `extra`."""
    low = _low_bits(form, bits)
    alpha = prod(form.dims) * ceil(form.file_depth / 8) if form.alpha == -1 else 0
    return prod(form.full) * ceil(low / 8) + alpha


def read_extra(parsed: Container, size: int, levels: int | None) -> bytes | None:
    """What `extra` gave of all pictures, or None where the last level is missing or not wanted."""
    segment = parsed.segments[-1]
    if not segment.raw or any(segment.lengths[:-1]) or not segment.lengths[-1]:
        raise Damaged(f"{_BESIDE} is not in the last level")
    if len(segment.levels) < len(segment.lengths) or (levels or parsed.num_levels) < parsed.num_levels:
        return None
    data = _inflate(segment.levels[-1], size, f"{_BESIDE} is")
    if crc32(data) != segment.crc:
        raise Damaged(f"{_BESIDE} is damaged (checksum)")
    return data


def finished(form: Form, values: Array, data: bytes | None, bits: int, exact: bool) -> Picture:
    """A picture of its high bits and of what `extra` gave; without that of middle values, opaque."""
    low, alpha = _low_bits(form, bits), None
    if low and data is not None:
        low_values = np.frombuffer(data, _type(low), values.size)
        data = data[low_values.nbytes :]
        if int(low_values.max()) >> low:
            raise Damaged(f"{_BESIDE} does not fit it")
        values = values | low_values.reshape(values.shape)
    elif low:
        values = values | np.uint16(1 << (low - 1))
    if form.alpha == -1 and data is not None:
        alpha = np.frombuffer(data, _type(form.file_depth)).reshape(form.dims)
    elif form.alpha == -1:
        alpha = np.full(form.dims, (1 << form.file_depth) - 1, _type(form.file_depth))
    top = (1 << (form.file_depth if form.is_array else form.depth)) - 1
    if int(values.max()) > top:
        if exact:
            raise Damaged(f"{form.file} decodes to values that it cannot hold")
        values = values.clip(max=top)
    return Picture(form, values.astype(np.uint8 if form.file_depth <= 8 else np.uint16), alpha)
