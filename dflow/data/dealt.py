"""What was dealt to training, validation and test: told in lines, and kept beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflow.config import InputError
from dflow.data import files, splits

#: In the folder of a model. What `Corpus.about` and `ImageSet.about` give.
DEALT = "data.json"
#: Bytes that are read of it.
_LONGEST = 1 << 26


def lines(about: Mapping[str, Any]) -> list[str]:
    """A line for each split, and one for each note.

    >>> lines({"splits": {"valid": {"symbols": 800, "files": ["b.txt"]}}, "notes": ["So."]})
    ['  valid: 800 symbols, of b.txt', '  note: So.']
    """
    told = []
    for split, part in about["splits"].items():
        amounts = ", ".join(f"{n:,} {what}" for what, n in part.items() if what != "files")
        of = f", of {splits.shown(part['files'])}" if part["files"] else ""
        told.append(f"  {split}: {amounts}{of}")
    return told + [f"  note: {note}" for note in about["notes"]]


def write(about: Mapping[str, Any], folder: Path) -> None:
    """Keep it in the folder of a model."""
    files.write(folder / DEALT, (json.dumps(about, indent=1) + "\n").encode())


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` kept; None where there is none, as in a folder of version 0.1.0.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / DEALT
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LONGEST:
            raise ValueError(f"more than {_LONGEST:,} bytes")
        about = json.loads(path.read_bytes())
        lines(about)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); restore or remove the file") from None
    return dict(about)
