"""Drafted draws: those of the plain loop whatever drafts, symbol by symbol; and in fewer calls."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import counting_causal, enumerate_all, grouped, randomize
from folders import corpus_of, make_model, write_model, write_text
from torch import Tensor

from dflow import cli, hf
from dflow.compare import Contestant, compare, markdown
from dflow.config import InputError
from dflow.core import Context, Known
from dflow.data import Characters
from dflow.data.counting import count
from dflow.distributions import Drafted, LawDrafter, SequenceCategorical
from dflow.distributions.documents import Documents
from dflow.distributions.drafted import OpenDraws
from dflow.generate import faster, generate, pieces
from dflow.models.counts import counts_drafter
from dflow.nn.backoff import BackoffNet
from dflow.ops.noise import Controls, Noise

K, DIM = 4, 30
FAMILIES = ("transformer", "lstm", "ngram")


def law(name: str, seed: int = 0, dim: int = DIM) -> SequenceCategorical:
    """A law in float64 whose symbols depend on those before."""
    net = counting_causal(K, dim, name)
    randomize(net, seed)
    for parameter in net.parameters():
        parameter.data.mul_(0.5)
    return net.eval()


LAWS = {name: law(name) for name in FAMILIES}


class Guessing:
    """Proposes symbols by a rule that knows nothing of the law."""

    def __init__(self, rule: Callable[[OpenDraws, int], Tensor]) -> None:
        self.rule = rule

    def start(self, draws: OpenDraws) -> Callable[[int], Tensor]:
        return lambda w: self.rule(draws, w)


def random_symbols(draws: OpenDraws, w: int) -> Tensor:
    return torch.randint(0, K, (len(draws.begins), w), generator=torch.Generator().manual_seed(w))


class AlwaysWrong:
    """Knows the draws, and proposes other symbols."""

    def __init__(self, draws: Tensor) -> None:
        self.drawn = torch.nn.functional.pad(draws, (0, 64))

    def start(self, draws: OpenDraws) -> Callable[[int], Tensor]:
        def wrong(w: int) -> Tensor:
            rows = [self.drawn[i, begin : begin + w] for i, begin in enumerate(draws.begins)]
            return (torch.stack(rows) + 1) % K

        return wrong


DRAFTERS: dict[str, Any] = {
    "ngram": lambda: LawDrafter(law("ngram", 1)),
    "lstm": lambda: LawDrafter(law("lstm", 1)),
    "transformer": lambda: LawDrafter(law("transformer", 1)),
    "random": lambda: Guessing(random_symbols),
    "counts": lambda: counts_drafter(LAWS["ngram"]),
}


def check_draws(name: str, batch: int, turns: int, drafters: list[Any]) -> None:
    """Compare draws with those of the plain loop, each batch by one drafter and one length of drafts."""
    widths = [None, 1, 2, 3, 8, 17, 32]
    for turn in range(turns):
        context = Context(noise=Noise(7, torch.arange(turn * batch, (turn + 1) * batch)))
        plain, width = LAWS[name].sample(batch, context), widths[turn % len(widths)]
        for drafter in (drafters[turn % len(drafters)], AlwaysWrong(plain)):
            drafted = Drafted(LAWS[name], drafter, width)
            assert torch.equal(drafted.sample(batch, context), plain), (turn, width)
        assert set(drafted.tally.calls.values()) == {DIM}
        assert drafted.tally.accepted == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("batch", "turns"), [(1, 7), (3, 5), (16, 5)])
def test_draws_are_those_of_the_plain_loop(name: str, batch: int, turns: int) -> None:
    check_draws(name, batch, turns, [make() for make in DRAFTERS.values()])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(("batch", "turns"), [(1, 14), (3, 21), (16, 14)])
def test_200_draws_are_those_of_the_plain_loop(name: str, drafter: str, batch: int, turns: int) -> None:
    check_draws(name, batch, turns, [DRAFTERS[drafter]()])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_200_draws_of_256_symbols_are_those_of_the_plain_loop(name: str) -> None:
    """By drafts of every kind, of 1 to 32 symbols."""
    long, number = law(name, 3, 256), 0
    drafters = [make() for make in DRAFTERS.values()]
    for batch, turns in ((1, 8), (3, 8), (16, 11)):
        for turn in range(turns):
            context = Context(noise=Noise(5, torch.arange(number, number + batch)))
            drafted = Drafted(long, drafters[turn % len(drafters)], 1 + 7 * turn % 32)
            assert torch.equal(drafted.sample(batch, context), long.sample(batch, context)), turn
            number += batch
    assert number >= 200


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("drafter", ["ngram", "lstm", "random"])
def test_what_is_known_and_where_draws_end_are_as_ever(name: str, drafter: str) -> None:
    n = 5
    noise = Noise(1, torch.arange(n) + 3)
    symbols = torch.randint(0, K, (n, DIM + 9), generator=torch.Generator().manual_seed(0))
    alike, before = symbols[:1].expand(n, -1), torch.arange(DIM + 9) < 13
    hot = replace(noise, controls=Controls(temperature=0.7, top_k=3, top_p=0.95))
    cases: list[tuple[Context, dict[str, Any]]] = [
        (Context(noise=noise, known=Known(symbols, before)), {}),
        (Context(noise=noise, known=Known(alike, before)), {"length": 30}),
        (Context(noise=noise), {"length": 11}),
        (Context(noise=noise), {"prompt": symbols[0, :6]}),
        (Context(noise=noise, lengths=torch.tensor([3, DIM, 1, 20, 8])), {}),
        (Context(noise=hot), {}),
    ]
    drafted = Drafted(LAWS[name], DRAFTERS[drafter](), None if drafter == "ngram" else 5)
    for context, options in cases:
        plain = LAWS[name].sample(n, context, **options)
        assert torch.equal(drafted.sample(n, context, **options), plain)
    holes = Context(noise=noise, known=Known(symbols, ~before))
    with pytest.raises(InputError, match="drawn from left to right"):
        drafted.sample(n, holes)


def test_a_log_of_calls_replays_the_draws() -> None:
    context, drafted = (
        Context(noise=Noise(2, torch.arange(3) + 7)),
        Drafted(LAWS["transformer"], LawDrafter(law("ngram", 1))),
    )
    drafted.tally.log = []
    x, log = drafted.sample(3, context), drafted.tally.log
    for row, number in enumerate((7, 8, 9)):
        calls = [call for call in log if call.sample == number]
        assert len(calls) == drafted.tally.calls[number] < DIM
        assert [symbol for call in calls for symbol in call.drawn] == x[row].tolist()
        for call in calls:
            line = x[row, call.begin :].tolist()
            assert call.drafted[: call.accepted] == line[: call.accepted]
            rejected, own = call.drafted[call.accepted :], line[call.accepted : call.accepted + 1]
            assert not rejected or rejected[0] != own[0]
            assert call.drawn == line[: len(call.drawn)]
    assert sum(call.accepted for call in log) == drafted.tally.accepted > 0
    assert sum(len(call.drafted) for call in log) == drafted.tally.drafted
    drafted.tally.clear()
    assert drafted.tally.log == []


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_of_several_chunks_are_those_of_the_plain_loop(name: str) -> None:
    prompt = torch.randint(0, K, (1, 5)).expand(2, -1)
    known = Known(prompt, torch.ones(5, dtype=torch.bool))
    context = Context(noise=Noise(3, torch.arange(2)), known=known)
    plain = Documents(LAWS[name], 16, 20).sample(2, context, length=70)
    drafted = Drafted(LAWS[name], DRAFTERS["ngram"]())
    assert torch.equal(Documents(drafted, 16, 20).sample(2, context, length=70), plain)
    assert sorted(drafted.tally.calls) == [0, 1]


def test_a_good_drafter_saves_calls_and_one_that_is_wrong_is_hardly_used() -> None:
    model, context = LAWS["transformer"], Context(noise=Noise(0, torch.arange(1)))
    good, bad = Drafted(model, LawDrafter(model)), Drafted(model, AlwaysWrong(model.sample(1, context)))
    for drafted in (good, bad):
        drafted.sample(1, context)
    assert good.tally.accepted == good.tally.drafted
    assert sum(good.tally.calls.values()) < DIM / 4
    assert sum(good.tally.calls.values()) + good.tally.accepted == DIM
    assert bad.tally.drafted < DIM
    # Where a symbol more takes as long as a call, drafts do not pay off.
    recurrent = Drafted(LAWS["lstm"], LawDrafter(LAWS["lstm"]))
    generator = torch.Generator().manual_seed(3)
    plain = LAWS["lstm"].sample(2, generator=generator)
    assert torch.equal(recurrent.sample(2, generator=generator.manual_seed(3)), plain)
    assert (recurrent.tally.drafted, recurrent.tally.calls) == (0, {0: DIM, 1: DIM})
    fixed = Drafted(model, LawDrafter(model), 5)
    fixed.sample(1, context)
    assert set(fixed.tally.calls.values()) == {DIM // 6}
    assert Drafted(model, LawDrafter(model), 0).sample(1, context).equal(model.sample(1, context))


def test_the_law_is_kept() -> None:
    """By enumeration, a chi-square test at seven deviations."""
    dim, n = 4, 4000
    small = law("transformer", 2, dim)
    drafted = Drafted(small, LawDrafter(law("lstm", 1, dim)), 2)
    x = drafted.sample(n, generator=torch.Generator().manual_seed(0))
    every = enumerate_all(K, dim)
    with torch.no_grad():
        expected = n * small.log_prob(every).exp()
    codes = (x * K ** torch.arange(dim - 1, -1, -1)).sum(1)
    counts = torch.bincount(codes, minlength=len(every)).double()
    order = (every * K ** torch.arange(dim - 1, -1, -1)).sum(1)
    common = expected > 5
    chi = ((counts[order] - expected) ** 2 / expected)[common].sum()
    freedom = int(common.sum())
    assert abs(float(chi) - freedom) < 7 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda draws, w: torch.full((1, w), K), f"symbol {K}, outside of 0 to {K - 1}"),
        (lambda draws, w: torch.full((1, w), -1), "symbol -1, outside of"),
        (lambda draws, w: torch.zeros(1, w + 1, dtype=torch.int64), "a draft is symbols int64"),
        (lambda draws, w: torch.zeros(1, w), "a draft is symbols int64"),
    ],
)
def test_what_is_no_draft_is_refused(rule: Callable[[OpenDraws, int], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Drafted(LAWS["transformer"], Guessing(rule)).sample(1)


def test_laws_that_are_drawn_in_another_way_are_refused() -> None:
    with pytest.raises(InputError, match="this model is not drawn from left to right"):
        Drafted(grouped(K, DIM, 4), LawDrafter(LAWS["ngram"]))
    with pytest.raises(InputError, match="the model that drafts is not drawn from left to right"):
        LawDrafter(grouped(K, DIM, 4))
    with pytest.raises(InputError, match="width 33"):
        Drafted(LAWS["lstm"], LawDrafter(LAWS["ngram"]), 33)
    with pytest.raises(InputError, match="has 5 symbols, and this one 4"):
        make_model("transformer", 4).drafted(make_model("ngram", 5))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("read", [0, 7])
def test_a_network_reads_several_entries_and_goes_back(name: str, read: int) -> None:
    """`ahead` gives what the full pass gives, from any begins, after wrong symbols too."""
    net, x = LAWS[name].net, torch.randint(0, K, (3, DIM))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        state, begins = net.start(3), [read] * 3
        if read:
            net.read(x[:, :read], state)
        for w, back in (
            (4, [1] * 3),
            (6, [2, 0, 5]),
            (1, [0] * 3),
            (5, [1, 2, 3]),
            (8, [3, 3, 8]),
            (1, [1] * 3),
        ):
            guess = torch.cat([x, x], 1)
            places = [torch.arange(begin - 1, begin - 1 + w) for begin in begins]
            before = torch.stack([guess[i, p.clamp(min=0)] for i, p in enumerate(places)])
            # Wrong symbols at the end.
            wrong = torch.arange(w) > w // 2
            before[:, wrong] = torch.randint(0, K, (3, int(wrong.sum())), generator=generator)
            if begins[0] == 0:
                before[:, 0] = K
            out = net.ahead(before, begins, state)
            for i, begin in enumerate(begins):
                line = x[i].clone()
                line[begin : begin + w - 1] = before[i, 1:]
                torch.testing.assert_close(out[i], net(line[None])[0, begin : begin + w], rtol=0, atol=1e-9)
            begins = [
                max(read, begin + min(w // 2 + 1, w - b)) for begin, b in zip(begins, back, strict=True)
            ]


def test_single_entries_of_counts_are_those_of_the_full_pass() -> None:
    net, x = LAWS["ngram"].net, torch.randint(0, K, (1, 30))
    with torch.no_grad():
        full = net(x)[0].log_softmax(-1)
        for i in range(30):
            single = net.single(x[0, :i].tolist()).log_softmax(-1)
            torch.testing.assert_close(single, full[i], rtol=0, atol=1e-9)


def test_a_law_of_counts_is_what_its_formula_says() -> None:
    """By counting in the text, and normalised; entry by entry as in the full pass."""
    text = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))
    source = counting_causal(3, DIM, "ngram").net.counted
    source.use(count(text, 3, source.patterns))
    net, x = BackoffNet(source), text[7:25][None]
    full = net(x)[0]
    torch.testing.assert_close(full.exp().sum(-1), torch.ones(18).double())
    for i in range(18):
        p = [Fraction(1, 3)] * 3
        line = x[0, :i].tolist()
        for n in range(min(i, net.counts) + 1):
            places = [j for j in range(n, 60) if text[j - n : j].tolist() == line[i - n :]]
            follow = [text[j] for j in places]
            new = 8 * len({int(symbol) for symbol in follow})
            if places:
                p = [(follow.count(s) + new * p[s]) / (len(follow) + new) for s in range(3)]
        expected = torch.tensor([float(share) for share in p]).double()
        torch.testing.assert_close(full[i].exp(), expected)
        torch.testing.assert_close(net.single(line).exp(), expected)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_law_of_counts_drafts_symbol_by_symbol(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr("dflow.nn.backoff.loops", lambda: None)
    text = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0))
    source = counting_causal(3, DIM, "ngram").net.counted
    source.use(count(text, 3, source.patterns))
    net = BackoffNet(source)
    gumbel = (
        -torch.rand(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log().neg().log()
    )
    for before in ([], [2], [0, 1, 2, 0, 1]):
        line = list(before)
        for noise in gumbel:
            line.append(int((net.single(line) + noise).argmax()))
        assert net.draft(before, gumbel) == line[len(before) :]


# -- models, commands, comparisons ---------------------------------------------------------------------------


def ngram_model(vocab_size: int, context: int = 0) -> hf.DflowModel:
    model = make_model("ngram", vocab_size, 24, context=context)
    for module in model.modules():
        if hasattr(module, "patterns"):
            module.use(count(torch.randint(0, vocab_size, (90,)), vocab_size, module.patterns))
    return model


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_a_drafted_model_draws_what_the_model_draws(name: str) -> None:
    model, tokenizer = make_model(name, 5, 24, context=6).double(), Characters("abcde")
    drafted = model.drafted(ngram_model(5))
    prompt = torch.tensor([0, 1, 2])
    plain = list(generate(model, 5, length=60, prompt=prompt, seed=2, batch_size=2))
    again = list(generate(drafted, 5, length=60, prompt=prompt, seed=2, batch_size=2))
    assert all(map(torch.equal, plain, again))
    assert drafted.tally is not None
    assert sorted(drafted.tally.calls) == [0, 1, 2, 3, 4]
    assert model.tally is None
    texts = [
        "".join(pieces(m, tokenizer, 1, length=60, seed=2, prompt=prompt, stop="ab"))
        for m in (model, drafted)
    ]
    assert texts[0] == texts[1]
    x = torch.stack(plain)
    with torch.no_grad():
        assert torch.equal(drafted.log_prob(x), model.log_prob(x))
    assert [*drafted.state_dict()] == [*model.state_dict()]


def test_lines_end_where_they_do_in_the_plain_loop() -> None:
    model = make_model("transformer", 5, 24, explicit_length=True).double()
    model.set_length_counts(torch.arange(25).float())
    noise = Noise(4, torch.arange(8))
    plain = model.generate(8, noise=noise)
    assert torch.equal(model.drafted(ngram_model(5)).generate(8, noise=noise), plain)


def test_models_of_the_same_counts_share_them() -> None:
    first, second = ngram_model(5), ngram_model(5)
    law = first.distribution
    assert isinstance(law, SequenceCategorical)
    table = law.net.counted.table
    for module in second.modules():
        if hasattr(module, "patterns"):
            module.use(replace(table))
            assert module.table is not table
            first.drafted(second)
            assert module.table is table


class Slow:
    """Takes its time, and is right."""

    def __init__(self, model: hf.DflowModel) -> None:
        self.drafter = LawDrafter(model.law)

    def start(self, draws: OpenDraws) -> Callable[[int], Tensor]:
        draft = self.drafter.start(draws)

        def slow(w: int) -> Tensor:
            time.sleep(0.05)
            return draft(w)

        return slow


def test_a_drafter_is_taken_where_it_is_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("transformer", 5, 24)
    assert faster(model, 1, drafter=Slow(model)) is model
    assert faster(model, 1) is model
    assert faster(make_model("grouped", 5, 24), 1, drafter=Slow(model)).tally is None
    step = model.distribution.net.step

    def slow(*arguments: Any) -> Tensor:
        time.sleep(0.01)
        out: Tensor = step(*arguments)
        return out

    monkeypatch.setattr(model.distribution.net, "step", slow)
    drafted = faster(model, 1, drafter=LawDrafter(ngram_model(5).law))
    assert drafted.tally is not None
    assert not drafted.tally.calls


def test_commands_take_a_model_that_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path)
    model, other = (str(write_model(tmp_path / name, name, text)) for name in ("transformer", "lstm"))
    words = ["generate", "--model", model, "--samples", "3", "--format", "jsonl"]
    assert cli.main([*words, "--verbose"]) == 0
    plain = capsys.readouterr()
    assert "network calls a sample: at most 8" in plain.err
    assert cli.main([*words, "--verbose", "--draft", other]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    assert re.search(
        r"network calls a sample: mean [\d.]+, 10% \d, median \d, 90% \d, most \d; ", drafted.err
    )
    for draft in ("none", "auto"):
        assert cli.main([*words, "--draft", draft]) == 0
        assert capsys.readouterr().out == plain.out
    assert cli.main([*words, "--draft", "counts"]) == 2
    assert "--draft counts: this model has no counts" in capsys.readouterr().err
    grouped_model = str(write_model(tmp_path / "grouped", "grouped", text))
    assert cli.main([*words, "--draft", grouped_model]) == 2
    assert f"--draft {grouped_model}: the model that drafts is not drawn" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    letters = write_text(tmp_path / "b", "abcdefgh" * 300)
    stranger = str(write_model(tmp_path / "c", "lstm", letters))
    assert cli.main([*words, "--draft", stranger]) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_a_comparison_has_rows_with_and_without_drafts(tmp_path: Path) -> None:
    text = corpus_of(write_text(tmp_path)).test
    vocab_size = int(text.ids.max()) + 1
    model = make_model("transformer", vocab_size)
    rows = [Contestant("plain", model, text), Contestant("drafted", model.drafted(model, width=3), text)]
    comparison = compare(rows, batch_size=2, rounds=2)
    plain, drafted = comparison.rows
    assert (plain.num_calls, plain.accepted) == (8, None)
    assert (drafted.num_calls, drafted.accepted) == (2, 3)
    assert drafted.evaluation == plain.evaluation
    assert "| accepted a call |" in markdown(comparison)
    assert "accepted" not in markdown(replace(comparison, rows=(plain,)))
