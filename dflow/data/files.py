"""Finding, reading and writing files: plain, ``.xz`` or ``.gz``, and never half of one."""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dflow.config import InputError

#: Endings of packed files, which the names of known files may have.
SUFFIXES = ("", ".xz", ".gz", ".zip")
#: What to do about a known file with another content.
REPLACE = "the file is damaged or another version: replace it, or name its path to use it as data of your own"
_DAMAGED = (lzma.LZMAError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, NotImplementedError)


def data_folder(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder given, else the one that the environment variable ``DFLOW_DATA`` names, else None.

    Raises:
        InputError: The folder does not exist.
    """
    named = os.fspath(folder) if folder is not None else os.environ.get("DFLOW_DATA")
    if not named:
        return None
    path = expanded(named)
    if not os.path.isdir(path):
        source = "the setting 'folder'" if folder is not None else "the environment variable DFLOW_DATA"
        raise InputError(f"{path}: no such folder ({source} names it); create it or correct the name")
    return path


def find(folder: Path | None, name: str, under: str) -> Path | None:
    """File ``name``, plain or packed (``name.xz``), in ``folder`` or ``folder/under``, or None."""
    if folder is None:
        return None
    candidates = (place / (name + suffix) for place in (folder, folder / under) for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def read(path: Path, member: str | None = None, limit: int | None = None) -> bytes:
    """The content of a file, unpacked by its suffix; ``member`` names the file inside a ``.zip``.

    Raises:
        InputError: The packed file is damaged or lacks ``member``, or there are more than ``limit`` bytes in
            it, of which no more are unpacked.
    """
    # One byte more than the limit shows that it is exceeded.
    size = -1 if limit is None else limit + 1
    try:
        suffix = path.suffix.lower()
        if suffix == ".zip" and member is not None:
            with zipfile.ZipFile(path) as archive:
                if member not in archive.namelist():
                    raise InputError(f"{path}: holds no file {member!r}; fetch the archive again")
                with archive.open(member) as inside:
                    data = inside.read(size)
        elif suffix in (".xz", ".gz"):
            with (lzma.open if suffix == ".xz" else gzip.open)(path) as packed:
                data = packed.read(size)
        else:
            with path.open("rb") as file:
                data = file.read(size)
    except _DAMAGED as error:
        raise InputError(f"{path}: damaged or truncated ({error}); fetch the file again") from error
    if limit is not None and len(data) > limit:
        raise InputError(f"{path}: expected {limit:,} bytes, found more; {REPLACE}")
    return data


def decode(data: bytes, source: str | os.PathLike[str]) -> str:
    r"""UTF-8 bytes as text: a byte-order mark is dropped and ``\r\n`` becomes ``\n``.

    Raises:
        InputError: Not UTF-8; the message names the source and the byte offset.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{os.fspath(source)}: not UTF-8 at byte offset {error.start} "
            f"(0x{data[error.start]:02x}: {error.reason}); convert the file to UTF-8, for example with iconv"
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def digest(data: bytes, algorithm: str = "sha256") -> str:
    """``algorithm:hexadecimal``: a fingerprint, not a signature."""
    return f"{algorithm}:{hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()}"


class Changed(InputError):
    """Data have another checksum than those that were expected."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` expanded, where there is such a user."""
    return Path(os.path.expanduser(path))


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file or folder; false for a name that no file can have."""
    return os.path.exists(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """A path from the root; ``~`` is expanded, links are not followed."""
    return os.path.abspath(expanded(path))


def check_same(name: str, checksum: str, expected: str | None) -> None:
    """Raise `Changed` unless the checksum of data is the expected one; None expects any."""
    if expected not in (None, checksum):
        raise Changed(
            f"{name}: the data have changed, their checksum is {checksum} and not {expected}, and rows that "
            "the model was trained on may be in another split now; restore the data, or score what they "
            "are now with --data"
        )


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with writing(path) as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is there under its name when all of it is on the disk, and else not at all.

    Where the system can (Linux, on most disks), it has no name before, so that nothing is left of it even if
    the process is killed.
    """
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")
    try:
        nameless = _nameless(path.parent)
        with temporary.open("wb") if nameless is None else nameless as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if nameless is not None:
                temporary.unlink(missing_ok=True)
                _give_name(file.fileno(), temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _nameless(folder: Path) -> BinaryIO | None:
    """A file in a folder that no name leads to; None where there cannot be one."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb")
    except OSError as error:
        # Disks that have no such files say so in one of these ways; all else is an error with a name, too.
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return None
        raise


def _give_name(number: int, path: Path) -> None:
    """The open file ``number`` under a name."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # With a folder of the target given, Python follows the link to the file that is open.
        os.link(f"/proc/self/fd/{number}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)
