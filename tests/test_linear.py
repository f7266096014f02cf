"""Scale and shift, 1x1 convolutions and squeezes against their definitions; initialization from data."""

from __future__ import annotations

import pytest
import torch
from cases import image_coupling, randomize
from torch import nn
from torch.nn import functional as F

from dflow.bijectors import ActNorm, Chain, Conv1x1, Inverse, fitting, initialize, squeeze
from dflow.core import Distribution
from dflow.elementwise import Affine
from dflow.flows import Flow, Split


def test_actnorm_is_its_formula():
    layer = randomize(ActNorm((3, 2, 2)))
    x = torch.randn(5, 12, dtype=torch.float64)
    z, log_det = layer.forward(x)
    image = (x.view(5, 3, 2, 2) - layer.loc.view(3, 1, 1)) / layer.log_scale.exp().view(3, 1, 1)
    torch.testing.assert_close(z, image.flatten(1))
    torch.testing.assert_close(log_det, (-4 * layer.log_scale.sum()).expand(5))


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (3, 2, 4)], ids=str)
def test_conv_is_the_convolution_of_torch_and_starts_as_a_rotation(shape):
    C, H, W = shape
    layer = Conv1x1(shape, torch.Generator().manual_seed(5)).double()
    eye = torch.eye(C, dtype=torch.float64)
    torch.testing.assert_close(layer.weight @ layer.weight.T, eye, rtol=0, atol=1e-6)
    assert torch.linalg.det(layer.weight) > 0.99
    randomize(layer)
    x = torch.randn(5, C * H * W, dtype=torch.float64)
    z, log_det = layer.forward(x)
    expected = F.conv2d(x.view(5, *shape), layer.weight[..., None, None]).flatten(1)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(log_det, (H * W * torch.linalg.slogdet(layer.weight).logabsdet).expand(5))


def test_rotations_hang_on_the_generator_alone():
    weights = []
    for seed in (0, 0, 1):
        torch.rand(1)
        weights.append(Conv1x1((6, 1, 1), torch.Generator().manual_seed(seed)).weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=0.1)


def test_an_ill_conditioned_convolution_is_inverted_in_single_precision():
    layer = Conv1x1((48, 2, 2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lu.diagonal().copy_(torch.linspace(-3, 3, 48))
    x = torch.randn(8, 192)
    z, _ = layer.forward(x)
    condition = float(torch.linalg.cond(layer.weight.detach()))
    assert condition > 1000
    error = (layer.inverse(z)[0] - x).view(8, 48, 4).norm(dim=1) / x.view(8, 48, 4).norm(dim=1)
    assert error.max() < condition * torch.finfo(torch.float32).eps


def test_autocast_changes_nothing():
    layer, x = Conv1x1((4, 2, 2)), torch.randn(3, 16)
    z, _ = layer.forward(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.forward(x)[0], z)
        torch.testing.assert_close(layer.inverse(z)[0], x)


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 6), (2, 2, 8)], ids=str)
def test_squeeze_is_pixel_unshuffle(shape):
    bijector, new = squeeze(shape)
    x = torch.randn(2, *shape)
    expected = F.pixel_unshuffle(x, 2)
    assert new == tuple(expected.shape[1:])
    assert torch.equal(bijector.forward(x.flatten(1))[0], expected.flatten(1))
    assert torch.equal(bijector.inverse(expected.flatten(1))[0], x.flatten(1))


def test_odd_images_are_not_squeezed():
    for shape in ((1, 3, 4), (1, 4, 1)):
        with pytest.raises(ValueError, match=f"found {shape[1]} x {shape[2]}"):
            squeeze(shape)


def test_shapes_and_entries_are_checked():
    for layer in (ActNorm, Conv1x1):
        with pytest.raises(ValueError, match=r"\(2, 0, 1\)"):
            layer((2, 0, 1))
        for wrong in (torch.zeros(3, 7), torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 2, 2, 2)):
            with pytest.raises(ValueError, match=r"expected floats \(batch, 8\)"):
                layer((2, 2, 2)).forward(wrong)


# --- initialization -----------------------------------------------------------------------------------


def data(channels=3, places=4, batch=50):
    scales = torch.arange(1, channels + 1, dtype=torch.float64)[:, None]
    return (scales * torch.randn(batch, channels, places, dtype=torch.float64) + 7 * scales).flatten(1)


def moments(z, channels):
    variance, mean = torch.var_mean(z.view(len(z), channels, -1), (0, 2), correction=0)
    return mean, variance


def is_standard(z, channels):
    mean, variance = moments(z, channels)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
    torch.testing.assert_close(variance, torch.ones_like(variance))


def test_initialization_standardizes_what_comes_out_of_every_actnorm():
    shape = (3, 2, 2)
    chain = randomize(
        Chain([ActNorm(shape), Conv1x1(shape), image_coupling(Affine(), shape), ActNorm(shape)])
    )
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    x = data()
    assert initialize(chain, x) is None
    is_standard(chain[0].forward(x)[0], 3)
    is_standard(chain.forward(x)[0], 3)
    for name, value in chain.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(("bijectors.0", "bijectors.3")), name
    # Nothing remembers it: no attribute, no change by what comes later, in either mode.
    assert not any("forward" in vars(module) or "inverse" in vars(module) for module in chain.modules())
    after = {name: value.clone() for name, value in chain.state_dict().items()}
    chain.train().forward(10 * x)
    chain.eval().forward(10 * x)
    assert all(torch.equal(value, after[name]) for name, value in chain.state_dict().items())
    assert all(parameter.requires_grad for parameter in chain.parameters())
    initialize(chain, x)
    assert all(torch.allclose(value, after[name]) for name, value in chain.state_dict().items())


def test_a_layer_turned_round_standardizes_its_inverse():
    layer, x = randomize(Inverse(ActNorm((3, 2, 2)))), data()
    initialize(layer, x)
    is_standard(layer.forward(x)[0], 3)


class Law(Distribution):
    """Standard normal entries behind a net of the context, whose bijector is initialised too."""

    def __init__(self, bijector=None):
        super().__init__()
        self.bijector = bijector or nn.Identity()

    def log_prob(self, x, context=None):
        z = x if isinstance(self.bijector, nn.Identity) else self.bijector.forward(x, context)[0]
        return -0.5 * z.square().sum(1)

    def sample(self, n, context=None, generator=None):
        raise NotImplementedError


def test_initialization_reaches_conditional_parts_of_a_distribution():
    inner = ActNorm((1, 2, 2))
    split = Split(torch.arange(12) < 8, Flow(inner, Law()), Law())
    flow = randomize(Flow(ActNorm((3, 2, 2)), split))
    x = data()
    initialize(flow, x)
    z, _ = flow.transform(x)
    is_standard(z, 3)
    is_standard(inner.forward(z[:, 8:])[0], 1)


def test_constant_channels_do_not_blow_up():
    layer = ActNorm((2, 1, 2))
    x = torch.randn(10, 4)
    x[:, :2] = 5.0
    initialize(layer, x)
    torch.testing.assert_close(layer.log_scale[0].exp(), torch.tensor(0.01))
    assert layer.forward(x)[0][:, :2].abs().max() < 1e-4
    initialize(layer, x[:1, :])
    assert layer.log_scale.isfinite().all()


def test_layers_that_the_pass_misses_are_named():
    class Half(Chain):
        def forward(self, x, context=None):
            return self[0].forward(x, context)

    with pytest.raises(ValueError, match="1 of 2"):
        initialize(Half([ActNorm((1, 1, 1)), ActNorm((1, 1, 1))]), torch.randn(4, 1))


def test_fitting_ends_with_an_error_too():
    layer = ActNorm((2, 1, 1))
    with pytest.raises(ValueError, match="expected floats"), fitting(layer):
        layer.forward(torch.randn(4, 3))
    loc = layer.loc.clone()
    layer.forward(torch.randn(4, 2))
    assert torch.equal(layer.loc, loc)
