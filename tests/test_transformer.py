from __future__ import annotations

import math

import pytest
import torch
from cases import alternate, enumerate_all, randomize, transformer
from torch.nn import functional as F

from dflow.core import Context
from dflow.nn.attention import Attention, Block, TransformerSize
from dflow.nn.infill import InfillTransformer
from dflow.nn.transformer import GroupCausalTransformer
from dflow.ops.lookup import lookup
from dflow.ops.modular import one_hot
from dflow.ops.orders import ORDERS, check_order, lockstep

SHAPES = [(4, 2), (5, 2), (5, 5), (6, 4), (7, 3), (4, 1)]


@pytest.mark.parametrize("tables", [{}, {"window": 3, "ngram_rows": 5}, {"block": 2}, {"block": 3}])
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("dim", "calls"), SHAPES)
@torch.no_grad()
def test_steps_give_what_the_pass_gives(name, dim, calls, tables):
    K, order = 3, ORDERS[name](dim, calls)
    net = randomize(transformer(K, 4, order, dim, **tables))
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, K, (9, dim), generator=generator)
    for lengths in (None, torch.randint(1, dim + 1, (9,), generator=generator)):
        context = Context(lengths=lengths)
        full, state, previous = net(x, context), net.start(9, context), None
        for row in order:
            params = net.step(previous, state)
            row = row[row < dim]
            previous = x[:, row]
            assert params.shape[1] == len(row)
            for i, position in enumerate(row.tolist()):
                rows = torch.ones(9, dtype=torch.bool) if lengths is None else position < lengths
                torch.testing.assert_close(params[rows, i], full[rows, position])


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("dim", "calls"), SHAPES)
@torch.no_grad()
def test_an_entry_depends_on_all_earlier_groups_and_nothing_else(name, dim, calls):
    K, order = 3, ORDERS[name](dim, calls)
    net = randomize(transformer(K, 4, order, dim))
    group = torch.empty(int(order.max()) + 1, dtype=torch.int64)
    group[order] = torch.arange(len(order))[:, None].expand_as(order)
    x = torch.randint(0, K, (1, dim), generator=torch.Generator().manual_seed(2))
    before = net(x)
    for j in range(dim):
        changed = x.clone()
        changed[0, j] = (x[0, j] + 1) % K
        moved = (net(changed) != before).any(-1)[0]
        assert torch.equal(moved, group[:dim] > group[j])


@pytest.mark.parametrize("name", ORDERS)
@torch.no_grad()
def test_absent_entries_change_nothing(name):
    K, dim = 3, 6
    net = randomize(transformer(K, 4, ORDERS[name](dim, 3), dim))
    for T in range(1, dim + 1):
        x = torch.randint(0, K, (5, T))
        lengths = Context(lengths=torch.full((5,), T))
        short = net(x)
        for filler in range(K):
            padded = F.pad(x, (0, dim - T), value=filler)
            torch.testing.assert_close(net(padded, lengths)[:, :T], short)
            rows = one_hot(padded, K, torch.float64)
            torch.testing.assert_close(net(rows, lengths)[:, :T], short)


def test_both_modes_agree_to_the_last_bit_in_single_precision():
    K, dim = 7, 32
    x = torch.randint(0, K, (3, dim))
    rows = one_hot(x, K, torch.float32)
    for calls in (4, dim):
        net = GroupCausalTransformer(K, K, lockstep(dim, calls), dim, TransformerSize(16, 3, 2, window=4))
        assert torch.equal(net(x), net(rows))
    mask = alternate(dim)
    infill = InfillTransformer(
        K, K, mask.nonzero().flatten(), (~mask).nonzero().flatten(), TransformerSize(16, 1)
    )
    assert torch.equal(infill(x[:, mask]), infill(rows[:, mask]))


def test_gradients_of_rows_are_those_of_the_soft_network():
    # On one-hot rows the network is linear in each symbol's embedding: the gradient is exact, so that a
    # finite step along an edge of the simplex changes the first layer's sum by just what it says.
    K, dim = 4, 6
    net = randomize(transformer(K, 2, lockstep(dim, 3), dim))
    x = torch.randint(0, K, (1, dim))
    rows = one_hot(x, K, torch.float64).requires_grad_()
    slots = net._own_plan().slots

    def features(y):
        return net._read(y, F.pad(y.argmax(-1) if y.is_floating_point() else y, (0, 1), value=K), slots)

    h = features(rows)
    weights = torch.randn_like(h)
    (gradient,) = torch.autograd.grad((h * weights).sum(), rows)
    for j in range(dim):
        for k in range(K):
            other = x.clone()
            other[0, j] = k
            change = ((features(other) - h) * weights).sum()
            assert change.item() == pytest.approx((gradient[0, j, k] - gradient[0, j, x[0, j]]).item())


@torch.no_grad()
def test_infilling_ignores_absent_entries_and_reads_all_known_ones():
    K, dim = 3, 8
    mask = alternate(dim)
    known, hidden = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    net = randomize(InfillTransformer(K, 2, known, hidden, TransformerSize(8, 1, 2, window=1)))
    x = torch.randint(0, K, (1, len(known)))
    for j in range(len(known)):
        changed = x.clone()
        changed[0, j] = (x[0, j] + 1) % K
        # A window of one sees two neighbours; attention carries the rest.
        assert (net(changed) != net(x)).any(-1).all()
    lengths = Context(lengths=torch.tensor([5]))
    present = hidden < 5
    for filler in enumerate_all(K, 1):
        changed = x.clone()
        changed[0, known >= 5] = filler
        torch.testing.assert_close(net(changed, lengths)[:, present], net(x, lengths)[:, present])


def test_lookup_is_an_index_forward_and_a_product_backward():
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randint(0, 5, (2, 4))
    rows = one_hot(x, 5, torch.float64).requires_grad_()
    assert torch.equal(lookup(rows, weight), lookup(x, weight))
    g = torch.randn(2, 4, 3, dtype=torch.float64)
    got = torch.autograd.grad((lookup(rows, weight) * g).sum(), (rows, weight))
    expected = torch.autograd.grad(((rows @ weight) * g).sum(), (rows, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_arguments_name_the_value():
    with pytest.raises(ValueError, match="hidden_size 10 must be a multiple"):
        TransformerSize(10, num_attention_heads=4)
    with pytest.raises(ValueError, match="at most 4"):
        GroupCausalTransformer(3, 3, lockstep(4, 2), 4, TransformerSize(8))(
            torch.zeros(1, 5, dtype=torch.int64)
        )
    with pytest.raises(ValueError, match="window"):
        TransformerSize(8, window=0)
    with pytest.raises(ValueError, match="found 0 and 2"):
        InfillTransformer(3, 3, torch.arange(0), torch.arange(2))
    with pytest.raises(ValueError, match=r"1\.\.4"):
        lockstep(4, 5)
    with pytest.raises(ValueError, match="exactly once"):
        check_order(torch.tensor([[0, 0]]), 2)
    with pytest.raises(ValueError, match="int64 matrix"):
        check_order(torch.tensor([0, 1]), 2)


@pytest.mark.parametrize("path", ["attention", "perceptron"])
@torch.no_grad()
def test_a_block_drops_what_either_path_adds_in_training_alone(path):
    torch.manual_seed(1)
    block, rate, n = Block(TransformerSize(32, 1, 2, 48, dropout=0.3)).double(), 0.3, 9
    # The other path adds nothing.
    (block.down if path == "attention" else block.attention.out).weight.zero_()
    h = torch.randn(40, n, 32, dtype=torch.float64)
    rotation = torch.view_as_real(torch.ones(n, 2, 1, 8, dtype=torch.complex128))
    whole = block.eval()(h, rotation, None) - h
    assert torch.equal(block(h, rotation, None) - h, whole)
    assert (whole != 0).all()
    some = block.train()(h, rotation, None) - h
    kept = some.abs() > 1e-12
    torch.testing.assert_close(some[kept], whole[kept] / (1 - rate))
    for share in (kept.double().mean(), kept[:, 0].double().mean(), kept[..., 0].double().mean()):
        # Five standard deviations of the smallest of these, of 360 entries.
        assert abs(float(share) - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / 360)
    assert not torch.equal(block(h, rotation, None) - h, some)


def test_attention_itself_drops_nothing():
    attention = Attention(16, 2).double().train()
    h = torch.randn(2, 5, 16, dtype=torch.float64)
    rotation = torch.view_as_real(torch.ones(5, 2, 1, 4, dtype=torch.complex128))
    assert torch.equal(attention(h, rotation, None), attention.eval()(h, rotation, None))
