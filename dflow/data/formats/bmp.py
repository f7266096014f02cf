"""BMP files without compression, of 1, 4, 8, 24 and 32 bits a pixel.

Source: Microsoft, "Bitmap storage" and ``BITMAPINFOHEADER``, ``BITMAPV4HEADER``, ``BITMAPV5HEADER``.
"""

from __future__ import annotations

import struct
from functools import partial

import numpy as np

from dflow.data.arrays import Array
from dflow.data.formats.layout import COLOURS_CHANGE, Layout, Refused, lost, unpack

#: Masks of red, green, blue and alpha that are read.
_MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
_SRGB, _WINDOWS = 0x73524742, 0x57696E20


def layout(data: bytes) -> Layout:
    """What the header says.

    Raises:
        Refused: packed by runs, or 16 bits a pixel, or masks that are not those of plain colours.
        ValueError: damaged; or struct.error.
    """
    start, length = struct.unpack_from("<LL", data, 10)
    if length not in (40, 52, 56, 108, 124):
        raise Refused(f"a BMP file with a header of {length} bytes")
    W, height, _, bits, packing, _, *resolution, colours, _ = struct.unpack_from("<lLHHLLLLLL", data, 18)
    masks = struct.unpack_from("<4L", data, 54) if length >= 56 else ()
    down = height >= 1 << 31
    H = (1 << 32) - height if down else height
    plain = packing == 0 and bits in (1, 4, 8, 24, 32)
    if not plain and (packing, bits, bool(masks)) != (3, 32, True):
        raise Refused(f"a BMP file of {bits} bits a pixel and compression {packing}")
    if packing == 3 and masks != _MASKS:
        raise Refused("a BMP file with masks of colours other than 8 bits each with alpha")
    if W < 1 or H < 1:
        raise ValueError(f"{W} x {H} pixels")
    row = -(-W * bits // 32) * 4
    if len(data) < start + H * row:
        raise ValueError("cut off")
    samples = 1 if bits <= 8 else 3 if packing == 0 else 4
    if bits == 32 and packing == 0 and np.frombuffer(data, np.uint8, H * row, start)[3::4].any():
        raise Refused("a BMP file of 32 bits a pixel that does not say whether the last 8 are alpha")
    losses = [lost("resolution")] * any(resolution)
    if length >= 108:
        (space,) = struct.unpack_from("<L", data, 70)
        losses += [lost("colour space or ICC profile", COLOURS_CHANGE)] * (space not in (_SRGB, _WINDOWS))
    palette, end = None, 14 + length
    if bits <= 8:
        n = min(colours or 1 << bits, 1 << bits)
        if 14 + length + 4 * n > len(data):
            raise ValueError("cut off")
        end += 4 * n
        palette = np.frombuffer(data, np.uint8, 4 * n, 14 + length).reshape(n, 4)[:, 2::-1]
    if start < end:
        raise ValueError("pixels inside the header")
    decode = partial(_decode, start=start, size=(H, W), bits=bits, samples=samples, down=down)
    depth = min(bits, 8)
    return Layout("BMP", (H, W), depth, samples, palette, lost=tuple(losses), decode=decode)


def _decode(data: bytes, start: int, size: tuple[int, int], bits: int, samples: int, down: bool) -> Array:
    H, W = size
    row = -(-W * bits // 32) * 4
    lines = np.frombuffer(data, np.uint8, H * row, start).reshape(H, row)
    lines = lines if down else lines[::-1]
    if bits <= 8:
        return unpack(lines, bits, W)[..., None]
    pixels = lines[:, : W * bits // 8].reshape(H, W, bits // 8)
    return pixels[..., [2, 1, 0, 3][:samples]]
