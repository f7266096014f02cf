"""Networks on flat numbers: what they read, give and refuse. Also the perceptron of numbers."""

from __future__ import annotations

import pytest
import torch
from cases import randomize
from torch import nn

from dflow.core import Context
from dflow.nn.densenet import DenseNet
from dflow.nn.perceptron import Perceptron


def make(kind, size=(1, 1), context=0, **settings):
    """A net from 2 channels to 3, of 4 numbers an entry."""
    if kind == "dense":
        return DenseNet(2, 3, size, 4, hidden_size=7, depth=3, context_channels=context, **settings)
    return Perceptron(2, 3, 4, hidden_size=8, num_layers=3, context_features=context, **settings)


each = pytest.mark.parametrize(
    ("kind", "size"), [("dense", (1, 1)), ("dense", (2, 3)), ("dense", (1, 4)), ("perceptron", (1, 1))]
)


@each
def test_every_number_and_all_context_are_read(kind, size):
    net, places = randomize(make(kind, size, 5)), size[0] * size[1]
    x = torch.randn(3, 2 * places, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, 5 * places, dtype=torch.float64, requires_grad=True)
    out = net(x, Context(given=(context,)))
    assert out.shape == (3, 3 * places, 4)
    for gradient in torch.autograd.grad(out.square().sum(), (x, context)):
        assert (gradient.abs() > 0).all()
    for name, parameter in net.named_parameters():
        (gradient,) = torch.autograd.grad(net(x, Context(given=(context,))).square().sum(), parameter)
        assert gradient.abs().sum() > 0, name


@each
def test_rows_are_apart_and_features_are_the_same_numbers(kind, size):
    net, places = randomize(make(kind, size)), size[0] * size[1]
    x = torch.randn(5, 2 * places, dtype=torch.float64)
    out = net(x)
    torch.testing.assert_close(net(x[3:4]), out[3:4])
    features = net.features(x)
    assert features.shape == (5, 12 * places)
    # Numbers by number, then by entry in the order C, H, W.
    assert torch.equal(features.view(5, 4, 3 * places).transpose(1, 2), out)


@each
def test_a_head_of_zeros(kind, size):
    x = torch.randn(2, 2 * size[0] * size[1])
    assert make(kind, size)(x).abs().max() == 0
    assert make(kind, size, zero_head=False)(x).abs().max() > 0


@each
def test_levels_are_spread_over_minus_one_to_one(kind, size):
    plain, spread = make(kind, size, zero_head=False), make(kind, size, zero_head=False, levels=5)
    spread.load_state_dict(plain.state_dict())
    x = torch.randint(5, (4, 2 * size[0] * size[1]))
    torch.testing.assert_close(spread(x), plain(x / 2 - 1.0))


@each
def test_wrong_inputs_and_contexts_are_named(kind, size):
    places = size[0] * size[1]
    x, context = torch.zeros(2, 2 * places), torch.zeros(2, 5 * places)
    with_context, without = make(kind, size, 5), make(kind, size)
    for net, *call in (
        (with_context, x),
        (with_context, x, Context(given=(context[:, 1:],))),
        (with_context, x, Context(given=(context, context))),
        (without, x, Context(given=(context,))),
        (without, x[:, 1:]),
        (without, x[0]),
    ):
        with pytest.raises(ValueError, match="expected x"):
            net(*call)
    assert with_context(x, Context(given=(context[:, :1], context[:, 1:]))).shape == (2, 3 * places, 4)


def test_a_convolution_sees_its_neighbourhood_alone():
    net = randomize(DenseNet(1, 1, (1, 9), hidden_size=4, depth=2))
    x = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x)[0, 0, 0], x)
    # Two layers and the head reach one place further each.
    assert (gradient[0, :4] != 0).all()
    assert (gradient[0, 4:] == 0).all()


def test_a_vector_needs_no_convolution_and_channels_add_up():
    net = DenseNet(2, 1, (1, 1), hidden_size=10, depth=3)
    assert not any(isinstance(module, nn.Conv2d) for module in net.modules())
    assert net.head.in_features == 2 + 10
    assert DenseNet(2, 1, (2, 2), hidden_size=10, depth=3, context_channels=1).head.in_channels == 13


def test_sizes_are_checked():
    for settings in ({"depth": 0}, {"hidden_size": 2}, {"levels": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}"):
            DenseNet(**{"in_channels": 1, "out_channels": 1, "size": (2, 2), "depth": 3, **settings})
    for settings in ({"num_layers": 0}, {"hidden_size": 0}, {"in_features": 0}, {"levels": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}"):
            Perceptron(**{"in_features": 1, "out_entries": 1, **settings})
    with pytest.raises(ValueError, match="height must be at least 1, found 0"):
        DenseNet(1, 1, (0, 2))


def test_activation_and_norm():
    plain = make("dense", (2, 3))
    assert not any(isinstance(module, (nn.ReLU, nn.GroupNorm)) for module in plain.modules())
    assert [name for name, _ in plain.layers[0].named_parameters()] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    x = torch.randn(5, 2 * 6, dtype=torch.float64)
    for settings in ({"activation": "relu"}, {"norm": "group"}, {"activation": "relu", "norm": "group"}):
        net = randomize(make("dense", (2, 3), **settings))
        found = [type(module) for module in net.layers[0]]
        active = nn.ReLU if "activation" in settings else nn.SiLU
        norm = [nn.GroupNorm] * ("norm" in settings)
        assert found == [nn.Conv2d, *norm, active, nn.Conv2d, *norm, active]
        # Rows are apart, norm or not.
        torch.testing.assert_close(net(x[3:4]), net(x)[3:4])
        (gradient,) = torch.autograd.grad(net(x).square().sum(), net.head.weight)
        assert gradient.abs().sum() > 0
    # Without biases and norm a ReLU net scales with its input.
    net = randomize(make("dense", (2, 3), activation="relu"))
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    torch.testing.assert_close(net(3 * x), 3 * net(x))


@pytest.mark.parametrize(("channels", "groups"), [(2, 1), (31, 1), (32, 2), (48, 3), (50, 2), (97, 1)])
def test_groups_hold_16_channels_or_more(channels, groups):
    net = DenseNet(channels, 1, (2, 2), hidden_size=4, depth=1, norm="group")
    assert [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)] == [groups, 1]


def test_wrong_activations_and_norms():
    for settings in ({"activation": "gelu"}, {"norm": "batch"}, {"norm": "group", "hidden_size": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}"):
            DenseNet(
                **{
                    "in_channels": 2,
                    "out_channels": 1,
                    "size": (1, 1),
                    "depth": 3,
                    "hidden_size": 6,
                    **settings,
                }
            )
