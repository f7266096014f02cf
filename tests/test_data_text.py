"""Texts and corpora: crops, chunks, splits, the user's own files, and every way they can be wrong."""

from __future__ import annotations

import gzip
import lzma
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dflow.config import InputError, parse
from dflow.data import MAX_SENTENCE, Bytes, Characters, Corpus, DataConfig, Text, load
from dflow.train import load_recipe

STREAM = Text("train", torch.arange(23, dtype=torch.uint8), None, 23)
SENTENCES = Text(
    "valid", torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]], dtype=torch.uint8), torch.tensor([2, 1, 3]), 6
)
LINES = [f"line {i} of the tale, that goes on{' and on' * (i % 5)}." for i in range(100)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(folder: Path, text: str | bytes = "\n".join(LINES) + "\n", name: str = "tale.txt") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def spelled(corpus: Corpus) -> list[str]:
    return [corpus.tokenizer.decode(text.ids.long()) for text in (corpus.train, corpus.valid, corpus.test)]


# -- Text ------------------------------------------------------------------------------------------------


def test_crops_of_a_stream_are_windows_of_it() -> None:
    ids, lengths = STREAM.crops(500, 5, seeded())
    assert lengths is None
    assert ids.dtype == torch.int64
    assert ids.shape == (500, 5)
    assert (ids - ids[:, :1]).equal(torch.arange(5).expand(500, 5))
    assert set(ids[:, 0].tolist()) == set(range(19))  # every place, the last too


def test_crops_of_sentences_are_whole() -> None:
    ids, lengths = SENTENCES.crops(100, 4, seeded())
    assert isinstance(lengths, Tensor)
    known = {(1, 2, 0, 0): 2, (3, 0, 0, 0): 1, (4, 5, 6, 0): 3}
    drawn = {tuple(row): length for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)}
    assert drawn == known


@pytest.mark.parametrize("text", [STREAM, SENTENCES], ids=["stream", "sentences"])
def test_crops_depend_on_the_generator_alone(text: Text) -> None:
    first = text.crops(8, 3, seeded(1))[0]
    torch.manual_seed(99)
    text.crops(5, 3, seeded(2))
    assert text.crops(8, 3, seeded(1))[0].equal(first)
    assert not text.crops(8, 3, seeded(2))[0].equal(first)


def test_chunks_leave_the_tail() -> None:
    ids, lengths = STREAM.chunks(5)
    assert lengths is None
    assert ids.equal(torch.arange(20).reshape(4, 5))
    assert STREAM.tail(5) == 3
    assert STREAM.chunks(23)[0].shape == (1, 23)
    assert STREAM.tail(23) == 0


def test_chunks_of_sentences_are_all_of_them() -> None:
    ids, lengths = SENTENCES.chunks(4)
    assert ids.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 0]]
    assert lengths is not None
    assert lengths.tolist() == [2, 1, 3]
    assert SENTENCES.tail(4) == 0


def test_marginals_count_what_is_present() -> None:
    assert SENTENCES.marginals(8).tolist() == [0, *[1 / 6] * 6, 0]
    law = STREAM.marginals(23)
    assert law.dtype == torch.float64
    assert law.sum().item() == pytest.approx(1, abs=1e-15)
    with pytest.raises(ValueError, match="symbol 22 is outside an alphabet of K=22"):
        STREAM.marginals(22)


def test_length_counts() -> None:
    assert SENTENCES.length_counts(5).tolist() == [0, 1, 1, 1, 0, 0]
    with pytest.raises(InputError, match="sentences of 3"):
        SENTENCES.length_counts(2)
    with pytest.raises(ValueError, match="stream"):
        STREAM.length_counts(30)


def test_sizes() -> None:
    assert (STREAM.num_symbols, STREAM.longest, STREAM.characters_per_symbol) == (23, 23, 1)
    assert (SENTENCES.num_symbols, SENTENCES.longest, SENTENCES.characters_per_symbol) == (6, 3, 1)
    assert replace(STREAM, num_characters=46).characters_per_symbol == 2
    # Three ends: 15 characters in 9 symbols.
    assert replace(SENTENCES, num_characters=12).characters_per_symbol == 15 / 9


@pytest.mark.parametrize("method", ["chunks", "crops"])
def test_lengths_that_do_not_fit(method: str) -> None:
    def cut(text: Text, length: int) -> object:
        return text.chunks(length) if method == "chunks" else text.crops(2, length, seeded())

    with pytest.raises(InputError, match="the train text has 23 symbols, too few for pieces of 24"):
        cut(STREAM, 24)
    with pytest.raises(InputError, match=r"the valid text has sentences of 3 symbols.*at least 3"):
        cut(SENTENCES, 2)
    with pytest.raises(ValueError, match="length=0"):
        cut(STREAM, 0)


def test_a_batch_is_positive() -> None:
    with pytest.raises(ValueError, match="batch=0"):
        STREAM.crops(0, 3)


# -- the user's own text ---------------------------------------------------------------------------------


def test_a_file_is_split_in_order(tmp_path: Path) -> None:
    corpus = load(DataConfig(make(tmp_path), valid=0.1, test=0.2))
    text = "\n".join(LINES) + "\n"
    parts = spelled(corpus)
    assert "".join(parts) == text
    assert [len(p) for p in parts[1:]] == [int(len(text) * 0.1), int(len(text) * 0.2)]
    assert corpus.protocol == "stream"
    assert corpus.num_characters == len(text)
    assert corpus.train.ids.dtype == torch.uint8
    assert corpus.split("valid") is corpus.valid
    with pytest.raises(InputError, match="did you mean 'test'"):
        corpus.split("tests")


def test_packed_files_byte_order_marks_and_line_ends(tmp_path: Path) -> None:
    plain = load(DataConfig(make(tmp_path)))
    raw = b"\xef\xbb\xbf" + ("\r\n".join(LINES) + "\r\n").encode()
    for name, data in {"a.xz": lzma.compress(raw), "a.gz": gzip.compress(raw), "a": raw}.items():
        packed = load(DataConfig(make(tmp_path, data, name)))
        assert spelled(packed) == spelled(plain)
        assert packed.checksum == plain.checksum


def test_a_folder_is_its_texts_in_order(tmp_path: Path) -> None:
    text = "\n".join(LINES)
    make(tmp_path, text[:1000], "a/2.txt")
    make(tmp_path, text[1001:2000], "a/3.txt")
    make(tmp_path, text[2001:], "b.txt")
    make(tmp_path, b"\xff", "picture.png")
    assert text[1000] != "\n"
    parts = [text[:1000], text[1001:2000], text[2001:]]
    assert "".join(spelled(load(DataConfig(str(tmp_path))))) == "\n".join(parts)


def test_a_name_is_looked_up_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    by_setting = load(DataConfig("tale.txt", folder=str(tmp_path)))
    monkeypatch.setenv("DFLOW_DATA", str(tmp_path))
    assert load(DataConfig("tale.txt")).checksum == by_setting.checksum


def test_lower_case(tmp_path: Path) -> None:
    corpus = load(DataConfig(make(tmp_path, "ABC abc " * 50), lowercase=True))
    assert set("".join(spelled(corpus))) == set("abc ")
    assert corpus.tokenizer.size == 4


def test_characters_of_any_split_are_in_the_alphabet(tmp_path: Path) -> None:
    corpus = load(DataConfig(make(tmp_path, "ab" * 500 + "aé" * 25 + "z" * 30)))
    assert isinstance(corpus.tokenizer, Characters)
    assert corpus.tokenizer.symbols[:2] == ("a", "b")
    assert set(corpus.tokenizer.symbols) == set("abéz")
    assert corpus.train.marginals(4)[2:].sum() < 0.01


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_bits_a_character_compare_over_tokenizers(tmp_path: Path, kind: Any) -> None:
    text = "".join(f"{line} né\n" for line in LINES)
    corpus = load(DataConfig(make(tmp_path, text), tokenizer=kind, vocab_size=300))
    assert "".join(spelled(corpus)) == text
    for split in (corpus.train, corpus.valid, corpus.test):
        ratio = split.num_characters / split.num_symbols
        assert split.characters_per_symbol == pytest.approx(ratio)
        assert (ratio < 1) == (kind == "bytes")


def test_sentences_of_the_users_text(tmp_path: Path) -> None:
    long = "x" * (MAX_SENTENCE + 1)
    lines = [f"{LINES[i]}  " if i % 10 else "" for i in range(99)] + [long]
    corpus = load(DataConfig(make(tmp_path, "\n".join(lines)), protocol="sentence", valid=0.2, test=0.2))
    assert corpus.protocol == "sentence"
    assert "\n" not in corpus.tokenizer.decode(range(corpus.tokenizer.size))
    assert [split.dropped for split in (corpus.train, corpus.valid, corpus.test)] == [0, 0, 1]
    ids, lengths = corpus.test.chunks(MAX_SENTENCE)
    assert lengths is not None
    decoded = [corpus.tokenizer.decode(row[:n]) for row, n in zip(ids, lengths.tolist(), strict=True)]
    assert decoded == [line.strip() for line in lines[80:99] if line]
    assert not ids[torch.arange(MAX_SENTENCE) >= lengths[:, None]].any()


def test_a_trained_models_tokenizer_is_used(tmp_path: Path) -> None:
    name = make(tmp_path)
    tokenizer = load(DataConfig(name)).tokenizer
    other = make(tmp_path, "a tale that goes on and on.\n" * 20, "other.txt")
    assert load(DataConfig(other), tokenizer).tokenizer is tokenizer
    assert load(DataConfig(other), Bytes()).train.ids[0] == ord("a")
    foreign = make(tmp_path, "a tale that goes on.\n" * 20 + "Ω", "foreign.txt")
    with pytest.raises(InputError, match=r"foreign\.txt \(test\): symbol 'Ω' .* is not in the vocabulary"):
        load(DataConfig(foreign), tokenizer).split("test")
    # What is not asked for may hold what it will.
    assert load(DataConfig(foreign), tokenizer).valid.num_symbols > 0


def test_another_text_of_the_same_name_is_told_from_it(tmp_path: Path) -> None:
    name = make(tmp_path)
    checksum = load(DataConfig(name)).checksum
    assert load(DataConfig(name, checksum=checksum)).checksum == checksum
    (tmp_path / Path(name).name).write_text("another tale.\n" * 40)
    with pytest.raises(InputError, match="the data have changed, their checksum is sha256"):
        load(DataConfig(name, checksum=checksum))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text in it"),
        (b" \n\t\n", "no text in it"),
        (b"abcdefg", "7 characters are too few"),
        (b"a" * 100, "at least two symbols"),
        (b"good\n" * 30 + b"b\xe4d", r"tale\.txt: not UTF-8 at byte offset 151 \(0xe4"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(DataConfig(make(tmp_path, content)))


@pytest.mark.parametrize("name", ["a.xz", "a.gz"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    pack = lzma.compress if name.endswith("xz") else gzip.compress
    with pytest.raises(InputError, match=rf"{name}: damaged or truncated"):
        load(DataConfig(make(tmp_path, pack("\n".join(LINES).encode())[:-20], name)))
    with pytest.raises(InputError, match=rf"{name}: damaged or truncated"):
        load(DataConfig(make(tmp_path, b"no archive at all", name)))


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"pydok: neither a data set nor a file.*did you mean 'pydoc'"):
        load(DataConfig("pydok"))
    with pytest.raises(InputError, match=r"holds no \*\.txt file"):
        load(DataConfig(str(tmp_path)))
    with pytest.raises(InputError, match="setting 'folder' names it"):
        load(DataConfig("tale.txt", folder=str(tmp_path / "none")))
    monkeypatch.setenv("DFLOW_DATA", str(tmp_path / "none"))
    with pytest.raises(InputError, match="environment variable DFLOW_DATA names it"):
        load(DataConfig("tale.txt"))


def test_no_sentence_left(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no line of 1 to 288 characters"):
        load(DataConfig(make(tmp_path, ("x y" * 100 + "\n") * 40), protocol="sentence"))
    with pytest.raises(InputError, match="3 lines are too few"):
        load(DataConfig(make(tmp_path, "a\nb\nc\n"), protocol="sentence"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"valid": 0}, "valid=0"),
        ({"valid": 0.5, "test": 0.5}, "leave something to train on"),
        ({"vocab_size": 1}, "vocab_size=1"),
        ({"tokenizer": "words"}, "tokenizer: 'words' is not allowed"),
        ({"protocol": "line"}, "protocol: 'line' is not allowed"),
        ({"nmae": "ptb"}, "did you mean 'name'"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(DataConfig, values, "data")


# -- the embedded text -----------------------------------------------------------------------------------


def test_the_default_text_is_always_there() -> None:
    corpus = load(DataConfig())
    text = "".join(spelled(corpus))
    assert text.isascii()
    assert 300_000 < len(text) == corpus.num_characters
    assert 80 < corpus.tokenizer.size < 100
    assert isinstance(corpus.tokenizer, Characters)
    assert corpus.tokenizer.symbols[0] == " "
    assert load(DataConfig()).checksum == corpus.checksum
    assert "varies with the version of Python" in corpus.note
    assert not re.search(r"^[-=*+|~^ ]{3,}$", text, re.MULTILINE)
    assert "\n\n\n" not in text
    assert len(corpus.valid.ids) == len(corpus.test.ids) == len(text) // 20


def test_the_default_text_in_lower_case_and_in_sentences() -> None:
    lower = load(DataConfig(lowercase=True))
    assert lower.tokenizer.size < load(DataConfig()).tokenizer.size
    lines = load(DataConfig(protocol="sentence"))
    assert lines.train.longest <= MAX_SENTENCE


@pytest.mark.parametrize(
    "name", ["a" * 5000, "a/" * 3000, "~nobody-of-this-name/x.txt"], ids=["long", "deep", "user"]
)
def test_a_path_that_no_file_can_have_is_refused_like_any_other(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a data set nor a file"):
        load(DataConfig(name=name))
    recipe = {"data": {"name": name, "store": name}, "model": {"family": "lstm"}, "train": {"steps": 1}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output": str(tmp_path / "out")}))
    assert load_recipe(path).data.name == name
