"""The three contracts everything in dflow is written against.

The dtype is the mode. On Z/K a floating tensor holds one-hot rows ``(batch, dim, K)`` and is
differentiable; an int64 tensor holds symbols ``(batch, dim)`` and is exact. Integers in, integers
out; floats in, floats out. Both modes agree on every hard input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

#: What a model is conditioned on. For sequences of varying length: the lengths, int64 ``(batch,)``;
#: entries at positions at or beyond the length are absent. Inside `Split`, the kept entries.
Context = Tensor | tuple[Tensor, ...] | None


class Bijector(nn.Module, ABC):
    """An invertible map between data ``x`` and latent ``z`` of the same shape.

    ``log_det`` is the log of the absolute Jacobian determinant of the map just applied, in nats, of
    shape ``(batch,)``; it is exactly 0 on Z/K and on the integers.
    """

    @abstractmethod
    def forward(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Data to latent: ``(z, log_det)``."""

    @abstractmethod
    def inverse(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Latent to data: ``(x, log_det)``."""

    @property
    def num_calls(self) -> int:
        """Sequential network evaluations that one `inverse` costs."""
        return 0


class Elementwise(nn.Module, ABC):
    """A family of one-dimensional bijections that holds no weights.

    ``params`` has shape ``(batch, dim, num_params)`` and comes from a conditioner. ``log_det`` has
    shape ``(batch, dim)``: one term an entry, summed by the layer that owns the family.
    """

    #: Numbers that a conditioner has to give for each entry.
    num_params: int

    #: On Z/K: whether the params of an entry are K logits that may learn to predict its symbol. Then rule
    #: ``layerwise`` of `dflow.objectives` trains it; the other rules tell there what they need.
    predicts: bool = False

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Data to latent: ``(z, log_det)``."""

    @abstractmethod
    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Latent to data: ``(x, log_det)``."""


class Distribution(nn.Module, ABC):
    """A normalised law with exact likelihood and exact sampling.

    What is only a bound is never called ``log_prob``.
    """

    @abstractmethod
    def log_prob(self, x: Tensor, context: Context = None) -> Tensor:
        """Exact log-likelihood in nats, shape ``(batch,)``."""

    @abstractmethod
    def sample(self, n: int, context: Context = None, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact draws, in the inference dtype of the domain."""

    #: Whether `log_prob` and `sample` read one table of probabilities, so that they cannot disagree.
    one_table: bool = False

    def round_trip(self, x: Tensor, context: Context = None) -> bool | None:
        """Whether what is drawn is what is scored, checked on ``x`` in the inference dtype.

        None where nothing was checked, which is what a law says that has no check of its own and is not
        `one_table`. `dflow.distributions.Stepwise` has one.
        """
        return True if self.one_table else None

    @property
    def num_calls(self) -> int:
        """Sequential network evaluations that one `sample` costs."""
        return 0


def agreed(*checks: bool | None) -> bool | None:
    """What the checks of several parts come to: False where one failed, None where one was not made.

    >>> agreed(True, None), agreed(None, False), agreed(True, True)
    (None, False, True)
    """
    return False if False in checks else None if None in checks else True


class SequenceNet(Protocol):
    """What a sequence law or layer needs of its network: one pass for scoring, a step a row for drawing.

    Networks are built with an order ``(R, S)`` (see `dflow.ops.orders`); an autoregressive layer's has S = 1.
    It also has to be an ``nn.Module``. One that can walk other orders too takes a plan as third argument of
    the call and of `start`, made by its ``plan(order)``.
    """

    def __call__(self, x: Tensor, context: Context = None) -> Tensor:
        """Params ``(batch, dim, P)`` by position in both modes; they depend on earlier rows only."""
        ...

    def start(self, batch: int, context: Context = None) -> Any:
        """State before the first call; opaque to the caller."""
        ...

    def step(self, x: Tensor | None, state: Any) -> Tensor:
        """Params ``(batch, m, P)`` of the m entries of the next row; ``x``, the last row's symbols.

        Entries at or beyond ``dim`` (padding) are in neither; ``x`` is int64, None at first.
        """
        ...
