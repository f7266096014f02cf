"""Laws of text given entries that are known: by enumeration, for every law that takes them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import (
    BASES,
    DIMS,
    any_order,
    build_base,
    build_bijector,
    counting,
    counting_any_order,
    counting_causal,
    counting_grouped,
    coupling,
    enumerate_all,
    randomize,
    transformer,
    uneven,
)
from torch import Tensor, nn

from dflow import objectives, zoo
from dflow.bijectors import Coupling
from dflow.config import InputError
from dflow.core import Around, Context, Distribution, Known
from dflow.distributions import Confident, Ordered, SequenceCategorical, Walk
from dflow.elementwise import ModShift
from dflow.flows import Flow, Infilled, Split
from dflow.nn.infill import InfillTransformer
from dflow.nn.lstm import LSTM
from dflow.ops.modular import one_hot
from dflow.ops.noise import Noise
from dflow.ops.orders import ORDERS, lockstep


def grouped(K: int, dim: int, calls: int, order: str = "lockstep", block: int = 1) -> SequenceCategorical:
    matrix = ORDERS[order](dim, min(dim, calls * block))
    net = transformer(K, K, matrix, dim, block, ahead=2, ngram_rows=7)
    law = SequenceCategorical(net, matrix, dim, block)
    law.lay = ORDERS[order]
    return law


def causal(net: nn.Module, dim: int) -> SequenceCategorical:
    return SequenceCategorical(net, lockstep(dim, dim), dim)


def laid(law: Ordered) -> Ordered:
    law.lay = lockstep
    return law


#: Laws that take known entries anywhere.
ANYWHERE = {
    "grouped": lambda K, dim: grouped(K, dim, 2),
    "one call": lambda K, dim: grouped(K, dim, 1),
    "one lane": lambda K, dim: grouped(K, dim, dim),
    "blocks": lambda K, dim: grouped(K, dim, 2, block=2),
    "shuffled": lambda K, dim: grouped(K, dim, 3, "shuffled"),
    "any order": lambda K, dim: laid(Ordered(any_order(K, dim), lockstep(dim, 2))),
    "any order, restricted": lambda K, dim: Ordered(any_order(K, dim), lockstep(dim, 2)),
    "any order, merged": lambda K, dim: Ordered(any_order(K, dim), lockstep(dim, dim), 2),
    "confident": lambda K, dim: Confident(any_order(K, dim), 2),
    "counts, grouped": lambda K, dim: counting_grouped(K, dim, 2),
    "counts, blocks": lambda K, dim: counting_grouped(K, dim, 2, block=2),
    "counts, any order": counting_any_order,
}
#: Laws that take known entries at the beginning.
LEFT_TO_RIGHT = {
    "transformer": lambda K, dim: SequenceCategorical(
        transformer(K, K, lockstep(dim, dim), dim), lockstep(dim, dim), dim
    ),
    "lstm": lambda K, dim: causal(LSTM(K, K, hidden_size=8, num_layers=1, embedding_size=4), dim),
    **{
        f"counts, {net}": lambda K, dim, net=net: counting_causal(K, dim, net)
        for net in ("transformer", "lstm", "ngram")
    },
}
LAWS = ANYWHERE | LEFT_TO_RIGHT


def flow(family: str, K: int, dim: int, **settings: object) -> Distribution:
    """A flow over up to ``dim`` hidden entries."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "window": 2, "length": dim, "context": 2}
    return counting(uneven(zoo.build(family, zoo.settings(family, sizes | settings), K)), K)  # type: ignore[arg-type]


#: Flows, and levels, that take known entries anywhere. They give no single entry a probability.
FLOWS = {
    "strides": lambda K, dim: flow("bipartite", K, dim, num_flows=5, ngram_rows=7),
    "halves": lambda K, dim: flow("bipartite", K, dim, num_flows=3, masks="halves", elementwise="affine"),
    "mixture": lambda K, dim: flow("bipartite", K, dim, num_flows=2, base="mixture", components=3),
    "levels": lambda K, dim: flow("multiscale", K, dim, num_spectra=1, elementwise="affine"),
    "spectra": lambda K, dim: flow("multiscale", K, dim, num_levels=2),
    "categorical levels": lambda K, dim: flow("multiscale", K, dim, conditional="categorical"),
    "counts, strides": lambda K, dim: flow("bipartite", K, dim, num_flows=5, counts=3),
    "counts, halves": lambda K, dim: flow("bipartite", K, dim, masks="halves", elementwise="shift", counts=3),
    "counts, levels": lambda K, dim: flow("multiscale", K, dim, counts=3),
}


def build(name: str, K: int) -> Distribution:
    torch.manual_seed(K)
    return randomize((LAWS | FLOWS)[name](K, DIMS[K])).eval()


def masks(name: str, K: int) -> list[Tensor]:
    """Known entries: prefixes; and suffixes, holes, all but one, random sets, where the law takes them."""
    dim = DIMS[K]
    line = torch.arange(dim)
    some = [line < 1, line < dim - 1]
    if name not in LEFT_TO_RIGHT:
        generator = torch.Generator().manual_seed(0)
        some += [line >= dim - 1, line >= 1, line % 2 == 0, line % 2 == 1, line != dim // 2]
        some += [torch.rand(dim, generator=generator) < 0.5 for _ in range(3)]
    return [mask for mask in some if not mask.all()]


def given(x: Tensor, mask: Tensor, **more: object) -> Context:
    """A context that knows the entries of ``x`` under the mask; what stands elsewhere is never looked at."""
    return Context(known=Known(torch.where(mask, x, 10**9), mask), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("name", LAWS | FLOWS)
@torch.no_grad()
def test_probabilities_of_what_is_hidden_sum_to_one_and_steps_agree(name: str, K: int) -> None:
    law, x = build(name, K), enumerate_all(K, DIMS[K])
    for mask in masks(name, K):
        log_prob = law.log_prob(x, given(x, mask))
        place = (x * mask * K ** torch.arange(x.shape[1])).sum(1)
        total = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add(
            0, place, log_prob.double().exp()
        )
        assert (total[total > 0] - 1).abs().max() < 1e-12
        if name in LAWS:
            torch.testing.assert_close(law.log_prob_by_steps(x, given(x, mask)), log_prob)
        assert law.round_trip(x, given(x, mask)) is not False


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS | FLOWS)
@torch.no_grad()
def test_draws_follow_the_law_and_keep_what_is_known(name: str) -> None:
    K, n = 2, 100_000
    law, dim = build(name, K), DIMS[K]
    for mask in masks(name, K)[:6]:
        known = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1])[:dim]
        x = enumerate_all(K, dim)
        x = x[(x[:, mask] == known[mask]).all(1)]
        draws = law.sample(n, given(known.expand(n, dim), mask, noise=Noise(2, torch.arange(n))))
        assert (draws[:, mask] == known[mask]).all()
        power = K ** torch.arange(dim)
        order = (x * power).sum(1).argsort()
        expected = n * law.log_prob(x, given(x, mask)).double().exp()[order]
        _, counts = torch.unique(torch.cat([(x * power).sum(1), (draws * power).sum(1)]), return_counts=True)
        chi = float(((counts - 1 - expected).square() / expected).sum())
        freedom = len(x) - 1
        assert chi < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", LEFT_TO_RIGHT)
@torch.no_grad()
def test_a_document_cut_anywhere_has_one_joint(name: str) -> None:
    K = 3
    law, x = build(name, K), enumerate_all(K, DIMS[K])
    joint, line = law.log_prob(x), torch.arange(DIMS[K])
    for cut in range(1, DIMS[K]):
        mask = line < cut
        before = law.log_prob(x[:, :cut])
        torch.testing.assert_close(before + law.log_prob(x, given(x, mask)), joint)


@pytest.mark.parametrize("name", ANYWHERE)
@torch.no_grad()
def test_every_known_entry_is_read_and_none_that_is_hidden(name: str) -> None:
    K = 5
    law, dim = build(name, K), DIMS[5]
    mask = torch.arange(dim) != 1
    x = torch.zeros(1, dim, dtype=torch.int64)
    before = law.log_prob(x, given(x, mask))
    for place in range(dim):
        other = x.clone()
        other[0, place] = 1
        assert not torch.equal(law.log_prob(other, given(other, mask)), before)


@torch.no_grad()
def test_absent_entries_are_not_known_whatever_the_mask_says() -> None:
    K = 3
    dim = DIMS[K]
    for name in ("grouped", "blocks", "any order", "confident"):
        law = build(name, K)
        mask, n = torch.arange(dim) % 2 == 1, torch.full((2,), dim - 2)
        x = torch.randint(0, K, (1, dim)).repeat(2, 1)
        x[1, dim - 2 :] = (x[0, dim - 2 :] + 1) % K
        log_prob = law.log_prob(x, given(x, mask, lengths=n))
        assert torch.equal(log_prob[:1], log_prob[1:])
        torch.testing.assert_close(law.log_prob_by_steps(x, given(x, mask, lengths=n)), log_prob)


def test_known_entries_that_a_law_cannot_take_are_refused() -> None:
    K = 3
    dim = DIMS[K]
    x, line = torch.zeros(2, dim, dtype=torch.int64), torch.arange(dim)
    for name in LEFT_TO_RIGHT:
        with pytest.raises(InputError, match="takes what stands before, and not what stands after"):
            build(name, K).log_prob(x, given(x, line == dim - 1))
    for name in LAWS | FLOWS:
        for call in (
            lambda law, c: law.log_prob(x, c),
            lambda law, c: law.sample(2, c),
        ):
            with pytest.raises(InputError, match="every entry is known"):
                call(build(name, K), given(x, line >= 0))
    with pytest.raises(InputError, match=r"symbols int64 \(batch, n\) and a mask bool \(n,\)"):
        Known(x, line)
    with pytest.raises(InputError, match=r"symbols int64 \(batch, n\) and a mask bool \(n,\)"):
        Known(x, line[1:] > 0)


@torch.no_grad()
def test_the_bound_of_an_any_order_model_is_one_of_what_is_hidden() -> None:
    """Its mean over all masks is the mean over all orders of what is hidden, walked one entry a call."""
    torch.manual_seed(0)
    K, dim = 3, 4
    model = randomize(any_order(K, dim)).eval()
    x = torch.randint(0, K, (1, dim))
    mask = torch.tensor([False, True, False, False])
    hidden = [0, 2, 3]
    exact = [
        model.log_prob_along(x, torch.tensor([order.index(i) if i in order else -1 for i in range(dim)]), 3)
        for order in map(list, itertools.permutations(hidden))
    ]
    many = x.expand(6000, dim)
    terms = model.elbo(many, given(many, mask), torch.Generator().manual_seed(1))
    mean, error = float(terms.mean()), float(terms.std() / len(terms) ** 0.5)
    assert abs(mean - float(torch.stack(exact).mean())) < 4 * error


@pytest.mark.parametrize("name", BASES)
def test_laws_that_take_no_known_entries_say_so(name: str) -> None:
    """They would score and draw all entries."""
    K = 3
    law, x = build_base(name, K).eval(), torch.zeros(2, DIMS[3], dtype=torch.int64)
    context = given(x, torch.arange(DIMS[3]) < 1)
    if isinstance(law, (SequenceCategorical, Walk)):
        assert law.log_prob(x, context).shape == (2,)
        return
    for call in (law.log_prob, lambda _, c: law.sample(2, c)):
        with pytest.raises(InputError, match="this law takes no known entries"):
            call(x, context)


@pytest.mark.parametrize("name", ["grouped", "one call", "blocks", "shuffled", "transformer", "lstm"])
@torch.no_grad()
def test_what_is_known_alike_of_all_sequences_is_read_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    law, K, rows = build(name, 3), 3, list[int]()
    dim, read = DIMS[K], law.net.read
    monkeypatch.setattr(law.net, "read", lambda x, state: (rows.append(len(x)), read(x, state)))

    def draw(x: Tensor, mask: Tensor, numbers: list[int], lengths: Tensor | None = None) -> Tensor:
        rows.clear()
        noise = Noise(1, torch.tensor(numbers))
        return law.sample(len(x), Context(known=Known(x, mask), noise=noise, lengths=lengths))

    for mask in masks(name, K):
        alike = torch.randint(0, K, (1, dim), generator=torch.Generator().manual_seed(2)).repeat(4, 1)
        alike[:, ~mask] = torch.arange(4)[:, None] % K  # what is not known is never read
        drawn = draw(alike, mask, [0, 1, 2, 3])
        assert rows == [1]
        assert torch.equal(drawn, torch.cat([draw(alike[i : i + 1], mask, [i]) for i in range(4)]))
        other = alike.clone()
        other[3, mask] = (other[3, mask] + 1) % K
        before_others = name in LEFT_TO_RIGHT
        drawn = draw(other, mask, [0, 1, 2, 3])
        assert rows == ([4] if before_others else [])
        assert torch.equal(drawn, torch.cat([draw(other[i : i + 1], mask, [i]) for i in range(4)]))
        draw(alike, mask, [0, 1, 2, 3], torch.tensor([dim, dim - 1, dim, dim]))
        assert rows == ([4] if before_others else [])


# -- flows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_a_flow_takes_sequences_of_any_length_and_as_many_hidden_entries_as_it_has(name: str) -> None:
    K = 3
    law, dim = build(name, K), DIMS[3]
    for n in range(1, dim + 1):
        x = enumerate_all(K, n)
        log_prob = law.log_prob(x)
        assert abs(float(log_prob.double().exp().sum()) - 1) < 1e-12
        nothing = torch.zeros(n, dtype=torch.bool)
        assert torch.equal(law.log_prob(x, given(x, nothing)), log_prob)
        assert law.sample(4, given(x[:1].expand(4, n), nothing)).shape == (4, n)
        longer, lengths = torch.cat([x, x[:, :1].expand(-1, dim - n)], 1), torch.full((len(x),), n)
        absent = law.log_prob(longer, Context(lengths=lengths))
        assert abs(float(absent.double().exp().sum()) - 1) < 1e-12
    assert law.sample(4).shape == (4, dim)
    x, line = torch.zeros(1, dim + 5, dtype=torch.int64), torch.arange(dim + 5)
    assert law.sample(1, given(x, line < 5)).shape == (1, dim + 5)
    with pytest.raises(InputError, match=f"{dim + 1} hidden entries, and this law takes at most {dim}"):
        law.log_prob(x, given(x, line < 4))
    with pytest.raises(InputError, match=f"a sequence of {dim} entries, for one of {dim + 5}"):
        law.log_prob(x, given(x[:, :dim], line[:dim] < 1))
    with pytest.raises(InputError, match="leave the lengths out"):
        law.log_prob(x, given(x, line < 5, lengths=torch.tensor([8])))


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_draws_of_a_flow_follow_the_law_given_what_is_known(name: str) -> None:
    K, n = 2, 20_000
    law, dim = build(name, K), DIMS[K]
    known = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1])
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    x = enumerate_all(K, dim)
    x = x[(x[:, mask] == known[mask]).all(1)]
    draws = law.sample(n, given(known.expand(n, dim), mask, noise=Noise(2, torch.arange(n))))
    assert (draws[:, mask] == known[mask]).all()
    expected = n * law.log_prob(x, given(x, mask)).double().exp()
    counts = (draws[:, None] == x).all(2).sum(0)
    assert float(((counts - expected).square() / expected).sum()) < 15 + 5 * math.sqrt(30)
    # A draw is fixed by the number of its sample, whatever else is drawn.
    some = law.sample(5, given(known.expand(5, dim), mask, noise=Noise(2, torch.arange(7, 12))))
    assert torch.equal(some, draws[7:12])


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_a_flow_reads_every_known_entry(name: str) -> None:
    """By the law of the hidden entry 1, given the others, and given others that differ in one place."""
    K = 5
    law, dim = build(name, K), DIMS[5]
    mask = torch.arange(dim) != 1
    for place in (0, 2, 3):
        differ = 0
        for x in torch.randint(0, K, (20, dim), generator=torch.Generator().manual_seed(place)):
            rows = x.repeat(K, 1)
            rows[:, 1] = torch.arange(K)
            other = rows.clone()
            other[:, place] = (other[:, place] + 1) % K
            log_prob, of_other = (law.log_prob(y, given(y, mask)) for y in (rows, other))
            differ += not torch.equal(log_prob, of_other)
        assert differ


@pytest.mark.parametrize("name", ["strides", "halves", "spectra"])
def test_drawing_from_a_flow_takes_as_many_network_calls_whatever_is_known(name: str) -> None:
    K, calls = 3, 0
    law, dim = build(name, K), DIMS[3]

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in law.modules():
        if isinstance(module, InfillTransformer):
            module.register_forward_hook(count)
    x = torch.zeros(2, dim, dtype=torch.int64)
    for mask in masks(name, K):
        calls = 0
        law.sample(2, given(x, mask))
        assert calls == law.num_calls


@pytest.mark.parametrize("name", FLOWS)
def test_rows_cost_what_symbols_do_and_have_a_gradient(name: str) -> None:
    K = 3
    law, x = build(name, K), torch.randint(0, K, (6, DIMS[3]))
    for mask in masks(name, K):
        rows = one_hot(x, K, torch.float64).requires_grad_()
        log_prob = law.log_prob(rows, given(x, mask))
        torch.testing.assert_close(log_prob, law.log_prob(x, given(x, mask)))
        log_prob.sum().backward()
        assert rows.grad is not None
        assert rows.grad[:, ~mask].abs().sum() > 0
        assert not rows.grad[:, mask].any()


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("strides", "layerwise"),
        ("strides", "straight_through"),
        ("halves", "expected"),
        ("halves", "straight_through"),
        ("levels", "expected"),
        ("spectra", "layerwise"),
        ("categorical levels", "likelihood"),
    ],
)
def test_training_scores_and_counts_hidden_entries_alone(name: str, rule: objectives.Rule) -> None:
    K = 3
    law, x = build(name, K).train(), torch.randint(0, K, (7, DIMS[3]))
    objective = objectives.Objective(law, rule)
    for mask in masks(name, K):
        loss, counts = objective(x, known=objectives.KnownMask(mask))
        context = given(x, mask)
        if rule in ("straight_through", "likelihood"):
            assert loss.item() == pytest.approx(-law.log_prob(x, context).sum().item(), rel=1e-9)
        assert isinstance(law, Infilled)
        base = objectives.closed_form(law)
        assert base is not None
        assert counts is not None
        if isinstance(law.law, Flow):
            assert counts.sum() == len(x) * int((~mask).sum())
            if rule == "layerwise":
                hidden, within = law.hidden(x, context)
                assert loss.item() == pytest.approx(cross_entropies(law.law, hidden, within), rel=1e-6)
        objectives.refit(law, [(x, context)])
        assert torch.equal(base.counts, counts)
        loss.backward()
    assert all(p.grad is not None for p in law.parameters())


@torch.no_grad()
def cross_entropies(law: Flow, x: Tensor, context: Context) -> float:
    """The sum of the cross-entropies of all couplings, in nats, entry by entry."""
    total = 0.0
    for layer in law.bijector.layers():
        assert isinstance(layer, Coupling)
        log_p = layer.params(x, context).log_softmax(-1)
        for i, place in enumerate(layer.moved(context).tolist()):
            total -= float(log_p[torch.arange(len(x)), i, x[:, place]].sum())
        x, _ = layer(x, context)
    return total


@torch.no_grad()
def test_few_hidden_entries_are_mapped_by_fine_couplings_and_all_are_mapped() -> None:
    """Else a gap of one symbol would have the law of the base, whatever stands around it."""
    law = flow("bipartite", 3, 8, num_flows=4)
    assert isinstance(law, Infilled)
    assert isinstance(law.law, Flow)
    layers = [layer for layer in law.law.bijector.layers() if isinstance(layer, Coupling)]
    assert [layer.hidden_index.tolist() for layer in layers] == [[0, 2, 4, 6, 8], [1, 5, 9], [3], [7]]
    assert [layer.known_index.tolist() for layer in layers] == [[1, 3, 5, 7, 9], [3, 7], [7], []]
    for number in range(1, 9):
        mask = torch.arange(number + 2) % (number + 1) == 0
        _, within = law.hidden(torch.zeros(1, number + 2, dtype=torch.int64), given(mask[None].long(), mask))
        moved = [layer.moved(within).tolist() for layer in layers]
        assert sorted(place for places in moved for place in places) == list(range(number))
        assert {0, number - 1} <= {*moved[0], *moved[1]}
    levels = flow("multiscale", 3, 8)
    assert isinstance(levels, Infilled)
    assert isinstance(levels.law, Split)
    assert levels.num_calls == 3
    assert levels.law.rest_index.tolist() == [0, 2, 4, 6, 8]


@torch.no_grad()
def test_all_of_a_long_text_before_is_read_through_attention() -> None:
    """A change far beyond the window of any hidden entry changes the law of an entry."""
    torch.manual_seed(0)
    law = randomize(flow("multiscale", 3, 16, context=50, num_levels=1)).eval()
    x, mask = torch.randint(0, 3, (1, 66)), torch.arange(66) < 50
    before = law.log_prob(x, given(x, mask))
    for place in range(50):
        other = x.clone()
        other[0, place] = (other[0, place] + 1) % 3
        assert not torch.equal(law.log_prob(other, given(other, mask)), before)


def test_layers_that_take_no_known_entries_say_so() -> None:
    K, dim = 3, 4
    x = torch.zeros(2, dim, dtype=torch.int64)
    context = given(x, torch.arange(dim) < 1)
    for name in ("coupling shift", "coupling rank infill", "autoregressive shift", "permute", "reverse"):
        layer = build_bijector(name, K, dim)
        for call in (layer.forward, layer.inverse):
            with pytest.raises(InputError, match="this law takes no known entries"):
                call(x, context)
    # The net of a law of hidden entries has to read what is known around them.
    mask = torch.arange(dim + 1) < 1
    around = Context(around=Around(mask, torch.zeros(2, dim + 1, dtype=torch.int64), 0, dim, 0))
    with pytest.raises(InputError, match="this law takes no known entries"):
        coupling(ModShift(K), K, dim)(x, around)
    with pytest.raises(InputError, match="this law takes no known entries"):
        build_base("split", K, dim).log_prob(x, around)
    law = flow("bipartite", K, dim, num_flows=1)
    assert isinstance(law, Infilled)
    with pytest.raises(ValueError, match="this network is one of a law of hidden entries"):
        law.law.log_prob(torch.zeros(2, dim + 2, dtype=torch.int64))
