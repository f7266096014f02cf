"""Archives: a folder as one ``.dfl`` file, from which single files can be taken.

=========  ============================================================================================
3 bytes    ``dfl``
1 byte     version, 3: a dflow that knows no archives refuses it by this
1 byte     `ARCHIVE` (high half), 0 (low half)
groups     one after another: a whole ``.dfl`` of version 2 that holds some of the files, or the bytes of
           some of them, joined, as they are or deflated
index      deflated: fingerprint of the model (8 bytes, 0 where nothing is coded) and numeric mode (1 byte);
           varint number of groups; of each group its kind (1 byte), bytes (varint), CRC-32 of these (4
           bytes), values or bytes that it decodes to (varint) and number of files (varint); then of each
           file its name, its size in bytes and its time (varints), and what it is, in words
16 bytes   bytes of the index (8), CRC-32 of the index and of this number (4), a zero byte and ``dfl``
=========  ============================================================================================

The index stands at the end, so that an archive is written in one pass, and a group is read by itself. Every
byte belongs to a part that has a checksum. Within their groups files are called 0, 1, ...; their names are in
the index alone.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from dflow.coding.container import FINGERPRINT, MAGIC, Damaged, Reader, crc32, varint
from dflow.compress.dfl import inflate
from dflow.compress.pixels import DRIVE

VERSION = 3
#: What the fifth byte says, as those of other ``.dfl`` files do.
ARCHIVE = 4
_HEAD = MAGIC + bytes([VERSION, ARCHIVE << 4])
_END = struct.Struct("<QI4s")
_MARK = b"\0dfl"
_SECOND = 10**9
#: Seconds before and after 1970 that the time of a file may be: until the year 4147.
_LATEST = 1 << 36

#: Kinds of groups: a ``.dfl``, bytes as they are, deflated bytes.
CODED, STORED, DEFLATED = range(3)

#: Files of an archive, bytes of its index, and bytes of what the index says of a file in words, at most.
MOST_FILES, _MOST_INDEX, _MOST_WORDS = 1 << 20, 1 << 26, 200


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    """What the index says of a file.

    Attributes:
        name: that it comes back by, relative to the folder, parts joined by ``/``.
        size: bytes of the file that was compressed.
        words: what it is: size, kind and depth of a picture.
        mtime: when it was changed, in nanoseconds since 1970; None where that is not kept.
    """

    name: str
    size: int
    words: str
    mtime: int | None = None


@dataclass(frozen=True, slots=True)
class ArchivedGroup:
    """Files that are coded together.

    Attributes:
        kind: `CODED`, `STORED` or `DEFLATED`.
        bytes: that it takes.
        crc: CRC-32 of these.
        amount: values, or bytes, that it decodes to.
        files: in order.
        start: where it begins in the archive.
    """

    kind: int
    bytes: int
    crc: int
    amount: int
    files: tuple[ArchivedFile, ...]
    start: int = 0

    @property
    def bits(self) -> float:
        """Bits a value, or a byte; of empty files 0."""
        return 8 * self.bytes / self.amount if self.amount else 0.0

    @property
    def title(self) -> str:
        """What to call it in errors: its first file, and how many more."""
        more = len(self.files) - 1
        return self.files[0].name + (f" and {more:,} more" if more else "")


def is_archive(data: bytes) -> bool:
    """Whether a file that begins so is an archive."""
    return data[:3] == MAGIC and len(data) > 4 and data[4] >> 4 == ARCHIVE


def check_path(name: str) -> str | None:
    """What is wrong with a name that is to be written below a folder, or None."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or DRIVE.match(name):
        return "is absolute, or has a backslash or a drive in it"
    if any(part in ("", ".", "..") for part in parts):
        return "leaves the folder, or has an empty part"
    if any(character < " " or "\x7f" <= character < "\xa0" for character in name):
        return "has control characters"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "is not UTF-8"
    if any(len(part.encode()) > 255 for part in parts) or len(name.encode()) > 4096:
        return "is longer than 255 bytes, or 4096 with its folders"
    if os.name == "nt" and (":" in name or any(part.rstrip(" .") != part for part in parts)):
        return "has a colon, or a part that ends with a space or a dot, which Windows leaves out"
    return None


def check_paths(names: Sequence[str]) -> None:
    """`Damaged` where two names are the same, or one is a folder of another."""
    files = set(names)
    if len(files) < len(names):
        twice = next(name for name in files if names.count(name) > 1)
        raise Damaged(f"holds {twice!r} twice")
    for name in names:
        for at, character in enumerate(name):
            if character == "/" and name[:at] in files:
                raise Damaged(f"holds {name[:at]!r} as a file and as a folder")


class ArchiveWriter:
    """Writes an archive to a stream, group by group; it can be read once `finish` has written the index.

    Args:
        stream: what is written to, from where it stands.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.groups = list[ArchivedGroup]()
        self._stream.write(_HEAD)
        self.bytes = len(_HEAD)

    def add(self, kind: int, data: bytes, amount: int, files: Sequence[ArchivedFile]) -> ArchivedGroup:
        """Write a group."""
        group = ArchivedGroup(kind, len(data), crc32(data), amount, tuple(files), self.bytes)
        self.groups.append(group)
        self._stream.write(data)
        self.bytes += len(data)
        return group

    def finish(self, fingerprint: bytes, mode: int) -> None:
        """Write the index.

        Raises:
            ValueError: more files than an archive may have, or a longer index.
        """
        chunks = [fingerprint, bytes([mode]), varint(len(self.groups))]
        for group in self.groups:
            chunks += [bytes([group.kind]), varint(group.bytes), struct.pack("<I", group.crc)]
            chunks += [varint(group.amount), varint(len(group.files))]
            for file in group.files:
                chunks += [_text_bytes(file.name), varint(file.size), _time_bytes(file.mtime)]
                chunks.append(_text_bytes(file.words))
        plain = b"".join(chunks)
        if len(plain) > _MOST_INDEX or sum(len(group.files) for group in self.groups) > MOST_FILES:
            raise ValueError(f"more than {MOST_FILES:,} files, or longer names than an archive has room for")
        index = zlib.compress(plain, 9)
        length = struct.pack("<Q", len(index))
        end = index + _END.pack(len(index), crc32(index + length), _MARK)
        self._stream.write(end)
        self.bytes += len(end)


@dataclass(frozen=True)
class Archive:
    """An archive that can be read, group by group.

    Attributes:
        fingerprint: of the model, 8 bytes, 0 where nothing is coded.
        mode: number of the numeric mode.
        groups: see `ArchivedGroup`.
        size: bytes of the archive.
    """

    stream: BinaryIO
    fingerprint: bytes
    mode: int
    groups: tuple[ArchivedGroup, ...]
    size: int

    @property
    def files(self) -> Iterator[tuple[ArchivedGroup, ArchivedFile]]:
        """All files, each with its group."""
        return ((group, file) for group in self.groups for file in group.files)

    @property
    def is_coded(self) -> bool:
        """Whether a model made any of it."""
        return any(group.kind == CODED for group in self.groups)

    @staticmethod
    def read(stream: BinaryIO) -> Archive:
        """The index, checked, of an archive in a file that can be sought in.

        Raises:
            Damaged: no archive, one that is cut off, or has changed since it was written.
        """
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if stream.read(len(_HEAD)) != _HEAD:
            raise Damaged("not an archive of this version, or its beginning is damaged")
        stream.seek(max(0, size - _END.size))
        last = stream.read(_END.size)
        length, crc, mark = _END.unpack(last) if len(last) == _END.size else (0, 0, b"")
        if mark != _MARK:
            raise Damaged("cut off, or its end is damaged: an archive ends with its index")
        start = size - _END.size - length
        if start < len(_HEAD) or length > _MOST_INDEX:
            raise Damaged("its end is damaged")
        stream.seek(start)
        index = stream.read(length)
        if crc32(index + last[:8]) != crc:
            raise Damaged("its index is damaged (checksum)")
        fingerprint, mode, groups = _read_index(inflate(index, _MOST_INDEX, "its index is"))
        if len(_HEAD) + sum(group.bytes for group in groups) != start:
            raise Damaged("its groups are longer or shorter than its index says")
        return Archive(stream, fingerprint, mode, groups, size)

    def group(self, group: ArchivedGroup, limit: int) -> bytes:
        """The bytes of a group, of which a ``limit`` of values bounds the length.

        Raises:
            Damaged: it has changed since it was written, or is longer than what so many values take.
        """
        # Values have two bytes at most; names and checksums are few.
        if group.bytes > 4 * limit + (1 << 20):
            raise Damaged(
                f"has a group of {group.bytes:,} bytes, more than {limit:,} values take; if it is trusted, "
                "raise --limit"
            )
        self.stream.seek(group.start)
        data = self.stream.read(group.bytes)
        if crc32(data) != group.crc or len(data) != group.bytes:
            raise Damaged(f"{group.title}: damaged (checksum)")
        return data


def _read_index(data: bytes) -> tuple[bytes, int, tuple[ArchivedGroup, ...]]:
    """Fingerprint, mode and groups."""
    reader = Reader(data)
    fingerprint, mode = reader.take(FINGERPRINT), reader.byte()
    groups, start, room = list[ArchivedGroup](), len(_HEAD), MOST_FILES
    # A group has 8 bytes at least, a file 4.
    for _ in range(reader.varint(reader.left // 8)):
        kind, size = reader.byte(), reader.varint()
        crc = int.from_bytes(reader.take(4), "little")
        amount, n = reader.varint(), reader.varint(min(room, reader.left // 4))
        if kind > DEFLATED or not n:
            raise Damaged("has a group of a kind that this version does not know, or without files")
        files = tuple(_read_file(reader) for _ in range(n))
        if kind != CODED and amount != sum(file.size for file in files):
            raise Damaged("has files of other sizes than their group")
        groups.append(ArchivedGroup(kind, size, crc, amount, files, start))
        start, room = start + size, room - n
    reader.finish()
    check_paths([file.name for group in groups for file in group.files])
    return fingerprint, mode, tuple(groups)


def _read_file(reader: Reader) -> ArchivedFile:
    name, size = _read_text(reader), reader.varint()
    if wrong := check_path(name):
        raise Damaged(f"holds a file whose name {name!r} {wrong}; it is not written")
    seconds, mtime = reader.varint(), None
    if seconds:
        seconds = (seconds >> 1) - 1 if seconds & 1 else -(seconds >> 1)
        if abs(seconds) > _LATEST:
            raise Damaged(f"says that {name!r} was changed in a year that no disk keeps")
        mtime = seconds * _SECOND + reader.varint(_SECOND - 1)
    words = _read_text(reader)
    if len(words) > _MOST_WORDS or not words.isprintable():
        raise Damaged(f"says of {name!r} what cannot be shown")
    return ArchivedFile(name, size, words, mtime)


def _text_bytes(text: str) -> bytes:
    return varint(len(text.encode())) + text.encode()


def _read_text(reader: Reader) -> str:
    try:
        return reader.take(reader.varint(reader.left)).decode()
    except UnicodeDecodeError:
        raise Damaged("its index has names that are not UTF-8") from None


def _time_bytes(mtime: int | None) -> bytes:
    """0 for none, else seconds, those from 1970 on odd and others even, and nanoseconds."""
    if mtime is None:
        return varint(0)
    seconds, rest = divmod(mtime, _SECOND)
    seconds = max(-_LATEST, min(_LATEST, seconds))
    return varint((seconds + 1) << 1 | 1 if seconds >= 0 else -seconds << 1) + varint(rest)
