from __future__ import annotations

import pytest
import torch
from cases import counting, enumerate_all, grouped, randomize, transformer
from torch.nn import functional as F

from dflow.core import Context, Known
from dflow.distributions import SequenceCategorical, sequence
from dflow.ops.modular import one_hot
from dflow.ops.noise import Noise
from dflow.ops.orders import ORDERS, islands, lockstep

CASES = [(order, dim, calls) for order in ORDERS for dim, calls in ((5, 2), (4, 4), (6, 3))]


@pytest.mark.parametrize(("order", "dim", "calls"), CASES)
@torch.no_grad()
def test_probabilities_of_each_length_add_up_to_one(order, dim, calls):
    K = 3
    law = randomize(grouped(K, dim, calls, order))
    for T in range(1, dim + 1):
        x = enumerate_all(K, T)
        lengths = Context(lengths=torch.full((len(x),), T))
        padded = F.pad(x, (0, dim - T), value=1)
        log_prob = law.log_prob(padded, lengths)
        assert abs(float(log_prob.exp().sum()) - 1) < 1e-12
        torch.testing.assert_close(law.log_prob(x), log_prob)
        torch.testing.assert_close(law.log_prob(one_hot(padded, K, torch.float64), lengths), log_prob)
        torch.testing.assert_close(law.log_prob_by_steps(padded, lengths), log_prob)
        torch.testing.assert_close(law.log_prob_by_steps(x), log_prob)


@pytest.mark.parametrize(("order", "dim", "calls"), CASES)
def test_draws_follow_the_law(order, dim, calls):
    K, n = 2, 20_000
    law = randomize(grouped(K, dim, calls, order))
    x = law.sample(n, generator=torch.Generator().manual_seed(0))
    places = (x * K ** torch.arange(dim - 1, -1, -1)).sum(1)
    expected = law.log_prob(enumerate_all(K, dim)).exp().detach() * n
    counts = torch.bincount(places, minlength=K**dim)
    kept = expected > 5
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < kept.sum() + 6 * (2 * kept.sum()).sqrt() + 10


def test_shorter_draws_have_the_law_of_first_entries():
    K, dim, n = 2, 6, 20_000
    for calls in (6, 3):
        law = randomize(grouped(K, dim, calls))
        short = law.sample(n, generator=torch.Generator().manual_seed(0), length=2)[:, :2]
        p = law.log_prob(enumerate_all(K, dim)).exp().detach().view(4, -1).sum(1)
        counts = torch.bincount(short[:, 0] * 2 + short[:, 1], minlength=4) / n
        assert (counts - p).abs().max() < 0.02


def test_a_prompt_is_kept_and_from_left_to_right_conditions_exactly():
    K, dim, n = 3, 4, 30_000
    law = randomize(grouped(K, dim, dim))
    prompt = torch.tensor([2, 0])
    x = law.sample(n, generator=torch.Generator().manual_seed(0), prompt=prompt)
    assert (x[:, :2] == prompt).all()
    p = law.log_prob(enumerate_all(K, dim)).exp().detach().view(K, K, K * K)[2, 0]
    counts = torch.bincount(x[:, 2] * K + x[:, 3], minlength=K * K) / n
    assert (counts - p / p.sum()).abs().max() < 0.02
    x = randomize(grouped(K, dim, 2)).sample(5, prompt=prompt)
    assert (x[:, :2] == prompt).all()


def test_noise_drawn_in_blocks_gives_the_same_draws_for_a_seed(monkeypatch):
    law = grouped(3, 6, 3)
    once = law.sample(4, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(sequence, "_NOISE_BLOCK", 1)
    assert torch.equal(law.sample(4, generator=torch.Generator().manual_seed(3)), once)


KNOWN = {"nothing": [0, 0, 0, 0, 0, 0], "before": [1, 1, 0, 0, 0, 0], "holes": [0, 1, 0, 0, 1, 0]}


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("known", [None, *KNOWN])
def test_calls_are_those_in_which_a_draw_draws(known, block, monkeypatch):
    dim, drawn = 6, []
    order = lockstep(dim, 4)
    law = randomize(SequenceCategorical(transformer(3, 3, order, dim, block=block), order, dim, block))
    law.lay = lockstep
    context = None
    if known is not None:
        mask = torch.tensor(KNOWN[known]).bool()
        context = Context(known=Known(torch.ones(1, dim, dtype=torch.int64), mask))
    draw = Noise.draw
    monkeypatch.setattr(Noise, "draw", lambda self, *args: (drawn.append(args[2]), draw(self, *args))[1])
    law.sample(1, context)
    calls = law.calls(context)
    # A row is drawn after another, and a call draws a block of them.
    assert [calls[row].tolist() for row in drawn] == [[i // block] * len(row) for i, row in enumerate(drawn)]
    assert sorted(torch.cat(drawn).tolist()) == (calls >= 0).nonzero().flatten().tolist()
    assert (calls < 0).sum() == sum(KNOWN.get(known, []))
    assert int(calls.max()) + 1 == law.needed(dim, context)


def test_calls_of_a_prompt_that_one_call_reads():
    order = torch.arange(6)[:, None]
    law = randomize(SequenceCategorical(transformer(3, 3, order, 6), order, 6))
    known = Known(torch.ones(1, 6, dtype=torch.int64), torch.arange(6) < 2)
    assert law.calls().tolist() == [0, 1, 2, 3, 4, 5]
    assert law.calls(Context(known=known)).tolist() == [-1, -1, 1, 2, 3, 4]
    assert law.needed(6, Context(known=known)) == 5


def test_one_call_a_group():
    law = grouped(3, 6, 3)
    assert law.num_calls == 3
    calls = []
    step = law.net.step
    law.net.step = lambda x, state: calls.append(1) or step(x, state)
    law.sample(2)
    assert len(calls) == 3
    law.sample(2, length=1)
    assert len(calls) == 4


@torch.no_grad()
def test_a_law_of_several_budgets_is_a_law_at_each():
    K, dim = 3, 6
    orders = [lockstep(dim, 2), lockstep(dim, 3), lockstep(dim, 6), islands(dim, 4)]
    others = [(order, 1) for order in orders[1:]]
    law = randomize(SequenceCategorical(transformer(K, K, orders[0], dim), orders[0], dim, 1, others))
    assert law.budgets == [2, 3, 4, 6]
    x, found = enumerate_all(K, dim), []
    for calls in law.budgets:
        other = law.at(calls)
        assert other.num_calls == calls
        assert other.net is law.net
        assert law.at(calls) is other
        log_prob = other.log_prob(x)
        assert abs(float(log_prob.exp().sum()) - 1) < 1e-12
        torch.testing.assert_close(other.log_prob_by_steps(x), log_prob)
        found.append(log_prob)
        alone = transformer(K, K, other.order, dim, ahead=2).double()
        alone.load_state_dict(law.net.state_dict() | {"order": other.order})
        torch.testing.assert_close(SequenceCategorical(alone, other.order, dim).log_prob(x), log_prob)
    assert not torch.allclose(found[0], found[1])
    assert law.num_calls == 2
    torch.testing.assert_close(law.log_prob(x), found[0])
    with pytest.raises(ValueError, match="no order of 5 calls"):
        law.at(5)


@torch.no_grad()
@pytest.mark.parametrize("counts", [0, 3])
def test_a_network_of_blocks_walks_smaller_blocks_too(counts):
    K, dim, first = 2, 7, lockstep(7, 4)
    net = counting(transformer(K, K, first, dim, block=4, counts=counts), K)
    others = [(lockstep(dim, 6), 3), (lockstep(dim, 7), 2), (lockstep(dim, 7), 1)]
    law = randomize(SequenceCategorical(net, first, dim, 4, others))
    assert law.budgets == [1, 2, 4, 7]
    x, one_call = enumerate_all(K, dim), law.net._call
    calls = []
    law.net._call = lambda *a: calls.append(1) or one_call(*a)
    for budget in law.budgets:
        other = law.at(budget)
        log_prob = other.log_prob(x)
        assert abs(float(log_prob.exp().sum()) - 1) < 1e-12
        torch.testing.assert_close(other.log_prob_by_steps(x), log_prob)
        calls.clear()
        other.sample(2)
        assert len(calls) == other.num_calls == budget
    with pytest.raises(ValueError, match="1 to 4 rows of this network, asked for 5"):
        net.plan(first, None, dim, 5)


def test_blocks_cost_one_call_each():
    K, dim = 3, 7
    order = lockstep(dim, 4)
    law = SequenceCategorical(transformer(K, K, order, dim, block=2), order, dim, 2)
    calls = []
    call = law.net._call
    law.net._call = lambda *a: calls.append(1) or call(*a)
    law.sample(3)
    assert len(calls) == law.num_calls == 2


@pytest.mark.parametrize(("order", "dim", "calls"), CASES)
def test_the_fixed_point_is_the_draw(order, dim, calls, monkeypatch):
    law = randomize(grouped(3, dim, calls, order))
    lengths = torch.arange(50) % dim + 1
    for context, block in ((None, 1 << 22), (None, 1), (lengths, 1 << 22), (lengths.clamp(max=2), 1)):
        context = Context(lengths=context)
        monkeypatch.setattr(sequence, "_NOISE_BLOCK", block)
        drawn = law.sample(50, context, torch.Generator().manual_seed(7))
        x, used = law.sample_by_fixed_point(50, context, torch.Generator().manual_seed(7))
        assert torch.equal(x, drawn)
        assert 1 <= used <= calls + 1


def test_the_fixed_point_of_independent_symbols_takes_two_calls():
    law = grouped(3, 6, 6)
    torch.nn.init.zeros_(law.net.head.weight)
    torch.nn.init.constant_(law.net.head.bias[0], -9.0)  # nothing starts right
    assert law.sample_by_fixed_point(8)[1] == 2
    law.net.forward = lambda x, context=None: torch.randn(*x.shape, 3)
    with pytest.raises(RuntimeError, match="no draw after 7 calls"):
        law.sample_by_fixed_point(8)
