"""The manifest of a model folder: sizes and digests of its files, by which damaged files are detected.

A file is replaced in three steps: the manifest admits the old and the new file, the file is replaced, the
manifest admits the new file only. So at whatever point the machine stops, the manifest admits each file. It
protects against accidents, not against attacks: whoever can change the files can change the manifest.
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

#: Largest size of a manifest in bytes. That of a model has a few hundred.
_LIMIT = 1 << 20

#: For each file name the admitted contents, as ``SIZE:SHA256``.
Admitted = dict[str, list[str]]


@dataclass(frozen=True)
class Finding:
    """A file of a model folder, and its status."""

    name: str
    num_bytes: int
    status: Literal["whole", "damaged", "missing", "unlisted"]


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved to ``folder`` at the end; none is after an error."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    try:
        try:
            yield temporary
        except SafetensorError as error:
            # The library reports a full disk as text only.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None
        # The config comes last: a folder with a config is a complete model. Other files are sorted by name:
        # of the copies of a training state, the one that a resumed run reads comes last.
        paths = sorted(temporary.iterdir(), key=lambda p: (p.name == "config.json", p.name))
        mode = _mode(temporary)
        for path in paths:
            # Usual permissions: safetensors makes its files readable for the owner only.
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        before = read(folder)
        new = {path.name: digest_of(path) for path in paths}
        old_and_new = {name: [*_admitted(folder, name, before), digest] for name, digest in new.items()}
        _write(folder, temporary, before | old_and_new)
        for path in paths:
            path.replace(folder / path.name)
        _sync(folder)
        _write(folder, temporary, before | {name: [digest] for name, digest in new.items()})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(folder: Path) -> Admitted:
    """The contents that the manifest of ``folder`` admits; empty where there is no manifest.

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
        Path(name).name == name and isinstance(digests, list) and all(isinstance(d, str) for d in digests)
        for name, digests in files.items()
    ):
        raise InputError(f"{path}: not a list of files and digests; {_WAY}")
    return files


_WAY = f"restore it, or remove {MANIFEST} to take the files of the folder as they are"


def verify(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that differ from those that were saved; files that the manifest does not list may pass.

    Raises:
        InputError: a file is damaged or changed; the message names it.
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
    """Every file that the manifest lists or that is in the folder, except the manifest itself.

    Raises:
        InputError: the manifest is damaged.
    """
    admitted, findings = read(folder), []
    present = {p.name: p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST}
    for name in sorted(admitted | present):
        if name not in present:
            findings.append(Finding(name, 0, "missing"))
            continue
        size = present[name].stat().st_size
        if name not in admitted:
            findings.append(Finding(name, size, "unlisted"))
        else:
            findings.append(Finding(name, size, "whole" if _is(present[name], admitted[name]) else "damaged"))
    return findings


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, after their lines in the manifest."""
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
    """Remove the temporary files of a process that was killed while it saved; nobody else may be saving."""
    for path in folder.glob(_PREFIX + "*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _mode(folder: Path) -> int:
    """The permissions of files that this process makes in ``folder``."""
    path = folder / ".mode"
    path.touch()
    mode = path.stat().st_mode & 0o777
    path.unlink()
    return mode


def _admitted(folder: Path, name: str, before: Mapping[str, list[str]]) -> list[str]:
    """Admitted contents of a file to be replaced: those of the manifest, else the present one."""
    if name in before:
        return before[name]
    return [digest_of(folder / name)] if (folder / name).is_file() else []


def _is(path: Path, admitted: list[str]) -> bool:
    # Where the size differs, the file need not be read.
    sizes = [digest.partition(":")[0] for digest in admitted]
    return str(path.stat().st_size) in sizes and digest_of(path) in admitted


def digest_of(path: Path) -> str:
    """Size and SHA-256 of a file, as the manifest has them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{file.tell()}:{digest}"


def _write(folder: Path, temporary: Path, admitted: Admitted) -> None:
    path = temporary / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        json.dump(
            {"files": {name: list(dict.fromkeys(digests)) for name, digests in admitted.items()}},
            file,
            indent=1,
        )
        file.flush()
        os.fsync(file.fileno())
    path.replace(folder / MANIFEST)
    _sync(folder)


def _sync(folder: Path) -> None:
    """Write the directory to disk, where the system supports that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
