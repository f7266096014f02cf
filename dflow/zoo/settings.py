"""Fields of settings dataclasses, with their help, defaults and choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

from dflow import plugins
from dflow.config import InputError, nearest


def setting(default: Any, help: str, least: int | None = None) -> Any:
    """A dataclass field with a default, a line of help, and the least value of its number or numbers."""
    metadata = {"help": help, "least": least}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(default: str, known: Mapping[str, object], help: str) -> Any:
    """A field whose values are the names in the registry ``known``, to which modules of users may add."""
    names = ", ".join(known)
    return field(default=default, metadata={"help": f"{help}: {names}", "known": known})


def check_settings(settings: Any, where: str = "") -> None:
    """`InputError` for a value below the least one of its field, or not in the registry of its field.

    ``where`` stands before the message.
    """
    for f in fields(settings):
        value, choices = getattr(settings, f.name), f.metadata.get("known")
        numbers = value if isinstance(value, list) else [value]
        least = f.metadata.get("least")
        if least is not None and any(number is not None and number < least for number in numbers):
            raise InputError(f"{where}{f.name} must be at least {least}, found {value}")
        if choices is not None and value not in choices:
            hint = nearest(str(value), list(choices))
            raise InputError(f"{where}unknown {f.name} {value!r}; {hint}; {plugins.WAY}")
