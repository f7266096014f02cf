"""Sets that are known by name: which files they have, how these are found, verified and fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dflow.config import InputError
from dflow.data import files

T = TypeVar("T")

#: Names that begin so are those of data sets on the Hugging Face hub.
HUB = "hub:"


@dataclass(frozen=True)
class KnownFile:
    """A file whose content is known: name, size in bytes unpacked, ``algorithm:digest``.

    ``content`` maps a path and the size to the bytes that size and digest are of, where they are not simply
    the file's, unpacked by its suffix. The digest is empty for a file of which only the size is known.
    """

    name: str
    size: int
    digest: str
    content: Callable[[Path, int], bytes] | None = None

    def verify(self, data: bytes, source: str | os.PathLike[str]) -> bytes:
        """``data``, unchanged, if it has the size and the digest of the file.

        Raises:
            InputError: it has not; the message names the ``source``, both sides and the way out.
        """
        expected = self.digest or files.digest(data)
        digest = files.digest(data, expected.partition(":")[0])
        if len(data) == self.size and digest == expected:
            return data
        raise InputError(
            f"{os.fspath(source)}: expected {self.size:,} bytes with {expected}, found {len(data):,} bytes "
            f"with {digest}; {files.REPLACE}"
        )

    def read(self, path: Path) -> bytes:
        """The content of the file at ``path``, verified.

        Raises:
            InputError: the file is damaged, or has another content.
        """
        content = self.content(path, self.size) if self.content else files.read(path, self.name, self.size)
        return self.verify(content, path)


def known_files(table: str, content: Callable[[Path, int], bytes] | None = None) -> tuple[KnownFile, ...]:
    """Files from a table with a line for each: name, size and, where it is known, the digest.

    >>> known_files("a.txt 1_200 md5:00")
    (KnownFile(name='a.txt', size=1200, digest='md5:00', content=None),)
    """
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(KnownFile(name, int(size), "".join(digest), content) for name, size, *digest in rows)


@dataclass(frozen=True)
class KnownSet(Generic[T]):
    """A set that is known by name.

    ``read`` gives its three splits from local files or the hub: three texts, or `image_sets.SplitPixels`.
    ``local`` gives the set's files in a folder (None: not complete; empty: the set needs no files) and
    ``fetch`` the files to write into a folder.
    """

    name: str
    read: Callable[[Path | None], T]
    local: Callable[[Path | None], dict[Path, KnownFile] | None] = lambda folder: {}
    fetch: Callable[[Path | None], dict[str, bytes]] = lambda folder: {}
    files: str = ""
    license: str = ""
    note: str = ""
    alphabet: str = ""
    published: bool = True


def set_of_files(
    name: str,
    packings: Sequence[Sequence[KnownFile]],
    decode: Callable[[Mapping[KnownFile, bytes]], T],
    source: Callable[[Path | None], Iterable[tuple[KnownFile, bytes]]] | None = None,
    folders: Sequence[str] = (),
    **description: str,
) -> KnownSet[T]:
    """A set whose files are known.

    Args:
        name: of the set, and of the folder inside the folder of the data that may hold its files.
        packings: lists of files, each of which is the whole set; the first that is complete is read.
        decode: the splits from the content of one packing.
        source: fetches the files of one packing where the folder has none; None: the set is on no hub.
        folders: other folders inside the folder of the data that may hold the files.
        description: the texts of `KnownSet`: ``files``, ``license``, ``note``, ``alphabet``.
    """

    def local(folder: Path | None) -> dict[Path, KnownFile] | None:
        candidates = (
            {files.find(folder, file.name, inside): file for file in packing}
            for packing in packings
            for inside in (name, *folders)
        )
        complete = (paths for paths in candidates if None not in paths)
        return next(({path: file for path, file in paths.items() if path} for paths in complete), None)

    def contents(folder: Path | None) -> dict[KnownFile, bytes]:
        if paths := local(folder):
            return {file: file.read(path) for path, file in paths.items()}
        if source is None:
            raise not_local(name, "it is on no hub", description["files"])
        return {file: file.verify(data, f"the hub's {file.name}") for file, data in source(folder)}

    def read(folder: Path | None) -> T:
        data = contents(folder)
        try:
            return decode(data)
        except InputError as error:
            paths = list(local(folder) or ())
            raise InputError(f"{paths[0].parent if paths else 'the hub'}: {error}") from None

    return KnownSet(
        name=name,
        read=read,
        local=local,
        fetch=lambda folder: {f"{name}/{file.name}": data for file, data in contents(folder).items()},
        published=source is not None,
        **description,
    )


def not_local(name: str, reason: str, wanted: str) -> InputError:
    """What to say of a set that is neither in a folder nor, for a ``reason``, to be fetched."""
    return InputError(
        f"{name}: not in a local folder, and {reason}; put {wanted} into a folder and name it with the "
        "setting 'folder' or the environment variable DFLOW_DATA"
    )


def repository_of(name: str) -> str:
    """The repository ``OWNER/NAME`` of a data set ``hub:OWNER/NAME``."""
    repository = name.removeprefix(HUB)
    if repository.count("/") != 1:
        raise InputError(f"{name}: name a data set of the hub as {HUB}OWNER/NAME")
    return repository


def from_hub(name: str, wanted: str, repository: str, read: Callable[[Any], T], **options: Any) -> T:
    """What ``read`` makes of the splits of a data set on the Hugging Face hub.

    Raises:
        InputError: the set cannot be fetched; the message says where to put the files ``wanted``.
    """
    try:
        from datasets import load_dataset

        return read(load_dataset(repository, **options))
    except InputError:
        raise
    # The hub's clients raise errors of a dozen families; each means that the set cannot be fetched.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise not_local(name, f"the hub's {repository} cannot be had ({reason})", wanted) from error
