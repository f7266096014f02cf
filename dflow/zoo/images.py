"""Families over images and tables: their settings, and their builders.

Tensors are flat, ``(batch, C*H*W)`` in C, H, W order; networks and 1x1 convolutions reshape inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from dflow.bijectors import ActNorm, Autoregressive, Chain, Conv1x1, Coupling, Inverse, Permute, squeeze
from dflow.config import InputError
from dflow.core import Bijector, Distribution, Elementwise
from dflow.dequantize import (
    Columns,
    Dequantized,
    Dequantizer,
    FlowDequantizer,
    Hypercube,
    NormalDequantizer,
    Orthant,
    Partition,
    TruncatedNormal,
    Uniform,
    Units,
)
from dflow.distributions import ConditionalNormal, CovarianceNormal, Gaussian, Normal, StandardNormal
from dflow.elementwise import Affine, MixtureLogistic, Spline
from dflow.flows import Flow, Split
from dflow.nn.densenet import DenseNet
from dflow.nn.masked_conv import MaskedConv
from dflow.nn.perceptron import Perceptron
from dflow.zoo.family import BOUNDS, Family, register
from dflow.zoo.settings import setting
from dflow.zoo.values import LARGEST, MISSING, Shape, ValuesConfig, naming_setting


@dataclass
class DequantizedConfig(ValuesConfig):
    """Discrete data under a density p(v), by a dequantizer q(v | x) on the cells of a partition."""

    partition: Literal["hypercube", "orthant"] = setting(
        "hypercube", "cells of values: hypercube ([x, x + 1)); orthant (above or below 1/2, for binary data)"
    )
    density: Literal["diagonal", "covariance", "flow"] = setting(
        "flow", "density p(v): diagonal or covariance (Gaussian), flow (multi-scale)"
    )
    fit: Literal["moments", "gradient"] = setting(
        "moments", "how a Gaussian density is fitted: moments (closed form), gradient"
    )
    dequantizer: Literal["uniform", "normal", "covariance", "bipartite", "autoregressive", "truncated"] = (
        setting(
            "uniform",
            "dequantizer q(v | x): uniform; normal or covariance (by a sigmoid, on orthants softplus); "
            "bipartite or autoregressive flow; truncated (truncated normals of a Gaussian density)",
        )
    )
    num_levels: int = setting(
        1, "levels of a flow; half of the entries are factored out between two levels", least=1
    )
    num_flows: int = setting(8, "couplings of a level", least=1)
    elementwise: Literal["affine", "spline", "mixture"] = setting(
        "spline", "family of a coupling: affine, spline, mixture (of logistic laws)"
    )
    spline_bins: int = setting(8, "bins of a spline", least=1)
    mixture_components: int = setting(4, "components of a mixture", least=1)
    mixing: Literal["rotate", "permute"] = setting(
        "rotate",
        "between couplings: rotate (1x1 convolutions); permute, which keeps edges of cells along the axes",
    )
    conditioner: Literal["densenet", "perceptron"] = setting(
        "densenet", "networks: densenet (convolutions); perceptron, which takes an image as a vector"
    )
    hidden_size: int = setting(96, "width of a network", least=1)
    num_hidden_layers: int = setting(4, "layers of a network", least=1)
    context_size: int = setting(16, "channels of a dequantizer's context", least=1)
    dequantizer_flows: int = setting(
        4, "couplings, or autoregressive layers, of a dequantizer that is a flow", least=1
    )
    dequantizer_elementwise: Literal["affine", "spline", "mixture"] = setting(
        "affine", "elementwise family of a dequantizer that is a flow: affine, spline, mixture"
    )
    dequantizer_hidden_size: int = setting(64, "width of a dequantizer's networks", least=1)
    dequantizer_hidden_layers: int = setting(2, "layers of a dequantizer's networks", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels and all(n is None for n in self.levels):
            raise InputError(
                "every column is real, so there is nothing to dequantize: give data with a discrete column"
            )
        if self.dequantizer == "truncated" and self.density == "flow":
            raise InputError(
                "dequantizer 'truncated' is that of a Gaussian: use density diagonal or covariance, or "
                "another dequantizer"
            )
        if self.dequantizer == "uniform" and self.partition == "orthant":
            raise InputError(
                "orthants have no uniform law: use partition hypercube, or dequantizer normal, covariance, "
                "bipartite, autoregressive or truncated"
            )
        others = [r for r in self.ranges if r not in (None, (0, 1))] if self.shape and self.levels else []
        if self.partition == "orthant" and others:
            raise InputError(
                f"partition 'orthant' is for entries of 0 and 1, found {others[0]}; use hypercube"
            )
        if self.density == "flow" and self.dim == 1:
            raise InputError("a coupling needs two entries or more; use density diagonal")
        if self.shape and self.num_levels > 1 and self.dim >> (self.num_levels - 1) < 2:
            raise InputError(f"num_levels {self.num_levels} leave less than two of {self.dim} entries")

    def about(self) -> str:
        """See `ValuesConfig.about`."""
        return f"{self.dequantizer} dequantizer on {self.partition}s, {self.density} density"

    @property
    def support(self) -> list[tuple[int, int] | None]:
        """Range of the values with a cell: on hypercubes all that float32 resolves, on orthants 0 and 1."""
        ends = (0, 1) if self.partition == "orthant" else (-LARGEST, LARGEST)
        return [None if r is None else ends for r in self.ranges]

    @property
    def discrete(self) -> Tensor:
        """Bool ``(dim,)``: whether an entry is discrete."""
        return torch.tensor([r is not None for r in self.ranges])


def dequantized(config: DequantizedConfig) -> Dequantized:
    """Hoogeboom, Cohen and Tomczak 2020 (arXiv 2001.11235)."""
    if not config.shape or not config.levels:
        raise InputError(MISSING)
    partition = _partition(config)
    density = _density(config)
    return Dequantized(density, _dequantizer(config, partition, density), _units(config))


def _units(config: DequantizedConfig) -> Units | None:
    """The units of real columns; models of version 0.1.0 have none."""
    if not config.scale:
        return None
    loc, scale = (
        tuple(default if value is None else value for value in values)
        for values, default in ((config.loc, 0.0), (config.scale, 1.0))
    )
    return Units(loc, scale)


def _partition(config: DequantizedConfig) -> Partition:
    cells = Orthant() if config.partition == "orthant" else Hypercube()
    discrete = config.discrete.tolist()
    if all(discrete):
        return cells
    return Columns([(cells if d else None, 1) for d in discrete])


# -- densities -----------------------------------------------------------------------------------------------


def _density(config: DequantizedConfig) -> Distribution:
    learned = config.fit == "gradient"
    if config.density == "diagonal":
        return Normal(config.dim, learned=learned)
    if config.density == "covariance":
        return CovarianceNormal(config.dim, learned=learned)
    return _level(config, _shape(config), config.num_levels)


def _level(config: DequantizedConfig, shape: Shape, levels: int) -> Distribution:
    """Kingma and Dhariwal 2018 (arXiv 1807.03039), with networks as in Hoogeboom et al. 2019 (IDF)."""
    layers: list[Bijector] = []
    if shape[1] % 2 == 0 and shape[2] % 2 == 0:
        permutation, shape = squeeze(shape)
        layers.append(permutation)
    for i in range(config.num_flows):
        layers += [ActNorm(shape), Conv1x1(shape) if config.mixing == "rotate" else _shuffle(shape, i)]
        layers.append(_coupling(_family(config, config.elementwise), shape, _net(config)))
    layers.append(ActNorm(shape))
    if levels == 1:
        return Flow(Chain(layers), StandardNormal(prod(shape)))
    kept_channels = shape[0] - shape[0] // 2
    mask = torch.arange(prod(shape)) < kept_channels * shape[1] * shape[2]
    net = _net(config)((kept_channels, *shape[1:]), shape[0] - kept_channels, 2, 0)
    return Flow(
        Chain(layers),
        Split(mask, ConditionalNormal(net), _level(config, (kept_channels, *shape[1:]), levels - 1)),
    )


def _shuffle(shape: Shape, i: int) -> Permute:
    """A reversal of the channels, which swaps known and hidden ones, alternating with even channels first."""
    channels = torch.arange(shape[0])
    order = channels.flip(0) if i % 2 == 0 or shape[0] == 2 else torch.cat([channels[::2], channels[1::2]])
    return Permute(torch.arange(prod(shape)).view(shape[0], -1)[order].flatten())


def _coupling(
    elementwise: Elementwise, shape: Shape, net: _Net, context: int = 0, swap: bool = False
) -> Coupling:
    """A coupling that knows the first half of the channels, or with ``swap`` the second."""
    if shape[0] < 2:
        raise InputError(
            f"{shape[1]} x {shape[2]} pixels of one channel have no halves for a coupling: use fewer "
            "num_levels, conditioner perceptron, or data of an even height and width (data.patch, data.crop)"
        )
    known = shape[0] - shape[0] // 2
    mask = torch.arange(prod(shape)) < known * shape[1] * shape[2]
    if swap:
        mask, known = ~mask, shape[0] - known
    return Coupling(
        elementwise, net((known, *shape[1:]), shape[0] - known, elementwise.num_params, context), mask
    )


def _family(config: DequantizedConfig, name: str, bound: float = 2.0) -> Elementwise:
    if name == "affine":
        return Affine(bound)
    return Spline(config.spline_bins) if name == "spline" else MixtureLogistic(config.mixture_components)


def _shape(config: DequantizedConfig) -> Shape:
    """The shape of an image as networks take it: for a perceptron a vector."""
    channels, height, width = config.shape
    return (config.dim, 1, 1) if config.conditioner == "perceptron" else (channels, height, width)


#: (input shape, output channels, params an entry, context channels, zero head) -> network.
_Net = Callable[..., DenseNet | Perceptron]


def _net(config: DequantizedConfig, of_dequantizer: bool = False) -> _Net:
    hidden, layers = config.hidden_size, config.num_hidden_layers
    if of_dequantizer:
        hidden, layers = config.dequantizer_hidden_size, config.dequantizer_hidden_layers

    def build(
        shape: Shape, out: int, num_params: int, context: int, zero_head: bool = True
    ) -> DenseNet | Perceptron:
        channels, height, width = shape
        if config.conditioner == "perceptron":
            return Perceptron(
                channels * height * width, out * height * width, num_params,
                hidden_size=hidden, num_layers=layers, context_features=context * height * width,
                zero_head=zero_head,
            )  # fmt: skip
        with naming_setting("dequantizer_hidden_size" if of_dequantizer else "hidden_size"):
            return DenseNet(
                channels, out, (height, width), num_params=num_params, hidden_size=hidden, depth=layers,
                context_channels=context, zero_head=zero_head,
            )  # fmt: skip

    return build


# -- dequantizers --------------------------------------------------------------------------------------------


class _Scaled(nn.Module):
    """A network after a rescaling of the data to [-1, 1] and a permutation; ``flat`` returns features."""

    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        net: DenseNet | Perceptron,
        config: DequantizedConfig,
        permutation: Permute | None = None,
        flat: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.permutation, self.flat = net, permutation, flat
        # A real column is in its units already.
        pairs = [
            (0.0, 1.0) if r is None else ((r[0] + r[1]) / 2, max(r[1] - r[0], 1) / 2) for r in config.ranges
        ]
        self.register_buffer("offset", torch.tensor([offset for offset, _ in pairs]))
        self.register_buffer("scale", torch.tensor([scale for _, scale in pairs]))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self.scale.dtype) - self.offset) / self.scale
        if self.permutation is not None:
            x, _ = self.permutation(x)
        out: Tensor = self.net.features(x) if self.flat else self.net(x)
        return out


def _dequantizer(config: DequantizedConfig, partition: Partition, density: Distribution) -> Dequantizer:
    kind, shape = config.dequantizer, _shape(config)
    if kind == "uniform":
        return Uniform(partition)
    if kind == "truncated":
        if not isinstance(density, Gaussian):
            raise InputError("dequantizer 'truncated' is that of a Gaussian density")
        return TruncatedNormal(partition, density)
    discrete = int(config.discrete.sum())
    entries: Shape = shape
    if discrete < config.dim:
        if config.conditioner != "perceptron":
            raise InputError("a table with real columns has no neighbours: use conditioner perceptron")
        entries = (discrete, 1, 1)
    net = _net(config, True)
    if kind in ("normal", "covariance"):
        params = 2 if kind == "normal" else 2 + discrete
        head = net(shape, entries[0], params, 0)
        return NormalDequantizer(partition, _Scaled(head, config), full=kind == "covariance")
    layers: list[Bijector] = []
    permutation: Permute | None = None
    if kind == "bipartite":
        if discrete < 2:
            raise InputError("a bipartite dequantizer needs two entries or more; use 'normal'")
        channels, height, width = config.shape
        if height % 2 == 0 and width % 2 == 0:
            # Known and hidden pixels of a coupling are then neighbours, for perceptrons too.
            permutation, squeezed = squeeze((channels, height, width))
            if config.conditioner == "densenet":
                shape = entries = squeezed
        family = _family(config, config.dequantizer_elementwise)
        layers = [
            _coupling(family, entries, net, config.context_size, swap=i % 2 == 1)
            for i in range(config.dequantizer_flows)
        ]
        if permutation is not None:
            # A second Permute, since no two names of a saved model may share a tensor.
            layers = [*layers, Inverse(Permute(permutation.permutation))]
    else:
        # Noise to z in one pass: each entry given the noise before it. The paper bounds the scale by tanh.
        family = _family(config, config.dequantizer_elementwise, 1.0)
        for i in range(config.dequantizer_flows):
            layers += [Permute(torch.arange(discrete - 1, -1, -1))] * (i > 0)
            with naming_setting("dequantizer_hidden_size"):
                conv = MaskedConv(
                    entries, family.num_params, hidden_size=config.dequantizer_hidden_size,
                    depth=config.dequantizer_hidden_layers, context_channels=config.context_size,
                )  # fmt: skip
            layers.append(Autoregressive(family, conv, discrete))
    context = _Scaled(net(shape, config.context_size, 1, 0, zero_head=False), config, permutation, flat=True)
    return FlowDequantizer(partition, Chain(layers), context)


register(Family("dequantized", "images", DequantizedConfig, dequantized, rules=BOUNDS))
