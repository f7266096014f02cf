"""Tokenizers lose nothing, refuse what they cannot spell, and read only what they wrote."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflow.config import InputError
from dflow.data import Bytes, Characters, SentencePiece, Tokenizer, sets
from dflow.data import tokenizers as module

ENGLISH = sets.read_pydoc()[:40_000]
PIECES = SentencePiece.train(ENGLISH, 400)
ALL = {"characters": Characters.train(ENGLISH), "bytes": Bytes(), "sentencepiece": PIECES}
# What the sentencepiece library treats specially is drawn often.
AWKWARD = st.text(
    st.sampled_from("ab \n\t\r\0\u2581é😀<unk>\u3000\u00a0\ufeff\u2028") | st.characters(codec="utf-8")
)


@pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
def test_round_trip_of_english(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ENGLISH)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < tokenizer.size
    assert tokenizer.decode(ids) == ENGLISH
    assert tokenizer.decode(tokenizer.encode("")) == ""


@pytest.mark.parametrize("tokenizer", [Bytes(), PIECES], ids=["bytes", "sentencepiece"])
@given(text=AWKWARD)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_alphabet_round_trips(text: str) -> None:
    tokenizer = Characters.train(text, alphabet="ab")
    assert set(tokenizer.symbols) == set(text) | {"a", "b"}
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.codes(text).tolist() == [tokenizer.symbols.index(c) for c in text]


def test_long_text_goes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "abc é😀" * 5
    whole = Characters.train(text)
    monkeypatch.setattr(module, "_BLOCK", 4)
    parts = Characters.train(text)
    assert parts.symbols == whole.symbols
    assert parts.encode(text).equal(whole.encode(text))
    with pytest.raises(InputError, match=r"character 32 \(line 2, column 1\)"):
        Characters.train(text, "\n").encode(f"{text}\n!")


def test_the_most_frequent_character_is_0() -> None:
    assert Characters.train("bbbaacc", "zy").symbols == ("b", "a", "c", "y", "z")


def test_storage_is_compact() -> None:
    assert [module.compact(n) for n in (2, 256, 257, 1 << 15, 1 + (1 << 15))] == [
        np.uint8, np.uint8, np.int16, np.int16, np.int32,
    ]  # fmt: skip
    big = Characters([chr(0x4E00 + i) for i in range(300)])
    assert big.codes("\u4e00\u4f2b").dtype == np.int16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ab\nb!a",
            r"symbol '!' \(U\+0021\) at character 5 \(line 2, column 2\) is not in the vocabulary of 3",
        ),
        ("é", r"symbol 'é' \(U\+00E9\) at character 1 \(line 1, column 1\)"),
        ("ab😀", r"symbol '😀' \(U\+1F600\) at character 3"),
        ("a\udc80", r"symbol '\\udc80' \(U\+DC80\) at character 2"),
    ],
)
def test_foreign_symbols_are_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Characters(["a", "b", "\n"]).encode(text)


@pytest.mark.parametrize("tokenizer", [Bytes(), PIECES], ids=["bytes", "sentencepiece"])
def test_no_unicode_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"character 2 .* give the text as UTF-8"):
        tokenizer.encode("a\udc80")


@pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
def test_decode_passes_over_absent_entries_and_refuses_others(tokenizer: Tokenizer) -> None:
    ids = [-1, *tokenizer.encode("the end").tolist(), -1, -1]
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == "the end"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.size])
    with pytest.raises(ValueError, match="shape"):
        tokenizer.decode(torch.zeros(1, 2))


@pytest.mark.parametrize("tokenizer", [Bytes(), PIECES], ids=["bytes", "sentencepiece"])
def test_every_symbol_decodes(tokenizer: Tokenizer) -> None:
    assert all(tokenizer.decode([i]) for i in range(tokenizer.size))


@pytest.mark.parametrize(
    ("symbols", "message"),
    [(["a"], "at least two"), (["a", "bc"], "single"), (["a", ""], "single"), (["a", "a"], "twice")],
)
def test_vocabularies_are_checked(symbols: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Characters(symbols)


@pytest.mark.parametrize(("text", "size"), [("", 400), ("aaaa", 400), (ENGLISH, 100), (ENGLISH[:2000], 4000)])
def test_too_little_text_for_pieces(text: str, size: int) -> None:
    with pytest.raises(InputError, match=f"cannot learn {size} pieces"):
        SentencePiece.train(text, size)


def test_pieces_are_worth_it_and_the_same_each_time() -> None:
    assert len(PIECES.codes(ENGLISH)) < 0.7 * len(ENGLISH)
    assert SentencePiece.train(ENGLISH, 400) == PIECES


def test_a_foreign_sentencepiece_model_is_refused() -> None:
    with pytest.raises(InputError, match="not a sentencepiece model"):
        SentencePiece(b"nonsense")


@pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert type(again) is type(tokenizer)
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again.encode(ENGLISH).equal(tokenizer.encode(ENGLISH))
    assert all(again != other for other in ALL.values() if other is not tokenizer)
    assert not list(tmp_path.glob(".*"))


GOOD = {"tokenizer": "characters", "size": 2, "symbols": ["a", "b"], "model": None, "version": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer: 'words' is not allowed"),
        ({"version": 2}, "version: 2 is not allowed"),
        ({"size": 3}, "size 3 does not match the 2 symbols"),
        ({"symbols": None}, "'symbols' does not go with"),
        ({"symbols": ["a", "a"]}, "twice"),
        ({"model": "sha256:0"}, "'model' does not go with"),
        ({"tokenizer": "bytes", "symbols": None}, "size 2 does not match the 256"),
        (
            {"tokenizer": "sentencepiece", "symbols": None, "model": "sha256:0"},
            "tokenizer.model, which is missing",
        ),
        ({"merges": []}, "unknown key 'merges'"),
    ],
)
def test_foreign_vocabularies_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text(json.dumps(GOOD))
    assert Tokenizer.load(tmp_path) == Characters("ab")
    (tmp_path / "vocabulary.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / "vocabulary.json") in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Tokenizer.load(tmp_path)
    PIECES.save(tmp_path)
    vocabulary, model = tmp_path / "vocabulary.json", tmp_path / "tokenizer.model"
    model.write_bytes(PIECES.model[:-1])
    with pytest.raises(InputError, match="not the model that was saved"):
        Tokenizer.load(tmp_path)
    text = vocabulary.read_bytes()
    for damaged in (text[: len(text) // 2], b"", b"\xff\xfe"):
        vocabulary.write_bytes(damaged)
        with pytest.raises(InputError, match=r"vocabulary\.json: truncated or not JSON"):
            Tokenizer.load(tmp_path)


def cjk(n: int) -> str:
    """Sentences of 3,000 ideographs, some far more frequent than others."""
    draw = random.Random(0)
    return "".join(
        chr(0x4E00 + int(draw.paretovariate(0.3)) % 3000) + "。\n" * (i % 20 == 0) for i in range(n)
    )


@pytest.mark.parametrize("size", [300, 512, 4000])
def test_more_characters_than_pieces(size: int) -> None:
    """Those that get no piece are spelled in bytes, the others in fewer symbols than these would take."""
    text = cjk(20_000)
    assert len(set(text)) > 1000
    tokenizer = SentencePiece.train(text, size)
    assert tokenizer.size == size
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < (0.9 if size < 512 else 0.6) * len(text.encode())
    if size == 512:
        assert tokenizer.encode("。").tolist() == tokenizer.encode("。。").tolist()[:1]


def test_the_number_of_pieces_that_is_named_works() -> None:
    with pytest.raises(InputError, match=r"set vocab_size to at most (\d+), or give more text") as error:
        SentencePiece.train("hello world. " * 20, 512)
    most = int(re.findall(r"at most (\d+)", str(error.value))[0])
    assert SentencePiece.train("hello world. " * 20, most).size == most
    with pytest.raises(InputError, match=r"cannot learn 200 pieces.* to at least 260"):
        SentencePiece.train(ENGLISH, 200)
    assert SentencePiece.train(ENGLISH, 260).size == 260
