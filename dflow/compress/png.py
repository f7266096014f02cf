"""PNG files of any depth, exactly: Pillow reads 16-bit colours as 8-bit ones without a word.

Source: Portable Network Graphics specification, W3C Recommendation, third edition (2025).
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Channels by colour type, and back.
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
_TYPES = {channels: kind for kind, channels in _CHANNELS.items()}
#: First column and row, steps of both, of the seven passes of an interlaced picture.
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
#: Rows that are filtered together.
_ROWS = 256


def depth_of(data: bytes) -> int:
    """Bits a value of a PNG file; 0 of what is none."""
    return data[24] if data.startswith(SIGNATURE) and len(data) > 25 else 0


def write(values: Array, depth: int) -> bytes:
    """A PNG file of values ``(H, W, C)`` below ``2^depth``.

    C is 1 (grey), 2 (grey and alpha), 3 (red, green, blue) or 4 (and alpha); depth 8 or 16, of grey also 1, 2
    or 4.

    Raises:
        ValueError: another shape or depth.

    >>> values = np.array([[[1], [65535]]], np.uint16)
    >>> bool((read(write(values, 16)) == values).all())
    True
    """
    H, W, C = values.shape
    if C not in _TYPES or min(H, W) < 1 or depth not in ((1, 2, 4, 8, 16) if C == 1 else (8, 16)):
        raise ValueError(f"no PNG file has {depth} bits a value and shape {values.shape}")
    if depth < 8:
        bits = np.unpackbits(values.astype(np.uint8).reshape(H, W, 1), axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(H, -1), axis=1)
        lines = np.concatenate([np.zeros((H, 1), np.uint8), rows], 1)
    else:
        rows = values.astype(">u2" if depth == 16 else np.uint8).reshape(H, -1).view(np.uint8)
        lines = _filter(rows, C * depth // 8)
    header = struct.pack(">IIBBBBB", W, H, depth, _TYPES[C], 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def read(data: bytes) -> Array:
    """The values ``(H, W, C)``, uint16, of a PNG file of 16 bits; a transparent colour becomes alpha.

    Raises:
        ValueError: damaged, or another depth.
    """
    chunks: dict[bytes, bytes] = {}
    at = len(SIGNATURE)
    while b"IEND" not in chunks:
        if at + 12 > len(data):
            raise ValueError("cut off")
        (length,), name = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        body, crc = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if int.from_bytes(crc, "big") != zlib.crc32(name + body) or len(crc) != 4:
            raise ValueError(f"chunk {name!r} is damaged")
        chunks[name] = chunks.get(name, b"") + body if name == b"IDAT" else body
        at += 12 + length
    if len(chunks.get(b"IHDR", b"")) != 13:
        raise ValueError("no header")
    W, H, depth, kind, *methods, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if depth != 16 or kind not in _CHANNELS or any(methods) or interlaced > 1:
        raise ValueError("not a picture of 16 bits")
    C = _CHANNELS[kind]
    passes = [p for p in (_PASSES if interlaced else ((0, 0, 1, 1),)) if p[0] < W and p[1] < H]
    sizes = [(-(-(H - y) // dy), -(-(W - x) // dx)) for x, y, dx, dy in passes]
    expected = sum(h * (1 + 2 * C * w) for h, w in sizes)
    try:
        lines = zlib.decompressobj().decompress(chunks.get(b"IDAT", b""), expected + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(lines) != expected:
        raise ValueError(f"{len(lines)} bytes of pixels, expected {expected}")
    values, start = np.empty((H, W, C), np.uint16), 0
    for (x, y, dx, dy), (h, w) in zip(passes, sizes, strict=True):
        stop = start + h * (1 + 2 * C * w)
        rows = _unfilter(np.frombuffer(lines[start:stop], np.uint8).reshape(h, -1), 2 * C)
        values[y::dy, x::dx] = rows.view(">u2").reshape(h, w, C)
        start = stop
    key = chunks.get(b"tRNS")
    if key is not None and C in (1, 3) and len(key) == 2 * C:
        seen = (values != np.frombuffer(key, ">u2")).any(-1, keepdims=True)
        values = np.concatenate([values, seen * np.uint16(65535)], -1)
    return values


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _predictions(rows: Array, before: Array, pixel: int) -> list[Array]:
    """What the five filters subtract: nothing, left, up, their mean, Paeth's choice; int16."""
    a = np.zeros(rows.shape, np.int16)
    a[:, pixel:] = rows[:, :-pixel]
    b = np.concatenate([before[None], rows[:-1]]).astype(np.int16)
    c = np.zeros(rows.shape, np.int16)
    c[:, pixel:] = b[:, :-pixel]
    pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    paeth = np.where((pa <= pb) & (pa <= pc), a, np.where(pb <= pc, b, c))
    return [np.zeros_like(a), a, b, (a + b) >> 1, paeth]


def _filter(rows: Array, pixel: int) -> Array:
    """Rows under the filter that leaves the least sum of magnitudes, each behind its number."""
    parts, before = [], np.zeros(rows.shape[1], np.uint8)
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        lines = np.stack([(some - p).astype(np.uint8) for p in _predictions(some, before, pixel)])
        best = abs(lines.view(np.int8).astype(np.int16)).sum(-1, dtype=np.int64).argmin(0)
        chosen = lines[best, np.arange(len(some))]
        parts.append(np.concatenate([best[:, None].astype(np.uint8), chosen], 1))
        before = some[-1]
    return np.concatenate(parts)


def _unfilter(lines: Array, pixel: int) -> Array:
    rows = np.empty((len(lines), lines.shape[1] - 1), np.uint8)
    before = np.zeros(rows.shape[1], np.uint8)
    for i, line in enumerate(lines):
        kind, row = int(line[0]), line[1:]
        if kind == 1:
            row = row.reshape(-1, pixel).cumsum(0, dtype=np.uint8).ravel()
        elif kind == 2:
            row = row + before
        elif kind in (3, 4):
            row = _serial(row, before, pixel, kind == 4)
        elif kind:
            raise ValueError(f"a row of filter {kind}")
        rows[i] = before = row
    return rows


def _serial(row: Array, before: Array, pixel: int, paeth: bool) -> Array:
    """The filters that hang on what they have just given."""
    found = [0] * pixel + row.tolist()
    up = [0] * pixel + before.tolist()
    for i in range(pixel, len(found)):
        a, b = found[i - pixel], up[i]
        if paeth:
            c = up[i - pixel]
            pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
            guess = a if pa <= pb and pa <= pc else b if pb <= pc else c
        else:
            guess = (a + b) >> 1
        found[i] = (found[i] + guess) & 255
    return np.array(found[pixel:], np.uint8)
