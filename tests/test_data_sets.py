"""Known sets are found, fetched, checked by checksum and split by their protocols."""

from __future__ import annotations

import gzip
import lzma
import sys
import time
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dflow.config import InputError
from dflow.data import DataConfig, Text, check, list_sets, load, prepare, sets
from dflow.data.files import digest, write

WORDS = {
    "train": b" the <unk> 's N cats \n <unk> sat on mr. b \n \n" + b" a cat sat \n" * 10,
    "valid": b" N cats sat \n",
    "test": b" the cat <unk> on \n " + b"cat " * 80 + b"\n the end \n",
}
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
PROSE = ("the cat sat on the mat and so on and on " * 40).encode()


def characters(words: bytes) -> bytes:
    """Mikolov's character file for a word file: a space between symbols, ``_`` for the space."""
    lines = [line.strip().replace(" ", "_") for line in words.decode().split("\n")[:-1]]
    return "\n ".join(" ".join(line) for line in lines).encode() + b"\n"


def known(name: str, data: bytes, algorithm: str = "sha256") -> sets.KnownFile:
    return sets.KnownFile(name, len(data), digest(data, algorithm))


@pytest.fixture(autouse=True)
def small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known sets, made small."""
    whole = sets.text8(known("text8", PROSE, "md5"), (1000, 1300))
    prefix = sets.text8_prefix(known("text8-prefix", PROSE[:500]), (400, 450), whole)
    for small in (small_ptb(), whole, prefix):
        monkeypatch.setitem(sets.KNOWN, small.name, small)


def small_ptb() -> sets.KnownSet[sets.Splits]:
    return sets.ptb(
        [known(f"ptb.char.{split}.txt", characters(data)) for split, data in WORDS.items()],
        [known(f"ptb.{split}.txt", data) for split, data in WORDS.items()],
    )


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hub's client, which reaches nothing until a test fills the answers."""
    answers: dict[str, Any] = {}

    def load_dataset(repository: str, revision: str | None = None) -> Any:
        if (repository, revision) not in answers:
            raise ConnectionError("no network\nhere")
        return answers[repository, revision]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return answers


def put_ptb(
    folder: Path, kind: str = "char", pack: Callable[[bytes], bytes] = bytes, suffix: str = ""
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, data in WORDS.items():
        name = f"ptb.{'char.' if kind == 'char' else ''}{split}.txt{suffix}"
        (folder / name).write_bytes(pack(characters(data) if kind == "char" else data))


def spelled(config: DataConfig) -> list[str]:
    corpus = load(config)
    return [corpus.tokenizer.decode(text.ids.long()) for text in (corpus.train, corpus.valid, corpus.test)]


def rows(text: Text) -> list[list[int]]:
    ids, lengths = text.chunks(288)
    assert lengths is not None
    return [row[:n].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]


# -- Penn Treebank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize(
    ("place", "pack", "suffix"),
    [("", bytes, ""), ("ptb", lzma.compress, ".xz"), ("", gzip.compress, ".gz")],
    ids=["plain", "xz", "gz"],
)
def test_ptb_stream(tmp_path: Path, kind: str, place: str, pack: Any, suffix: str) -> None:
    put_ptb(tmp_path / place, kind, pack, suffix)
    train, valid, test = spelled(DataConfig("ptb", folder=str(tmp_path)))
    assert train == "the <unk> 's N cats\n<unk> sat on mr. b\n\n" + "a cat sat\n" * 10
    assert valid == "N cats sat\n"
    assert test == f"the cat <unk> on\n{'cat ' * 79}cat\nthe end\n"


@pytest.mark.parametrize("kind", ["char", "word"])
def test_ptb_sentences(tmp_path: Path, kind: str) -> None:
    put_ptb(tmp_path, kind)
    corpus = load(DataConfig("ptb", protocol="sentence", folder=str(tmp_path)))
    assert corpus.protocol == "sentence"
    assert [corpus.tokenizer.decode(row) for row in rows(corpus.test)] == ["the cat <unk> on", "the end"]
    assert (corpus.train.dropped, corpus.test.dropped) == (
        0,
        1,
    )  # 319 characters; an empty line is no sentence
    assert len(rows(corpus.train)) == 12


def test_half_of_the_character_files_is_not_enough(tmp_path: Path) -> None:
    put_ptb(tmp_path)
    (tmp_path / "ptb.char.valid.txt").unlink()
    with pytest.raises(InputError, match="ptb: not in a local folder"):
        load(DataConfig("ptb", folder=str(tmp_path)))
    put_ptb(tmp_path, "word")
    assert spelled(DataConfig("ptb", folder=str(tmp_path)))[1] == "N cats sat\n"


# -- text8 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "zip", "xz", "under text8"])
def test_text8(tmp_path: Path, form: str) -> None:
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
            archive.writestr("text8", PROSE)
    elif form == "under text8":
        (tmp_path / "text8").mkdir()
        (tmp_path / "text8" / "text8").write_bytes(PROSE)
    else:
        data = lzma.compress(PROSE) if form == "xz" else PROSE
        (tmp_path / ("text8.xz" if form == "xz" else "text8")).write_bytes(data)
    config = DataConfig("text8", folder=str(tmp_path))
    assert [len(part) for part in spelled(config)] == [1000, 300, 300]
    assert "".join(spelled(config)).encode() == PROSE
    corpus = load(config)
    assert sorted(corpus.tokenizer.decode(range(27))) == sorted(ALPHABET)  # letters that it lacks, too
    # The prefix is cut from the whole where it is not there by itself.
    prefix = load(replace(config, name="text8-prefix"))
    assert [len(text.ids) for text in (prefix.train, prefix.valid, prefix.test)] == [400, 50, 50]
    assert "not comparable" in prefix.note


def test_an_archive_without_text8(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("enwik8", PROSE)
    with pytest.raises(InputError, match=r"text8\.zip: holds no file 'text8'"):
        load(DataConfig("text8", folder=str(tmp_path)))
    (tmp_path / "text8.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"text8\.zip: damaged"):
        load(DataConfig("text8", folder=str(tmp_path)))


# -- what is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [PROSE[:-1], PROSE[:-1] + b"x", b""], ids=["short", "changed", "empty"])
def test_another_content_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "text8").write_bytes(data)
    with pytest.raises(InputError) as caught:
        load(DataConfig("text8", folder=str(tmp_path)))
    message = str(caught.value)
    for part in (
        str(tmp_path / "text8"),
        f"{len(PROSE):,} bytes",
        digest(PROSE, "md5"),
        digest(data, "md5"),
        "replace it",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["ptb", "text8", "text8-prefix"])
def test_without_files_and_network(tmp_path: Path, name: str) -> None:
    for folder in (None, str(tmp_path)):
        with pytest.raises(
            InputError, match=r"ConnectionError: no network here.*put .* into a folder.*DFLOW_DATA"
        ):
            load(DataConfig(name, folder=folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig("text8", protocol="sentence"), "no lines"),
        (DataConfig("ptb", lowercase=True), "leave out lowercase"),
        (DataConfig("text8", valid=0.1), "splits and a spelling of its own"),
    ],
)
def test_settings_that_a_known_set_has_itself(config: DataConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(config)


# -- the hub ---------------------------------------------------------------------------------------------


def fill(hub: dict[str, Any]) -> None:
    names = {"train": "train", "valid": "validation", "test": "test"}
    hub["ptb-text-only/ptb_text_only", "refs/convert/parquet"] = {
        names[split]: {"sentence": [line.strip() for line in data.decode().split("\n")[:-1]]}
        for split, data in WORDS.items()
    }
    text = PROSE.decode()
    parts = {"train": text[:1000], "validation": text[1000:1300], "test": text[1300:]}
    hub["afmck/text8", None] = {split: {"text": [part]} for split, part in parts.items()}


@pytest.fixture
def hub_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Word files without an empty line, like the real ones: the hub's rows do not keep how it was spelled."""
    for split, data in WORDS.items():
        monkeypatch.setitem(WORDS, split, data.replace(b"\n \n", b"\n"))
    monkeypatch.setitem(sets.KNOWN, "ptb", small_ptb())


@pytest.mark.usefixtures("hub_words")
def test_the_hub_gives_the_same_text(hub: dict[str, Any], tmp_path: Path) -> None:
    fill(hub)
    put_ptb(tmp_path, "word")
    (tmp_path / "text8").write_bytes(PROSE)
    for name in ("ptb", "text8", "text8-prefix"):
        assert load(DataConfig(name)).checksum == load(DataConfig(name, folder=str(tmp_path))).checksum


@pytest.mark.usefixtures("hub_words")
def test_the_hub_is_checked_too(hub: dict[str, Any]) -> None:
    fill(hub)
    hub["afmck/text8", None]["test"]["text"][0] += "x"
    with pytest.raises(InputError, match="the hub's text8: expected"):
        load(DataConfig("text8"))
    hub["ptb-text-only/ptb_text_only", "refs/convert/parquet"]["test"]["sentence"].pop()
    with pytest.raises(InputError, match=r"the hub's ptb\.test\.txt: expected"):
        load(DataConfig("ptb"))


@pytest.mark.usefixtures("hub_words")
@pytest.mark.parametrize("name", ["ptb", "text8", "text8-prefix"])
def test_prepare(hub: dict[str, Any], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "folder"
    with pytest.raises(InputError, match="cannot be had"):
        prepare(name, folder)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    fill(hub)
    done = prepare(name, folder)
    hub.clear()
    assert prepare(name, folder) == done == check(name, folder)
    assert load(DataConfig(name, folder=str(folder))).name == name
    states = {row.name: row.state for row in list_sets(folder)}
    assert states["pydoc"] == "built in"
    assert {n for n, state in states.items() if state == "found"} == {name}
    monkeypatch.setenv("DFLOW_DATA", str(folder))
    assert check(name) == done
    target = Path(done[0].file)
    target.write_bytes(target.read_bytes()[1:])
    with pytest.raises(InputError, match="damaged or another version"):
        check(name)


def test_what_cannot_be_prepared_or_checked(tmp_path: Path) -> None:
    assert prepare("pydoc")[0].size == check("pydoc")[0].size > 300_000
    with pytest.raises(InputError, match="did you mean 'text8'"):
        check("text9")
    with pytest.raises(InputError, match="no folder to put it in"):
        prepare("ptb")
    with pytest.raises(InputError, match=r"no files in any folder.*dflow data prepare ptb"):
        check("ptb")
    with pytest.raises(InputError, match=f"no files in {tmp_path}"):
        check("ptb", tmp_path)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_python_without_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="comes without its help texts"):
        load(DataConfig())


# -- the real files --------------------------------------------------------------------------------------


@pytest.fixture
def real(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.undo()
    return real_data


def present(name: str, folder: Path) -> str:
    if sets.KNOWN[name].local(folder) is None:
        pytest.skip(f"no {name} in {folder}")
    return str(folder)


def test_real_ptb(real: Path) -> None:
    folder = present("ptb", real)
    start = time.perf_counter()
    corpus = load(DataConfig("ptb", folder=folder))
    assert time.perf_counter() - start < 3
    splits = (corpus.train, corpus.valid, corpus.test)
    assert [text.num_symbols for text in splits] == [5_017_482, 393_042, 442_423]
    assert corpus.tokenizer.size == 50
    sentences = load(DataConfig("ptb", protocol="sentence", folder=folder))
    assert sentences.tokenizer.size == 49
    assert sentences.test.dropped == 26
    assert len(sentences.test.ids) == 3761 - 26


def test_real_ptb_characters_are_derived_from_the_words(real: Path) -> None:
    paths = [sets.files.find(real, file.name, "ptb") for file in (*sets.PTB_CHARACTERS, *sets.PTB_WORDS)]
    if None in paths:
        pytest.skip(f"character and word files of ptb are not both in {real}")
    data = [sets.files.read(path) for path in paths if path]
    for chars, words in zip(data[:3], data[3:], strict=True):
        assert sets.ptb_from_words(words) == sets.ptb_from_characters(chars)
        assert "".join(f" {line.strip()} \n" for line in words.decode().split("\n")[:-1]).encode() == words


@pytest.mark.parametrize(
    ("name", "sizes"), [("text8", [90, 5, 5]), ("text8-prefix", [6.2, 0.169456, 0.169456])]
)
def test_real_text8(real: Path, name: str, sizes: list[float]) -> None:
    corpus = load(DataConfig(name, folder=present(name, real)))
    splits = (corpus.train, corpus.valid, corpus.test)
    assert [len(text.ids) for text in splits] == [round(n * 1e6) for n in sizes]
    assert corpus.tokenizer.size == 27
    assert corpus.train.ids.dtype == torch.uint8
