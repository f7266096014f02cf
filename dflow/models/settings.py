"""What a model folder says of its model: the family, and the settings of that family."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Any, ClassVar

from dflow import zoo
from dflow.config import InputError


class Described:
    """A family of models and settings of it, as attributes."""

    model_kind: ClassVar[zoo.Kind]
    #: Settings that come from the data, without which there is no model.
    required: ClassVar[tuple[str, ...]] = ()
    family: str

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


@functools.lru_cache(64)
def _parsed(family: zoo.Family, values: str) -> Any:
    return zoo.settings(family.name, json.loads(values))


class DescribedText(Described):
    """Those of a model of text, with the size of its alphabet."""

    model_kind = "text"
    vocab_size: int

    def settings(self) -> Any:
        """See `Described.settings`; the alphabet is checked too."""
        if not isinstance(self.vocab_size, int) or self.vocab_size < 2:
            raise InputError(f"vocab_size must be at least 2, found {self.vocab_size!r}")
        return super().settings()


class TextConfig(DescribedText):
    """Settings of a model of text, as `dflow.DflowConfig` has them, without transformers.

    Args:
        family: a name in `dflow.zoo.FAMILIES`.
        vocab_size: size K of the alphabet.
        explicit_length: whether the model carries a law of lengths.
        values: settings of the family, and whatever else a config holds, which is left out.
    """

    def __init__(
        self, family: str = "grouped", vocab_size: int = 27, explicit_length: bool = False, **values: Any
    ) -> None:
        self.family, self.vocab_size, self.explicit_length = family, vocab_size, explicit_length
        fields = zoo.find(family, "text").fields
        settings = zoo.settings(family, {name: values[name] for name in fields if name in values})
        for name, value in asdict(settings).items():
            setattr(self, name, value)
