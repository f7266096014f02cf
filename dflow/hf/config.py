"""Transformers configs of models: the settings of the family, and those of every config."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Any, ClassVar

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from dflow import plugins, zoo
from dflow.config import InputError


class FamilyConfig(PreTrainedConfig):
    """Settings of a model: its family, and the settings of that family.

    Args:
        family: a name in `dflow.zoo.FAMILIES`.
        kwargs: settings of the family (unknown ones are refused when the model is built), and those of
            every transformers config.
    """

    model_kind: ClassVar[zoo.Kind]
    #: Settings that come from the data, without which there is no model.
    required: ClassVar[tuple[str, ...]] = ()
    family: str

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

    @property
    def record(self) -> zoo.Family:
        """The record of the family.

        Raises:
            InputError: the family is unknown, or is one of another kind.
        """
        return zoo.find(self.family, self.model_kind)

    def settings(self) -> Any:
        """The family's settings, checked; parsed once for the same values.

        Raises:
            InputError: an unknown family, values that it refuses, or missing settings of the data.
        """
        fields = self.record.fields
        settings = _parsed(self.record, json.dumps({name: getattr(self, name) for name in fields}))
        if missing := [name for name in self.required if not getattr(settings, name)]:
            raise InputError(f"settings of the data are missing: {', '.join(missing)}; restore the file")
        return settings


@functools.cache
def _of_transformers() -> frozenset[str]:
    """Names, such as temperature, that transformers removes from the settings of a model."""
    return frozenset(vars(GenerationConfig()))


@functools.lru_cache(64)
def _parsed(family: zoo.Family, values: str) -> Any:
    return zoo.settings(family.name, json.loads(values))


class DflowConfig(FamilyConfig):
    """Settings of a model of text.

    Args:
        family: a name in `dflow.zoo.FAMILIES`.
        vocab_size: size K of the alphabet.
        explicit_length: whether the model carries a law of lengths (the sentence protocol).
        kwargs: see `FamilyConfig`.
    """

    model_type = "dflow"
    model_kind = "text"

    def __init__(
        self, family: str = "grouped", vocab_size: int = 27, explicit_length: bool = False, **kwargs: Any
    ) -> None:
        self.vocab_size, self.explicit_length = vocab_size, explicit_length
        super().__init__(family, **kwargs)

    def settings(self) -> Any:
        """See `FamilyConfig.settings`; the alphabet is checked too."""
        if not isinstance(self.vocab_size, int) or self.vocab_size < 2:
            raise InputError(f"vocab_size must be at least 2, found {self.vocab_size!r}")
        return super().settings()


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
