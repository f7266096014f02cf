"""The settings of the families of models of text in `dflow.zoo.text`."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dflow.config import InputError
from dflow.elementwise import DISCRETE
from dflow.nn.attention import TransformerSize
from dflow.ops.orders import ORDERS, shuffled
from dflow.zoo.settings import check_settings, choice, setting

#: Orders of any-order models: the fixed orders, and "confidence".
ANY_ORDERS: Mapping[str, Callable[[int, int], Tensor]] = ChainMap(
    {"random": shuffled, "confidence": shuffled}, ORDERS
)


@dataclass
class ModelConfig:
    """Settings of every family of models of text."""

    length: int = setting(256, "longest sequence, in symbols", least=1)
    context: int = setting(
        0, "number of symbols that may be known around those that are scored or drawn; 0 for none", least=0
    )
    hidden_size: int = setting(128, "width of the network", least=1)
    num_hidden_layers: int = setting(3, "layers of the network (of each network, in a flow)", least=1)
    dropout: float = setting(0.0, "dropout in the network")
    counts: int = setting(
        0,
        "longest context, in symbols, of the counts of the training text that the law of a symbol is mixed "
        "with; 0 for none",
        least=0,
    )
    counts_dropout: float = setting(0.3, "share of the symbols for which nothing is counted in training")
    counts_megabytes: int = setting(
        128, "most megabytes of counts, the rarest of the longest contexts are left out", least=1
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.counts_dropout < 1:
            raise InputError(f"counts_dropout must lie in [0, 1), found {self.counts_dropout}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must lie in [0, 1), found {self.dropout}")


@dataclass
class AttentionConfig(ModelConfig):
    """Settings of every family built on attention."""

    num_attention_heads: int = setting(4, "attention heads")
    intermediate_size: int | None = setting(None, "width of the perceptrons (default 4 x hidden_size)")
    window: int = setting(8, "neighbouring symbols that the first layer reads directly, on each side")
    ngram_rows: int = setting(0, "rows of each table of hashed n-grams, n = 2 .. ngram_size; 0 for none")
    ngram_size: int = setting(4, "longest n-gram with a table")
    ngram_dropout: float = setting(0.0, "share of the n-grams left out in training")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.size()
        except ValueError as error:
            raise InputError(str(error)) from None

    def size(self, **other: Any) -> TransformerSize:
        """Size of the Transformers of this model, with ``other`` in place of some settings."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(TransformerSize)}
        return TransformerSize(**fields | other)


@dataclass
class TransformerConfig(AttentionConfig):
    """Baseline: the causal Transformer, one network call a symbol."""


@dataclass
class GroupedConfig(TransformerConfig):
    """The sequence is drawn in `num_calls` groups, each in one network call given all earlier ones."""

    num_calls: int = setting(32, "groups, one network call each, in which a sequence is drawn")
    calls: list[int] = setting([], "further numbers of calls to train for; MODEL@8 then draws in 8 calls")
    order: str = choice("lockstep", ORDERS, "order in which positions are drawn")
    block: int = setting(
        1,
        "symbols of a lane that one call draws, those after the first by a small network inside the group; "
        "fewer where a sequence is drawn in so many calls that there are not as many",
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("num_calls", [self.num_calls]), ("calls", self.calls)):
            for calls in values:
                if not 1 <= calls <= self.length:
                    raise InputError(f"{name} must lie in 1..{self.length} (length), found {calls}")


@dataclass
class AnyOrderConfig(TransformerConfig):
    """One network for all orders (absorbing-state diffusion), drawn along one order: for comparison."""

    num_calls: int = setting(32, "network calls to draw a sequence")
    order: str = choice(
        "lockstep", ANY_ORDERS,
        "entries that each call draws: those of a fixed order, or those of least entropy (confidence)",
    )  # fmt: skip
    schedule: Literal["uniform", "dp"] = setting(
        "uniform", "entries in each call of the orders random and confidence: uniform, dp (by measured costs)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_calls <= self.length:
            raise InputError(f"num_calls must lie in 1..{self.length} (length), found {self.num_calls}")
        if self.schedule == "dp" and self.context:
            raise InputError(
                "schedule 'dp' measures costs by how much of a whole sequence is known; with a context use "
                "uniform"
            )
        if self.schedule == "dp" and self.order not in ("random", "confidence"):
            raise InputError(
                f"order {self.order!r} fixes what each call draws; schedule 'dp' is for random and confidence"
            )


@dataclass
class BipartiteConfig(AttentionConfig):
    """Discrete coupling flow: `num_flows` couplings over a factorized base."""

    num_hidden_layers: int = setting(1, "attention layers of each coupling's network", least=1)
    num_flows: int = setting(8, "couplings, one network call each when a sequence is drawn", least=1)
    masks: Literal["strides", "halves", "single", "blocks"] = setting(
        "strides", "known and hidden positions of each coupling: strides, halves, single, blocks"
    )
    conditioner: Literal["attention", "perceptron", "table"] = setting(
        "attention", "network of a coupling: attention; for short sequences perceptron, table"
    )
    elementwise: str = choice("rank", DISCRETE, "family on Z/K")
    base: Literal["factorized", "mixture"] = setting("factorized", "base law: factorized, mixture")
    components: int = setting(16, "components of a mixture base")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise InputError(f"a coupling needs length 2 or more, found {self.length}")
        if self.counts and self.conditioner != "attention":
            raise InputError(
                f"conditioner {self.conditioner!r} reads no counts: with counts {self.counts} use "
                "conditioner 'attention'"
            )
        if self.context and self.conditioner != "attention":
            raise InputError(
                f"conditioner {self.conditioner!r} has weights for each position and reads no known symbols: "
                f"with context {self.context} use conditioner 'attention'"
            )
        if self.context and self.masks not in ("strides", "halves"):
            raise InputError(
                f"masks {self.masks!r} count from the last of a fixed number of hidden symbols: with context "
                f"{self.context} use masks strides or halves"
            )
        if self.masks == "blocks" and self.conditioner == "attention" and self.num_flows < self.length - 1:
            raise InputError(
                "conditioner 'attention' distinguishes hidden positions by their known neighbours, and all "
                "positions of a block have the same; use conditioner 'perceptron', or num_flows of length - 1"
            )


@dataclass
class AutoregressiveConfig(TransformerConfig):
    """Discrete autoregressive flow: `num_flows` layers in alternating directions over a base."""

    num_flows: int = setting(
        2, "autoregressive bijectors, alternating left to right and right to left", least=1
    )
    elementwise: str = choice("rank", DISCRETE, "family on Z/K")
    base: Literal["factorized", "mixture", "autoregressive", "spectra"] = setting(
        "factorized",
        "base law: factorized, mixture, autoregressive, spectra (a few shared laws, mixed for each entry; of "
        "one bijector)",
    )
    num_spectra: int = setting(16, "shared laws of a base of spectra", least=1)
    base_classes: int = setting(
        16, "first entries with separate laws in a factorized base; all later entries share one law", least=1
    )
    conditioner: Literal["attention", "table"] = setting(
        "attention", "network of a layer: attention; for short sequences table"
    )
    components: int = setting(16, "components of a mixture base")
    inversion: Literal["loop", "jacobi"] = setting(
        "loop", "how symbols are drawn: loop (a call a symbol), jacobi (parallel calls until nothing changes)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base == "spectra":
            needed = {"num_flows": 1, "elementwise": "rank", "conditioner": "attention", "inversion": "loop"}
            for name, value in needed.items():
                if getattr(self, name) != value:
                    raise InputError(
                        f"a base of spectra is that of one bijector of ranks with an attention network: set "
                        f"model.{name} to {value}, found {getattr(self, name)}"
                    )


@dataclass
class MultiscaleConfig(AttentionConfig):
    """Coarse to fine: at each level every second entry is drawn given the others, in one network call."""

    num_hidden_layers: int = setting(1, "attention layers of each level's network", least=1)
    num_levels: int | None = setting(None, "levels, one network call each (default: until one entry is left)")
    conditional: Literal["categorical", "spectra"] = setting(
        "spectra", "law of a level: categorical, spectra (one of a few shared laws, mapped on Z/K)"
    )
    elementwise: str = choice("rank", DISCRETE, "family on Z/K")
    num_spectra: int = setting(
        4, "shared laws in the mixture of each entry; with 1 it is a discrete flow", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise InputError(f"a level needs length 2 or more, found {self.length}")
        most = most_levels(self)
        if self.num_levels is not None and not 1 <= self.num_levels <= most:
            raise InputError(
                f"num_levels must lie in 1..{most} for length {self.length}, found {self.num_levels}"
            )


def built_for(config: ModelConfig) -> int:
    """Entries of the law: of sequences, or with a context of hidden ones, two of which may be skipped."""
    return config.length + 2 if config.context else config.length


def most_levels(config: MultiscaleConfig) -> int:
    """Levels until one entry is left."""
    return built_for(config).bit_length() - 1 if config.context else (config.length - 1).bit_length()
