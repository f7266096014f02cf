"""Classifiers of images: probabilistic binary networks, and networks of signs or floats of the same shape.

Family ``pbnet``, after Peters and Welling 2018 (arXiv 1809.03368): convolutions, each with pooling, batch
normalisation and a sign, then linear layers. The setting ``kind`` selects the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dflow.config import InputError
from dflow.nn.batch_norm import StochasticBatchNorm, reestimate
from dflow.nn.binary import BinaryConv2d, BinaryLayer, BinaryLinear, WeightKind
from dflow.nn.classifier import Head, Pixels, head_of
from dflow.nn.moments import StochasticMaxPool2d, StochasticSign
from dflow.ops.straight_through import signs
from dflow.zoo.family import Family, register
from dflow.zoo.settings import setting
from dflow.zoo.values import ValuesConfig

#: How a deterministic network gets its weights from random ones, see `to_deterministic`.
Rule = Literal["map", "ternary", "sample"]
#: The value of `PBNetConfig.init` that is not the folder of a network of floats.
UNIFORM = "uniform"


@dataclass
class PBNetConfig(ValuesConfig):
    """Shape of a network, and its random variables."""

    classes: int = setting(0, "number of classes (default: that of the data)")
    kind: Literal["probabilistic", "binary", "float"] = setting(
        "probabilistic",
        "weights: probabilistic (random signs), binary (signs, trained by straight-through gradients), float "
        "(with ReLU)",
    )
    channels: list[int] = setting([32, 64], "channels of each convolution", least=1)
    hidden: list[int] = setting([512], "units of each hidden linear layer", least=1)
    kernel: int = setting(3, "height and width of the convolutions")
    head: Literal["ce", "bce"] = setting(
        "ce", "loss: ce (cross-entropy of the last means), bce (binary cross-entropy of each class's sign)"
    )
    mode: Literal["propagate", "sample"] = setting(
        "sample", "activations in training: propagate (their means, PBNet), sample (draws, PBNet-S)"
    )
    parametrisation: Literal["tanh", "clip"] = setting(
        "tanh", "mean of a weight: tanh (tanh(w)), clip (w within +-0.9)"
    )
    init: str = setting(UNIFORM, "initial means: uniform, or the folder of a trained network of floats")
    concrete_temperature: float = setting(
        1.0, "temperature of the relaxation that gives drawn activations a gradient"
    )
    batch_norm: bool = setting(True, "normalise the sums of each layer")
    pooling: Literal["sample", "moments", "none"] = setting(
        "sample",
        "maximum of 2 x 2 sums: sample (of a draw), moments (its mean and variance); none (convolutions of "
        "stride 2 instead)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"kernel must be odd, found {self.kernel}")
        if self.classes == 1 or self.classes < 0:
            raise InputError(f"classes must be at least 2, found {self.classes}")
        if not 0 < self.concrete_temperature < float("inf"):
            raise InputError(
                f"concrete_temperature must be positive and finite, found {self.concrete_temperature}"
            )
        if self.head == "bce" and self.kind != "probabilistic":
            raise InputError(f"head 'bce' needs kind 'probabilistic'; with kind {self.kind!r} use 'ce'")
        if self.init != UNIFORM and self.kind != "probabilistic":
            raise InputError(f"init {self.init!r} is for kind 'probabilistic'; leave it out")
        if self.shape and any(n is None for n in self.levels):
            raise InputError("a classifier takes integers, found real columns; choose other data")
        if self.shape and min(self.shape[1:]) < 2 ** len(self.channels):
            raise InputError(
                f"images of {self.shape[1]} x {self.shape[2]} are halved {len(self.channels)} times; "
                "give fewer channels"
            )

    def about(self) -> str:
        """See `ValuesConfig.about`."""
        convolutions, others = len(self.channels), len(self.hidden) + 1
        return f"{self.kind} network of {convolutions} convolutions and {others} linear layers"


def build(config: PBNetConfig) -> nn.Sequential:
    """A sequence from integers ``(batch, dim)`` to logits ``(batch, classes)``.

    Raises:
        InputError: shape, levels or classes are missing, or values that are not ``0 .. levels - 1``.
    """
    if not config.shape or not config.levels or not config.classes:
        raise InputError("shape, levels and classes are missing; they are those of the labelled data")
    levels = config.levels[0]
    if len(config.levels) > 1 or levels is None or levels < 2 or any(config.lowest):
        raise InputError(
            f"a classifier takes images of values from 0, found levels {config.levels} and lowest "
            f"{config.lowest}"
        )
    weights: WeightKind = {"binary": "sign", "float": "float"}.get(config.kind, config.parametrisation)  # type: ignore[assignment]
    inputs, height, width = config.shape
    modules: list[nn.Module] = [Pixels((inputs, height, width), levels, unit=config.kind == "float")]

    def after(outputs: int, pooled: bool, last: bool = False) -> Iterator[nn.Module]:
        if pooled and config.pooling != "none":
            yield StochasticMaxPool2d(2, config.pooling)
        if config.batch_norm:
            yield StochasticBatchNorm(outputs)
        if not last:
            yield (
                nn.ReLU()
                if config.kind == "float"
                else StochasticSign(config.mode, config.concrete_temperature)
            )

    for outputs in config.channels:
        stride = 2 if config.pooling == "none" else 1
        modules += [BinaryConv2d(inputs, outputs, config.kernel, weights, stride), *after(outputs, True)]
        inputs = outputs
        # A stride of 2 rounds odd sizes up, a window rounds them down.
        height, width = (-(-n // 2) if stride == 2 else n // 2 for n in (height, width))
    size = inputs * height * width
    for outputs in config.hidden:
        modules += [BinaryLinear(size, outputs, weights), *after(outputs, False)]
        size = outputs
    modules += [
        BinaryLinear(size, config.classes, weights),
        *after(config.classes, False, last=True),
        Head(config.head),
    ]
    return nn.Sequential(*modules)


def layers(net: nn.Module) -> list[BinaryLayer]:
    """The layers with weights, in order."""
    return [module for module in net.modules() if isinstance(module, BinaryLayer)]


@torch.no_grad()
def transfer(net: nn.Module, floats: nn.Module) -> None:
    """Start from a trained network of floats: each layer's weights over their standard deviation, clipped.

    Raises:
        InputError: networks of other shapes.
    """
    pairs = layers(net), layers(floats)
    shapes = [[tuple(layer.weight.shape) for layer in layers_of_net] for layers_of_net in pairs]
    if shapes[0] != shapes[1]:
        raise InputError(f"init: a network of layers {shapes[1]}, and this one has {shapes[0]}")
    for layer, source in zip(*pairs, strict=True):
        layer.start(source.theta / source.theta.std())


@torch.no_grad()
def to_deterministic(
    net: nn.Sequential,
    batches: Sequence[Tensor],
    rule: Rule = "map",
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A copy of ``net`` with fixed weights on {-1, +1}, in evaluation mode, with re-estimated normalisation.

    Rule "map" takes the most probable weights, "ternary" the same but 0 where ``|theta| < 1/2``, and "sample"
    a draw. With head "bce" the last layer reports the variance that its random weights had, one number a
    class: the probabilities of the classes depend on it.

    Args:
        net: a network of random weights, or of signs (with rule "map" only).
        batches: integers ``(batch, dim)`` to re-estimate the normalisation on.
        rule: see above.
        generator: source of the draw, on the CPU.

    Raises:
        InputError: a network of floats, or of signs and another rule; an unknown rule.
    """
    if rule not in _RULES:
        raise InputError(f"unknown rule {rule!r}; known: {', '.join(_RULES)}")
    fixed = copy.deepcopy(net).eval()
    for layer in layers(fixed):
        if layer.weights == "float":
            raise InputError("a network of floats has no signs to export; train kind probabilistic or binary")
        if not layer.random and rule != "map":
            raise InputError(f"rule {rule!r} is for random weights; for a network of signs use 'map'")
        theta = layer.theta
        if layer.random and layer is layers(fixed)[-1] and head_of(fixed).kind == "bce":
            layer.noise = (1 - theta.square()).sum(1)
        layer.weights = "float"
        layer.weight.copy_(_RULES[rule](theta, generator))
        layer.weight.requires_grad_(False)
    reestimate(fixed, batches)
    return fixed


def _ternary(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    return signs(theta) * (theta.abs() >= 0.5)


def _sample(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = torch.rand(theta.shape, generator=generator).to(theta)
    return signs((1 + theta) / 2 - uniform)


_RULES: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "map": lambda theta, generator: signs(theta),
    "ternary": _ternary,
    "sample": _sample,
}

register(Family("pbnet", "labels", PBNetConfig, build, pieces_matter=True))
