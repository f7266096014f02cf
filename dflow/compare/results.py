"""Comparisons as tables and as JSON, and where they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dflow.config import InputError
from dflow.generate import check_output, write_whole


def record(comparison: Any) -> str:
    """A dataclass as one line of JSON."""
    return json.dumps(asdict(comparison))


def document(head: list[str], words: int, rows: Sequence[list[str]], notes: Sequence[str]) -> str:
    """Markdown: a table, whose first columns hold words and the others figures, and paragraphs."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows)
    ]
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"


def environment_note(environment: Mapping[str, str | int]) -> str:
    """The paragraph on what speeds depend on."""
    return "Environment: " + ", ".join(f"{key} {value}" for key, value in environment.items()) + "."


def check(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder that holds results already; before the measuring, not after.

    Raises:
        InputError: one of the files exists, or ``folder`` is not a folder.
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
