"""Bijection of the reals by a mixture of logistic laws.

Floats ``(batch, n)`` with params ``(batch, n, num_params)``; one direction in closed form, the other by root
finding to the precision of the floats.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dflow.elementwise.continuous import Continuous

#: Smallest weight of a component, as a share of its weight among equals.
_LEAST = 1e-3

#: Upper bound of log s, and of the outer log scale a. Narrow components are needed for narrow peaks; wide
#: ones make tails, whose scales multiply from layer to layer when a model draws.
_WIDE = 2.0

#: Entries that are solved for at a time, so that their tensors stay in the cache.
_BLOCK = 4096

#: Limit of the evaluations of the map for a solution: about 60 bisections, and as many Newton steps.
_MOST = 200


class MixtureLogistic(Continuous):
    r"""``z = exp(a) logit(F(x)) + b`` with ``F(x) = sum_k w_k sigmoid((x - loc_k) / s_k)``.

    Params are the logits of the K weights, K numbers for the means and K for the log scales, a and b. All
    zero is the identity: every component is the standard logistic law. Equal components would stay equal in
    training; so the numbers for means and log scales are multiplied by factors from 1/2 to 2 that differ
    between components. Scales lie in ``exp(-bound)..exp(2)`` and ``exp(a)`` within ``exp(+-2)``, by tanh as
    in `Affine`; weights are at least ``1 / (1000 K)``. Both tails are lines of slope ``exp(a) / s``, s the
    largest scale, and are computed without loss of precision.

    The inverse lies between the smallest and the largest of the inverses of the components. Newton's method
    with bisection finds it to the last bit. Its gradients are those of the exact solution.

    Source: Ho et al. 2019, arXiv 1902.00275 (Flow++).

    Raises:
        ValueError: no components; a bound that is not positive and finite.

    >>> z, log_det = MixtureLogistic(2).forward(torch.tensor([[3.0]]), torch.zeros(1, 1, 8))
    >>> z, log_det.abs() < 1e-6
    (tensor([[3.]]), tensor([[True]]))
    """

    def __init__(self, num_components: int = 4, bound: float = 5.0) -> None:
        super().__init__(3 * num_components + 2, bound)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, found {num_components}")
        self.num_components = num_components

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"num_components={self.num_components}, bound={self.bound}"

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(x, params, False)

    def _inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(z, params, True)

    def _map(self, value: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        mapped: tuple[Tensor, Tensor] = _MixtureMap.apply(params, value, self.bound, inverse)  # type: ignore[no-untyped-call]
        return mapped


class _Components(NamedTuple):
    """A mixture for each of n entries: weights, means and inverse scales, each ``(K, n)``."""

    weight: Tensor
    loc: Tensor
    inv: Tensor


class _MixtureMap(torch.autograd.Function):
    """Both directions. Gradients are written by hand as for the spline: autograd costs several times as much.

    The gradients of the inverse follow from those of the map at the solution.
    """

    @staticmethod
    def forward(
        ctx: Any, params: Tensor, value: Tensor, bound: float, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """z, or x, and log_det, each like ``value``."""
        count = (params.shape[-1] - 2) // 3
        # Params first: reductions along a short last axis are many times slower.
        rows, line = params.movedim(-1, 0).flatten(1), value.flatten()
        loc_factor, scale_factor = _factors(count, rows)
        raw = rows[2 * count : -2] * scale_factor
        most = torch.where(raw > 0, _WIDE, bound)
        share, tame, stretch = rows[:count].softmax(0), _tanh(raw / most), _tanh(rows[-2] / _WIDE)
        law = _Components(
            torch.add(_LEAST / count, share, alpha=1 - _LEAST),
            rows[count : 2 * count] * loc_factor,
            torch.exp(-tame * most),
        )
        scale = torch.exp(_WIDE * stretch)
        if inverse:
            y = (line - rows[-1]) / scale
            out = _solve(y, law)
            _, log_slope, *shares = _look(out, law)
            log_det = torch.add(log_slope, stretch, alpha=_WIDE).neg_()
        else:
            y, log_slope, *shares = _look(line, law)
            out = torch.addcmul(rows[-1], y, scale)
            log_det = torch.add(log_slope, stretch, alpha=_WIDE)
        ctx.save_for_backward(share, tame, stretch, law.weight, law.inv, scale, y, log_slope, *shares)
        ctx.inverse, ctx.shape = inverse, params.shape
        return out.view(value.shape), log_det.view(value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients for the params and the value."""
        share, tame, stretch, weight, inv, scale, y, log_slope, d, below, above, density = ctx.saved_tensors
        grad_value, grad_log = (grad.flatten() for grad in grads)
        count, slope = len(share), log_slope.exp()
        loc_factor, scale_factor = _factors(count, share)
        # Derivative of the log of the slope by d; the sigmoid is the distribution function of a component.
        turn = torch.addcmul(density - below, d.sigmoid(), below + above - 2 * density)
        bend = (turn * inv).sum(0)
        out = torch.empty(ctx.shape[-1], len(y), dtype=y.dtype, device=y.device)
        if ctx.inverse:
            by_slope = -grad_log
            by_y = torch.addcmul(grad_value, by_slope, bend) / -slope.clamp_min(torch.finfo(slope.dtype).tiny)
            by_value = -by_y / scale
            out[-1] = -by_value
            by_log = torch.addcmul(-grad_log, by_y, y)
        else:
            by_slope, by_y = grad_log, grad_value * scale
            by_value = torch.addcmul(by_slope * bend, by_y, slope)
            out[-1] = grad_value
            by_log = torch.addcmul(grad_log, by_y, y)
        # The share of a component in dy/dx is its share in the density times the slope.
        by_x = torch.addcmul(by_slope * turn * inv, density, by_y * slope)
        by_weight = ((below - above) * by_y + (density - below - above) * by_slope) / weight
        torch.mul(by_weight - (by_weight * share).sum(0), share, out=out[:count]).mul_(1 - _LEAST)
        torch.mul(by_x, -loc_factor, out=out[count : 2 * count])
        narrow = torch.addcmul(by_slope * density, by_x, d / inv)
        torch.mul(narrow, -scale_factor * (1 - tame * tame), out=out[2 * count : -2])
        torch.mul(by_log, 1 - stretch * stretch, out=out[-2])
        return out.view(-1, *ctx.shape[:-1]).movedim(0, -1), by_value.view(ctx.shape[:-1]), None, None


def _factors(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the numbers for means and for log scales, each ``(K, 1)``."""
    loc = torch.linspace(-1, 1, count, dtype=like.dtype, device=like.device)[:, None].exp2_()
    return loc, loc.flip(0).roll(1, 0)


def _tanh(x: Tensor) -> Tensor:
    """``tanh(x)``, several times as fast as `torch.tanh` and exactly 0 at 0."""
    return torch.sigmoid(2 * x).mul_(2).sub_(1)


def _parts(x: Tensor, law: _Components) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For each component d, the masses below and above x and the density; and ``shift``, ``(n,)``.

    That is ``d = (x - loc) / s``, ``w c``, ``w (1 - c)`` and ``w c (1 - c) / s`` with ``c = sigmoid(d)``. In
    a tail, where all components lie on one side of x, the smaller of the two masses would underflow: there
    that mass and the density are multiplied by ``e^|shift|``.
    """
    d = (x - law.loc).mul_(law.inv)
    least, most = d.aminmax(dim=0)
    right, left = least.clamp_(min=0), most.clamp_(max=0)
    shift = right + left
    limit = math.log(torch.finfo(d.dtype).max) - 1
    rise = (d - shift).clamp_(-limit, limit).exp_()
    above = torch.addcmul(right.neg_().exp_(), left.exp_(), rise).reciprocal_()
    below = rise.mul_(above)
    density = (below * above).mul_(law.inv).mul_(law.weight)
    return d, below.mul_(law.weight), above.mul_(law.weight), density, shift


def _look(x: Tensor, law: _Components) -> tuple[Tensor, ...]:
    """Logit of F and the log of its slope ``(n,)``; d, and shares in F, 1 - F and the density ``(K, n)``.

    The slope is ``f / (F (1 - F))``; nothing is subtracted from one.
    """
    d, below, above, density, shift = _parts(x, law)
    F, S, f = below.sum(0), above.sum(0), density.sum(0)
    log_F, log_S, log_f = F.log(), S.log(), f.log()
    numbers = torch.finfo(f.dtype)
    deep = f < numbers.tiny / numbers.eps
    if bool(deep.any()):
        # Between components that are all far away the density underflows: sum their tails as logarithms.
        indices = deep.nonzero().flatten()
        tails = (law.weight * law.inv)[:, indices].log() - d[:, indices].abs()
        log_f[indices], f[indices], density[:, indices] = tails.logsumexp(0), 1.0, tails.softmax(0)
    return log_F - log_S + shift, log_f - log_F - log_S, d, below.div_(F), above.div_(S), density.div_(f)


def _solve(y: Tensor, law: _Components) -> Tensor:
    """Places where the logit of F is ``y``."""
    blocks = zip(*(rows.split(_BLOCK, -1) for rows in (y, *law)), strict=True)
    return torch.cat([_root(rows, _Components(*tensors)) for rows, *tensors in blocks])


def _root(y: Tensor, law: _Components) -> Tensor:
    """Newton's method, with a bisection where a step leaves the interval or is too long.

    Each entry is solved for by itself; entries that are done are removed from the batch from time to time.
    """
    # The places where single components have the logit y: F has it between the first and the last of them.
    ends = torch.addcdiv(law.loc, y, law.inv)
    low, high = ends.aminmax(dim=0)
    eps = torch.finfo(y.dtype).eps
    # A Newton step is about the square of the step before, in units of the narrowest component.
    near, noise, last = eps**0.5 / 4 / law.inv.amax(0), 2 * eps * (1 + y.abs()), high - low
    x = (law.weight * ends).sum(0)
    solution, remaining = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(_MOST):
        _, below, above, density, shift = _parts(x, law)
        F, S = below.sum(0), above.sum(0)
        off = F.log() - S.log() + shift - y
        low, high = torch.where(off > 0, low, x), torch.where(off < 0, high, x)
        new = x - off / (density.sum(0) / (F * S))
        newton = (new >= low) & (new <= high) & ((new - x).abs() <= last / 2)
        new = torch.where(newton, new, low + (high - low) / 2)
        new = torch.where(off.abs() <= noise, x, new)
        last, x = (new - x).abs(), new
        done = (last == 0) | (newton & (last <= near))
        arrived = int(done.sum())
        if arrived == len(x):
            break
        if 3 * arrived > len(x):
            solution[remaining] = x
            keep = (~done).nonzero().flatten()
            law = _Components(*(tensor[:, keep] for tensor in law))
            remaining, x, y, low, high = (tensor[keep] for tensor in (remaining, x, y, low, high))
            last, near, noise = (tensor[keep] for tensor in (last, near, noise))
    solution[remaining] = x
    return solution
