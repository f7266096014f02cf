"""Texts of any length: patterns of training, documents chunk after chunk, models with a context."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from cases import enumerate_all, randomize, uneven
from folders import SETTINGS, write_text
from test_known import build

from dflow import hf, zoo
from dflow.cli import main
from dflow.config import InputError
from dflow.core import Context, Known
from dflow.distributions.documents import Documents
from dflow.generate import generate
from dflow.ops.noise import Noise
from dflow.train.patterns import KINDS, pattern

LAWS = [
    "grouped", "blocks", "shuffled", "any order", "confident", "transformer", "lstm", "strides", "mixture",
    "spectra",
]  # fmt: skip


def document(name: str, K: int, length: int = 3, context: int = 2) -> Documents:
    return Documents(build(name, K), length, context).eval()


def given(x: torch.Tensor, before: int) -> Context:
    return Context(known=Known(x, torch.arange(x.shape[1]) < before))


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_a_document_of_any_length_has_a_law_of_mass_one(name: str) -> None:
    law = document(name, 2)
    for n in (1, 2, 3, 4, 7, 8):
        x = enumerate_all(2, n)
        assert abs(float(law.log_prob(x).exp().sum()) - 1) < 1e-12
    x = enumerate_all(2, 8)
    for before in (1, 2, 5, 7):
        place = (x[:, :before] * 2 ** torch.arange(before)).sum(1)
        total = torch.zeros(2**before, dtype=torch.float64)
        total = total.index_add(0, place, law.log_prob(x, given(x, before)).exp())
        assert (total - 1).abs().max() < 1e-12


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_a_chunk_is_given_the_symbols_before_it_and_no_others(name: str) -> None:
    law, x = document(name, 3), torch.randint(0, 3, (20, 9))
    terms = [
        law.law.log_prob(x[:, window:end], given(x[:, window:end], begin - window))
        for window, begin, end in [(0, 0, 3), (1, 3, 6), (4, 6, 9)]
    ]
    torch.testing.assert_close(law.log_prob(x), torch.stack(terms).sum(0).double())
    # What stands further back changes nothing.
    known = given(x, 6)
    other = x.clone()
    other[:, :4] = (other[:, :4] + 1) % 3
    assert torch.equal(law.log_prob(other, given(other, 6)), law.log_prob(x, known))
    other[:, 4] = (other[:, 4] + 1) % 3
    assert not torch.equal(law.log_prob(other, given(other, 6)), law.log_prob(x, known))


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_draws_of_documents_follow_the_law(name: str) -> None:
    law, n = document(name, 2, 2, 2), 40_000
    x = enumerate_all(2, 5)
    for before in (0, 1, 3):
        known = torch.tensor([[1, 0, 1]])[:, :before]
        context = Context(
            noise=Noise(1, torch.arange(n)),
            known=Known(known.expand(n, -1), torch.ones(before, dtype=torch.bool)) if before else None,
        )
        draws = law.sample(n, context, length=5)
        assert (draws[:, :before] == known).all()
        rows = x[(x[:, :before] == known).all(1)]
        expected = n * law.log_prob(rows, given(rows, before)).exp()
        power = 2 ** torch.arange(5)
        order = (rows * power).sum(1).argsort()
        _, counts = torch.unique(
            torch.cat([(rows * power).sum(1), (draws * power).sum(1)]), return_counts=True
        )
        chi = float(((counts - 1 - expected[order]).square() / expected[order]).sum())
        assert chi < len(rows) - 1 + 5 * (2 * (len(rows) - 1)) ** 0.5


@torch.no_grad()
def test_left_to_right_a_document_is_drawn_alike_whatever_is_known_of_it() -> None:
    for name in ("transformer", "lstm"):
        law = document(name, 5, 3, 8)
        noise = Context(noise=Noise(1, torch.arange(4)))
        whole = law.sample(4, noise, length=8)
        for before in (1, 4, 7):
            known = Known(whole[:, :before], torch.ones(before, dtype=torch.bool))
            again = law.sample(4, Context(noise=Noise(1, torch.arange(4)), known=known), length=8)
            assert torch.equal(again, whole)


def test_what_no_document_is_is_refused() -> None:
    law, x = document("grouped", 3), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="4 symbols are known of 4"):
        law.log_prob(x, given(x, 4))
    with pytest.raises(InputError, match="known symbols stand at the beginning"):
        law.log_prob(x, Context(known=Known(x, torch.tensor([False, True, False, False]))))
    with pytest.raises(InputError, match="documents of a batch have one length"):
        law.log_prob(x, Context(lengths=torch.tensor([3])))
    with pytest.raises(ValueError, match="length 0 must be at least 1"):
        Documents(law.law, 0, 1)


def test_patterns_have_their_shares_and_sizes() -> None:
    length, context = 16, 8
    for i, kind in enumerate(KINDS):
        shares = [0.0] * 4
        shares[i] = 1.0
        hidden, known = Counter[int](), set()
        for seed in range(400):
            mask = pattern(length, context, shares, seed)
            assert torch.equal(mask, pattern(length, context, shares, seed))
            size = int((~mask).sum())
            hidden[size] += 1
            known.add(int(mask.sum()))
            assert 1 <= size <= length
            assert int(mask.sum()) <= context
            edges = mask.int().diff()
            if kind == "before":
                assert mask[0]
                assert not mask[-1]
                assert int(edges.abs().sum()) == 1
            if kind == "around":
                assert int((edges == -1).sum()) <= 1
        assert hidden[length] > 250
        assert known == ({0} if kind == "nothing" else set(range(1, context + 1)))
    kinds = Counter(int(pattern(length, context, [1, 0, 0, 1], seed).any()) for seed in range(400))
    assert abs(kinds[0] - 200) < 60


# -- models --------------------------------------------------------------------------------------------------


def model(family: str, **settings: object) -> hf.DflowModel:
    torch.manual_seed(0)
    values = SETTINGS[family] | {"length": 8, "context": 6} | settings
    made = hf.DflowModel(hf.DflowConfig(family=family, vocab_size=5, **values))
    return uneven(randomize(made.float())).eval()  # type: ignore[return-value]


#: Families that take known symbols, and so a context.
FAMILIES = ["grouped", "any_order", "transformer", "lstm", "bipartite", "multiscale"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_with_a_context_draws_and_scores_any_length(family: str, tmp_path: Path) -> None:
    made = model(family)
    hf.save(made, tmp_path / "m")
    made = hf.load(tmp_path / "m")
    prompt = torch.tensor([1, 2, 3, 4, 0, 1, 2, 3, 4])
    draws = torch.stack(list(generate(made, 3, length=40, prompt=prompt)))
    assert draws.shape == (3, 40)
    assert (draws[:, :9] == prompt).all()
    for size in (1, 2):
        again = torch.stack(list(generate(made, 3, length=40, prompt=prompt, batch_size=size)))
        assert torch.equal(again, draws)
    assert made.generate(2).shape == (2, 8)
    assert made.generate(2, prompt=prompt).shape == (2, 17)
    for n in (1, 7, 8, 9, 40):
        assert made.documents is not None
        expected = made.documents.log_prob(draws[:, :n])
        torch.testing.assert_close(made.log_prob(draws[:, :n]).double(), expected)
    torch.testing.assert_close(made.log_prob(draws[:, :8]).double(), made.law.log_prob(draws[:, :8]).double())


def test_families_that_take_no_known_symbols_refuse_a_context() -> None:
    with pytest.raises(
        InputError,
        match="context 4: a autoregressive model takes no known symbols; set it to 0, or use one of family "
        "grouped, any_order, bipartite, multiscale",
    ):
        zoo.settings("autoregressive", {"context": 4})
    for setting, value in (("conditioner", "perceptron"), ("conditioner", "table"), ("masks", "single")):
        with pytest.raises(InputError, match=f"{setting} '{value}' .* with context 4 use"):
            zoo.settings("bipartite", {"context": 4, "length": 6, setting: value})
        zoo.settings("bipartite", {"length": 6, setting: value})
    with pytest.raises(InputError, match="context must be at least 0"):
        zoo.settings("grouped", {"context": -1})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_with_a_context_trains_and_draws(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path)
    train = {"steps": 12, "batch_size": 8, "samples": 1, "trackers": [], "warmup": 2, "eval_every": 6}
    values = {
        "data": {"name": str(text)},
        "model": {"family": family, **SETTINGS[family] | {"length": 16, "context": 12}},
        "train": train,
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    words = ["generate", "--model", str(tmp_path / "out"), "--length", "100", "--format", "jsonl"]
    capsys.readouterr()
    assert main([*words, "--samples", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["num_symbols"] for row in rows] == [100, 100]
    # The same steps in two parts end with the same weights.
    assert main(["train", str(path), "--output", str(tmp_path / "two"), "--set", "train.steps=6"]) == 0
    assert main(["train", str(path), "--output", str(tmp_path / "two"), "--resume"]) == 0
    for values in ({"known": [1.0]}, {"known": [0, 0, 0, 0]}, {"known": [1, 1, 1, -1]}):
        assert main(["train", str(path), "--set", f"train.known={json.dumps(values['known'])}"]) == 2
