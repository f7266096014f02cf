"""Integer flows of images and tables: exact likelihoods, fit for lossless compression.

Tensors are flat, ``(batch, C*H*W)`` in C, H, W order; networks reshape inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dflow.bijectors import Chain, Coupling, Inverse, Permute, squeeze
from dflow.config import InputError
from dflow.core import Bijector, Distribution
from dflow.distributions import ConditionalLogistic, ConditionalWindow, LogisticMixture
from dflow.distributions.window import MOST
from dflow.elementwise import IntegerShift
from dflow.flows import Flow, Split
from dflow.nn.densenet import DenseNet
from dflow.nn.rescaled import Rescaled
from dflow.ops.orders import spread
from dflow.zoo.family import Family, register
from dflow.zoo.settings import setting
from dflow.zoo.values import LARGEST, MISSING, Shape, ValuesConfig, naming_setting


@dataclass
class IntegerConfig(ValuesConfig):
    """Integers under a bijection of the integers and discretized logistic laws."""

    num_levels: int = setting(3, "levels; channels are factored out between two levels", least=1)
    num_flows: int = setting(8, "couplings of a level", least=0)
    kept: Literal["half", "quarter"] = setting(
        "half", "channels kept for the next level: half; quarter (one pixel of four)"
    )
    prior_groups: int = setting(
        1, "groups of the channels that are factored out, each modelled given those before it", least=1
    )
    prior: Literal["logistic", "hurdle"] = setting(
        "logistic",
        "laws of factored-out channels: logistic (mixtures of logistic laws); hurdle (one logit decides "
        "whether it is the most frequent value, a soft-max covers the others; needs num_flows 0)",
    )
    prior_components: int = setting(
        1, "logistic laws in the mixture of each entry that is factored out", least=1
    )
    split: Literal["quarter", "half"] = setting(
        "quarter", "channels that a coupling transforms: quarter (given three quarters), half"
    )
    permute: Literal["kept", "inverted"] = setting(
        "kept", "random permutation of channels before a coupling: kept; inverted (undone after it, IDF++)"
    )
    rezero: bool = setting(False, "multiply each translation by a learned factor that starts at 0 (IDF++)")
    activation: Literal["relu", "silu"] = setting("relu", "activation of the networks: relu, or silu (IDF++)")
    norm: Literal["none", "group"] = setting("none", "norm in the networks: none, or group (IDF++)")
    hidden_size: int = setting(96, "width of a network", least=1)
    num_hidden_layers: int = setting(4, "layers of a network", least=1)
    start: Literal["linear", "marginals"] = setting(
        "linear",
        "initial location of the logistic laws of factored-out channels: linear (the best linear prediction "
        "from neighbouring pixels); marginals (of the data)",
    )
    components: int = setting(5, "logistic laws in the mixture of each entry of the last level", least=1)
    groups: int = setting(
        1, "groups of the entries of the last level, each modelled given those before it", least=1
    )

    def __post_init__(self) -> None:
        hurdle = self.prior == "hurdle"
        if hurdle and self.num_flows:
            raise InputError(f"num_flows={self.num_flows} needs prior logistic: hurdle laws pass no gradient")
        if hurdle and self.prior_components > 1:
            raise InputError(f"prior_components={self.prior_components} needs prior logistic")
        super().__post_init__()
        if None in self.levels:
            raise InputError(
                f"column {self.levels.index(None)} is real, and an integer flow models integers: use family "
                "dequantized, or data without that column"
            )
        ends = [abs(end) for r in self.ranges if r for end in r] if self.shape and self.levels else []
        if max(ends, default=0) > LARGEST:
            raise InputError(
                f"value {max(ends)} is larger than {LARGEST}, from where float32 mistakes integers: "
                "subtract a constant from the data, or divide them"
            )
        spans = (
            [high - low + 1 for low, high in filter(None, self.ranges)] if self.shape and self.levels else []
        )
        if hurdle and max(spans, default=0) > MOST:
            raise InputError(f"prior hurdle takes up to {MOST} values of an entry: use prior logistic")
        if self.shape and self.dim == 1:
            raise InputError("a coupling needs two entries or more, found 1")

    def about(self) -> str:
        """See `ValuesConfig.about`."""
        return f"integer flow of {self.num_levels} levels of {self.num_flows} couplings"

    @property
    def support(self) -> list[tuple[int, int] | None]:
        """All integers that float32 resolves: each of them has a probability, and can be drawn."""
        return [(-LARGEST, LARGEST)] * self.dim


def integer(config: IntegerConfig) -> Distribution:
    """Hoogeboom et al. 2019 (arXiv 1905.07376); van den Berg et al. 2021 (arXiv 2006.12459).

    ``log_prob`` is exact, for int64 and for floats that hold integers. P sums to 1 over all integers: what
    lies outside the range of the data has some probability too. The rounded translations depend on the
    precision of the networks: a model in float64 is another law than in float32, of the same quality.
    """
    if not config.shape or not config.levels:
        raise InputError(MISSING)
    ends = [r or (0, 0) for r in config.ranges]
    # Ranges become [-1, 1): by powers of two, so that nothing is rounded.
    offset = torch.tensor([float(low + (high - low + 1) // 2) for low, high in ends])
    scale = torch.tensor([2.0 ** max(0, (high - low).bit_length() - 1) for low, high in ends])
    channels, height, width = config.shape
    generator = torch.Generator().manual_seed(_SEED)
    return _level(config, (channels, height, width), config.num_levels, _Ranges(offset, scale), generator)


#: Seed of the permutations; the checkpoint holds these too.
_SEED = 1905_07376


class _Ranges(NamedTuple):
    """Middle and half the range of the entries of a tensor, reordered and sliced as the tensor is."""

    offset: Tensor
    scale: Tensor

    def at(self, index: Tensor | slice) -> _Ranges:
        return _Ranges(self.offset[index], self.scale[index])


def _level(
    config: IntegerConfig, shape: Shape, levels: int, ranges: _Ranges, generator: torch.Generator
) -> Distribution:
    layers: list[Bijector] = []
    if shape[1] % 2 == 0 and shape[2] % 2 == 0:
        permutation, shape = squeeze(shape)
        layers.append(permutation)
        ranges = ranges.at(permutation.permutation)
        if config.kept == "quarter":
            # The kept pixels come first, in all their colours; then the others, pixel by pixel.
            colours = torch.arange(prod(shape)).view(shape[0] // 4, 4, -1).transpose(0, 1).flatten()
            layers.append(Permute(colours))
            ranges = ranges.at(colours)
    channels, places = shape[0], shape[1] * shape[2]
    flows = config.num_flows
    if channels == 1 and levels == 1 < config.num_levels:
        flows = 0  # A single channel is left after all levels; it is modelled without a coupling.
    elif channels < 2:
        raise InputError(
            f"{shape[1]} x {shape[2]} pixels of one channel have nothing for a coupling to know and to "
            "move: use fewer num_levels, or data of an even height and width (data.patch, data.crop)"
        )
    for _ in range(flows):
        order = torch.randperm(channels, generator=generator)
        index = torch.arange(prod(shape)).view(channels, places)[order].flatten()
        layers += [Permute(index), _coupling(config, shape, ranges.at(index))]
        if config.permute == "inverted":
            layers.append(Inverse(Permute(index)))
        else:
            ranges = ranges.at(index)
    if levels == 1:
        return Flow(Chain(layers), _last(config, shape, ranges))
    kept_channels = max(1, channels // 4) if config.kept == "quarter" else -(-channels // 2)
    inner = (kept_channels, *shape[1:])
    groups, factored = config.prior_groups, channels - kept_channels
    if factored < groups:
        raise InputError(f"{factored} channels are factored out of a level, fewer than {groups} prior_groups")
    cuts = [kept_channels + factored * i // groups for i in range(groups + 1)]
    # The kept channels are the context of all groups; the last group is given those before it as well.
    prior: Distribution = _prior(config, inner, kept_channels, cuts[1], ranges, places)
    for known, out in pairwise(cuts[1:]):
        mask = torch.arange((out - kept_channels) * places) < (known - kept_channels) * places
        prior = Split(mask, _prior(config, (known, *shape[1:]), known, out, ranges, places), prior)
    mask = torch.arange(prod(shape)) < kept_channels * places
    base_law = _level(config, inner, levels - 1, ranges.at(slice(kept_channels * places)), generator)
    return Flow(Chain(layers), Split(mask, prior, base_law))


def _last(config: IntegerConfig, shape: Shape, ranges: _Ranges) -> Distribution:
    """The law of the last level: colour by colour, places far apart first, in groups that grow."""
    count, G = prod(shape), config.groups
    if count < G:
        raise InputError(f"the last level has {count} entries, fewer than {G} groups")
    order = (torch.arange(shape[0])[:, None] * shape[1] * shape[2] + spread(*shape[1:])).flatten()
    # Entries of early groups cost most, so these are small: sizes grow linearly, from at least one entry.
    cuts = [max(g, round(count * g * g / G**2)) for g in range(1, G + 1)]
    start = order[: cuts[0]].sort().values
    offset, scale = ranges.at(start)
    law: Distribution = LogisticMixture(len(start), config.components, None, offset, scale / 3)
    for known, end in pairwise(cuts):
        entries = order[:end].sort().values
        mask = torch.isin(entries, order[:known])
        inputs, outputs = ranges.at(entries[mask]), ranges.at(entries[~mask])
        law = Split(mask, _logistic(config, (known, 1, 1), config.components, inputs, outputs), law)
    return law


def _prior(
    config: IntegerConfig, shape: Shape, known: int, out: int, ranges: _Ranges, places: int
) -> ConditionalLogistic | ConditionalWindow:
    """The law of the channels from ``known`` to ``out`` given those before."""
    inputs, outputs = ranges.at(slice(known * places)), ranges.at(slice(known * places, out * places))
    if config.prior == "logistic":
        return _logistic(config, shape, config.prior_components, inputs, outputs)
    K = 2 * int(outputs.scale.max())
    net = _net(config, shape, out - known, K + 2, True, 1)
    wired = Rescaled(net, *inputs, torch.ones(len(outputs.scale)), False)
    return ConditionalWindow(wired, (outputs.offset - outputs.scale).long(), K)


def _logistic(
    config: IntegerConfig, shape: Shape, components: int, inputs: _Ranges, outputs: _Ranges
) -> ConditionalLogistic:
    """A mixture of logistic laws of some entries given ``inputs`` of ``shape``."""
    dim = len(outputs.scale)
    net = _net(config, shape, dim // (shape[1] * shape[2]), 2 if components == 1 else 3 * components, True)
    wired = Rescaled(net, *inputs, torch.ones(dim), False, config.start == "linear")
    return ConditionalLogistic(wired, dim, components, outputs.offset, outputs.scale / 3)


def _coupling(config: IntegerConfig, shape: Shape, ranges: _Ranges) -> Coupling:
    """A coupling that transforms the last channels given the first ones."""
    channels, places = shape[0], shape[1] * shape[2]
    moved = max(1, channels // (4 if config.split == "quarter" else 2))
    known = channels - moved
    # With a factor of 0 the head must not be 0 too: neither would have a gradient.
    net = _net(config, (known, *shape[1:]), moved, 1, not config.rezero)
    cut = known * places
    wired = Rescaled(net, *ranges.at(slice(cut)), ranges.scale[cut:], config.rezero)
    return Coupling(IntegerShift(), wired, torch.arange(prod(shape)) < cut)


def _net(
    config: IntegerConfig, shape: Shape, out: int, num_params: int, zero_head: bool, head_kernel: int = 3
) -> DenseNet:
    with naming_setting("hidden_size"):
        return DenseNet(
            shape[0], out, shape[1:], num_params, hidden_size=config.hidden_size,
            depth=config.num_hidden_layers, zero_head=zero_head, activation=config.activation,
            norm=config.norm, head_kernel=head_kernel,
        )  # fmt: skip


register(Family("integer", "images", IntegerConfig, integer))
