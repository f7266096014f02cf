from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import any_order, enumerate_all, randomize
from torch.nn import functional as F

from dflow import objectives
from dflow.core import Context
from dflow.distributions import AnyOrder, Confident, Ordered
from dflow.distributions import any_order as module
from dflow.distributions.any_order import schedule
from dflow.nn.attention import TransformerSize
from dflow.nn.infill import MaskedTransformer
from dflow.nn.plans import GAPS, buckets, gap_classes
from dflow.ops.modular import one_hot
from dflow.ops.orders import ORDERS, lockstep, shuffled


def model(K=3, dim=5, **settings) -> AnyOrder:
    return randomize(any_order(K, dim, **settings)).eval()


def walks(dim=5):
    net = model(dim=dim)
    net.costs.copy_(torch.tensor([4.0, 3.9, 1.0, 0.5, 0.4, 0.4, 0.3, 0.3])[:dim])
    yield from ((name, Ordered(net, order(dim, 2))) for name, order in ORDERS.items())
    yield "one at a time", Ordered(net, shuffled(dim, dim))
    yield "all at once", Ordered(net, lockstep(dim, 1))
    yield "random, measured", Ordered(net, shuffled(dim, dim), 3)
    yield "confidence", Confident(net, 3)
    yield "confidence, measured", Confident(net, 3, measured=True)


WALKS = dict(walks())


@pytest.mark.parametrize("name", WALKS)
@torch.no_grad()
def test_probabilities_of_each_length_add_up_to_one(name):
    K, dim, law = 3, 5, WALKS[name]
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


@pytest.mark.parametrize("name", WALKS)
def test_draws_follow_the_law(name):
    K, dim, n, law = 3, 5, 10_000, WALKS[name]
    x = law.sample(n, generator=torch.Generator().manual_seed(0))
    expected = law.log_prob(enumerate_all(K, dim)).exp().detach() * n
    counts = torch.bincount((x * K ** torch.arange(dim - 1, -1, -1)).sum(1), minlength=K**dim)
    kept = expected > 5
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < kept.sum() + 6 * (2 * kept.sum()).sqrt() + 10


@torch.no_grad()
def test_entries_that_are_not_known_are_never_read_and_known_ones_all_are():
    K, dim = 3, 6
    net = randomize(MaskedTransformer(K, 2, dim, TransformerSize(8, 3, 2, window=1, ngram_rows=5)))
    x = torch.randint(0, K, (1, dim))
    known = torch.tensor([[True, False, True, True, False, False]])
    before = net(x, known)
    for j in range(dim):
        changed = x.clone()
        changed[0, j] = (x[0, j] + 1) % K
        moved = (net(changed, known) != before).any(-1)[0]
        assert bool(moved.all()) if known[0, j] else not moved.any()
    rows = one_hot(x, K, torch.float64)
    assert torch.equal(net(rows, known), before)
    lengths = Context(lengths=torch.tensor([3]))
    for filler in range(K):
        changed = torch.where(torch.arange(dim) < 3, x, filler)
        torch.testing.assert_close(net(changed, known, lengths)[:, :3], net(x[:, :3], known[:, :3]))


@torch.no_grad()
def test_gaps_are_told_on_both_sides():
    known = torch.tensor([[False, True, False, False, False, True, False, False]])
    rows = gap_classes(known)[0]
    far = 17
    before = [far, far, 1, 2, 3, 4, 1, 2]
    after = [1, 4, 3, 2, 1, far, far, far]
    bucket = {d: int(2 * math.log2(d)) for d in range(1, 8)} | {far: far}
    assert rows[:, 0].tolist() == [bucket[d] for d in before]
    assert (rows[:, 1] - 18).tolist() == [bucket[d] for d in after]


def mean_over_orders(net: AnyOrder, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    calls = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    ranks = [calls[list(p)] for p in itertools.permutations(range(x.shape[1]))]
    return torch.stack([net.log_prob_along(x, rank, len(sizes)) for rank in ranks]).mean(0)


def test_classes_of_distances_are_half_powers_of_two():
    distances = torch.arange(1, 2000)
    assert buckets(distances).tolist() == [min(int(2 * math.log2(d)), GAPS - 1) for d in distances.tolist()]
    assert buckets(torch.tensor([[1 << 20]])).tolist() == [[GAPS - 1]]


@torch.no_grad()
def test_the_bound_is_the_mean_over_orders_and_lies_below_their_mixture():
    K, dim = 2, 4
    net = model(K, dim)
    x = enumerate_all(K, dim)
    expected = mean_over_orders(net, x, [1] * dim)
    found = torch.zeros(len(x), dtype=torch.float64)
    for t in range(dim):
        masks = list(itertools.combinations(range(dim), t))
        for places in masks:
            known = torch.zeros(len(x), dim, dtype=torch.bool)
            known[:, list(places)] = True
            found += net.elbo_given(x, known) / (dim * len(masks))
    torch.testing.assert_close(found, expected)
    orders = [Ordered(net, torch.tensor(p)[:, None]) for p in itertools.permutations(range(dim))]
    mixture = torch.stack([o.log_prob(x) for o in orders]).logsumexp(0) - math.log(len(orders))
    assert (expected < mixture).all()
    # Fewer calls: the same net cannot tell more on average over x, but the bound stays one of a law.
    coarse = torch.stack(
        [
            net.log_prob_along(x, torch.tensor([0, 0, 1, 1])[list(p)], 2)
            for p in itertools.permutations(range(dim))
        ]
    )
    torch.testing.assert_close(coarse.exp().sum(1), torch.ones(len(coarse), dtype=torch.float64))


@torch.no_grad()
def test_estimates_of_the_bound_are_unbiased():
    K, dim, n = 3, 4, 10_000
    net = model(K, dim)
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([[2, 0, 1, 1]])
    for sizes in (None, torch.tensor([1, 3])):
        expected = mean_over_orders(net, x, [1] * dim if sizes is None else sizes.tolist())
        found = net.elbo(x.expand(n, -1), None, generator, sizes)
        assert abs(found.mean() - expected) < 5 * found.std() / math.sqrt(n)
        # An entry beyond the length counts nothing; the bound is that of the short sequence.
        short = net.elbo(F.pad(x, (0, 0)).expand(n, -1), Context(lengths=torch.full((n,), 3)), generator)
        expected = mean_over_orders(net, x[:, :3], [1] * 3)
        assert abs(short.mean() - expected) < 5 * short.std() / math.sqrt(n)


@torch.no_grad()
def test_the_number_of_known_entries_is_spread_evenly_over_a_batch(monkeypatch):
    net, seen = model(2, 8), []
    monkeypatch.setattr(net, "elbo_given", lambda x, known, context: seen.append(known.sum(1)))
    for seed in range(5):
        net.elbo(torch.zeros(8, 8, dtype=torch.int64), generator=torch.Generator().manual_seed(seed))
        assert seen[-1].sort().values.tolist() == list(range(8))
    lengths = torch.tensor([1, 2, 5, 8])
    for _ in range(20):
        net.elbo(torch.zeros(4, 8, dtype=torch.int64), Context(lengths=lengths))
        assert (seen[-1] < lengths).all()


@pytest.mark.parametrize("dim", [1, 2, 5, 7])
def test_the_schedule_is_the_best_of_all(dim):
    for seed in range(3):
        costs = torch.rand(dim, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
        for calls in range(1, dim + 1):
            best = math.inf
            for cuts in itertools.combinations(range(1, dim), calls - 1):
                ends = [0, *cuts, dim]
                pairs = list(itertools.pairwise(ends))
                best = min(best, sum((b - a) * float(costs[a]) for a, b in pairs))
            sizes = schedule(costs, calls)
            assert len(sizes) == calls
            assert sizes.sum() == dim
            assert sizes.min() >= 1
            starts = sizes.cumsum(0) - sizes
            assert float((sizes * costs[starts]).sum()) == pytest.approx(best, rel=1e-6)
            # Noise in the order of costs is none in the costs.
            assert torch.equal(schedule(costs.flip(0), calls), sizes)


def test_schedules_follow_the_costs():
    net = any_order(3, 6)
    assert net.sizes(3).tolist() == [2, 2, 2]
    law = Ordered(net, shuffled(6, 6), 2)
    net.costs.copy_(torch.tensor([5.0, 1, 1, 1, 1, 1]))
    assert net.sizes(2).tolist() == [1, 5]
    assert law.calls().bincount().tolist() == [1, 5]


@torch.no_grad()
def test_costs_are_measured_at_the_right_numbers_of_known_entries():
    K, dim = 3, 6
    net = model(K, dim)
    x = torch.randint(0, K, (1000, dim))
    exact = net.measure(x, dim, torch.Generator().manual_seed(0))
    for t in (0, dim - 1):
        known = torch.arange(dim) < t
        means = []
        for shift in range(dim if t else 1):
            mask = known.roll(shift).expand(len(x), -1)
            means.append(-net.elbo_given(x, mask).mean() / dim)
        assert exact[t].item() == pytest.approx(float(sum(means) / len(means)), rel=0.1)
    coarse = net.measure(x, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(coarse, torch.linspace(float(coarse[0]), float(coarse[-1]), dim).double())
    assert coarse[0].item() == pytest.approx(float(exact[0]), rel=1e-6)


def test_training_keeps_the_costs_and_scoring_does_not():
    net = any_order(3, 4)
    x = torch.randint(0, 3, (64, 4))
    before = net.costs.clone()
    net.eval().elbo(x)
    assert torch.equal(net.costs, before)
    for _ in range(200):
        net.train().elbo(x)
    # The untrained network knows next to nothing: every entry costs log K at every t.
    torch.testing.assert_close(net.costs, torch.full((4,), math.log(3)), rtol=0.05, atol=0)
    assert not net.costs.requires_grad
    wide = AnyOrder(net.net, 64, 3)
    wide.costs.fill_(0.0)
    wide._note(torch.tensor([10]), torch.tensor([8.0]))
    assert wide.costs.nonzero().flatten().tolist() == [8, 9, 10, 11, 12]


def test_scoring_in_pieces_changes_nothing(monkeypatch):
    law, x = WALKS["lockstep"], torch.randint(0, 3, (7, 5))
    whole = law.log_prob(x)
    monkeypatch.setattr(module, "_ENTRIES", 1)
    torch.testing.assert_close(law.log_prob(x), whole)


@pytest.mark.parametrize("name", ["lockstep", "confidence"])
def test_a_prompt_is_known_before_the_first_call(name):
    K, dim, n, law = 3, 5, 20_000, WALKS[name]
    prompt = torch.tensor([2, 0, 1, 1])
    x = law.sample(n, prompt=prompt)
    assert (x[:, :4] == prompt).all()
    known = torch.arange(dim)[None] < 4
    p = law.model.logits(F.pad(prompt, (0, 1))[None], known)[0, 4].softmax(-1)
    assert (torch.bincount(x[:, 4], minlength=K) / n - p).abs().max() < 0.02
    short = Context(lengths=torch.full((5,), 2))
    assert (law.sample(5, short, prompt=prompt)[:, 2:] == 0).all()


def test_calls_are_what_is_counted():
    law = Ordered(any_order(3, 6), torch.arange(6)[:, None])
    calls = []
    forward = law.model.net.forward
    law.model.net.forward = lambda *a: calls.append(1) or forward(*a)
    law.sample(2)
    assert len(calls) == law.num_calls == 6
    law.sample(2, length=2)
    assert len(calls) == 8
    sure = Confident(law.model, 3)
    sure.sample(2)
    assert len(calls) == 8 + sure.num_calls


@torch.no_grad()
def test_what_is_surest_is_drawn_in_every_segment():
    dim, n = 8, 50
    law = Confident(model(3, dim), 4)
    x = torch.randint(0, 3, (n, dim))
    known = torch.zeros(n, dim, dtype=torch.bool)
    for call in range(4):
        entropy = torch.special.entr(law.model.logits(x, known).softmax(-1)).sum(-1).masked_fill(known, 9.0)
        drawn, _ = law.step(call, x, known, None)
        assert (drawn.view(n, 2, 4).sum(-1) == 1).all()
        least = entropy.view(n, 2, 4).min(-1).values
        assert (entropy.view(n, 2, 4)[drawn.view(n, 2, 4)].view(n, 2) - least).max() < 2e-3
        known |= drawn
    assert known.all()
    # Fewer at once: the surest of the segments' surest.
    law.model.costs.copy_(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1]))
    known = torch.zeros(n, dim, dtype=torch.bool)
    measured = Confident(law.model, 4, measured=True)
    drawn, _ = measured.step(0, x, known, None)
    assert (drawn.sum(1) == 1).all()
    entropy = torch.special.entr(law.model.logits(x, known).softmax(-1)).sum(-1)
    assert (entropy[drawn] - entropy.min(1).values).max() < 2e-3


def test_learns_dependence():
    """Sequences that count on from a random symbol: one symbol tells all others, whatever the order."""
    K, dim = 4, 8
    net = MaskedTransformer(K, K, dim, TransformerSize(16, 1, 2, window=2))
    law = Ordered(AnyOrder(net, dim, K), lockstep(dim, dim))
    objective = objectives.Objective(law, "masked").train()
    optimizer = torch.optim.Adam(law.parameters(), 2e-2)

    def batch(n):
        return (torch.randint(0, K, (n, 1)) + torch.arange(dim)) % K

    for _ in range(200):
        loss, _ = objective(batch(64))
        optimizer.zero_grad()
        (loss / 512).backward()
        optimizer.step()
    law.eval()
    x = batch(500)
    halves = Ordered(law.model, torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]]))
    # Bits a symbol: 2 for each that is drawn in the first call, nothing for the others.
    for walk, best in ((law, 0.25), (halves, 1.0), (Confident(law.model, 8), 0.25)):
        found = objectives.bits(-walk.log_prob(x).sum().item(), x.numel())
        assert best - 0.02 < found < best + 0.2


def test_wrong_arguments_name_the_value():
    net = any_order(3, 4)
    x = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 4"):
        net.logits(x, x > 0)
    with pytest.raises(ValueError, match="exactly once"):
        Ordered(net, torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="found 2 lanes"):
        Ordered(net, lockstep(4, 2), 2)
    with pytest.raises(ValueError, match=r"1\.\.4 \(the length\), found 5"):
        Confident(net, 5)
    with pytest.raises(ValueError, match="found 0"):
        AnyOrder(torch.nn.Identity(), 0, 3)
    with pytest.raises(ValueError, match="and 5"):
        schedule(torch.rand(4), 5)
    with pytest.raises(ValueError, match="and 9"):
        net.measure(torch.zeros(2, 4, dtype=torch.int64), 9)
    with pytest.raises(ValueError, match=r"\[1, 2\] do not draw all of 4"):
        net.elbo(x[:, :4], sizes=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="dim must be at least 1, found 0"):
        MaskedTransformer(3, 3, 0, TransformerSize(8))
