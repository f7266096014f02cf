"""The file format ``.dfl``: a header that is checked, then payloads, the coarsest level of everything first.

=========  ============================================================================================
3 bytes    ``dfl``
1 byte     version, 2
1 byte     what the file holds (high half) and the numeric mode of the nets (low half)
8 bytes    fingerprint of the model
varint     bytes of meta, and these: whatever the kind of file needs
varint     number of segments
a segment  CRC-32 of what it decodes to (4 bytes); a byte, the number of levels, plus 128 if it is raw; of
           each level its length (varint) and, unless that is 0, the CRC-16 of its bytes (2 bytes)
4 bytes    CRC-32 of all that is before
payloads   the first level of every segment, then the second of each that has one, ...
=========  ============================================================================================

Numbers are little-endian; a varint has 7 bits a byte, the lowest first, with 128 added to all but the last.
A file that is cut off still holds the levels that are whole. This module does not know what the bytes mean.
A number from the file is checked against the bytes that there are before memory is allocated by it.
"""

from __future__ import annotations

import binascii
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

MAGIC = b"dfl"
VERSION = 2

#: What files hold.
IMAGES, TEXT, BITS_BACK = 1, 2, 3
KINDS = {IMAGES: "images", TEXT: "text", BITS_BACK: "images, by bits back"}

#: Bytes of a model's fingerprint that are stored.
FINGERPRINT = 8

#: Levels of a segment, at most.
MAX_LEVELS = 127

_RAW = 128


class Damaged(ValueError):
    """A file that dflow did not write, or that has changed since."""


@dataclass(frozen=True)
class Segment:
    """What is coded by itself: damage to one leaves the others whole.

    Attributes:
        crc: CRC-32 of what it decodes to.
        raw: whether its bytes are stored, not coded.
        levels: the bytes of each level, the coarsest first; of a file that was cut off only those that are
            there.
        lengths: of all levels; given by `read`.
    """

    crc: int
    raw: bool
    levels: tuple[bytes, ...]
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Container:
    """A file.

    Attributes:
        kind: `IMAGES`, `TEXT`, `BITS_BACK`.
        mode: number of the numeric mode.
        fingerprint: 8 bytes, those that the model's begins with.
        meta: bytes that belong to the kind.
        segments: see `Segment`.
        present: levels that are whole in every segment that has them; given by `read`.
        header: bytes before the payloads; given by `read`.
    """

    kind: int
    mode: int
    fingerprint: bytes
    meta: bytes
    segments: tuple[Segment, ...]
    present: int = 0
    header: int = 0

    @property
    def num_levels(self) -> int:
        """The most that a segment has."""
        return max((len(s.lengths or s.levels) for s in self.segments), default=0)

    @property
    def level_bytes(self) -> list[int]:
        """Bytes of each level of all segments, whether they are there or not."""
        lengths = [s.lengths or tuple(map(len, s.levels)) for s in self.segments]
        return [sum(n[i] for n in lengths if i < len(n)) for i in range(self.num_levels)]


def write(container: Container) -> bytes:
    """The file; `read` gives back the same.

    Raises:
        ValueError: what does not fit into the format.

    >>> segment = Segment(crc32(b"data"), False, (b"co", b"arse"))
    >>> data = write(Container(IMAGES, 0, bytes(8), b"meta", (segment,)))
    >>> len(data), read(data).segments[0].levels, read(data[:-1], prefix=True).present
    (40, (b'co', b'arse'), 1)
    """
    c = container
    if not (0 <= c.kind < 16 and 0 <= c.mode < 16 and len(c.fingerprint) == FINGERPRINT):
        raise ValueError(f"kind {c.kind}, mode {c.mode} or fingerprint {c.fingerprint.hex()} does not fit")

    chunks = [MAGIC, bytes([VERSION, c.kind << 4 | c.mode]), c.fingerprint]
    chunks += [varint(len(c.meta)), c.meta, varint(len(c.segments))]
    for segment in c.segments:
        if not 1 <= len(segment.levels) <= MAX_LEVELS:
            raise ValueError(f"a segment has 1..{MAX_LEVELS} levels, found {len(segment.levels)}")
        chunks.append(struct.pack("<IB", segment.crc, len(segment.levels) | _RAW * segment.raw))
        for level in segment.levels:
            chunks.append(varint(len(level)) + (struct.pack("<H", _crc16(level)) if level else b""))
    header = b"".join(chunks)
    payloads = (s.levels[i] for i in range(c.num_levels) for s in c.segments if i < len(s.levels))
    return b"".join([header, struct.pack("<I", crc32(header)), *payloads])


def kind_of(data: bytes) -> int | None:
    """What a file says that it holds, unchecked; None if it is too short to say, or is not a ``.dfl``."""
    return data[4] >> 4 if data[:3] == MAGIC and len(data) > 4 else None


def read(data: bytes, prefix: bool = False) -> Container:
    """The file, every byte of it checked.

    Args:
        data: all of it.
        prefix: take a file that was cut off, too, for the levels of it that are whole, at least one.

    Raises:
        Damaged: not a file of this format or version, or not as it was written.
    """
    if data[:3] != MAGIC:
        raise Damaged("not a .dfl file: it does not begin with 'dfl'")
    reader = Reader(data, 3)
    version = reader.byte()
    if version != VERSION:
        raise Damaged(f"version {version} of the .dfl format (or damaged); this reads version {VERSION}")
    kinds, fingerprint = reader.byte(), reader.take(FINGERPRINT)
    meta = reader.take(reader.varint())
    # A segment has 6 bytes of header at least.
    declared = [_read_segment(reader) for _ in range(reader.varint(reader.left // 6))]
    end = reader.at
    if int.from_bytes(reader.take(4), "little") != crc32(data[:end]):
        raise Damaged("its header is damaged (checksum)")
    header, total = reader.at, sum(level.length for _, _, levels in declared for level in levels)
    if reader.left > total:
        raise Damaged(f"{reader.left - total:,} bytes too many")
    if reader.left < total and not prefix:
        raise Damaged(f"cut off: {total - reader.left:,} bytes of {header + total:,} are missing")
    payloads, present = _read_levels(reader, [levels for _, _, levels in declared])
    if declared and not present:
        raise Damaged("cut off before the end of its first level: there is nothing to show")
    segments = tuple(
        Segment(crc, raw, tuple(payload), tuple(level.length for level in levels))
        for (crc, raw, levels), payload in zip(declared, payloads, strict=True)
    )
    return Container(kinds >> 4, kinds & 15, fingerprint, meta, segments, present, header)


class _Level(NamedTuple):
    """What the header says of a level of a segment; ``crc`` is the CRC-16 of its bytes."""

    length: int
    crc: int


def _read_segment(reader: Reader) -> tuple[int, bool, list[_Level]]:
    """What the header says of a segment: CRC-32, whether it is raw, levels."""
    crc, flags = struct.unpack("<IB", reader.take(5))
    levels = []
    for _ in range(flags & ~_RAW):
        length = reader.varint()
        levels.append(_Level(length, int.from_bytes(reader.take(2), "little") if length else 0))
    if not levels:
        raise Damaged("a segment without levels")
    return crc, bool(flags & _RAW), levels


def _read_levels(reader: Reader, segments: list[list[_Level]]) -> tuple[list[list[bytes]], int]:
    """The levels of each segment that are whole in all of them, and how many levels are."""
    payloads: list[list[bytes]] = [[] for _ in segments]
    present = 0
    for i in range(max(map(len, segments), default=0)):
        level = [(n, levels[i]) for n, levels in enumerate(segments) if i < len(levels)]
        if sum(length for _, (length, _) in level) > reader.left:
            break
        for n, (length, crc) in level:
            payloads[n].append(reader.take(length))
            if length and _crc16(payloads[n][-1]) != crc:
                raise Damaged(f"level {i + 1} of segment {n + 1} is damaged (checksum)")
        present = i + 1
    return payloads, present


class Reader:
    """Walks through bytes that may be hostile; what is not there is `Damaged`."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        """Start at byte ``at``."""
        self.data, self.at = data, at

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return len(self.data) - self.at

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes."""
        if n > self.left:
            raise Damaged("cut off or damaged: it ends within its header")
        self.at += n
        return self.data[self.at - n : self.at]

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self, most: int = (1 << 62)) -> int:
        """The next number, at most ``most``."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
            if shift > 56:
                raise Damaged("a number in its header is too large")
        # One way only to write a number.
        if value > most or (shift and not byte):
            raise Damaged(f"a number in its header is too large: {value}")
        return value

    def finish(self) -> None:
        """All has to be read."""
        if self.left:
            raise Damaged(f"{self.left} bytes too many in its header")


def varint(value: int) -> bytes:
    """A number from 0 to 2^62 in 7 bits a byte.

    >>> varint(5).hex(), varint(300).hex(), Reader(varint(300)).varint()
    ('05', 'ac02', 300)
    """
    if not 0 <= value <= 1 << 62:
        raise ValueError(f"{value} is not in 0..2^62")
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def crc32(data: bytes) -> int:
    """The CRC-32 of zlib."""
    return zlib.crc32(data)


def _crc16(data: bytes) -> int:
    return binascii.crc_hqx(data, 0xFFFF)
