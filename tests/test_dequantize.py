"""Dequantization: every cell is kept, every density is exact, every bound is one, every optimum is met."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dflow.bijectors import Autoregressive
from dflow.core import Bijector, Context, Distribution, Elementwise
from dflow.dequantize import (
    Bound,
    Columns,
    Dequantized,
    Dequantizer,
    Elbo,
    Estimate,
    FlowDequantizer,
    Hypercube,
    Iwbo,
    NormalDequantizer,
    Orthant,
    Partition,
    Renyi,
    TruncatedNormal,
    Uniform,
)
from dflow.distributions import CovarianceNormal, Gaussian, Normal, StandardNormal
from dflow.flows import Flow
from dflow.ops.normal import log_interval, truncated_normal

INF = math.inf


class Linear(nn.Module):
    """A small net from x to numbers of any shape."""

    def __init__(self, dim: int, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.map = nn.Linear(dim, math.prod(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.map(x)).unflatten(1, self.shape)


class Triangle(Bijector):
    """``z = (I + M)(exp(s(context)) * x)`` with M strictly lower triangular."""

    def __init__(self, dim: int, features: int = 0) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.randn(dim, dim))
        self.scale = nn.Linear(features, dim) if features else None
        self.log_scale = nn.Parameter(0.3 * torch.randn(dim))

    def matrix(self) -> Tensor:
        return torch.eye(len(self.lower)).to(self.lower) + self.lower.tril(-1)

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        s = self.log_scale + (0 if self.scale is None else self.scale(*context.given))
        return (x * s.exp()) @ self.matrix().T, s.expand(x.shape).sum(1)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        s = self.log_scale + (0 if self.scale is None else self.scale(*context.given))
        return (z @ self.matrix().inverse().T) * (-s).exp(), -s.expand(z.shape).sum(1)


class Scale(Elementwise):
    """``z = x * exp(tanh(s)) + loc``: equation 6 of the paper."""

    num_params = 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        loc, s = params.unbind(-1)
        return x * torch.tanh(s).exp() + loc, torch.tanh(s)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        loc, s = params.unbind(-1)
        return (z - loc) * torch.exp(-torch.tanh(s)), -torch.tanh(s)


class Causal(nn.Module):
    """Params of entry i from entries before it and all of the context; counts its calls."""

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(2, dim, dim))
        self.given = nn.Linear(features, 2 * dim)
        self.calls = 0

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        self.calls += 1
        own = torch.einsum("bj,pij->bip", x, self.own.tril(-1))
        return own + self.given(*context.given).unflatten(1, (-1, 2))


def gaussian(dim: int, kind: type[Gaussian] = CovarianceNormal, learned: bool = False) -> Gaussian:
    generator = torch.Generator().manual_seed(dim)
    v = torch.randn(40 + 4 * dim, dim, generator=generator, dtype=torch.float64)
    v = 0.7 + v @ (0.4 * torch.randn(dim, dim, generator=generator, dtype=torch.float64) + torch.eye(dim))
    law = kind(dim, learned).double()
    law.initialize(law.statistics(v))
    return law


def mixed() -> Columns:
    return Columns([(Hypercube(), 1), (None, 1), (Orthant(0.25), 1)])


DEQUANTIZERS: dict[str, Callable[[Partition, int, int], Dequantizer]] = {
    "uniform": lambda cells, dim, d: Uniform(cells),
    "normal": lambda cells, dim, d: NormalDequantizer(cells, Linear(dim, d, 2)),
    "full normal": lambda cells, dim, d: NormalDequantizer(cells, Linear(dim, d, 2 + d), full=True),
    "flow": lambda cells, dim, d: FlowDequantizer(cells, Triangle(d, 4), Linear(dim, 4)),
    "autoregressive": lambda cells, dim, d: FlowDequantizer(
        cells, Autoregressive(Scale(), Causal(d, 4), d), Linear(dim, 4)
    ),
    "truncated": lambda cells, dim, d: TruncatedNormal(cells, gaussian(dim)),
    "truncated diagonal": lambda cells, dim, d: TruncatedNormal(cells, gaussian(dim, Normal)),
}

PARTITIONS: dict[str, tuple[Callable[[], Partition], int]] = {
    "hypercube": (Hypercube, 3),
    "orthant": (Orthant, 3),
    "columns": (mixed, 3),
}


def finite(partition: str) -> bool:
    return partition == "hypercube"


PAIRS = [(q, p) for q in DEQUANTIZERS for p in PARTITIONS if q != "uniform" or finite(p)]


def build(name: str, partition: str) -> tuple[Dequantizer, Tensor]:
    """A dequantizer in float64 and data for it."""
    make, dim = PARTITIONS[partition]
    cells = make()
    q = DEQUANTIZERS[name](cells, dim, cells.count(dim)).double()
    x = torch.tensor(list(itertools.product((0, 1), repeat=dim)))
    return q, x.double() + torch.tensor([0, 0.3, 0]) if partition == "columns" else x


# 1: cells


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("z", [-1e4, -120.0, -20.0, 0.0, 12.0, 20.0, 120.0, 1e4])
def test_no_value_of_z_leaves_its_cell(z: float, dtype: torch.dtype) -> None:
    x = torch.arange(-256, 256)[None]
    v, log_det = Hypercube().place(torch.full(x.shape, z, dtype=dtype), x)
    assert v.dtype == log_det.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(Hypercube().quantize(v), x)
    assert torch.isfinite(log_det).all()
    x = torch.tensor([[0, 1]])
    v, log_det = Orthant().place(torch.full(x.shape, z, dtype=dtype), x)
    assert torch.equal(Orthant().quantize(v), x)
    assert torch.isfinite(log_det).all()


@pytest.mark.parametrize(("name", "partition"), PAIRS)
@pytest.mark.parametrize("noise", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_no_noise_leaves_its_cell(name: str, partition: str, noise: float) -> None:
    q, x = build(name, partition)
    q.float()
    if isinstance(q, TruncatedNormal):
        q.density.float()
    if partition == "hypercube":
        x = torch.arange(256)[:, None].expand(-1, 3)
    eps = torch.full((len(x), q.partition.count(3)), noise)
    if isinstance(q, (Uniform, TruncatedNormal)):
        eps = torch.sigmoid(eps).clamp(1e-7, 1 - 1e-7)
    v, log_q = q(x, eps)
    assert v.dtype == torch.float32
    assert torch.isfinite(log_q).all() or isinstance(q, TruncatedNormal)
    quantized = q.partition.quantize(v)
    if partition == "columns":
        assert quantized.dtype == torch.float64
        assert torch.equal(quantized, x.float().double())
    else:
        assert torch.equal(quantized, x)


def test_cells_of_pixels_survive_a_million_draws() -> None:
    # survae's uniform dequantization loses about one cell in 10^5 here, by rounding x + u up.
    x = torch.arange(256).repeat(4096)[:, None]
    q = Uniform(Hypercube())
    v, log_q = q(x, q.noise(len(x), 1, torch.Generator().manual_seed(0)))
    assert torch.equal(q.partition.quantize(v), x)
    assert not log_q.any()


def test_uniform_noise_is_inside_the_open_interval() -> None:
    q = Uniform(Hypercube())
    u = q.noise(1 << 20, 1, torch.Generator().manual_seed(0))
    assert 0 < u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1


def test_columns_take_runs_apart() -> None:
    cells, x = mixed(), torch.tensor([[3.0, -0.7, 0.0], [-2.0, 5.0, 1.0]])
    z = torch.randn(2, 2)
    v, log_det = cells.place(z, x)
    first, a = Hypercube().place(z[:, :1], x[:, :1])
    last, b = Orthant(0.25).place(z[:, 1:], x[:, 2:])
    assert torch.equal(v, torch.cat([first, x[:, 1:2], last], 1))
    assert torch.equal(log_det, torch.cat([a, b], 1))
    assert cells.discrete(3).tolist() == [True, False, True]
    assert not cells.finite
    assert Columns([(Hypercube(), 2), (None, 1)]).finite
    assert Columns([(Hypercube(), 1), (Orthant(), 1)]).quantize(v[:, ::2]).dtype == torch.int64
    lower, upper = cells.bounds(x)
    assert lower.tolist() == [[3, pytest.approx(-0.7), -INF], [-2, 5, 0.25]]
    assert upper.tolist() == [[4, pytest.approx(-0.7), 0.25], [-1, 5, INF]]


def test_log_det_of_saturated_cells_comes_from_z() -> None:
    z = torch.tensor([[-100.0, -16.7, 0.0, 16.7, 100.0]], requires_grad=True)
    _, log_det = Hypercube().place(z, torch.zeros(1, 5))
    torch.testing.assert_close(log_det, -z.abs() - 2 * nn.functional.softplus(-z.abs()), rtol=1e-6, atol=1e-6)
    log_det.sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([[1.0, 1, 0, -1, -1]]), rtol=0, atol=1e-6)


# 2 and 3: densities


def jacobian(q: Dequantizer, x: Tensor, noise: Tensor) -> Tensor:
    """``dv / dnoise`` of the discrete columns, row by row, ``(batch, d, d)``."""
    mask = q.partition.discrete(x.shape[1])
    rows = []
    for i in range(len(x)):
        one, context = x[i : i + 1], q.context(x[i : i + 1])
        rows.append(
            torch.autograd.functional.jacobian(
                lambda e, one=one, context=context: q(one, e[None], context)[0][0, mask], noise[i]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "partition"), [pair for pair in PAIRS if "truncated" not in pair[0]])
def test_log_q_is_the_density_of_v(name: str, partition: str) -> None:
    q, x = build(name, partition)
    noise = q.noise(len(x), 3, dtype=torch.float64)
    log_det = torch.linalg.slogdet(jacobian(q, x, noise)).logabsdet
    law = torch.distributions.Normal(0, 1)
    base = torch.zeros(len(x)) if name == "uniform" else law.log_prob(noise).sum(1)
    torch.testing.assert_close(q(x, noise)[1], (base - log_det).to(noise))


@pytest.mark.parametrize("name", ["truncated", "truncated diagonal"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_log_q_of_truncated_normals_by_differences(name: str, partition: str) -> None:
    q, x = build(name, partition)
    d = q.partition.count(3)
    noise = 0.1 + 0.8 * torch.rand(len(x), d, dtype=torch.float64)
    step, mask = 1e-6 * torch.eye(d, dtype=torch.float64), q.partition.discrete(3)
    columns = [(q(x, noise + h)[0] - q(x, noise - h)[0])[:, mask] / 2e-6 for h in step]
    log_det = torch.linalg.slogdet(torch.stack(columns, -1)).logabsdet
    torch.testing.assert_close(q(x, noise)[1], -log_det, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["uniform", "normal", "full normal", "flow", "autoregressive", "truncated"])
def test_densities_integrate_to_one(name: str) -> None:
    # E_q[1 / q] is the volume of the cell: 1, over a grid of all noise.
    q = DEQUANTIZERS[name](Hypercube(), 2, 2).double()
    line = torch.linspace(-60, 60, 401, dtype=torch.float64)
    weights = torch.full_like(line, 120 / 400)
    if isinstance(q, (Uniform, TruncatedNormal)):
        line, weights = (
            torch.sigmoid(4 * line),
            weights * 4 * torch.sigmoid(4 * line) * torch.sigmoid(-4 * line),
        )
        base = torch.zeros_like(line)
    else:
        base = torch.distributions.Normal(0, 1).log_prob(line)
    noise = torch.cartesian_prod(line, line)
    measure = torch.cartesian_prod(weights.log() + base, weights.log() + base).sum(1)
    with torch.no_grad():
        _, log_q = q(torch.tensor([[1, 0]]).expand(len(noise), 2), noise)
    volume = torch.exp(measure - log_q).sum()
    torch.testing.assert_close(volume, volume.new_ones(()), rtol=0, atol=1e-3)


# 4 and 5: truncated normals


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_diagonal_law_has_its_exact_posterior(partition: str) -> None:
    p = gaussian(3, Normal)
    q, x = TruncatedNormal(PARTITIONS[partition][0](), p), build("normal", partition)[1]
    model = Dequantized(p, q)
    lw = model.log_weights(x, 5)
    exact = model.exact_log_prob(x)
    torch.testing.assert_close(lw, exact.expand(5, -1))
    lower, upper = q.partition.bounds(x, torch.float64)
    mask = q.partition.discrete(3)
    law = torch.distributions.Normal(p.loc, torch.exp(-p.log_diag))
    masses = torch.where(mask, (law.cdf(upper) - law.cdf(lower)).log(), law.log_prob(lower.clamp(-9, 9)))
    torch.testing.assert_close(exact, masses.sum(1))
    for estimate in (model.elbo(x), model.iwbo(x, 3), model.renyi(x, 3, -INF), model.renyi(x, 3, 2.0)):
        torch.testing.assert_close(estimate.values, exact)
    assessment = model.assess(x, 4)
    torch.testing.assert_close(assessment.ess, torch.full_like(exact, 4))
    # Through log p(v) and log q as well: a model of another density shares no short cut.
    other = Dequantized(Flow(Identity(), p), q)
    torch.testing.assert_close(other.log_weights(x, 2), exact.expand(2, -1))


class Identity(Bijector):
    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))


def test_weights_of_truncated_normals_average_to_the_mass_of_the_box() -> None:
    # In both dimensions, against a quadrature of the density itself.
    p = gaussian(2)
    model = Dequantized(p, TruncatedNormal(Hypercube(), p))
    x = torch.tensor([[0, 0], [1, -1], [2, 3]])
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    noise = torch.cartesian_prod(u, u)[:, None].expand(-1, 3, -1)
    found = model.log_weights(x, 4096, noise=noise).logsumexp(0) - math.log(4096)
    plain = Dequantized(Flow(Identity(), p), Uniform(Hypercube())).exact_log_prob(x)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(model.exact_log_prob(x), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rho", [-0.9, 0.0, 0.5, 0.999])
def test_orthants_of_two_correlated_entries(rho: float) -> None:
    # Sheppard 1899: P(both above their means) = 1/4 + asin(rho) / (2 pi).
    p = CovarianceNormal(2).double()
    covariance = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
    p.assign(torch.block_diag(torch.ones(1, 1, dtype=torch.float64), covariance))
    model = Dequantized(p, TruncatedNormal(Orthant(0.0), p))
    exact = model.exact_log_prob(torch.tensor([[1, 1], [1, 0]])).exp()
    same = 0.25 + math.asin(rho) / (2 * math.pi)
    torch.testing.assert_close(exact, torch.tensor([same, 0.5 - same]).double(), rtol=0, atol=1e-6)


def test_many_entries_are_swept_in_blocks() -> None:
    # 70 entries, three blocks: against the conditionals taken one by one.
    p = gaussian(70)
    q = TruncatedNormal(Hypercube(), p)
    x = p.sample(4, generator=torch.Generator().manual_seed(0)).floor()
    u = q.noise(4, 70, torch.Generator().manual_seed(1), torch.float64)
    v, log_weight = q.truncate(x, u)
    L, loc = p.conditionals()
    total = torch.zeros(4, dtype=torch.float64)
    for i in range(70):
        t = (v - loc)[:, i + 1 :] @ L[i + 1 :, i]
        a, b = L[i, i] * (x[:, i] - loc[i]) + t, L[i, i] * (x[:, i] + 1 - loc[i]) + t
        e = L[i, i] * (v[:, i] - loc[i]) + t
        torch.testing.assert_close(e, truncated_normal(a, b, u[:, i]))
        total += log_interval(a, b)
    torch.testing.assert_close(log_weight, total)
    torch.testing.assert_close(p.log_prob(v) - q(x, u)[1], log_weight)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("kind", [Normal, CovarianceNormal])
def test_gradients_of_truncated_normals_by_differences(
    kind: type[Gaussian], partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflow.dequantize.truncated.BLOCK", 2)
    p = gaussian(3, kind, learned=True)
    q, x = TruncatedNormal(PARTITIONS[partition][0](), p), build("normal", partition)[1]
    u = q.noise(len(x), 3, dtype=torch.float64)
    names, values = zip(*p.named_parameters(), strict=True)

    def both(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(
            Truncate(q), {f"p.{n}": v for n, v in zip(names, parameters, strict=True)}, (x, u)
        )

    assert torch.autograd.gradcheck(both, tuple(v.detach().requires_grad_() for v in values))
    v, log_q = q(x, u)
    (v.sum() + log_q.sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in p.parameters())


class Truncate(nn.Module):
    def __init__(self, q: TruncatedNormal) -> None:
        super().__init__()
        self.q = q
        self.p = q.density

    def forward(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.q.truncate(x, u)


def test_the_density_of_truncated_normals_is_saved_once() -> None:
    p = CovarianceNormal(2, learned=True)
    model = Dequantized(p, TruncatedNormal(Hypercube(), p))
    assert all(name.startswith("density.") for name in model.state_dict())
    assert model.dequantizer.density is p
    model.double()
    assert model.log_weights(torch.zeros(1, 2)).dtype == torch.float64


# 6 and 7: bounds


def weights_of(k: int, batch: int = 40, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(k, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(k))


def test_bounds_fall_with_alpha_on_every_draw() -> None:
    lw = weights_of(8)
    alphas = [-INF, -50.0, -1.0, -1e-9, 0.0, 0.5, 1 - 1e-9, 1.0, 1 + 1e-9, 2.0, 50.0, INF]
    values = torch.stack([Renyi(8, alpha).value(lw) for alpha in alphas])
    assert (values.diff(dim=0) <= 1e-9).all()
    assert (values[0] <= values[4] + math.log(8) + 1e-12).all()
    torch.testing.assert_close(values[4], Iwbo(8).value(lw))
    torch.testing.assert_close(values[7], Elbo(8).value(lw))
    assert torch.equal(values[0], lw.max(0).values)
    assert torch.equal(values[-1], lw.min(0).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [1e-7, -1e-7, 1e-6, 1e-3, 0.1])
def test_renyi_goes_over_into_the_elbo(delta: float, dtype: torch.dtype) -> None:
    lw = (weights_of(16) - 2000).to(dtype)
    exact = lw.double()
    delta = 1 - (1 - delta)
    expected = (torch.logsumexp(delta * (exact + 2000), 0) - math.log(16)) / delta - 2000
    if abs(delta) < 1e-5:
        # Two terms of the series in delta.
        expected = exact.mean(0) + delta / 2 * exact.var(0, correction=0)
    torch.testing.assert_close(Renyi(16, 1 - delta).value(lw).double(), expected, rtol=0, atol=3e-4)


def test_iwbo_rises_with_k_in_expectation() -> None:
    # All ordered choices of k from the same 5 values: the exact expectation under a law on them.
    lw = weights_of(5, batch=7, scale=1.0)
    means = [
        torch.stack(
            [Iwbo(k).value(lw[list(choice)]) for choice in itertools.product(range(5), repeat=k)]
        ).mean(0)
        for k in (1, 2, 3, 4)
    ]
    log_p = lw.logsumexp(0) - math.log(5)
    for low, high in itertools.pairwise([*means, log_p]):
        assert (low <= high).all()
    beyond = torch.stack(
        [Renyi(4, -INF).value(lw[list(choice)]) for choice in itertools.product(range(5), repeat=4)]
    ).mean(0)
    assert (beyond > log_p).all()


BOUNDS = [
    Elbo(4),
    Iwbo(4),
    Renyi(4, 0.5),
    Renyi(4, 1.0),
    Renyi(4, 2.0),
    Renyi(4, -3.0),
    Renyi(4),
    Renyi(4, INF),
]


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.name)
def test_weights_are_the_gradient_of_a_bound(bound: Bound) -> None:
    lw = weights_of(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(bound.value, (lw,))
    (gradient,) = torch.autograd.grad(bound.value(lw).sum(), lw)
    weights = bound.weights(lw)
    torch.testing.assert_close(weights, gradient)
    assert not weights.requires_grad
    torch.testing.assert_close(weights.sum(0), torch.ones(3, dtype=torch.float64))
    assert bound.is_lower_bound == (not isinstance(bound, Renyi) or bound.alpha >= 0)


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.name)
def test_an_objective_has_the_gradient_of_its_bound(bound: Bound) -> None:
    p = gaussian(3, learned=True)
    model = Dequantized(p, build("full normal", "hypercube")[0])
    x = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    noise = torch.randn(4, 8, 3, dtype=torch.float64)
    expected = bound.value(model.log_weights(x, 4, noise=noise))
    gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    values, statistics = model.objective(x, bound, noise=noise)
    assert statistics is None
    torch.testing.assert_close(values, expected, rtol=1e-13, atol=1e-13)
    found = torch.autograd.grad(values.sum(), list(model.parameters()))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_vr_max_differentiates_one_draw_only() -> None:
    net = Linear(3, 3, 2)
    model = Dequantized(StandardNormal(3), NormalDequantizer(Hypercube(), net)).double()
    seen = []
    place = Hypercube.place

    class Watched(Hypercube):
        def place(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((len(x), torch.is_grad_enabled()))
            return place(self, z, x)

    model.dequantizer.partition = Watched()
    values, _ = model.objective(torch.zeros(5, 3), Renyi(16))
    assert seen == [(80, False), (5, True)]
    values.sum().backward()
    assert net.map.bias.grad.abs().max() > 0


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.name)
@pytest.mark.parametrize("kind", [Normal, CovarianceNormal])
def test_statistics_of_a_closed_form_are_weighted_by_the_bound(kind: type[Gaussian], bound: Bound) -> None:
    p = gaussian(3, kind)
    model = Dequantized(p, build("flow", "hypercube")[0])
    x = torch.ones(5, 3, dtype=torch.uint8)
    noise = torch.randn(4, 5, 3, dtype=torch.float64)
    values, statistics = model.objective(x, bound, noise=noise)
    assert values.requires_grad
    v = torch.stack([model.dequantizer(x, eps)[0] for eps in noise])
    weights = bound.weights(model.log_weights(x, 4, noise=noise))
    expected = p.statistics(v.flatten(0, 1), weights.flatten())
    torch.testing.assert_close(statistics, expected)
    # One data point weighs one, whatever the number of draws.
    torch.testing.assert_close(statistics.flatten()[0], torch.tensor(5.0, dtype=torch.float64))
    # At the maximum that the statistics give, the gradient of a weighted likelihood is 0.
    learned = kind(3, learned=True).double()
    learned.initialize(statistics)
    (weights.flatten() * learned.log_prob(v.flatten(0, 1))).sum().backward()
    if not bound.picks_one:
        assert all(parameter.grad.abs().max() < 1e-9 for parameter in learned.parameters())


def test_values_that_guarantee_nothing_are_not_reported() -> None:
    values = torch.tensor([-2.0, -3.0]) * math.log(2)
    good = Estimate(values, "iwbo(8)", True)
    torch.testing.assert_close(good.bits(), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(good.bits_per_dim(4), torch.tensor([0.5, 0.75]))
    with pytest.raises(ValueError, match="dim must be"):
        good.bits_per_dim(0)
    model = Dequantized(StandardNormal(2), Uniform(Hypercube()))
    loose = model.renyi(torch.zeros(1, 2), 4, -INF)
    for report in (loose.bits, lambda: loose.bits_per_dim(2)):
        with pytest.raises(ValueError, match=r"vr-max\(4\) is no lower bound .* Use iwbo"):
            report()
    assert model.renyi(torch.zeros(1, 2), 4, 0.5).bits().shape == (1,)
    assert model.renyi(torch.zeros(1, 2), 1, -INF).is_lower_bound


# 8: the binary checkerboard, whose optima are known

BOARD = torch.tensor([[0, 1], [1, 0]])


def bits(model: Dequantized, noise: Tensor, weights: Tensor) -> Tensor:
    lw = model.log_weights(BOARD, len(noise), noise=noise)
    return -(weights @ lw).mean() / math.log(2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Normal, math.log2(2 * math.pi * math.e / 3)),
        (CovarianceNormal, math.log2(2 * math.pi * math.e) + 0.5 * math.log2(1 / 9 - 1 / 16)),
    ],
)
def test_uniform_optima_of_the_checkerboard(kind: type[Gaussian], expected: float) -> None:
    # 2.5092 and 1.9129 bits; printed 2.51 and 1.91 (table 2).
    model = Dequantized(kind(2).double(), Uniform(Hypercube()))
    nodes, weights = gauss_hermite(8, legendre=True)
    noise, measure = grid(nodes, weights)
    v = BOARD + noise
    model.density.assign(model.density.statistics(v.flatten(0, 1), measure.repeat_interleave(2)))
    assert bits(model, noise, measure).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("kind", "expected"), [(Normal, 2.08214), (CovarianceNormal, 1.65781)])
def test_logit_normal_optima_of_the_checkerboard(kind: type[Gaussian], expected: float) -> None:
    # Printed 2.08 and 1.66 (table 2). The density is the M-step at each step of the dequantizer.
    q = NormalDequantizer(Hypercube(), Linear(2, 2, 2))
    model = Dequantized(kind(2), q).double()
    noise, measure = grid(*gauss_hermite(16))
    params = nn.Parameter(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64))
    q.context = lambda x: params[x]  # type: ignore[method-assign]
    optimizer = torch.optim.LBFGS([params], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            v = torch.stack([q(BOARD, eps)[0] for eps in noise])
        model.density.assign(model.density.statistics(v.flatten(0, 1), measure.repeat_interleave(2)))
        loss = bits(model, noise, measure)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(expected, abs=1e-3)


def test_truncated_normals_come_close_to_the_floor() -> None:
    # Printed for a full covariance under a flow: 1.08 bits. Truncated normals and M-steps need no network.
    p = CovarianceNormal(2).double()
    model = Dequantized(p, TruncatedNormal(Hypercube(), p))
    x, generator = BOARD.repeat(200, 1), torch.Generator().manual_seed(0)
    for _ in range(200):
        p.update(model.objective(x, Elbo(), generator)[1], 0.0)
    exact = -model.exact_log_prob(BOARD).mean() / math.log(2)
    elbo = model.elbo(BOARD, 5000, generator).bits().mean()
    assert 1 < exact < elbo < 1.03


def gauss_hermite(n: int, legendre: bool = False) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal law, or of the uniform one on (0, 1) (Golub and Welsch)."""
    i = torch.arange(1, n, dtype=torch.float64)
    off = i / torch.sqrt(4 * i.square() - 1) if legendre else i.sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2 if legendre else nodes, vectors[0].square()


def grid(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Noise ``(k, 2, 2)`` on a square grid, the same for both data, and weights ``(k,)``."""
    return torch.cartesian_prod(nodes, nodes)[:, None].expand(-1, 2, -1), torch.cartesian_prod(
        weights, weights
    ).prod(1)


def ridge(rho: float = -0.999) -> CovarianceNormal:
    """A law along the diagonal of the checkerboard: close to its floor of 1 bit."""
    p = CovarianceNormal(2).double()
    covariance = 0.3 * torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
    moments = torch.zeros(3, 3, dtype=torch.float64)
    moments[0, 0], moments[0, 1:], moments[1:, 0] = 1, 1, 1
    moments[1:, 1:] = covariance + 1
    p.assign(moments)
    return p


def test_a_few_lucky_draws_fall_below_the_floor() -> None:
    # No law of the checkerboard costs less than 1 bit. Uniform draws hit the ridge rarely, so their
    # weights are heavy-tailed: VR-max falls below the floor in expectation, a single iwbo by luck, with an
    # effective sample size that says so.
    model = Dequantized(ridge(), Uniform(Hypercube()))
    exact = -model.exact_log_prob(BOARD).mean().item() / math.log(2)
    assert 1 < exact < 1.2
    found = []
    x = BOARD.repeat(500, 1)
    assessment = model.assess(x, 16, generator=torch.Generator().manual_seed(0))
    for part in (assessment.iwbo, model.renyi(x, 64, -INF).values):
        found.append(-part.view(500, 2).mean(1) / math.log(2))
    iwbo, vr_max = found
    assert iwbo.mean() > exact
    assert vr_max.mean() < 1
    lucky = iwbo < 1
    assert 0 < lucky.double().mean() < 0.5
    assert assessment.ess.view(500, 2).mean(1)[lucky].mean() < 4


# 9: probabilities add up


@pytest.mark.parametrize("kind", [Normal, CovarianceNormal])
def test_hypercubes_cover_the_plane_and_leak_from_the_pixels(kind: type[Gaussian]) -> None:
    model = Dequantized(gaussian(2, kind), Uniform(Hypercube()))
    x = torch.cartesian_prod(torch.arange(-7, 9), torch.arange(-7, 9))
    p = model.exact_log_prob(x).exp()
    torch.testing.assert_close(p.sum(), p.new_ones(()), rtol=0, atol=1e-6)
    leak = 1 - p[((x == 0) | (x == 1)).all(1)].sum()
    assert 0.05 < leak < 0.95


@pytest.mark.parametrize("density", ["normal", "covariance", "flow"])
def test_orthants_leak_nothing(density: str) -> None:
    p: Distribution = gaussian(2, Normal if density == "normal" else CovarianceNormal)
    if density == "flow":
        p = Flow(Triangle(2), StandardNormal(2)).double()
    model = Dequantized(p, NormalDequantizer(Orthant(), Linear(2, 2, 2)).double())
    x = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    p = model.exact_log_prob(x).exp()
    torch.testing.assert_close(p.sum(), p.new_ones(()), rtol=0, atol=1e-6)


def test_quadrature_of_a_flow_against_its_normal_law() -> None:
    bijector = Triangle(2).double()
    with torch.no_grad():
        bijector.lower.fill_(-15.0)
    flow = Dequantized(Flow(bijector, StandardNormal(2)).double(), Uniform(Hypercube()))
    # z = A x is standard normal: the precision of x is A^T A, so L = A^T flipped to lower form.
    A = bijector.matrix() @ torch.diag(bijector.log_scale.exp())
    covariance = (A.T @ A).inverse().detach()
    p = CovarianceNormal(2).double()
    p.assign(torch.block_diag(torch.ones(1, 1, dtype=torch.float64), covariance))
    x = torch.tensor([[0, 0], [-1, -15], [0, 7], [1, 15]])
    expected = Dequantized(p, Uniform(Hypercube())).exact_log_prob(x)
    torch.testing.assert_close(flow.exact_log_prob(x), expected, rtol=0, atol=1e-5)


def test_quadrature_of_an_ill_conditioned_law() -> None:
    # rho -> -1: the mass of a diagonal strip, P = P(first entry in its interval) up to the strip's width.
    values = [
        Dequantized(ridge(rho), Uniform(Hypercube())).exact_log_prob(BOARD).exp().sum().item()
        for rho in (-0.999999, -0.99999999)
    ]
    line = torch.distributions.Normal(1.0, math.sqrt(0.3))
    total = (line.cdf(torch.tensor(2.0)) - line.cdf(torch.tensor(0.0))).item()
    assert values[0] == pytest.approx(total, abs=2e-3)
    assert values[1] == pytest.approx(total, abs=2e-4)


@pytest.mark.parametrize("kind", [Normal, CovarianceNormal])
def test_exact_laws_of_tables_with_a_continuous_column(kind: type[Gaussian]) -> None:
    cells = Columns([(Hypercube(), 1), (None, 1)])
    model = Dequantized(gaussian(2, kind), NormalDequantizer(cells, Linear(2, 1, 2)).double())
    x = torch.tensor([[i, 0.4] for i in range(-8, 10)], dtype=torch.float64)
    total = model.exact_log_prob(x).logsumexp(0)
    other = Dequantized(Flow(Identity(), model.density), model.dequantizer)
    torch.testing.assert_close(other.exact_log_prob(x).logsumexp(0), total)
    L, loc = model.density.conditionals()
    L = torch.diag(L) if L.ndim == 1 else L
    variance = (L @ L.T).inverse()[1, 1].sqrt()
    torch.testing.assert_close(total, torch.distributions.Normal(loc[1], variance).log_prob(x[0, 1]))
    x = model.sample(50, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float64
    assert torch.equal(x[:, 0], x[:, 0].floor())
    assert model.log_weights(x, 3).shape == (3, 50)


def test_samples_follow_the_exact_law() -> None:
    model = Dequantized(gaussian(2), Uniform(Hypercube()))
    x = model.sample(20000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.int64
    assert torch.equal(x, model.sample(20000, torch.Generator().manual_seed(0)))
    cells, counts = torch.unique(x, dim=0, return_counts=True)
    p = model.exact_log_prob(cells).exp()
    often = p > 0.005
    chi = ((counts[often] - 20000 * p[often]).square() / (20000 * p[often])).sum() / often.sum()
    assert chi < 2


# 10: autoregressive dequantization


def test_autoregressive_dequantization_is_triangular_and_one_call() -> None:
    q, x = build("autoregressive", "hypercube")
    noise = q.noise(len(x), 3, dtype=torch.float64)
    net = q.bijector.net
    net.calls = 0
    q(x, noise)
    assert net.calls == 1
    J = jacobian(q, x, noise)
    assert torch.equal(J, J.tril())
    assert (J[:, 2, 0] != 0).all()


# 11: assessing


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_chunks_change_nothing(chunk: int) -> None:
    q, x = build("flow", "hypercube")
    model = Dequantized(gaussian(3), q)
    noise = torch.randn(7, len(x), 3, dtype=torch.float64)
    lw = model.log_weights(x, 7, noise=noise)
    found = model.assess(x, 7, chunk, noise=noise)
    torch.testing.assert_close(found.elbo, lw.mean(0))
    torch.testing.assert_close(found.iwbo, Iwbo(7).value(lw))
    torch.testing.assert_close(found.ess, lw.softmax(0).square().sum(0).reciprocal())
    assert found.k == 7


def test_assessments_add_up_in_double_precision_and_bounded_memory() -> None:
    p = StandardNormal(3)
    model = Dequantized(p, NormalDequantizer(Hypercube(), Linear(3, 3, 2)))
    x = torch.zeros(4, 3)
    sizes = []
    log_prob = p.log_prob
    p.log_prob = lambda v, context=None: (sizes.append(len(v)), log_prob(v, context))[1]  # type: ignore[method-assign]
    found = model.assess(x, 10, 4, torch.Generator().manual_seed(0))
    assert sizes == [16, 16, 8]
    assert {found.elbo.dtype, found.iwbo.dtype, found.ess.dtype} == {torch.float64}
    assert (found.iwbo >= found.elbo).all()
    assert ((found.ess >= 1) & (found.ess <= 10)).all()
    p.log_prob = lambda v, context=None: torch.full((len(v),), -INF)  # type: ignore[method-assign]
    nothing = model.assess(x, 4, 2)
    assert (nothing.iwbo == -INF).all()
    assert (nothing.ess == 0).all()


def test_the_net_is_called_once_a_batch() -> None:
    for name in ("normal", "flow"):
        q, x = build(name, "hypercube")
        model = Dequantized(gaussian(3), q)
        calls = []
        q.net.register_forward_hook(lambda module, given, out, calls=calls: calls.append(len(given[0])))
        model.objective(x, Iwbo(5))
        model.objective(x, Renyi(5))
        model.assess(x, 6, 2)
        assert calls == [len(x)] * 3


# 12: a random log_det


def test_importance_weights_of_a_random_log_det_are_refused() -> None:
    q, x = build("flow", "hypercube")
    q.bijector.stochastic_log_det = True
    model = Dequantized(gaussian(3), q)
    for call in (
        lambda: model.iwbo(x, 2),
        lambda: model.renyi(x, 2, 0.5),
        lambda: model.assess(x, 2),
        lambda: model.objective(x, Iwbo(2)),
    ):
        with pytest.raises(ValueError, match="biased upwards; use elbo"):
            call()
    assert model.elbo(x, 2).bits().shape == (8,)
    model.renyi(x, 2, 1.0)
    q.bijector.stochastic_log_det = False
    model.iwbo(x, 2)


# 13: what comes in


@pytest.mark.parametrize("name", DEQUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float32, torch.float64])
def test_data_of_any_dtype_mean_the_same(name: str, dtype: torch.dtype) -> None:
    q, x = build(name, "hypercube")
    model = Dequantized(gaussian(3), q)
    noise = q.noise(len(x), 3, dtype=torch.float64)[None]
    expected = model.log_weights(x, 1, noise=noise)
    strided = x.to(dtype).T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(model.log_weights(strided, 1, noise=noise), expected)
    with torch.no_grad():
        small = Dequantized(gaussian(2), DEQUANTIZERS["normal"](Hypercube(), 2, 2).double())
        assert small.exact_log_prob(x[:, :2].to(dtype)).shape == (8,)


@pytest.mark.parametrize("name", DEQUANTIZERS)
def test_an_empty_batch_has_empty_answers(name: str) -> None:
    q, x = build(name, "hypercube")
    model, x = Dequantized(gaussian(3, learned=True), q), x[:0]
    assert model.log_weights(x, 3).shape == (3, 0)
    for bound in (Elbo(), Iwbo(3), Renyi(3), Renyi(3, 0.5)):
        values, _ = model.objective(x, bound)
        assert values.shape == (0,)
        values.sum().backward()
    assert model.assess(x, 3).iwbo.shape == (0,)
    assert Dequantized(gaussian(3, Normal), q).exact_log_prob(x).shape == (0,)
    plane = Dequantized(gaussian(2), Uniform(Hypercube()))
    assert plane.exact_log_prob(x[:, :2]).shape == (0,)
    assert plane.sample(0).shape == (0, 2)
    _, statistics = Dequantized(gaussian(3), q).objective(x, Elbo())
    assert not statistics.any()


@pytest.mark.parametrize("name", DEQUANTIZERS)
def test_autocast_costs_no_cell_and_few_digits(name: str) -> None:
    q, _ = build(name, "hypercube")
    q.float()
    p = gaussian(3).float()
    model = Dequantized(p, q)
    if isinstance(q, TruncatedNormal):
        q.density.float()
    x = torch.randint(0, 256, (64, 3), generator=torch.Generator().manual_seed(0))
    noise = q.noise(64, 3, torch.Generator().manual_seed(0))[None]
    context = q.context(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v, log_q = q(x, noise[0], context)
        lw = model.log_weights(x, 1, noise=noise)
    assert v.dtype == log_q.dtype == lw.dtype == torch.float32
    assert torch.equal(q.partition.quantize(v), x)
    if context is None:
        assert torch.equal(lw, model.log_weights(x, 1, noise=noise))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Hypercube().bounds(torch.tensor([[1.5]])), "1.5 in row 0, column 0"),
        (lambda: Hypercube().bounds(torch.tensor([[INF]])), "inf"),
        (lambda: Hypercube().bounds(torch.tensor([[1 << 23]])), "torch.float32 has no unit cell"),
        (lambda: Hypercube().bounds(torch.tensor([1])), "batch, dim"),
        (lambda: Hypercube().place(torch.zeros(1, 2), torch.zeros(1, 3)), "z has shape"),
        (lambda: Hypercube().quantize(torch.tensor([[math.nan]])), "not finite"),
        (lambda: Orthant().bounds(torch.tensor([[0, 1], [1, 2]])), "2 in row 1, column 1"),
        (lambda: Columns([]), "one of them discrete"),
        (lambda: Columns([(None, 2)]), "one of them discrete"),
        (lambda: Columns([(Hypercube(), 0)]), "runs need columns"),
        (lambda: mixed().bounds(torch.zeros(1, 2)), "3 columns for 2"),
        (lambda: Uniform(Orthant()), "infinite cell"),
        (
            lambda: NormalDequantizer(Hypercube(), Linear(2, 2, 3)).context(torch.zeros(1, 2)),
            "params of shape",
        ),
        (lambda: Elbo(0), "k must be at least 1"),
        (lambda: Renyi(2, math.nan), "alpha"),
        (lambda: Iwbo(3).value(torch.zeros(2, 4)), "expected log weights"),
        (lambda: truncated().log_weights(torch.zeros(1, 3)), "2 entries for x of 3"),
        (lambda: truncated().log_weights(torch.zeros(1, 2), 0), "k must be"),
        (lambda: truncated().log_weights(torch.zeros(2)), "batch, dim"),
        (lambda: truncated().log_weights(torch.zeros(1, 2), 2, noise=torch.rand(1, 1, 2)), "noise has shape"),
        (lambda: truncated().assess(torch.zeros(1, 2), 2, 0), "chunk"),
        (
            lambda: Dequantized(gaussian(3), Uniform(Hypercube())).exact_log_prob(torch.zeros(1, 3)),
            "integral over 3 columns",
        ),
        (lambda: Dequantized(Rough(), Uniform(Hypercube())).exact_log_prob(torch.zeros(1, 1)), "too rough"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def truncated() -> Dequantized:
    p = CovarianceNormal(2)
    return Dequantized(p, TruncatedNormal(Hypercube(), p))


class Rough(Distribution):
    """A density that no grid resolves."""

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        return 5 * torch.sin(1e9 * x.double()).sum(1)

    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        raise NotImplementedError
