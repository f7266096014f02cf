"""Discretized logistic laws: their mass against many digits, sums, gradients, draws."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import nn

from dflow.core import Context
from dflow.distributions import ConditionalLogistic, Logistic, LogisticMixture
from dflow.distributions.logistic import LEAST, MOST, _standard, log_mass
from dflow.ops import devices

WINDOW = torch.arange(-4000, 4001)


def reference(x: int, loc: float, log_scale: float) -> float:
    with mpmath.workdps(60):
        # The law is symmetric: in the upper tail the two terms are as small as their difference.
        d, s = abs(mpmath.mpf(x) - mpmath.mpf(loc)), mpmath.exp(mpmath.mpf(log_scale))
        a, b = (1 / (1 + mpmath.exp((d + half) / s)) for half in (mpmath.mpf("-0.5"), mpmath.mpf("0.5")))
        return float(mpmath.log(a - b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_scale", [-11.0, -4.0, -1.0, 0.0, 2.5, 9.0, 20.0, 29.0])
def test_the_mass_has_its_digits_in_both_tails_and_at_any_scale(log_scale, dtype):
    scale = math.exp(log_scale)
    for loc in (0.0, 0.25, -3.375):
        for z in (-600, -30, -2, 0, 1, 40, 500):
            x = round(loc + z * scale)
            found = log_mass(
                torch.tensor(x).to(dtype),
                torch.tensor(loc, dtype=dtype),
                torch.tensor(log_scale, dtype=dtype),
            )
            expected = reference(x, loc, log_scale)
            eps = torch.finfo(dtype).eps
            rel = (8 + abs(log_scale)) * eps
            assert found.item() == pytest.approx(expected, rel=rel, abs=eps), (loc, x)


def test_scales_are_held():
    x = torch.tensor([0.0, 3.0])
    for inside, outside in ((LEAST, -1000.0), (MOST, 1000.0)):
        loc = torch.tensor(0.25)
        assert torch.equal(log_mass(x, loc, torch.tensor(outside)), log_mass(x, loc, torch.tensor(inside)))


def test_gradients_are_those_of_differences_and_finite_everywhere():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-20, 20, (200,), generator=generator).double().requires_grad_()
    loc = (5 * torch.randn(200, generator=generator, dtype=torch.float64)).requires_grad_()
    log_scale = torch.randn(200, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(log_mass, (x, loc, log_scale))
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([0, 1, -1, 255, -(10**6), 10**6], dtype=dtype)
        loc = torch.tensor([0.0, 0.5, 1e6], dtype=dtype)
        log_scale = torch.tensor([-1000, -12, -11, -3, 0, 5, 29, 30, 1000], dtype=dtype)
        grid = [t.requires_grad_() for t in torch.meshgrid(x, loc, log_scale, indexing="ij")]
        value = log_mass(*grid)
        assert value.isfinite().all()
        assert (value <= 0).all()
        for gradient in torch.autograd.grad(value.sum(), grid):
            assert gradient.isfinite().all()


class Net(nn.Module):
    """Params from two numbers of context."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.shape = (dim, count)
        self.linear = nn.Linear(2, dim * count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.to(self.linear.weight.dtype)).unflatten(1, self.shape)


def build(kind, dim=2):
    centre, unit = torch.tensor([3.0, -7.0])[:dim], torch.tensor([2.0, 5.0])[:dim]
    laws = {
        "single": lambda: Logistic(dim, None, centre, unit),
        "shared": lambda: Logistic(dim, torch.zeros(dim, dtype=torch.int64)),
        "mixture": lambda: LogisticMixture(dim, 5, None, centre, unit),
        "shared mixture": lambda: LogisticMixture(dim, 3, torch.zeros(dim, dtype=torch.int64), centre, unit),
        "conditional": lambda: ConditionalLogistic(Net(dim, 2), dim, 1, centre, unit),
        "conditional mixture": lambda: ConditionalLogistic(Net(dim, 9), dim, 3),
    }
    law = laws[kind]().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in law.parameters():
            p.copy_(0.7 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return law


def context_of(kind, n):
    given = torch.tensor([[1.0, -0.5]], dtype=torch.float64).expand(n, 2)
    return Context(given=(given,)) if "conditional" in kind else None


KINDS = ["single", "shared", "mixture", "shared mixture", "conditional", "conditional mixture"]
each = pytest.mark.parametrize("kind", KINDS)


@each
def test_each_entry_sums_to_one_and_they_are_independent(kind):
    law = build(kind)
    params = law.params(context_of(kind, 1))
    assert len(params) == (3 if "mixture" in kind else 2)
    masses = []
    for entry in range(2):
        loc, log_scale, *weights = (p[0, entry] for p in params)
        terms = log_mass(WINDOW[:, None].double(), loc, log_scale)
        terms = torch.logsumexp(terms + weights[0], -1) if weights else terms.squeeze(1)
        # The floor, law U of the module, around the rounded mean of the centres.
        offset = WINDOW - law.centre[entry].mean().round()
        j = torch.where(offset < 0, -1 - offset, offset).double()
        floor = 2.0 ** -(2 * torch.floor(torch.log2(j + 1)) + 2)
        terms = torch.log((1 - 2.0**-16) * terms.exp() + 2.0**-16 * floor)
        outside = 2.0**-16 * (1 - floor.sum())
        terms_sum = terms.exp().sum() + outside
        assert terms_sum.item() == pytest.approx(1, abs=1e-12)
        masses.append(terms)
    x = torch.cartesian_prod(torch.arange(-9, 14), torch.arange(-30, 9))
    expected = masses[0][x[:, 0] + 4000] + masses[1][x[:, 1] + 4000]
    torch.testing.assert_close(law.log_prob(x, context_of(kind, len(x))), expected, rtol=1e-12, atol=1e-12)


@each
def test_modes_agree_and_gradients_reach_everything(kind):
    law, x = build(kind), torch.tensor([[3, -7], [-40, 90], [0, 1]])
    floats = x.double().requires_grad_()
    value = law.log_prob(floats, context_of(kind, 3))
    assert torch.equal(value, law.log_prob(x, context_of(kind, 3)))
    value.sum().backward()
    for p in (*law.parameters(), floats):
        assert p.grad.isfinite().all()
        assert p.grad.abs().sum() > 0
    single = law.float()
    context = context_of(kind, 3)
    context = context and Context(given=(context.given[0].float(),))
    assert single.log_prob(x, context).dtype == torch.float32
    assert single.log_prob(x.double(), context).dtype == torch.float64
    torch.testing.assert_close(single.log_prob(x, context).double(), value, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("without_float64", [False, True])
def test_draws_are_those_of_the_law(kind, without_float64, monkeypatch):
    if without_float64:
        monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"cpu"})
    law, n = build(kind), 40_000
    x = law.sample(n, context_of(kind, n), torch.Generator().manual_seed(2))
    assert x.dtype == torch.int64
    assert x.shape == (n, 2)
    assert torch.equal(x, law.sample(n, context_of(kind, n), torch.Generator().manual_seed(2)))
    params = law.params(context_of(kind, 1))
    for entry in range(2):
        loc, log_scale, *weights = (p[0, entry] for p in params)
        terms = log_mass(WINDOW[:, None].double(), loc, log_scale)
        law_of = (torch.logsumexp(terms + weights[0], -1) if weights else terms.squeeze(1)).exp()
        found = torch.bincount(x[:, entry].clamp(-4000, 4000) + 4000, minlength=8001) / n
        # Total variation of an empirical law: about sqrt(2 / (pi n)) sum sqrt(p) / 2.
        limit = 2 * (2 / (math.pi * n)) ** 0.5 * law_of.sqrt().sum().item() / 2
        assert (found - law_of).abs().sum().item() / 2 < limit


def test_without_float64_draws_are_finite_and_their_tails_reach_far(monkeypatch):
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"cpu"})
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.zeros(shape, dtype=kwargs["dtype"]))
    draws, _, _ = _standard((1,), None, torch.device("cpu"))
    assert draws.tolist() == pytest.approx([-50 * math.log(2)], rel=1e-5)


def test_components_start_apart_and_within_one_logistic():
    law = LogisticMixture(1, 5).double()
    loc, _, log_weights = law.params()
    assert (loc.diff() > 0).all()
    assert torch.equal(log_weights.exp().sum(-1), torch.ones(1, 1).double())
    one = Logistic(1).double()
    x = torch.arange(-30, 31)[:, None]
    p, q = law.log_prob(x).exp(), one.log_prob(x).exp()
    assert (p - q).abs().sum() < 0.3
    conditional = ConditionalLogistic(Net(1, 15), 1, 5).double()
    nn.init.zeros_(conditional.net.linear.weight)
    nn.init.zeros_(conditional.net.linear.bias)
    torch.testing.assert_close(conditional.log_prob(x, Context(given=(torch.zeros(61, 2),))), law.log_prob(x))


@pytest.mark.parametrize("components", [1, 4])
def test_a_start_from_data(components):
    law = LogisticMixture(2, components).double()
    source = Logistic(2, None, torch.tensor([100.0, -20.0]), torch.tensor([9.0, 3.0])).double()
    x = source.sample(20_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.stack([x[:, 0], x[:, 1] * 0], 1)])
    law.initialize(x)
    assert law.centre.shape == law.unit.shape == (2, components)
    torch.testing.assert_close(law.centre.mean(1)[0], torch.tensor(100.0).double(), rtol=0, atol=0.3)
    if components == 1:
        torch.testing.assert_close(law.unit[0, 0], torch.tensor(9.0).double(), rtol=0.03, atol=0)
    else:
        # Half of the second entries are 0, and the others smaller, but for a few.
        assert law.centre[1, 2] == 0
        assert law.unit[1, 2] == 0.25
        assert (law.centre.diff() >= 0).all()
    better = law.log_prob(x).mean() - LogisticMixture(2, components).double().log_prob(x).mean()
    assert better > 10
    # What is constant has no scale: a sixteenth of the unit before, or a quarter.
    wide = Logistic(2, None, None, torch.tensor([64.0, 1.0]))
    wide.initialize(torch.ones(5, 2, dtype=torch.int64))
    assert wide.unit.tolist() == [[4.0], [0.25]]
    # Fewer rows than components.
    few = LogisticMixture(1, 3)
    few.initialize(torch.tensor([[5], [90]]))
    assert few.centre.min() == 5
    assert few.centre.max() == 90
    assert wide.state_dict().keys() == {"centre", "unit", "classes", "raw"}


def test_wrong_arguments_are_named():
    for call, message in [
        (lambda: Logistic(0), "dim must be at least 1"),
        (lambda: LogisticMixture(2, 0), "components must be at least 1"),
        (lambda: Logistic(2, None, torch.zeros(3)), "centre must be finite"),
        (lambda: Logistic(2, None, None, torch.zeros(2)), "unit must be positive"),
        (lambda: Logistic(2, torch.tensor([0, -1])), "classes"),
        (lambda: Logistic(2).log_prob(torch.zeros(3, 3)), "expected int64 or floating"),
        (lambda: Logistic(2).log_prob(torch.zeros(3, 2, dtype=torch.int32)), "torch.int32"),
        (lambda: build("conditional").log_prob(torch.zeros(3, 2)), "needs a context"),
        (
            lambda: build("conditional").log_prob(torch.zeros(3, 2), Context(given=(torch.zeros(2, 2),))),
            "3 rows, the context 2",
        ),
        (
            lambda: build("conditional").sample(3, Context(given=(torch.zeros(2, 2),))),
            "3 draws from a context of 2",
        ),
        (
            lambda: ConditionalLogistic(Net(3, 2), 2).params(Context(given=(torch.zeros(1, 2),))),
            "the net gave params",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
