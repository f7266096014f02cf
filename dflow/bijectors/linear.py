"""Linear layers on the channels of an image: scale and shift, and the invertible 1x1 convolution.

An image is a flat row ``(batch, C * H * W)`` in the order C, H, W; a vector of D numbers has the shape
(D, 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dflow.core import Bijector, Context, Distribution, only_given
from dflow.ops.devices import float64
from dflow.ops.precision import at_least_float32, full_precision

#: Smallest standard deviation that `fitting` divides by, so that a constant channel is not scaled up.
_FLOOR = 1e-2


class _Channels(Bijector):
    """A map of the channels that is the same at every place of an image ``(C, H, W)``."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"a shape is (C, H, W), each at least 1, found {tuple(shape)}")
        self.shape = tuple(shape)
        self.channels, self.places = shape[0], shape[1] * shape[2]

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"shape={self.shape}"

    def _image(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.channels * self.places or not x.is_floating_point():
            raise ValueError(
                f"expected floats (batch, {self.channels * self.places}), found {x.dtype} {tuple(x.shape)}"
            )
        return x.reshape(-1, self.channels, self.places)


class ActNorm(_Channels):
    """``z = (x - loc) / scale``, a loc and a scale for each channel; log_det is ``-H W sum log scale``.

    Starts as the identity; `initialize` sets it from data.

    Source: Kingma and Dhariwal 2018, arXiv 1807.03039.

    Args:
        shape: (C, H, W).

    Raises:
        ValueError: an invalid shape, or an ``x`` that is not ``(batch, C * H * W)`` and floating.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        self.loc = nn.Parameter(torch.zeros(self.channels))
        self.log_scale = nn.Parameter(torch.zeros(self.channels))

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det ``(batch,)``."""
        only_given(context)
        z = (self._image(x) - self.loc[:, None]) * torch.exp(-at_least_float32(self.log_scale))[:, None]
        return z.flatten(1), self._log_det(-1, x)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: x like ``z``, log_det ``(batch,)``."""
        only_given(context)
        x = self._image(z) * torch.exp(at_least_float32(self.log_scale))[:, None] + self.loc[:, None]
        return x.flatten(1), self._log_det(1, z)

    def _log_det(self, sign: int, x: Tensor) -> Tensor:
        return (sign * self.places * at_least_float32(self.log_scale).sum()).expand(len(x))

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(self._image(x), (0, 2), correction=0)
        return mean, variance.sqrt().clamp_min(_FLOOR)


class Conv1x1(_Channels):
    """``z = W x`` at every place, ``W = P L U``; log_det is ``H W sum log |diag U|``.

    P is a fixed permutation; L is lower triangular with ones on the diagonal; the diagonal of U is
    ``sign * exp(.)`` with fixed signs. One parameter ``(C, C)`` holds L below the diagonal, U above it, and
    ``log |diag U|`` on it. W starts as a random rotation. The inverse is computed in float64.

    Source: Kingma and Dhariwal 2018, arXiv 1807.03039, section 3.2.

    Args:
        shape: (C, H, W).
        generator: of the rotation; on the CPU.

    Raises:
        ValueError: an invalid shape, or an ``x`` that is not ``(batch, C * H * W)`` and floating.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, shape: tuple[int, int, int], generator: torch.Generator | None = None) -> None:
        super().__init__(shape)
        size = self.channels
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        q = q * r.diagonal().sign()
        q[0] *= torch.linalg.det(q).sign()
        p, lower, upper = torch.linalg.lu(q)
        lu = lower.tril(-1) + upper.triu(1) + upper.diagonal().abs().log().diag()
        self.lu = nn.Parameter(lu.to(torch.get_default_dtype()))
        # Row i of W is row permutation[i] of L U.
        self.register_buffer("permutation", p.argmax(1))
        self.register_buffer("sign", upper.diagonal().sign().to(self.lu.dtype))

    @property
    def weight(self) -> Tensor:
        """W, ``(C, C)``, at least float32."""
        lu = at_least_float32(self.lu)
        diagonal = lu.diagonal()
        lower = lu.tril(-1) + torch.ones_like(diagonal).diag()
        upper = lu.triu(1) + (self.sign.to(lu.dtype) * diagonal.exp()).diag()
        return (lower @ upper).index_select(0, self.permutation)

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det ``(batch,)``."""
        only_given(context)
        with full_precision(x):
            return self._product(self.weight, x), self._log_det(1, x)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: x like ``z``, log_det ``(batch,)``."""
        only_given(context)
        with full_precision(z):
            # The inverse of the rounded matrix that `forward` multiplies by.
            # Without a look at its success, for which an accelerator would be waited for: |det| is not 0.
            weight = self.weight
            inverse = torch.linalg.inv_ex(float64(weight)).inverse.to(weight)
            return self._product(inverse, z), self._log_det(-1, z)

    def _product(self, weight: Tensor, x: Tensor) -> Tensor:
        image = at_least_float32(self._image(x))
        # One matrix product for vectors, in place of a batch of tiny ones.
        return image.flatten(1) @ weight.T if self.places == 1 else (weight @ image).flatten(1)

    def _log_det(self, sign: int, x: Tensor) -> Tensor:
        return (sign * self.places * at_least_float32(self.lu).diagonal().sum()).expand(len(x))


@contextmanager
def fitting(module: nn.Module) -> Iterator[set[ActNorm]]:
    """Inside this context, each `ActNorm` in ``module`` sets its parameters from the data that reach it.

    Its output then has mean 0 and variance 1 a channel over the batch, in whichever direction it is used; a
    standard deviation below 0.01 counts as 0.01. A layer that data reach several times keeps the last
    parameters.

    Yields:
        The layers reached so far.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ActNorm)]
    reached: set[ActNorm] = set()

    def fit(layer: ActNorm, to_latent: bool) -> Callable[..., tuple[Tensor, Tensor]]:
        def move(x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                mean, deviation = layer._moments(x)
                layer.loc.copy_(mean if to_latent else -mean / deviation)
                layer.log_scale.copy_(deviation.log() if to_latent else -deviation.log())
            reached.add(layer)
            return (ActNorm.forward if to_latent else ActNorm.inverse)(layer, x, context)

        return move

    # Layers call each other's `forward` and `inverse` by name, which bypasses the hooks of modules.
    try:
        for layer in layers:
            vars(layer).update(forward=fit(layer, True), inverse=fit(layer, False))
        yield reached
    finally:
        for layer in layers:
            del vars(layer)["forward"], vars(layer)["inverse"]


@torch.no_grad()
def initialize(module: Bijector | Distribution, x: Tensor, context: Context | None = None) -> None:
    """Set every `ActNorm` in a bijector or distribution from the data ``x``, in one pass: see `fitting`.

    Raises:
        ValueError: the pass does not reach all of them.
    """
    with fitting(module) as reached:
        (module.log_prob if isinstance(module, Distribution) else module.forward)(x, context)
    total = sum(isinstance(layer, ActNorm) for layer in module.modules())
    if len(reached) < total:
        raise ValueError(f"the pass reached {len(reached)} of {total} ActNorms")
