"""The normal law: its tails against mpmath, moments and densities against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import mpmath
import pytest
import torch
from torch import Tensor, nn

from dflow.core import Context, Distribution
from dflow.distributions import (
    ConditionalNormal,
    CovarianceNormal,
    Gaussian,
    Normal,
    StandardNormal,
)
from dflow.flows import Split
from dflow.ops.normal import log_interval, log_ndtr, truncated_normal

INF = math.inf

#: Ends of intervals: ordinary, half-infinite, far in either tail, narrow, straddling 0 widely.
ENDS = [
    (-1, 1),
    (-INF, 0.25),
    (0.25, INF),
    (-INF, INF),
    (-40, -39),
    (39, 40),
    (-90, -89.875),
    (89.875, 90),
    (-INF, -50),
    (50, INF),
    (30, 31),
    (5, 5.125),
    (-9, 9),
    (-8, 8.5),
    (-3, 20),
    (12, 14),
]


def exact_ndtr(t: float) -> mpmath.mpf:
    return mpmath.erfc(-mpmath.mpf(t) / mpmath.sqrt(2)) / 2


def exact_mass(a: float, b: float) -> mpmath.mpf:
    # In the lower tail, where the difference keeps its digits.
    return exact_ndtr(b) - exact_ndtr(a) if a + b <= 0 or a == -INF else exact_ndtr(-a) - exact_ndtr(-b)


def exact_density(t: float) -> mpmath.mpf:
    return mpmath.mpf(0) if math.isinf(t) else mpmath.npdf(mpmath.mpf(t))


def relative(found: Tensor, expected: mpmath.mpf) -> float:
    error = abs(mpmath.mpf(found.item()) - expected)
    # What float32 cannot hold may be 0.
    return float(error / (abs(expected) + mpmath.mpf(10) ** -30))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 6e-6), (torch.float64, 2e-14)])
@pytest.mark.parametrize(("a", "b"), ENDS)
def test_intervals_and_their_gradients_against_mpmath(
    a: float, b: float, dtype: torch.dtype, tolerance: float
) -> None:
    with mpmath.workdps(60):
        ends = [torch.tensor(end, dtype=dtype, requires_grad=True) for end in (a, b)]
        mass = exact_mass(a, b)
        value = log_interval(*ends)
        assert relative(value, mpmath.log(mass)) < tolerance
        by_a, by_b = torch.autograd.grad(value, ends)
        assert relative(by_a, -exact_density(a) / mass) < tolerance
        assert relative(by_b, exact_density(b) / mass) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 3e-14)])
@pytest.mark.parametrize("u", [0.5, 2.0**-20, 1 - 2.0**-20])
@pytest.mark.parametrize(("a", "b"), ENDS)
def test_truncated_normals_against_mpmath(
    a: float, b: float, u: float, dtype: torch.dtype, tolerance: float
) -> None:
    with mpmath.workdps(60):
        ends = [torch.tensor(end, dtype=dtype, requires_grad=True) for end in (a, b)]
        e = truncated_normal(*ends, torch.tensor(u, dtype=dtype))
        assert a <= e.item() <= b
        # The part of the mass that lies below e is u.
        error = (exact_mass(a, e.item()) - u * exact_mass(a, b)) / exact_density(e.item())
        assert abs(error) < tolerance * max(1, abs(e.item()))
        by_a, by_b = torch.autograd.grad(e, ends)
        assert relative(by_a, (1 - u) * exact_density(a) / exact_density(e.item())) < tolerance
        assert relative(by_b, u * exact_density(b) / exact_density(e.item())) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("t", [-1000.0, -40.0, -1.0, 0.0, 5.0])
def test_log_ndtr_and_its_gradient_against_mpmath(t: float, dtype: torch.dtype, tolerance: float) -> None:
    with mpmath.workdps(50):
        at = torch.tensor(t, dtype=dtype, requires_grad=True)
        value = log_ndtr(at)
        value.backward()
        assert relative(value, mpmath.log(exact_ndtr(t))) < max(tolerance, 1e-7 if t < 5 else 2e-5)
        assert relative(at.grad, exact_density(t) / exact_ndtr(t)) < tolerance


@pytest.mark.parametrize("middle", [-30.0, -3.0, 0.0, 3.0, 30.0])
def test_gradients_by_differences(middle: float) -> None:
    a = (middle + torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64)).requires_grad_()
    b = (middle + torch.tensor([0.5, 0.25, 3.0], dtype=torch.float64)).requires_grad_()
    u = torch.tensor([0.1, 0.5, 0.875], dtype=torch.float64)
    assert torch.autograd.gradcheck(log_ndtr, (a,))
    assert torch.autograd.gradcheck(log_interval, (a, b))
    assert torch.autograd.gradcheck(lambda a, b: truncated_normal(a, b, u), (a, b))


def test_the_operations_broadcast() -> None:
    a, b = torch.zeros(2, 1, requires_grad=True), torch.ones(3)
    assert log_interval(a, b).shape == (2, 3)
    truncated_normal(a, b, torch.tensor(0.5)).sum().backward()
    assert a.grad.shape == (2, 1)


def test_an_interval_without_mass_and_one_upside_down() -> None:
    assert log_interval(torch.tensor(1.0), torch.tensor(1.0)) == -INF
    assert log_interval(torch.tensor(2.0), torch.tensor(1.0)).isnan()


def points(n: int = 50, dim: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix + 2


@pytest.fixture(params=[Normal, CovarianceNormal])
def kind(request: pytest.FixtureRequest) -> type[Gaussian]:
    return request.param


@pytest.mark.parametrize("learned", [False, True])
def test_a_law_has_the_moments_it_is_given(kind: type[Gaussian], learned: bool) -> None:
    v, weights = points(), torch.rand(50, dtype=torch.float64)
    law = kind(3, learned).double()
    law.initialize(law.statistics(v, weights))
    mean = (weights @ v) / weights.sum()
    covariance = (weights[:, None] * (v - mean)).T @ (v - mean) / weights.sum()
    if kind is Normal:
        covariance = covariance.diagonal().diag()
    expected = torch.distributions.MultivariateNormal(mean, covariance)
    torch.testing.assert_close(law.log_prob(v), expected.log_prob(v))
    L, loc = law.conditionals()
    L = torch.diag(L) if L.ndim == 1 else L
    torch.testing.assert_close(L @ L.T, covariance.inverse())
    torch.testing.assert_close(loc, mean)
    assert law.ridge == 0


def test_conditionals_are_those_given_later_entries() -> None:
    law = CovarianceNormal(3).double()
    law.assign(law.statistics(points()))
    L, loc = law.conditionals()
    covariance = (L @ L.T).inverse()
    v = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for i in range(3):
        later = slice(i + 1, 3)
        gain = torch.linalg.solve(covariance[later, later], covariance[later, i])
        mean, variance = loc[i] + gain @ (v - loc)[later], covariance[i, i] - gain @ covariance[later, i]
        torch.testing.assert_close(loc[i] - L[later, i] @ (v - loc)[later] / L[i, i], mean)
        torch.testing.assert_close(L[i, i] ** -2, variance)


def test_moments_maximise_the_likelihood(kind: type[Gaussian]) -> None:
    law = kind(3, learned=True).double()
    v = points()
    law.initialize(law.statistics(v))
    law.log_prob(v).mean().backward()
    for parameter in law.parameters():
        assert parameter.grad.abs().max() < 1e-12
    law.log_prob(v + 1).mean().backward()
    assert all(parameter.grad.abs().max() > 0.01 for parameter in law.parameters())


def test_running_moments_are_weighted_by_age(kind: type[Gaussian]) -> None:
    law, expected = kind(3), kind(3)
    batches = [points(7, seed=seed) for seed in range(3)]
    for batch in batches:
        law.update(law.statistics(batch), 0.5)
    weights = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64).repeat_interleave(7)
    expected.assign(expected.statistics(torch.cat(batches), weights))
    torch.testing.assert_close(law.moments, expected.moments)
    assert law.moments.flatten()[0] == 7 * 1.75
    # An empty batch takes nothing away.
    before = law.loc.clone()
    law.update(law.statistics(points(0)), 0.5)
    torch.testing.assert_close(law.loc, before)


def test_statistics_add_up(kind: type[Gaussian]) -> None:
    law = kind(3)
    v = points()
    assert law.statistics(v.float()).dtype == torch.float64
    torch.testing.assert_close(law.statistics(v[:20]) + law.statistics(v[20:]), law.statistics(v))


def test_a_distant_mean_costs_no_digits(kind: type[Gaussian]) -> None:
    near, far = kind(3).double(), kind(3).double()
    near.assign(near.statistics(points()))
    # One batch is centred once, further ones about the running mean.
    for chunk in (points() + 1e4).split(25):
        far.update(far.statistics(chunk), 1.0)
    torch.testing.assert_close(far.log_diag, near.log_diag, rtol=0, atol=1e-5)
    # Converted to float32, as a checkpoint may be, moments are still good for another update.
    far.float()
    assert far.moments.dtype == torch.float32
    far.double().update(far.statistics(points()[:0] + 1e4), 1.0)
    torch.testing.assert_close(far.log_diag, near.log_diag, rtol=0, atol=1e-4)


def test_singular_moments_get_a_ridge_that_is_told(kind: type[Gaussian]) -> None:
    law = kind(3)
    v = points()
    v[:, 1] = 5.25
    law.assign(law.statistics(v))
    assert 0 < law.ridge < 1e-9
    assert torch.isfinite(law.log_prob(v.float())).all()
    with pytest.raises(ValueError, match="do not vary"):
        law.assign(law.statistics(torch.ones(4, 3)))


def test_fewer_points_than_entries_get_a_ridge() -> None:
    law = CovarianceNormal(8).double()
    v = points(5, 8)
    law.assign(law.statistics(v))
    assert law.ridge > 0
    L, _ = law.conditionals()
    found = L.inverse().T @ L.inverse()
    centred = v - v.mean(0)
    torch.testing.assert_close(found, centred.T @ centred / 5, rtol=0, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_samples_have_the_moments(kind: type[Gaussian], learned: bool) -> None:
    law = kind(2, learned).double()
    law.initialize(law.statistics(points(dim=2)))
    v = law.sample(20000, generator=torch.Generator().manual_seed(1))
    again = law.sample(20000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(v, again)
    assert not v.requires_grad
    e, _ = law.standardize(v)
    torch.testing.assert_close(e.mean(0), e.new_zeros(2), rtol=0, atol=0.03)
    torch.testing.assert_close(e.T.cov(), torch.eye(2, dtype=torch.float64), rtol=0, atol=0.03)


def test_a_state_is_the_law(kind: type[Gaussian]) -> None:
    law, other = kind(3), kind(3)
    law.assign(law.statistics(points()))
    other.load_state_dict(law.state_dict())
    v = points().float()
    assert torch.equal(law.log_prob(v), other.log_prob(v))
    other.update(other.statistics(v), 0.5)


def test_autocast_reaches_no_density(kind: type[Gaussian]) -> None:
    law = kind(3)
    law.assign(law.statistics(points()))
    v = points().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = law.log_prob(v)
    assert torch.equal(found, law.log_prob(v))


def test_masses_of_boxes_add_up_to_one() -> None:
    law = Normal(2, learned=True).double()
    law.initialize(law.statistics(points(dim=2)))
    ends = [-INF, -2.0, 0.0, 1.5, 40.0, INF]
    lines = torch.tensor(list(pairwise(ends)), dtype=torch.float64)
    boxes = torch.stack([torch.stack([s, t]) for s in lines for t in lines])
    masses = law.log_mass(boxes[..., 0], boxes[..., 1])
    torch.testing.assert_close(masses.exp().sum(), masses.new_ones(()))
    one = law.log_mass(boxes[7:8, :, 0], boxes[7:8, :, 1])
    scale = torch.exp(-law.log_diag)
    expected = torch.distributions.Normal(law.loc, scale)
    torch.testing.assert_close(
        one.exp(), (expected.cdf(boxes[7, :, 1]) - expected.cdf(boxes[7, :, 0])).prod()[None]
    )
    masses[masses > -100].sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in law.parameters())


class Table(nn.Module):
    def __init__(self, params: Tensor) -> None:
        super().__init__()
        self.params = nn.Parameter(params)

    def forward(self, x: Tensor, *rest: Context) -> Tensor:
        return self.params * x.mean(1)[:, None, None]


def test_a_conditional_law_is_normal_given_the_context() -> None:
    law = ConditionalNormal(Table(torch.randn(3, 2))).double()
    given, v = torch.rand(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    params, context = law.net(given), Context(given=(given,))
    expected = torch.distributions.Normal(params[..., 0], params[..., 1].exp()).log_prob(v).sum(1)
    torch.testing.assert_close(law.log_prob(v, context), expected)
    torch.testing.assert_close(law.log_prob(v, Context(given=(given, given))), expected)
    standard = ConditionalNormal(Table(torch.zeros(3, 2))).double()
    torch.testing.assert_close(standard.log_prob(v, context), StandardNormal(3).log_prob(v))
    drawn = law.sample(5, context, torch.Generator().manual_seed(0))
    e = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(drawn, params[..., 0] + params[..., 1].exp() * e)


def test_a_split_of_normal_laws_is_a_normal_law() -> None:
    mask = torch.tensor([True, False, True])

    class Line(nn.Module):
        def forward(self, kept: Tensor) -> Tensor:
            return torch.stack([kept.sum(1) / 2, torch.zeros(len(kept))], -1)[:, None]

    law = Split(mask, ConditionalNormal(Line()), StandardNormal(2))
    v = torch.randn(6, 3)
    mean_square = v.square().sum(1) - v[:, 1].square() + (v[:, 1] - (v[:, 0] + v[:, 2]) / 2).square()
    torch.testing.assert_close(law.log_prob(v), -0.5 * mean_square - 1.5 * math.log(2 * math.pi))
    assert law.sample(4).shape == (4, 3)


def test_the_standard_normal_law() -> None:
    law = StandardNormal(2)
    v = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(law.log_prob(v), torch.tensor([-math.log(2 * math.pi) - 0.5]))
    assert law.sample(3).dtype == torch.float32
    assert law.double().sample(3).dtype == torch.float64
    assert not law.state_dict()


def ones(*shape: int) -> Context:
    return Context(given=(torch.ones(shape),))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Normal(0), "dim must be at least 1"),
        (lambda: StandardNormal(0), "dim must be at least 1"),
        (lambda: Normal(2).log_prob(torch.zeros(4, 3)), "expected floating"),
        (lambda: CovarianceNormal(2).log_prob(torch.zeros(4, 2, dtype=torch.int64)), "torch.int64"),
        (lambda: StandardNormal(2).log_prob(torch.zeros(4, 3)), "expected floating"),
        (lambda: Normal(2).statistics(torch.zeros(4, 2), torch.ones(3)), "weights have shape"),
        (lambda: Normal(2).assign(torch.zeros(3, 3)), "statistics have shape"),
        (lambda: Normal(2).assign(torch.zeros(3, 2)), "positive weight"),
        (lambda: Normal(2).assign(torch.full((3, 2), math.nan)), "finite"),
        (lambda: Normal(2).update(torch.ones(3, 2), 1.5), "momentum must lie"),
        (lambda: Normal(2, learned=True).update(torch.ones(3, 2), 0.5), "learned"),
        (lambda: ConditionalNormal(nn.Identity()).log_prob(torch.zeros(1, 2)), "needs a context"),
        (lambda: ConditionalNormal(nn.Identity()).log_prob(torch.zeros(1, 2), ones(1, 2)), "params"),
        (
            lambda: ConditionalNormal(nn.Identity()).log_prob(torch.zeros(1, 3), ones(1, 2, 2)),
            "the params of the net",
        ),
        (lambda: ConditionalNormal(nn.Identity()).sample(2, ones(1, 2, 2)), "2 draws"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Distribution], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
