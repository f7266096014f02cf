"""What a model folder holds: its files by size and digest, so that one that was damaged is found out.

A file is replaced in three steps: the manifest admits the old one and the new one, the file is replaced, the
manifest admits the new one alone. So wherever a machine stops, each file is one that the manifest admits. It
is a fingerprint against accidents, no signature: who can change the files can change the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from dflow.config import InputError

MANIFEST = "manifest.json"

_PREFIX = ".saving-"

#: Bytes of a manifest. One of a model has a few hundred.
_LIMIT = 1 << 20

#: Files of a folder: what each may be, as ``SIZE:SHA256``.
Admitted = dict[str, list[str]]


@dataclass(frozen=True)
class Finding:
    """A file of a model folder, and how it stands."""

    name: str
    num_bytes: int
    status: Literal["whole", "damaged", "missing", "unlisted"]


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write files to, which are moved to ``folder`` at the end: each replaced whole, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    try:
        try:
            yield temporary
        except SafetensorError as error:
            # The library tells of a full disk in words.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None
        # The config last: a folder without one is no model yet, one with a config is complete. The rest by
        # name: of copies of a state the one from which a run goes on is the last.
        paths = sorted(temporary.iterdir(), key=lambda p: (p.name == "config.json", p.name))
        mode = _mode(temporary)
        for path in paths:
            # Whoever may read the config may read the weights: safetensors writes them for the owner alone.
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        before = read(folder)
        new = {path.name: _digest(path) for path in paths}
        both = {name: [*_admitted(folder, name, before), digest] for name, digest in new.items()}
        _write(folder, temporary, before | both)
        for path in paths:
            path.replace(folder / path.name)
        _sync(folder)
        _write(folder, temporary, before | {name: [digest] for name, digest in new.items()})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(folder: Path) -> Admitted:
    """What the manifest of ``folder`` admits; nothing where there is none.

    Raises:
        InputError: the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_LIMIT + 1)[:_LIMIT])
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); {_WAY}") from None
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not all(
        Path(name).name == name and isinstance(found, list) and all(isinstance(d, str) for d in found)
        for name, found in files.items()
    ):
        raise InputError(f"{path}: not a list of files and digests; {_WAY}")
    return files


_WAY = f"restore it, or remove {MANIFEST} to take the files of the folder as they are"


def verify(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that are not those that were saved; what the manifest does not list is let pass.

    Raises:
        InputError: names the file.
    """
    admitted = read(folder)
    for name in names:
        path = folder / name
        if name in admitted and path.is_file() and not _is(path, admitted[name]):
            raise InputError(
                f"{path}: damaged or changed since it was saved ({MANIFEST} has another digest); restore it, "
                f"or remove {MANIFEST} to take the files of the folder as they are"
            )


def check(folder: Path) -> list[Finding]:
    """Every file that the manifest lists or that lies in the folder, but for the manifest and folders.

    Raises:
        InputError: the manifest is damaged.
    """
    admitted, found = read(folder), []
    there = {p.name: p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST}
    for name in sorted(admitted | there):
        if name not in there:
            found.append(Finding(name, 0, "missing"))
            continue
        size = there[name].stat().st_size
        if name not in admitted:
            found.append(Finding(name, size, "unlisted"))
        else:
            found.append(Finding(name, size, "whole" if _is(there[name], admitted[name]) else "damaged"))
    return found


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and their lines of the manifest: these first."""
    gone = set(names)
    if gone:
        temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        try:
            _write(folder, temporary, {name: d for name, d in read(folder).items() if name not in gone})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for name in gone:
            (folder / name).unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove what a process that was killed while it saved has left; call it while nobody else saves."""
    for path in folder.glob(_PREFIX + "*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _mode(folder: Path) -> int:
    """That of the files that this process makes."""
    path = folder / ".mode"
    path.touch()
    found = path.stat().st_mode & 0o777
    path.unlink()
    return found


def _admitted(folder: Path, name: str, before: Mapping[str, list[str]]) -> list[str]:
    """What a file that is about to be replaced may be: as listed, else as it is."""
    if name in before:
        return before[name]
    return [_digest(folder / name)] if (folder / name).is_file() else []


def _is(path: Path, admitted: list[str]) -> bool:
    # A size that differs spares reading the file.
    sizes = [digest.partition(":")[0] for digest in admitted]
    return str(path.stat().st_size) in sizes and _digest(path) in admitted


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{file.tell()}:{found}"


def _write(folder: Path, temporary: Path, admitted: Admitted) -> None:
    path = temporary / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        json.dump(
            {"files": {name: list(dict.fromkeys(found)) for name, found in admitted.items()}}, file, indent=1
        )
        file.flush()
        os.fsync(file.fileno())
    path.replace(folder / MANIFEST)
    _sync(folder)


def _sync(folder: Path) -> None:
    """Make the names of a folder last, where the system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
