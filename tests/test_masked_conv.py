"""The autoregressive network on images: which parameter hangs on which entry, exactly."""

from __future__ import annotations

import math

import pytest
import torch
from cases import randomize

from dflow.bijectors import Autoregressive
from dflow.core import Context
from dflow.elementwise import Affine
from dflow.nn.masked_conv import MaskedConv

SHAPES = [(1, 1, 1), (4, 1, 1), (1, 4, 4), (2, 3, 5), (3, 2, 2), (1, 1, 6), (1, 6, 1)]


def influence(net, dim, context=None):
    """True at (i, j) where some parameter of entry i hangs on entry j."""
    x = torch.randn(1, dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x, context)[0], x)[:, :, 0]
    return (jacobian != 0).any(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_params_depend_on_every_earlier_entry_and_on_no_other(shape):
    dim = math.prod(shape)
    net = randomize(MaskedConv(shape, 3, hidden_size=9 * shape[0], depth=6))
    # Large weights would saturate the activations, to exact zeros of the gradient.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.div_(parameter[0].numel() ** 0.5)
    assert torch.equal(influence(net, dim), torch.ones(dim, dim, dtype=torch.bool).tril(-1))


def test_a_shallow_network_sees_the_neighbourhood_of_earlier_channels_and_what_is_before_in_its_own():
    net = randomize(MaskedConv((2, 5, 5), 1, hidden_size=8, depth=1))
    seen = influence(net, 50).view(2, 5, 5, 2, 5, 5)[1, 3, 2]
    # Three convolutions: three places in each direction in the channel before.
    assert torch.equal(seen[0], torch.ones(5, 5, dtype=torch.bool))
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[:3] = True
    expected[3, :2] = True
    assert torch.equal(seen[1], expected)
    assert not influence(net, 50).view(2, 5, 5, 2, 5, 5)[1, 0, 0, 0, 4, 4]


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 3, 3)], ids=str)
def test_all_of_the_context_is_allowed(shape):
    dim, places = math.prod(shape), shape[1] * shape[2]
    net = randomize(MaskedConv(shape, 2, hidden_size=12, depth=4, context_channels=3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.div_(parameter[0].numel() ** 0.5)
    context = torch.randn(1, 3 * places, dtype=torch.float64)
    x = torch.randn(1, dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda given: net(x, Context(given=(given,)))[0], context)[
        :, :, 0
    ]
    assert (jacobian != 0).any(1).all()
    assert torch.equal(
        influence(net, dim, Context(given=(context,))), torch.ones(dim, dim, dtype=torch.bool).tril(-1)
    )


def test_gradients_reach_every_parameter_and_no_masked_weight():
    net = randomize(MaskedConv((2, 3, 3), 2, hidden_size=8, depth=2, context_channels=1))
    x, context = torch.randn(4, 18, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    net(x, Context(given=(context,))).square().sum().backward()
    for name, module in net.named_modules():
        if hasattr(module, "mask"):
            assert (module.weight.grad[~module.mask] == 0).all(), name
            assert (module.weight.grad[module.mask] != 0).float().mean() > 0.9, name
            assert (module.bias.grad != 0).all(), name


def test_the_layer_on_top_is_triangular_in_one_call_and_inverts_in_as_many_as_entries():
    class Counted(MaskedConv):
        calls = 0

        def forward(self, x, context=None):
            self.calls += 1
            return super().forward(x, context)

    net = randomize(Counted((2, 2, 2), 2, hidden_size=8, depth=2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.div_(parameter[0].numel() ** 0.5)
    layer = Autoregressive(Affine(1.0), net, 8)
    x = torch.randn(3, 8, dtype=torch.float64)
    z, log_det = layer.forward(x)
    assert net.calls == 1
    jacobian = torch.autograd.functional.jacobian(lambda x: layer.forward(x[None])[0][0], x[0])
    assert torch.equal(jacobian.triu(1), torch.zeros(8, 8, dtype=torch.float64))
    torch.testing.assert_close(jacobian.diagonal().log().sum(), log_det[0])
    net.calls = 0
    found, other = layer.inverse(z)
    assert net.calls == 8
    torch.testing.assert_close(found, x)
    torch.testing.assert_close(other, -log_det)


def test_a_head_of_zeros_and_arguments():
    assert MaskedConv((1, 2, 2), 3, hidden_size=4, depth=1)(torch.randn(2, 4)).abs().max() == 0
    with pytest.raises(ValueError, match="3 for each of 3 channels, found 8"):
        MaskedConv((3, 1, 2), 2, hidden_size=8)
    with pytest.raises(ValueError, match="1 for each of 3 channels, found 2"):
        MaskedConv((3, 1, 1), 2, hidden_size=2)
    for shape, depth in (((0, 1, 1), 1), ((1, 1, 1), 0)):
        with pytest.raises(ValueError, match="at least 1, found 0"):
            MaskedConv(shape, 2, depth=depth)
    with pytest.raises(ValueError, match="expected x"):
        MaskedConv((1, 2, 2), 2)(torch.zeros(1, 3))
