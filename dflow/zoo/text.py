"""Families over sequences of symbols: their settings, and their builders."""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dflow.bijectors import Autoregressive, Chain, Coupling, Reverse
from dflow.config import InputError
from dflow.core import Bijector, Distribution, Elementwise
from dflow.distributions import (
    AnyOrder,
    Categorical,
    ConditionalCategorical,
    Confident,
    Mixture,
    Ordered,
    RankedSequence,
    SequenceCategorical,
    Spectra,
    Walk,
)
from dflow.elementwise import DISCRETE
from dflow.flows import Flow, Infilled, Split
from dflow.nn.attention import TransformerSize
from dflow.nn.infill import InfillTransformer, MaskedTransformer, StridedInfill
from dflow.nn.perceptron import InfillPerceptron
from dflow.nn.plans import READING_CLASSES, reading_classes
from dflow.nn.table import LARGEST, InfillTable, PrefixTable
from dflow.nn.transformer import GroupCausalTransformer
from dflow.ops.masks import MASKS, first_of, reads
from dflow.ops.orders import ORDERS, check_order, lockstep, shuffled
from dflow.ops.straight_through import StraightThrough
from dflow.zoo.family import Family, register
from dflow.zoo.settings import check_settings, choice, setting

#: Orders of any-order models: the fixed orders, and "confidence".
_ANY_ORDERS: Mapping[str, Callable[[int, int], Tensor]] = ChainMap(
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
        "symbols of a lane that one call draws, those after the first by a small network inside the group",
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_calls <= self.length:
            raise InputError(f"num_calls must lie in 1..{self.length} (length), found {self.num_calls}")
        most = -(-self.length // self.block)
        for calls in (self.num_calls, *self.calls):
            if not 1 <= calls <= most:
                raise InputError(f"calls must lie in 1..{most} (length / block), found {calls}")


@dataclass
class AnyOrderConfig(TransformerConfig):
    """One network for all orders (absorbing-state diffusion), drawn along one order: for comparison."""

    num_calls: int = setting(32, "network calls to draw a sequence")
    order: str = choice(
        "lockstep", _ANY_ORDERS,
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
    num_spectra: int = setting(16, "shared laws of a base of spectra", least=2)
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
        most = _most_levels(self)
        if self.num_levels is not None and not 1 <= self.num_levels <= most:
            raise InputError(
                f"num_levels must lie in 1..{most} for length {self.length}, found {self.num_levels}"
            )


def bipartite(config: BipartiteConfig, K: int) -> Distribution:
    """Tran et al. 2019 (arXiv 1905.10347), couplings; ranks as in Lindt and Hoogeboom 2021."""
    estimator = StraightThrough()
    layers: list[Bijector] = []
    dim = _built_for(config)
    # With a context entries are counted from 1, so that the first are in the finest couplings, which read and
    # learn the most.
    begin = int(config.context > 0 and config.masks == "strides")
    counted = MASKS[config.masks](begin + dim, config.num_flows)
    masks = [(known[begin:], hidden[begin:]) for known, hidden in counted if hidden[begin:].any()]
    mapped = torch.zeros(dim, dtype=torch.bool)
    for known, hidden in masks:
        elementwise = DISCRETE[config.elementwise](K, estimator)
        # What another coupling has mapped is no text that could have been counted.
        counts = 0 if bool((mapped & (known | hidden)).any()) else _counts(config, elementwise)
        mapped |= hidden
        places = known.nonzero().flatten(), hidden.nonzero().flatten()
        net = _infill(config, K, elementwise.num_params, *places, counts)
        layers.append(Coupling(elementwise, net, known, hidden))
    positions = torch.arange(dim)
    if config.context and config.base == "factorized":
        # How sure the law of an entry is depends on how near what is read for it is.
        lay = functools.partial(reading_classes, reads(masks))
        base: Distribution = Categorical(dim, K, None, False, lay, READING_CLASSES)
    elif config.masks != "strides":
        base = _base(config, K, positions)
    else:
        # Far from the ends, the law of a latent depends only on the coupling that transformed its position.
        level = torch.tensor([(p & -p).bit_length() - 1 if p else -1 for p in positions.tolist()])
        base = _base(config, K, torch.unique(level, return_inverse=True)[1])
    return _infilled(config, Flow(Chain(layers), base))


def _infilled(config: ModelConfig, law: Distribution) -> Distribution:
    """In a model with a context, the law of the hidden entries as one of sequences."""
    return Infilled(law, config.length, first_of) if config.context else law


def _built_for(config: ModelConfig) -> int:
    """Entries of the law: of sequences, or with a context of hidden ones, two of which may be skipped."""
    return config.length + 2 if config.context else config.length


def autoregressive(config: AutoregressiveConfig, K: int) -> Distribution:
    """Tran et al. 2019 (arXiv 1905.10347), autoregressive layers."""
    if config.base == "spectra":
        order = lockstep(config.length, config.length)
        net = _causal(config, K, K + config.num_spectra)
        return RankedSequence(net, order, config.length, K, config.num_spectra)
    estimator = StraightThrough()
    layers: list[Bijector] = []
    for i in range(config.num_flows):
        elementwise = DISCRETE[config.elementwise](K, estimator)
        if config.conditioner == "table":
            _check_table(sum(K**n for n in range(config.length)), elementwise.num_params)
            conditioner: nn.Module = PrefixTable(K, elementwise.num_params, config.length)
        else:
            # Later layers read latents, which are no text that could have been counted.
            counts = 0 if i else _counts(config, elementwise)
            conditioner = causal = _causal(config, K, elementwise.num_params, zero_head=True, counts=counts)
            if causal.counted is not None:
                # An arg-max selects a map: all passes look up counts in the same way, to the last bit.
                causal.counted.few = 0
        layers += [Reverse()] * (i > 0)
        layers.append(Autoregressive(elementwise, conditioner, config.length, config.inversion))
    if config.base == "autoregressive":
        order = lockstep(config.length, config.length)
        base: Distribution = SequenceCategorical(_causal(config, K, K, counts=0), order, config.length)
    else:
        # The first entries of the last layer have little context, so each of them has a separate law.
        base = _base(config, K, torch.arange(config.length).clamp(max=config.base_classes - 1))
    return Flow(Chain(layers), base)


def multiscale(config: MultiscaleConfig, K: int) -> Distribution:
    """Split priors as in Lindt and Hoogeboom 2021 (arXiv 2107.11625), in the strides of `bipartite`."""
    estimator = StraightThrough()
    # With a context the entries are counted from 1, as in `bipartite`.
    first, levels = int(config.context > 0), config.num_levels or _most_levels(config)
    dim = _built_for(config)
    coarsest = dim >> levels if first else -(-dim >> levels)
    law: Distribution = Categorical(coarsest, K, torch.arange(coarsest).clamp(max=1), learned=False)
    for level in reversed(range(levels)):
        stride = 1 << level
        positions = torch.arange(first * (stride - 1), dim, stride)
        kept = torch.arange(len(positions)) % 2 == first
        elementwise = DISCRETE[config.elementwise](K, estimator)
        outputs, counts = Spectra.num_outputs(elementwise, config.num_spectra), config.counts
        if config.conditional == "spectra":
            counts = _counts(config, elementwise)
        net = StridedInfill(
            InfillTransformer(
                K,
                K if config.conditional == "categorical" else outputs,
                positions[kept],
                positions[~kept],
                # As in `bipartite`: coarse levels have fewer entries, and their n-grams say less.
                config.size(ngram_rows=config.ngram_rows >> level, counts=counts),
                zero_head=True,
                takes_known=config.context > 0,
            ),
            stride,
        )
        conditional: Distribution = ConditionalCategorical(net)
        if config.conditional == "spectra":
            conditional = Spectra(elementwise, net, K, config.num_spectra)
        law = Split(kept, conditional, law)
    return _infilled(config, law)


def _most_levels(config: MultiscaleConfig) -> int:
    """Levels until one entry is left."""
    return _built_for(config).bit_length() - 1 if config.context else (config.length - 1).bit_length()


def _order(name: str, dim: int, num_groups: int) -> Tensor:
    """The order called ``name``, checked, since a module of users may have added it."""
    order = _ANY_ORDERS[name](dim, num_groups)
    try:
        check_order(order, dim)
    except ValueError as error:
        raise InputError(f"model.order {name!r}: {error}; correct it or choose another") from error
    return order


def grouped(config: GroupedConfig, K: int) -> Distribution:
    """A sequence drawn in groups, with its exact likelihood in one pass; see `dflow.ops.orders`."""

    def rows(calls: int) -> Tensor:
        return _order(config.order, config.length, min(config.length, calls * config.block))

    order, others = rows(config.num_calls), [rows(calls) for calls in config.calls]
    both_sides = config.context > 0 or any(o.shape[1] > 1 for o in (order, *others))
    ahead = config.window if both_sides else 0
    net = GroupCausalTransformer(K, K, order, config.length, config.size(), block=config.block, ahead=ahead)
    law = SequenceCategorical(net, order, config.length, config.block, others)
    law.lay = functools.partial(_order, config.order)
    return law


def any_order(config: AnyOrderConfig, K: int) -> Distribution:
    """Hoogeboom et al. 2022 (arXiv 2110.02037), drawn along one order, where the likelihood is exact."""
    net = MaskedTransformer(K, K, config.length + config.context, config.size())
    return walk(config, AnyOrder(net, config.length, K))


def walk(config: AnyOrderConfig, model: AnyOrder) -> Walk:
    """``model`` drawn in the order and the number of calls of ``config``."""
    if config.order == "confidence":
        law: Walk = Confident(model, config.num_calls, config.schedule == "dp")
    elif config.schedule == "dp":
        law = Ordered(model, shuffled(config.length, config.length), config.num_calls)
    else:
        ordered = Ordered(model, _order(config.order, config.length, config.num_calls))
        ordered.lay = functools.partial(_order, config.order)
        law = ordered
    law.other = functools.partial(_walk_at, config)
    return law


def _walk_at(config: AnyOrderConfig, model: AnyOrder, calls: int) -> Walk:
    return walk(dataclasses.replace(config, num_calls=calls), model)


def transformer(config: TransformerConfig, K: int) -> Distribution:
    """The causal Transformer."""
    order = lockstep(config.length, config.length)
    return SequenceCategorical(_causal(config, K, K), order, config.length)


def _causal(config: TransformerConfig, K: int, num_params: int, **options: Any) -> GroupCausalTransformer:
    """A causal network; ``options`` are ``zero_head``, and fields of its size other than in ``config``."""
    order, zero_head = lockstep(config.length, config.length), options.pop("zero_head", False)
    size = config.size(**options)
    return GroupCausalTransformer(K, num_params, order, config.length, size, zero_head=zero_head)


def _counts(
    config: BipartiteConfig | AutoregressiveConfig | MultiscaleConfig, elementwise: Elementwise
) -> int:
    """Symbols of the longest contexts that are counted for a map, whose parameters must predict a symbol."""
    if config.counts and not elementwise.predicts:
        raise InputError(
            f"model.counts {config.counts}: the numbers that elementwise {config.elementwise!r} takes are no "
            "logits of symbols; use rank or shift, or set counts to 0"
        )
    return config.counts


def _infill(
    config: BipartiteConfig, K: int, num_params: int, known: Tensor, hidden: Tensor, counts: int
) -> nn.Module:
    """The network of a coupling."""
    if config.conditioner == "table":
        _check_table(K ** len(known), len(hidden) * num_params)
        return InfillTable(K, num_params, known, hidden)
    if config.conditioner == "perceptron":
        return InfillPerceptron(
            K,
            num_params,
            known,
            hidden,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            dropout=config.dropout,
            zero_head=True,
        )
    return InfillTransformer(
        K,
        num_params,
        known,
        hidden,
        # Smaller tables for couplings with fewer hidden entries, whose n-grams also span larger distances.
        config.size(ngram_rows=config.ngram_rows * 2 * len(hidden) // config.length, counts=counts),
        zero_head=True,
        takes_known=config.context > 0,
    )


def _check_table(rows: int, columns: int) -> None:
    if rows * columns > LARGEST:
        raise InputError(
            f"conditioner 'table' would hold {rows:,} contexts x {columns} numbers, above {LARGEST:,}; use "
            "another conditioner, a smaller alphabet or a shorter sequence"
        )


def _base(config: BipartiteConfig | AutoregressiveConfig, K: int, classes: Tensor) -> Distribution:
    if config.base == "mixture":
        return Mixture(len(classes), K, config.components)
    return Categorical(len(classes), K, classes, learned=False)


register(Family("grouped", "text", GroupedConfig, grouped, prompt="forced", known="anywhere"))
register(Family("any_order", "text", AnyOrderConfig, any_order, prompt="exact", known="anywhere"))
register(Family("bipartite", "text", BipartiteConfig, bipartite, known="anywhere"))
register(Family("autoregressive", "text", AutoregressiveConfig, autoregressive))
register(Family("multiscale", "text", MultiscaleConfig, multiscale, known="anywhere"))
register(
    Family(
        "transformer",
        "text",
        TransformerConfig,
        transformer,
        prompt="exact",
        known="before",
        left_to_right=True,
    )
)
