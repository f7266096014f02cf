"""What ``.dfl`` files of pictures and of text have in common: limits, checks, descriptions and reports."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dflow.coding import container
from dflow.coding.container import Container, Damaged, Reader, varint
from dflow.coding.numeric import MODES
from dflow.compress.clock import Clock
from dflow.compress.pixels import check_name
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.compress.coders import ImageCoder
    from dflow.compress.text_coder import TextCoder

#: Values, or bytes of text, that a file may declare, unless the caller allows more: 2^28 values of 16 bits
#: are half a gigabyte.
LIMIT = 1 << 28
#: Tiles, or chunks of a text, that the networks see at a time.
BATCH = 64
#: Files that a description lists.
_LISTED = 20

#: A description: names and values, in words.
Description = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class BaseReport:
    """What compressing gave.

    Attributes:
        files: how many.
        bytes: of the result.
        header: of these, before the coded data: names, sizes, checksums.
        analytic: bits of what the model coded by the likelihood, if asked for.
        encode: seconds; of the networks and of the coder.
        decode: the same, of verifying.
    """

    files: int
    bytes: int
    header: int
    analytic: float | None
    encode: Clock
    decode: Clock | None


def parse(
    data: bytes, what: str, kinds: Collection[int], modes: Collection[str] = MODES, prefix: bool = False
) -> Container:
    """The parts of a ``.dfl``: see `container.read`.

    Raises:
        Damaged: also for a file that holds no ``what``, or whose mode this version does not know.
    """
    parsed = container.read(data, prefix)
    if parsed.kind not in kinds:
        content = container.KINDS.get(parsed.kind, "what this version does not know")
        raise Damaged(f"holds {content}, no {what}")
    if parsed.mode >= len(MODES) or MODES[parsed.mode] not in modes:
        raise Damaged(f"numeric mode {parsed.mode} is not known to this version for {what}")
    return parsed


def inflate(data: bytes, most: int, what: str) -> bytes:
    """Deflated data, up to ``most`` bytes of them.

    Raises:
        Damaged: other data, or more of them; the error is ``what`` (such as "its list is") damaged.
    """
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, most + 1)
    except zlib.error:
        raise Damaged(f"{what} damaged") from None
    if len(plain) > most or not inflater.eof or inflater.unused_data:
        raise Damaged(f"{what} damaged, or too long")
    return plain


def name_bytes(name: str) -> bytes:
    """The name of a file, as `read_name` reads it."""
    return varint(len(name.encode())) + name.encode()


def read_name(reader: Reader) -> str:
    """The next bytes as the name of a file; `Damaged` where no file may be written by it."""
    name = reader.take(reader.varint(reader.left)).decode("utf-8", "replace")
    if wrong := check_name(name):
        raise Damaged(f"holds a file whose name {name!r} {wrong}; it is not written")
    return name


@contextmanager
def named(name: str, hint: Callable[[], str] = str) -> Iterator[None]:
    """`InputError` with the name of the file, and a hint, where something in it is `Damaged`."""
    try:
        yield
    except Damaged as error:
        raise InputError(f"{name}: {error}{hint()}") from None


def check_model(parsed: Container, coder: ImageCoder | TextCoder, same: bool = True) -> None:
    """`Damaged` where another model made the file; ``same`` is what else has to be so."""
    mode = MODES[parsed.mode]
    if not same or mode != coder.mode or parsed.fingerprint != coder.fingerprint:
        raise Damaged(
            f"was made by the model {parsed.fingerprint.hex()} in mode {mode}; {coder.where} is "
            f"{coder.fingerprint.hex()} in mode {coder.mode}: give the model that it was made by"
        )


def check_limit(declared: int, limit: int, unit: str) -> None:
    """`Damaged` for a file that declares more than it may."""
    if declared > limit:
        raise Damaged(f"declares {declared:,} {unit}, more than {limit:,}; if it is trusted, raise --limit")


def describe(parsed: Container, files: int, size: str) -> Description:
    """The first lines of a description."""
    return [
        ("kind", container.KINDS[parsed.kind]),
        ("model", parsed.fingerprint.hex()),
        ("mode", MODES[parsed.mode]),
        ("files", f"{files:,}"),
        ("bytes", size),
        ("header", f"{parsed.header:,} bytes"),
    ]


def listed(files: Sequence[tuple[str, str]], every: bool = False) -> Description:
    """The last lines of a description: the first files, or ``every`` one."""
    if every:
        return list(files)
    more = len(files) - _LISTED
    return [*files[:_LISTED], *[("...", f"and {more:,} more")] * (more > 0)]


def noted(notes: Sequence[tuple[str, str]]) -> list[str]:
    """Pairs of a file and a note, one line a note: the first three files that it is of, and how many more."""
    files: dict[str, list[str]] = {}
    for file, note in notes:
        files.setdefault(note, []).append(file)
    return [
        ", ".join(names[:3]) + f" and {len(names) - 3:,} more" * (len(names) > 3) + f": {note}"
        for note, names in files.items()
    ]
