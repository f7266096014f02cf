"""Recipes: what to train, on what, how, and where to put it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dflow import hf, plugins, recipes, zoo
from dflow.config import InputError, convert, nearest, parse
from dflow.data import DataConfig, ImageConfig, files
from dflow.ops.straight_through import SCHEDULES, scheduled
from dflow.train.patterns import KINDS
from dflow.zoo import setting

STATE = "state.safetensors"
RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"


@dataclass
class Schedule:
    """A value that moves from `start` to `end` over the first `until` of the training."""

    start: float
    end: float
    schedule: str = "linear"
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {self.schedule!r}; {nearest(self.schedule, list(SCHEDULES))}")
        if not 0 < self.until <= 1:
            raise InputError(f"until must lie in (0, 1], found {self.until}")
        least = min(self.start, self.end)
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise InputError(f"start and end must be finite, found {self.start} and {self.end}")
        if self.schedule == "exponential" and least <= 0:
            raise InputError(f"an exponential schedule needs positive ends, found {least}; or use cosine")

    def at(self, fraction: float) -> float:
        """The value after ``fraction`` of the training."""
        return scheduled(self.schedule, min(1.0, fraction / self.until), self.start, self.end)


@dataclass
class TrainConfig:
    """How a model is trained. The budget is `steps`, `minutes` or both: what is reached first ends it."""

    steps: int | None = setting(None, "budget in steps of the optimizer")
    minutes: float | None = setting(None, "budget in minutes, evaluations included")
    batch_size: int = setting(32, "number of sequences of one step, over all processes and accumulation")
    accumulation: int = setting(1, "number of pieces into which each process cuts its share of a batch")
    learning_rate: float = setting(2e-3, "peak learning rate (AdamW)")
    final_learning_rate: float = setting(0.0, "learning rate at the end, as a share of the peak (cosine)")
    warmup: int = setting(100, "number of steps of linear warm-up")
    weight_decay: float = setting(0.01, "weight decay of matrices")
    clip: float = setting(1.0, "largest norm of the gradient; 0 for no limit")
    ema: float = setting(
        0.0, "decay of the moving average of weights that is evaluated and saved; 0 for no average"
    )
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = setting(
        "no",
        "precision of the networks: no, bf16, fp16; auto takes bf16 where the machine on which the training "
        "begins is faster with it",
    )
    shard: bool = setting(
        False,
        "keep on each process a piece of weights, gradients, moments and averages (FSDP), not all (DDP)",
    )
    checkpointing: bool = setting(
        False, "make intermediate results of networks anew in the backward pass: less memory, more time"
    )
    compile: bool = setting(
        False, "compile the steps (torch.compile; needs a compiler, and a minute at the beginning)"
    )
    rule: Literal[
        "auto",
        "likelihood",
        "straight_through",
        "gumbel",
        "layerwise",
        "expected",
        "masked",
        "elbo",
        "iwbo",
        "renyi",
    ] = setting(
        "auto",
        "training rule; auto takes the best for the model (of images: elbo, or likelihood where it is exact)",
    )
    draws: int = setting(
        1, "number of draws of the dequantizer for each datum, for rules elbo, iwbo and renyi"
    )
    alpha: float = setting(-math.inf, "order of the bound of rule renyi; -inf is VR-max")
    temperature: Schedule = field(
        default_factory=lambda: Schedule(1.0, 1.0),
        metadata={"help": "temperature of the soft-max of rules straight_through, gumbel and expected"},
    )
    noise: Schedule | None = field(
        default=None,
        metadata={"help": "factor of the Gumbel noise (default: 0; for rule gumbel 1 falling to 0)"},
    )
    peak: Schedule | None = field(
        default=None, metadata={"help": "pull of the base towards symbol 0, which breaks the identity trap"}
    )
    refit_batches: int = setting(
        16, "number of batches that set a factorized base in closed form before an evaluation"
    )
    base_momentum: float = setting(
        0.98, "memory a step of a base or density in closed form (a factorized base, a Gaussian density)"
    )
    known: list[float] = setting(
        [0.3, 0.4, 0.2, 0.1],
        "of a model with a context, how often a step shows nothing known; symbols before; symbols before and "
        "after; holes (left to right: all symbols of a longer sequence are learned, and nothing is known)",
        least=0,
    )
    seed: int = setting(0, "seed of weights, batches and dropout")
    init: str | None = setting(
        None, "folder or name of a model of text whose weights the training starts from (dflow train --init)"
    )
    eval_every: int | None = setting(None, "number of steps between evaluations")
    eval_minutes: float | None = setting(None, "minutes between evaluations (default: a tenth of the budget)")
    eval_chunks: int | None = setting(
        None,
        "number of chunks (images) of the validation data to score during training; 0 for all (default: 128 "
        "chunks, 2048 images)",
    )
    eval_draws: int = setting(
        16, "number of draws of the dequantizer at an evaluation, after rules iwbo and renyi"
    )
    save_every: int | None = setting(
        None, "number of steps between saves of the training state (default: a save at each evaluation)"
    )
    keep: int = setting(1, "number of training states to keep, the last ones")
    skip: int = setting(
        10, "number of steps in a row with a loss or gradient that is not finite, before the training stops"
    )
    samples: int = setting(
        2, "number of samples to show at each evaluation; 0 for none (of pictures a grid of 36 or more)"
    )
    trackers: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "names of trackers of accelerate; [] for none"},
    )

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise InputError("give a budget: steps or minutes")
        for name in ("steps", "minutes", "eval_every", "eval_minutes", "save_every", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be positive and finite, found {value}")
        for name in ("batch_size", "accumulation", "refit_batches", "draws", "eval_draws", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip", "eval_chunks", "samples", "skip"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} must not be negative, found {getattr(self, name)}")
        for name in ("ema", "base_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), found {getattr(self, name)}")
        if not 0 <= self.final_learning_rate <= 1:
            raise InputError(f"final_learning_rate must lie in [0, 1], found {self.final_learning_rate}")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise InputError(f"seed must be a number of 64 bits, found {self.seed}")
        if len(self.known) != len(KINDS) or not sum(self.known) > 0:
            raise InputError(
                f"known must be {len(KINDS)} shares ({', '.join(KINDS)}), not all of them 0, found "
                f"{self.known}"
            )
        if self.shard and self.mixed_precision == "fp16":
            raise InputError("shard goes with mixed_precision bf16 or no, not with fp16; choose bf16")
        if self.shard and self.compile:
            raise InputError("compile goes with whole models, not with shard; leave one of them out")
        if min(self.temperature.start, self.temperature.end) <= 0:
            raise InputError(f"temperature must be positive from start to end, found {self.temperature}")
        if self.noise and min(self.noise.start, self.noise.end) < 0:
            raise InputError(f"noise must not be negative, found {self.noise}")


@dataclass
class Paper:
    """A published value that a recipe is measured against."""

    value: float
    unit: str
    source: str
    protocol: str = ""
    measure: str = setting(
        "", "figure of `dflow evaluate` to compare with: vi, nll, kl, or the accuracy of a network"
    )
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "settings, as for --set, that turn the recipe into the setup of the paper"},
    )


@dataclass
class Recipe:
    """What to train, on what, how, and where to put it."""

    data: DataConfig | ImageConfig
    family: str
    model: Any
    train: TrainConfig
    output: Path
    paper: list[Paper] = field(default_factory=list)
    #: Modules that were imported for it by ``--import``: the key ``import`` of the file; see `plugins`.
    modules: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        values: dict[str, Any] = {
            "data": asdict(self.data),
            "model": {"family": self.family} | asdict(self.model),
            "train": asdict(self.train),
            "output": str(self.output),
        }
        values |= {"paper": [asdict(p) for p in self.paper]} if self.paper else {}
        return values | ({"import": self.modules} if self.modules else {})


@dataclass
class _File:
    """The sections of a recipe's file."""

    model: dict[str, Any]
    train: dict[str, Any]
    output: str
    data: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] | list[Any] | None = None


#: Largest number of bytes of a recipe.
_LONGEST = 1 << 20


class _Loader(yaml.SafeLoader):
    """Plain values without aliases: a few lines of these are a tree of any size."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name), which recipes do not have: write the value out")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def load_recipe(path: str | Path, overrides: list[str] | None = None, output: str | None = None) -> Recipe:
    """Read a recipe strictly; ``overrides`` are ``key=value`` with dotted keys and YAML values.

    ``path`` may also be the name of a recipe that comes with dflow. A recipe without an ``output`` gets the
    one given here.

    Raises:
        InputError: no such file, no YAML, an unknown key or a value of the wrong type.
    """
    file = recipes.locate(path)
    try:
        if file.stat().st_size > _LONGEST:
            raise InputError(f"{path}: larger than {_LONGEST:,} bytes; name a recipe, a YAML file")
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a recipe ({str(error).splitlines()[0]})") from None
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: a recipe is a mapping with the sections data, model, train and output")
    tree = copy.deepcopy(dict(values))
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override}: write key=value, for example train.minutes=3")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"--set {override}: {parent} is not a section")
        try:
            node[last] = yaml.load(text, _Loader)
        except (yaml.YAMLError, RecursionError, ValueError):
            raise InputError(f"--set {override}: {text!r} is not a YAML value") from None
    if output is not None:
        tree.setdefault("output", output)
    recipe = recipe_from(tree, str(path))
    return dataclasses.replace(recipe, data=_located(recipe, file))


def _located(recipe: Recipe, path: Path) -> DataConfig | ImageConfig:
    """The data of the recipe in the file ``path``, where its relative paths lead somewhere.

    A relative path is that from the working directory, else that from the folder of the recipe. Folders of
    version 0.1.0 keep paths from the directory in which they were trained: it is known while a folder still
    lies where its recipe says.
    """
    data, folder = recipe.data, Path(files.absolute(path)).parent
    places, output = [folder], recipe.output.parts
    if not recipe.output.is_absolute() and output and folder.parts[-len(output) :] == output:
        places.append(Path(*folder.parts[: -len(output)]))
    names = [*(["name"] if data.is_path else []), "folder", *(["store"] if hasattr(data, "store") else [])]
    moved: dict[str, Any] = {}
    for field_name in names:
        value = getattr(data, field_name)
        if value is None or files.exists(files.expanded(value)):
            continue
        if field_name == "name" and any(files.exists(Path(root, value)) for root in _roots(data)):
            continue
        beside = next((place / value for place in places if files.exists(place / value)), None)
        if beside is not None:
            moved[field_name] = str(beside)
    return dataclasses.replace(data, **moved)


def _roots(data: DataConfig | ImageConfig) -> list[str]:
    """Folders in which data are looked for by their name."""
    return [root for root in (data.folder, os.environ.get("DFLOW_DATA")) if root]


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain values; ``where`` names their source in errors."""
    values = dict(values)
    modules = convert(list[str], values.pop("import", []), f"{where}: import")
    sections = parse(_File, values, where)
    model = dict(sections.model)
    name = model.pop("family", None)
    plugins.load_installed()
    if not isinstance(name, str):
        raise InputError(
            f"{where}: key 'model.family' is missing or no name; known: {', '.join(zoo.names())}"
        )
    missing = [module for module in modules if module not in plugins.loaded()]
    if name not in zoo.FAMILIES and missing:
        # A recipe may come from a stranger: it can name what it needs, and nothing is imported for that.
        raise InputError(
            f"{where}: family {name!r} is not known; the recipe says that it comes from {missing[0]}: if you "
            f"trust that module, give --import {missing[0]}"
        )
    family = zoo.find(name, where=f"{where}: model")
    train = parse(TrainConfig, sections.train, f"{where}: train")
    values_of = (
        sections.paper if isinstance(sections.paper, list) else [sections.paper] * bool(sections.paper)
    )
    paper = [parse(Paper, value, f"{where}: paper") for value in values_of]
    output = Path(convert(str, sections.output, f"{where}: output"))
    rules = family.rules or ()
    if train.rule not in ("auto", *rules):
        raise InputError(
            f"{where}: train.rule {train.rule!r} trains no model of family {name!r}; "
            f"use {', '.join(rules) or 'auto'}"
        )
    kinds: dict[str, type[DataConfig | ImageConfig]] = {"text": DataConfig}
    data = parse(kinds.get(family.kind, ImageConfig), sections.data, f"{where}: data")
    law = data.law(f"{where}: data") if isinstance(data, DataConfig) else None
    if law is not None:
        model.setdefault("length", law.dim)
    config = zoo.settings(name, model, f"{where}: model")
    if law is not None and config.length != law.dim:
        raise InputError(
            f"{where}: model.length is {config.length} and sequences of {data.name} have {law.dim} symbols; "
            "leave it out, or change data.parameters"
        )
    modules = list(dict.fromkeys([*modules, *plugins.loaded()]))
    return Recipe(data, name, config, train, output, paper, modules)


@dataclass(frozen=True)
class History:
    """The evaluations of a training.

    Attributes:
        rows: step, seconds, train_loss_bits and valid_bits of each; of a classifier also its errors,
            ``valid_error NAME``, by the last of which the best model is chosen.
        unit: "bits a character" and the like; "bits" where the training was one of version 0.1.0.
    """

    rows: list[dict[str, float]]
    unit: str


def history(folder: str | Path) -> History:
    """The evaluations of the training in ``folder``.

    Raises:
        InputError: no such file, an empty one, or a line that is not an evaluation.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: {getattr(error, 'strerror', None) or 'not text'}; name a folder that dflow train wrote"
        ) from None
    rows, unit = [], "bits"
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            errors = [name for name in row if name.startswith("valid_error")]
            names = ("step", "seconds", "train_loss_bits", "valid_bits", *errors)
            rows.append({name: float(row[name]) for name in names})
            unit = str(row.get("unit", unit))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f"{path}, line {number}: not an evaluation; restore the file") from None
    if not rows:
        raise InputError(f"{path}: no evaluation yet; wait for the first")
    return History(rows, unit)


def recipe_of(folder: str | Path) -> Recipe:
    """The recipe by which the model in ``folder`` was trained."""
    path = Path(folder) / RECIPE
    if not path.is_file():
        raise InputError(f"{folder}: no {RECIPE}, which names the data; name them with --data PATH")
    return load_recipe(path)


def resumed_recipe(folder: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe by which the training in ``folder`` goes on: the one in the folder, with ``overrides``.

    Raises:
        InputError: no training is there.
    """
    path = Path(folder) / RECIPE
    # A recipe alone in a folder is not a training.
    begun = any((path.parent / name).is_file() for name in (STATE, hf.MANIFEST))
    if not (begun and path.is_file()):
        raise InputError(
            f"{folder}: no training to go on with (no {RECIPE} with {STATE} beside it); name the folder "
            "that dflow train wrote, or begin with a recipe: dflow train RECIPE --output FOLDER"
        )
    return dataclasses.replace(load_recipe(path, overrides), output=Path(folder))
