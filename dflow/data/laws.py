"""Laws of sequences of symbols: what every law gives; laws given by a table, and laws that are uniform."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dflow.config import InputError

#: Largest K^dim whose outcomes are listed, so that an expectation is a sum and not an estimate.
ENUMERABLE = 1 << 18


class Law(ABC):
    """A law of sequences of ``dim`` symbols of Z/K.

    Attributes:
        note: a line that describes it.
        source: the publication that it comes from.
    """

    note: ClassVar[str]
    source: ClassVar[str]

    @property
    @abstractmethod
    def K(self) -> int:
        """Size of the alphabet."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Entries of a sequence."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws, int64 ``(n, dim)``; they depend on the generator alone, which is on the CPU."""

    @property
    @abstractmethod
    def entropy(self) -> float | None:
        """Exact entropy of a sequence in nats; None where it is not known."""

    @property
    @abstractmethod
    def factorized(self) -> float | None:
        """Sum of the exact entropies of the entries in nats: what independent entries cost at best."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor | None:
        """Exact log-probability in nats, float64 ``(batch,)``, of symbols; None where there is no entropy."""

    @cached_property
    def support(self) -> tuple[Tensor, Tensor] | None:
        """All possible outcomes, int64 ``(n, dim)``, and their probabilities, float64 ``(n,)``.

        None where K^dim is above `ENUMERABLE` or the probabilities are not known.
        """
        if self.entropy is None or self.K**self.dim > ENUMERABLE:
            return None
        x = sequences(self.K, self.dim)
        log_p = self.log_prob(x)
        if log_p is None:
            return None
        possible = log_p > -math.inf
        return x[possible], log_p[possible].exp()


def sequences(K: int, dim: int) -> Tensor:
    """All K^dim sequences, int64 ``(K^dim, dim)``, in lexicographic order."""
    return torch.arange(K**dim)[:, None] // powers(K, dim) % K


def entropy(p: Tensor) -> float:
    """Entropy in nats of probabilities of any shape, in float64."""
    return -float(torch.special.xlogy(p, p).sum())


def powers(K: int, dim: int) -> Tensor:
    """The weights ``K^(dim - 1), ..., K, 1`` of the entries in the number of a sequence: int64 ``(dim,)``."""
    return K ** torch.arange(dim - 1, -1, -1)


def check_bounds(**bounds: tuple[int, int, float]) -> None:
    """`InputError` for a parameter that is not between two bounds: ``name=(value, low, high)``."""
    for name, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise InputError(f"{name} must lie in {low}..{high}, found {value}")


class TableLaw(Law):
    """A law given by the probabilities of all its outcomes."""

    @cached_property
    @abstractmethod
    def probabilities(self) -> Tensor:
        """Float64, ``(K,) * dim``."""

    @cached_property
    def _cumulative(self) -> Tensor:
        return self.probabilities.flatten().cumsum(0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """By the inverse of the distribution function."""
        u = torch.rand(n, dtype=torch.float64, generator=generator) * self._cumulative[-1]
        # A number that rounds up to the whole mass, or meets the end of an impossible outcome exactly.
        code = torch.searchsorted(self._cumulative, u, right=True).clamp_(max=self._last)
        return code[:, None] // powers(self.K, self.dim) % self.K

    @cached_property
    def _last(self) -> int:
        return int(self.probabilities.flatten().nonzero().max())

    @cached_property
    def entropy(self) -> float:
        """By the sum over the table."""
        return entropy(self.probabilities)

    @cached_property
    def factorized(self) -> float:
        """By sums over the table."""
        marginals = (self.probabilities.movedim(i, 0).reshape(self.K, -1).sum(1) for i in range(self.dim))
        return sum(map(entropy, marginals))

    def log_prob(self, x: Tensor) -> Tensor:
        """By the table."""
        return self.probabilities.flatten()[(x * powers(self.K, self.dim)).sum(1)].log()


class UniformLaw(Law):
    """A law under which all possible sequences are equally likely."""

    @property
    @abstractmethod
    def entropy(self) -> float:
        """The log of the number of possible sequences."""

    @abstractmethod
    def possible(self, x: Tensor) -> Tensor:
        """Which of the sequences ``(batch, dim)`` are possible: bool ``(batch,)``."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Minus the entropy of a sequence that is possible."""
        possible = self.possible(x)
        log_p = torch.full(possible.shape, -self.entropy, dtype=torch.float64)
        return log_p.masked_fill(~possible, -math.inf)
