"""Sets that are known by name: which files they have, how these are found, verified and fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dflow.config import InputError
from dflow.data import files

T = TypeVar("T")


@dataclass(frozen=True)
class KnownFile:
    """A file whose content is known: name, size in bytes unpacked, ``algorithm:digest``.

    ``content`` gives the bytes that size and digest are of, where they are not simply the file's, unpacked by
    its suffix. An empty digest is that of a file of which only the size is known.
    """

    name: str
    size: int
    digest: str
    content: Callable[[Path], bytes] | None = None

    def verify(self, data: bytes, source: str | os.PathLike[str]) -> bytes:
        """``data``, unchanged, or an `InputError` that names ``source``."""
        return files.verify(data, self.size, self.digest or files.digest(data), os.fspath(source))

    def read(self, path: Path) -> bytes:
        """The content of the file at ``path``, verified.

        Raises:
            InputError: Damaged, or another content.
        """
        return self.verify(
            self.content(path) if self.content else files.read(path, self.name, self.size), path
        )


@dataclass(frozen=True)
class KnownSet(Generic[T]):
    """A set that is known by name.

    ``read`` gives its three splits from local files or the hub: three texts, or `image_sets.Pixels`.
    ``local`` gives the files found in a folder (None: not complete; none at all: the set needs no files) and
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


def find_all(known: Iterable[KnownFile], folder: Path | None, *under: str) -> dict[Path, KnownFile] | None:
    """The path of each file in ``folder`` or one folder of ``under``; None where one is missing."""
    for place in under:
        found = {files.find(folder, file.name, place): file for file in known}
        if None not in found:
            return {path: file for path, file in found.items() if path}
    return None


def from_hub(name: str, wanted: str, repository: str, read: Callable[[Any], T], **options: Any) -> T:
    """What ``read`` makes of the splits of a data set on the Hugging Face hub.

    Raises:
        InputError: It is not to be had, and where to put the files ``wanted``.
    """
    try:
        from datasets import load_dataset

        return read(load_dataset(repository, **options))
    except InputError:
        raise
    except (
        Exception
    ) as error:  # the hub's clients raise errors of a dozen families; each means: not to be had
        raise InputError(
            f"{name}: not in a local folder, and the hub's {repository} cannot be had "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); put {wanted} into a "
            "folder and name it with the setting 'folder' or the environment variable DFLOW_DATA"
        ) from error
