"""The models that come with dflow, by name: ``tolstoy``."""

from __future__ import annotations

from pathlib import Path

#: Beside this file each has a folder with this file of its description in it.
CARD = "README.md"


def names() -> list[str]:
    """The names of the models."""
    return sorted(card.parent.name for card in _place().glob(f"*/{CARD}"))


def folder_of(name: str) -> Path:
    """The folder of the model of a name."""
    return _place() / name


def _place() -> Path:
    return Path(__file__).parent
