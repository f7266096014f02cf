"""Counts that go on counting the text that has been scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folders import write_text
from test_train import recipe_file, run

from dflow import cli, hf
from dflow.config import InputError
from dflow.core import Context, Known
from dflow.data import Corpus, GrowingCounts, count, load
from dflow.evaluate import evaluate
from dflow.models.counts import counted
from dflow.train import load_recipe

FAMILIES = {"ngram": 8, "transformer": 8, "grouped": 8, "lstm": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[hf.DflowModel, Corpus]]:
    models = {}
    for family, context in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        path = recipe_file(folder, write_text(folder), family, {"counts": 3, "context": context}, samples=0)
        out = run(path)
        models[family] = hf.load(out), load(load_recipe(path).data)
    return models


@torch.no_grad()
def test_growing_counts_are_those_of_the_text_so_far() -> None:
    K, patterns = 4, [(), (-1,), (-1, -2), (1,)]
    text, growing = torch.randint(0, K, (700,)), GrowingCounts(K, patterns, weight=2)
    begin = 0
    for size in (1, 5, 64, 64, 64, 64, 3, 128, 300, 7):
        growing.extend(text[begin : begin + size])
        begin += size
        table = count(text[:begin], K, patterns)
        # A block is counted before the text after it is known, so that contexts after an entry end with it.
        keys = table.keys[torch.randperm(len(table.keys))[:50]]
        dense = growing.dense(keys, torch.ones(len(keys), dtype=torch.bool), K)
        assert (dense <= 2 * table.dense(keys, torch.ones(len(keys), dtype=torch.bool), K)).all()
        before = count(text[:begin], K, patterns[:3])
        present = torch.ones(len(before.keys), dtype=torch.bool)
        assert torch.equal(growing.dense(before.keys, present, K), 2 * before.dense(before.keys, present, K))
    assert len(growing._blocks) < 8
    growing.clear()
    assert not growing.dense(keys, torch.ones(len(keys), dtype=torch.bool), K).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_piece_is_scored_given_counts_of_all_before_it(
    family: str, trained: dict[str, tuple[hf.DflowModel, Corpus]]
) -> None:
    model, corpus = trained[family]
    text, limit = corpus.valid, 9
    result = evaluate(model, text, protocol="rolling", adapt=True, limit=limit, batch_size=4)
    assert result.round_trip
    assert "each symbol 3 times" in result.protocol
    assert all(module.also is None for module in counted(model))
    plain = evaluate(model, text, protocol="rolling", limit=limit)
    assert result.bpc != plain.bpc
    if family == "lstm":
        return
    ids, nats = text.ids.long(), 0.0
    growing = GrowingCounts(model.config.vocab_size, next(counted(model)).patterns, 3)
    assert model.documents is not None
    with torch.no_grad():
        for window, begin, end in model.documents.chunks(result.num_symbols):
            for module in counted(model):
                module.also = growing
            x = ids[window:end][None]
            known = torch.arange(end - window) < begin - window
            nats -= float(model.law.log_prob(x, Context(known=Known(x, known)) if begin > window else None))
            growing.extend(ids[begin:end])
    for module in counted(model):
        module.also = None
    assert abs(result.bpc - nats / result.num_symbols / torch.log(torch.tensor(2.0))) < 1e-5


def test_a_model_learns_a_text_of_another_kind_while_it_scores_it(
    trained: dict[str, tuple[hf.DflowModel, Corpus]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = trained["ngram"]
    file = tmp_path / "other.txt"
    file.write_text("".join(f"text {a} at ten.\n" for a in "abcde" * 40)[:2000], encoding="utf-8")
    hf.save(model, tmp_path / "model")
    load_tokenizer = trained["ngram"][1].tokenizer
    load_tokenizer.save(tmp_path / "model")
    bits = []
    for words in ([], ["--adapt"]):
        command = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(file), "--split", "all"]
        assert cli.main([*command, "--protocol", "rolling", *words]) == 0
        line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("bits a character"))
        bits.append(float(line.split()[-1]))
    assert bits[1] < bits[0] / 2


def test_counts_adapt_where_there_are_counts_and_a_text_before(
    trained: dict[str, tuple[hf.DflowModel, Corpus]], tmp_path: Path
) -> None:
    model, corpus = trained["ngram"]
    with pytest.raises(InputError, match="each chunk is scored on its own; use protocol 'rolling'"):
        evaluate(model, corpus.valid, adapt=True)
    path = recipe_file(tmp_path, write_text(tmp_path), "transformer", samples=0)
    other = hf.load(run(path))
    with pytest.raises(InputError, match="without counts has none that could adapt"):
        evaluate(other, corpus.valid, protocol="rolling", adapt=True)
