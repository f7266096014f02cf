"""Discrete coupling flows over images: family ``modular``.

The values of a pixel are symbols of Z/K. Each coupling permutes (or shifts) the values of its hidden pixels,
by a network of signs or of floats over its known pixels. The base is a law of independent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dflow.bijectors import Chain, Coupling
from dflow.config import InputError
from dflow.core import Bijector, Distribution
from dflow.distributions import Categorical
from dflow.elementwise import DISCRETE
from dflow.flows import Flow
from dflow.nn.binary import SymbolPerceptron, WeightKind
from dflow.ops.orders import spread
from dflow.ops.straight_through import StraightThrough
from dflow.zoo.family import MAPS, Family, register
from dflow.zoo.settings import choice, setting
from dflow.zoo.values import MISSING, ValuesConfig

#: Most weights that the last layer of a coupling's network may have.
_MOST = 1 << 26

_WEIGHTS: dict[str, WeightKind] = {"float": "float", "binary": "sign", "probabilistic": "tanh"}


@dataclass
class ModularConfig(ValuesConfig):
    """Images of a few values under couplings on Z/K and a factorized base."""

    num_flows: int = setting(
        8, "couplings, fine to coarse: each halves the number of untransformed pixels", least=1
    )
    elementwise: str = choice("rank", DISCRETE, "family on Z/K")
    kind: Literal["float", "binary", "probabilistic"] = setting(
        "float",
        "weights of the networks: float (with ReLU), binary (signs, trained by straight-through gradients), "
        "probabilistic (random signs; their means are propagated in evaluation)",
    )
    hidden_size: int = setting(512, "units of a hidden layer", least=1)
    num_hidden_layers: int = setting(2, "hidden layers of a network", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shape or not self.levels:
            return
        levels = self.levels[0]
        if len(self.levels) > 1 or levels is None or levels < 2 or any(self.lowest):
            raise InputError(
                f"family modular takes values 0..K-1 of every entry, found levels {self.levels} and lowest "
                f"{self.lowest}; use family integer"
            )
        pixels = self.shape[1] * self.shape[2]
        most = pixels.bit_length() - 1
        if self.num_flows > most:
            raise InputError(
                f"num_flows={self.num_flows}: {pixels} pixels can be halved {most} times; use at most {most}"
            )
        if self.dim // 2 * levels * self.hidden_size > _MOST:
            raise InputError(
                f"a coupling of {self.dim // 2:,} entries of {levels} values would have "
                f"{levels * self.hidden_size:,} weights for each; use fewer bits (data.bits), a patch "
                "(data.patch), or a smaller hidden_size"
            )

    def about(self) -> str:
        """See `ValuesConfig.about`."""
        return f"flow of {self.num_flows} couplings ({self.elementwise}) by networks of kind {self.kind}"


def modular(config: ModularConfig) -> Distribution:
    """Tran et al. 2019 (arXiv 1905.10347), couplings; ranks as in Lindt and Hoogeboom 2021.

    Raises:
        InputError: shape or levels are missing.
    """
    if not config.shape or not config.levels or config.levels[0] is None:
        raise InputError(MISSING)
    K = config.levels[0]
    channels, height, width = config.shape
    # All colours of a pixel are known, or all are hidden.
    rank = torch.empty(height * width, dtype=torch.int64)
    rank[spread(height, width)] = torch.arange(height * width)
    rank = rank.repeat(channels)
    estimator = StraightThrough()
    layers: list[Bijector] = []
    for level in range(config.num_flows):
        end, start = height * width >> level, height * width >> (level + 1)
        known, hidden = rank < start, (rank >= start) & (rank < end)
        elementwise = DISCRETE[config.elementwise](K, estimator)
        net = SymbolPerceptron(
            K,
            elementwise.num_params,
            int(known.sum()),
            int(hidden.sum()),
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            weights=_WEIGHTS[config.kind],
        )
        layers.append(Coupling(elementwise, net, known, hidden))
    return Flow(Chain(layers), Categorical(config.dim, K, learned=False))


register(Family("modular", "images", ModularConfig, modular, rules=MAPS, pieces_matter=True))
