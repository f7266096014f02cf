"""A normal law held to the cell of ``x``, entry by entry: the dequantizer of normal densities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflow.dequantize.dequantizer import Dequantizer
from dflow.dequantize.partition import Partition, inside
from dflow.distributions import Gaussian
from dflow.ops.devices import widest
from dflow.ops.normal import (
    LOG_SQRT_2PI,
    interval_slopes,
    log_interval,
    truncated_normal,
    truncated_quantile,
    truncated_slopes,
)
from dflow.ops.precision import full_precision

#: Entries between two matrix products of the sweep.
BLOCK = 32


class TruncatedNormal(Dequantizer):
    """``q(v|x) = prod_i p(v_i | v_>i) / w_i`` on the cell of x, ``w_i = P(v_i in its interval | v_>i)``.

    Every entry is drawn from its conditional law under a normal density p, from the last to the first, held
    to its interval. The importance weight ``p(v) / q(v|x)`` is the product of the w_i, and for a diagonal
    law it is ``P(x)`` itself: q is the exact posterior. There is nothing to learn but p.

    A continuous column is given, and counts with its density.

    The density is referred to, not owned: it moves, is trained and is saved with the model that has it.

    Source: the simulator of Geweke 1991, Hajivassiliou and McFadden 1998, and Keane 1994.

    Args:
        partition: the cells.
        density: the normal law p.
    """

    uniform_noise = True

    def __init__(self, partition: Partition, density: Gaussian) -> None:
        super().__init__(partition)
        self._density = (density,)

    @property
    def density(self) -> Gaussian:
        """The normal law p."""
        return self._density[0]

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``v`` ``(batch, dim)`` in the cell of ``x`` and log q ``(batch,)``."""
        v, log_weight = self.truncate(x, noise)
        return v, self.density.log_prob(v) - log_weight

    def truncate(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``v`` ``(batch, dim)`` and ``log p(v) - log q(v|x)`` ``(batch,)``, without the two terms."""
        with full_precision(noise):
            lower, upper = self.partition.bounds(x, noise.dtype)
            L, loc = (value.to(noise.dtype) for value in self.density.conditionals())
            dim, mask = x.shape[1], None
            if dim != len(loc):
                raise ValueError(f"a density of {len(loc)} entries for x of {dim}")
            if self.partition.count(dim) < dim:
                mask = self.partition.discrete(dim).to(noise.device)
                noise = noise.new_full(x.shape, 0.5).masked_scatter(mask.expand(x.shape), noise)
            # Finite stand-ins for infinity: gradients by L are products with the bounds.
            far = torch.finfo(noise.dtype).max ** 0.5
            low, high = lower.clamp(-far, far), upper.clamp(-far, far)
            if L.ndim == 1:
                y, terms = _independent(L, low - loc, high - loc, noise, mask)
                log_weight = terms.sum(1, dtype=widest(noise.device)).to(noise.dtype)
            else:
                flags = [True] * dim if mask is None else mask.tolist()
                rows = (value.T.contiguous() for value in (low, high, noise))
                y, log_weight = _Sweep.apply(L, loc, *rows, flags)  # type: ignore[no-untyped-call]
                y = y.T
            return inside(loc + y, lower, upper), log_weight


def _independent(
    L: Tensor, low: Tensor, high: Tensor, u: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``v - loc`` and log weights, each ``(batch, dim)``, of a diagonal law."""
    a, b = low * L, high * L
    if mask is None:
        return truncated_normal(a, b, u) / L, log_interval(a, b)
    # A continuous column is no interval: one of no width would put nan into the gradient.
    ends = torch.where(mask, a, -1), torch.where(mask, b, 1)
    y, terms = truncated_normal(*ends, u) / L, log_interval(*ends)
    return torch.where(mask, y, low), torch.where(mask, terms, L.log() - 0.5 * a.square() - LOG_SQRT_2PI)


class _Sweep(torch.autograd.Function):
    """``y = v - loc`` and log weights of a full covariance.

    For i from the last to the first: ``t_i = sum_{j>i} L_ji y_j``, ``e_i`` standard normal held to
    ``L_ii [low_i, high_i] + t_i``, and ``y_i = (e_i - t_i) / L_ii``.

    Tensors are ``(dim, n)``, so that an entry is a contiguous row. What later blocks contribute to t is one
    matrix product a block, and so it is backward, where entries are visited in the opposite order; all that
    is not sequential is done for all entries at once.
    """

    @staticmethod
    def forward(
        ctx: Any, L: Tensor, loc: Tensor, lower: Tensor, upper: Tensor, u: Tensor, discrete: list[bool]
    ) -> tuple[Tensor, Tensor]:
        dim = len(L)
        low, high = lower - loc[:, None], upper - loc[:, None]
        diag, transposed = L.diagonal(), L.T.contiguous()
        a, b = low * diag[:, None], high * diag[:, None]
        scales = diag.tolist()
        t, e, y = torch.zeros_like(low), torch.empty_like(low), low.clone()
        for end in range(dim, 0, -BLOCK):
            start = max(0, end - BLOCK)
            for i in range(end - 1, start - 1, -1):
                t[i].addmv_(y[i + 1 : end].T, transposed[i, i + 1 : end])
                a[i] += t[i]
                b[i] += t[i]
                if discrete[i]:
                    e[i] = truncated_quantile(a[i], b[i], u[i])
                    torch.sub(e[i], t[i], out=y[i]).div_(scales[i])
            t[:start].addmm_(transposed[:start, start:end], y[start:end])
        terms = log_interval(a, b)
        mask = None
        if not all(discrete):
            mask = torch.tensor(discrete, device=L.device)[:, None]
            e = torch.where(mask, e, a)
            terms = torch.where(mask, terms, diag.log()[:, None] - 0.5 * a.square() - LOG_SQRT_2PI)
        ctx.save_for_backward(L, low, high, u, a, b, e, y, mask)
        return y, terms.sum(0, dtype=widest(L.device)).to(L.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor, grad_weight: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        L, low, high, u, a, b, e, y, mask = ctx.saved_tensors
        diag = L.diagonal()[:, None]
        # Of log w by the ends a and b, and of e by them.
        by_a, by_b = (slope * grad_weight for slope in interval_slopes(a, b))
        e_by_a, e_by_b = truncated_slopes(a, b, u, e)
        # grad t = fixed + turn * grad y: y depends on t directly and through the ends of the interval.
        fixed, turn = by_a + by_b, (e_by_a + e_by_b - 1) / diag
        if mask is not None:
            fixed, turn = torch.where(mask, fixed, -e * grad_weight), torch.where(mask, turn, 0)
        grad_y, grad_t = grad_y.clone(), torch.empty_like(y)
        for start in range(0, len(L), BLOCK):
            end = min(start + BLOCK, len(L))
            grad_y[start:end].addmm_(L[start:end, :start], grad_t[:start])
            for i in range(start, end):
                grad_y[i].addmv_(grad_t[start:i].T, L[i, start:i])
                torch.addcmul(fixed[i], turn[i], grad_y[i], out=grad_t[i])
        grad_e = grad_y / diag
        grad_a, grad_b = by_a + grad_e * e_by_a, by_b + grad_e * e_by_b
        by_diag, by_loc = grad_a * low + grad_b * high - grad_e * y, -diag * (grad_a + grad_b)
        if mask is not None:
            by_diag = torch.where(mask, by_diag, grad_weight * (1 / diag - e * y))
            by_loc = torch.where(mask, by_loc, e * diag * grad_weight - grad_y)
        grad_L = (y @ grad_t.T).tril(-1) + torch.diag(by_diag.sum(1))
        return grad_L, by_loc.sum(1), None, None, None, None
