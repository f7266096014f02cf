"""Which training a folder holds: what must be the same for it to go on, and the command for it."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from dflow import hf, zoo
from dflow.config import InputError
from dflow.data import files
from dflow.models import manifest
from dflow.train.recipe import RECIPE, Recipe, load_recipe
from dflow.train.tasks import Task, task_of

#: Settings of the training on which its result does not depend, but for the budget.
_FREE = {
    *("steps", "minutes", "accumulation", "samples", "trackers", "shard", "compile", "checkpointing"),
    *("eval_every", "eval_minutes", "save_every", "keep", "skip"),
}


#: Settings of a model of images that follow from the data, where the recipe leaves them empty.
_OF_DATA = ("shape", "levels", "lowest", "columns", "loc", "scale", "classes")


def resume_command(output: Path) -> str:
    """The command that goes on with the training in ``output``."""
    name = str(output)
    return shlex.join(["dflow", "train", "--resume", "./" + name if name.startswith("-") else name])


def begun(output: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that was killed before its first state.

    The manifest lists the recipe before the file is moved into the folder, and other files are moved first.
    """
    if not output.exists():
        return True
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    return not names or RECIPE in names or RECIPE in manifest.read(output)


def resumed_task(recipe: Recipe) -> Task:
    """The task of a run that goes on; other settings or data are refused before anything is built."""
    try:
        before = load_recipe(recipe.output / RECIPE)
    except InputError:
        return task_of(recipe, True)  # the state says whether it is the same run
    then, now = _fixed(before), _fixed(recipe)
    if before.family != recipe.family or any(then[section] != now[section] for section in ("data", "train")):
        raise other_settings(recipe)
    expected = recipe.data.checksum or before.data.checksum
    try:
        return task_of(replace(recipe, data=replace(recipe.data, checksum=expected)), True)
    except files.Changed:
        if files.absolute(before.data.name) == files.absolute(recipe.data.name):
            raise
        names = f"data.name: {before.data.name} then, {recipe.data.name} now"
        raise other_settings(recipe, names) from None


def is_same(recipe: Recipe, fingerprint_before: str | None) -> bool:
    """Whether the state in the output is one of ``recipe``: by its fingerprint, else by the recipe beside it.

    Fingerprints of versions that had other settings, or kept the name of a file, differ for the same run.
    """
    if fingerprint_before == fingerprint(recipe):
        return True
    try:
        hf.verify(recipe.output, [RECIPE])
        return _fixed(load_recipe(recipe.output / RECIPE)) == _fixed(recipe)
    except InputError:
        return False


def check_begun_by(recipe: Recipe, before: Recipe) -> None:
    """Raise `InputError` unless a training by ``before``, the recipe in its folder, goes on by ``recipe``.

    It is not read whether the data have changed since.
    """
    if recipe.train.mixed_precision == "auto":
        # What it took when it began.
        precision = before.train.mixed_precision
        recipe = replace(recipe, train=replace(recipe.train, mixed_precision=precision))
    lines = _lines(before, recipe)
    if recipe.data.is_path and files.absolute(before.data.name) != recipe.data.located().name:
        lines.insert(0, f"data.name: {before.data.name} then, {recipe.data.name} now")
    if lines:
        raise other_settings(recipe, "; ".join(lines[:4]))


def fingerprint(recipe: Recipe) -> str:
    """The digest of all settings on which the result of a run depends, but for its budget."""
    return hashlib.sha256(json.dumps(_fixed(recipe), sort_keys=True).encode()).hexdigest()


def other_settings(recipe: Recipe, differences: str = "") -> InputError:
    """The error where the output holds another run."""
    return InputError(
        f"{recipe.output}: was trained with other settings ({differences or _differences(recipe)}); only the "
        "budget, the times of evaluation and the output may differ. With its own: "
        f"{resume_command(recipe.output)}"
    )


def _fixed(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The settings that have to be the same for a run to go on, by the sections of the recipe.

    Files may have moved: they are known by their checksum, which the state has.
    """
    values = recipe.as_dict()
    # Where pieces of a batch are normalised by themselves, their number matters.
    free = _FREE - {"accumulation"} if zoo.find(recipe.family).pieces_matter else _FREE
    values["train"] = {k: v for k, v in values["train"].items() if k not in free}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("folder", "store", "checksum")}
    # Runs that were begun before there was this setting go on.
    values["data"] = {k: v for k, v in values["data"].items() if (k, v) != ("split_by", "tail")}
    if recipe.data.is_path:
        values["data"]["name"] = "a path"
    return {section: values[section] for section in ("data", "model", "train")}


def _differences(recipe: Recipe) -> str:
    """The settings that differ from those of the run in the output, in words."""
    try:
        before = load_recipe(recipe.output / RECIPE)
    except InputError:
        return "its own recipe.yaml cannot be read"
    return "; ".join(_lines(before, recipe)[:4]) or "settings that this version of dflow names otherwise"


def _lines(before: Recipe, recipe: Recipe) -> list[str]:
    """Each setting of ``recipe`` that is another one than that of ``before``, in words.

    The recipe in a folder has settings of the model that follow from the data; another one leaves them empty.
    """
    then, now = _fixed(before), _fixed(recipe)
    empty = [name for name in _OF_DATA if not now["model"].get(name, True)]
    now["model"] |= {name: then["model"].get(name) for name in empty}
    lines = []
    for section in now:
        names = then[section].keys() | now[section].keys()
        for name in sorted(names, key=lambda n: (n != "family", n)):
            old, new = (values[section].get(name) for values in (then, now))
            if old != new:
                lines.append(f"{section}.{name}: {old} then, {new} now")
    return lines
