"""Flags of a verb: the fields of a dataclass, as arguments of the parser and back."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Literal, Union

from dflow.config import InputError, convert

#: Rows of the table of verbs: verb, flags, function, example.
Verbs = tuple[tuple[str, type[Any], Callable[[Any], int], str], ...]


def flag(
    help: str,
    default: Any = dataclasses.MISSING,
    short: str | None = None,
    long: str | None = None,
    *,
    many: bool = False,
    each: bool = False,
    stdout: bool = False,
) -> Any:
    """A field that is the flag ``--name``, required where it has no default.

    ``short`` is another name like ``-o``, ``long`` another one like ``--samples``, which is shown first;
    ``many`` is for a list, empty by default, and so is ``each``, where every word has the flag before it;
    with ``stdout`` a file may be standard output, -.
    """
    metadata = {"help": help, "short": short, "long": long, "each": each, "piped": stdout}
    if many or each:
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(f: dataclasses.Field[Any]) -> list[str]:
    """The flags by which a field is set, those that are shown first in front."""
    names = [f.metadata.get("short"), f.metadata.get("long"), label(f.name)]
    return [name for name in names if name]


def argument(
    help: str, default: Any = dataclasses.MISSING, *, many: bool = False, stdin: bool = False
) -> Any:
    """A field that is a positional argument, required where it has no default.

    A list takes one word or more, with ``many`` none as well; with ``stdin`` a file may be standard input, -.
    """
    metadata = {"help": help, "positional": True, "piped": stdin}
    return (
        field(default_factory=list, metadata=metadata) if many else field(default=default, metadata=metadata)
    )


def label(name: str) -> str:
    """The flag that sets a field.

    >>> label("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def provided(flags: Any, *names: str) -> dict[str, Any]:
    """The values of those of the flags that are given, whose default is None."""
    return {name: value for name in names if (value := getattr(flags, name)) is not None}


def refuse(flags: Any, names: Sequence[str], reason: str) -> None:
    """Raise `InputError` where one of the flags is given, for a ``reason``: "is for models of text"."""
    for name in names:
        if getattr(flags, name) not in (None, False):
            raise InputError(f"{label(name)} {reason}")


def takes_many(cls: type[Any], f: dataclasses.Field[Any]) -> bool:
    """Whether a field is a list of positional arguments."""
    return "positional" in f.metadata and typing.get_origin(typing.get_type_hints(cls)[f.name]) is list


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """An argument for each field of ``cls``; values stay text, `read_flags` converts them."""
    hints = typing.get_type_hints(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.default is not dataclasses.MISSING):
        kind = hints[f.name]
        options: dict[str, Any] = {"help": f.metadata["help"].replace("%", "%%")}
        if typing.get_origin(kind) in (Union, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        metavar = "|".join(choices) if choices else f.name.upper()
        if f.metadata.get("positional"):
            if f.default_factory is not dataclasses.MISSING:
                options |= {"nargs": "*", "default": argparse.SUPPRESS}
            elif f.default is not dataclasses.MISSING:
                options |= {"nargs": "?", "default": argparse.SUPPRESS}
            elif typing.get_origin(kind) is list:
                options["nargs"] = "+"
            parser.add_argument(f.name, metavar=metavar, **options)
            continue
        names = options_of(f)
        if len(names) > 1:
            options["dest"] = f.name
        if f.default not in (None, dataclasses.MISSING) and kind is not bool:
            options["help"] += f" (default: {f.default})"
        if kind is bool:
            options |= {"action": "store_const", "const": True}
        elif f.metadata.get("each"):
            options |= {"action": "append", "metavar": metavar}
        elif typing.get_origin(kind) is list:
            options |= {"nargs": "+", "action": "extend", "metavar": "WORD"}
        else:
            options |= {"metavar": metavar, "required": f.default is dataclasses.MISSING}
        parser.add_argument(*names, default=argparse.SUPPRESS, **options)


#: Fields that name files.
_FILES = ("file", "files", "models", "output", "auxiliary")


def read_flags(cls: type[Any], values: dict[str, Any]) -> Any:
    """``cls`` from the texts given, each as the type of its field."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    converted = {}
    for name, value in values.items():
        options = [option for option in options_of(fields[name]) if option.startswith("--")]
        spelled = name if fields[name].metadata.get("positional") else " or ".join(options)
        converted[name] = convert(hints[name], value, spelled)
        if (
            name in _FILES
            and not fields[name].metadata.get("piped")
            and "-" in (value if isinstance(value, list) else [value])
        ):
            raise InputError(
                f"{spelled} -: neither standard input nor standard output can be named here; for a file that "
                "is called - write ./-"
            )
        if name == "seed" and converted[name] is not None and not 0 <= converted[name] < 1 << 63:
            raise InputError(f"seed {value} must be from 0 to {(1 << 63) - 1}")
    return cls(**converted)
