"""Composition and inverse of bijectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from dflow.bijectors.permute import no_log_det
from dflow.core import Bijector, Context


class Chain(Bijector):
    """``z = b_n(... b_1(x))``: `forward` applies the bijectors in the order given.

    log_det and num_calls add up. Without bijectors it is the identity.
    """

    def __init__(self, bijectors: Iterable[Bijector]) -> None:
        super().__init__()
        self.bijectors = nn.ModuleList(bijectors)

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent, first bijector first: z like ``x``, log_det ``(batch,)``."""
        total = no_log_det(x)
        for bijector in self:
            x, log_det = bijector.forward(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data, last bijector first: x like ``z``, log_det ``(batch,)``."""
        total = no_log_det(z)
        for bijector in reversed(list(self)):
            z, log_det = bijector.inverse(z, context)
            total = total + log_det
        return z, total

    def __iter__(self) -> Iterator[Bijector]:
        yield from self.bijectors  # type: ignore[misc]

    def layers(self) -> Iterator[Bijector]:
        """The layers of each bijector in turn."""
        for bijector in self:
            yield from bijector.layers()

    def __len__(self) -> int:
        return len(self.bijectors)

    def __getitem__(self, index: int) -> Bijector:
        return self.bijectors[index]  # type: ignore[return-value]

    @property
    def num_calls(self) -> int:
        """Sum over the bijectors."""
        return sum(bijector.num_calls for bijector in self)

    @property
    def forward_calls(self) -> int:
        """Sum over the bijectors."""
        return sum(forward_calls(bijector) for bijector in self)


class Inverse(Bijector):
    """The inverse of a bijector: its `forward` is the other's `inverse`."""

    def __init__(self, bijector: Bijector) -> None:
        super().__init__()
        self.bijector = bijector

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """The other's `inverse`."""
        return self.bijector.inverse(x, context)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """The other's `forward`."""
        return self.bijector.forward(z, context)

    @property
    def num_calls(self) -> int:
        """Network calls of the other's `forward`."""
        return forward_calls(self.bijector)

    @property
    def forward_calls(self) -> int:
        """Network calls of the other's `inverse`."""
        return self.bijector.num_calls


def forward_calls(bijector: Bijector) -> int:
    """Sequential network evaluations of ``bijector.forward``; at most ``num_calls`` where unknown."""
    calls: int = getattr(bijector, "forward_calls", bijector.num_calls)
    return calls
