"""PBM, PGM and PPM files, whose samples lie one after the other.

Source: the manual pages ``pbm``, ``pgm`` and ``ppm`` of Netpbm.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from dflow.data.arrays import Array
from dflow.data.formats.layout import SAVE_EACH, Layout, Refused, lost, unpack

_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
_HEADER = re.compile(rb"P([1-6])" + _SPACE + rb"(\d{1,9})" + _SPACE + rb"(\d{1,9})")
_TOP = re.compile(_SPACE + rb"(\d{1,9})")


def is_pnm(data: bytes) -> bool:
    """Whether bytes begin as one of the formats does."""
    return re.match(rb"P[1-6][\s#]", data[:3]) is not None


def layout(data: bytes) -> Layout:
    """What the header says.

    Raises:
        Refused: another largest value than 1, 255 or 65535, or several pictures.
        ValueError: damaged.
    """
    header = _HEADER.match(data)
    if not header:
        raise ValueError("no header of a PNM file")
    kind, W, H = map(int, header.groups())
    end, top, samples = header.end(), 1, 3 if kind in (3, 6) else 1
    if kind not in (1, 4):
        largest = _TOP.match(data, end)
        if not largest:
            raise ValueError("a header without the largest value")
        end, top = largest.end(), int(largest[1])
    if top not in (1, 255, 65535):
        raise Refused(f"a PNM file whose largest value is {top} and not 255 or 65535")
    if not W or not H:
        raise ValueError(f"{W} x {H} pixels")
    depth = top.bit_length()
    if kind < 4:
        comment = b"#" in data
    else:
        comment = b"#" in data[:end]
        size = H * (-(-W // 8) if kind == 4 else W * samples * (2 if top > 255 else 1))
        if len(data) - end - 1 < size:
            raise ValueError(f"{len(data) - end - 1} bytes of pixels, expected {size}")
        if data[end + 1 + size :].strip():
            raise Refused("a PNM file of several pictures, or with other bytes behind the first", SAVE_EACH)
    return Layout(
        "PPM",
        (H, W),
        depth,
        samples,
        white=kind in (1, 4),
        lost=(lost("comment"),) if comment else (),
        decode=partial(_decode, end=end, kind=kind, shape=(H, W, samples), top=top),
        exact=top == 255 or kind in (1, 4),
    )


def _decode(data: bytes, end: int, kind: int, shape: tuple[int, int, int], top: int) -> Array:
    H, W, samples = shape
    values: Array
    if kind < 4:
        text = re.sub(rb"#[^\r\n]*", b"", data[end:])
        # The digits of bits need no space between them.
        words = list(re.sub(rb"\s", b"", text)) if kind == 1 else text.split()
        if len(words) != H * W * samples:
            raise ValueError(f"{len(words)} numbers, expected {H * W * samples}")
        values = np.array(words, np.uint8) - 48 if kind == 1 else np.array(list(map(int, words)), np.int64)
        if values.max() > top or values.min() < 0:
            raise ValueError(f"values above {top}")
        values = values.astype(np.uint16 if top > 255 else np.uint8)
    elif kind == 4:
        row = -(-W // 8)
        lines = np.frombuffer(data, np.uint8, H * row, end + 1).reshape(H, row)
        values = unpack(lines, 1, W)
    else:
        values = np.frombuffer(data, ">u2" if top > 255 else np.uint8, H * W * samples, end + 1)
        if values.max() > top:
            raise ValueError(f"values above {top}")
        values = values.astype(np.uint16 if top > 255 else np.uint8)
    return values.reshape(shape)
