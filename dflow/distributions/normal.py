"""Normal laws on the reals: diagonal, full covariance, conditional, standard."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from dflow.core import Context, Distribution, only_given
from dflow.distributions.conditional import Conditional, check_rows
from dflow.ops.devices import float64, widest
from dflow.ops.normal import LOG_SQRT_2PI, log_interval
from dflow.ops.precision import at_least_float32, full_precision

#: Share of the mean variance that is added to each variance when the moments are singular.
RIDGE = 1e-12

#: A variance below this share of the second moment counts as 0: rounding errors are as large.
NOISE = 1e-14


class Gaussian(Distribution):
    """A normal law whose precision is ``L L^T`` with L lower triangular: ``(v - loc) L`` is standard normal.

    By default the law has a closed form, the maximum of the likelihood: its mean and covariance are those of
    the `statistics`. They are buffers that training updates with `update`. With ``learned`` they are
    parameters: ``loc``, ``log_diag`` (of L) and, for a full covariance, ``lower`` (below the diagonal).

    Statistics are augmented second moments in float64, ``sum_n w_n a_n a_n^T`` with ``a = (1, v)``, of
    shape ``(dim + 1, dim + 1)``, or the rows ``sum_n w_n (1, v, v^2)`` ``(3, dim)`` of a diagonal law. They
    add up over batches and processes. The law keeps total weight, mean and covariance, in float64 too.

    Singular moments (fewer points than entries, a constant entry) have no density. The variances are then
    enlarged by `RIDGE` times their mean, then by ten times as much and so on, until the Cholesky
    factorization succeeds. The attribute ``ridge`` holds the number that was added last, normally 0.

    Raises:
        ValueError: dim < 1, a ``v`` of another shape.
    """

    loc: Tensor
    log_diag: Tensor
    moments: Tensor

    def __init__(self, dim: int, learned: bool = False) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}")
        self.dim = dim
        self.learned = learned
        self.ridge = 0.0
        for name, start in self._start().items():
            if learned:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)
        if not learned:
            self.register_buffer("moments", torch.zeros(self._moments_shape, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.learned:
            # Where the device has no float64, the moments are kept in float32; they are still added up in it.
            device = fn(self.moments.new_zeros((), dtype=torch.float32)).device
            self.moments = self.moments.to(widest(device))
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"dim={self.dim}, learned={self.learned}"

    @abstractmethod
    def conditionals(self) -> tuple[Tensor, Tensor]:
        """``(L, loc)``; L is ``(dim, dim)``, or its diagonal ``(dim,)`` for independent entries.

        Given the entries after it, ``v_i`` is normal with standard deviation ``1 / L_ii`` and mean ``loc_i -
        sum_{j>i} L_ji (v_j - loc_j) / L_ii``: the conditionals run from the last entry to the first.
        """

    def standardize(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """``(v - loc) L`` ``(batch, dim)``, standard normal, and ``log det L``."""
        self.check_entries(v)
        L, loc = self.conditionals()
        with full_precision(v):
            L, centred = L.to(v.dtype), v - loc.to(v.dtype)
            e = centred * L if L.ndim == 1 else centred @ L
        return e, self.log_diag.sum(dtype=widest(v.device))

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-density in nats, ``(batch,)``, summed in float64, in the dtype of ``x``."""
        only_given(context)
        e, log_det = self.standardize(x)
        return (log_det - standard_energy(e)).to(x.dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws ``(n, dim)`` in the dtype of ``loc``, at least float32."""
        only_given(context)
        L, loc = self.conditionals()
        e = torch.randn(n, self.dim, generator=generator, dtype=loc.dtype, device=loc.device)
        return loc + (e / L if L.ndim == 1 else torch.linalg.solve_triangular(L, e, upper=False, left=False))

    @torch.no_grad()
    def statistics(self, v: Tensor, weights: Tensor | None = None) -> Tensor:
        """Augmented second moments of ``v`` ``(n, dim)`` with ``weights`` ``(n,)``, by default 1; float64."""
        self.check_entries(v)
        weights = v.new_ones(len(v)) if weights is None else weights
        if weights.shape != v.shape[:1]:
            raise ValueError(f"weights have shape {tuple(weights.shape)} for {len(v)} points")
        return self._moments(float64(v), float64(weights))

    @torch.no_grad()
    def update(self, statistics: Tensor, momentum: float) -> None:
        """Running moments ``<- momentum * running + new``, divided by the weight they sum up to.

        Raises:
            ValueError: a law that is learned, statistics of another shape or without weight, momentum
                outside [0, 1].
        """
        if self.learned:
            raise ValueError("a learned normal law has no moments to update; initialize() sets it")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], found {momentum}")
        moments = self._combine(statistics, momentum)
        values = self._fit(moments)
        self.moments.copy_(moments)
        self._set(*values)

    @torch.no_grad()
    def assign(self, statistics: Tensor) -> None:
        """Take the moments of ``statistics`` in place of the present ones; errors as in `update`."""
        self.update(statistics, 0.0)

    @torch.no_grad()
    def initialize(self, statistics: Tensor) -> None:
        """Set the law from ``statistics``, learned or not."""
        if self.learned:
            self._set(*self._fit(self._combine(statistics, 0.0)))
        else:
            self.assign(statistics)

    def _combine(self, statistics: Tensor, momentum: float) -> Tensor:
        """Weight, mean and covariance of both, laid out like the statistics."""
        if statistics.shape != self._moments_shape:
            raise ValueError(
                f"statistics have shape {tuple(statistics.shape)}, expected {self._moments_shape}"
            )
        weight, total_v, total_square = self._unpack(float64(statistics))
        old_weight, old_mean, old_covariance = weight * 0, total_v * 0, total_square * 0
        if momentum:
            old_weight, old_mean, old_covariance = self._unpack(float64(self.moments))
            old_weight = momentum * old_weight
        total = weight + old_weight
        if not (torch.isfinite(statistics).all() and total > 0):
            raise ValueError(f"statistics must be finite and of positive weight, found {float(weight)}")
        mean = (old_weight * old_mean + total_v) / total
        # Both covariances are taken about the new mean: squares about 0 would cancel.
        step = old_mean - mean
        cross = self._outer(total_v, mean) + self._outer(mean, total_v)
        new = total_square - cross + weight * self._outer(mean, mean)
        covariance = (old_weight * (old_covariance + self._outer(step, step)) + new) / total
        return self._pack(total, mean, covariance)

    def _set(self, *values: Tensor) -> None:
        for name, value in zip(self._start(), values, strict=True):
            getattr(self, name).copy_(value)

    def check_entries(self, v: Tensor) -> None:
        """ValueError unless ``v`` is floating ``(batch, dim)``."""
        if not v.is_floating_point() or v.ndim != 2 or v.shape[1] != self.dim:
            raise ValueError(f"expected floating (batch, {self.dim}), found {v.dtype} {tuple(v.shape)}")

    @property
    @abstractmethod
    def _moments_shape(self) -> tuple[int, int]: ...

    @abstractmethod
    def _start(self) -> dict[str, Tensor]:
        """Parameters or buffers by name, of the standard normal law; loc first."""

    @abstractmethod
    def _moments(self, v: Tensor, weights: Tensor) -> Tensor: ...

    @abstractmethod
    def _unpack(self, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight ``()``, first ``(dim,)`` and second moments."""

    @abstractmethod
    def _pack(self, weight: Tensor, mean: Tensor, covariance: Tensor) -> Tensor: ...

    @abstractmethod
    def _outer(self, a: Tensor, b: Tensor) -> Tensor: ...

    @abstractmethod
    def _solve(self, covariance: Tensor, ridge: float) -> tuple[tuple[Tensor, ...], Tensor]:
        """Values of `_start` without loc, and the variance of each entry given those after it."""

    def _fit(self, moments: Tensor) -> tuple[Tensor, ...]:
        """Values of `_start` from weight, mean and covariance."""
        _, mean, covariance = self._unpack(moments)
        variances = covariance if covariance.ndim == 1 else covariance.diagonal()
        average = float(variances.mean())
        if not average > 0:
            raise ValueError("the points do not vary: a normal law of no variance has no density")
        for ridge in (0.0, *(RIDGE * 10.0**i for i in range(10))):
            self.ridge = ridge * average
            factor, pivots = self._solve(covariance, self.ridge)
            # Each remaining variance has to be larger than the rounding errors of the sums.
            if (pivots > NOISE * (variances + mean.square())).all():
                return mean, *factor
        raise ValueError(f"the covariance is singular, even with {self.ridge:.2g} added to each variance")


class Normal(Gaussian):
    """Normal law of independent entries, ``L = diag(exp(log_diag))``; see `Gaussian`."""

    def conditionals(self) -> tuple[Tensor, Tensor]:
        """``(L, loc)``, both ``(dim,)``."""
        return at_least_float32(self.log_diag).exp(), at_least_float32(self.loc)

    def log_mass(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Exact log-probability in nats ``(batch,)`` of the boxes ``[lower, upper]`` ``(batch, dim)``.

        ``sum_i log(Phi((upper_i - loc_i) L_ii) - Phi((lower_i - loc_i) L_ii))``; bounds may be infinite.
        """
        # Finite numbers in place of infinity: the gradient for L is a product with the bound.
        far = torch.finfo(lower.dtype).max ** 0.5
        a, b = (self.standardize(bound.clamp(-far, far))[0] for bound in (lower, upper))
        return log_interval(a, b).sum(-1, dtype=widest(lower.device)).to(lower.dtype)

    @property
    def _moments_shape(self) -> tuple[int, int]:
        return 3, self.dim

    def _start(self) -> dict[str, Tensor]:
        return {"loc": torch.zeros(self.dim), "log_diag": torch.zeros(self.dim)}

    def _moments(self, v: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([weights.sum().expand(self.dim), weights @ v, weights @ v.square()])

    def _unpack(self, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return moments[0, 0], moments[1], moments[2]

    def _pack(self, weight: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        return torch.stack([weight.expand(self.dim), mean, covariance])

    def _outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def _solve(self, covariance: Tensor, ridge: float) -> tuple[tuple[Tensor, ...], Tensor]:
        variances = covariance + ridge
        return (-0.5 * variances.log(),), variances


class CovarianceNormal(Gaussian):
    """Normal law of any covariance, ``L = diag(exp(log_diag)) + strict lower part of lower``.

    See `Gaussian`. Source: Hoogeboom et al. 2020, arXiv 2001.11235, appendix B.
    """

    lower: Tensor

    def conditionals(self) -> tuple[Tensor, Tensor]:
        """``(L, loc)``, ``(dim, dim)`` and ``(dim,)``."""
        lower, log_diag, loc = map(at_least_float32, (self.lower, self.log_diag, self.loc))
        return lower.tril(-1) + torch.diag(log_diag.exp()), loc

    @property
    def _moments_shape(self) -> tuple[int, int]:
        return self.dim + 1, self.dim + 1

    def _start(self) -> dict[str, Tensor]:
        zeros = torch.zeros(self.dim, self.dim)
        return {"loc": torch.zeros(self.dim), "log_diag": torch.zeros(self.dim), "lower": zeros}

    def _moments(self, v: Tensor, weights: Tensor) -> Tensor:
        ones = torch.cat([v.new_ones(len(v), 1), v], 1)
        return ones.T @ (weights[:, None] * ones)

    def _unpack(self, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return moments[0, 0], moments[0, 1:], moments[1:, 1:]

    def _pack(self, weight: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        top = torch.cat([weight[None], mean])
        return torch.cat([top[None], torch.cat([mean[:, None], covariance], 1)])

    def _outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a[:, None] * b

    def _solve(self, covariance: Tensor, ridge: float) -> tuple[tuple[Tensor, ...], Tensor]:
        # Sigma = C C^T with C upper: the Cholesky factor of the flipped matrix, flipped back. Then L = C^-T.
        eye = torch.eye(self.dim, dtype=torch.float64, device=covariance.device)
        factor, failed = torch.linalg.cholesky_ex((covariance + ridge * eye).flip(0, 1))
        if failed:
            return (), torch.zeros_like(covariance[0])
        C = factor.flip(0, 1)
        L = torch.linalg.solve_triangular(C, eye, upper=True).T
        return (-C.diagonal().log(), L.tril(-1)), C.diagonal().square()


class ConditionalNormal(Conditional):
    """Entries independent given the context, ``v_i`` normal with mean ``loc_i`` and deviation ``exp(s_i)``.

    The net is called as ``net(x, rest)``, see `dflow.core.conditioned`, and returns ``(loc, s)`` in the
    last axis of ``(batch, dim, 2)``: zeros are the standard normal law. Inside a `Split` x is the kept
    entries.

    Raises:
        ValueError: no context, or an ``x``, n or params that do not fit each other.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def params(self, context: Context | None) -> tuple[Tensor, Tensor]:
        """``loc`` and log standard deviation, each ``(batch, dim)``, at least float32."""
        only_given(context)
        loc, log_scale = self.outputs(context, None, 2).unbind(-1)
        return loc, log_scale

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-density in nats, ``(batch,)``, summed in float64, in the dtype of ``x``."""
        loc, log_scale = self.params(context)
        if x.shape != loc.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, the params of the net {tuple(loc.shape)}")
        e = (x - loc) * torch.exp(-log_scale)
        return (-standard_energy(e) - log_scale.sum(-1, dtype=widest(x.device))).to(x.dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """One exact draw for each of the ``n`` rows of the context, ``(n, dim)``."""
        loc, log_scale = self.params(context)
        check_rows(n, len(loc))
        e = torch.randn(loc.shape, generator=generator, dtype=loc.dtype, device=loc.device)
        return loc + log_scale.exp() * e


class StandardNormal(Distribution):
    """The standard normal law of ``dim`` entries: the fixed base of a continuous flow."""

    like: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}")
        self.dim = dim
        # Holds the device and dtype of draws; it is not saved.
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"dim={self.dim}"

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-density in nats, ``(batch,)``, summed in float64, in the dtype of ``x``."""
        only_given(context)
        if not x.is_floating_point() or x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"expected floating (batch, {self.dim}), found {x.dtype} {tuple(x.shape)}")
        return -standard_energy(x).to(x.dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws ``(n, dim)``."""
        only_given(context)
        like = self.like
        return torch.randn(n, self.dim, generator=generator, dtype=like.dtype, device=like.device)


def standard_energy(e: Tensor) -> Tensor:
    """``-log`` of the standard normal density of each row of ``e``, in nats, float64 ``(batch,)``."""
    return (0.5 * e.square() + LOG_SQRT_2PI).sum(-1, dtype=widest(e.device))
