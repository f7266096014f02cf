"""Bits a character: the arithmetic against sums by hand, for streams, sentences, bytes, many processes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LENGTH, SETTINGS, corpus_of, make_model, write_model, write_text
from torch import Tensor

from dflow.config import InputError
from dflow.data import Bytes, Corpus, DataConfig, load
from dflow.evaluate import driver, evaluate
from dflow.hf import DflowModel


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return corpus_of(write_text(tmp_path))


@torch.no_grad()
def nats(model: DflowModel, ids: Tensor, lengths: Tensor | None = None) -> list[float]:
    rows = range(len(ids))
    return [
        -float(model.log_prob(ids[i : i + 1], None if lengths is None else lengths[i : i + 1])) for i in rows
    ]


@pytest.mark.parametrize("family", SETTINGS)
def test_every_family_has_exact_bits_and_a_round_trip(family: str, corpus: Corpus) -> None:
    model = make_model(family, corpus.tokenizer.size)
    result = evaluate(model, corpus.test, batch_size=7, checks=5)
    ids, _ = corpus.test.chunks(LENGTH)
    by_hand = nats(model, ids)
    assert result.bpc == pytest.approx(sum(by_hand) / math.log(2) / ids.numel(), rel=1e-5)
    each = torch.tensor(by_hand) / math.log(2) / LENGTH
    assert result.standard_error == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-3)
    assert (result.kind, result.round_trip, result.num_checked) == ("exact", True, 5)
    assert (result.num_chunks, result.num_symbols) == (len(ids), ids.numel())
    assert (
        result.protocol == f"chunks of 8 symbols, each on its own, tail of {corpus.test.tail(LENGTH)} dropped"
    )
    assert 0 < corpus.test.tail(LENGTH) < LENGTH


def test_the_batch_size_changes_nothing(corpus: Corpus) -> None:
    model = make_model("lstm", corpus.tokenizer.size)
    values = [evaluate(model, corpus.test, batch_size=b).bpc for b in (1, 13, 1000)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_sentences_count_their_ends_and_pay_for_their_lengths(tmp_path: Path) -> None:
    corpus = corpus_of(write_text(tmp_path), "sentence")
    longest = max(t.longest for t in (corpus.train, corpus.valid, corpus.test))
    model = make_model("lstm", corpus.tokenizer.size, longest, explicit_length=True)
    result = evaluate(model, corpus.test, batch_size=3)
    ids, lengths = corpus.test.chunks(longest)
    assert lengths is not None
    by_hand, sizes = torch.tensor(nats(model, ids, lengths)), lengths + 1
    total = float(by_hand.sum() / sizes.sum())
    assert result.bpc == pytest.approx(total / math.log(2), rel=1e-5)
    assert result.num_symbols == int(sizes.sum())
    residuals = by_hand - total * sizes
    error = float(residuals.square().sum() * len(ids) / (len(ids) - 1)) ** 0.5 / float(sizes.sum())
    assert result.standard_error == pytest.approx(error / math.log(2), rel=1e-3)
    assert "sentences" in result.protocol
    shorter = evaluate(model, corpus.test, limit=2)
    assert shorter.num_symbols == int(sizes[:2].sum())


def test_bits_are_those_of_characters_whatever_the_symbols(tmp_path: Path) -> None:
    path = write_text(tmp_path, "äöü ä ö ü\n" * 80)
    corpus = load(DataConfig(name=str(path)), Bytes())
    model = make_model("lstm", 256)
    result = evaluate(model, corpus.test)
    assert 0.5 < result.characters_per_symbol < 1
    ids, _ = corpus.test.chunks(LENGTH)
    a_symbol = sum(nats(model, ids)) / math.log(2) / ids.numel()
    text = bytes(ids.flatten().tolist())
    # A character that is cut in two belongs to the chunk in which it begins.
    characters = sum(byte < 0x80 or byte >= 0xC0 for byte in text)
    assert result.bpc == pytest.approx(a_symbol * ids.numel() / characters, rel=1e-5)
    assert result.bpc > a_symbol


def test_limit_takes_the_first_chunks(corpus: Corpus) -> None:
    model = make_model("grouped", corpus.tokenizer.size)
    result = evaluate(model, corpus.test, limit=3)
    ids, _ = corpus.test.chunks(LENGTH)
    assert result.bpc == pytest.approx(sum(nats(model, ids[:3])) / math.log(2) / 24, rel=1e-5)
    assert result.num_chunks == 3
    assert result.protocol.startswith("the first 3 chunks")
    assert evaluate(model, corpus.test, limit=1).standard_error is None
    assert evaluate(model, corpus.test, limit=10**9).num_chunks == len(ids)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_even_after_an_error(training: bool, corpus: Corpus) -> None:
    model = make_model("lstm", corpus.tokenizer.size).train(training)
    evaluate(model, corpus.test, limit=1)
    assert model.training == training
    model.distribution.net.head.bias.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        evaluate(model, corpus.test, limit=1)
    assert model.training == training


class Broken(DflowModel):
    """Scores well and cannot draw what it scores."""

    def round_trip(self, input_ids: Tensor, lengths: Tensor | None = None) -> bool:
        return len(input_ids) == 0


def test_a_failed_round_trip_is_told(corpus: Corpus) -> None:
    model = make_model("lstm", corpus.tokenizer.size)
    model.__class__ = Broken
    result = evaluate(model, corpus.test)
    assert not result.round_trip
    assert result.num_checked == 16
    assert evaluate(model, corpus.test, checks=0).num_checked == 0


def test_the_wrong_protocol_is_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path)
    stream, sentence = corpus_of(path), corpus_of(path, "sentence")
    with pytest.raises(InputError, match="set the protocol to 'stream'"):
        evaluate(make_model("lstm", stream.tokenizer.size, 40), sentence.test)
    with pytest.raises(InputError, match="set the protocol to 'sentence'"):
        evaluate(make_model("lstm", stream.tokenizer.size, 40, explicit_length=True), stream.test)


@pytest.mark.parametrize(
    ("settings", "named"), [({"limit": 0}, "limit 0"), ({"batch_size": 0}, "batch size 0")]
)
def test_impossible_numbers_are_refused(settings: dict[str, Any], named: str, corpus: Corpus) -> None:
    with pytest.raises(InputError, match=named):
        evaluate(make_model("lstm", corpus.tokenizer.size), corpus.test, **settings)


class Half:
    """One of two processes; `reduce` adds what the other would send."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank: int, other: list[Tensor]) -> None:
        self.process_index, self.sent, self.other = rank, [], other

    def reduce(self, totals: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.sent.append(totals)
        return totals + (self.other[0] if self.other else 0)


@pytest.mark.parametrize("limit", [1, 5])
def test_two_processes_score_each_chunk_once(limit: int, corpus: Corpus) -> None:
    model = make_model("grouped", corpus.tokenizer.size)
    second: Any = Half(1, [])
    if limit == 1:  # nothing is left for the second process
        second.other = [torch.tensor([1, 8, 64, 1, 1, 8, 0, 0], dtype=torch.float64)]
    evaluate(model, corpus.test, limit=limit, accelerator=second)
    first: Any = Half(0, second.sent)
    both, alone = (
        evaluate(model, corpus.test, limit=limit, accelerator=first),
        evaluate(model, corpus.test, limit=limit),
    )
    assert both.bpc == pytest.approx(alone.bpc, rel=1e-6)
    if limit > 1:
        assert both.standard_error == pytest.approx(alone.standard_error, rel=1e-3)
    exact = {"num_chunks", "num_symbols", "num_checked", "round_trip", "protocol"}
    assert {k: v for k, v in dataclasses.asdict(both).items() if k in exact} == {
        k: v for k, v in dataclasses.asdict(alone).items() if k in exact
    }


class Figures(driver.Scorer):
    """Rows with figures, sizes and weights of any kind."""

    names, optional, what = ("nats", "extra"), ("extra",), "likelihood of the figures"

    def __init__(self, values: Tensor, sizes: Tensor | None = None, weights: Tensor | None = None) -> None:
        self.model, self.values, self.sizes, self.weights = torch.nn.Identity(), values, sizes, weights
        self.num_rows = self.num_checks = len(values)

    def score(self, rows: slice) -> driver.Rows:
        sizes, weights = (None if x is None else x[rows] for x in (self.sizes, self.weights))
        extra = torch.full_like(self.values[rows], math.nan)
        return driver.Rows({"nats": self.values[rows], "extra": extra}, sizes, weights)

    def check(self, rows: slice) -> bool | None:
        return None if rows.start == 0 else not bool((self.values[rows] > 2).any())


def test_the_driver_gives_ratios_with_their_errors() -> None:
    values, sizes = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 2.0])
    plain = driver.total(Figures(values), 2)
    assert plain.mean("nats") == pytest.approx(7 / 3)
    assert plain.error("nats") == pytest.approx(float(values.std()) / 3**0.5)
    assert math.isnan(plain.mean("extra"))
    ratio = driver.total(Figures(values, sizes), 2)
    assert ratio.mean("nats") == pytest.approx(7 / 4)
    residuals = (values - 7 / 4 * sizes).square().sum()
    assert ratio.error("nats") == pytest.approx(float(residuals * 3 / 2) ** 0.5 / 4)
    # A row that counts twice is two rows.
    twice = driver.total(Figures(values, weights=torch.tensor([2.0, 1.0, 1.0])), 1)
    alike = driver.total(Figures(torch.tensor([1.0, 1.0, 2.0, 4.0])), 4)
    assert (twice.mean("nats"), twice.error("nats")) == pytest.approx(
        (alike.mean("nats"), alike.error("nats"))
    )
    # The first batch is not checked, and the second one fails.
    assert (plain.num_checked, plain.round_trip, alike.round_trip) == (1, False, None)
    with pytest.raises(InputError, match="likelihood of the figures is not finite"):
        driver.total(Figures(torch.tensor([math.inf])), 1)


@pytest.mark.slow
def test_the_command_runs_on_two_real_processes(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "lstm", write_text(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        ranks.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "dflow",
                    "evaluate",
                    "--model",
                    folder,
                    "--device",
                    "cpu",
                    "--threads",
                    "1",
                ],
                env=os.environ | {k: str(v) for k, v in places.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert outputs[1][0] == ""
    found = json.loads(outputs[0][0].splitlines()[-1])
    corpus = corpus_of(tmp_path / "text.txt")
    model = make_model("lstm", corpus.tokenizer.size)
    assert found["bpc"] == pytest.approx(evaluate(model, corpus.test).bpc, rel=1e-5)
    assert found["num_chunks"] == len(corpus.test.chunks(LENGTH)[0])
