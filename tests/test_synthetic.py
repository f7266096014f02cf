"""Synthetic laws against brute force, and the road from a recipe to the distance from the optimum."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import make_model, write_model, write_text

from dflow import cli, hf
from dflow.config import InputError
from dflow.data import DataConfig, Draws, Law, Numbers, Tokenizer, check, list_sets, load, potts
from dflow.data.laws import sequences
from dflow.data.synthetic import LAWS, Addition, EightGaussians, FullRank, Potts, SetShuffling, SetSummation
from dflow.evaluate import evaluate, evaluate_law
from dflow.generate import Spelling, generate
from dflow.train import load_recipe, train

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes" / "synthetic").glob("*.yaml"))
SMALL: list[Law] = [
    EightGaussians(),
    FullRank(3, 3, 1),
    FullRank(1, 5),
    Addition(1),
    Potts(3, 2, 0.7),
    Potts(3, 2, -0.4),
    Potts(2, 3, 0.8, periodic=False),
    Potts(3, 2, 0.5, periodic=False),
    Potts(1, 4, 0.5, periodic=False),
    SetShuffling(4),
    SetSummation(4, 9, 5),
    SetSummation(3, 3, 2),
]
each = pytest.mark.parametrize("law", SMALL, ids=repr)


@each
def test_probabilities_entropy_and_marginals_agree(law: Law) -> None:
    x = torch.cartesian_prod(*[torch.arange(law.K)] * law.dim).view(-1, law.dim)
    assert torch.equal(sequences(law.K, law.dim), x)
    log_p = law.log_prob(x)
    assert log_p is not None
    p = log_p.exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert law.entropy == pytest.approx(-float((p[p > 0] * p[p > 0].log()).sum()), abs=1e-10)
    marginals = [torch.zeros(law.K, dtype=p.dtype).index_add(0, column, p) for column in x.T]
    sums = sum(-float((m[m > 0] * m[m > 0].log()).sum()) for m in marginals)
    assert law.factorized == pytest.approx(sums, abs=1e-10)
    assert law.support is not None
    outcomes, weights = law.support
    assert torch.equal(outcomes, x[p > 0])
    assert torch.equal(weights, p[p > 0])


@each
def test_draws_have_the_probabilities(law: Law) -> None:
    n = 40_000
    x = law.sample(n, torch.Generator().manual_seed(5))
    assert x.dtype == torch.int64
    assert x.shape == (n, law.dim)
    assert torch.equal(x[:0], law.sample(0))
    assert torch.equal(x, law.sample(n, torch.Generator().manual_seed(5)))
    assert not torch.equal(x, law.sample(n, torch.Generator().manual_seed(6))) or law.entropy == 0
    every = torch.cartesian_prod(*[torch.arange(law.K)] * law.dim).view(-1, law.dim)
    log_p = law.log_prob(every)
    assert log_p is not None
    p = log_p.exp()
    code = (x * law.K ** torch.arange(law.dim - 1, -1, -1)).sum(1)
    counts = torch.bincount(code, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    # Outcomes that 5 draws or fewer would hit are taken together, as in a test of Pearson.
    often = n * p > 5
    expected, found = n * p[often], counts[often]
    assert float(((found - expected) ** 2 / (expected * (1 - p[often]) + 1e-9)).sqrt().max()) < 5
    rest = float(n * p[~often].sum())
    assert abs(float(counts[~often].sum()) - rest) < 5 * math.sqrt(rest + 1)


def test_eight_gaussians_are_those_of_the_example() -> None:
    law = EightGaussians()
    assert law.entropy == pytest.approx(6.3200, abs=5e-5)
    assert law.factorized == pytest.approx(7.3522, abs=5e-5)
    generator = torch.Generator().manual_seed(0)
    angle = torch.randint(8, (100_000,), generator=generator) * math.pi / 4
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    points = centre + 0.1 * torch.randn(100_000, 2, generator=generator)
    x = (points.clamp(-2.25, 2.25) * 20).round().long() + 45
    counts = torch.bincount(x[:, 0] * 91 + x[:, 1], minlength=91 * 91).double()
    p = law.probabilities.flatten()
    assert float(((counts - 1e5 * p) / (1e5 * p).sqrt().clamp(min=1)).abs().max()) < 5.5


def test_addition_adds() -> None:
    x = Addition(12).sample(50, torch.Generator().manual_seed(0))
    for row in x.tolist():
        a, b, c = (int("".join(map(str, row[i : i + 12]))) for i in (0, 12, 24))
        assert (a + b) % 10**12 == c
    law = Addition(12)
    assert (law.dim, law.K) == (36, 10)
    assert law.log_prob(x).tolist() == [-law.entropy] * 50
    x[:, 20] = (x[:, 20] + 1) % 10
    assert law.log_prob(x).tolist() == [-math.inf] * 50


@pytest.mark.parametrize(("side", "states", "periodic"), [(3, 2, True), (3, 2, False), (4, 2, True)])
def test_potts_weights_are_those_of_equal_neighbours(side: int, states: int, periodic: bool) -> None:
    law = Potts(side, states, 0.6, periodic)
    pairs = []
    for r, c in itertools.product(range(side), repeat=2):
        for r2, c2 in ((r + 1, c), (r, c + 1)):
            if periodic or (r2 < side and c2 < side):
                pairs.append((side * r + c, side * (r2 % side) + c2 % side))
    x = sequences(states, side**2)
    energy = sum((x[:, a] == x[:, b]).double() for a, b in pairs)
    assert isinstance(energy, torch.Tensor)
    assert law.log_normalizer == pytest.approx(float((0.6 * energy).logsumexp(0)), abs=1e-10)
    log_p = 0.6 * energy - law.log_normalizer
    torch.testing.assert_close(law.log_prob(x), log_p)
    assert law.entropy == pytest.approx(-float((log_p.exp() * log_p).sum()), abs=1e-9)


def test_potts_at_the_extremes() -> None:
    assert Potts(4, 3, 0.0).entropy == pytest.approx(16 * math.log(3))
    frozen = Potts(4, 5, 400.0)
    assert frozen.entropy == pytest.approx(math.log(5))
    assert (frozen.sample(20) == frozen.sample(20)[:, :1]).any()
    assert (frozen.sample(20).diff(dim=1) == 0).all()
    # Onsager's lattice: the two states of an Ising model.
    assert Potts(10, 2, 0.2).exact
    assert not Potts(11, 2, 0.2).exact


@pytest.mark.parametrize("periodic", [True, False])
def test_gibbs_sampling_takes_over_where_rows_have_too_many_states(
    periodic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Potts(5, 3, 0.6, periodic)
    expected = exact.sample(1500, torch.Generator().manual_seed(0))
    monkeypatch.setattr(potts, "_EXACT_ROWS", 8)
    law = Potts(5, 3, 0.6, periodic, sweeps=40)
    assert (law.entropy, law.log_prob(expected), law.support) == (None, None, None)
    assert law.factorized == exact.factorized
    x = law.sample(1500, torch.Generator().manual_seed(1))
    assert torch.equal(x, law.sample(1500, torch.Generator().manual_seed(1)))
    assert (int(x.min()), int(x.max())) == (0, 2)

    def equal(x: torch.Tensor) -> torch.Tensor:
        lattice = x.view(-1, 5, 5)
        return sum(  # type: ignore[return-value]
            (lattice == lattice.roll(-1, a)).double().flatten(1).sum(1) for a in (1, 2)
        )

    difference = equal(x).mean() - equal(expected).mean()
    error = math.sqrt((equal(x).var() + equal(expected).var()) / 1500)
    assert abs(float(difference)) < 4 * error
    neighbours, colours = law._neighbours
    for colour in colours:
        assert not set(colour.tolist()) & set(neighbours[colour].flatten().tolist())
    assert sorted(torch.cat(colours).tolist()) == list(range(25))


def test_sets_have_the_published_optima() -> None:
    bits = 16 * math.log(2)
    assert SetShuffling().entropy / bits == pytest.approx(2.7656, abs=5e-5)
    assert SetSummation().entropy / bits == pytest.approx(2.2427, abs=5e-5)
    assert SetSummation(largest=8).entropy / bits == pytest.approx(2.2162, abs=5e-5)
    counted = sum(1 for x in itertools.product(range(1, 6), repeat=4) if sum(x) == 9)
    assert SetSummation(4, 9, 5).entropy == pytest.approx(math.log(counted))
    assert (SetSummation().sample(100).sum(1) + 16 == 42).all()


def test_full_rank_laws_are_draws_of_a_dirichlet_law() -> None:
    mean = sum(FullRank(2, 3, seed).entropy for seed in range(300)) / 300
    digamma = torch.special.digamma
    expected = float(digamma(torch.tensor(10.0)) - digamma(torch.tensor(2.0)))
    assert mean == pytest.approx(expected, abs=0.03)
    assert FullRank(2, 3, 0).entropy != FullRank(2, 3, 1).entropy
    assert FullRank(10, 5).support is None


# -- laws by name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("synthetic/pots", {}, "no law 'pots' among synthetic/; did you mean 'potts'"),
        ("synthetic/zzz", {}, "known: addition, eight_gaussians"),
        ("synthetic/potts", {"sides": 3}, "unknown key 'sides'; did you mean 'side'"),
        ("synthetic/potts", {"side": 2}, "side must lie in 3..256, found 2"),
        ("synthetic/potts", {"coupling": "much"}, "expected float, found 'much'"),
        ("synthetic/potts", {"coupling": ".inf"}, "coupling"),
        ("synthetic/eight_gaussians", {"sigma": 0.1}, "unknown key 'sigma'"),
        ("synthetic/full_rank", {"dim": 20}, "too many"),
        ("synthetic/set_summation", {"total": 3}, "total must lie in 16..256"),
        ("synthetic/addition", {"digits": 0}, "digits must lie in 1..1000, found 0"),
    ],
)
def test_wrong_names_and_parameters_are_told(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(DataConfig(name=name, parameters=parameters))


def test_settings_of_texts_do_not_go_with_laws_nor_parameters_with_texts(tmp_path: Path) -> None:
    for setting in ({"tokenizer": "bytes"}, {"protocol": "sentence"}, {"lowercase": True}, {"valid": 0.2}):
        with pytest.raises(InputError, match="is drawn: leave out"):
            load(DataConfig(name="synthetic/set_shuffling", **setting))  # type: ignore[arg-type]
    assert load(DataConfig(name="synthetic/set_shuffling", protocol="stream")).law == SetShuffling()
    with pytest.raises(InputError, match="synthetic/set_shuffling"):
        DataConfig(name="pydoc", parameters={"size": 3})
    with pytest.raises(InputError, match="has 16 symbols, spelled as numbers"):
        load(DataConfig(name="synthetic/set_shuffling"), Numbers(17))
    with pytest.raises(InputError, match="drawn, not read"):
        check("synthetic/potts")
    rows = {row.name: row.state for row in list_sets()}
    assert all(rows[f"synthetic/{name}"] == "drawn" for name in LAWS)


def test_a_law_is_a_text_whose_crops_are_fresh() -> None:
    corpus = load(DataConfig(name="synthetic/set_shuffling", parameters={"size": 5}))
    text = corpus.train
    first, none = text.crops(7, 5, torch.Generator().manual_seed(1))
    assert none is None
    assert torch.equal(first, SetShuffling(5).sample(7, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, text.crops(7, 5, torch.Generator().manual_seed(2))[0])
    chunks = [t.chunks(5)[0] for t in (corpus.train, corpus.valid, corpus.test)]
    assert all(c.shape == (synthetic_draws(), 5) for c in chunks)
    assert not torch.equal(chunks[1], chunks[2])
    assert torch.equal(chunks[2], load(DataConfig(corpus.name, parameters={"size": 5})).test.chunks(5)[0])
    torch.testing.assert_close(text.marginals(5), torch.full((5,), 0.2, dtype=torch.float64))
    assert "entropy 4.7875 nats, factorized 8.0472 nats" in text.amount
    assert corpus.checksum != load(DataConfig("synthetic/set_shuffling")).checksum
    for call in (lambda: text.crops(2, 4), lambda: text.chunks(6)):
        with pytest.raises(InputError, match="sequences of 5 symbols"):
            call()
    with pytest.raises(ValueError, match="batch=0"):
        text.crops(0, 5)


def synthetic_draws() -> int:
    from dflow.data.corpus import NUM_DRAWS

    return NUM_DRAWS


def test_numbers_are_spelled_and_read(tmp_path: Path) -> None:
    tokenizer = Numbers(300)
    assert tokenizer.encode(" 3 299\n0").tolist() == [3, 299, 0]
    assert tokenizer.decode([3, 299, -1]) == "3 299"
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer
    assert Spelling(tokenizer)(torch.tensor([1, 2]), 3) == "1 2\n"
    for bad in ("300", "-1", "x", "1.5", "²"):
        with pytest.raises(InputError, match=r"no number in 0\.\.299"):
            tokenizer.encode(bad)
    with pytest.raises(InputError, match="two symbols"):
        Numbers(1)


# -- recipes, training, evaluation -----------------------------------------------------------------------


def recipe(folder: Path, data: dict[str, Any], **model: Any) -> Path:
    values = {
        "data": data,
        "model": {"family": "bipartite", "conditioner": "table", "masks": "single", **model},
        "train": {
            "steps": 2,
            "batch_size": 16,
            "trackers": [],
            "samples": 1,
            "eval_chunks": 8,
            "learning_rate": 0.1,
        },
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    data = {"name": "synthetic/full_rank", "parameters": {"dim": 3, "K": 3, "seed": 2}}
    return train(load_recipe(recipe(tmp_path, data, num_flows=3)))


def test_the_length_is_that_of_the_law(tmp_path: Path) -> None:
    path = recipe(tmp_path, {"name": "synthetic/potts", "parameters": {"side": 4}})
    assert load_recipe(path).model.length == 16
    with pytest.raises(InputError, match=r"model.length is 256 and sequences of synthetic/potts have 16"):
        load_recipe(path, ["model.length=256"])
    with pytest.raises(InputError, match=r"recipe\.yaml: data\.parameters: unknown key 'sid'"):
        load_recipe(path, ["data.parameters.sid=3"])
    assert load_recipe(path, ["data.parameters.side=5"]).model.length == 25


def test_exact_evaluation_is_the_expectation_over_all_outcomes(trained: Path) -> None:
    model, law = hf.load(trained), FullRank(3, 3, 2)
    corpus = load(DataConfig("synthetic/full_rank", parameters={"dim": 3, "K": 3, "seed": 2}))
    assert isinstance(corpus.test, Draws)
    result = evaluate_law(model, corpus.test, batch_size=5)
    x = sequences(3, 3)
    with torch.no_grad():
        nats = -model.log_prob(x).double()
    by_hand = float((law.probabilities.flatten() * nats).sum())
    assert result.nats == pytest.approx(by_hand, rel=1e-6)
    assert result.bits == pytest.approx(by_hand / 3 / math.log(2), rel=1e-6)
    assert result.entropy == law.entropy
    assert result.gap == pytest.approx(by_hand - law.entropy, abs=1e-5)
    assert result.gap is not None
    assert result.gap > 0
    assert (result.kind, result.standard_error, result.num_sequences) == ("exact", 0.0, 27)
    assert (result.round_trip, result.num_checked) == (True, 16)
    assert (result.factorized, result.uniform) == (law.factorized, 3 * math.log(3))
    with pytest.raises(InputError, match="limit 0"):
        evaluate_law(model, corpus.test, limit=0)


def test_estimates_come_with_their_error(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, law = hf.load(trained), FullRank(3, 3, 2)
    corpus = load(DataConfig("synthetic/full_rank", parameters={"dim": 3, "K": 3, "seed": 2}))
    assert isinstance(corpus.test, Draws)
    exact = evaluate_law(model, corpus.test)
    result = evaluate_law(model, corpus.test, limit=500)
    x = corpus.test.chunks(3)[0][:500]
    with torch.no_grad():
        nats = -model.log_prob(x).double()
    difference = nats + law.log_prob(x)
    assert result.kind == "estimate"
    assert result.num_sequences == 500
    assert result.gap == pytest.approx(float(difference.mean()), abs=1e-5)
    assert result.nats == pytest.approx(law.entropy + float(difference.mean()), rel=1e-6)
    assert result.standard_error == pytest.approx(float(difference.std()) / 500**0.5, rel=1e-3)
    assert abs(result.nats - exact.nats) < 4 * result.standard_error
    assert evaluate_law(model, corpus.test, limit=1).standard_error is None
    # Where the law is not known the estimate is the plain mean, and there is no gap.
    monkeypatch.setattr(potts, "_EXACT_ROWS", 1)
    model, unknown = make_model("bipartite", 3, 9), Draws.of(Potts(3, 3, 0.5, sweeps=5), "test")
    plain = evaluate_law(model, unknown)
    assert (plain.gap, plain.entropy, plain.kind) == (None, None, "estimate")
    with torch.no_grad():
        nats = -model.log_prob(unknown.chunks(9)[0]).double()
    assert plain.nats == pytest.approx(float(nats.mean()), rel=1e-6)
    assert plain.standard_error == pytest.approx(float(nats.std()) / len(nats) ** 0.5, rel=1e-3)


class Half:
    """One of two processes; `reduce` adds what the other would send."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank: int, other: list[torch.Tensor]) -> None:
        self.process_index, self.sent, self.other = rank, [], other

    def reduce(self, totals: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.sent.append(totals)
        return totals + (self.other[0] if self.other else 0)


@pytest.mark.parametrize("limit", [None, 101])
def test_two_processes_score_each_sequence_once(trained: Path, limit: int | None) -> None:
    model = hf.load(trained)
    text = load(load_recipe(trained / "recipe.yaml").data).test
    assert isinstance(text, Draws)
    second: Any = Half(1, [])
    evaluate_law(model, text, limit=limit, accelerator=second)
    first: Any = Half(0, second.sent)
    both = evaluate_law(model, text, limit=limit, accelerator=first)
    alone = evaluate_law(model, text, limit=limit)
    assert both.nats == pytest.approx(alone.nats, rel=1e-6)
    assert both.standard_error == pytest.approx(alone.standard_error, rel=1e-5)
    assert (both.num_sequences, both.num_checked) == (alone.num_sequences, 2 * alone.num_checked)


def test_a_training_on_a_law_is_resumed_and_compared(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_recipe(trained / "recipe.yaml", ["train.steps=4"]), resume=True)
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 4
    assert cli.main(["compare", str(trained), "--rounds", "1", "--limit", "20", "--batch-size", "2"]) == 0
    assert "synthetic/full_rank, test" in capsys.readouterr().out


def test_the_commands_speak_of_laws(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--model", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "all 27 outcomes" in out
    found = json.loads(out.splitlines()[-1])
    assert found["kind"] == "exact"
    assert found["gap"] == pytest.approx(found["nats"] - found["entropy"])
    assert cli.main(["evaluate", "--model", str(trained), "--limit", "40", "--batch-size", "7"]) == 0
    out = capsys.readouterr().out
    assert "40 draws that no training has seen" in out
    assert json.loads(out.splitlines()[-1])["kind"] == "estimate"
    assert cli.main(["generate", "--model", str(trained), "--n", "3"]) == 0
    rows = [[int(n) for n in line.split()] for line in capsys.readouterr().out.splitlines()]
    assert rows == [x.tolist() for x in generate(hf.load(trained), 3)]
    assert cli.main(["evaluate", "--model", str(trained), "--data", "synthetic/potts"]) == 2
    assert "the law is over sequences of 9 symbols" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", str(trained), "--data", "synthetic/set_shuffling"]) == 2
    assert "the model has 3, spelled as numbers" in capsys.readouterr().err


def test_other_models_and_other_data_do_not_mix(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path)
    lstm = write_model(tmp_path / "lstm", "lstm", text)
    assert cli.main(["evaluate", "--model", str(lstm), "--data", "synthetic/potts"]) == 2
    assert "spelled as characters" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", str(trained), "--data", str(text)]) == 2
    assert "no number in 0..2" in capsys.readouterr().err


def test_draws_are_scored_as_a_text_too() -> None:
    corpus = load(DataConfig("synthetic/addition", parameters={"digits": 2}))
    model = make_model("lstm", 10, 6)
    result = evaluate(model, corpus.test, limit=50)
    assert isinstance(corpus.test, Draws)
    law, draws = corpus.test.law, corpus.test.chunks(6)[0][:50]
    with torch.no_grad():
        nats = -float(model.log_prob(draws).double().mean())
    assert result.bpc == pytest.approx(nats / 6 / math.log(2), rel=1e-6)
    # As a law the same draws are scored against their own probabilities, whose mean is known.
    log_p = law.log_prob(draws)
    assert log_p is not None
    assert law.entropy is not None
    known = float(log_p.mean()) + law.entropy
    assert evaluate_law(model, corpus.test, limit=50).nats == pytest.approx(nats + known, rel=1e-6)
    assert result.characters_per_symbol == 1


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_every_recipe_trains_on_its_own_law(path: Path, tmp_path: Path) -> None:
    settings = load_recipe(path)
    assert settings.paper is not None
    out = train(
        load_recipe(
            path,
            [
                "train.steps=2",
                "train.batch_size=4",
                "train.eval_chunks=4",
                "train.refit_batches=2",
                "train.trackers=[]",
                f"output={tmp_path / 'out'}",
            ],
        )
    )
    corpus = load(settings.data)
    assert isinstance(corpus.test, Draws)
    result = evaluate_law(hf.load(out), corpus.test, limit=8, checks=2)
    assert result.round_trip
    assert result.nats == pytest.approx(corpus.test.law.dim * math.log(corpus.test.law.K), rel=0.3)


def test_training_comes_near_the_optimum(tmp_path: Path) -> None:
    path = recipe(tmp_path, {"name": "synthetic/set_shuffling", "parameters": {"size": 4}}, num_flows=4)
    out = train(
        load_recipe(
            path, ["train.steps=150", "train.batch_size=256", "train.weight_decay=0", "train.warmup=1"]
        )
    )
    corpus = load(load_recipe(path).data)
    assert isinstance(corpus.test, Draws)
    result = evaluate_law(hf.load(out), corpus.test)
    assert result.kind == "exact"
    assert result.gap == pytest.approx(0, abs=0.02)
