"""Where comparisons are written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dflow.config import InputError
from dflow.generate import check_output, write_whole


def check(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder that holds results already; before the measuring, not after.

    Raises:
        InputError: one of the files exists, or ``folder`` is none.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; choose another --output")
    if folder.is_dir():
        for name in names:
            check_output(folder / name)


def write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write ``files`` into ``folder``; each whole or not at all.

    Raises:
        InputError: as of `check`.
    """
    check(folder, list(files))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(folder / name, data)
    return [folder / name for name in files]
