"""Flags of a verb: the fields of a dataclass, as arguments of the parser and back."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal, Union

from dflow.config import InputError, convert

#: Rows of the table of verbs: verb, flags, function, example.
Verbs = tuple[tuple[str, type[Any], Callable[[Any], int], str], ...]


def flag(
    help: str, default: Any = dataclasses.MISSING, short: str | None = None, long: str | None = None
) -> Any:
    """A field that is the flag ``--name``, required where it has no default.

    ``short`` is another name like ``-o``, ``long`` another one like ``--samples``, which is shown first.
    """
    return field(default=default, metadata={"help": help, "short": short, "long": long})


def options_of(f: dataclasses.Field[Any]) -> list[str]:
    """The flags by which a field is set, those that are shown first in front."""
    names = [f.metadata.get("short"), f.metadata.get("long"), "--" + f.name.replace("_", "-")]
    return [name for name in names if name]


def argument(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A field that is a positional argument, required where it has no default; a list takes one or more."""
    return field(default=default, metadata={"help": help, "positional": True})


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """An argument for each field of ``cls``; values stay text, `read_flags` converts them."""
    hints = typing.get_type_hints(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.default is not dataclasses.MISSING):
        kind = hints[f.name]
        options: dict[str, Any] = {"help": f.metadata["help"].replace("%", "%%")}
        if typing.get_origin(kind) in (Union, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if f.metadata.get("positional"):
            nargs: dict[str, Any] = {}
            if f.default_factory is not dataclasses.MISSING:
                nargs = {"nargs": "*", "default": argparse.SUPPRESS}
            elif f.default is not dataclasses.MISSING:
                nargs = {"nargs": "?", "default": argparse.SUPPRESS}
            elif typing.get_origin(kind) is list:
                nargs = {"nargs": "+"}
            parser.add_argument(f.name, metavar=f.name.upper(), **options, **nargs)
            continue
        name = options_of(f)
        if len(name) > 1:
            options["dest"] = f.name
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.default not in (None, dataclasses.MISSING) and kind is not bool:
            options["help"] += f" (default: {f.default})"
        if kind is bool:
            parser.add_argument(*name, action="store_const", const=True, default=argparse.SUPPRESS, **options)
        elif typing.get_origin(kind) is list:
            parser.add_argument(
                *name, nargs="+", action="extend", default=argparse.SUPPRESS, metavar="WORD", **options
            )
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(
                *name,
                metavar="|".join(typing.get_args(kind)),
                default=argparse.SUPPRESS,
                required=required,
                **options,
            )
        else:
            parser.add_argument(
                *name, metavar=f.name.upper(), default=argparse.SUPPRESS, required=required, **options
            )


#: Fields that name files.
_FILES = ("file", "files", "models", "output", "auxiliary")


def read_flags(cls: type[Any], values: dict[str, Any]) -> Any:
    """``cls`` from the texts given, each as the type of its field."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    converted = {}
    for name, value in values.items():
        options = [option for option in options_of(fields[name]) if option.startswith("--")]
        label = name if fields[name].metadata.get("positional") else " or ".join(options)
        converted[name] = convert(hints[name], value, label)
        if name in _FILES and "-" in (value if isinstance(value, list) else [value]):
            raise InputError(
                f"{label} -: neither standard input nor standard output can be named here; for a file that "
                "is called - write ./-"
            )
        if name == "seed" and converted[name] is not None and not 0 <= converted[name] < 1 << 63:
            raise InputError(f"seed {value} must be from 0 to {(1 << 63) - 1}")
    return cls(**converted)
