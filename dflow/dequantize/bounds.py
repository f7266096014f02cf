"""Bounds of ``log P(x)`` from log weights ``log p(v_k) - log q(v_k|x)``, and what may be reported of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bound(ABC):
    """A function of log weights ``lw`` ``(k, batch)``, in nats.

    Raises:
        ValueError: k < 1, or ``lw`` with another number of rows than k.
    """

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, found {self.k}")

    @property
    @abstractmethod
    def name(self) -> str:
        """What the value is called."""

    @property
    def is_lower_bound(self) -> bool:
        """The expectation of the value is at most ``log P(x)``, whatever p and q."""
        return True

    @property
    def picks_one(self) -> bool:
        """The value is one of the k log weights."""
        return self.k == 1

    @abstractmethod
    def value(self, lw: Tensor) -> Tensor:
        """The bound ``(batch,)``."""

    @abstractmethod
    def weights(self, lw: Tensor) -> Tensor:
        """Derivative of `value` by ``lw``, ``(k, batch)``; columns sum to 1. Without gradient."""

    def _check(self, lw: Tensor) -> None:
        if lw.ndim != 2 or len(lw) != self.k:
            raise ValueError(f"expected log weights ({self.k}, batch), found {tuple(lw.shape)}")


@dataclass(frozen=True)
class Elbo(Bound):
    """``mean_k lw``: variational dequantization (vi), equation 1. k lowers the variance only.

    Source: Ho et al. 2019, arXiv 1902.00275; Hoogeboom et al. 2020, arXiv 2001.11235.
    """

    @property
    def name(self) -> str:
        """``elbo``."""
        return "elbo"

    def value(self, lw: Tensor) -> Tensor:
        """``mean_k lw``."""
        self._check(lw)
        return lw.mean(0)

    def weights(self, lw: Tensor) -> Tensor:
        """``1 / k``."""
        self._check(lw)
        return torch.full_like(lw, 1 / self.k, requires_grad=False)


@dataclass(frozen=True)
class Iwbo(Bound):
    """``log mean_k exp(lw)``: importance-weighted (iw), equation 3; rises to ``log P(x)`` with k.

    Source: Burda et al. 2016, arXiv 1509.00519; Hoogeboom et al. 2020, arXiv 2001.11235.
    """

    @property
    def name(self) -> str:
        """``iwbo`` and k."""
        return f"iwbo({self.k})"

    def value(self, lw: Tensor) -> Tensor:
        """``log mean_k exp(lw)``."""
        self._check(lw)
        return torch.logsumexp(lw, 0) - math.log(self.k)

    def weights(self, lw: Tensor) -> Tensor:
        """``softmax_k(lw)``."""
        self._check(lw)
        return torch.softmax(lw.detach(), 0)


@dataclass(frozen=True)
class Renyi(Bound):
    """``log mean_k exp((1 - alpha) lw) / (1 - alpha)``, at its limits where that is not defined.

    alpha 0 is `Iwbo`, 1 `Elbo`, -inf the largest log weight (VR-max, equation 4), inf the smallest. For
    given draws it does not rise with alpha. Below 0 it is no bound: with k it rises beyond ``log P(x)``.

    Source: Li and Turner 2016, arXiv 1602.02311; Hoogeboom et al. 2020, arXiv 2001.11235, section 3.4.

    Raises:
        ValueError: alpha nan, and see `Bound`.
    """

    alpha: float = -math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isnan(self.alpha):
            raise ValueError("alpha must be a number, found nan")

    @property
    def name(self) -> str:
        """``vr-max``, or ``renyi``, with k and alpha."""
        if self.alpha == -math.inf:
            return f"vr-max({self.k})"
        return f"renyi({self.k}, alpha={self.alpha:g})"

    @property
    def is_lower_bound(self) -> bool:
        """True from alpha 0 on: up to 1 by Jensen's inequality, beyond as it is at most the elbo."""
        return self.alpha >= 0 or self.k == 1

    @property
    def picks_one(self) -> bool:
        """At infinite alpha."""
        return self.k == 1 or math.isinf(self.alpha)

    def value(self, lw: Tensor) -> Tensor:
        """``log mean_k exp((1 - alpha) lw) / (1 - alpha)``."""
        self._check(lw)
        delta = 1 - self.alpha
        if delta == 0:
            return lw.mean(0)
        top = lw.max(0).values if delta > 0 else lw.min(0).values
        if math.isinf(delta):
            return top
        # Its exponents are at most 0 and its digits remain as delta goes to 0; the gradient by top is 0.
        top = top.detach()
        return top + torch.log1p(torch.expm1(delta * (lw - top)).mean(0)) / delta

    def weights(self, lw: Tensor) -> Tensor:
        """``softmax_k((1 - alpha) lw)``: 1 for the largest or smallest at infinite alpha."""
        self._check(lw)
        lw, delta = lw.detach(), 1 - self.alpha
        if math.isinf(delta):
            index = lw.argmax(0, keepdim=True) if delta > 0 else lw.argmin(0, keepdim=True)
            return torch.zeros_like(lw).scatter_(0, index, 1)
        return torch.softmax(delta * lw, 0)


@dataclass(frozen=True)
class Estimate:
    """Values of a bound, in nats ``(batch,)``, each an unbiased estimate of its expectation."""

    values: Tensor
    name: str
    is_lower_bound: bool

    def bits(self) -> Tensor:
        """Code length ``-value / log 2`` of each row: in expectation an upper bound of ``-log2 P(x)``.

        Raises:
            ValueError: a value that guarantees nothing.
        """
        if not self.is_lower_bound:
            raise ValueError(
                f"{self.name} is no lower bound of log P(x): it may lie above it, and would report too few "
                "bits. Use iwbo for a likelihood; this value is an objective"
            )
        return self.values / -math.log(2)

    def bits_per_dim(self, dim: int) -> Tensor:
        """`bits` over the number of entries of the data; errors as in `bits`, and for dim < 1."""
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}")
        return self.bits() / dim
