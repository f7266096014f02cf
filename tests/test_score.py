"""Exact bits of texts: they are normalised, add up over symbols and lines, and say how they were made."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DIMS, enumerate_all, randomize, uneven
from folders import LENGTH, SETTINGS, make_model, write_model, write_text
from test_documents import given
from test_known import LAWS, build
from tqdm import tqdm

from dflow import hf
from dflow.cli import main
from dflow.config import InputError
from dflow.core import Context, Known
from dflow.data import Bytes, Characters, Numbers, SentencePiece
from dflow.distributions import Categorical
from dflow.distributions.documents import Documents
from dflow.score import score

TOKENIZER = Characters(list("ab\ncd"))
#: Families with terms by entry.
BY_ENTRY = ["grouped", "any_order", "transformer", "lstm"]


def model(family: str, K: int = 5, length: int = 8, context: int = 6) -> hf.DflowModel:
    torch.manual_seed(0)
    values = SETTINGS[family] | {"length": length, "context": context}
    made = hf.DflowModel(hf.DflowConfig(family=family, vocab_size=K, **values))
    return uneven(randomize(made)).eval()  # type: ignore[return-value]


def bits(made: hf.DflowModel, text: str, before: str = "") -> float:
    """The bits of a text, through the law itself."""
    x = TOKENIZER.encode(before + text)[None]
    law = made.documents or made.law
    known = Context(known=Known(x, torch.arange(x.shape[1]) < len(before))) if before else None
    with torch.no_grad():
        return -float(law.log_prob(x, known)) / math.log(2)


# -- laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_terms_add_up_to_the_log_probability(name: str) -> None:
    law = build(name, 3)
    x = enumerate_all(3, DIMS[3])
    assert law.by_entry
    torch.testing.assert_close(law.log_prob_each(x).sum(1), law.log_prob(x))
    context = given(x, 2)
    terms = law.log_prob_each(x, context)
    assert (terms[:, :2] == 0).all()
    torch.testing.assert_close(terms.sum(1), law.log_prob(x, context))


@pytest.mark.parametrize("name", ["transformer", "lstm"])
@torch.no_grad()
def test_a_term_is_the_law_of_one_symbol_given_those_before(name: str) -> None:
    law = Documents(build(name, 2), 3, 2)
    x = enumerate_all(2, 5)
    terms = law.log_prob_each(x)
    for i in range(5):
        prefix, value = x[:, :i] @ (2 ** torch.arange(i)), x[:, i]
        table = torch.zeros(2**i, 2, dtype=torch.float64)
        table[prefix, value] = terms[:, i].exp()
        torch.testing.assert_close(table[prefix, value], terms[:, i].exp())
        assert (table.sum(1) - 1).abs().max() < 1e-12


def test_a_law_without_terms_says_so() -> None:
    with pytest.raises(InputError, match="single entries no share in it"):
        Categorical(4, 3).log_prob_each(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="single symbols no share in it"):
        make_model("bipartite", 5).log_prob_each(torch.zeros(1, 8, dtype=torch.int64))


# -- texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*BY_ENTRY, "bipartite", "multiscale"])
def test_probabilities_of_all_texts_of_a_length_add_up_to_one(family: str) -> None:
    made, tokenizer = model(family, K=2, length=2, context=2), Characters(list("ab"))
    for n in (1, 2, 3, 5):
        texts = [tokenizer.decode(x) for x in enumerate_all(2, n)]
        for before in ("", "ba"):
            total = sum(2.0 ** -score(made, tokenizer, text, given=before).bits for text in texts)
            assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", BY_ENTRY)
@pytest.mark.parametrize("before", ["", "ab\nab\nab"])
def test_lines_and_symbols_add_up_to_the_whole(family: str, before: str) -> None:
    made, text = model(family), "ab\n\ncdcdcdcdcd\nabc\na"
    whole = score(made, TOKENIZER, text, given=before)
    assert (whole.protocol, whole.kind, whole.parts) == ("document", "exact", [])
    assert (whole.num_symbols, whole.num_characters, whole.num_given) == (len(text), len(text), len(before))
    assert whole.bits == pytest.approx(bits(made, text, before), rel=1e-5)
    assert whole.bits_per_character == whole.bits / len(text)
    lines = score(made, TOKENIZER, text, each="line", given=before)
    assert [part.text for part in lines.parts] == ["ab\n", "\n", "cdcdcdcdcd\n", "abc\n", "a"]
    assert [part.num_symbols for part in lines.parts] == [3, 1, 11, 4, 1]
    symbols = score(made, TOKENIZER, text, each="symbol", given=before)
    assert "".join(part.text for part in symbols.parts) == text
    assert [part.number for part in symbols.parts] == list(range(1, len(text) + 1))
    for result in (lines, symbols):
        assert result.bits == whole.bits
        assert sum(part.bits for part in result.parts) == pytest.approx(whole.bits, rel=1e-12)
    assert lines.parts[0].bits == pytest.approx(sum(part.bits for part in symbols.parts[:3]))


@pytest.mark.parametrize("family", ["bipartite", "multiscale"])
def test_a_flow_scores_a_document_given_text_before_and_no_part_of_it(family: str) -> None:
    made, text, before = model(family), "ab\n\ncdcdcdcdcd\nabc\na", "ab\nab"
    whole = score(made, TOKENIZER, text, given=before)
    assert (whole.protocol, whole.num_symbols, whole.num_given) == ("document", len(text), len(before))
    assert whole.bits == pytest.approx(bits(made, text, before), rel=1e-5)
    assert whole.bits != pytest.approx(score(made, TOKENIZER, text).bits, rel=1e-5)
    for each in ("line", "symbol"):
        with pytest.raises(InputError, match=f"each {each}: a {family} model gives whole sequences"):
            score(made, TOKENIZER, text, each=each)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="was trained without a context, and scores no text given"):
        score(make_model(family, 5), TOKENIZER, "abcdabcd", given="ab")


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_left_to_right_a_text_costs_what_its_two_halves_do(family: str) -> None:
    made = model(family, context=20)
    first, second = score(made, TOKENIZER, "ab\ncdab"), score(made, TOKENIZER, "\nab", given="ab\ncdab")
    whole = score(made, TOKENIZER, "ab\ncdab\nab")
    assert first.bits + second.bits == pytest.approx(whole.bits, rel=1e-5)


def test_a_model_without_context_scores_its_length_and_longer_texts_in_chunks() -> None:
    for family in ("transformer", "bipartite", "grouped"):
        made, text = make_model(family, 5), "ab\ncdab\n"
        once = score(made, TOKENIZER, text)
        assert once.protocol == "document"
        x = TOKENIZER.encode(text)[None]
        assert once.bits == pytest.approx(-float(made.log_prob(x).detach()) / math.log(2), rel=1e-5)
        twice = score(made, TOKENIZER, text * 2)
        assert twice.protocol == "chunks"
        assert twice.bits == pytest.approx(2 * once.bits)
    assert score(make_model("lstm", 5), TOKENIZER, "abc").protocol == "document"
    made = make_model("lstm", 5)
    both = score(made, TOKENIZER, "abcdabcd" + "ab", each="symbol")
    assert both.bits == pytest.approx(
        score(made, TOKENIZER, "abcdabcd").bits + score(made, TOKENIZER, "ab").bits
    )
    part = score(made, TOKENIZER, "abcd", given="ab")
    assert part.bits == pytest.approx(bits(made, "abcd", "ab"), rel=1e-5)


def test_lines_are_sequences_where_these_have_an_end() -> None:
    tokenizer = Characters(list("abcde"))
    for family in ("lstm", "grouped", "bipartite"):
        made = make_model(family, 5, explicit_length=True)
        made.set_length_counts(torch.arange(9).float())
        result = score(made, tokenizer, "ab\n\ncde\nab\n", each="line")
        assert (result.protocol, result.num_left, result.num_symbols) == ("lines", 1, 10)
        assert [(part.number, part.text) for part in result.parts] == [(1, "ab"), (3, "cde"), (4, "ab")]
        for part in result.parts:
            log_prob = float(made.log_prob(tokenizer.encode(part.text)[None]).detach())
            assert part.bits == pytest.approx(-log_prob / math.log(2), rel=1e-5)
        assert result.bits == pytest.approx(sum(part.bits for part in result.parts))
        if family == "bipartite":
            continue
        symbols = score(made, tokenizer, "ab\n\ncde\nab\n", each="symbol")
        assert [part.text for part in symbols.parts] == ["a", "b", "", "c", "d", "e", "", "a", "b", ""]
        assert symbols.bits == pytest.approx(result.bits, rel=1e-6)
    with pytest.raises(InputError, match="takes each line as a sequence"):
        score(made, tokenizer, "ab", given="c")
    with pytest.raises(InputError, match=r"'x' .* \(line 2, column 3\)"):
        score(made, tokenizer, "ab\naax")
    with pytest.raises(InputError, match="all lines are empty"):
        score(made, tokenizer, "\n\n")


def test_numbers_are_a_sequence_a_line() -> None:
    made = make_model("bipartite", 5)
    result = score(made, Numbers(5), "0 1 2 3 4 0 1 2\n4 3 2 1 0 4 3 2\n", each="line")
    assert [part.num_symbols for part in result.parts] == [8, 8]
    with pytest.raises(InputError, match=r"'7' at character 19 \(line 2, column 3\)"):
        score(made, Numbers(5), "0 1 2 3 4 0 1 2\n4 7")


def test_symbols_that_are_no_characters_belong_to_the_line_in_which_they_begin() -> None:
    text = "aé\nbé\n"
    result = score(model("lstm", K=256), Bytes(), text, each="line")
    assert [(part.num_symbols, part.num_characters) for part in result.parts] == [(4, 3), (4, 3)]
    symbols = score(model("lstm", K=256), Bytes(), text, each="symbol")
    assert [part.num_characters for part in symbols.parts] == [1, 1, 0, 1, 1, 1, 0, 1]
    assert result.parts[0].bits == pytest.approx(sum(part.bits for part in symbols.parts[:4]))
    corpus = "\n".join(f"a line number {i} of words" for i in range(300))
    pieces = SentencePiece.train(corpus, 300)
    result = score(model("lstm", K=300), pieces, "a line\nof words\n", each="line")
    assert [part.text for part in result.parts] == ["a line\n", "of words\n"]
    assert result.bits == pytest.approx(sum(part.bits for part in result.parts))
    assert sum(part.num_symbols for part in result.parts) == result.num_symbols


@pytest.mark.parametrize("context", [0, 3])
def test_a_bar_shows_how_much_of_a_text_is_scored(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        steps: list[float]

        def __init__(self, **options: Any) -> None:
            assert (options["unit"], options["disable"]) == ("symbol", False)
            self.steps = []
            bars.append(self)
            super().__init__(**options)

        def update(self, n: float | None = 1) -> None:
            self.steps.append(n or 0)

    monkeypatch.setattr("dflow.score.tqdm", Bar)
    tokenizer, text = Characters(" abcd"), "abcd ab" * 10
    made = make_model("transformer", 5, context=context)
    result = score(made, tokenizer, text, given="ab" * 9 if context else "", batch_size=2, progress=True)
    [bar] = bars
    assert (bar.total, sum(bar.steps)) == (70, 70)
    assert max(bar.steps) == 2 * LENGTH
    if context:
        ids, before = tokenizer.encode(text), tokenizer.encode("ab" * 9)
        with torch.no_grad():
            nats = -float(made.log_prob_each(ids[None], given=before).double().sum())
        assert result.bits == pytest.approx(nats / math.log(2), rel=1e-6)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        score(model("grouped"), TOKENIZER, "")
    with pytest.raises(InputError, match=r"'é' .* \(line 2, column 2\)"):
        score(model("grouped"), TOKENIZER, "ab\naé")
    with pytest.raises(InputError, match=r"given: symbol 'é'"):
        score(model("grouped"), TOKENIZER, "ab", given="é")
    with pytest.raises(
        InputError, match="the text has 2 symbols, and a grouped model without a context scores 8"
    ):
        score(make_model("grouped", 5), TOKENIZER, "ab")
    with pytest.raises(InputError, match="more than the 8"):
        score(make_model("lstm", 5), TOKENIZER, "abcdab", given="abc")
    for family in ("bipartite", "grouped"):
        with pytest.raises(InputError, match="scores no text given what stands before"):
            score(make_model(family, 5), TOKENIZER, "abcdabcd", given="a")
    for each in ("line", "symbol"):
        with pytest.raises(InputError, match=f"each {each}: a bipartite model .* score the document"):
            score(make_model("bipartite", 5), TOKENIZER, "abcdabcd", each=each)  # type: ignore[arg-type]
    broken = model("lstm")
    next(broken.parameters()).data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        score(broken, TOKENIZER, "ab")


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", "transformer", write_text(tmp_path))


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nline\nof text", encoding="utf-8")
    words = ["score", str(path), "--model", str(folder)]
    assert main(words) == 0
    table = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert table["kind"].strip() == "exact"
    assert table["protocol"].strip().startswith("chunks, each on its own")
    assert main([*words, "--each", "line"]) == 0
    assert '"line\\n"' in capsys.readouterr().out
    assert main([*words, "--each", "line", "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["part"] for row in rows] == ["line", "line", "line", "document"]
    assert sum(row["bits"] for row in rows[:3]) == pytest.approx(rows[3]["bits"])
    assert (rows[3]["kind"], rows[3]["protocol"]) == ("exact", "chunks")
    assert main([*words, "--each", "symbol", "--format", "csv"]) == 0
    table_rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(table_rows[-1]["bits"]) == pytest.approx(rows[3]["bits"])
    assert len(table_rows) == 15
    stdin = io.TextIOWrapper(io.BytesIO(b"of"))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["score", "-", "--model", str(folder), "--given", "line ", "--format", "jsonl"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["file"], row["protocol"], row["num_given"]) == ("standard input", "document", 5)


def test_the_command_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt"
    for content, named in (("", "a.txt: empty"), ("a\nb~", "line 2, column 2")):
        path.write_text(content, encoding="utf-8")
        assert main(["score", str(path), "--model", str(folder)]) == 2
        assert named in capsys.readouterr().err
    assert main(["score", str(tmp_path / "none"), "--model", str(folder)]) == 2
    assert "No such file" in capsys.readouterr().err
