"""Tables of contexts: every context has its row, steps agree with the pass, gradients are multilinear."""

from __future__ import annotations

import pytest
import torch
from cases import enumerate_all, randomize

from dflow.core import Context
from dflow.nn.table import LARGEST, InfillTable, PrefixTable
from dflow.ops.modular import one_hot


def test_every_context_has_a_row_of_its_own():
    known, hidden = torch.tensor([0, 2, 3]), torch.tensor([1, 4])
    net = randomize(InfillTable(3, 5, known, hidden))
    out = net(enumerate_all(3, 3))
    assert out.shape == (27, 2, 5)
    assert torch.equal(out.flatten(1), net.table)
    prefix = randomize(PrefixTable(3, 2, 4))
    x = enumerate_all(3, 4)
    for i in range(4):
        rows = torch.unique(prefix(x)[:, i], dim=0)
        assert len(rows) == 3**i
        assert torch.equal(prefix(x)[:, i], prefix(x[:, : i + 1])[:, i])
    assert len(prefix.table) == 1 + 3 + 9 + 27


def test_steps_give_what_the_pass_gives():
    net, x = randomize(PrefixTable(3, 2, 4)), enumerate_all(3, 4)
    state, full = net.start(len(x)), net(x)
    for i in range(4):
        assert torch.equal(net.step(None if i == 0 else x[:, i - 1 : i], state)[:, 0], full[:, i])


def test_rows_give_the_same_values_and_the_gradient_of_the_multilinear_extension():
    net = randomize(InfillTable(3, 2, torch.tensor([0, 1]), torch.tensor([2])))
    x = enumerate_all(3, 2)
    rows = one_hot(x, 3, torch.float64).requires_grad_()
    out = net(rows)
    assert torch.equal(out, net(x))
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((out * weight).sum(), rows)
    table = net.table.detach().view(3, 3, 2)
    free = one_hot(x, 3, torch.float64).requires_grad_()
    extension = torch.einsum("bi,bj,ijp->bp", free[:, 0], free[:, 1], table)
    (expected,) = torch.autograd.grad((extension * weight[:, 0]).sum(), free)
    torch.testing.assert_close(found, expected)


def test_absent_entries_change_nothing():
    net = randomize(InfillTable(3, 2, torch.tensor([0, 2]), torch.tensor([1])))
    x, lengths = enumerate_all(3, 2), Context(lengths=torch.full((9,), 2))
    assert torch.equal(net(x, lengths), net(x * torch.tensor([1, 0])))
    rows = one_hot(x, 3, torch.float64).requires_grad_()
    out = net(rows, lengths)
    assert torch.equal(out, net(x, lengths))
    (gradient,) = torch.autograd.grad(out.sum(), rows)
    assert gradient[:, 1].abs().max() == 0
    assert gradient[:, 0].abs().max() > 0


def test_a_table_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match=f"{LARGEST:,}"):
        InfillTable(91, 91, torch.arange(4), torch.tensor([4]))
    with pytest.raises(ValueError, match="too large"):
        PrefixTable(10, 10, 12)
