"""The standard normal law far into both tails: log Phi, the log mass of an interval, truncated draws.

All functions take float32 or float64, broadcast, and have gradients written by hand: those of autograd
overflow or cancel from a few standard deviations on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflow.ops.devices import maybe

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def log_ndtr(t: Tensor) -> Tensor:
    """``log Phi(t)``; its gradient ``phi(t) / Phi(t)`` is exact to rounding at any ``t``.

    >>> log_ndtr(torch.tensor(-40.0))
    tensor(-804.6085)
    """
    result: Tensor = _LogNdtr.apply(t)  # type: ignore[no-untyped-call]
    return result


def ndtr_logit(t: Tensor) -> Tensor:
    """``log Phi(t) - log Phi(-t)``, the log-odds that a normal of mean ``t`` and variance 1 is positive.

    Value and slope ``phi(t) / (Phi(t) Phi(-t))`` are exact to rounding at any ``t``.

    >>> ndtr_logit(torch.tensor([0.0, 1.0, -40.0]))
    tensor([   0.0000,    1.6683, -804.6085])
    """
    result: Tensor = _NdtrLogit.apply(t)  # type: ignore[no-untyped-call]
    return result


def log_interval(a: Tensor, b: Tensor) -> Tensor:
    """``log(Phi(b) - Phi(a))`` for ``a < b``, either of them infinite; -inf at a = b, nan for a > b.

    An interval nearer to the upper tail is mirrored, so that both tails are equally accurate: the error is
    about that of rounding ``a`` and ``b``.

    >>> log_interval(torch.tensor(30.0), torch.tensor(torch.inf))
    tensor(-454.3213)
    """
    result: Tensor = _LogInterval.apply(*torch.broadcast_tensors(a, b))  # type: ignore[no-untyped-call]
    return result


def truncated_normal(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """``e = Phi^-1((1 - u) Phi(a) + u Phi(b))``: a standard normal held to ``[a, b]``, for uniform ``u``.

    Gradients reach ``a`` and ``b``, ``de/da = (1 - u) phi(a) / phi(e)`` and ``de/db = u phi(b) / phi(e)``,
    and not ``u``. Either bound may be infinite; then ``u`` has to lie inside (0, 1).

    >>> truncated_normal(torch.tensor(30.0), torch.tensor(31.0), torch.tensor(0.5))
    tensor(30.0231)
    """
    result: Tensor = _TruncatedDraw.apply(*torch.broadcast_tensors(a, b, u))  # type: ignore[no-untyped-call]
    return result


def truncated_quantile(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """`truncated_normal` of tensors of one shape, without a gradient."""
    # Both probabilities are means without cancellation; the smaller one determines e to full precision.
    # (torch.special.ndtr is 1 + erf, which has no correct digits in the lower tail.)
    ends = torch.stack([a, b]) * 0.5**0.5
    below, above = (torch.lerp(side[0], side[1], u) for side in (torch.erfc(-ends), torch.erfc(ends)))
    least = torch.minimum(below, above) / 2
    e = torch.copysign(torch.special.ndtri(least), below - above)
    far = least < torch.finfo(e.dtype).tiny
    if maybe(far):
        log_u, log_v = torch.log(u), torch.log1p(-u)
        logs = [
            torch.logaddexp(log_v + torch.special.log_ndtr(s * a), log_u + torch.special.log_ndtr(s * b))
            for s in (1, -1)
        ]
        e = torch.where(far, torch.copysign(_tail_quantile(torch.minimum(*logs)), logs[0] - logs[1]), e)
    return torch.clamp(e, a, b)


def interval_slopes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of `log_interval`, ``(-phi(a) / w, phi(b) / w)`` with ``w = Phi(b) - Phi(a)``."""
    low, high, mirrored = _mirror(a, b)
    near = _hazard(high) / -torch.expm1(torch.special.log_ndtr(low) - torch.special.log_ndtr(high))
    # phi(low) / phi(high), at most 1; with an infinite low the exponent is a product of infinities.
    far = -near * torch.exp((high - low) * (high + low) / 2)
    far = torch.where(torch.isinf(low), 0, far)
    return torch.where(mirrored, -near, far), torch.where(mirrored, -far, near)


def truncated_slopes(a: Tensor, b: Tensor, u: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives ``(de/da, de/db)`` of ``e = truncated_normal(a, b, u)``."""
    return (
        torch.exp((e - a) * (e + a) / 2 + torch.log1p(-u)),
        torch.exp((e - b) * (e + b) / 2 + torch.log(u)),
    )


class _LogNdtr(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        value: Tensor = torch.special.log_ndtr(t)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (t,) = ctx.saved_tensors
        slope: Tensor = g * _hazard(t)
        return slope


class _NdtrLogit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        s = t.abs()
        # erfc is ten times as fast as erfcx and log_ndtr, which only the far tail needs.
        least = torch.erfc(s * 0.5**0.5) / 2
        log_least = torch.log(least)
        slope = torch.exp(s * s / -2 - LOG_SQRT_2PI) / (least * (1 - least))
        far = s > (12.0 if t.dtype == torch.float32 else 37.0)
        if maybe(far):
            log_least = torch.where(far, torch.special.log_ndtr(-s), log_least)
            slope = torch.where(far, _hazard(-s), slope)
        ctx.save_for_backward(slope)
        return torch.copysign(torch.log1p(-least) - log_least, t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        result: Tensor = g * slope
        return result


class _LogInterval(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        low, high, _ = _mirror(a, b)
        top = torch.special.log_ndtr(high)
        gap = torch.special.log_ndtr(low) - top
        # log(1 - exp(gap)), in the form that is more accurate.
        log_share = torch.where(gap > -0.6931, torch.log(-torch.expm1(gap)), torch.log1p(-torch.exp(gap)))
        value: Tensor = top + log_share
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        left, right = interval_slopes(*ctx.saved_tensors)
        return g * left, g * right


class _TruncatedDraw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, u: Tensor) -> Tensor:
        e = truncated_quantile(a, b, u)
        ctx.save_for_backward(a, b, u, e)
        return e

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = truncated_slopes(*ctx.saved_tensors)
        return g * left, g * right, None


def _mirror(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The interval, or its mirror image, with its middle at most 0; and whether it was mirrored."""
    mirrored = a + b > 0
    return torch.where(mirrored, -b, a), torch.where(mirrored, -a, b), mirrored


def _hazard(t: Tensor) -> Tensor:
    """``phi(t) / Phi(t)``."""
    result: Tensor = math.sqrt(2 / math.pi) / torch.special.erfcx(t * -(0.5**0.5))
    return result


def _tail_quantile(log_p: Tensor) -> Tensor:
    """``t`` with ``log Phi(t) = log_p``, for log_p < -40: the leading terms, then Newton's method."""
    t = -torch.sqrt(-2 * (log_p + LOG_SQRT_2PI) - torch.log(-2 * log_p))
    for _ in range(3):
        t = t - (torch.special.log_ndtr(t) - log_p) / _hazard(t)
    return t
