"""Fields of settings dataclasses, with their help, defaults and choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

from dflow import plugins
from dflow.config import InputError, nearest


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and a line of help."""
    return field(default=default, metadata={"help": help})


def choice(default: str, known: Mapping[str, object], help: str) -> Any:
    """A field whose values are the names in the registry ``known``, to which modules of users may add."""
    names = ", ".join(known)
    return field(default=default, metadata={"help": f"{help}: {names}", "known": known})


def check_choices(settings: Any) -> None:
    """`InputError` for a field made by `choice` whose value is not in its registry."""
    for f in fields(settings):
        value, choices = getattr(settings, f.name), f.metadata.get("known")
        if choices is not None and value not in choices:
            hint = nearest(str(value), list(choices))
            raise InputError(f"unknown {f.name} {value!r}; {hint}; {plugins.WAY}")
