"""Family pbnet: shapes, kinds, what is made of random weights."""

from __future__ import annotations

import pytest
import torch

from dflow import zoo
from dflow.config import InputError
from dflow.nn.batch_norm import StochasticBatchNorm
from dflow.nn.binary import BinaryLayer
from dflow.nn.moments import Moments
from dflow.zoo.binary import layers

SETTINGS = {
    "shape": [1, 8, 8],
    "levels": [256],
    "lowest": [0],
    "classes": 3,
    "channels": [4, 5],
    "hidden": [6],
}


def settings(**changes):
    return zoo.settings("pbnet", SETTINGS | changes)


def network(**changes):
    torch.manual_seed(0)
    return zoo.build_classifier("pbnet", settings(**changes))


def data(n=40):
    return torch.randint(256, (n, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "propagate", "head": "bce"},
        {"parametrisation": "clip", "pooling": "moments"},
        {"pooling": "none"},
        {"batch_norm": False, "head": "bce"},
        {"kind": "binary"},
        {"kind": "float"},
        {"shape": [3, 9, 8], "kernel": 5},
        {"channels": [], "hidden": []},
    ],
    ids=str,
)
def test_every_kind_trains_all_its_parameters(changes):
    net = network(**changes).train()
    x = torch.randint(256, (40, net[0].shape[0] * net[0].shape[1] * net[0].shape[2]))
    logits = net(x)
    assert logits.shape == (40, 3)
    net[-1].loss(logits, torch.arange(40) % 3).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    net.eval()
    with torch.no_grad():
        # In evaluation nothing is drawn but the indices of pooling "sample".
        if changes.get("pooling") in ("none", "moments") or "kind" in changes:
            assert torch.equal(net(x), net(x))
        assert net(x).isfinite().all()


def test_the_networks_of_all_kinds_have_one_shape():
    shapes = {
        kind: [tuple(layer.weight.shape) for layer in layers(network(kind=kind))]
        for kind in ("probabilistic", "binary", "float")
    }
    assert shapes["probabilistic"] == shapes["binary"] == shapes["float"]
    assert shapes["float"] == [(4, 1, 3, 3), (5, 4, 3, 3), (6, 20), (3, 6)]
    without = [tuple(layer.weight.shape) for layer in layers(network(pooling="none"))]
    assert without == shapes["float"]


@pytest.mark.parametrize("rule", ["map", "ternary", "sample"])
@pytest.mark.parametrize("head", ["ce", "bce"])
def test_deterministic_networks(rule, head):
    net = network(head=head)
    fixed = zoo.to_deterministic(net, [data()], rule, torch.Generator().manual_seed(3))
    assert not fixed.training
    assert net.training
    for layer, source in zip(layers(fixed), layers(net), strict=True):
        theta, weight = source.theta.detach(), layer.weight
        kept = theta.abs() >= 0.5
        assert set(weight.unique().tolist()) == ({-1.0, 0.0, 1.0} if rule == "ternary" else {-1.0, 1.0})
        if rule == "map":
            assert torch.equal(weight > 0, theta >= 0)
        if rule == "ternary":
            assert torch.equal(weight != 0, kept)
        assert not any(p.requires_grad for p in layer.parameters())
    out = fixed[:-1](data())
    assert isinstance(out, Moments) == (head == "bce")
    mean = out.mean if head == "bce" else out
    assert torch.allclose(mean.mean(0), torch.zeros(3), atol=1e-5)
    assert fixed(data()).isfinite().all()


def test_draws_have_the_law_of_the_weights():
    net = network(channels=[], hidden=[])
    draws = torch.stack(
        [
            layers(zoo.to_deterministic(net, [data(4)], "sample", torch.Generator().manual_seed(i)))[0].weight
            for i in range(400)
        ]
    )
    theta = layers(net)[0].theta.detach()
    assert (draws.mean(0) - theta).abs().max() < 5 / 20
    assert (draws.mean(0) - theta).square().mean().sqrt() < 1.2 / 20


def test_transfer_starts_from_floats():
    floats, net = network(kind="float"), network(parametrisation="clip")
    zoo.transfer(net, floats)
    for layer, source in zip(layers(net), layers(floats), strict=True):
        expected = (source.weight / source.weight.std()).clamp(-0.9, 0.9)
        assert torch.allclose(layer.theta, expected)
        assert (layer.theta.sign() == source.weight.sign()).all()
    with pytest.raises(InputError, match="layers"):
        zoo.transfer(network(hidden=[7]), floats)


def test_running_averages_of_drawn_and_propagated_networks_are_close():
    # Wide, so that sums are nearly Gaussian: the two trainings normalise alike.
    found = []
    for mode in ("sample", "propagate"):
        net = network(mode=mode, channels=[32], hidden=[64], pooling="none")
        for _ in range(30):
            net(data(200))
        found.append([m for m in net if isinstance(m, StochasticBatchNorm)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one.running_var, other.running_var, rtol=0.2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": [0]}, "channels"),
        ({"kernel": 2}, "kernel"),
        ({"classes": 1}, "classes"),
        ({"concrete_temperature": 0.0}, "concrete_temperature"),
        ({"kind": "float", "head": "bce"}, "'bce'"),
        ({"kind": "binary", "init": "somewhere"}, "init"),
        ({"channels": [2, 2, 2, 2]}, "halved 4 times"),
        ({"levels": [None]}, "real columns"),
        ({"mode": "guess"}, "'guess'"),
    ],
)
def test_settings_are_checked(changes, said):
    with pytest.raises(InputError, match=said):
        settings(**changes)


def test_what_cannot_be_built_or_made_deterministic():
    with pytest.raises(InputError, match="missing"):
        network(classes=0)
    with pytest.raises(InputError, match="values from 0"):
        network(lowest=[1])
    with pytest.raises(InputError, match="floats"):
        zoo.to_deterministic(network(kind="float"), [data()])
    with pytest.raises(InputError, match="'sample' is for random"):
        zoo.to_deterministic(network(kind="binary"), [data()], "sample")
    with pytest.raises(InputError, match="'best'"):
        zoo.to_deterministic(network(), [data()], "best")
    assert all(isinstance(layer, BinaryLayer) for layer in layers(network()))
