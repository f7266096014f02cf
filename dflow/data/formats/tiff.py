"""TIFF files of plain grey, palette or RGB samples, by their tags; and EXIF data, which are a TIFF file.

Pillow's modes do not tell them: it drops bands, divides by alpha and takes signed samples for unsigned ones.

Source: TIFF, Revision 6.0 (Adobe, 1992), and the technical notes on ``ExtraSamples`` and BigTIFF.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from dflow.data.arrays import Array
from dflow.data.formats.layout import COLOURS_CHANGE, SAVE_EACH, Layout, Refused, lost, unpack

#: Types of integers by their numbers, and the bytes of the others.
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q", 17: "q", 18: "Q"}
_SIZES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), 1)) | dict.fromkeys((16, 17, 18), 8)

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_FILL_ORDER, _STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES = 266, 273, 274, 277, 278, 279
_PLANAR, _PREDICTOR, _COLOURS, _TILE_WIDTH, _TILE_LENGTH, _TILES = 284, 317, 320, 322, 323, 324
_TILE_BYTES, _SUB_FILES, _EXTRA, _FORMAT = 325, 330, 338, 339
#: Tags that say how samples lie and what they mean, and others (thresholding, runs of free bytes, how fax
#: lines are coded) whose loss changes nothing.
_STRUCTURE = {
    254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 280, 281, 284, 288, 289,
    292, 293, 317, 320, 322, 323, 324, 325, 338, 339, 340, 341,
}  # fmt: skip
#: Those without which no reader finds the samples.
_SAMPLES_ONLY = {
    _WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PREDICTOR,
    _COLOURS, _TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_BYTES, _EXTRA,
}  # fmt: skip
_NAMES = {
    269: "name (DocumentName)", 270: "description (ImageDescription)", 271: "maker (Make)",
    272: "camera (Model)", 282: "resolution", 283: "resolution", 290: "grey response curve",
    291: "grey response curve", 296: "resolution", 301: "transfer function", 305: "software (Software)",
    306: "date (DateTime)", 315: "author (Artist)", 318: "primary colours and white",
    319: "primary colours and white", 333: "names of inks", 532: "reference black and white", 700: "XMP data",
    33432: "copyright", 33723: "IPTC data", 34377: "Photoshop data", 34665: "EXIF data",
    34675: "ICC profile", 34853: "place (GPS data)",
}  # fmt: skip
_VISIBLE = {290, 291, 301, 318, 319, 532, 34675}
_KINDS = {
    4: "a transparency mask", 5: "inks (CMYK)", 6: "YCbCr colours", 8: "L*a*b* colours", 9: "L*a*b* colours",
    10: "L*a*b* colours", 32803: "a colour filter array", 32844: "LogL", 32845: "LogLuv", 34892: "raw data",
}  # fmt: skip
_CODES = {
    2: "fax codes", 3: "fax codes", 4: "fax codes", 6: "JPEG", 7: "JPEG", 34925: "LZMA", 50000: "Zstandard",
}  # fmt: skip


@dataclass(frozen=True)
class Directory:
    """Tags of a picture: type, number of values, their place in the file; and where the next one starts."""

    data: bytes
    order: str
    entries: dict[int, tuple[int, int, int]]
    following: int

    def numbers(self, tag: int, *default: int) -> tuple[int, ...]:
        """The integers of a tag; ``default`` where it is missing. ValueError: no integers, or no room."""
        if tag not in self.entries:
            return default
        kind, count, at = self.entries[tag]
        if kind not in _INTEGERS or not count or at + count * _SIZES[kind] > len(self.data):
            raise ValueError(f"tag {tag} holds no integers")
        return struct.unpack_from(f"{self.order}{count}{_INTEGERS[kind]}", self.data, at)

    def number(self, tag: int, default: int | None = None) -> int:
        """The first integer of a tag."""
        values = self.numbers(tag, *(() if default is None else (default,)))
        if not values:
            raise ValueError(f"tag {tag} is missing")
        return values[0]

    @property
    def orientation(self) -> int:
        """How viewers turn the picture: 1 to 8; 1 (not at all) where the tags do not say."""
        orientation = self.number(_ORIENTATION, 1)
        return orientation if 1 <= orientation <= 8 else 1


def is_tiff(data: bytes) -> bool:
    """Whether bytes begin as TIFF or BigTIFF does."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def directory(data: bytes) -> Directory:
    """The first directory of a file.

    Raises:
        ValueError: damaged; or struct.error.
    """
    if not is_tiff(data):
        raise ValueError("no TIFF data")
    order = "<" if data[:2] == b"II" else ">"
    big = b"+" in data[2:4]
    offset, width = (order + "Q", 8) if big else (order + "L", 4)
    if big and struct.unpack_from(order + "HH", data, 4) != (8, 0):
        raise ValueError("offsets of another size than 8 bytes")
    (at,) = struct.unpack_from(offset, data, width)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    at, size = at + (8 if big else 2), 4 + 2 * width
    if at + count * size > len(data):
        raise ValueError("a directory beyond the end")
    entries = {}
    for entry in range(at, at + count * size, size):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        (n,) = struct.unpack_from(offset, data, entry + 4)
        place = entry + 4 + width
        if n * _SIZES.get(kind, 1) > width:
            (place,) = struct.unpack_from(offset, data, place)
        entries[tag] = (kind, n, place)
    (following,) = struct.unpack_from(offset, data, at + count * size)
    if following >= len(data):
        raise ValueError("a second directory beyond the end")
    return Directory(data, order, entries, following)


def orientation(exif: bytes) -> int:
    """How viewers turn a picture with these EXIF data: 1 to 8; 1 (not at all) where they do not say.

    >>> orientation(b"")
    1
    """
    try:
        return directory(exif.removeprefix(b"Exif\0\0")).orientation
    except (ValueError, struct.error):
        return 1


def layout(data: bytes) -> Layout:
    """What the tags say.

    Raises:
        Refused: samples that are no plain grey, palette or RGB, or several pictures.
        ValueError: damaged.
    """
    tags = directory(data)
    if tags.following or _SUB_FILES in tags.entries:
        raise Refused("a TIFF file of several pictures", SAVE_EACH)
    size = tags.number(_LENGTH), tags.number(_WIDTH)
    depth, samples, photometric = _samples(tags)
    _check_coding(tags)
    return Layout(
        "TIFF",
        size,
        depth,
        samples,
        _palette(tags, depth) if photometric == 3 else None,
        white=photometric == 0,
        orientation=tags.orientation,
        lost=tuple(_lost(tags)),
        decode=partial(_decode, size=size, depth=depth, samples=samples),
        decode_first=True,
        data=partial(_samples_only, tags),
    )


def _samples(tags: Directory) -> tuple[int, int, int]:
    """Depth, samples a pixel and the photometric interpretation, if they are of the plain kinds."""
    photometric, samples = tags.number(_PHOTOMETRIC), tags.number(_SAMPLES, 1)
    if photometric not in (0, 1, 2, 3):
        raise Refused(f"a TIFF file of {_KINDS.get(photometric, f'colours of kind {photometric}')}")
    formats = set(tags.numbers(_FORMAT, 1))
    if formats != {1}:
        kinds = {2: "signed integers", 3: "floating-point numbers"}
        names = [kinds.get(number, f"samples of kind {number}") for number in sorted(formats)]
        raise Refused(f"a TIFF file of {' and '.join(names)}")
    depths = set(tags.numbers(_BITS, 1))
    depth = next(iter(depths))
    able = {0: (1, 8), 1: (1, 2, 4, 8, 16), 2: (8,), 3: (1, 2, 4, 8)}[photometric]
    if len(depths) > 1 or depth not in able:
        colours = ("grey that counts from white", "grey", "RGB", "a palette")[photometric]
        raise Refused(f"a TIFF file of {colours} with {' and '.join(map(str, sorted(depths)))} bits a sample")
    channels, extra = 3 if photometric == 2 else 1, tags.numbers(_EXTRA)
    if samples == channels and not extra:
        return depth, samples, photometric
    if samples == channels + 1 and extra == (1,):
        raise Refused("a TIFF file whose colours are multiplied by their alpha (premultiplied)")
    if samples != channels + 1 or extra != (2,) or photometric in (0, 3) or depth != 8:
        raise Refused(
            f"a TIFF file of {samples} samples a pixel, {samples - channels} of them neither grey, colours "
            "nor plain alpha"
        )
    return depth, samples, photometric


def _check_coding(tags: Directory) -> None:
    coding = tags.number(_COMPRESSION, 1)
    if coding not in _UNPACKERS:
        raise Refused(f"a TIFF file of compression {coding} ({_CODES.get(coding, 'unknown')})")
    if tags.number(_FILL_ORDER, 1) != 1:
        raise Refused("a TIFF file whose bits are stored in reversed order (FillOrder 2)")
    if tags.number(_PLANAR, 1) != 1 and tags.number(_SAMPLES, 1) > 1:
        raise Refused("a TIFF file whose channels are stored one after the other (planar)")
    predictor = tags.number(_PREDICTOR, 1)
    if predictor not in (1, 2) or (predictor == 2 and tags.number(_BITS, 1) < 8):
        raise Refused(f"a TIFF file of predictor {predictor}")


def _palette(tags: Directory, depth: int) -> Array:
    values = np.array(tags.numbers(_COLOURS))
    if len(values) != 3 << depth:
        raise ValueError(f"a palette of {len(values)} numbers")
    high = values >> 8
    if not ((values == high * 257) | (values == high << 8)).all():
        raise Refused("a TIFF file with a palette of more than 8 bits a colour")
    return high.reshape(3, -1).T.astype(np.uint8)


def _lost(tags: Directory) -> list[str]:
    """One sentence for each kind of tag that does not come back."""
    sentences: dict[str, str] = {}
    for tag in sorted(tags.entries.keys() - _STRUCTURE):
        name = _NAMES.get(tag, f"tag {tag}")
        sentences.setdefault(name, lost(name, COLOURS_CHANGE if tag in _VISIBLE else ""))
    return list(sentences.values())


# -- samples, read without Pillow ------------------------------------------------------------------------


def _samples_only(tags: Directory) -> bytes:
    """A file of the same samples and nothing else.

    Pillow turns what has an orientation, and the library that it takes writes about tags to standard error.
    """
    many = {_BITS, _STRIPS, _STRIP_BYTES, _COLOURS, _TILES, _TILE_BYTES, _EXTRA}
    entries = {
        tag: tags.numbers(tag)[: None if tag in many else 1]
        for tag in sorted(_SAMPLES_ONLY & tags.entries.keys())
    }
    places, sizes = (_TILES, _TILE_BYTES) if _TILE_WIDTH in tags.entries else (_STRIPS, _STRIP_BYTES)
    pieces = [tags.data[at : at + n] for at, n in zip(tags.numbers(places), tags.numbers(sizes), strict=True)]
    entries[sizes] = tuple(map(len, pieces))
    # A header, the pieces at even places, the directory, and behind it what has no room in it.
    pieces = [piece + b"\0" * (len(piece) % 2) for piece in pieces]
    starts = [8]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    entries[places], at = tuple(starts[:-1]), starts[-1] + 2 + 12 * len(entries) + 4
    listed, behind = b"", b""
    for tag, values in entries.items():
        long = tag in (_WIDTH, _LENGTH, _ROWS, _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES)
        body = struct.pack(f"{tags.order}{len(values)}{'L' if long else 'H'}", *values)
        if len(body) > 4:
            body, behind = struct.pack(tags.order + "L", at + len(behind)), behind + body
        kind = 4 if long else 3
        listed += struct.pack(tags.order + "HHL", tag, kind, len(values)) + body.ljust(4, b"\0")
    head = (b"II*\0" if tags.order == "<" else b"MM\0*") + struct.pack(tags.order + "L", starts[-1])
    count = struct.pack(tags.order + "H", len(entries))
    return head + b"".join(pieces) + count + listed + bytes(4) + behind


def _deflate(data: bytes, size: int) -> bytes:
    return zlib.decompressobj().decompress(data, size)


def _lzw(data: bytes, size: int) -> bytes:
    """LZW as TIFF has it: the highest bits first, codes longer by one bit one code early."""
    if not data.startswith(b"\x80"):
        raise ValueError("LZW data that do not begin with a clear table")
    clear = [bytes([i]) for i in range(256)] + [b"", b""]
    table, before, width, buffer, num_bits = clear.copy(), b"", 9, 0, 0
    out = bytearray()
    for byte in data:
        if len(out) >= size:
            break
        buffer, num_bits = (buffer << 8 | byte) & 0xFFFFFF, num_bits + 8
        if num_bits < width:
            continue
        num_bits -= width
        code = buffer >> num_bits & (1 << width) - 1
        if code == 257:
            break
        if code == 256:
            table, before, width = clear.copy(), b"", 9
            continue
        if code > len(table) or (code == len(table) and not before) or len(table) > 4096:
            raise ValueError("LZW data that are damaged")
        entry = table[code] if code < len(table) else before + before[:1]
        if before:
            table.append(before + entry[:1])
            width = min(12, (len(table) + 1).bit_length())
        out += entry
        before = entry
    return bytes(out[:size])


def _packbits(data: bytes, size: int) -> bytes:
    out, at = bytearray(), 0
    while len(out) < size and at < len(data):
        n, at = data[at], at + 1
        if n < 128:
            out += data[at : at + n + 1]
            at += n + 1
        elif n > 128:
            out += data[at : at + 1] * (257 - n)
            at += 1
    return bytes(out[:size])


#: By the number of a compression: unpacks up to ``size`` bytes.
_UNPACKERS: dict[int, Callable[[bytes, int], bytes]] = {
    1: lambda data, size: data[:size],
    5: _lzw,
    8: _deflate,
    32946: _deflate,
    32773: _packbits,
}


def _decode(data: bytes, size: tuple[int, int], depth: int, samples: int) -> Array:
    """The samples ``(H, W, S)`` of a file of strips or tiles; ValueError: damaged."""
    tags, (H, W) = directory(data), size
    unpacked = _UNPACKERS[tags.number(_COMPRESSION, 1)]
    tiled = _TILE_WIDTH in tags.entries
    if tiled:
        h, w = tags.number(_TILE_LENGTH), tags.number(_TILE_WIDTH)
        places, counts = tags.numbers(_TILES), tags.numbers(_TILE_BYTES)
    else:
        h, w = min(tags.number(_ROWS, H), H), W
        places, counts = tags.numbers(_STRIPS), tags.numbers(_STRIP_BYTES)
    if min(h, w) < 1 or h * w > 4 * prod(size) + (1 << 20):
        raise ValueError("tiles of another size than the picture's")
    across, row = -(-W // w), -(-w * samples * depth // 8)
    if len(places) != -(-H // h) * across or len(counts) != len(places):
        raise ValueError(f"{len(places)} pieces for {-(-H // h) * across}")
    values = np.empty((H, W, samples), np.uint16 if depth == 16 else np.uint8)
    for i, (at, count) in enumerate(zip(places, counts, strict=True)):
        y, x = i // across * h, i % across * w
        rows = h if tiled else min(h, H - y)
        piece = unpacked(data[at : at + count], rows * row)
        if len(piece) != rows * row:
            raise ValueError(f"{len(piece)} bytes in a piece of {rows * row}")
        lines = np.frombuffer(piece, np.uint8).reshape(rows, row)
        block = lines.view(tags.order + "u2") if depth == 16 else unpack(lines, depth, w * samples)
        block = block.reshape(rows, w, samples)
        if tags.number(_PREDICTOR, 1) == 2 and tags.number(_COMPRESSION, 1) not in (1, 32773):
            block = block.cumsum(1, dtype=values.dtype)
        room = values[y : y + h, x : x + w]
        room[:] = block[: room.shape[0], : room.shape[1]]
    return values
