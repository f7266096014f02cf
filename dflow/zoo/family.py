"""One record for each family of models, and the registry of all families.

All that the commands need to know about a family is in its `Family`, so that a new family is one file with
its settings and builder, and one line that registers it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dflow import plugins
from dflow.config import InputError, nearest
from dflow.core import Distribution
from dflow.dequantize import Dequantized
from dflow.zoo.values import ValuesConfig

Kind = Literal["text", "images", "labels"]

#: Names of the kinds in messages.
KINDS: dict[str, str] = {"text": "text", "images": "images or tables", "labels": "labels of images"}

#: Training rules: bounds of a likelihood, the likelihood itself, and those for maps on Z/K.
BOUNDS = ("elbo", "iwbo", "renyi")
LIKELIHOOD = ("likelihood",)
MAPS = ("layerwise", "gumbel", "straight_through", "expected")
#: Rules for images whose values are symbols of Z/K, under a flow on Z/K or any other law of symbols.
SYMBOLS = (*LIKELIHOOD, *MAPS)

_RULES: dict[str, tuple[str, ...]] = {
    "text": (*SYMBOLS, "masked"), "images": LIKELIHOOD, "labels": (),
}  # fmt: skip
#: Base class of the settings of a kind, and the fields that the commands read.
_NEEDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": ("ModelConfig", ("length",)), "images": ("ValuesConfig", ("shape", "levels", "lowest")),
    "labels": ("PBNetConfig", ("classes", "kind", "init", "head")),
}  # fmt: skip
_MODELS: dict[str, tuple[type[nn.Module], ...]] = {
    "text": (Distribution,), "images": (Distribution, Dequantized), "labels": (nn.Sequential,),
}  # fmt: skip
#: Names of attributes that a config has beside the settings.
_TAKEN = frozenset(
    ("family", "vocab_size", "explicit_length", "settings", "record", "model_type", "model_kind")
)


@dataclass(frozen=True)
class Family:
    """All that the commands need to know about a family of models.

    Attributes:
        name: the value of ``model.family`` in a recipe.
        kind: "text", "images" (images and tables) or "labels" (classifiers of images).
        settings: dataclass of the settings: for text it has a field ``length``, as `ModelConfig` does; for
            images it extends `ValuesConfig`, for labels `PBNetConfig`.
        build: ``(settings, K)`` to a `Distribution` over symbols for text, ``(settings)`` to a `Distribution`
            or `Dequantized` for images, to an ``nn.Sequential`` of integers to logits for labels.
        rules: training rules that a recipe may select. None for the rules of the kind: for text, any rule
            that can train the law (`dflow.objectives.check_rule`); for images `LIKELIHOOD`, where
            ``log_prob`` takes floats that hold integers in training. With `SYMBOLS` it takes symbols, int64;
            a `Dequantized` is trained by `BOUNDS`.
        prompt: whether samples can continue given first symbols: "no"; "exact", the other symbols follow the
            conditional law; "forced", the first symbols are set, but symbols that are drawn before them do
            not depend on them. Unless "no", ``sample`` of the law takes ``prompt`` and ``length`` as
            `dflow.distributions.SequenceCategorical.sample` does.
        left_to_right: symbols are drawn one after another, a network call each, so that shorter sequences
            are scored and drawn without padding.
        pieces_matter: whether cutting a batch into pieces (``train.accumulation``) changes the result.
        baseline: ratios of ``dflow compare`` refer to the first model of such a family.
        recurrent: the network reads the entries of a sequence one after another, also to score them.
    """

    name: str
    kind: Kind
    settings: type[Any]
    build: Callable[..., Any]
    rules: tuple[str, ...] | None = None
    prompt: Literal["no", "exact", "forced"] = "no"
    left_to_right: bool = False
    pieces_matter: bool = False
    baseline: bool = False
    recurrent: bool = False

    def __post_init__(self) -> None:
        """Check the record as far as that is possible before a model is built."""
        if self.kind not in KINDS:
            raise InputError(f"family {self.name!r}: kind {self.kind!r}; {nearest(self.kind, list(KINDS))}")
        if not dataclasses.is_dataclass(self.settings):
            raise InputError(f"family {self.name!r}: settings {self.settings!r} are not a dataclass")
        if taken := [name for name in self.fields if name in _TAKEN]:
            raise InputError(f"family {self.name!r}: a setting cannot be called {taken[0]!r}; rename it")
        parent, needed = _NEEDED[self.kind]
        if missing := [name for name in needed if name not in self.fields]:
            raise InputError(
                f"family {self.name!r}: settings without a field {missing[0]!r}; extend dflow.zoo.{parent}"
            )
        if self.kind != "text" and not issubclass(self.settings, ValuesConfig):
            raise InputError(f"family {self.name!r}: the settings do not extend dflow.zoo.{parent}")
        if self.rules is None:
            object.__setattr__(self, "rules", _RULES[self.kind])

    @property
    def fields(self) -> list[str]:
        """Names of the settings."""
        return [f.name for f in dataclasses.fields(self.settings)]

    @property
    def exact(self) -> bool:
        """Whether likelihoods are exact, and not bounds."""
        return not set(self.rules or ()) & set(BOUNDS)

    def multiplications(self, settings: Any, batch: int, calls: int = 1) -> int | None:
        """Multiplications of one layer for a batch, which tell how many threads are worth their while.

        They are ``batch * entries * hidden_size^2``, for the entries that are computed at once: of a sequence
        that is drawn in ``calls`` network calls its length over these, of a recurrent network one, of an
        image its pixels. None where the settings have no ``hidden_size``.
        """
        width = getattr(settings, "hidden_size", None)
        if not isinstance(width, int):
            return None
        entries = settings.length if self.kind == "text" else math.prod(settings.shape[1:])
        return int(batch * (1 if self.recurrent else max(1, entries // max(1, calls))) * width * width)

    def model(self, *arguments: Any) -> Any:
        """The model that ``build`` returns for ``arguments``, checked against the record.

        Raises:
            InputError: the model does not fit the record.
        """
        built: Any = self.build(*arguments)
        if not isinstance(built, _MODELS[self.kind]):
            names = " or ".join(cls.__name__ for cls in _MODELS[self.kind])
            raise InputError(
                f"family {self.name!r} builds a {type(built).__name__}; one of {self.kind} builds a {names}"
            )
        if self.prompt != "no":
            sample: Any = built.sample
            missing = {"prompt", "length"} - set(inspect.signature(sample).parameters)
            if missing:
                raise InputError(
                    f"family {self.name!r} has prompt={self.prompt!r}, and {type(built).__name__}.sample "
                    f"takes no {' and no '.join(sorted(missing))}; add them, or set prompt='no'"
                )
        return built


#: Families of all kinds, by name.
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make ``family`` known by its name.

    The same family may be registered again, as when a cell of a notebook is run twice.

    Raises:
        InputError: another family has that name.
    """
    registered = FAMILIES.get(family.name)
    if registered is not None and _origin(registered) != _origin(family):
        raise InputError(
            f"family {family.name!r} exists already, from {_origin(registered)}; choose another name"
        )
    FAMILIES[family.name] = family
    return family


def _origin(family: Family) -> str:
    return f"{family.settings.__module__}.{family.settings.__qualname__}"


def names(*kinds: Kind) -> list[str]:
    """Names of the families of some kinds, or of all."""
    plugins.load_installed()
    return [name for name, family in FAMILIES.items() if not kinds or family.kind in kinds]


def find(name: object, kind: Kind | None = None, where: str = "model") -> Family:
    """The family called ``name``; ``where`` names the source of the name in errors.

    Raises:
        InputError: there is no such family, or it is one of another kind.
    """
    plugins.load_installed()
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        hint = nearest(str(name), names(kind) if kind else names())
        raise InputError(f"{where}: unknown family {name!r}; {hint}; {plugins.WAY}")
    if kind not in (None, family.kind):
        raise InputError(
            f"{where}: family {name!r} is one of models of {KINDS[family.kind]}, and this takes one of "
            f"{KINDS[str(kind)]}"
        )
    return family
