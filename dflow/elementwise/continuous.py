"""Bijections of the reals: affine, and the monotone rational-quadratic spline.

Floats ``(batch, n)`` with params ``(batch, n, num_params)``; both directions in closed form. All params
zero is the identity in every family.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dflow.core import Elementwise
from dflow.ops.precision import at_least_float32

#: Smallest width and height of a bin, as a share of all bins together, and smallest derivative at a knot.
_LEAST = 1e-3
#: The number of which soft-plus, plus the smallest derivative, is 1.
_RAW_ONE = math.log(math.expm1(1 - _LEAST))


class Continuous(Elementwise):
    """Base class of the families on the reals: it checks the arguments."""

    def __init__(self, num_params: int, bound: float) -> None:
        super().__init__()
        if not (bound > 0 and math.isfinite(bound)):
            raise ValueError(f"bound must be positive and finite, found {bound}")
        self.num_params = num_params
        self.bound = bound

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"bound={self.bound}"

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Data to latent.

        Args:
            x: floats ``(batch, n)``.
            params: ``(batch, n, num_params)``.

        Returns:
            z like ``x``, and log_det ``(batch, n)`` in nats.

        Raises:
            ValueError: wrong shapes, or an ``x`` that is not floating.
        """
        self._check(x, params)
        return self._forward(x, at_least_float32(params))

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Latent to data; arguments, result and errors as in `forward`."""
        self._check(z, params)
        return self._inverse(z, at_least_float32(params))

    def _check(self, x: Tensor, params: Tensor) -> None:
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"expected floats (batch, n), found {x.dtype} {tuple(x.shape)}")
        if params.shape != (*x.shape, self.num_params):
            raise ValueError(
                f"params have shape {tuple(params.shape)}, expected {(*x.shape, self.num_params)}"
            )

    @abstractmethod
    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]: ...


class Affine(Continuous):
    """``z = (x - loc) / scale`` with ``log scale = bound * tanh(raw / bound)``; params are (loc, raw).

    The scale stays within ``exp(-bound)..exp(bound)`` for any output of the conditioner.

    Source: Dinh et al. 2017, arXiv 1605.08803; bound 1 is Hoogeboom et al. 2020, arXiv 2001.11235, eq. 6,
    which writes the inverse.

    Raises:
        ValueError: a bound that is not positive and finite.

    >>> Affine().inverse(torch.tensor([[1.0]]), torch.tensor([[[3.0, 0.0]]]))
    (tensor([[4.]]), tensor([[0.]]))
    """

    def __init__(self, bound: float = 2.0) -> None:
        super().__init__(2, bound)

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = params.unbind(-1)
        log_det = -self.bound * torch.tanh(raw / self.bound)
        return (x - loc) * log_det.exp(), log_det

    def _inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = params.unbind(-1)
        log_det = self.bound * torch.tanh(raw / self.bound)
        return torch.addcmul(loc, z, log_det.exp()), log_det


class Spline(Continuous):
    """Monotone rational-quadratic spline from ``[-bound, bound]`` onto itself, the identity outside.

    ``num_bins`` bins; params are the logits of their widths, those of their heights, and a number for the
    derivative at each of the inner knots; at the two outer knots it is 1, so the map is continuously
    differentiable. Widths and heights are at least 1/1000 of the interval, derivatives at least 1/1000.

    Source: Durkan et al. 2019, arXiv 1906.04032.

    Raises:
        ValueError: fewer than 2 or more than 999 bins; a bound that is not positive and finite.
    """

    def __init__(self, num_bins: int = 8, bound: float = 4.0) -> None:
        super().__init__(3 * num_bins - 1, bound)
        if not 2 <= num_bins < 1 / _LEAST:
            raise ValueError(f"num_bins must lie in 2..{round(1 / _LEAST) - 1}, found {num_bins}")
        self.num_bins = num_bins

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"num_bins={self.num_bins}, bound={self.bound}"

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        near = x.clamp(-self.bound, self.bound)
        x0, y0, d0, width, height, bend = self._bin(params, near, 0)
        slope, theta = height / width, (near - x0) / width
        value, log_det = _rational(slope, d0, bend, theta)
        inside = near == x
        return torch.where(inside, torch.addcmul(y0, height, value), x), torch.where(inside, log_det, 0.0)

    def _inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        near = z.clamp(-self.bound, self.bound)
        x0, y0, d0, width, height, bend = self._bin(params, near, 1)
        slope, eta = height / width, (near - y0) / height
        # The root of a theta^2 + b theta = c in 0..1, in the form without cancellation; a > 0 where b < 0.
        curve = eta * (2 * d0 + bend - 2 * slope)
        a, b, c = slope - d0 + curve, d0 - curve, slope * eta
        root = torch.addcmul(b * b, a, c, value=4).clamp_min(torch.finfo(z.dtype).tiny).sqrt()
        theta = torch.where(b > 0, 2 * c, root - b) / torch.where(b > 0, root + b, 2 * a)
        _, log_det = _rational(slope, d0, bend, theta)
        inside = near == z
        return torch.where(inside, torch.addcmul(x0, width, theta), z), torch.where(inside, -log_det, 0.0)

    def _bin(self, params: Tensor, value: Tensor, axis: int) -> Tensor:
        bin_values: Tensor = _Bin.apply(params, value.detach(), self.bound, axis)  # type: ignore[no-untyped-call]
        return bin_values


class _Bin(torch.autograd.Function):
    """Numbers of each value's bin: x, y, derivative at its left knot, width, height, rise of the derivative.

    The gradient is written by hand: each entry depends on one bin only, while autograd through soft-max,
    running sums and look-up costs several times as much as everything else in the spline.
    """

    @staticmethod
    def forward(ctx: Any, params: Tensor, value: Tensor, bound: float, axis: int) -> Tensor:
        """``(6, batch, n)``; values are looked up among the x (axis 0) or y (axis 1) of the knots."""
        bins = (params.shape[-1] + 1) // 3
        # Params first: reductions along a short last axis are many times slower.
        rows, line = params.movedim(-1, 0).flatten(1), value.flatten()
        shares = rows[: 2 * bins].unflatten(0, (2, bins)).softmax(1)
        raw = rows[2 * bins :] + _RAW_ONE
        table = rows.new_empty(3, bins + 1, len(line))
        table[:2, 0], table[2, 0], table[2, -1] = -bound, 1.0, 1.0
        least = torch.arange(1, bins + 1, dtype=rows.dtype, device=rows.device)[:, None] * _LEAST
        ends = torch.cumsum(shares, 1).mul_(2 * bound * (1 - _LEAST * bins))
        table[:2, 1:] = ends.add_(least.mul_(2 * bound).sub_(bound))
        table[2, 1:-1] = F.softplus(raw) + _LEAST
        place = (line >= table[axis, 1:-1]).sum(0)
        index = place.expand(3, 1, -1)
        left, right = table.gather(1, index).squeeze(1), table.gather(1, index + 1).squeeze(1)
        ctx.save_for_backward(shares, raw, place)
        ctx.bound, ctx.shape = bound, params.shape
        return torch.cat([left, right.sub_(left)]).view(6, *value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient for the params."""
        shares, raw, place = ctx.saved_tensors
        bins = shares.shape[1]
        knot, d0, size, bend = grad.flatten(1).split([2, 1, 2, 1])
        out = grad.new_empty(3 * bins - 1, len(place))
        line = torch.arange(bins, device=place.device)[:, None]
        # The left knot depends on every bin before this one, the size on this one.
        new = out[: 2 * bins].view(2, bins, -1).copy_(knot[:, None]).masked_fill_(line >= place, 0.0)
        new.scatter_add_(1, place.expand(2, 1, -1), size[:, None])
        new.sub_((new * shares).sum(1, keepdim=True)).mul_(shares).mul_(2 * ctx.bound * (1 - _LEAST * bins))
        # The derivatives at the outer knots are no parameters; their rows are dropped.
        slopes = grad.new_zeros(bins + 1, len(place))
        slopes.scatter_(0, place[None], d0 - bend).scatter_(0, place[None] + 1, bend)
        torch.mul(slopes[1:-1], raw.sigmoid(), out=out[2 * bins :])
        return out.view(-1, *ctx.shape[:-1]).movedim(0, -1), None, None, None


def _rational(slope: Tensor, d0: Tensor, bend: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the bin's height at the share ``theta`` of its width, and log of the derivative.

    ``bend`` is the derivative at the right knot less that at the left, ``d0``.
    """
    co_theta = 1 - theta
    product = theta * co_theta
    low = torch.addcmul(d0 * co_theta, slope, theta)
    ratio = slope / torch.addcmul(slope, product, 2 * d0 + bend - 2 * slope)
    # d1 theta^2 + 2 slope theta co_theta + d0 co_theta^2
    rise = theta * torch.addcmul((d0 + bend) * theta, slope, co_theta, value=2) + d0 * co_theta * co_theta
    return theta * low * ratio / slope, torch.log(rise * ratio * ratio)
