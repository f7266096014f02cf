"""What a sweep trains: the combinations of the values of its settings, checked before the first training."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dflow.config import InputError
from dflow.train import RECIPE, Recipe, load_recipe
from dflow.train.identity import begun, check_begun_by

#: Sections of a recipe whose settings can be swept.
SECTIONS = ("data", "model", "train")
#: The setting over which figures are averaged.
SEED = "train.seed"
#: The record of a sweep, in its folder.
SWEEP = "sweep.json"
#: Most characters of a value in the name of a folder.
_LONGEST = 40


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        values: its value of each swept setting, as the user wrote it, by the setting's full name.
        recipe: its recipe, whose output is its folder.
    """

    values: dict[str, str]
    recipe: Recipe


def grid_of(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of each setting, of words as ``train.learning_rate=1e-3,2e-3``.

    Values are separated as in a list of YAML: a value in brackets or quotes is one, with its commas.

    >>> grid_of(["train.seed=0,1", "model.calls=[1,2],[4, 8]"])
    {'train.seed': ['0', '1'], 'model.calls': ['[1,2]', '[4, 8]']}

    Raises:
        InputError: a word without values, or of a setting that another one has.
    """
    grid: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise InputError(
                f"--sweep {word}: write SECTION.NAME=VALUE,VALUE without spaces, as "
                "train.learning_rate=1e-3,2e-3; all words after --sweep belong to it"
            )
        if key in grid:
            raise InputError(f"--sweep {key}: given twice; write all of its values behind one {key}=")
        grid[key] = _split(key, text)
    return grid


def _split(key: str, text: str) -> list[str]:
    """The values of a text, as they are written."""
    listed = f"[{text}]"
    try:
        node = yaml.compose(listed, yaml.SafeLoader)
        if not isinstance(node, yaml.SequenceNode) or not node.value or text.rstrip().endswith(","):
            raise ValueError
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(
            f"--sweep {key}={text}: write values with commas between them, and one that has commas itself in "
            f"brackets (a list) or in quotes: {key}=1,2 or 'model.calls=[1,2],[4,8]'"
        ) from None
    return [listed[item.start_mark.index : item.end_mark.index].strip() for item in node.value]


def plan(
    load: Callable[[list[str]], Recipe], grid: Mapping[str, Sequence[str]], output: Path | None = None
) -> list[Planned]:
    """The runs of a sweep in the order of its grid, the last setting changing first.

    A run that is in the output already, perhaps in a folder of another name since the grid had other
    settings, keeps its folder.

    Args:
        load: the recipe with some settings replaced, given as ``SECTION.NAME=VALUE``.
        grid: the values of each setting.
        output: folder of the sweep; None for the output of the recipe.

    Raises:
        InputError: a setting or value that the recipe refuses, a value that is there twice, data that are
            missing, or a folder that holds another training.
    """
    if not grid:
        raise InputError("a sweep needs a setting with its values: train.learning_rate=1e-3,2e-3")
    for key in grid:
        _check_key(key)
    runs: list[Planned] = []
    for texts in itertools.product(*grid.values()):
        values = dict(zip(grid, texts, strict=True))
        words = [f"{key}={text}" for key, text in values.items()]
        try:
            recipe = load(words)
            recipe.data.located()
        except InputError as error:
            raise InputError(f"--sweep {' '.join(words)}: {error}{_listed(grid)}") from None
        runs.append(Planned(values, recipe))
    _check_distinct(grid, runs)
    folder = runs[0].recipe.output if output is None else output
    names = _names([run.values for run in runs])
    if folder.exists() and not (folder / SWEEP).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already, and is no sweep; name another folder: --output FOLDER")
    before = _recipes_in(folder)
    return [_placed(run, folder / name, before) for run, name in zip(runs, names, strict=True)]


def _check_key(key: str) -> None:
    section, _, name = key.partition(".")
    if section in SECTIONS and name:
        return
    if key == "output":
        raise InputError(
            "--sweep output: each run has a folder of its own in the output, named by its values"
        )
    raise InputError(
        f"--sweep {key}: no setting of the sections {', '.join(SECTIONS)}; write SECTION.NAME, as "
        f"train.{key if key.isidentifier() else 'learning_rate'} (`dflow settings` lists them)"
    )


def _listed(grid: Mapping[str, Sequence[str]]) -> str:
    """What to say of a value in brackets, which may have been meant as several values."""
    for key, texts in grid.items():
        if len(texts) == 1 and texts[0].startswith("["):
            inner = texts[0][1:-1].replace(" ", "")
            return f"; brackets make one value of a list: for a run with each of these write {key}={inner}"
    return ""


def _check_distinct(grid: Mapping[str, Sequence[str]], runs: Sequence[Planned]) -> None:
    """Refuse two spellings of one value."""
    for key in grid:
        spelled: dict[str, str] = {}
        for run in runs:
            text, value = run.values[key], json.dumps(value_of(run.recipe, key), default=str)
            if (other := spelled.setdefault(value, text)) != text:
                raise InputError(f"--sweep {key}: {other} and {text} are one value; leave one out")
        if len(set(grid[key])) < len(grid[key]):
            twice = next(text for text, count in Counter(grid[key]).items() if count > 1)
            raise InputError(f"--sweep {key}: {twice} is there twice; leave one out")


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a setting, by its full name."""
    value: Any = recipe.as_dict()
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Settings by their last names, where these differ.

    >>> short_keys(["train.learning_rate", "train.seed"])
    {'train.learning_rate': 'learning_rate', 'train.seed': 'seed'}
    """
    last = {key: key.rpartition(".")[2] for key in keys}
    counts = Counter(last.values())
    return {key: name if counts[name] == 1 else key for key, name in last.items()}


def _names(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of folders that are made of the values, and good for any file system; no two are alike.

    They do not depend on the order of the settings; the seed comes last.
    """
    short = short_keys(sorted(runs[0], key=lambda key: (key == SEED, key)))
    names = [",".join(f"{name}={_safe(values[key])}" for key, name in short.items()) for values in runs]
    # Some file systems take upper and lower case for the same.
    counts = Counter(name.casefold() for name in names)
    return [
        name if counts[name.casefold()] == 1 and len(name) <= 200 else f"{name[:190]}-{_digest(values)}"
        for name, values in zip(names, runs, strict=True)
    ]


def _safe(text: str) -> str:
    r"""A value in the name of a file.

    >>> [_safe(text) for text in ("1e-3", "[1, 2]", "-inf", "texts/my text.txt")]
    ['1e-3', '1-2', '-inf', 'texts-my-text.txt']
    """
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text.strip("[]{}\"' "))[:_LONGEST]


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]


def _recipes_in(folder: Path) -> dict[Path, Recipe]:
    """The recipes of the trainings in the sub-folders of a sweep."""
    if not folder.is_dir():
        return {}
    return {path.parent: load_recipe(path) for path in sorted(folder.glob(f"*/{RECIPE}"))}


def _placed(run: Planned, place: Path, before: Mapping[Path, Recipe]) -> Planned:
    """The run with its folder: that of its training where there is one, else ``place``."""

    def at(folder: Path) -> Planned:
        return replace(run, recipe=replace(run.recipe, output=folder))

    for folder, other in before.items():
        if all(value_of(other, key) == value_of(run.recipe, key) for key in run.values if key != "data.name"):
            try:
                check_begun_by(at(folder).recipe, other)
            except InputError:
                continue
            return at(folder)
    if place in before:
        try:
            check_begun_by(at(place).recipe, before[place])
        except InputError as error:
            raise InputError(f"{error}; or give the sweep another --output") from None
    if not begun(place):
        raise InputError(f"{place}: is there, and no training; remove it, or give the sweep another --output")
    return at(place)
