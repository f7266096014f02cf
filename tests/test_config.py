"""Settings are read strictly: every mistake is an InputError that names the key and the way out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from dflow.config import InputError, convert, nearest, parse


@dataclass
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    name: str | None = None
    sizes: list[int] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.999)
    extra: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"steps={self.steps} must not be negative")


def test_a_full_mapping_is_read() -> None:
    values = {
        "steps": 3,
        "inner": {"rate": "1e-3", "kind": "b"},
        "name": "x",
        "sizes": [1, 2.0, "3"],
        "betas": [0, 0.5],
        "extra": {"k": 1},
    }
    expected = Outer(3, Inner(0.001, "b"), "x", [1, 2, 3], (0.0, 0.5), {"k": 1.0})
    assert parse(Outer, values, "recipe") == expected


def test_defaults_are_kept() -> None:
    assert parse(Outer, {"steps": 0}, "recipe") == Outer(0)


def test_no_without_quotation_marks_is_the_word() -> None:
    assert convert(Literal["no", "bf16"], False, "precision") == "no"
    with pytest.raises(InputError, match="precision: True is not allowed"):
        convert(Literal["no", "bf16"], True, "precision")
    with pytest.raises(InputError, match="kind: False is not allowed"):
        convert(Literal["a", "b"], False, "kind")


def test_a_dataclass_is_taken_as_it_is() -> None:
    inner = Inner(2.0)
    assert parse(Outer, {"steps": 1, "inner": inner}, "r").inner is inner


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "recipe: expected a mapping of settings, found []"),
        ({"step": 1}, "recipe: unknown key 'step'; did you mean 'steps'?"),
        ({3: 1}, "recipe: unknown key 3; known: betas, extra, inner, name, sizes, steps"),
        ({}, "recipe: key 'steps' is missing"),
        ({"steps": None}, "recipe.steps: expected int, found None"),
        ({"steps": True}, "recipe.steps: expected int, found True"),
        ({"steps": 1.5}, "recipe.steps: expected int, found 1.5"),
        ({"steps": "many"}, "recipe.steps: expected int, found 'many'"),
        ({"steps": "inf"}, "recipe.steps: expected int, found 'inf'"),
        ({"steps": -1}, "recipe: steps=-1 must not be negative"),
        ({"steps": 1, "inner": {"rat": 1}}, "recipe.inner: unknown key 'rat'; did you mean 'rate'?"),
        ({"steps": 1, "inner": {"kind": "c"}}, "recipe.inner.kind: 'c' is not allowed; known: a, b"),
        ({"steps": 1, "inner": {"rate": "fast"}}, "recipe.inner.rate: expected float, found 'fast'"),
        ({"steps": 1, "inner": {"rate": 10**400}}, "recipe.inner.rate: expected float"),
        ({"steps": 1, "inner": {"rate": float("nan")}}, "recipe.inner.rate: expected float, found nan"),
        ({"steps": 1, "inner": {"rate": "nan"}}, "recipe.inner.rate: expected float, found 'nan'"),
        ({"steps": 1, "inner": 3}, "recipe.inner: expected a mapping of settings, found 3"),
        ({"steps": 1, "name": 3}, "recipe.name: expected str, found 3"),
        ({"steps": 1, "sizes": 3}, "recipe.sizes: expected a list, found 3"),
        ({"steps": 1, "sizes": [1, "x"]}, "recipe.sizes[1]: expected int, found 'x'"),
        ({"steps": 1, "betas": [0.9]}, "recipe.betas: expected 2 values, found [0.9]"),
        ({"steps": 1, "extra": 3}, "recipe.extra: expected a mapping, found 3"),
        ({"steps": 1, "extra": {1: 1.0}}, "recipe.extra: expected str, found 1"),
        ({"steps": 1, "extra": {"k": "v"}}, "recipe.extra.k: expected float, found 'v'"),
    ],
)
def test_mistakes_are_named(values: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(Outer, values, "recipe")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "9007199254740993", 9007199254740993),
        (int, "1e3", 1000),
        (int, 4.0, 4),
        (float, 3, 3.0),
        (float, "inf", float("inf")),
        (bool, False, False),
        (str, "1", "1"),
        (int | None, None, None),
        (int | str, "a", "a"),
        (Any, {"x": 1}, {"x": 1}),
        (tuple[float, ...], [1, 2, 3], (1.0, 2.0, 3.0)),
        (tuple[int, ...], [], ()),
        (Literal[1, 2], 2, 2),
    ],
)
def test_values_become_the_type_of_the_field(kind: Any, value: Any, expected: Any) -> None:
    result = convert(kind, value, "here")
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(("kind", "value"), [(bool, 1), (bool, "true"), (Literal[1], True), (str, True)])
def test_flags_are_flags(kind: Any, value: Any) -> None:
    with pytest.raises(InputError, match="here"):
        convert(kind, value, "here")


def test_nearest_names_all_where_none_is_near() -> None:
    assert nearest("lst", ["lstm", "grouped"]) == "did you mean 'lstm'?"
    assert nearest("", ["b", "a"]) == "known: a, b"
