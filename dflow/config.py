"""Settings: dataclasses that are parsed strictly, with clear errors.

Every setting of dflow is a field of a dataclass. A mapping (a recipe, a checkpoint's settings) is read
strictly: an unknown key is an error that names the nearest known one, a value of the wrong type an error
that names the type expected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union

T = TypeVar("T")


class InputError(ValueError):
    """An input of the user cannot be used. The message names the value and a way out."""


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint that names the nearest of the known words, or all of them where none is near.

    >>> nearest("grouppd", ["grouped", "lstm"])
    "did you mean 'grouped'?"
    >>> nearest("zzz", ["b", "a"])
    'known: a, b'
    """
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))


def parse(cls: type[T], values: object, where: str) -> T:
    """Build dataclass ``cls`` from a mapping; ``where`` names the source in errors.

    >>> @dataclasses.dataclass
    ... class Train:
    ...     steps: int = 10
    >>> parse(Train, {"steps": 3}, "recipe")
    Train(steps=3)
    >>> parse(Train, {"step": 3}, "recipe")
    Traceback (most recent call last):
    dflow.config.InputError: recipe: unknown key 'step'; did you mean 'steps'?
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping of settings, found {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise InputError(f"{where}: unknown key {key!r}; {nearest(str(key), list(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{where}: key {name!r} is missing")
    converted = {k: convert(hints[k], v, f"{where}.{k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def convert(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``kind`` of a field, or an `InputError` that names ``where``.

    Strings that spell a number are taken as the number (YAML reads ``1e-3`` as a string).
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [k for k in arguments if k is not type(None)]
        for option in options[:-1]:
            try:
                return convert(option, value, where)
            except InputError:
                continue
        return convert(options[-1], value, where)
    if origin is typing.Literal:
        if value is False and "no" in arguments:
            # YAML reads the word no, without quotation marks, as false.
            return "no"
        if any(type(a) is type(value) and a == value for a in arguments):
            return value
        raise InputError(
            f"{where}: {value!r} is not allowed; {nearest(str(value), [str(a) for a in arguments])}"
        )
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected a list, found {value!r}")
        kinds = arguments
        if origin is list or arguments[-1] is Ellipsis:
            kinds = arguments[:1] * len(value)
        if len(kinds) != len(value):
            raise InputError(f"{where}: expected {len(kinds)} values, found {value!r}")
        items = [convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))]
        return items if origin is list else tuple(items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected a mapping, found {value!r}")
        key, item = arguments
        return {convert(key, k, where): convert(item, v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else parse(kind, value, where)
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    # True is an int to Python, but a flag given for a number is a mistake.
    if isinstance(value, bool) == (kind is bool):
        if kind in (int, float):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                number = _number(value)
                if kind is float and not math.isnan(number):
                    return float(number)
                if kind is int and number == int(number):
                    return int(number)
        elif isinstance(value, kind):
            return value
    raise InputError(f"{where}: expected {kind.__name__}, found {value!r}")


def _number(value: Any) -> int | float:
    """A number, or the number that a string spells; integers are not converted by way of floats."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, str):
        raise TypeError
    try:
        return int(value)
    except ValueError:
        return float(value)
