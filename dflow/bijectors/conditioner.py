"""Layers with a conditioner: their base class, and the checks of the parameters that a net returns."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from dflow.core import Bijector, Context, Elementwise


class Conditioned(Bijector):
    """A layer that maps some entries by a family of one dimension, whose parameters a net gives."""

    elementwise: Elementwise

    @abstractmethod
    def params(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters of the entries that are `moved`, ``(batch, moved, num_params)``."""

    @abstractmethod
    def moved(self, context: Context | None = None) -> Tensor:
        """The entries that are mapped, int64 ``(moved,)``."""


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which parameters are computed: autocast off.

    On Z/K an arg-max of the parameters selects the map. In half precision the differentiable mode and the
    exact mode would select different maps wherever two logits are close.
    """
    return torch.autocast(device_type=x.device.type, enabled=False)


def check_params(params: Tensor, batch: int, dim: int, num_params: int) -> Tensor:
    """``params`` itself when its shape is ``(batch, dim, num_params)``; otherwise a ValueError."""
    if params.shape != (batch, dim, num_params):
        raise ValueError(
            f"the net gave params of shape {tuple(params.shape)}, expected {(batch, dim, num_params)}"
        )
    return params
