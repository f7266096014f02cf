"""Several groups a call: the draws of the plain loop whatever is drafted; and in fewer calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import counting_causal, counting_grouped, randomize
from folders import make_model
from torch import Tensor

from dflow.config import InputError
from dflow.core import Context, Known
from dflow.distributions import LawDrafter, SequenceCategorical
from dflow.distributions.documents import Documents
from dflow.distributions.drafted import OpenDraws, Run
from dflow.distributions.drafted_groups import DraftedGroups
from dflow.distributions.drafting import Pace
from dflow.models.counts import counts_drafter
from dflow.ops.noise import Controls, Noise

K, DIM = 4, 30


def law(calls: int, block: int, seed: int = 0, dim: int = DIM) -> SequenceCategorical:
    """A law in float64 whose symbols depend on those before."""
    net = counting_grouped(K, dim, calls, block)
    randomize(net, seed)
    for parameter in net.parameters():
        parameter.data.mul_(0.5)
    return net.eval()


def ngrams() -> SequenceCategorical:
    net = counting_causal(K, DIM, "ngram")
    randomize(net, 1)
    return net.eval()


#: By number of calls and rows of a call; the last groups of some are not full.
LAWS = {(calls, block): law(calls, block) for calls, block in ((10, 1), (15, 2), (8, 4), (6, 1), (4, 3))}


class Guessing:
    """Proposes symbols by a rule, which gets the number of the sequence, the first place and how many."""

    def __init__(self, rule: Callable[[int, int, int], list[int]]) -> None:
        self.runs: Callable[[OpenDraws], Run] = lambda draws: (
            lambda row, before, begin, w: rule(row, begin, w)
        )


def knowing(draws: Tensor, error: int) -> Guessing:
    """Knows the draws, and proposes them or, by an error, others."""
    lines = ((draws + error) % K).tolist()
    return Guessing(lambda row, begin, w: lines[row][begin : begin + w])


def drafters() -> list[Any]:
    return [LawDrafter(ngrams()), counts_drafter(ngrams()), Guessing(lambda row, begin, w: [begin % K] * w)]


def check_draws(calls: int, block: int, batch: int, turns: int, laws: Any = LAWS) -> None:
    """Compare draws with those of the plain loop, each batch by one drafter and one number of groups."""
    plain_law, choices, widths = laws[calls, block], drafters(), [None, 1, 2, 3, 8, 17, 32]
    for turn in range(turns):
        context = Context(noise=Noise(7, torch.arange(turn * batch, (turn + 1) * batch)))
        plain, width = plain_law.sample(batch, context), widths[turn % len(widths)]
        for drafter in (choices[turn % len(choices)], knowing(plain, 1)):
            drafted = DraftedGroups(plain_law, drafter, width)
            assert torch.equal(drafted.sample(batch, context), plain), (turn, width)
        assert set(drafted.tally.calls.values()) == {plain_law.num_calls}
        assert drafted.tally.accepted == 0


@pytest.mark.parametrize(("calls", "block"), LAWS)
@pytest.mark.parametrize(("batch", "turns"), [(1, 4), (3, 3), pytest.param(16, 7, marks=pytest.mark.slow)])
def test_draws_are_those_of_the_plain_loop(calls: int, block: int, batch: int, turns: int) -> None:
    check_draws(calls, block, batch, turns)


@pytest.mark.slow
@pytest.mark.parametrize(("calls", "block"), [(64, 4), (32, 2), (32, 1)])
def test_200_draws_of_256_symbols_are_those_of_the_plain_loop(calls: int, block: int) -> None:
    laws = {(calls, block): law(calls, block, 3, 256)}
    for batch, turns in ((1, 21), (3, 21), (16, 8)):
        check_draws(calls, block, batch, turns, laws)


@pytest.mark.parametrize(("calls", "block", "width"), [(8, 4, None), (6, 1, 3)])
def test_what_is_known_and_where_draws_end_are_as_ever(calls: int, block: int, width: int | None) -> None:
    n, plain_law = 3, LAWS[calls, block]
    noise = Noise(1, torch.arange(n) + 3)
    symbols = torch.randint(0, K, (n, DIM + 9), generator=torch.Generator().manual_seed(0))
    alike, before = symbols[:1].expand(n, -1), torch.arange(DIM + 9) < 13
    hot = replace(noise, controls=Controls(temperature=0.7, top_k=3, top_p=0.95))
    cases: list[tuple[Context, dict[str, Any]]] = [
        (Context(noise=noise, known=Known(symbols, before)), {}),
        (Context(noise=noise, known=Known(symbols, ~before)), {}),
        (Context(noise=noise, known=Known(alike, torch.arange(DIM + 9) % 5 != 1)), {"length": 30}),
        (Context(noise=noise), {"length": 11}),
        (Context(noise=noise), {"length": 0}),
        (Context(noise=noise), {"prompt": symbols[0, :6]}),
        (Context(noise=noise, lengths=torch.tensor([3, DIM, 20])), {}),
        (Context(noise=noise, lengths=torch.tensor([3, 1, 0])), {}),
        (Context(noise=hot), {}),
    ]
    for drafter in drafters():
        drafted = DraftedGroups(plain_law, drafter, width)
        for context, options in cases:
            plain = plain_law.sample(n, context, **options)
            assert torch.equal(drafted.sample(n, context, **options), plain)


def test_texts_of_several_chunks_are_those_of_the_plain_loop() -> None:
    known = Known(torch.randint(0, K, (1, 5)).expand(2, -1), torch.ones(5, dtype=torch.bool))
    context = Context(noise=Noise(3, torch.arange(2)), known=known)
    plain_law = LAWS[8, 4]
    plain = Documents(plain_law, 16, 14).sample(2, context, length=70)
    drafted = DraftedGroups(plain_law, LawDrafter(ngrams()))
    assert torch.equal(Documents(drafted, 16, 14).sample(2, context, length=70), plain)
    assert sorted(drafted.tally.calls) == [0, 1]


@pytest.mark.parametrize(("calls", "block"), LAWS)
def test_calls_are_saved_by_right_drafts_alone(calls: int, block: int) -> None:
    plain_law, context = LAWS[calls, block], Context(noise=Noise(0, torch.arange(1)))
    plain = plain_law.sample(1, context)
    for width in (1, 2, 5):
        good = DraftedGroups(plain_law, knowing(plain, 0), width)
        good.sample(1, context)
        assert good.tally.calls == {0: -(-calls // (width + 1))}
        assert good.tally.accepted == good.tally.drafted == DIM
    bad = DraftedGroups(plain_law, knowing(plain, 1))
    bad.sample(1, context)
    assert bad.tally.calls == {0: calls}
    none = DraftedGroups(plain_law, knowing(plain, 0), 0)
    assert none.sample(1, context).equal(plain)
    assert none.tally.drafted == 0


def test_drafts_that_are_wrong_are_given_up() -> None:
    pace = Pace(None, 0.05)
    assert pace() > 2
    for _ in range(12):
        pace.learn(0, 1)
    assert pace() == 0


def test_batches_for_which_it_does_not_pay_are_drawn_by_the_plain_loop() -> None:
    plain_law, context = LAWS[8, 4], Context(noise=Noise(0, torch.arange(5)))
    drafted = DraftedGroups(plain_law, LawDrafter(ngrams()))
    assert torch.equal(drafted.sample(5, context), plain_law.sample(5, context))
    assert (drafted.tally.drafted, set(drafted.tally.calls.values())) == (0, {8})
    for width in (None, 3):
        assert DraftedGroups(plain_law, LawDrafter(ngrams()), width).sample(0).shape == (0, DIM)


def test_what_cannot_be_drafted_is_refused() -> None:
    draft = LawDrafter(ngrams())
    with pytest.raises(InputError, match="not drawn in groups by one network"):
        DraftedGroups(counting_causal(K, DIM, "transformer"), draft)
    with pytest.raises(InputError, match="width 33"):
        DraftedGroups(LAWS[8, 4], draft, 33)
    with pytest.raises(InputError, match="by counts or by a model of family ngram"):
        DraftedGroups(LAWS[8, 4], LawDrafter(counting_causal(K, DIM, "lstm")))
    with pytest.raises(InputError, match=f"symbol {K}, outside of 0 to {K - 1}"):
        DraftedGroups(LAWS[8, 4], Guessing(lambda row, begin, w: [K] * w), 1).sample(1)
    with pytest.raises(InputError, match="a draft is symbols int64"):
        DraftedGroups(LAWS[8, 4], Guessing(lambda row, begin, w: [0] * (w + 1)), 1).sample(1)


def test_a_model_of_text_takes_drafts() -> None:
    model, other = make_model("grouped", K), make_model("ngram", K)
    noise = Noise(5, torch.arange(2))
    drafted = model.drafted(other)
    assert torch.equal(drafted.generate(2, noise=noise), model.generate(2, noise=noise))
    assert drafted.tally is not None
    assert sorted(drafted.tally.calls) == [0, 1]
