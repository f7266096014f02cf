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

    To go on: dflow train --resume FOLDER. With --sweep it trains every combination of some values, each in a
    sub-folder of the output, and writes sweep.md, sweep.json and sweep.png; the same command goes on.
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
    sweep: list[str] = flag(
        "values of settings, separated by commas: train.learning_rate=1e-3,2e-3 train.seed=0,1,2 ...; every "
        "combination is trained; a list is one value in its brackets: 'model.calls=[1,2],[4,8]'",
        many=True,
    )
    jobs: int | None = flag(
        "with --sweep: number of runs at a time, each in a process of its own, which share the processors "
        "(default: 1)",
        None,
    )
    tracker: list[str] = flag(
        "tracker to log to, as tensorboard (the default), wandb or trackio, once for each; none for none; "
        "short for --set train.trackers=[...]",
        each=True,
    )


def train(flags: Train) -> int:
    """`dflow train`; where a scheduler asks for room it ends with 0, so that it may be queued again."""
    from dflow.train import Preempted
    from dflow.train import train as run

    flags = with_trackers(flags)
    if flags.sweep:
        from dflow.cli.sweeping import train_sweep

        return train_sweep(flags)
    if flags.jobs is not None:
        raise InputError(f"--jobs {flags.jobs} is for --sweep, which trains several models")
    device = flags.settle_training()
    recipe = recipe_to_train(flags)
    try:
        run(recipe, flags.resume, device)
    except Preempted as stop:
        say_once(str(stop))
    return 0


def with_trackers(flags: Train) -> Train:
    """The flags with the trackers of --tracker among the settings that they replace."""
    if not flags.tracker:
        return flags
    if any(word.startswith("train.trackers=") for word in [*flags.set, *flags.sweep]):
        raise InputError("--tracker and train.trackers=[...] name the same setting; leave one of them out")
    if "none" in flags.tracker and len(flags.tracker) > 1:
        raise InputError(f"--tracker {' --tracker '.join(flags.tracker)}: none goes with no other")
    names = [name for name in dict.fromkeys(flags.tracker) if name != "none"]
    return dataclasses.replace(flags, set=[*flags.set, f"train.trackers={json.dumps(names)}"], tracker=[])


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
        if (path / "sweep.json").is_file():
            from dflow.sweep import command_in

            raise InputError(f"{path}: a sweep; go on with its command: {command_in(path)}")
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
    from dflow.train import load_recipe

    path, settings = tuning(flags, init)
    return load_recipe(path, settings, flags.output)


def tuning(flags: Train, init: str) -> tuple[str | Path, list[str]]:
    """The recipe's name or file, and the settings that replace its own, to start from the model ``init``."""
    from dflow.models import config_of, split_calls
    from dflow.train import RECIPE

    folder = split_calls(init)[0]
    config_of(folder)
    settings = [f"train.init={json.dumps(init)}", *flags.set]
    if flags.recipe is None:
        if flags.output is None and not any(word.startswith("output=") for word in flags.set):
            raise InputError(f"--init {init}: name the folder of the new model: --output FOLDER")
        if any(word.startswith("data.name=") for word in flags.set):
            # They are other data than those that the model was trained on.
            settings = ["data.checksum=null", "data.folder=null", *settings]
    return folder / RECIPE if flags.recipe is None else flags.recipe, settings


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
