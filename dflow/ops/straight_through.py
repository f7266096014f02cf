"""Hard choices forward, soft gradients backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflow.ops.modular import one_hot


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard`` to the bit, with the gradient of ``soft`` (and of ``hard``, where it has one).

    Source: Bengio, Leonard, Courville 2013, arXiv 1308.3432.
    """
    return hard + (soft - soft.detach()).to(hard.dtype)


def round_(x: Tensor) -> Tensor:
    """The nearest integers, halves to the even one, with the gradient of the identity.

    Source: Hoogeboom et al. 2019, arXiv 1905.07376.

    >>> round_(torch.tensor([0.5, 1.5, -2.6]))
    tensor([ 0.,  2., -3.])
    """
    return straight_through(x.detach().round(), x)


def sign_(x: Tensor) -> Tensor:
    """Signs, +1 for 0, with the gradient of ``clamp(x, -1, 1)``.

    Source: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio 2016, arXiv 1602.02830.

    >>> sign_(torch.tensor([-0.3, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])
    """
    return straight_through(signs(x.detach()), x.clamp(-1, 1))


def signs(x: Tensor) -> Tensor:
    """+1 where ``x >= 0``, else -1, in its dtype."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def binary_concrete(logit: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """``h`` on {-1, +1} with ``P(h = +1) = sigmoid(logit)``, and the gradient of its relaxation.

    ``h = sign(logit + noise)`` with logistic noise, by the gradient of ``tanh((logit + noise) / (2 *
    temperature))`` for the logit; none reaches the noise.

    Source: Maddison, Mnih, Teh 2017, arXiv 1611.00712, appendix B (the binary concrete law).

    Raises:
        ValueError: a temperature that is not positive and finite.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")
    result: Tensor = _BinaryConcrete.apply(logit, noise, temperature)  # type: ignore[no-untyped-call]
    return result


class _BinaryConcrete(torch.autograd.Function):
    """Gradient by hand: it keeps one tensor, where autograd would keep four."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor, noise: Tensor, temperature: float) -> Tensor:
        x = logit + noise
        soft = torch.tanh(x / (2 * temperature))
        ctx.save_for_backward(soft)
        ctx.temperature = temperature
        return signs(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (soft,) = ctx.saved_tensors
        return g * (1 - soft * soft) / (2 * ctx.temperature), None, None


class StraightThrough:
    """Straight-through arg-max, shared by the layers of one model so that one schedule moves them all.

    ``hard = one_hot(argmax(logits + noise * gumbel))`` with the gradient of
    ``softmax((logits + noise * gumbel) / temperature)``. Noise 0 is the straight-through arg-max
    (Bengio et al. 2013; Tran et al. 2019), noise 1 the straight-through Gumbel-softmax (Jang et al.
    2017; Maddison et al. 2017).

    Only the differentiable mode uses this object, and so the noise; the exact mode does not.

    Raises:
        ValueError: ``temperature`` not positive, or ``noise`` negative, here or when it is set later.

    >>> StraightThrough()(torch.tensor([0.0, 2.0]))
    tensor([0., 1.])
    """

    def __init__(self, temperature: float = 1.0, noise: float = 0.0) -> None:
        self.temperature = temperature
        self.noise = noise

    @property
    def temperature(self) -> float:
        """Temperature of the soft-max that gives the gradient."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"temperature must be positive and finite, found {value}")
        self._temperature = float(value)

    @property
    def noise(self) -> float:
        """Factor of the Gumbel noise."""
        return self._noise

    @noise.setter
    def noise(self, value: float) -> None:
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"noise must be finite and at least 0, found {value}")
        self._noise = float(value)

    def __repr__(self) -> str:
        return f"StraightThrough(temperature={self.temperature}, noise={self.noise})"

    def perturb(self, logits: Tensor) -> Tensor:
        """``logits + noise * gumbel``, the logits themselves where the noise is 0."""
        if self.noise == 0:
            return logits
        gumbel = -torch.empty_like(logits).exponential_().log_()
        return logits + self.noise * gumbel

    def __call__(self, logits: Tensor) -> Tensor:
        """One-hot rows of the shape and dtype of ``logits`` ``(..., K)``."""
        logits = self.perturb(logits)
        hard = one_hot(logits.argmax(-1), logits.shape[-1], logits.dtype)
        if not (logits.requires_grad and torch.is_grad_enabled()):
            return hard
        return straight_through(hard, torch.softmax(logits / self.temperature, -1))


def _constant(fraction: float, start: float, end: float) -> float:
    return start


def _linear(fraction: float, start: float, end: float) -> float:
    return start + (end - start) * fraction


def _cosine(fraction: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def _exponential(fraction: float, start: float, end: float) -> float:
    if not (start > 0 and end > 0):
        raise ValueError(f"an exponential schedule needs positive ends, found {start} and {end}")
    return float(start * (end / start) ** fraction)


#: Schedules ``(fraction of training in [0, 1], start, end) -> value``; `scheduled` checks its arguments.
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}


def scheduled(name: str, fraction: float, start: float, end: float) -> float:
    """The value of schedule ``name`` after ``fraction`` of the way from ``start`` to ``end``.

    Raises:
        ValueError: unknown name, fraction outside [0, 1], an exponential schedule from or to 0.

    >>> scheduled("exponential", 0.5, 1.0, 0.25)
    0.5
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], found {fraction}")
    return SCHEDULES[name](fraction, start, end)
