"""What is in a folder, and in which pieces it is coded: files of a kind, some hundred thousand values.

A piece is a group of the archive (`dflow.compress.archive`), coded by itself, so that one file is had back
without the others, and pieces can be coded side by side. What the model cannot code is left out by name, or
stored as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dflow.compress.archive import ArchivedFile, check_path
from dflow.compress.dfl import LIMIT
from dflow.config import InputError

#: Bytes of files that are stored together.
_STORED = 1 << 20
#: Pieces that are being filled, in whole ones, at most.
_OPEN = 8.0


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file below the folder.

    Attributes:
        name: relative to the folder, parts joined by ``/``.
        path: to open.
        size: bytes.
        mtime: when it was changed, nanoseconds since 1970.
    """

    name: str
    path: Path
    size: int
    mtime: int


@dataclass(frozen=True, slots=True)
class Item:
    """A file that was read.

    Attributes:
        kind: files of one kind are coded together; None for bytes that are stored.
        file: what the index says of it.
        source: where it is.
        content: a `Picture`, or bytes.
        share: of a whole piece that it fills.
        notes: what of the file is not kept.
    """

    kind: Hashable
    file: ArchivedFile
    source: FolderFile
    content: Any
    share: float
    notes: tuple[str, ...] = ()


class Opener(Protocol):
    """What reads files for a kind of model."""

    def open(self, file: FolderFile) -> Item:
        """The file, read; `InputError` or `OSError` where it cannot be, or the model cannot code it."""
        ...


@dataclass
class Omissions:
    """What was not coded, and why: names and reasons."""

    left_out: list[tuple[str, str]] = field(default_factory=list)
    stored: list[tuple[str, str]] = field(default_factory=list)


def walk(folder: Path) -> tuple[list[FolderFile], list[tuple[str, str]]]:
    """All files below a folder, sorted; and the names of entries that are left out, each with the reason."""
    files, left_out, folders = list[FolderFile](), list[tuple[str, str]](), [(folder, "")]
    while folders:
        place, prefix = folders.pop()
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if place == folder:
                raise
            left_out.append((prefix, f"a folder that cannot be read ({error.strerror})"))
            continue
        below = []
        for entry in entries:
            name = prefix + entry.name
            if wrong := check_path(name):
                left_out.append((name, f"its name {wrong}"))
            elif entry.is_symlink():
                left_out.append((name, "a symbolic link, which is not followed"))
            elif entry.is_dir():
                below.append((Path(entry.path), f"{name}/"))
            elif entry.is_file():
                try:
                    stat = entry.stat()
                except OSError as error:  # removed meanwhile
                    left_out.append((name, f"cannot be read ({error.strerror})"))
                    continue
                files.append(FolderFile(name, Path(entry.path), stat.st_size, stat.st_mtime_ns))
            else:
                left_out.append((name, "neither a file nor a folder"))
        folders += reversed(below)
    return files, left_out


def pieces(
    files: Sequence[FolderFile],
    opener: Opener,
    omissions: Omissions,
    store: bool,
    passed: Callable[[int], Any],
) -> Iterator[list[Item]]:
    """The files, read, in pieces of a kind.

    Args:
        files: in order.
        opener: what reads them.
        omissions: where those go that are not coded.
        store: keep these as they are, instead of leaving them out.
        passed: told the bytes of files that are left out.
    """
    filling = dict[Hashable, list[Item]]()
    shares = dict[Hashable, float]()
    for file in files:
        item = _opened(file, opener, omissions, store)
        if item is None:
            passed(file.size)
            continue
        filling.setdefault(item.kind, []).append(item)
        shares[item.kind] = shares.get(item.kind, 0.0) + item.share
        # The largest goes first where many kinds are open, which bounds the memory.
        if shares[item.kind] >= 1 or sum(shares.values()) > _OPEN:
            largest = max(shares, key=lambda kind: shares[kind])
            del shares[largest]
            yield filling.pop(largest)
    yield from filling.values()


def check_all(files: Sequence[FolderFile], opener: Opener, omissions: Omissions, store: bool) -> None:
    """`InputError` where any file is left out, before any is coded."""
    for file in files:
        _opened(file, opener, omissions, store)
    if omissions.left_out:
        name, reason = omissions.left_out[0]
        more = f" (and {len(omissions.left_out) - 1:,} more)" * (len(omissions.left_out) > 1)
        raise InputError(f"{name}{more}: {reason}; --strict leaves out nothing, so that nothing is written")


def _opened(file: FolderFile, opener: Opener, omissions: Omissions, store: bool) -> Item | None:
    try:
        if file.size > 2 * LIMIT:
            raise InputError(f"larger than {2 * LIMIT:,} bytes")
        return opener.open(file)
    except InputError as error:
        reason = str(error).removeprefix(f"{file.path}: ")
    except OSError as error:
        omissions.left_out.append((file.name, f"cannot be read ({error.strerror})"))
        return None
    if not store or file.size > LIMIT:
        omissions.left_out.append((file.name, reason))
        return None
    try:
        content = file.path.read_bytes()
    except OSError as error:
        omissions.left_out.append((file.name, f"cannot be read ({error.strerror})"))
        return None
    omissions.stored.append((file.name, reason))
    archived = ArchivedFile(file.name, len(content), "stored", file.mtime)
    return Item(None, archived, file, content, len(content) / _STORED)
