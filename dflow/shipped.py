"""The models that come with dflow, by name: ``tolstoy``."""

from __future__ import annotations

from pathlib import Path

#: What a model is, what it was trained on, and under which licence it is; in the folder of each.
CARD = "README.md"


def names() -> list[str]:
    """The names of the models."""
    return sorted(config.parent.name for config in _place().glob("*/config.json"))


def folder_of(name: str) -> Path:
    """The folder of the model of a name."""
    return _place() / name


def _place() -> Path:
    return Path(__file__).parent / "models"
