"""A small integer flow whose weights are given by a formula: the same on every machine."""

from __future__ import annotations

import math

import torch

from dflow import zoo
from dflow.core import Distribution
from dflow.distributions.logistic import Logistics

SETTINGS = {
    "levels": [256], "num_levels": 2, "num_flows": 2, "hidden_size": 8, "num_hidden_layers": 2,
    "components": 3,
}  # fmt: skip


def tiny_flow(shape: tuple[int, int, int] = (1, 8, 8), **settings: object) -> Distribution:
    """In evaluation mode, float32. Weights are multiples of 2^-10, by a linear congruence."""
    values = SETTINGS | {"shape": list(shape)} | settings
    law = zoo.build_image("integer", zoo.settings("integer", values))
    assert isinstance(law, Distribution)
    state = 1
    with torch.no_grad():
        for name, parameter in law.named_parameters():
            # Networks of outputs about as large as their inputs; bases that stay near to where they start.
            fan = 16 if name.endswith("raw") or parameter.ndim < 2 else math.prod(parameter.shape[1:])
            size = int(512 / math.sqrt(fan)) + 1
            numbers = []
            for _ in range(parameter.numel()):
                state = (state * 1664525 + 1013904223) % (1 << 32)
                numbers.append((state >> 16) % (2 * size + 1) - size)
            parameter.copy_(torch.tensor(numbers).view_as(parameter) / 1024)
        for module in law.modules():
            if isinstance(module, Logistics):
                # Their last bits come from a mathematical library.
                for value in (module.centre, module.unit):
                    value.copy_((value * 64).round() / 64)
    return law.eval()
