"""A density made into a law of discrete data."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dflow.core import Distribution
from dflow.dequantize.bounds import Bound, Elbo, Estimate, Iwbo, Renyi
from dflow.dequantize.dequantizer import Dequantizer
from dflow.dequantize.partition import Partition
from dflow.dequantize.truncated import TruncatedNormal
from dflow.distributions import CovarianceNormal, Gaussian, Normal
from dflow.ops.devices import WITHOUT_FLOAT64, widen, widest

#: Points ``(n, dims)`` of the unit cube, float64, to log values ``(n,)``.
Integrand = Callable[[Tensor], Tensor]

#: Nats by which two successive grids of a quadrature may differ, by its number of dimensions.
TOLERANCE = {1: 1e-6, 2: 1e-4}

#: Points of a quadrature that the density is given at once.
POINTS = 1 << 16


@dataclass(frozen=True)
class Assessment:
    """What k draws a row say, float64 ``(batch,)`` each, in nats.

    Attributes:
        elbo: mean log weight.
        iwbo: log mean weight.
        ess: effective sample size ``(sum w)^2 / sum w^2``, from 1 to k. Where it is small a few draws
            decide, and the iwbo of this batch can lie far from its expectation, above ``log P`` too.
        k: draws.
    """

    elbo: Tensor
    iwbo: Tensor
    ess: Tensor
    k: int


@dataclass(frozen=True)
class Units:
    """What the density sees of real columns: ``(x - loc) / scale``, in float64.

    A density of p(v) in these units is one of ``p(v) / prod(scale)`` in those of the data.

    Attributes:
        loc: of each column, 0 for a discrete one.
        scale: of each column, above 0, and 1 for a discrete one.
    """

    loc: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def log_scale(self) -> float:
        """``sum(log(scale))``."""
        return math.fsum(map(math.log, self.scale))

    def standardize(self, x: Tensor) -> Tensor:
        """Of data ``(batch, dim)``, float64."""
        return (widen(x) - self._like(self.loc, x)) / self._like(self.scale, x)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `standardize`."""
        return widen(x) * self._like(self.scale, x) + self._like(self.loc, x)

    @staticmethod
    def _like(values: tuple[float, ...], x: Tensor) -> Tensor:
        return torch.tensor(values, dtype=widest(x.device), device=x.device)


class Dequantized(nn.Module):
    """``P(x) = integral of p(v) over the cell of x``, p a density, cells and ``q(v|x)`` from a dequantizer.

    P is a law of all discrete values that have a cell; it is estimated by ``E_q[p(v) / q(v|x)]``. Data are
    on the integer grid, in any dtype, ``(batch, dim)``; a table with continuous columns is floating.

    Noise, where it is given, is ``(k, batch, d)`` from ``dequantizer.noise``; otherwise it is drawn from the
    generator, on the device of the model.

    Source: Hoogeboom et al. 2020, arXiv 2001.11235.

    Args:
        density: law of v ``(batch, dim)``.
        dequantizer: law of v given x.
        units: of real columns: density and dequantizer see these, all that is taken and given is in the units
            of the data.

    Raises:
        ValueError: ``x`` without a cell, k < 1, noise of another shape; and `iwbo` and `renyi` of models
            with a random log_det (a submodule with ``stochastic_log_det = True``): an unbiased log weight
            makes a biased weight, and the bound too high.
    """

    def __init__(self, density: Distribution, dequantizer: Dequantizer, units: Units | None = None) -> None:
        super().__init__()
        self.density = density
        self.dequantizer = dequantizer
        self.units = units

    @property
    def partition(self) -> Partition:
        """The cells."""
        return self.dequantizer.partition

    def standardize(self, x: Tensor) -> Tensor:
        """Data as density and dequantizer see them."""
        return x if self.units is None else self.units.standardize(x)

    @torch.no_grad()
    def dequantize(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw ``v`` ``(batch, dim)`` from q(v | x), in the units of the density."""
        noise, x = self._noise(x, 1, generator, None)[0], self.standardize(x)
        v: Tensor = self.dequantizer(x, noise)[0]
        return v

    def log_weights(
        self, x: Tensor, k: int = 1, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """``log p(v_k) - log q(v_k|x)`` of k draws, ``(k, batch)``, in nats."""
        noise, x = self._noise(x, k, generator, noise), self.standardize(x)
        return self._weigh(x, self.dequantizer.context(x), noise)[0]

    def objective(
        self,
        x: Tensor,
        bound: Bound,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The bound to maximise, ``(batch,)`` with gradient, and the statistics for the density's `update`.

        Statistics are None unless the density is a normal law in closed form; they are weighted by the
        derivative of the bound by the log weights, so that the update is its M-step.

        A bound that is one of k log weights finds it without gradient and computes that one again.
        """
        self.check_bound(bound)
        noise, x = self._noise(x, bound.k, generator, noise), self.standardize(x)
        context = self.dequantizer.context(x)
        if bound.k > 1 and bound.picks_one:
            with torch.no_grad():
                chosen = bound.weights(self._weigh(x, context, noise)[0]).argmax(0)
            noise = noise[chosen, torch.arange(len(x), device=noise.device)][None]
            lw, v = self._weigh(x, context, noise)
            values, weights = lw[0], torch.ones_like(lw)
        else:
            lw, v = self._weigh(x, context, noise)
            values, weights = bound.value(lw), bound.weights(lw)
        if not isinstance(self.density, Gaussian) or self.density.learned:
            return values, None
        return values, self.density.statistics(v, weights.flatten())

    def elbo(self, x: Tensor, k: int = 1, generator: torch.Generator | None = None) -> Estimate:
        """Estimate of `Elbo`."""
        return self._estimate(x, Elbo(k), generator)

    def iwbo(self, x: Tensor, k: int, generator: torch.Generator | None = None) -> Estimate:
        """Estimate of `Iwbo`."""
        return self._estimate(x, Iwbo(k), generator)

    def renyi(self, x: Tensor, k: int, alpha: float, generator: torch.Generator | None = None) -> Estimate:
        """Estimate of `Renyi`."""
        return self._estimate(x, Renyi(k, alpha), generator)

    @torch.no_grad()
    def assess(
        self,
        x: Tensor,
        k: int,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Assessment:
        """Elbo, iwbo and effective sample size of k draws, ``chunk`` of them in memory at once.

        Sums are float64; the log weights have the dtype of the model.
        """
        self.check_bound(Iwbo(k))
        chunk = k if chunk is None else chunk
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, found {chunk}")
        x = self.standardize(x)
        context = self.dequantizer.context(x)
        start = torch.zeros(len(x), dtype=widest(x.device), device=x.device)
        top, total, sum_weights, sum_squares = start - torch.inf, start, start, start
        for done in range(0, k, chunk):
            count = min(chunk, k - done)
            given_noise = None if noise is None else noise[done : done + count]
            lw = widen(self._weigh(x, context, self._noise(x, count, generator, given_noise))[0])
            new = torch.maximum(top, lw.amax(0))
            shift = torch.where(torch.isinf(new), 0, new)
            # Sums of w / exp(top), and of its square, moved to the new top.
            factor, weights = torch.exp(top - shift), torch.exp(lw - shift)
            sum_weights = sum_weights * factor + weights.sum(0)
            sum_squares = sum_squares * factor.square() + weights.square().sum(0)
            top, total = new, total + lw.sum(0)
        shift = torch.where(torch.isinf(top), 0, top)
        iwbo = shift + torch.log(sum_weights) - math.log(k)
        ess = torch.where(sum_squares > 0, sum_weights.square() / sum_squares, 0.0)
        return Assessment(total / k, iwbo, ess, k)

    @torch.no_grad()
    def exact_log_prob(self, x: Tensor) -> Tensor:
        """``log P(x)`` in nats, float64 ``(batch,)``, without sampling; a cell is integrated once.

        Any number of entries under a diagonal normal law; else at most two discrete columns. Grids of Gauss
        and Legendre are refined until two differ by less than `TOLERANCE`: of one uniform variable for a
        normal law, of the cell for any other density.

        Raises:
            ValueError: more than two discrete columns, or a density that no grid resolves.
        """
        partition = self.dequantizer.partition
        d = partition.count(x.shape[1])
        if isinstance(self.density, Normal):
            # Every importance weight of the exact posterior is P(x).
            half = torch.full((len(x), d), 0.5, dtype=self._dtype(), device=x.device)
            x = self.standardize(x)
            return widen(TruncatedNormal(partition, self.density).truncate(x, half)[1]) - self._log_scale
        if d > 2:
            raise ValueError(
                f"log P(x) is an integral over {d} columns: exact for a diagonal normal law, by quadrature "
                "up to 2; use iwbo or assess()"
            )
        if x.device.type in WITHOUT_FLOAT64:
            return widen(copy.deepcopy(self).cpu().exact_log_prob(x.cpu())).to(x.device)
        cells, index = torch.unique(x, dim=0, return_inverse=True)
        log_probs = []
        for cell in self.standardize(cells)[:, None]:
            if isinstance(self.density, CovarianceNormal):
                truncated = TruncatedNormal(partition, self.density)
                value = _integral(_by_uniform(truncated, cell, d, self._dtype()), 1, x.device)
            else:
                value = _integral(_by_cell(partition, self.density, cell, self._dtype()), d, x.device)
            log_probs.append(value)
        return torch.tensor(log_probs, dtype=torch.float64, device=x.device)[index] - self._log_scale

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact draws: v from the density, then its cell; int64, or float64 with continuous columns."""
        x = self.dequantizer.partition.quantize(self.density.sample(n, None, generator))
        return x if self.units is None else self.units.restore(x)

    @property
    def _log_scale(self) -> float:
        return 0.0 if self.units is None else self.units.log_scale

    def _estimate(self, x: Tensor, bound: Bound, generator: torch.Generator | None) -> Estimate:
        self.check_bound(bound)
        values = bound.value(self.log_weights(x, bound.k, generator))
        return Estimate(values, bound.name, bound.is_lower_bound)

    def _weigh(self, x: Tensor, context: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights ``(k, batch)``, and v ``(k * batch, dim)``, of x that is standardized, by noise."""
        k, q = len(noise), self.dequantizer
        rows, noise = x.repeat(k, 1), noise.flatten(0, 1)
        if isinstance(q, TruncatedNormal) and q.density is self.density:
            v, lw = q.truncate(rows, noise)
        else:
            if context is not None:
                context = context.repeat(k, *[1] * (context.ndim - 1))
            v, log_q = q(rows, noise, context)
            lw = self.density.log_prob(v) - log_q
        return lw.view(k, len(x)) - self._log_scale, v

    def _noise(self, x: Tensor, k: int, generator: torch.Generator | None, noise: Tensor | None) -> Tensor:
        if x.ndim != 2:
            raise ValueError(f"expected x (batch, dim), found shape {tuple(x.shape)}")
        if k < 1:
            raise ValueError(f"k must be at least 1, found {k}")
        shape = k, len(x), self.dequantizer.partition.count(x.shape[1])
        if noise is None:
            drawn = self.dequantizer.noise(k * len(x), x.shape[1], generator, self._dtype(), x.device)
            return drawn.view(shape)
        if noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        return noise

    def _dtype(self) -> torch.dtype:
        """That of the parameters, else of the density's buffers; at least float32."""
        tensors = itertools.chain(self.parameters(), self.density.buffers())
        dtypes = (value.dtype for value in tensors if value.is_floating_point())
        return torch.promote_types(next(dtypes, torch.get_default_dtype()), torch.float32)

    def check_bound(self, bound: Bound) -> None:
        """ValueError for a bound that a random log_det would bias."""
        linear = bound.k == 1 or isinstance(bound, Elbo) or (isinstance(bound, Renyi) and bound.alpha == 1)
        if not linear and any(getattr(module, "stochastic_log_det", False) for module in self.modules()):
            raise ValueError(
                f"{bound.name} of a model with a random log_det is biased upwards; use elbo, or a flow whose "
                "log_det is exact"
            )


def _by_uniform(truncated: TruncatedNormal, x: Tensor, d: int, dtype: torch.dtype) -> Integrand:
    """Log weight by the noise of the entry that is drawn first; that of the second does not matter."""

    def integrand(t: Tensor) -> Tensor:
        noise = torch.cat([torch.full_like(t, 0.5), t], 1)[:, -d:]
        return widen(truncated.truncate(x.expand(len(t), -1), noise.to(dtype))[1])

    return integrand


def _by_cell(partition: Partition, density: Distribution, x: Tensor, dtype: torch.dtype) -> Integrand:
    """Log density, times what a cell measures, by the place in the cell."""
    lower, upper = (bound[0] for bound in partition.bounds(x, torch.float64))
    mask = partition.discrete(x.shape[1]).to(x.device)
    low, high = lower[mask], upper[mask]
    below, above = torch.isinf(low), torch.isinf(high)

    def integrand(t: Tensor) -> Tensor:
        # Half-lines are reached by t / (1 - t).
        s = torch.where(below, 1 - t, t)
        far, log_det = s / (1 - s), -2 * torch.log1p(-s)
        infinite, width = below | above, high - low
        v = lower.repeat(len(t), 1)
        place = torch.where(below, high - far, low + torch.where(above, far, width * t))
        v[:, mask] = place
        log_det = torch.where(infinite, log_det, width.log())
        return widen(density.log_prob(v.to(dtype))) + log_det.sum(1)

    return integrand


def _integral(integrand: Integrand, dims: int, device: torch.device) -> float:
    """``log of the integral of exp(integrand)`` over the unit cube of ``dims`` (1 or 2) dimensions."""
    nodes, log_weights = _gauss_legendre(8)
    last = math.nan
    # 8 to 16384 panels of 8 points in one dimension, 4 to 128 along each of two.
    for panels in (2**i for i in (range(3, 15) if dims == 1 else range(2, 8))):
        line = ((torch.arange(panels, dtype=torch.float64)[:, None] + nodes) / panels).flatten()
        log_line = log_weights.repeat(panels) - math.log(panels)
        grid = torch.cartesian_prod(*[line] * dims).view(-1, dims)
        log_grid = torch.cartesian_prod(*[log_line] * dims).view(-1, dims).sum(1)
        pieces = [
            torch.logsumexp(integrand(t.to(device)) + w.to(device), 0)
            for t, w in zip(grid.split(POINTS), log_grid.split(POINTS), strict=True)
        ]
        value = float(torch.logsumexp(torch.stack(pieces), 0))
        if value == last or abs(value - last) < TOLERANCE[dims]:
            return value
        last = value
    raise ValueError(f"the density is too rough for a quadrature: it came to {last} and did not settle")


def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and log weights, float64 (Golub and Welsch 1969)."""
    i = torch.arange(1, n, dtype=torch.float64)
    off = i / torch.sqrt(4 * i.square() - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, 2 * vectors[0].abs().log()
