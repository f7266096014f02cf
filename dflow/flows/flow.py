"""A bijector with a base distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from dflow.core import Bijector, Context, Distribution, agreed


class Flow(Distribution):
    """``log p(x) = log base(z) + log_det`` with ``z, log_det = bijector(x)``.

    On Z/K log_det is 0: a flow permutes the probabilities of the base.
    """

    def __init__(self, bijector: Bijector, base: Distribution) -> None:
        super().__init__()
        self.bijector = bijector
        self.base = base

    def transform(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det ``(batch,)``."""
        return self.bijector.forward(x, context)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``."""
        z, log_det = self.transform(x, context)
        return self.base.log_prob(z, context) + log_det

    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws: those of the base, mapped by the inverse of the bijector."""
        return self.bijector.inverse(self.base.sample(n, context, generator), context)[0]

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """Whether the inverse of the bijector recovers ``x``, and the round trip of the base succeeds."""
        z, _ = self.transform(x, context)
        same = torch.equal(self.bijector.inverse(z, context)[0], x)
        return agreed(same, self.base.round_trip(z, context))

    @property
    def num_calls(self) -> int:
        """The calls of the base and of the bijector's inverse."""
        return self.base.num_calls + self.bijector.num_calls
