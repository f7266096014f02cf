"""Codecs that have read a training text before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from folders import TEXT, corpus_of, make_model, write_text
from test_train import recipe_file, run

from dflow import cli, compare
from dflow.compare.codecs import compare_codecs, markdown, texts
from dflow.compare.peers import Codec, text_codecs
from dflow.compare.primed import primed_codecs

CODECS = primed_codecs(TEXT.encode())
NAMES = [f"{codec.name} {codec.settings}" for codec in CODECS]


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
def test_every_text_comes_back(codec: Codec[bytes]) -> None:
    chance = random.Random(0)
    for data in (
        b"",
        b"l",
        b"line 7 of a text",
        TEXT.encode(),
        TEXT[::-1].encode(),
        chance.randbytes(1000),
        bytes(5000),
        *(chance.randbytes(chance.randrange(40)) for _ in range(20)),
    ):
        assert codec.decode(codec.encode(data), b"") == data


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
def test_a_text_like_the_training_text_takes_fewer_bytes(codec: Codec[bytes]) -> None:
    plain = min(len(other.encode(TEXT[500:900].encode())) for other in text_codecs())
    assert len(codec.encode(TEXT[500:900].encode())) < plain / 2
    assert codec.beside is not None
    assert codec.beside() > 300


def test_the_table_prices_what_was_read_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = compare_codecs(texts("t", [TEXT[500:900].encode()]), primed=CODECS, rounds=1, each=False)
    plain = [row for row in result.rows if row.size is None]
    primed = [row for row in result.rows if row.size is not None]
    assert (len(plain), len(primed)) == (9, 4)
    best = min(row.bytes for row in plain if row.bytes)
    for row in primed:
        assert row.bytes is not None
        assert row.size is not None
        assert row.break_even is not None
        assert abs(row.break_even - row.size * 400 / (best - row.bytes)) <= 1
    assert "its times include reading the training text, which takes" in markdown(result)
    file, training = tmp_path / "file.txt", tmp_path / "training.txt"
    file.write_text(TEXT[500:900], encoding="utf-8")
    training.write_text(TEXT, encoding="utf-8")
    assert cli.main(["codecs", str(file), "--together", "--rounds", "1", "--prime", str(training)]) == 0
    assert f"primed with {len(TEXT):,} bytes" in capsys.readouterr().out
    training.write_text("")
    for words, message in (
        (["--prime", str(training)], "an empty text"),
        (["--prime", "train"], "is the training part of a text in --data; name a file to prime with"),
        (["--prime", str(tmp_path / "none")], "No such file"),
    ):
        assert cli.main(["codecs", str(file), *words]) == 2
        assert message in capsys.readouterr().err


def test_lines_are_no_stream_for_compressors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(
        tmp_path, write_text(tmp_path), "ngram", {"counts": 2, "length": 32}, steps=1, samples=0
    )
    out = str(run(recipe, "data.protocol=lines"))
    assert cli.main(["compare", out, "--prime", "train"]) == 2
    assert "compressors read one stream, and this text is in lines" in capsys.readouterr().err


def test_models_and_compressors_are_in_one_table(tmp_path: Path) -> None:
    corpus = corpus_of(write_text(tmp_path))
    train, test = (corpus.tokenizer.decode(text.ids) for text in (corpus.train, corpus.test))
    contestants = [compare.Contestant("grouped", make_model("grouped", corpus.tokenizer.size), corpus.test)]
    primed = primed_codecs(train.encode())
    plain = compare.compare(contestants, batch_size=2, rounds=1, limit=5)
    result = compare.with_compressors(plain, test, primed)
    scored = test[: result.rows[0].evaluation.num_symbols]
    assert 0 < len(scored) < len(test)
    for codec, row in zip(primed, result.compressors, strict=True):
        assert row.bits == 8 * len(codec.encode(scored.encode())) / len(scored)
    table = compare.markdown(result)
    assert f"| PPMd {primed[0].settings} |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert "of one file, decoded and compared" in table
    assert compare.plot(result) != compare.plot(plain)
