"""Layers with a conditioner: their base class, and the checks of the parameters that a net returns."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from dflow.core import Bijector, Context, Elementwise
from dflow.ops.precision import at_least_float32


class Conditioned(Bijector):
    """A layer that maps some entries by a family of one dimension, whose parameters a net gives."""

    elementwise: Elementwise

    @abstractmethod
    def params(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters of the entries that are `moved`, ``(batch, moved, num_params)``."""

    @abstractmethod
    def moved(self, context: Context | None = None) -> Tensor:
        """The entries that are mapped, int64 ``(moved,)``."""


def check_params(params: Tensor, batch: int, dim: int, num_params: int) -> Tensor:
    """``params``, at least float32; a ValueError unless they are ``(batch, dim, num_params)``."""
    if params.shape != (batch, dim, num_params):
        raise ValueError(
            f"the net gave params of shape {tuple(params.shape)}, expected {(batch, dim, num_params)}"
        )
    return at_least_float32(params)
