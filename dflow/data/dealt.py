"""Which data were for training, validation and test: as lines to print, and as a file beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflow.config import InputError
from dflow.data import files, splits

#: The file in the folder of a model that holds what `Corpus.about` and `ImageSet.about` give.
DEALT = "data.json"
#: The largest size of this file that is read, in bytes.
_LARGEST = 1 << 26


def lines(about: Mapping[str, Any]) -> list[str]:
    """A line for each split, and one for each note.

    >>> lines({"splits": {"valid": {"symbols": 800, "files": ["b.txt"]}}, "notes": ["So."]})
    ['  valid: 800 symbols, of b.txt', '  note: So.']
    """
    split_lines = []
    for split, counts in about["splits"].items():
        amounts = ", ".join(f"{n:,} {unit}" for unit, n in counts.items() if unit != "files")
        names = f", of {splits.first_few(counts['files'])}" if counts["files"] else ""
        split_lines.append(f"  {split}: {amounts}{names}")
    return split_lines + [f"  note: {note}" for note in about["notes"]]


def write(about: Mapping[str, Any], folder: Path) -> None:
    """Write it into the folder of a model."""
    files.write(folder / DEALT, (json.dumps(about, indent=1) + "\n").encode())


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` wrote; None where the folder has no such file, as one of version 0.1.0.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / DEALT
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        about = json.loads(path.read_bytes())
        lines(about)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); restore or remove the file") from None
    return dict(about)
