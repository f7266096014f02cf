"""Random weights and signs: moments by enumeration and by draws, pooling, normalisation, thresholds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dflow.nn.batch_norm import StochasticBatchNorm, reestimate
from dflow.nn.binary import BinaryConv2d, BinaryLinear, SymbolPerceptron
from dflow.nn.classifier import Head, Pixels
from dflow.nn.moments import Moments, Signs, StochasticMaxPool2d, StochasticSign, larger
from dflow.ops.normal import ndtr_logit
from dflow.ops.straight_through import binary_concrete, sign_

DRAWS = 100_000


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cube(n):
    """All of {-1, 1}^n."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n)))


def law(theta):
    """Probabilities of `cube` under means ``theta`` (n,)."""
    return ((1 + cube(len(theta)) * theta) / 2).prod(1)


@pytest.mark.parametrize("weights", ["tanh", "clip"])
@pytest.mark.parametrize("n", [1, 6])
def test_moments_of_random_signs_by_enumeration(weights, n):
    # 2 n random signs: each pair of a weight and an activation.
    layer = BinaryLinear(n, 1, weights)
    phi = torch.rand(n) * 2 - 1
    p = (law(layer.theta[0].detach())[:, None] * law(phi)).flatten()
    sums = (cube(n) @ cube(n).T).flatten()
    mean = p @ sums
    found = layer(Signs(phi[None], False))
    assert torch.allclose(found.mean, mean)
    assert torch.allclose(found.var, p @ (sums - mean) ** 2)


@pytest.mark.parametrize("hard", [True, False])
def test_moments_of_given_numbers_by_enumeration(hard):
    layer = BinaryLinear(12, 1)
    h = cube(12)[[77]] if hard else torch.randn(1, 12)
    p, sums = law(layer.theta[0].detach()), cube(12) @ h[0]
    found = layer(Signs(h, True) if hard else h)
    mean = p @ sums
    assert torch.allclose(found.mean, mean)
    assert torch.allclose(found.var, p @ (sums - mean) ** 2)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["numbers", "hard", "random"])
def test_convolutions_are_the_linear_layer_of_their_valid_taps(kernel, stride, kind):
    # The border of 0 counts for nothing: the layer of each place sees only what is there.
    layer = BinaryConv2d(2, 3, kernel, stride=stride)
    h = torch.rand(2, 2, 4, 5) * 2 - 1
    if kind == "hard":
        h = h.sign()
    found = layer(h if kind == "numbers" else Signs(h, kind == "hard"))
    place = torch.arange(40).view(1, 2, 4, 5).double() + 1
    pad = kernel // 2
    taps = F.unfold(place, kernel, padding=pad, stride=stride)[0].long()
    width = math.ceil(5 / stride)
    for i, tap in enumerate(taps.T):
        there = tap > 0
        linear = BinaryLinear(int(there.sum()), 3)
        linear.start(layer.theta.detach().flatten(1)[:, there])
        values = h.flatten(1)[:, tap[there] - 1]
        expected = linear(values if kind == "numbers" else Signs(values, kind == "hard"))
        for own, other in zip(found, expected, strict=True):
            assert torch.allclose(own[..., i // width, i % width], other)


def test_moments_against_draws():
    layer = BinaryConv2d(3, 2)
    phi = torch.rand(1, 3, 3, 3) * 2 - 1
    found = layer(Signs(phi, False))
    theta, n = layer.theta.detach(), DRAWS // 10
    sums = torch.cat(
        [
            F.conv2d(
                torch.where(torch.rand(n, 3, 3, 3) < (1 + phi) / 2, 1.0, -1.0).view(1, -1, 3, 3),
                torch.where(torch.rand(n, *theta.shape) < (1 + theta) / 2, 1.0, -1.0).flatten(0, 1),
                padding=1,
                groups=n,
            ).view(n, 2, 3, 3)
            for _ in range(10)
        ]
    )
    error = (found.var / DRAWS).sqrt()
    assert ((sums.mean(0) - found.mean).abs() < 5 * error).all()
    assert torch.allclose(sums.var(0), found.var[0], rtol=0.04)


def test_clipped_weights_come_back_and_signs_have_gradients():
    layer = BinaryLinear(2, 1, "clip")
    layer.start(torch.tensor([[0.9, -5.0]]))
    assert torch.allclose(layer.theta, torch.tensor([[0.9, -0.9]]))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[7.0, -0.95]]))
    layer.train()(torch.ones(1, 2)).mean.sum().backward()
    assert torch.equal(layer.weight.detach(), torch.tensor([[0.9, -0.9]]))
    assert (layer.weight.grad != 0).all()
    given = BinaryLinear(2, 1, "sign").train()
    with torch.no_grad():
        given.weight.copy_(torch.tensor([[-3.0, 0.0]]))
    sums = given(torch.tensor([[1.0, 2.0]]))
    assert sums.item() == 1.0
    sums.backward()
    assert torch.equal(given.weight.grad, torch.tensor([[1.0, 2.0]]))


def test_given_weights_refuse_random_signs():
    with pytest.raises(ValueError, match="'float' take numbers"):
        BinaryLinear(2, 1, "float")(Signs(torch.zeros(1, 2), False))


@pytest.mark.parametrize("shape", [(50, 2), (5, 2, 3, 4)])
def test_expected_batch_moments_against_draws(shape):
    mean, var = torch.randn(shape) * 2 + 1, torch.rand(shape) * 3
    norm = StochasticBatchNorm(2, momentum=1.0)
    norm(Moments(mean, var))
    dims = [d for d in range(len(shape)) if d != 1]
    M = mean.numel() // 2
    m, v = torch.zeros(2), torch.zeros(2)
    for _ in range(20):
        drawn = mean + var.sqrt() * torch.randn(DRAWS // 20, *shape)
        m += drawn.mean([d + 1 for d in dims]).sum(0) / DRAWS
        v += ((drawn - mean.mean(dims).view(1, 1, 2, *[1] * (len(shape) - 2))) ** 2).sum(
            [d + 1 for d in dims]
        ).sum(0) / ((M - 1) * DRAWS)
    assert torch.allclose(norm.running_mean, m, atol=0.01)
    assert torch.allclose(norm.running_var, v, rtol=0.01)


def test_variances_that_stand_for_many_count_as_many():
    mean, var = torch.randn(4, 3, 2, 2), torch.rand(1, 3, 2, 2)
    one, all_ = StochasticBatchNorm(3), StochasticBatchNorm(3)
    for a, b in zip(one(Moments(mean, var)), all_(Moments(mean, var.expand_as(mean))), strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(one.running_var, all_.running_var)
    one.estimate([Moments(mean[:1], var), Moments(mean[1:], var)])
    all_.momentum = 1.0
    all_(Moments(mean, var.expand_as(mean)))
    assert torch.allclose(one.running_var, all_.running_var)
    assert torch.allclose(one.running_mean, all_.running_mean)


def test_normalised_numbers_are_those_of_torch():
    x = torch.randn(6, 3, 2, 2)
    ours, theirs = StochasticBatchNorm(3), nn.BatchNorm2d(3)
    # torch normalises by the biased variance.
    factor = math.sqrt((24 - 1) / 24)
    assert torch.allclose(ours(x) / factor, theirs(x), atol=1e-4)
    assert torch.allclose(ours.running_var, theirs.running_var)


def test_halves_of_the_numbers_are_normalised_by_full_averages():
    norm, x = StochasticBatchNorm(3), torch.randn(6, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x.bfloat16())
        norm(Moments(x.bfloat16(), x.square().bfloat16()))
    assert torch.allclose(out.to(x.dtype), StochasticBatchNorm(3)(x), atol=0.05)
    assert norm.running_mean.dtype == norm.running_var.dtype == x.dtype


def test_thresholds_say_what_the_line_says():
    norm = StochasticBatchNorm(6).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -0.5, 0.0, 0.0, 1.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.3, 1.0, 0.5, -0.5, 1e6, 1e6]))
        norm.running_mean.copy_(torch.tensor([3.0, -2.5, 0.0, 0.0, 0.0, 0.0]))
        norm.running_var.copy_(torch.tensor([4.0, 9.0, 1.0, 1.0, 1.0, 1.0]))
    a = torch.arange(-20, 21)
    threshold, flip = norm.fold(20)
    said = (a[:, None] >= threshold) != flip
    assert torch.equal(said, norm(a[:, None].double().expand(-1, 6)) >= 0)
    assert flip.tolist() == [False, True, False, False, False, True]
    with pytest.raises(ValueError, match="evaluation mode"):
        norm.train().fold(3)


def test_larger_of_two_by_draws_and_far_apart():
    a = Moments(torch.tensor([0.0, 1.0, 1e6, 2.0]), torch.tensor([1.0, 4.0, 2.0, 0.0]))
    b = Moments(torch.tensor([0.5, -1.0, -1e6, 2.0]), torch.tensor([2.0, 0.1, 9.0, 0.0]))
    found = larger(a, b)
    drawn = torch.maximum(*(m + v.sqrt() * torch.randn(DRAWS, 4) for m, v in (a, b)))
    assert torch.allclose(found.mean, drawn.mean(0), atol=0.03, rtol=1e-6)
    assert torch.allclose(found.var, drawn.var(0), rtol=0.03, atol=1e-6)


def test_pooling_picks_as_often_as_a_number_is_largest():
    mean, var = torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([1.0, 0.5, 9.0, 0.01])
    n = DRAWS // 5
    x = Moments(mean.view(1, 1, 2, 2).expand(n, 1, 2, 2), var.view(1, 1, 2, 2))
    found = StochasticMaxPool2d(2)(x)
    drawn = (mean + var.sqrt() * torch.randn(n, 4)).argmax(1)
    for value, own, size in zip(mean, var, drawn.bincount(minlength=4), strict=True):
        picked = found.mean.flatten() == value
        assert torch.equal(picked, found.var.flatten() == own)
        assert abs(picked.double().mean() - size / n) < 0.02


def test_the_largest_of_four_has_nearly_its_own_moments():
    mean, var = torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([1.0, 0.5, 2.0, 1.0])
    found = StochasticMaxPool2d(2, "moments")(Moments(mean.view(1, 1, 2, 2), var.view(1, 1, 2, 2)))
    largest = (mean + var.sqrt() * torch.randn(DRAWS, 4)).amax(1)
    assert torch.allclose(found.mean, largest.mean(), atol=0.02)
    assert torch.allclose(found.var, largest.var(), rtol=0.05)


def test_pooling_of_numbers_and_of_odd_sizes():
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(StochasticMaxPool2d(2)(x), F.max_pool2d(x, 2))
    for how in ("sample", "moments"):
        found = StochasticMaxPool2d(2, how)(Moments(x, torch.zeros(1, 3, 5, 7)))
        assert torch.allclose(found.mean, F.max_pool2d(x, 2), atol=1e-5)


def test_signs_are_the_limit_of_drawn_ones():
    x = Moments(torch.linspace(-2, 2, 5)[None], torch.tensor([[0.5, 1.0, 2.0, 1.0, 4.0]]))
    phi = StochasticSign("propagate")(x).mean
    drawn = StochasticSign("sample").train()
    many = drawn(Moments(x.mean.expand(DRAWS, 5), x.var)).mean
    assert set(many.unique().tolist()) == {-1.0, 1.0}
    assert torch.allclose(many.mean(0), phi, atol=0.02)
    assert not drawn.eval()(x).hard


def test_one_layer_is_the_limit_of_ensembles():
    # Many summands: their sum is nearly Gaussian, and the propagated mean that of all networks' signs.
    layer, n = BinaryLinear(400, 3), 5000
    h = torch.randn(1, 400)
    phi = StochasticSign()(layer(h)).mean
    w = torch.where(torch.rand(n, 3, 400) < (1 + layer.theta.detach()) / 2, 1.0, -1.0)
    assert torch.allclose(sign_(w @ h[0]).mean(0), phi[0], atol=0.06)


def test_gradients():
    mean = torch.randn(3, 2, 2, 2, requires_grad=True)
    var = (torch.rand(1, 2, 2, 2) + 0.5).requires_grad_()

    def through(mean, var):
        norm = StochasticBatchNorm(2)
        pooled = StochasticMaxPool2d(2, "moments")(norm(Moments(mean, var)))
        return StochasticSign()(pooled).mean, Head("bce")(Moments(*pooled)).flatten()

    assert torch.autograd.gradcheck(through, (mean, var))
    t = torch.tensor([-30.0, -3.0, 0.2, 5.0, 45.0], requires_grad=True)
    assert torch.autograd.gradcheck(ndtr_logit, (t,))
    for weights in ("tanh", "clip"):
        layer = BinaryConv2d(1, 1, 3, weights).eval()
        phi = (torch.rand(1, 1, 3, 3) * 1.8 - 0.9).requires_grad_()
        theta = layer.weight

        def moments(phi, _, layer=layer):
            return (*layer(Signs(phi, False)), *layer(phi))

        assert torch.autograd.gradcheck(moments, (phi, theta))


def test_drawn_signs_have_the_gradient_of_their_relaxation():
    logit = torch.randn(20, requires_grad=True)
    noise = torch.randn(20)
    hard = binary_concrete(logit, noise, 0.7)
    assert torch.equal(hard, (logit + noise).sign())
    (own,) = torch.autograd.grad(hard.sum(), logit)
    (soft,) = torch.autograd.grad(torch.tanh((logit + noise) / 1.4).sum(), logit)
    assert torch.allclose(own, soft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_of_a_normal(dtype):
    t = torch.tensor([-200.0, -39, -13.5, -12.5, -11, -4, -0.1, 0, 0.1, 4, 11, 12.5, 39], dtype=dtype)
    reference = torch.special.log_ndtr(t.double()) - torch.special.log_ndtr(-t.double())
    assert torch.allclose(ndtr_logit(t).double(), reference, rtol=3e-6 if dtype == torch.float32 else 1e-13)


def test_heads():
    x = Moments(torch.randn(4, 3), torch.rand(4, 3) + 0.1)
    labels = torch.tensor([0, 2, 1, 1])
    q = torch.special.ndtr(x.mean / x.var.sqrt())
    head = Head("bce")
    logits = head(x)
    right = F.one_hot(labels, 3).double()
    assert torch.allclose(head.loss(logits, labels), -(right * q.log() + (1 - right) * (1 - q).log()).sum())
    # Given that exactly one is positive.
    one = torch.stack([q[:, k] * (1 - q).prod(1) / (1 - q[:, k]) for k in range(3)], 1)
    assert torch.allclose(logits.softmax(1), one / one.sum(1, keepdim=True))
    assert torch.equal(Head("ce")(x), x.mean)
    with pytest.raises(ValueError, match="needs random sums"):
        head(x.mean)


def test_reestimated_averages_are_those_of_what_comes_in():
    net = nn.Sequential(
        Pixels((1, 4, 4), 256),
        BinaryConv2d(1, 2, weights="sign"),
        StochasticMaxPool2d(2),
        StochasticBatchNorm(2),
        StochasticSign(),
        BinaryLinear(8, 3, "sign"),
        StochasticBatchNorm(3),
        Head(),
    ).eval()
    batches = [torch.randint(256, (n, 16)) for n in (5, 7)]
    reestimate(net, batches)
    out = net(torch.cat(batches))
    assert torch.allclose(out.mean(0), torch.zeros(3), atol=1e-9)
    assert torch.allclose(out.var(0), torch.ones(3), atol=1e-3)


def test_pixels():
    x = torch.tensor([[0, 255, 128, 3]])
    assert Pixels((1, 2, 2), 256)(x).flatten().tolist() == [-255, 255, 1, -249]
    assert torch.allclose(Pixels((1, 2, 2), 256, unit=True)(x).flatten()[1], torch.tensor(1.0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BinaryLinear(0, 1), "inputs"),
        (lambda: BinaryLinear(1, 1, "cube"), "'cube'"),
        (lambda: BinaryConv2d(1, 1, 2), "odd, found 2"),
        (lambda: StochasticMaxPool2d(2, "best"), "'best'"),
        (lambda: StochasticSign("guess"), "'guess'"),
        (lambda: StochasticSign(temperature=0.0), "temperature"),
        (lambda: Head("mse"), "'mse'"),
        (lambda: StochasticBatchNorm(1)(torch.zeros(1, 1)), "two or more"),
        (lambda: StochasticBatchNorm(1).estimate([torch.zeros(1, 1)]), "two or more"),
        (lambda: binary_concrete(torch.zeros(1), torch.zeros(1), 0.0), "temperature"),
    ],
)
def test_refuses(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("weights", ["sign", "tanh", "float"])
@pytest.mark.parametrize("K", [2, 3])
def test_perceptrons_of_symbols_take_symbols_and_rows(weights, K):
    net = SymbolPerceptron(K, K, 5, 4, hidden_size=7, weights=weights)
    x = torch.randint(K, (40, 5))
    for _ in range(60):
        net(x)
    net.eval()
    rows = F.one_hot(x, K).to(torch.float64)
    out = net(x)
    assert out.shape == (40, 4, K)
    assert torch.equal(out, net(rows))
    # Each input counts, by its place and its value.
    for i in range(5):
        other = x.clone()
        other[:, i] = (other[:, i] + 1) % K
        assert not torch.equal(net(other), out)
    with pytest.raises(ValueError, match="lengths"):
        net(x, torch.full((40,), 5))


def test_perceptrons_of_signs_compute_alike_in_batches_of_any_size():
    torch.set_default_dtype(torch.float32)
    net = SymbolPerceptron(2, 2, 300, 50, hidden_size=128)
    x = torch.randint(2, (64, 300))
    for _ in range(60):
        net(x)
    net.eval()
    whole = net(x)
    for n in (1, 3, 17):
        assert torch.equal(torch.cat([net(part) for part in x.split(n)]), whole)


@pytest.mark.parametrize("how", ["sample", "moments"])
def test_convolutions_pools_and_signs_keep_channels_last(how):
    """What follows a convolution is several times as fast in the format that it gives."""
    net = nn.Sequential(
        BinaryConv2d(1, 4), StochasticMaxPool2d(2, how), StochasticBatchNorm(4), StochasticSign("sample")
    )
    h, formats = torch.randn(3, 1, 8, 8), []
    for module in net:
        h = module(h)
        formats.append((h.mean if isinstance(h, (Moments, Signs)) else h).stride())
    assert formats == [(256, 1, 32, 4)] + [(64, 1, 16, 4)] * 3
