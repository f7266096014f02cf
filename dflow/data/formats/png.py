"""PNG files of any depth, exactly: Pillow reads 16-bit colours as 8-bit ones without a word.

Source: Portable Network Graphics specification, W3C Recommendation, third edition (2025).
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import partial

import numpy as np
from PIL import Image

from dflow.data.arrays import Array
from dflow.data.formats import tiff
from dflow.data.formats.layout import COLOURS_CHANGE, SAVE_EACH, Layout, Refused, lost, unpack

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Samples of a pixel by colour type; colour types by samples, without the palette.
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
#: First column and row, steps of both, of the seven passes of an interlaced picture.
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
#: Rows that are filtered together.
_ROWS = 256
#: Chunks that do not come back: their content, and whether viewers use it to show colours.
_ANCILLARY = {
    b"gAMA": ("gamma (gAMA)", True),
    b"cHRM": ("primary colours and white (cHRM)", True),
    b"iCCP": ("ICC profile (iCCP)", True),
    b"sRGB": ("mark of sRGB colours (sRGB)", True),
    b"cICP": ("colour space (cICP)", True),
    b"mDCV": ("mastering display (mDCV)", True),
    b"cLLI": ("light level (cLLI)", True),
    b"sBIT": ("number of significant bits (sBIT)", False),
    b"bKGD": ("background colour (bKGD)", True),
    b"hIST": ("histogram (hIST)", False),
    b"pHYs": ("size of a pixel (pHYs)", False),
    b"sPLT": ("suggested palette (sPLT)", False),
    b"eXIf": ("EXIF data (eXIf)", False),
    b"tIME": ("time of the last change (tIME)", False),
    b"tEXt": ("text (tEXt)", False),
    b"zTXt": ("text (zTXt)", False),
    b"iTXt": ("text (iTXt)", False),
}


def depth_of(data: bytes) -> int:
    """Bits a value of a PNG file; 0 for another file."""
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
    return _file(W, H, depth, _TYPES[C], zlib.compress(lines.tobytes(), 9))


def layout(data: bytes) -> Layout:
    """What the header and the chunks say.

    Raises:
        Refused: an animated picture.
        ValueError: damaged.
    """
    pieces = _chunks(data)
    W, H, depth, kind, _ = _header(pieces)
    names = dict(pieces)
    if b"acTL" in names or b"fdAT" in names:
        raise Refused("an animated PNG file (APNG), which holds several pictures", SAVE_EACH)
    palette, key = _palette(names) if kind == 3 else None, None
    if b"tRNS" in names and kind in (0, 2):
        # Of the two bytes of each sample only the bits of the depth count.
        stored = struct.unpack(f">{_SAMPLES[kind]}H", names[b"tRNS"])
        key = tuple(value & ((1 << depth) - 1) for value in stored)
    return Layout(
        "PNG",
        (H, W),
        depth,
        _SAMPLES[kind],
        palette,
        key,
        orientation=tiff.orientation(names.get(b"eXIf", b"")),
        lost=tuple(_lost(pieces, data, kind)),
        decode=read,
        # Pillow keeps the high bytes of all 16-bit samples but those of grey alone.
        exact=depth < 16 or kind == 0,
        data=partial(_samples_only, pieces),
    )


def read(data: bytes) -> Array:
    """The samples ``(H, W, S)`` as stored, uint8 or, of 16 bits, uint16; of a palette the places in it.

    Raises:
        ValueError: damaged.
    """
    pieces = _chunks(data)
    W, H, depth, kind, interlaced = _header(pieces)
    S = _SAMPLES[kind]
    passes = [p for p in (_PASSES if interlaced else ((0, 0, 1, 1),)) if p[0] < W and p[1] < H]
    sizes = [(-(-(H - y) // dy), -(-(W - x) // dx)) for x, y, dx, dy in passes]
    ends = np.cumsum([0, *(h * (1 + -(-w * S * depth // 8)) for h, w in sizes)]).tolist()
    unpacking = zlib.decompressobj()
    try:
        lines = unpacking.decompress(b"".join(body for name, body in pieces if name == b"IDAT"), ends[-1] + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(lines) != ends[-1]:
        raise ValueError(f"{len(lines)} bytes of pixels, expected {ends[-1]}")
    if not unpacking.eof and unpacking.decompress(unpacking.unconsumed_tail, 1):
        raise ValueError("more bytes of pixels than expected")
    values = np.empty((H, W, S), np.uint16 if depth == 16 else np.uint8)
    for (x, y, dx, dy), (h, w), start, stop in zip(passes, sizes, ends, ends[1:], strict=False):
        rows = _unfilter(np.frombuffer(lines[start:stop], np.uint8).reshape(h, -1), max(1, S * depth // 8))
        samples = rows.view(">u2") if depth == 16 else unpack(rows, depth, w * S)
        values[y::dy, x::dx] = samples.reshape(h, w, S)
    return values


def _samples_only(pieces: list[tuple[bytes, bytes]]) -> bytes:
    """A file of the same samples and nothing else, so that other chunks can do no harm."""
    wanted = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
    return SIGNATURE + b"".join(_chunk(name, body) for name, body in pieces if name in wanted)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents of all chunks up to the last, each checked against its checksum."""
    pieces, at = list[tuple[bytes, bytes]](), len(SIGNATURE)
    while not pieces or pieces[-1][0] != b"IEND":
        if at + 12 > len(data):
            raise ValueError("cut off")
        (length,), name = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        body, crc = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if int.from_bytes(crc, "big") != zlib.crc32(name + body) or len(crc) != 4:
            raise ValueError(f"chunk {name!r} is damaged")
        pieces.append((name, body))
        at += 12 + length
    return pieces


def _header(pieces: list[tuple[bytes, bytes]]) -> tuple[int, int, int, int, int]:
    """Width, height, depth, colour type, whether interlaced."""
    name, body = pieces[0]
    if name != b"IHDR" or len(body) != 13:
        raise ValueError("no header")
    W, H, depth, kind, packing, filters, interlaced = struct.unpack(">IIBBBBB", body)
    if depth not in _DEPTHS.get(kind, ()) or packing or filters or interlaced > 1 or not W or not H:
        raise ValueError(f"a header of depth {depth}, colour type {kind}, {W} x {H} pixels")
    return W, H, depth, kind, interlaced


def _palette(names: dict[bytes, bytes]) -> Array:
    colours, alpha = names.get(b"PLTE", b""), names.get(b"tRNS")
    if not colours or len(colours) % 3 or len(colours) > 768 or len(alpha or b"") > len(colours) // 3:
        raise ValueError("no palette, or one of a wrong size")
    palette = np.frombuffer(colours, np.uint8).reshape(-1, 3)
    if alpha is None:
        return palette
    column = np.frombuffer(alpha.ljust(len(palette), b"\xff"), np.uint8)
    return np.concatenate([palette, column[:, None]], 1)


def _lost(pieces: list[tuple[bytes, bytes]], data: bytes, kind: int) -> list[str]:
    """One sentence for each kind of chunk that does not come back."""
    sentences = []
    for name in dict.fromkeys(name for name, _ in pieces):
        if name == b"PLTE" and kind != 3:
            sentences.append(lost("suggested palette (PLTE)"))
        elif name in _ANCILLARY:
            content, visible = _ANCILLARY[name]
            sentences.append(lost(content, COLOURS_CHANGE if visible else ""))
        elif name not in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            if not name[0] & 32:
                raise Refused(f"a PNG file with a critical chunk {name!r} that no reader may leave out")
            sentences.append(lost(f"chunk {name.decode('latin-1')!r}"))
    if len(data) > (end := len(SIGNATURE) + sum(12 + len(body) for _, body in pieces)):
        sentences.append(lost(f"{len(data) - end:,} bytes behind its end"))
    return sentences


def _file(W: int, H: int, depth: int, kind: int, body: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", W, H, depth, kind, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


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
    filtered, before = [], np.zeros(rows.shape[1], np.uint8)
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        lines = np.stack([(block - p).astype(np.uint8) for p in _predictions(block, before, pixel)])
        best = abs(lines.view(np.int8).astype(np.int16)).sum(-1, dtype=np.int64).argmin(0)
        chosen = lines[best, np.arange(len(block))]
        filtered.append(np.concatenate([best[:, None].astype(np.uint8), chosen], 1))
        before = block[-1]
    return np.concatenate(filtered)


def _unfilter(lines: Array, pixel: int) -> Array:
    """Rows of bytes from filtered ones, each behind the number of its filter.

    A filter computes each byte from bytes of the same place in other pixels of ``pixel`` bytes: the bytes of
    one place are a grey picture of 8 bits with the same filters, which Pillow decodes.
    """
    if lines[:, 0].max(initial=0) > 4:
        raise ValueError(f"a row of filter {lines[:, 0].max()}")
    planes = []
    for place in range(pixel):
        plane = np.concatenate([lines[:, :1], lines[:, 1 + place :: pixel]], 1)
        file = _file(plane.shape[1] - 1, len(plane), 8, 0, zlib.compress(plane.tobytes(), 0))
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            planes.append(np.asarray(image))
    return np.stack(planes, -1).reshape(len(lines), -1)
