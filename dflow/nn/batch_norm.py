"""Batch normalisation of random numbers, by the moments that they have on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dflow.nn.flat import check_sizes
from dflow.nn.moments import Moments
from dflow.ops.devices import float64
from dflow.ops.precision import at_least_float32


class StochasticBatchNorm(nn.Module):
    r"""Batch normalisation of random numbers ``(batch, C)`` or ``(batch, C, H, W)``, by expected moments.

    .. math:: m = \tfrac 1 M \sum_i \mu_i, \quad
        v = \tfrac 1 {M - 1} \sum_i \left(\sigma_i^2 + (\mu_i - m)^2\right), \quad
        a'_i = \gamma \frac{a_i - m}{\sqrt{v + \varepsilon}} + \beta

    over the M numbers of a channel in the batch. For draws of these numbers, m is the expected mean and v the
    expected variance, up to the variance of the mean of M draws. Running averages are used in evaluation.
    Numbers that are not random have variance 0.

    Args:
        channels: C.
        eps: added to v.
        momentum: weight of a batch in the running averages.

    Attributes:
        shared: whether moments in training are over the batches of all processes (torch.distributed), all of
            which have to call the module; by default over the batch of this process only.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        check_sizes(channels=channels)
        self.eps, self.momentum, self.shared = eps, momentum, False
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor | Moments) -> Tensor | Moments:
        """Normalised numbers, or their moments.

        Raises:
            ValueError: training on a single number in a channel.
        """
        mean, var = x if isinstance(x, Moments) else (x, None)
        if self.training:
            m, v = _batch_moments(mean, var, self.shared)
            with torch.no_grad():
                self.running_mean.lerp_(m.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(v.to(self.running_var.dtype), self.momentum)
        else:
            m, v = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(v + self.eps)
        one = (-1, *[1] * (mean.ndim - 2))
        shift = (self.bias - m * scale).view(one)
        scale = scale.view(one)
        mean = mean * scale + shift
        return mean if var is None else Moments(mean, var * scale.square())

    @torch.no_grad()
    def estimate(self, batches: Sequence[Tensor | Moments]) -> None:
        """Set the running averages to the moments of all batches together.

        Raises:
            ValueError: fewer than two numbers in a channel.
        """
        pairs = [x if isinstance(x, Moments) else Moments(x, x.new_zeros(1, 1)) for x in batches]
        means = [float64(mean.transpose(0, 1).flatten(1)) for mean, _ in pairs]
        count = sum(mean.shape[1] for mean in means)
        if count < 2:
            raise ValueError(f"no variance of {count} numbers in a channel; give two or more")
        m = torch.stack([mean.sum(1) for mean in means]).sum(0) / count
        v = torch.zeros_like(m)
        for mean, (_, var) in zip(means, pairs, strict=True):
            v += (mean - m[:, None]).square().sum(1) + float64(_mean(var)) * mean.shape[1]
        self.running_mean.copy_(m)
        self.running_var.copy_(v / (count - 1))

    @torch.no_grad()
    def fold(self, limit: int) -> tuple[Tensor, Tensor]:
        """Thresholds ``T`` and flips ``f`` such that ``sign(forward(a)) = +1`` where ``(a >= T) != f``.

        In evaluation mode, for all integers ``-limit <= a <= limit``. They are found by calls of `forward`,
        so that they agree with its rounding. f is True for a falling line (gamma < 0).

        Returns:
            int64 ``(C,)`` of ``-limit .. limit + 1``, and bool ``(C,)``.

        Raises:
            ValueError: while training.
        """
        if self.training:
            raise ValueError("a batch normalisation has thresholds in evaluation mode only; call eval()")
        flip = self.weight < 0
        low = torch.full_like(flip, -limit, dtype=torch.long)
        high = torch.full_like(low, limit + 1)
        while bool((low < high).any()):
            middle = torch.div(low + high, 2, rounding_mode="floor")
            value = self(middle.to(self.weight.dtype)[None])[0]
            above = (value >= 0) != flip
            low, high = torch.where(above, low, middle + 1), torch.where(above, middle, high)
        return low, flip


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is that of the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        out: Tensor = _Sum.apply(grad[0])  # type: ignore[no-untyped-call]
        return out


def _batch_moments(mean: Tensor, var: Tensor | None, shared: bool = False) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(mean.ndim) if d != 1]
    local_count = mean.numel() // mean.shape[1]
    count = local_count * torch.distributed.get_world_size() if shared else local_count
    if count < 2:
        raise ValueError(f"no variance of {count} numbers in a channel; train on two or more")

    def total(x: Tensor) -> Tensor:
        everywhere: Tensor = _Sum.apply(x) if shared else x  # type: ignore[no-untyped-call]
        return everywhere

    mean = at_least_float32(mean)
    m = total(mean.sum(dims)) / count
    # In two passes, as accurate as torch.var_mean and five times as fast.
    squares = (mean - m.view(1, -1, *[1] * (mean.ndim - 2))).square().sum(dims)
    # A variance is that of many numbers where a size is 1.
    return m, total(squares if var is None else squares + _mean(var) * local_count) / (count - 1)


def _mean(var: Tensor) -> Tensor:
    """Mean variance of each channel; where a size is 1, a variance is that of many numbers."""
    return var.mean([d for d in range(var.ndim) if d != 1])


@torch.no_grad()
def reestimate(net: nn.Sequential, batches: Sequence[Tensor]) -> None:
    """Set the running averages of every batch normalisation, from the first to the last, from ``batches``.

    For a network in evaluation mode. All batches pass layer by layer, so that their activations have to fit
    into memory together.
    """
    values: Sequence[object] = batches
    for module in net:
        if isinstance(module, StochasticBatchNorm):
            module.estimate(values)  # type: ignore[arg-type]
        values = [module(value) for value in values]
