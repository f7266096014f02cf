"""Random activations: independent Gaussians by their moments, random signs, and the maximum of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.nn.flat import check_sizes
from dflow.ops.normal import LOG_SQRT_2PI, ndtr_logit
from dflow.ops.straight_through import binary_concrete, sign_

#: Smallest variance in a division by a standard deviation.
TINY = 1e-12


class Moments(NamedTuple):
    """Independent Gaussians: means, and variances in a shape that broadcasts to that of the means."""

    mean: Tensor
    var: Tensor


class Signs(NamedTuple):
    """Independent numbers on {-1, +1}: their means, or if ``hard`` the numbers themselves."""

    mean: Tensor
    hard: bool


def means(x: Tensor | Moments) -> Tensor:
    """Numbers, or the means of random ones."""
    return x.mean if isinstance(x, Moments) else x


def standardized(x: Moments) -> Tensor:
    """Means over standard deviations, ``mu / sigma``."""
    return x.mean * torch.rsqrt(x.var.clamp_min(TINY))


class StochasticSign(nn.Module):
    r"""Signs of Gaussians: random, of mean :math:`2 \Phi(\mu / \sigma) - 1`, or drawn; 0 counts as positive.

    "sample" draws them in training, by the hard binary concrete law with a straight-through gradient; in
    evaluation both modes propagate the mean. Numbers that are not random become their signs, with the
    gradient of ``clamp(a, -1, 1)``.

    Args:
        mode: "propagate" or "sample".
        temperature: temperature of the relaxation that gives drawn signs their gradient.
    """

    def __init__(self, mode: Literal["propagate", "sample"] = "propagate", temperature: float = 1.0) -> None:
        super().__init__()
        if mode not in ("propagate", "sample"):
            raise ValueError(f"mode {mode!r} must be propagate or sample")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, found {temperature}")
        self.mode, self.temperature = mode, temperature

    def forward(self, x: Tensor | Moments) -> Signs:
        """The signs of ``x``, in its shape."""
        if isinstance(x, Tensor):
            return Signs(sign_(x), True)
        t = standardized(x)
        if self.mode == "propagate" or not self.training:
            return Signs(torch.erf(t * 0.5**0.5), False)
        noise = torch.logit(_draw(torch.rand, t), 1e-7)
        return Signs(binary_concrete(ndtr_logit(t), noise, self.temperature), True)


class StochasticMaxPool2d(nn.Module):
    """The maximum of each window of random numbers ``(batch, C, H, W)``; incomplete windows are dropped.

    "sample" draws all numbers of a window and takes the moments of the number whose draw is largest (Peters
    and Welling 2018). "moments" takes the mean and the variance of the maximum, of two numbers at a time:
    exact for two Gaussians, close for more (Clark 1961). Of numbers that are not random it is the maximum.

    Args:
        size: height and width of a window, and the distance between windows.
        how: "sample" or "moments".
    """

    def __init__(self, size: int = 2, how: Literal["sample", "moments"] = "sample") -> None:
        super().__init__()
        check_sizes(size=size)
        if how not in ("sample", "moments"):
            raise ValueError(f"how {how!r} must be sample or moments")
        self.size, self.how = size, how

    def forward(self, x: Tensor | Moments) -> Tensor | Moments:
        """Numbers, or moments, ``(batch, C, H // size, W // size)``."""
        if isinstance(x, Tensor):
            return F.max_pool2d(x, self.size)
        mean, var = x
        if self.how == "moments":
            n = self.size
            height, width = (size // n * n for size in mean.shape[2:])
            places = [(..., slice(i, height, n), slice(j, width, n)) for i in range(n) for j in range(n)]
            return reduce(larger, (Moments(mean[place], var[place]) for place in places))
        with torch.no_grad():
            drawn = torch.addcmul(mean, var.sqrt(), _draw(torch.randn, mean))
            index = _last(F.max_pool2d(drawn, self.size, return_indices=True)[1])
        flat = index.flatten(1, 2)

        def pick(moment: Tensor) -> Tensor:
            chosen = _last(moment.expand_as(mean)).flatten(1, 2).gather(1, flat)
            return chosen.view_as(index).permute(0, 3, 1, 2)

        return Moments(pick(mean), pick(var))


def larger(a: Moments, b: Moments) -> Moments:
    """Mean and variance of the larger of two independent Gaussians.

    Source: Clark 1961, The greatest of a finite set of random variables.
    """
    above = a.mean >= b.mean
    # In terms of the distance between the means: squares of large means would cancel.
    top, var_top = torch.where(above, a.mean, b.mean), torch.where(above, a.var, b.var)
    gap, var_low = -(a.mean - b.mean).abs(), torch.where(above, b.var, a.var)
    spread = torch.sqrt((a.var + b.var).clamp_min(TINY))
    t = gap / spread
    p = torch.erfc(t * -(0.5**0.5)) / 2
    peak = spread * torch.exp(t * t / -2 - LOG_SQRT_2PI)
    rise = gap * p + peak
    var = var_top * (1 - p) + var_low * p + gap * rise - rise * rise
    return Moments(top + rise, var.clamp_min(0))


def _last(images: Tensor) -> Tensor:
    """``(batch, C, H, W)`` as ``(batch, H, W, C)``, the memory layout of convolutions."""
    return images.permute(0, 2, 3, 1)


def _draw(law: Callable[..., Tensor], like: Tensor) -> Tensor:
    """Draws in the shape, dtype, device and memory format of ``like``.

    For channels-last tensors ``randn_like`` and ``rand_like`` are eight times slower.
    """
    images = like.ndim == 4
    shape = _last(like).shape if images else like.shape
    drawn = law(shape, dtype=like.dtype, device=like.device)
    return drawn.permute(0, 3, 1, 2) if images else drawn
