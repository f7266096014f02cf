"""Transformers configs of models: the settings of the family, and those of every config."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from dflow import plugins, zoo
from dflow.config import InputError
from dflow.models.settings import Described, DescribedText


class FamilyConfig(Described, PreTrainedConfig):
    """Settings of a model: its family, and the settings of that family.

    Args:
        family: a name in `dflow.zoo.FAMILIES`.
        kwargs: settings of the family (unknown ones are refused when the model is built), and those of
            every transformers config.
    """

    def __init__(self, family: str, **kwargs: Any) -> None:
        self.family = family
        plugins.load_installed()
        record, values = zoo.FAMILIES.get(family), {}
        # A family that is unknown, or of another kind, is refused by `settings`.
        if record is not None and record.kind == self.model_kind:
            if taken := [name for name in record.fields if name in _of_transformers()]:
                raise InputError(
                    f"family {family!r}: {taken[0]!r} is a setting of transformers itself; rename it"
                )
            values = {name: kwargs.pop(name) for name in record.fields if name in kwargs}
            values = asdict(zoo.settings(family, values))
        super().__init__(**kwargs, **values)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: its code is in this package, and is not copied into the folder of a model."""


@functools.cache
def _of_transformers() -> frozenset[str]:
    """Names, such as temperature, that transformers removes from the settings of a model."""
    return frozenset(vars(GenerationConfig()))


class DflowConfig(DescribedText, FamilyConfig):
    """Settings of a model of text.

    Args:
        family: a name in `dflow.zoo.FAMILIES`.
        vocab_size: size K of the alphabet.
        explicit_length: whether the model carries a law of lengths (the sentence protocol).
        kwargs: see `FamilyConfig`.
    """

    model_type = "dflow"

    def __init__(
        self, family: str = "grouped", vocab_size: int = 27, explicit_length: bool = False, **kwargs: Any
    ) -> None:
        self.vocab_size, self.explicit_length = vocab_size, explicit_length
        super().__init__(family, **kwargs)


class DflowImageConfig(FamilyConfig):
    """Settings of a model of images or tables."""

    model_type = "dflow-image"
    model_kind = "images"
    required = ("shape", "levels")

    def __init__(self, family: str = "dequantized", **kwargs: Any) -> None:
        """See `FamilyConfig`."""
        super().__init__(family, **kwargs)


class DflowClassifierConfig(FamilyConfig):
    """Settings of a classifier of images."""

    model_type = "dflow-classifier"
    model_kind = "labels"
    required = ("shape", "levels", "classes")

    def __init__(self, family: str = "pbnet", **kwargs: Any) -> None:
        """See `FamilyConfig`."""
        if kwargs.get("classes"):
            kwargs.setdefault("num_labels", kwargs["classes"])
        super().__init__(family, **kwargs)


for config in (DflowConfig, DflowImageConfig, DflowClassifierConfig):
    AutoConfig.register(config.model_type, config)
