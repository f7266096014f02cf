"""The perceptron of a coupling: it reads every known entry, in both modes alike, and no absent one."""

from __future__ import annotations

import pytest
import torch
from cases import enumerate_all, randomize

from dflow.core import Context
from dflow.nn.perceptron import InfillPerceptron
from dflow.ops.modular import one_hot

KNOWN, HIDDEN = torch.tensor([0, 2, 3]), torch.tensor([1, 4])


def make(**settings):
    return randomize(InfillPerceptron(3, 5, KNOWN, HIDDEN, hidden_size=8, **settings))


def test_every_known_entry_is_read_and_modes_agree_to_the_bit():
    net, x = make(num_layers=2), enumerate_all(3, 3)
    out = net(x)
    assert out.shape == (27, 2, 5)
    assert len(torch.unique(out.flatten(1), dim=0)) == 27
    rows = one_hot(x, 3, torch.float64).requires_grad_()
    assert torch.equal(net(rows), out)
    (gradient,) = torch.autograd.grad(net(rows).square().sum(), rows)
    assert (gradient.abs().amax((0, 2)) > 0).all()


def test_the_gradient_of_rows_is_that_of_a_linear_first_layer():
    net, x = make(num_layers=1), enumerate_all(3, 3)
    rows = one_hot(x, 3, torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(net(rows).square().sum(), rows)
    free = one_hot(x, 3, torch.float64).requires_grad_()
    h = torch.einsum("bik,ikh->bh", free, net.embedding[:, :3])
    h = h + net.layers[0](h)
    (expected,) = torch.autograd.grad(net.head(net.norm(h)).square().sum(), free)
    torch.testing.assert_close(found, expected)


def test_absent_entries_change_nothing():
    net, x = make(), enumerate_all(3, 3)
    lengths = Context(lengths=torch.full((27,), 3))
    out = net(x, lengths).view(9, 3, -1)
    assert torch.equal(out[:, :1].expand_as(out), out)
    assert not torch.equal(net(x, lengths), net(x))
    rows = one_hot(x, 3, torch.float64).requires_grad_()
    assert torch.equal(net(rows, lengths), net(x, lengths))
    (gradient,) = torch.autograd.grad(net(rows, lengths).sum(), rows)
    assert gradient[:, 2].abs().max() == 0


def test_a_head_of_zeros_is_the_identity_and_empty_parts_are_refused():
    net = InfillPerceptron(3, 5, KNOWN, HIDDEN, hidden_size=8, zero_head=True)
    assert net(enumerate_all(3, 3)).abs().max() == 0
    with pytest.raises(ValueError, match="found 0 and 2"):
        InfillPerceptron(3, 5, KNOWN[:0], HIDDEN)


@torch.no_grad()
def test_what_a_layer_adds_is_dropped_at_the_rate_in_training_alone():
    torch.manual_seed(0)
    net, seen = make(num_layers=2, dropout=0.25), []
    for layer in net.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out))
    x = torch.tensor([[0, 1, 2]]).expand(2000, 3)
    net.eval()(x)
    whole = seen[0]
    assert torch.equal(net(x), net(x))
    assert (whole != 0).all()
    seen.clear()
    net.train()(x)
    for some in seen:
        # 16,000 entries: within five standard deviations.
        assert abs(float((some == 0).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 16_000) ** 0.5
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], whole[kept] / 0.75)
