"""Families over sequences of symbols: their settings, and their builders."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

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
from dflow.nn.infill import InfillTransformer, MaskedTransformer, StridedInfill
from dflow.nn.perceptron import InfillPerceptron
from dflow.nn.plans import READING_CLASSES, reading_classes
from dflow.nn.table import LARGEST, InfillTable, PrefixTable
from dflow.nn.transformer import GroupCausalTransformer
from dflow.ops.masks import MASKS, first_of, reads
from dflow.ops.orders import check_order, lockstep, shuffled
from dflow.ops.straight_through import StraightThrough
from dflow.zoo.family import Family, register
from dflow.zoo.text_settings import (
    ANY_ORDERS,
    AnyOrderConfig,
    AutoregressiveConfig,
    BipartiteConfig,
    GroupedConfig,
    ModelConfig,
    MultiscaleConfig,
    TransformerConfig,
    built_for,
    most_levels,
)


def bipartite(config: BipartiteConfig, K: int) -> Distribution:
    """Tran et al. 2019 (arXiv 1905.10347), couplings; ranks as in Lindt and Hoogeboom 2021."""
    estimator = StraightThrough()
    layers: list[Bijector] = []
    dim = built_for(config)
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
    first, levels = int(config.context > 0), config.num_levels or most_levels(config)
    dim = built_for(config)
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


def _order(name: str, dim: int, num_groups: int) -> Tensor:
    """The order called ``name``, checked, since a module of users may have added it."""
    order = ANY_ORDERS[name](dim, num_groups)
    try:
        check_order(order, dim)
    except ValueError as error:
        raise InputError(f"model.order {name!r}: {error}; correct it or choose another") from error
    return order


def grouped(config: GroupedConfig, K: int) -> Distribution:
    """A sequence drawn in groups, with its exact likelihood in one pass; see `dflow.ops.orders`."""

    def walked(calls: int) -> tuple[Tensor, int]:
        """An order in so many calls, and the rows of a call: fewer where there are not so many entries."""
        fits = calls <= -(-config.length // config.block)
        block = config.block if fits else config.length // calls
        return _order(config.order, config.length, min(config.length, calls * block)), block

    (order, block), *others = (walked(calls) for calls in (config.num_calls, *config.calls))
    both_sides = config.context > 0 or any(o.shape[1] > 1 for o, _ in ((order, block), *others))
    ahead = config.window if both_sides else 0
    net = GroupCausalTransformer(K, K, order, config.length, config.size(), block=config.block, ahead=ahead)
    law = SequenceCategorical(net, order, config.length, block, others)
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
