"""What settings are made of."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and a line of help."""
    return field(default=default, metadata={"help": help})
