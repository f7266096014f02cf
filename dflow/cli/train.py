"""``dflow train``."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Machine, say_once
from dflow.config import InputError, nearest
from dflow.recipes import hint, trainable

if TYPE_CHECKING:
    from dflow.train import Recipe


@dataclass(kw_only=True)
class Train(Machine):
    """Train a model by a recipe, or go on with a training.

    To go on: dflow train --resume FOLDER.
    """

    recipe: str | None = argument(
        "recipe, by its name (`dflow recipes` lists them) or a YAML file; with --resume also the folder of a "
        "training; with --init none for that of the model",
        None,
    )
    set: list[str] = flag(
        "settings that replace those of the recipe: train.minutes=3 model.num_calls=16 ...; or "
        "one by one: --train.minutes 3 --model.num_calls=16 (`dflow settings` lists them)",
        many=True,
    )
    init: str | None = flag(
        "folder or name of a model of text whose weights the training starts from, as tolstoy (fine-tuning)",
        None,
    )
    output: str | None = flag("folder of the model (default: that of the recipe)", None, short="-o")
    resume: bool = flag(
        "go on with the training in FOLDER by the recipe in it (--resume FOLDER), or with the training by "
        "RECIPE in its output (RECIPE --resume)",
        False,
    )


def train(flags: Train) -> int:
    """`dflow train`; where a scheduler asks for room it ends with 0, so that it may be queued again."""
    from dflow.train import Preempted
    from dflow.train import train as run

    device = flags.settle_training()
    recipe = recipe_to_train(flags)
    try:
        run(recipe, flags.resume, device)
    except Preempted as stop:
        say_once(str(stop))
    return 0


def recipe_to_train(flags: Train) -> Recipe:
    """The recipe that the flags of `dflow train` name; --resume alone never begins a new training."""
    from dflow.train import RECIPE, load_recipe, resume_command, resumed_recipe

    if flags.recipe is None and flags.init is None:
        greedy = "; all words after --set belong to it, so give a recipe before" if flags.set else ""
        raise InputError(
            f"name a recipe (`dflow recipes` lists them), or a model to start from: --init MODEL{greedy}"
        )
    if flags.recipe is None:
        return _new_or_begun(flags, recipe_to_tune(flags, str(flags.init)), Path(RECIPE))
    path = Path(flags.recipe)
    # A recipe may be called as the folder that it was trained into.
    named = path.as_posix() in trainable() and (flags.output is not None or not flags.resume)
    if path.is_dir() and not named:
        if not flags.resume:
            raise InputError(
                f"{path}: a folder; name a recipe, or go on with the training in it: {resume_command(path)}"
            )
        if flags.init is not None:
            raise InputError(f"--init {flags.init}: the training in {path} has begun; leave it out")
        if flags.output is not None:
            raise InputError(f"--output {flags.output}: the training in {path} stays there; leave it out")
        return resumed_recipe(path, flags.set)
    if flags.resume and not path.exists() and path.as_posix() not in trainable():
        raise InputError(f"{path}: neither the folder of a training nor a recipe; {hint(path)}")
    if flags.init is not None:
        recipe = recipe_to_tune(flags, flags.init)
    else:
        recipe = load_recipe(path, flags.set, flags.output)
    return _new_or_begun(flags, recipe, path)


def _new_or_begun(flags: Train, recipe: Recipe, path: Path) -> Recipe:
    """A recipe as the flags want it: of a new training, or with --resume of one that may have begun."""
    from dflow.train import STATE, resume_command

    if flags.output is not None:
        recipe = dataclasses.replace(recipe, output=Path(flags.output))
    empty = not recipe.output.exists() or (recipe.output.is_dir() and not any(recipe.output.iterdir()))
    if not (flags.resume and empty):
        return recipe
    if flags.output is None and not any(word.startswith("output=") for word in flags.set):
        # A user who trained into another folder would train from the beginning, into this one.
        folder = path.parent if (path.parent / STATE).is_file() else Path("FOLDER")
        raise InputError(
            f"{recipe.output}: nothing to resume; go on with a training by its folder: "
            f"{resume_command(folder)}, or leave out --resume to begin one"
        )
    say_once(f"{recipe.output}: nothing to resume yet; a new training begins")
    return recipe


def recipe_to_tune(flags: Train, init: str) -> Recipe:
    """The recipe of a training that starts from the model ``init``: the one that is named, or the model's."""
    from dflow.models import config_of, split_calls
    from dflow.train import RECIPE, load_recipe

    folder = split_calls(init)[0]
    config_of(folder)
    settings = [f"train.init={json.dumps(init)}", *flags.set]
    if flags.recipe is None:
        if flags.output is None and not any(word.startswith("output=") for word in flags.set):
            raise InputError(f"--init {init}: name the folder of the new model: --output FOLDER")
        if any(word.startswith("data.name=") for word in flags.set):
            # They are other data than those that the model was trained on.
            settings = ["data.checksum=null", "data.folder=null", *settings]
    return load_recipe(folder / RECIPE if flags.recipe is None else flags.recipe, settings, flags.output)


#: Sections of a recipe whose settings are flags of their own, as ``--train.steps`` is.
SECTIONS = ("data", "model", "train")


def as_set(words: Sequence[str]) -> list[str]:
    """``words`` with each setting of a recipe that is given as a flag of its own given by ``--set``.

    >>> as_set(["--train.steps", "100", "recipe.yaml", "--model.num_calls=8"])
    ['--set=train.steps=100', 'recipe.yaml', '--set=model.num_calls=8']

    Raises:
        InputError: a flag without a value.
    """
    rewritten, unread = list[str](), collections.deque(words)
    while unread:
        word = unread.popleft()
        if word == "--":
            return [*rewritten, word, *unread]
        key, equals, value = word.removeprefix("--").partition("=")
        section, dot, _ = key.partition(".")
        if word.startswith("--") and dot and section in SECTIONS:
            if not equals:
                if not unread or _is_flag(unread[0]):
                    raise InputError(f"{word}: a value is missing; write {word} VALUE, or {word}=VALUE")
                value = unread.popleft()
            # In one word: --set takes all words after it, and the recipe may be one of these.
            word = f"--set={key}={value}"
        rewritten.append(word)
    return rewritten


def _is_flag(word: str) -> bool:
    """Whether a word is a flag, and neither a value nor a negative number."""
    with contextlib.suppress(ValueError):
        float(word)
        return False
    return word.startswith("-")


def hint_of_setting(option: str) -> str:
    """How to give the setting of a recipe that a flag may stand for; "" where there is no such setting."""
    from dflow.train import TrainConfig

    section, dot, name = option.lstrip("-").partition(".")
    if dot:
        return nearest(option, [f"--{other}.{name}" for other in SECTIONS])
    name = section.replace("-", "_")
    if name in {f.name for f in dataclasses.fields(TrainConfig)}:
        return f"settings of the recipe are given by --set train.{name}=VALUE"
    return ""


VERBS: Verbs = (("train", Train, train, "dflow train grouped --set train.minutes=3 --output runs/quick"),)
