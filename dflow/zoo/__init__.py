"""Models by name: for each family a settings dataclass, and the builder that turns it into a model.

This is the only floor that reads settings of a model; the floors below take named arguments. Families of
symbols (text) are in `dflow.zoo.text` and `dflow.zoo.baselines`, those of images and tables in
`dflow.zoo.images` (dequantized) and `dflow.zoo.integer` and `dflow.zoo.modular` (exact), classifiers in
`dflow.zoo.binary`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dflow.config import InputError, parse
from dflow.core import Distribution
from dflow.dequantize import Dequantized
from dflow.nn.counted import Counted
from dflow.zoo.binary import UNIFORM, PBNetConfig, Rule, to_deterministic, transfer
from dflow.zoo.family import (
    BOUNDS,
    FAMILIES,
    KINDS,
    LIKELIHOOD,
    MAPS,
    SYMBOLS,
    Family,
    Kind,
    find,
    names,
    register,
)
from dflow.zoo.images import DequantizedConfig
from dflow.zoo.integer import IntegerConfig
from dflow.zoo.modular import ModularConfig
from dflow.zoo.settings import check_settings, setting
from dflow.zoo.text import walk
from dflow.zoo.text_settings import AnyOrderConfig, GroupedConfig, ModelConfig
from dflow.zoo.values import ValuesConfig

# The families that models are compared with come last where families are listed.
from dflow.zoo import baselines as baselines  # isort: skip

#: Settings of some family.
Settings = ModelConfig | ValuesConfig

__all__ = [
    "BOUNDS",
    "FAMILIES",
    "KINDS",
    "LIKELIHOOD",
    "MAPS",
    "SYMBOLS",
    "UNIFORM",
    "AnyOrderConfig",
    "DequantizedConfig",
    "Family",
    "GroupedConfig",
    "IntegerConfig",
    "Kind",
    "ModelConfig",
    "ModularConfig",
    "PBNetConfig",
    "Rule",
    "Settings",
    "ValuesConfig",
    "build",
    "build_classifier",
    "build_image",
    "find",
    "names",
    "register",
    "setting",
    "settings",
    "to_deterministic",
    "transfer",
    "walk",
]


def settings(family: object, values: dict[str, Any], where: str = "model") -> Any:
    """The settings of ``family`` from a mapping, strictly.

    >>> settings("grouped", {"num_calls": 16}).num_calls
    16
    >>> settings("grouped", {"num_call": 16})
    Traceback (most recent call last):
    dflow.config.InputError: model: unknown key 'num_call'; did you mean 'num_calls'?
    """
    record = find(family, where=where)
    parsed = parse(record.settings, values, where)
    check_settings(parsed, f"{where}: ")
    if getattr(parsed, "context", 0) and record.known == "no":
        able = [name for name in names("text") if find(name).known != "no"]
        raise InputError(
            f"{where}.context {parsed.context}: a {family} model takes no known symbols; set it to 0, or use "
            f"one of family {', '.join(able)}"
        )
    return parsed


def build(family: str, config: ModelConfig, K: int) -> Distribution:
    """The distribution over sequences of symbols in Z/K that ``config`` describes.

    Raises:
        InputError: the settings ask for counts, and the family reads none.
    """
    built: Distribution = find(family, "text").model(config, K)
    counts = getattr(config, "counts", 0)
    if counts and not any(isinstance(module, Counted) for module in built.modules()):
        raise InputError(f"model.counts {counts}: a {family} model reads no counts; set it to 0")
    return built


def build_image(family: str, config: ValuesConfig) -> Dequantized | Distribution:
    """The model of images or tables that ``config`` describes: a distribution where the family is exact."""
    built: Dequantized | Distribution = find(family, "images").model(config)
    return built


def build_classifier(family: str, config: ValuesConfig) -> nn.Sequential:
    """The network from integers to logits that ``config`` describes."""
    built: nn.Sequential = find(family, "labels").model(config)
    return built
