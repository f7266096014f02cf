"""Texts kept as symbols on the disk: the same as in memory, made whole or not at all, else refused."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from folders import TEXT

from dflow.config import InputError
from dflow.data import Corpus, DataConfig, load, stores

UNICODE = "\ufeffzwölf Boxkämpfer\r\njagen\r\n\r\nEva 𝄞 quer über den Sylter Deich.\r\n" * 40


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a size that cuts characters and line breaks in two."""
    monkeypatch.setattr(stores, "_PIECE", 7)


def both(path: Path, folder: Path, **settings: Any) -> tuple[Corpus, Corpus]:
    name = str(path)
    return load(DataConfig(name, **settings)), load(DataConfig(name, store=str(folder / "store"), **settings))


@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
@pytest.mark.parametrize("packed", ["", ".xz", ".gz"])
def test_it_is_the_text_in_memory(tokenizer: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"text.txt{packed}"
    data = UNICODE.encode()
    path.write_bytes({"": data, ".xz": lzma.compress(data), ".gz": gzip.compress(data)}[packed])
    memory, stored = both(path, tmp_path, tokenizer=tokenizer, lowercase=True, valid=0.1)
    assert stored.checksum == memory.checksum
    assert stored.num_characters == memory.num_characters
    for name in ("train", "valid", "test"):
        a, b = memory.split(name), stored.split(name)
        assert memory.tokenizer.decode(a.ids) == stored.tokenizer.decode(b.ids)
        assert (a.num_characters, a.num_symbols) == (b.num_characters, b.num_symbols)
        x, y = a.chunks(4, 3)[0], b.chunks(4, 3)[0]
        assert memory.tokenizer.decode(x[2]) == stored.tokenizer.decode(y[2])
        assert len(y) == 3
    crops = [c.train.crops(3, 5, torch.Generator().manual_seed(0))[0] for c in (memory, stored)]
    assert memory.tokenizer.decode(crops[0][1]) == stored.tokenizer.decode(crops[1][1])
    order = torch.tensor([memory.tokenizer.encode(stored.tokenizer.decode([i]))[0] for i in range(5)])
    if tokenizer == "characters":
        assert torch.equal(
            stored.train.marginals(stored.tokenizer.size)[:5],
            memory.train.marginals(memory.tokenizer.size)[order],
        )


def test_a_folder_and_pieces_of_sentencepiece(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text(TEXT)
    (folder / "a.txt").write_text(TEXT.upper())
    _, stored = both(folder, tmp_path, tokenizer="sentencepiece", vocab_size=320)
    parts = [stored.tokenizer.decode(stored.split(n).ids) for n in ("train", "valid", "test")]
    assert "".join(parts) == TEXT.upper() + "\n" + TEXT


def test_it_is_made_once_and_lies_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    first, again = both(path, tmp_path)[1], DataConfig(str(path), store=str(tmp_path / "store"))
    monkeypatch.setattr(stores, "_make", None)
    second = load(again)
    assert torch.equal(first.train.ids, second.train.ids)
    # Writing to what is mapped does not reach the file.
    second.train.ids[0] ^= 1
    assert not torch.equal(load(again).train.ids, second.train.ids)
    assert torch.equal(load(again).train.ids, first.train.ids)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path, store = tmp_path / "text.txt", tmp_path / "store"
    path.write_text(TEXT)
    config = DataConfig(str(path), store=str(store))
    corpus = load(config)
    with pytest.raises(InputError, match="another text, or of one that has changed"):
        load(DataConfig(str(path), store=str(store), lowercase=True))
    with pytest.raises(InputError, match="spelled in other symbols"):
        load(config, type(corpus.tokenizer)([*"ab"]))
    (store / "valid.bin").write_bytes(b"abc")
    with pytest.raises(InputError, match=r"valid\.bin: 3 bytes, expected"):
        load(config)
    (store / "about.json").write_text("{")
    with pytest.raises(InputError, match=r"about\.json: .*damaged"):
        load(config)
    (store / "about.json").write_text(json.dumps({"source": {}}))
    with pytest.raises(InputError, match="is missing"):
        load(config)
    path.write_text(TEXT + "more")
    for wrong, message in (
        ({"protocol": "sentence"}, "streams of your own"),
        ({"store": str(tmp_path)}, "holds something else"),
    ):
        with pytest.raises(InputError, match=message):
            load(DataConfig(str(path), **{"store": str(tmp_path / "new"), **wrong}))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="streams of your own"):
        load(DataConfig("ptb", store=str(tmp_path / "new")))


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", "text.txt", "no text in it"),
        (b"a\xffb" * 9, "text.txt", r"text\.txt: not UTF-8 near byte offset 1"),
        (lzma.compress(TEXT.encode())[:-20], "text.txt.xz", r"text\.txt\.xz: damaged or truncated"),
        (b"short", "text.txt", "too few"),
        (b"aaaa" * 99, "text.txt", "at least two symbols"),
    ],
)
def test_a_text_that_cannot_be_read_leaves_nothing(
    data: bytes, name: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        load(DataConfig(str(path), store=str(tmp_path / "store")))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(repository: str, **options: Any) -> Any:
        asked.append((repository, options))
        if repository == "nobody/nothing":
            raise ConnectionError("no network")
        if repository == "a/pictures":
            return iter([{"image": 3}])

        def broken() -> Any:
            yield {"text": "some"}
            raise OSError("connection reset")

        if repository == "a/torn":
            return broken()
        return iter([{"text": f"document {i}\r\nof many", "id": i} for i in range(50)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig("hub:some/texts", store=str(tmp_path / "store"))
    corpus = load(config)
    assert asked == [("some/texts", {"split": "train", "streaming": True})] * 2
    whole = "".join(corpus.tokenizer.decode(corpus.split(n).ids) for n in ("train", "valid", "test"))
    assert whole == "".join(f"document {i}\nof many\n" for i in range(50))
    load(config)
    assert len(asked) == 2
    for name, message in (
        ("hub:nobody/nothing", "cannot be had"),
        ("hub:a/pictures", "no column 'text'"),
        ("hub:a/torn", "the stream broke off"),
        ("hub:texts", "hub:OWNER/NAME"),
    ):
        with pytest.raises(InputError, match=message):
            load(DataConfig(name, store=str(tmp_path / "other")))
    with pytest.raises(InputError, match=r"data\.store"):
        load(DataConfig("hub:some/texts"))


def test_other_processes_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(stores, "_PATIENCE", 0.1)
    config = DataConfig(str(path), store=str(tmp_path / "store"))
    with pytest.raises(InputError, match="the process that should make it does not"):
        load(config)
    monkeypatch.setenv("LOCAL_RANK", "0")
    expected = load(config)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert torch.equal(load(config).train.ids, expected.train.ids)
