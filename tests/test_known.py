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
    counting_any_order,
    counting_causal,
    counting_grouped,
    enumerate_all,
    randomize,
    transformer,
)
from torch import Tensor, nn

from dflow.config import InputError
from dflow.core import Context, Distribution, Known
from dflow.distributions import Confident, Ordered, SequenceCategorical, Walk
from dflow.nn.lstm import LSTM
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


def build(name: str, K: int) -> Distribution:
    torch.manual_seed(K)
    return randomize(LAWS[name](K, DIMS[K])).eval()


def masks(name: str, K: int) -> list[Tensor]:
    """Known entries: prefixes; and suffixes, holes, all but one, random sets, where the law takes them."""
    dim = DIMS[K]
    line = torch.arange(dim)
    some = [line < 1, line < dim - 1]
    if name in ANYWHERE:
        generator = torch.Generator().manual_seed(0)
        some += [line >= dim - 1, line >= 1, line % 2 == 0, line % 2 == 1, line != dim // 2]
        some += [torch.rand(dim, generator=generator) < 0.5 for _ in range(3)]
    return [mask for mask in some if not mask.all()]


def given(x: Tensor, mask: Tensor, **more: object) -> Context:
    """A context that knows the entries of ``x`` under the mask; what stands elsewhere is never looked at."""
    return Context(known=Known(torch.where(mask, x, 10**9), mask), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("name", LAWS)
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
        torch.testing.assert_close(law.log_prob_by_steps(x, given(x, mask)), log_prob)
        assert law.round_trip(x, given(x, mask))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
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
    for name in LAWS:
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
