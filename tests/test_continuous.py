"""Every bijector of the reals: round trips, log_det against autodiff, gradients, context; the families."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CONTINUOUS, SHAPES, build_continuous, context_for, randomize
from torch import nn

from dflow.bijectors import ActNorm, Chain, Coupling
from dflow.core import Context, Distribution, conditioned
from dflow.elementwise import Affine, MixtureLogistic, ModShift, Spline
from dflow.flows import Flow, Split
from dflow.nn.densenet import DenseNet
from dflow.nn.perceptron import Perceptron

every = pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in CONTINUOUS for shape in SHAPES], ids=str
)
each = pytest.mark.parametrize("name", CONTINUOUS)


def data(shape, batch=6, scale=1.5):
    return scale * torch.randn(batch, math.prod(shape), dtype=torch.float64)


@every
def test_round_trip(name, shape):
    bijector, x = build_continuous(name, shape), data(shape)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        bijector.to(dtype)
        context = context_for(name, shape, len(x))
        context = context and Context(given=(context.given[0].to(dtype),))
        for there, back in ((bijector.forward, bijector.inverse), (bijector.inverse, bijector.forward)):
            z, log_det = there(x.to(dtype), context)
            found, other = back(z, context)
            assert z.dtype == log_det.dtype == dtype
            assert z.shape == x.shape
            assert log_det.shape == (len(x),)
            torch.testing.assert_close(found, x.to(dtype), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(other, -log_det, rtol=tolerance, atol=10 * tolerance)
        assert not torch.allclose(z, x.to(dtype), atol=0.01)


@every
def test_log_det_is_that_of_the_jacobian(name, shape):
    bijector, x = build_continuous(name, shape), data(shape, 1)
    context = context_for(name, shape, 1)
    for move in (bijector.forward, bijector.inverse):
        if move == bijector.inverse and x.shape[1] > 12 and "autoregressive" in name:
            continue  # dim calls, each to be differentiated dim times
        jacobian = torch.autograd.functional.jacobian(lambda x, move=move: move(x, context)[0][0], x)[:, 0]
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(move(x, context)[1][0], expected, rtol=1e-8, atol=1e-8)


@every
def test_gradients_reach_the_data_and_every_parameter(name, shape):
    bijector, x = build_continuous(name, shape), data(shape, 16)
    context = context_for(name, shape, len(x))
    for move in (bijector.forward, bijector.inverse):
        if move == bijector.inverse and x.shape[1] > 12 and "autoregressive" in name:
            continue
        bijector.zero_grad()
        x = x.detach().clone().requires_grad_()
        z, log_det = move(x, context)
        ((z * torch.randn_like(z)).sum() + log_det.sum()).backward()
        for parameter_name, parameter in (*bijector.named_parameters(), ("x", x)):
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0, parameter_name


@every
def test_conditioners_start_at_the_identity(name, shape):
    bijector, x = CONTINUOUS[name](shape).double(), data(shape)
    if any(key in name for key in ("conv", "step")):
        assert bijector.forward(x)[1].abs().max() < 1e-6  # a rotation
        norm = bijector.forward(x)[0].norm(dim=1)
        torch.testing.assert_close(norm, x.norm(dim=1), rtol=1e-5, atol=0)
        return
    z, log_det = bijector.forward(x, context_for(name, shape, len(x)))
    torch.testing.assert_close(z, x, rtol=0, atol=1e-12)
    assert log_det.abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CONTINUOUS if "context" in name])
def test_context_matters_is_differentiable_and_is_asked_for(name, shape):
    bijector, x = build_continuous(name, shape), data(shape)
    given = context_for(name, shape, len(x)).given[0].requires_grad_()
    z, _ = bijector.forward(x, Context(given=(given,)))
    (gradient,) = torch.autograd.grad(z.square().sum(), given)
    assert (gradient.abs().sum(0) > 0).all()
    # In two parts, as inside a `Split`.
    assert torch.equal(bijector.forward(x, Context(given=(given[:, :1], given[:, 1:])))[0], z)
    for wrong in (None, Context(given=(given[:, 1:],))):
        with pytest.raises(ValueError, match="context"):
            bijector.forward(x, wrong)


@each
def test_state_survives_saving(name):
    one, other = build_continuous(name, (4, 2, 2)), CONTINUOUS[name]((4, 2, 2)).double()
    assert {name for name, _ in one.named_buffers()} <= set(one.state_dict())
    other.load_state_dict(one.state_dict())
    x, context = data((4, 2, 2)), context_for(name, (4, 2, 2), 6)
    assert torch.equal(one.forward(x, context)[0], other.forward(x, context)[0])


def test_a_coupling_cut_in_halves_is_the_one_by_index():
    for first in (True, False):
        mask = (torch.arange(6) < 2) == first
        for elementwise, x in ((Affine(), data((6, 1, 1))), (ModShift(5), torch.randint(5, (6, 6)))):
            fast = Coupling(elementwise, Fixed(int((~mask).sum()), elementwise.num_params), mask)
            slow = Coupling(elementwise, fast.net, mask)
            assert fast._halves() is not None
            slow._halves = lambda: None
            for move in ("forward", "inverse"):
                for found, expected in zip(getattr(fast, move)(x), getattr(slow, move)(x), strict=True):
                    assert torch.equal(found, expected)
            assert torch.equal(fast.params(x), slow.params(x))
    # Neither all entries nor two runs of them: by index.
    for known, hidden in (([0], [2]), ([0, 2], [1]), ([1], [0, 2])):
        line = torch.arange(3)
        coupling = Coupling(
            Affine(),
            Fixed(len(hidden), 2),
            torch.isin(line, torch.tensor(known)),
            torch.isin(line, torch.tensor(hidden)),
        )
        assert coupling._halves() is None
        x = data((3, 1, 1))
        assert torch.equal(coupling.forward(x)[0][:, known], x[:, known])


class Fixed(nn.Module):
    """Params that hang on the sum of the known entries, of the dtype of weights."""

    def __init__(self, hidden, num_params):
        super().__init__()
        self.scale = torch.randn(hidden, num_params, dtype=torch.float64)

    def forward(self, x, context=None):
        return torch.sin(x.double().sum(1))[:, None, None] * self.scale


# --- families -----------------------------------------------------------------------------------------


MIXTURES = [MixtureLogistic(), MixtureLogistic(1), MixtureLogistic(5, 2.0)]
FAMILIES = [Affine(), Affine(1.0), Spline(), Spline(2, 1.0), Spline(17, 3.0), *MIXTURES]


@pytest.mark.parametrize("elementwise", FAMILIES, ids=str)
def test_families_are_monotone_and_differentiate_to_their_log_det(elementwise):
    x = torch.linspace(-6, 6, 401, dtype=torch.float64)[:, None].requires_grad_()
    for size in (0.0, 1.0, 4.0):
        params = (size * torch.randn(1, 1, elementwise.num_params, dtype=torch.float64)).expand(401, 1, -1)
        for move in (elementwise.forward, elementwise.inverse):
            z, log_det = move(x, params)
            (slope,) = torch.autograd.grad(z.sum(), x)
            # A mixture is flatter between narrow components than the floats can tell.
            rise, flat = z.diff(dim=0), torch.maximum(log_det[1:], log_det[:-1]) < -20
            assert ((rise > 0) | (flat & (rise > -1e-12))).all()
            torch.testing.assert_close(slope.log(), log_det, rtol=1e-8, atol=1e-8)
            if size == 0:
                torch.testing.assert_close(z, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("elementwise", FAMILIES, ids=str)
def test_gradients_of_families(elementwise):
    x = (2 * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    params = torch.randn(3, 4, elementwise.num_params, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(elementwise.forward, (x, params))
    assert torch.autograd.gradcheck(elementwise.inverse, (x, params))
    # Params as a network lays them out: the numbers of an entry far apart.
    rows = params.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not rows.is_contiguous()
    for found, expected in zip(elementwise.forward(x, rows), elementwise.forward(x, params), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1.0, 5.0, 20.0])
def test_a_spline_in_single_precision_inverts_itself_even_with_extreme_params(size):
    spline = Spline()
    x = 5 * torch.rand(400, 50) - 2.5
    params = size * torch.randn(400, 50, spline.num_params)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        params, x = params.to(dtype), x.to(dtype)
        y, log_det = spline.inverse(x, params)
        z, other = spline.forward(y, params)
        assert y.isfinite().all()
        # Where the map is steep, a rounded argument is worth that many times its rounding.
        error = (z - x).abs() / (1 + (-log_det).exp())
        assert error.max() < tolerance, error.max()
        torch.testing.assert_close(other, -log_det, rtol=0, atol=0.05 if dtype == torch.float32 else 1e-9)


def test_a_spline_is_the_identity_outside_its_interval_and_has_finite_gradients_everywhere():
    spline = Spline(4, 2.0)
    x = torch.tensor([[-1e6, -2.0001, -2.0, 2.0, 2.0001, 1e6]], requires_grad=True)
    params = (30 * torch.randn(1, 6, spline.num_params)).requires_grad_()
    for move in (spline.forward, spline.inverse):
        z, log_det = move(x, params)
        torch.testing.assert_close(z, x)
        assert torch.equal(log_det[:, [0, 1, 4, 5]], torch.zeros(1, 4))
        gradients = torch.autograd.grad(z.sum() + log_det.sum(), (x, params))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert torch.equal(gradients[0][:, [0, 1, 4, 5]], torch.ones(1, 4))
        assert gradients[1][:, [0, 1, 4, 5]].abs().max() == 0


def test_a_spline_passes_through_its_knots():
    """Two bins of widths and heights known by hand."""
    params = torch.tensor([math.log(3.0), 0, 0, 0, 0], dtype=torch.float64)
    width = 2 * (0.001 + 0.998 * 0.75)
    knot = torch.tensor([[width - 1]], dtype=torch.float64)
    z, log_det = Spline(2, 1.0).forward(knot, params[None, None])
    torch.testing.assert_close(z, torch.zeros(1, 1, dtype=torch.float64))
    torch.testing.assert_close(log_det, torch.zeros(1, 1, dtype=torch.float64))


def mixed(elementwise, n, size=1.0, dtype=torch.float64):
    return size * torch.randn(50, n, elementwise.num_params, dtype=dtype)


@pytest.mark.parametrize("size", [1.0, 5.0])
@pytest.mark.parametrize("elementwise", MIXTURES, ids=str)
def test_a_mixture_inverts_itself(elementwise, size):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        z, params = 2 * torch.randn(50, 200, dtype=dtype), mixed(elementwise, 200, size, dtype)
        x, log_det = elementwise.inverse(z, params)
        found, other = elementwise.forward(x, params)
        # Where the map is steep, a rounded argument is worth that many times its rounding.
        assert ((found - z).abs() / (1 + other.exp() * (1 + x.abs()))).max() < tolerance
        torch.testing.assert_close(other, -log_det, rtol=0, atol=0)
        # Whoever is beside it.
        torch.testing.assert_close(elementwise.inverse(z[:, 3:5], params[:, 3:5])[0], x[:, 3:5])


def test_a_mixture_is_that_of_its_distribution_function():
    """Against the formula, where it does not cancel; the factors are those of two components."""
    x, family = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None], MixtureLogistic(2, 3.0)
    params = torch.tensor([0.3, -0.5, 1.0, -0.7, 0.4, -0.9, 0.5, 0.2], dtype=torch.float64)
    z, log_det = family.forward(x, params.expand(31, 1, -1))
    w = 0.0005 + 0.999 * params[:2].softmax(0)
    loc = params[2:4] * torch.tensor([0.5, 2.0])
    raw = params[4:6] * torch.tensor([0.5, 2.0])
    s = torch.where(raw > 0, 2 * torch.tanh(raw / 2), 3 * torch.tanh(raw / 3)).exp()
    F = (w * torch.sigmoid((x - loc) / s)).sum(1, keepdim=True)
    scale = torch.exp(2 * torch.tanh(params[6] / 2))
    torch.testing.assert_close(z, torch.logit(F) * scale + params[7], rtol=1e-12, atol=1e-12)
    c = torch.sigmoid((x - loc) / s)
    f = (w * c * (1 - c) / s).sum(1, keepdim=True)
    torch.testing.assert_close(log_det, torch.log(scale * f / (F * (1 - F))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_of_a_mixture_are_lines(dtype):
    family = MixtureLogistic(4)
    params = mixed(family, 4, 2.0, dtype)
    params[..., 8:12] = torch.tensor([9.0, -1.0, 0.0, 0.3])
    for far in (200.0, 1e4, 1e6):
        for side in (-1, 1):
            x = torch.full((50, 4), side * far, dtype=dtype)
            z, log_det = family.forward(x, params)
            torch.testing.assert_close(family.inverse(z, params)[0], x)
            # The slope is that of the widest component, and that from here to twice as far.
            slope = 2 * torch.tanh(params[..., 12] / 2) - 2 * math.tanh(9 / 4)
            torch.testing.assert_close(log_det, slope)
            twice, _ = family.forward(2 * x, params)
            torch.testing.assert_close((twice - z) / x, log_det.exp(), rtol=1e-4, atol=0)


def test_a_mixture_is_exact_between_components_that_are_far_off():
    family = MixtureLogistic(2)
    params = torch.zeros(1, 1, 8)
    params[..., 2:4] = torch.tensor([-20.0, 5.0])  # means -10 and 10
    params[..., 4:6] = -20.0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x = torch.full((1, 1), 1.0, dtype=dtype, requires_grad=True)
        given = params.to(dtype).requires_grad_()
        z, log_det = family.forward(x, given)
        inv = -5 * torch.tanh(torch.tensor([-2.0, -8.0], dtype=torch.float64))
        near = inv.exp() * torch.tensor([11.0, 9.0], dtype=torch.float64)
        expected = (inv - near + math.log(0.5)).logsumexp(0) - math.log(0.25)
        torch.testing.assert_close(log_det.double().sum(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(z, torch.zeros_like(z), rtol=0, atol=1e-6)
        gradients = torch.autograd.grad(z.sum() + log_det.sum(), (x, given))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert gradients[0].abs() > 1  # out of the valley


def test_components_of_a_mixture_part_ways():
    """Alike at zero, they would be moved alike."""
    family = MixtureLogistic(4)
    params = torch.zeros(1, 200, family.num_params, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 200, dtype=torch.float64) + 0.5
    z, log_det = family.forward(x, params)
    (gradient,) = torch.autograd.grad((z.square() / 2 - log_det).sum(), params)
    rows = gradient.sum((0, 1))
    for part in (rows[4:8], rows[8:12]):
        assert len(part.unique()) == 4
    with torch.no_grad():
        # By signs alone, as Adam begins: the means differ even so, and then the weights are told apart.
        params -= 0.1 * rows.sign()
    z, log_det = family.forward(x, params)
    (gradient,) = torch.autograd.grad((z.square() / 2 - log_det).sum(), params)
    assert gradient.sum((0, 1))[:4].abs().min() > 1e-3


def test_an_affine_scale_is_bounded():
    z, log_det = Affine(1.0).inverse(torch.ones(1, 2), torch.tensor([[[0.0, 1e4], [0.0, -1e4]]]))
    torch.testing.assert_close(z, torch.tensor([[math.e, 1 / math.e]]))
    torch.testing.assert_close(log_det, torch.tensor([[1.0, -1.0]]))


def test_arguments_of_families_are_checked():
    for bound in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="bound"):
            Affine(bound)
    with pytest.raises(ValueError, match="found 0"):
        MixtureLogistic(0)
    for bins in (1, 1000):
        with pytest.raises(ValueError, match=f"found {bins}"):
            Spline(bins)
    with pytest.raises(ValueError, match=r"int64 \(2, 3\)"):
        Affine().forward(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match=r"expected \(2, 3, 23\)"):
        Spline().inverse(torch.zeros(2, 3), torch.zeros(2, 3, 22))


# --- parts factored out -------------------------------------------------------------------------------


class Gauss(Distribution):
    """Normal entries with mean and log scale from a net of the context, standard without."""

    def __init__(self, dim, net=None):
        super().__init__()
        self.dim, self.net = dim, net

    def params(self, context):
        if self.net is None:
            return torch.zeros(1, self.dim, dtype=torch.float64), torch.zeros(
                1, self.dim, dtype=torch.float64
            )
        return conditioned(self.net, context).unbind(-1)

    def log_prob(self, x, context=None):
        loc, log_scale = self.params(context)
        return torch.distributions.Normal(loc, log_scale.exp()).log_prob(x).sum(1)

    def sample(self, n, context=None, generator=None):
        loc, log_scale = self.params(context)
        return loc + log_scale.exp() * torch.randn(n, self.dim, generator=generator, dtype=torch.float64)


def law(net, base_dim, rest, mask):
    return Split(mask, Gauss(rest, net), Gauss(base_dim))


@pytest.mark.parametrize("kind", ["perceptron", "densenet"])
def test_a_split_of_reals_is_normalised_and_draws_what_it_scores(kind):
    mask = torch.tensor([True, False])
    net = (
        Perceptron(1, 1, 2, hidden_size=8)
        if kind == "perceptron"
        else DenseNet(1, 1, (1, 1), 2, hidden_size=4, depth=2)
    )
    split = randomize(Flow(Chain([ActNorm((2, 1, 1))]), law(net, 1, 1, mask)))
    # Integrated over a grid; the conditional's scale is modest at these weights.
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.mul_(0.3)
    line = torch.linspace(-12, 12, 601, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    with torch.no_grad():
        mass = split.log_prob(x).exp()[:, None] * (line[1] - line[0]) ** 2
    assert abs(float(mass.sum()) - 1) < 1e-6
    # The mean under the law, and that of draws.
    expected = (mass * x).sum(0)
    drawn = split.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 2)
    assert ((drawn.mean(0) - expected).abs() < 5 * drawn.std(0) / 20_000**0.5).all()


def test_a_split_of_an_image_gives_its_net_the_kept_part_and_the_context():
    net = DenseNet(1, 1, (2, 2), 2, hidden_size=4, depth=2, context_channels=1)
    split = randomize(law(net, 4, 4, torch.arange(8) < 4))
    x, given = data((2, 2, 2), 3), data((1, 2, 2), 3)
    context = Context(given=(given,))
    expected = Gauss(4).log_prob(x[:, :4]) + Gauss(4, net).log_prob(
        x[:, 4:], Context(given=(x[:, :4], given))
    )
    torch.testing.assert_close(split.log_prob(x, context), expected)
    assert split.sample(3, context).shape == (3, 8)
