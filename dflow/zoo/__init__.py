"""Models by name: a settings dataclass a family, and the builder that turns it into a model.

This is the only floor that reads settings of a model; what lies below takes named arguments. Families of
symbols (text) are in `dflow.zoo.text`, those of images and tables in `dflow.zoo.images` (dequantized) and
`dflow.zoo.integer` and `dflow.zoo.modular` (exact), classifiers in `dflow.zoo.binary`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from dflow.config import InputError, nearest, parse
from dflow.core import Distribution
from dflow.dequantize import Dequantized
from dflow.zoo import binary, images, integer, modular, text
from dflow.zoo.binary import UNIFORM, PBNetConfig, Rule, to_deterministic, transfer
from dflow.zoo.images import DequantizedConfig
from dflow.zoo.integer import IntegerConfig
from dflow.zoo.modular import ModularConfig
from dflow.zoo.settings import setting
from dflow.zoo.text import (
    MASKS,
    AnyOrderConfig,
    GroupedConfig,
    ModelConfig,
    blocks,
    halves,
    single,
    strides,
    walk,
)
from dflow.zoo.values import ValuesConfig

#: Families over symbols.
FAMILIES = text.FAMILIES
#: Families over images and tables.
IMAGES: dict[str, tuple[type[ValuesConfig], Callable[[Any], Dequantized | Distribution]]] = {
    **images.FAMILIES,
    **integer.FAMILIES,
    **modular.FAMILIES,
}
#: Families of classifiers.
CLASSIFIERS = binary.FAMILIES

#: Settings of some family.
Settings = ModelConfig | ValuesConfig

__all__ = [
    "CLASSIFIERS",
    "FAMILIES",
    "IMAGES",
    "MASKS",
    "UNIFORM",
    "AnyOrderConfig",
    "DequantizedConfig",
    "GroupedConfig",
    "IntegerConfig",
    "ModelConfig",
    "ModularConfig",
    "PBNetConfig",
    "Rule",
    "Settings",
    "ValuesConfig",
    "blocks",
    "build",
    "build_classifier",
    "build_image",
    "fields",
    "halves",
    "setting",
    "settings",
    "single",
    "strides",
    "to_deterministic",
    "transfer",
    "walk",
]


def settings(family: object, values: dict[str, Any], where: str = "model") -> Any:
    """The settings of ``family`` from a mapping, strictly.

    >>> settings("grouped", {"num_calls": 16}).num_calls
    16
    >>> settings("groupd", {})
    Traceback (most recent call last):
    dflow.config.InputError: model: unknown family 'groupd'; did you mean 'grouped'?
    """
    return parse(_class(family, where), values, where)


def build(family: str, config: ModelConfig, K: int) -> Distribution:
    """The distribution over sequences of symbols in Z/K that ``config`` describes."""
    return FAMILIES[family][1](config, K)


def build_image(family: str, config: ValuesConfig) -> Dequantized | Distribution:
    """The model of images or tables that ``config`` describes: a distribution where the family is exact."""
    return IMAGES[family][1](config)


def build_classifier(family: str, config: PBNetConfig) -> nn.Sequential:
    """The network from integers to logits that ``config`` describes."""
    return CLASSIFIERS[family][1](config)


def fields(family: str) -> list[str]:
    """Names of the settings of ``family``."""
    return [f.name for f in dataclasses.fields(_class(family, "model"))]


def _class(family: object, where: str) -> type[Any]:
    every: dict[str, tuple[type[Any], Any]] = {**FAMILIES, **IMAGES, **CLASSIFIERS}
    found = every.get(str(family))
    if not isinstance(family, str) or found is None:
        raise InputError(f"{where}: unknown family {family!r}; {nearest(str(family), list(every))}")
    return found[0]
