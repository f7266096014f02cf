"""Bijections of the integers: the shift.

int64 ``(batch, n)`` are mapped exactly; floats ``(batch, n)`` that hold integers are mapped to such floats,
with straight-through gradients. All params zero is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflow.core import Elementwise
from dflow.ops.precision import at_least_float32
from dflow.ops.straight_through import round_


class IntegerShift(Elementwise):
    """``z = x - round(t)`` on the integers, halves rounded to the even one; t is the only parameter.

    Both modes agree as long as floats hold the integers exactly: below 2^24 in float32, 2^53 in float64. For
    the gradient, rounding counts as the identity.

    Source: Hoogeboom et al. 2019, arXiv 1905.07376 (which adds where this subtracts).

    >>> IntegerShift().forward(torch.tensor([[7, 7]]), torch.tensor([[[1.6], [-0.5]]]))[0]
    tensor([[5, 7]])
    """

    num_params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Data to latent.

        Args:
            x: int64 ``(batch, n)``, or float32 or float64 that hold integers.
            params: ``(batch, n, 1)``; half precision is taken for float32.

        Returns:
            z like ``x``, and log_det, zeros ``(batch, n)``.

        Raises:
            ValueError: wrong shapes or dtype; for int64, params that are not finite or beyond 2^62.
        """
        return x - self._shift(x, params), self._no_log_det(params)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Latent to data; arguments, result and errors as in `forward`."""
        return z + self._shift(z, params), self._no_log_det(params)

    def _shift(self, x: Tensor, params: Tensor) -> Tensor:
        """``round(t)`` ``(batch, n)``, in the dtype of ``x``."""
        if x.ndim != 2 or x.dtype not in (torch.int64, torch.float32, torch.float64):
            raise ValueError(
                f"expected int64, float32 or float64 (batch, n), found {x.dtype} {tuple(x.shape)}"
            )
        if params.shape != (*x.shape, 1):
            raise ValueError(f"params have shape {tuple(params.shape)}, expected {(*x.shape, 1)}")
        t = at_least_float32(params.squeeze(-1))
        if x.is_floating_point():
            return round_(t).to(x.dtype)
        # The conversion of such a number to an integer depends on the machine.
        if not torch.compiler.is_compiling() and not (t.abs() < 2.0**62).all():
            raise ValueError(
                "a translation is not finite, or beyond 2^62; the net's training diverged or its weights are "
                "damaged"
            )
        return t.detach().round().to(torch.int64)

    @staticmethod
    def _no_log_det(params: Tensor) -> Tensor:
        dtype = torch.promote_types(params.dtype, torch.float32)
        return torch.zeros(params.shape[:2], dtype=dtype, device=params.device)
