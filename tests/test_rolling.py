"""The rolling protocol: every symbol once, given the text before it, against loops by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from cases import uneven
from folders import (
    LENGTH,
    SETTINGS,
    corpus_of,
    image_recipe,
    make_model,
    write_model,
    write_pictures,
    write_text,
)
from torch import Tensor
from torch.nn import functional as F

from dflow import cli, zoo
from dflow.cli import main
from dflow.compare import Contestant, compare, markdown
from dflow.config import InputError
from dflow.data import Bytes, DataConfig, Text, load
from dflow.evaluate import evaluate
from dflow.hf import DflowModel

K = 5


def text_of(n: int, K: int = K) -> Text:
    ids = torch.randint(K, (n,), generator=torch.Generator().manual_seed(n))
    return Text("test", ids.to(torch.uint8), None, n)


def model_of(family: str, length: int = LENGTH) -> DflowModel:
    return make_model(family, K, length).double()


def bits(model: DflowModel, text: Text, **options: Any) -> float:
    """Of the whole stream."""
    result = evaluate(model, text, protocol="rolling", **options)
    assert result.num_symbols == result.num_characters == len(text.ids)
    assert result.num_left == 0
    return result.bpc * len(text.ids)


@torch.no_grad()
def log_p_of_last(model: DflowModel, window: Tensor) -> float:
    """log p of the last symbol given the others of a window, by the network alone."""
    logits = model.distribution.net(window[None])[0, -1]
    return float(logits.log_softmax(-1)[window[-1]])


@pytest.mark.parametrize("family", ["transformer", "lstm"])
@pytest.mark.parametrize("n", [1, 5, LENGTH])
@torch.no_grad()
def test_a_stream_that_fits_a_window_has_its_plain_likelihood(family: str, n: int) -> None:
    model, text = model_of(family), text_of(n)
    expected = -float(model.log_prob(text.ids.long()[None])) / math.log(2)
    assert bits(model, text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("context", range(LENGTH))
@pytest.mark.parametrize("n", [LENGTH + 1, 3 * LENGTH, 29])
def test_windows_are_a_loop_over_positions(n: int, context: int) -> None:
    model, text = model_of("transformer"), text_of(n)
    ids, stride = text.ids.long(), LENGTH - context
    total = 0.0
    for i in range(n):
        # The window in which the symbol is scored, by its number.
        number = 0 if i < LENGTH else (i - LENGTH) // stride + 1
        assert i - number * stride >= (context if number else 0)
        total -= log_p_of_last(model, ids[number * stride : i + 1])
    for batch_size in (1, 2, 100):
        assert bits(model, text, context=context, batch_size=batch_size) == pytest.approx(
            total / math.log(2), rel=1e-9
        )
    if context == LENGTH - 1:
        direct = sum(log_p_of_last(model, ids[max(0, i + 1 - LENGTH) : i + 1]) for i in range(n))
        assert total == pytest.approx(-direct, rel=1e-12)


@torch.no_grad()
def test_an_lstm_carries_its_state_through_pieces_of_any_size() -> None:
    model, text = model_of("lstm"), text_of(61)
    x = text.ids.long()[None]
    logits = model.distribution.net(x)[0]
    expected = float(F.cross_entropy(logits, x[0], reduction="sum")) / math.log(2)
    for batch_size in (1, 3, 100):
        assert bits(model, text, batch_size=batch_size) == pytest.approx(expected, rel=1e-12)
    shorter = model_of("lstm", 7)
    shorter.distribution.net.load_state_dict(model.distribution.net.state_dict())
    assert bits(shorter, text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sizes", [(1,) * 11, (4, 1, 6), (11,)])
@torch.no_grad()
def test_carry_is_the_full_pass(sizes: tuple[int, ...]) -> None:
    net, x = model_of("lstm").distribution.net, torch.randint(K, (3, 11))
    carried, outputs = None, []
    for piece in x.split(list(sizes), 1):
        out, carried = net.carry(piece, carried)
        outputs.append(out)
    assert torch.allclose(torch.cat(outputs, 1), net(x), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="call eval"):
        net.train().carry(x)


def test_characters_are_those_that_begin_in_scored_symbols(tmp_path: Path) -> None:
    corpus = load(DataConfig(name=str(write_text(tmp_path, "äöü ä ö ü\n" * 80))), Bytes())
    for family in ("transformer", "lstm"):
        result = evaluate(make_model(family, 256), corpus.test, protocol="rolling")
        assert result.num_characters == corpus.test.num_characters
        assert (result.num_symbols, result.num_left) == (len(corpus.test.ids), 0)


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_a_limit_takes_the_symbols_of_the_first_chunks(family: str) -> None:
    model, text = model_of(family), text_of(50)
    result = evaluate(model, text, protocol="rolling", limit=3)
    assert (result.num_symbols, result.num_left) == (24, 26)
    assert result.num_symbols == evaluate(model, text, limit=3).num_symbols
    assert result.protocol.startswith("rolling over the first 24 symbols: ")
    cut = Text("test", text.ids[:24], None, 24)
    assert result.bpc == pytest.approx(evaluate(model, cut, protocol="rolling").bpc, rel=1e-12)


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_the_round_trip_checks_what_is_scored(family: str) -> None:
    model, text = model_of(family), text_of(50)
    result = evaluate(model, text, protocol="rolling", checks=4, batch_size=3)
    assert (result.round_trip, result.num_checked, result.kind) == (True, 4, "exact")
    step = model.distribution.net.step
    model.distribution.net.step = lambda x, state: step(None if x is None else (x + 1) % K, state)
    assert evaluate(model, text, protocol="rolling", checks=4).round_trip is False


class Half:
    """One of two processes; `reduce` adds what the other would send."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank: int, other: Tensor | None = None) -> None:
        self.process_index, self.other, self.sent = rank, other, torch.zeros(0)

    def reduce(self, totals: Tensor, reduction: str) -> Tensor:
        self.sent = totals
        return totals if self.other is None else totals + self.other


def test_two_processes_score_each_window_once() -> None:
    model, text = model_of("transformer"), text_of(50)
    second: Any = Half(1)
    evaluate(model, text, protocol="rolling", accelerator=second)
    first: Any = Half(0, second.sent)
    both = evaluate(model, text, protocol="rolling", accelerator=first)
    assert both.bpc == pytest.approx(evaluate(model, text, protocol="rolling").bpc, rel=1e-12)
    with pytest.raises(InputError, match="which one process does; run dflow without a launcher"):
        evaluate(model_of("lstm"), text, protocol="rolling", accelerator=first)


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_after_training_more_text_before_a_symbol_costs_fewer_bits(family: str) -> None:
    torch.manual_seed(0)
    # Words of six symbols: the first ones of a chunk cannot be predicted without the text before.
    words = torch.tensor([[0, 1, 2, 3, 4, 4], [1, 1, 3, 2, 0, 4]])
    ids = words[torch.randint(2, (400,), generator=torch.Generator().manual_seed(1))].flatten()
    model = make_model(family, K).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    windows = ids[:1800].unfold(0, LENGTH, 1)
    for _ in range(150):
        optimizer.zero_grad()
        model(windows[torch.randint(len(windows), (64,))]).loss.backward()
        optimizer.step()
    text = Text("test", ids[1800:].to(torch.uint8), None, 600)
    chunks, rolled = evaluate(model, text), evaluate(model, text, protocol="rolling")
    assert rolled.bpc < 0.9 * chunks.bpc
    if family == "transformer":
        assert evaluate(model, text, protocol="rolling", context=0).bpc == pytest.approx(chunks.bpc, rel=1e-5)


@pytest.mark.parametrize("family", [name for name in SETTINGS if zoo.find(name).known != "before"])
def test_models_that_score_whole_sequences_are_refused(family: str) -> None:
    with pytest.raises(InputError, match=rf"a {family} model scores chunks only: .* not been trained"):
        evaluate(make_model(family, K), text_of(50), protocol="rolling")


@pytest.mark.parametrize("context", [-1, LENGTH, 100])
def test_a_context_is_below_the_length(context: int) -> None:
    with pytest.raises(InputError, match=rf"context {context} is not in 0\.\.7"):
        evaluate(model_of("transformer"), text_of(50), protocol="rolling", context=context)


def test_what_has_no_context_refuses_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given all symbols before each one"):
        evaluate(model_of("lstm"), text_of(50), protocol="rolling", context=4)
    with pytest.raises(InputError, match="use protocol 'rolling', or leave context out"):
        evaluate(model_of("transformer"), text_of(50), context=4)
    wrong: Any = "roling"
    with pytest.raises(InputError, match=r"'roling'.*rolling"):
        evaluate(model_of("transformer"), text_of(50), protocol=wrong)
    sentences = corpus_of(write_text(tmp_path), "sentence")
    model = make_model("transformer", sentences.tokenizer.size, 40, explicit_length=True)
    with pytest.raises(InputError, match="sentences are scored each on its own"):
        evaluate(model, sentences.test, protocol="rolling")


def test_symbols_outside_the_vocabulary_are_refused() -> None:
    for family in ("transformer", "lstm"):
        with pytest.raises(InputError, match="has symbol 6, outside the model's vocabulary, 0 to 4"):
            evaluate(model_of(family), text_of(50, 7), protocol="rolling")


def test_the_table_names_its_one_protocol() -> None:
    text = text_of(40)
    contestants = [Contestant(family, model_of(family), text) for family in ("transformer", "lstm")]
    result = compare(contestants, batch_size=2, rounds=1, protocol="rolling")
    table = markdown(result)
    assert "bits/char (exact, rolling)" in table
    for row in result.rows:
        assert row.evaluation.protocol.startswith("rolling")
        assert f"{row.name}: {row.evaluation.protocol}" in table
    assert "bits/char (exact, chunks)" in markdown(compare(contestants, batch_size=2, rounds=1))
    grouped = Contestant("grouped", make_model("grouped", K), text)
    with pytest.raises(InputError, match="a grouped model scores chunks only"):
        compare([*contestants, grouped], batch_size=2, rounds=1, protocol="rolling")


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_a_text_without_symbols_is_refused(family: str) -> None:
    with pytest.raises(InputError, match="no character begins"):
        evaluate(model_of(family), text_of(0), protocol="rolling")


# -- commands --------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def test_evaluate_rolling(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_model(tmp_path / "model", "transformer", text))
    assert main(["evaluate", "--model", folder, "--protocol", "rolling", "--context", "6"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    corpus = corpus_of(text)
    model = make_model("transformer", corpus.tokenizer.size)
    expected = evaluate(model, corpus.test, protocol="rolling", context=6)
    values = json.loads(last)
    assert (values["bpc"], values["protocol"], values["num_left"]) == (expected.bpc, expected.protocol, 0)
    shown = "\n".join(table)
    assert "each scores its last 2 given the 6 before" in shown
    assert f"{len(corpus.test.ids):,} in {expected.num_chunks:,} pieces" in shown
    assert "all of them" in shown
    assert "intact on 16 pieces" in shown


def test_compare_rolling(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write_model(tmp_path / family, family, text)) for family in ("transformer", "lstm")]
    argv = ["compare", *folders, "--protocol", "rolling", "--rounds", "1", "--batch-size", "1"]
    assert main([*argv, "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert "bits/char (exact, rolling)" in out
    assert json.loads(out.splitlines()[-1])["protocol"] == "rolling"


@pytest.mark.parametrize(
    ("family", "protocol", "argv", "named"),
    [
        ("transformer", "stream", ["--protocol", "rolling", "--context", "8"], "context 8 is not in 0..7"),
        ("transformer", "stream", ["--context", "2"], "use protocol 'rolling'"),
        ("transformer", "stream", ["--protocol", "roling"], "rolling"),
        ("lstm", "stream", ["--protocol", "rolling", "--context", "2"], "leave context out"),
        ("grouped", "stream", ["--protocol", "rolling"], "a grouped model scores chunks only"),
        ("lstm", "sentence", ["--protocol", "rolling"], "sentences are scored each on its own"),
    ],
)
def test_evaluate_refuses(
    family: str,
    protocol: Literal["stream", "sentence"],
    argv: list[str],
    named: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    length = LENGTH if protocol == "stream" else 40
    folder = str(write_model(tmp_path / "model", family, text, protocol, length))
    assert cli.main(["evaluate", "--model", folder, *argv]) == 2
    assert named in capsys.readouterr().err


def test_laws_and_images_have_no_text_before_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "law"
    argv = ["data.name=synthetic/eight_gaussians", "model.length=2", "train.steps=1", f"output={folder}"]
    argv += ["model.context=0", "model.counts=0"]
    recipe = Path(__file__).parent.parent / "recipes" / "lstm.yaml"
    assert main(["train", str(recipe), *(f"--set={value}" for value in argv)]) == 0
    assert cli.main(["evaluate", "--model", str(folder), "--protocol", "rolling"]) == 2
    assert "--protocol is for texts; synthetic/eight_gaussians is a law" in capsys.readouterr().err
    assert cli.main(["compare", str(folder), "--protocol", "rolling"]) == 2
    assert "drawn from a law of whole sequences" in capsys.readouterr().err
    images = image_recipe(tmp_path, str(write_pictures(tmp_path / "pictures")))
    assert main(["train", str(images)]) == 0
    assert cli.main(["evaluate", "--model", str(tmp_path / "out"), "--context", "1"]) == 2
    assert "--context is for models of text" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["grouped", "any_order", "transformer", "bipartite", "multiscale"])
@torch.no_grad()
def test_a_model_with_a_context_is_scored_by_its_law_of_documents(family: str) -> None:
    model = make_model(family, K, LENGTH, context=5).double().eval()
    uneven(model)
    for n in (LENGTH - 1, LENGTH, 3 * LENGTH + 2):
        text = text_of(n)
        documents = model.documents
        assert documents is not None
        expected = -float(documents.log_prob(text.ids.long()[None])) / math.log(2)
        for size in (1, 2, 32):
            assert bits(model, text, batch_size=size) == pytest.approx(expected, abs=1e-9)
    result = evaluate(model, text_of(3 * LENGTH), protocol="rolling", context=2, limit=2)
    assert result.protocol == (
        f"rolling over the first {2 * LENGTH} symbols: chunks of {LENGTH} symbols, each given the 2 symbols "
        "before it"
    )
    assert result.round_trip is not False
    with pytest.raises(InputError, match=r"context 6 is not in 0\.\.5: the model was trained"):
        evaluate(model, text_of(20), protocol="rolling", context=6)
