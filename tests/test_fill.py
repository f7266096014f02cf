"""Gaps of texts: draws follow the exact conditional law, and what cannot be filled is refused."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import enumerate_all
from folders import make_model, write_text
from test_score import TOKENIZER, model
from torch import Tensor

from dflow import fill as filling
from dflow import hf
from dflow.cli import main
from dflow.config import InputError
from dflow.core import Context, Known
from dflow.data import DataConfig, load
from dflow.fill import Filled, fill, gapped, windows
from dflow.ops.noise import Controls

NUM_DRAWS = 20_000


def mask_of(pattern: str) -> Tensor:
    return torch.tensor([c == "_" for c in pattern])


def draw(made: hf.DflowModel, x: Tensor, hidden: Tensor, n: int, **settings: object) -> list[Filled]:
    return list(fill(made, x, hidden, n, batch_size=5000, **settings))  # type: ignore[arg-type]


def check_law(draws: list[Filled], rows: Tensor, log_prob: Tensor) -> None:
    """Draws of the rows follow a law of mass 1, and their log-probabilities are those of the rows."""
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-5)
    power = 2 ** torch.arange(rows.shape[1])
    place = (rows * power).sum(1)
    index = torch.full((int(power.sum()) + 1,), -1).index_copy(0, place, torch.arange(len(rows)))
    drawn = index[(torch.stack([filled.ids for filled in draws]) * power).sum(1)]
    assert (drawn >= 0).all()
    written = torch.tensor([filled.log_prob for filled in draws], dtype=torch.float64)
    torch.testing.assert_close(written, log_prob[drawn], rtol=1e-5, atol=1e-5)
    expected = len(draws) * log_prob.exp()
    counts = torch.bincount(drawn, minlength=len(rows))
    chi = float(((counts - expected).square() / expected).sum())
    assert chi < len(rows) - 1 + 5 * (2 * (len(rows) - 1)) ** 0.5


# -- windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["abc__def", "a__defgh", "abcdef__", "__", "ab_cd_ef", "_a_b_c__d__e_"])
@pytest.mark.parametrize(("length", "context"), [(2, 1), (2, 4), (3, 3), (8, 4), (20, 20)])
def test_windows_hold_gaps_and_the_text_around_them(pattern: str, length: int, context: int) -> None:
    hidden = mask_of(pattern)
    pieces = windows(hidden, length, context)
    assert len(pieces) == 1 or length < 20
    filled = torch.zeros_like(hidden)
    for piece in pieces:
        inside = piece.hidden
        assert len(inside) == piece.end - piece.begin
        assert int(inside.sum()) <= length
        assert int((~inside).sum()) <= context
        seen = hidden[piece.begin : piece.end] & ~filled[piece.begin : piece.end]
        assert torch.equal(seen, inside)
        filled[piece.begin : piece.end] |= inside
    assert torch.equal(filled, hidden)


def test_the_context_goes_to_both_sides() -> None:
    def spans(pattern: str, length: int, context: int) -> list[tuple[int, int]]:
        return [(piece.begin, piece.end) for piece in windows(mask_of(pattern), length, context)]

    assert spans("abcd__efgh", 2, 4) == [(2, 8)]
    assert spans("abcd__efgh", 2, 5) == [(1, 8)]
    assert spans("a__efghij", 2, 6) == [(0, 8)]
    assert spans("abcdef__g", 2, 6) == [(1, 9)]
    assert spans("abcdef__", 2, 3) == [(3, 8)]
    # The second gap is hidden to the first window, and the first known to the second.
    assert spans("ab_c_de", 1, 8) == [(0, 4), (0, 7)]
    with pytest.raises(InputError, match="gap 2 has 3 symbols, and this model fills at most 2"):
        windows(mask_of("_a___"), 2, 4)


# -- laws ----------------------------------------------------------------------------------------------------


#: Families that take known symbols anywhere.
ANYWHERE = ["grouped", "any_order", "bipartite", "multiscale"]


@pytest.mark.parametrize("family", ANYWHERE)
@pytest.mark.parametrize("pattern", ["ab__a", "_b_a_", "ab___", "___ab", "___"])
def test_a_text_that_fits_into_a_window_is_filled_by_the_conditional_law(family: str, pattern: str) -> None:
    made, hidden = model(family, K=2, length=4, context=4), mask_of(pattern)
    text = torch.tensor([c == "b" for c in pattern]).long()
    rows = enumerate_all(2, len(hidden))
    rows = rows[(rows == text)[:, ~hidden].all(1)]
    with torch.no_grad():
        log_prob = made.law.log_prob(rows, Context(known=Known(rows, ~hidden))).double()
    check_law(draw(made, text, hidden, NUM_DRAWS), rows, log_prob)


@pytest.mark.parametrize("family", ANYWHERE)
def test_several_windows_are_filled_from_left_to_right_each_given_the_last(family: str) -> None:
    made, pattern = model(family, K=2, length=2, context=2), "ab__aa__b"
    hidden, text = mask_of(pattern), torch.tensor([c == "b" for c in pattern]).long()
    rows = enumerate_all(2, 9)
    rows = rows[(rows == text)[:, ~hidden].all(1)]
    log_prob = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad():
        for place in (2, 6):
            piece = rows[:, place - 1 : place + 3]
            known = Context(known=Known(piece, torch.tensor([True, False, False, True])))
            log_prob += made.law.log_prob(piece, known).double()
    check_law(draw(made, text, hidden, NUM_DRAWS), rows, log_prob)


@pytest.mark.parametrize("family", ["transformer", "lstm"])
@pytest.mark.parametrize("context", [0, 2])
def test_left_to_right_a_gap_at_the_end_is_a_continuation(family: str, context: int) -> None:
    made, hidden = model(family, K=2, length=5 if not context else 2, context=context), mask_of("ab___")
    text = torch.tensor([0, 1, 0, 0, 0])
    rows = enumerate_all(2, 5)
    rows = rows[(rows == text)[:, ~hidden].all(1)]
    law = made.documents or made.law
    with torch.no_grad():
        log_prob = law.log_prob(rows, Context(known=Known(rows, ~hidden))).double()
        if not context:
            whole = made.law.log_prob(rows) - made.law.log_prob(rows[:, :2])
            torch.testing.assert_close(log_prob, whole)
    check_law(draw(made, text, hidden, NUM_DRAWS), rows, log_prob)


def test_draws_do_not_depend_on_the_batch_size_and_controls_change_them() -> None:
    made, hidden = model("grouped", length=4, context=4), mask_of("ab__a_bbbb___")
    text = torch.arange(13) % 5
    draws = draw(made, text, hidden, 6, seed=3)
    for filled in draws:
        assert torch.equal(filled.ids[~hidden], text[~hidden])
    again = list(fill(made, text, hidden, 4, seed=3, batch_size=1))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(draws, again, strict=False))
    assert not all(torch.equal(a.ids, b.ids) for a, b in zip(draws, draw(made, text, hidden, 6), strict=True))
    likeliest = draw(made, text, hidden, 3, controls=Controls(top_k=1))
    assert all(torch.equal(filled.ids, likeliest[0].ids) for filled in likeliest)
    # The log-probability is that of the law without controls.
    assert -20 < likeliest[0].log_prob < -1e-3
    # What stands in a gap is not read.
    other = torch.where(hidden, 4, text)
    assert torch.equal(draw(made, other, hidden, 6, seed=3)[0].ids, draws[0].ids)


# -- marks ---------------------------------------------------------------------------------------------------


def test_marks_become_gaps() -> None:
    symbols, hidden = gapped(TOKENIZER, "ab##cd##", "##", [1, 3])
    assert TOKENIZER.decode(symbols[~hidden]) == "abcd"
    assert torch.equal(hidden, mask_of("ab_cd___"))
    assert torch.equal(gapped(TOKENIZER, "##ab##", "##", [2])[1], mask_of("__ab__"))
    assert gapped(TOKENIZER, "##", "##", [2])[1].all()


@pytest.mark.parametrize(
    ("text", "mark", "sizes", "named"),
    [
        ("", "##", [1], "empty"),
        ("abcd", "##", [1], "holds no gap '##'"),
        ("abcd", "", [1], "holds no gap ''"),
        ("a##b", "##", [0], "a gap of 0 symbols"),
        ("a##b", "##", [1, 2], "2 sizes for 1 gaps"),
        ("a##b\n##é", "##", [1], r"'é' .* \(line 2, column 3\)"),
    ],
)
def test_marks_that_cannot_be_read_are_refused(text: str, mark: str, sizes: list[int], named: str) -> None:
    with pytest.raises(InputError, match=named):
        gapped(TOKENIZER, text, mark, sizes)


def test_what_a_model_cannot_fill_is_refused_at_once() -> None:
    x = torch.zeros(4, dtype=torch.int64)
    grouped, causal = model("grouped", length=2), model("lstm", length=2)
    for made, pattern, named in (
        (causal, "a__b", "text stands behind a gap, and a lstm model reads only what stands before"),
        (causal, "_a__", "text stands behind a gap"),
        (grouped, "____", "gap 1 has 4 symbols, and this model fills at most 2"),
        (make_model("lstm", 5, 3), "a___", "has 4 symbols, and this model takes at most 3"),
        (make_model("grouped", 5, 4), "a__b", "was not trained with known symbols"),
        (make_model("bipartite", 5, 4), "a__b", "one of family grouped"),
        (grouped, "abcd", "no gap"),
    ):
        with pytest.raises(InputError, match=named):
            fill(made, x, mask_of(pattern))
    hidden = mask_of("a__b")
    for settings, named in (
        ({"n": 0}, "samples 0"),
        ({"batch_size": 0}, "size 0"),
        ({"seed": -1}, "seed -1"),
    ):
        with pytest.raises(InputError, match=named):
            fill(grouped, x, hidden, **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"symbol 5 lies outside 0\.\.4"):
        fill(grouped, x + 5, hidden)
    with pytest.raises(InputError, match="symbols int64"):
        fill(grouped, x, hidden[:3])


# -- the command ---------------------------------------------------------------------------------------------


def write(folder: Path, family: str) -> Path:
    tokenizer = load(DataConfig(name=str(write_text(folder)))).tokenizer
    made = model(family, K=tokenizer.size, length=16, context=12)
    hf.save(made, folder / family)
    tokenizer.save(folder / family)
    return folder / family


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = write(tmp_path, "grouped"), tmp_path / "a.txt"
    path.write_text("line ____ of a ____\ntext", encoding="utf-8")
    words = ["fill", str(path), "--model", str(folder), "--size", "3", "5"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert (text[:5], text[8:14], len(text)) == ("line ", " of a ", 24)
    assert text.endswith("\ntext")
    assert main([*words, "--samples", "4", "--rank", "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["log_prob"] for row in rows] == sorted((row["log_prob"] for row in rows), reverse=True)
    for row in rows:
        assert (row["exact"], row["num_symbols"]) == (True, 8)
        assert row["text"] == f"line {row['gaps'][0]} of a {row['gaps'][1]}\ntext"
        assert math.isfinite(row["log_prob"])
    assert text in [row["text"] for row in rows]
    assert main([*words, "--temperature", "0.5", "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is False
    assert main([*words, "--samples", "2", "--output", str(tmp_path / "out.txt")]) == 0
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").startswith("--- sample 1, log-probability -")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a #")))
    causal = write(tmp_path, "lstm")
    assert main(["fill", "-", "--model", str(causal), "--gap", "#", "--size", "40"]) == 0
    assert len(capsys.readouterr().out) == 42


def test_samples_are_written_as_they_are_drawn_unless_they_are_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = write(tmp_path, "grouped"), tmp_path / "a.txt"
    path.write_text("line ____ of a", encoding="utf-8")
    draw, written = filling._draw, list[int]()

    def noted(*arguments: Any) -> Any:
        written.append(capsys.readouterr().out.count("--- sample"))
        return draw(*arguments)

    monkeypatch.setattr(filling, "_draw", noted)
    words = ["fill", str(path), "--model", str(folder), "--size", "3", "--samples", "5", "--batch-size", "2"]
    assert main(words) == 0
    assert [*written, capsys.readouterr().out.count("--- sample")] == [0, 2, 2, 1]
    written.clear()
    assert main([*words, "--rank"]) == 0
    assert [*written, capsys.readouterr().out.count("--- sample")] == [0, 0, 0, 5]


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = write(tmp_path, "grouped"), tmp_path / "a.txt"
    words = ["fill", str(path), "--model", str(folder)]
    for content, more, named in (
        ("a ____", [], "--size is missing"),
        ("a b", ["--size", "3"], "a.txt: the text holds no gap '____'"),
        ("", ["--size", "3"], "a.txt: empty"),
        ("a ____", ["--size", "17"], "gap 1 has 17 symbols, and this model fills at most 16"),
        ("a ____\n ~", ["--size", "3"], "(line 2, column 2) is not in the vocabulary"),
        ("a ____", ["--size", "3", "--temperature", "0"], "temperature 0.0 must be above 0"),
        ("a ____", ["--size", "3", "--output", str(path)], "exists already"),
    ):
        path.write_text(content, encoding="utf-8")
        assert main([*words, *more]) == 2
        assert named in capsys.readouterr().err
    path.write_text("a ____\n", encoding="utf-8")
    causal = write(tmp_path, "transformer")
    assert main(["fill", str(path), "--model", str(causal), "--size", "3"]) == 2
    assert "text stands behind a gap" in capsys.readouterr().err
