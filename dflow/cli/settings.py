"""``dflow settings``."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from dflow.cli.flags import Verbs, argument
from dflow.cli.shared import Results

#: Columns of the table; between two of them stand two spaces.
_HEAD = ("name", "type", "default", "meaning")

#: Sections of recipes whose settings do not depend on the family.
SECTIONS = ("data", "train")

#: Characters that a column of types or of defaults takes, and those that one of meanings takes at least.
_NARROW, _LEAST = (8, 16), 20


@dataclass(kw_only=True)
class Settings(Results):
    """List settings of recipes: names, types, defaults, meanings.

    They are those of one family of models, or of a section of recipes alone; without a family the names of
    all are listed.
    """

    family: str | None = argument(
        "family of models, or data or train, a section (default: none, and the names of all are shown)",
        None,
    )


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe."""

    section: str
    name: str
    type: str
    required: bool
    default: Any
    help: str


def settings(flags: Settings) -> int:
    """`dflow settings`."""
    from dflow import zoo
    from dflow.data import DataConfig, ImageConfig
    from dflow.train import TrainConfig

    families = {kind: [name for name in zoo.names() if zoo.find(name).kind == kind] for kind in zoo.KINDS}
    classes = {"text": DataConfig, "images": ImageConfig}
    data = {kind: (f"data of {zoo.KINDS[kind]}", settings_of(cls, "data")) for kind, cls in classes.items()}
    train = ("train", settings_of(TrainConfig, "train"))
    if flags.family == "data":
        sections = [*data.values()]
    elif flags.family == "train":
        sections = [train]
    elif flags.family is None:
        lines = [f"{zoo.KINDS[kind]}: {', '.join(names)}" for kind, names in families.items()]
        about = "; ".join(lines) + ". `dflow settings FAMILY` shows the settings of one"
        model = Setting("model", "family", "str", True, None, about)
        sections = [*data.values(), ("model", [model]), train]
    else:
        family = zoo.find(flags.family, where="dflow settings")
        name = Setting("model", "family", "str", True, None, f"{family.name}: the family, by its name")
        rows = [name, *settings_of(family.settings, "model")]
        sections = [data.get(family.kind, data["images"]), (f"model {family.name}", rows), train]
    flags.end(
        {
            "family": None if flags.family in SECTIONS else flags.family,
            "families": families,
            "settings": [{"part": title} | record(s) for title, rows in sections for s in rows],
        }
    )
    if not flags.json:
        print_sections(sections)
    return 0


def settings_of(cls: type[Any], section: str) -> list[Setting]:
    """Every field of a dataclass that a recipe sets, in the order in which they are declared."""
    hints = typing.get_type_hints(cls)
    rows = []
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        required = default is dataclasses.MISSING
        kind, meaning = spelled_type(hints[f.name]), f.metadata.get("help", "")
        rows.append(Setting(section, f.name, kind, required, None if required else default, meaning))
    return rows


def spelled_type(kind: Any) -> str:
    """A type as words of a recipe.

    >>> print(spelled_type(int | None), spelled_type(list[float]), spelled_type(Literal["a", "b"]), sep="; ")
    int or null; list of float; a | b
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "null"
    if kind is Any:
        return "any"
    if origin in (Union, types.UnionType):
        return " or ".join(spelled_type(k) for k in arguments)
    if origin is Literal:
        return " | ".join(word(str(value)) for value in arguments)
    if origin in (list, tuple):
        return "list of " + " or ".join(
            dict.fromkeys(spelled_type(k) for k in arguments if k is not Ellipsis)
        )
    if origin is dict:
        return f"mapping of {spelled_type(arguments[0])} to {spelled_type(arguments[1])}"
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return "mapping of " + ", ".join(
            f"{f.name}: {spelled_type(hints[f.name])}" for f in dataclasses.fields(kind)
        )
    return str(getattr(kind, "__name__", kind))


def plain(value: Any) -> Any:
    """A default as JSON has it, infinite numbers as the words that a recipe takes for them.

    >>> plain(-math.inf)
    '-inf'
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def record(setting: Setting) -> dict[str, Any]:
    """A setting as JSON has it."""
    return {f.name: plain(getattr(setting, f.name)) for f in dataclasses.fields(setting)}


def word(text: str) -> str:
    """A text as it is written in a recipe: in quotes where YAML takes it for something else.

    >>> print(word("bf16"), word("no"))
    bf16 "no"
    """
    import yaml

    return text if yaml.safe_load(text) == text else json.dumps(text)


def spelled(setting: Setting) -> str:
    """The default of a setting as it is written in a recipe."""
    if setting.required:
        return "required"
    value = plain(setting.default)
    if isinstance(setting.default, str):
        return word(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def print_sections(sections: Sequence[tuple[str, Sequence[Setting]]]) -> None:
    """The tables of all sections, with one width a column, wrapped to the width of the terminal."""
    cells = {title: [(s.name, s.type, spelled(s), s.help) for s in rows] for title, rows in sections}
    every = [_HEAD, *(row for rows in cells.values() for row in rows)]
    widths = [max(len(row[i]) for row in every) for i in range(3)]
    width = shutil.get_terminal_size().columns
    most = min(_NARROW[1], max(_NARROW[0], (width - widths[0] - _LEAST - 6) // 2))
    widths = [widths[0], *(min(longest, most) for longest in widths[1:])]
    widths.append(max(_LEAST, width - sum(widths) - 2 * len(widths)))
    for title, rows in cells.items():
        print(title)
        for row in (_HEAD, *rows):
            print_row(row, widths)
        print()
    print(textwrap.fill("Set by --set SECTION.NAME=VALUE or --SECTION.NAME VALUE of `dflow train`.", width))


def print_row(row: Sequence[str], widths: Sequence[int]) -> None:
    """One row of a table, each cell wrapped to the width of its column."""
    wrapped = [
        textwrap.wrap(cell, width, break_on_hyphens=False) or [""]
        for cell, width in zip(row, widths, strict=True)
    ]
    for i in range(max(map(len, wrapped))):
        words = [cell[i] if i < len(cell) else "" for cell in wrapped]
        line = "  ".join(word.ljust(width) for word, width in zip(words, widths, strict=True))
        print(line.rstrip())


VERBS: Verbs = (("settings", Settings, settings, "dflow settings grouped"),)
