from __future__ import annotations

import pytest
import torch
from cases import enumerate_all, randomize

from dflow.nn.made import MADE
from dflow.ops.modular import one_hot


@pytest.mark.parametrize("hidden_sizes", [[3], [16], [16, 7, 16]])
@pytest.mark.parametrize(("K", "dim"), [(2, 6), (3, 4), (5, 3), (5, 2), (5, 1)])
def test_params_depend_on_earlier_entries_only(K, dim, hidden_sizes):
    net, x = randomize(MADE(dim, K, 4, hidden_sizes)), enumerate_all(K, dim)
    params = net(x)
    assert params.shape == (len(x), dim, 4)
    for i in range(dim):
        first = x.clone()
        first[:, i:] = 0
        assert torch.equal(params[:, i], net(first)[:, i])


@pytest.mark.parametrize(("K", "dim"), [(2, 6), (5, 3)])
def test_params_depend_on_every_earlier_entry(K, dim):
    net = randomize(MADE(dim, K, 4, [16, 16]))
    rows = one_hot(torch.zeros(1, dim, dtype=torch.int64), K, torch.float64).requires_grad_()
    params = net(rows)
    for i in range(dim):
        (gradient,) = torch.autograd.grad(params[0, i].square().sum(), rows, retain_graph=True)
        assert (gradient[0, :i].abs().sum(-1) > 0).all()
        assert torch.equal(gradient[0, i:], torch.zeros(dim - i, K, dtype=torch.float64))


def test_modes_agree_to_the_bit():
    net, x = randomize(MADE(4, 3, 5, [16])).float(), enumerate_all(3, 4)
    assert torch.equal(net(x), net(one_hot(x, 3)))


def test_steps_are_the_parallel_call():
    net, x = randomize(MADE(4, 3, 5, [16])), enumerate_all(3, 4)
    state = net.start(len(x))
    steps = [net.step(None, state)] + [net.step(x[:, i : i + 1], state) for i in range(3)]
    assert torch.equal(torch.cat(steps, 1), net(x))


def test_no_optimiser_loses_the_masks():
    net, x = randomize(MADE(3, 3, 2, [8])), enumerate_all(3, 3)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
        optimiser.step()
    first = x.clone()
    first[:, 1:] = 0
    assert torch.equal(net(x)[:, 1], net(first)[:, 1])
    assert len(net(x)[:, 1].unique(dim=0)) == 3


def test_gradients_reach_every_parameter():
    net = MADE(4, 3, 5, [16, 16])
    (net(enumerate_all(3, 4)) * torch.randn(81, 4, 5)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_arguments_are_checked():
    for arguments in ((0, 3, 2, [8]), (3, 3, 2, []), (3, 3, 2, [8, 0])):
        with pytest.raises(ValueError, match="at least 1"):
            MADE(*arguments)
    with pytest.raises(ValueError, match="K=1"):
        MADE(3, 1, 2, [8])
    with pytest.raises(ValueError, match="expected 3 entries"):
        MADE(3, 3, 2, [8])(torch.zeros(1, 4, dtype=torch.int64))
