"""Protocol lines: each line of a text is a sequence with its own end."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from folders import SETTINGS

from dflow import hf
from dflow.cli import main
from dflow.config import InputError
from dflow.data import DataConfig, Text, Tokenizer, load, sets
from dflow.data.own_text import records, repeated_lines

NAMES = [f"{first}{last} {number}" for number in range(10) for first in ("An", "Ba", "Co") for last in "abcd"]


def write(path: Path, *lines: str, end: str = "\n") -> str:
    path.write_bytes(("".join(line + end for line in lines)).encode())
    return str(path)


def spelled(text: Text, tokenizer: Tokenizer) -> list[str]:
    assert text.lengths is not None
    return [tokenizer.decode(row[:n].long()) for row, n in zip(text.ids, text.lengths, strict=True)]


def lines_of(config: DataConfig, length: int | None = None) -> dict[str, list[str]]:
    corpus = load(config, length=length)
    return {split: spelled(corpus.split(split), corpus.tokenizer) for split in ("train", "valid", "test")}


def test_lines_are_dealt_whole_and_shuffled(tmp_path: Path) -> None:
    path = write(tmp_path / "names.txt", *NAMES)
    config = DataConfig(path, protocol="lines", valid=0.2, test=0.2)
    dealt = lines_of(config)
    assert [len(dealt[split]) for split in dealt] == [72, 24, 24]
    assert sorted(chain(*dealt.values())) == sorted(NAMES)
    assert len({line[-1] for line in dealt["test"]}) > 6  # not the end of a sorted file
    corpus = load(config)
    assert sorted(spelled(corpus.split("all"), corpus.tokenizer)) == sorted(NAMES)
    assert "\n" not in corpus.tokenizer.decode(torch.arange(corpus.tokenizer.size))
    assert lines_of(DataConfig(path, protocol="lines", split_by="tail"))["test"] == NAMES[-6:]


def test_the_end_of_a_line_counts_as_a_character(tmp_path: Path) -> None:
    text = load(DataConfig(write(tmp_path / "a.txt", *["ab", "abcd"] * 20), protocol="lines")).train
    assert text.num_characters == text.num_symbols == int(text.lengths.sum())
    assert text.characters_per_symbol == 1
    assert text.length_counts(4)[[2, 4]].sum() == len(text.ids) == 36


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    lines = ["  ab ", "", "x" * 9, "\t", "abc", ""]
    path = write(tmp_path / "train.txt", *lines)
    write(tmp_path / "valid.txt", "ab")
    write(tmp_path / "test.txt", "ba", "")
    corpus = load(DataConfig(str(Path(path).parent), protocol="lines"), length=8)
    assert spelled(corpus.train, corpus.tokenizer) == ["  ab ", "\t", "abc"]  # white space is kept
    assert (corpus.train.dropped, corpus.train.dropped_characters, corpus.train.empty) == (1, 9, 2)
    assert corpus.about()["notes"][-2:] == [
        "Lines of the train data that were left out: 1 longer than model.length=8 (9 characters), 2 empty.",
        "Lines of the test data that were left out: 0 longer than model.length=8 (0 characters), 1 empty.",
    ]
    everything = corpus.split("all")
    assert (len(everything.ids), everything.dropped, everything.empty) == (5, 1, 3)
    assert corpus.about()["splits"]["train"]["lines"] == 3


def test_the_limit_is_one_of_symbols(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", *["é" * 4, "abc"] * 20)
    corpus = load(DataConfig(path, protocol="lines", tokenizer="bytes"), length=7)
    assert set(spelled(corpus.train, corpus.tokenizer)) == {"abc"}


def test_line_ends_crlf_and_files_of_other_names(tmp_path: Path) -> None:
    for number, name in enumerate(("a.smi", "b.txt", "c.log")):
        write(tmp_path / name, *NAMES[40 * number : 40 * number + 40], end="\r\n")
    config = DataConfig(str(tmp_path), protocol="lines")
    assert sorted(chain(*lines_of(config).values())) == sorted(NAMES)
    assert any("CRLF that were read as LF: 120" in note for note in load(config).notes)
    assert load(config).sources["test"] == ("a.smi", "b.txt", "c.log")
    assert load(DataConfig(str(tmp_path))).sources["train"] == ("b.txt",)  # a stream is one of texts
    by_files = load(DataConfig(str(tmp_path), protocol="lines", split_by="files", valid=0.3, test=0.3))
    assert sorted(names for split in by_files.sources.values() for names in split) == [
        "a.smi",
        "b.txt",
        "c.log",
    ]


def test_lines_that_are_in_several_splits_are_named() -> None:
    notes = repeated_lines({"train": "ann\nbob\n\n", "valid": "cid\n\n", "test": "bob\nbob\ncid\n"})
    assert notes == [
        "Lines of the test data that are lines of the train data too: 2 ('bob').",
        "Lines of the test data that are lines of the valid data too: 1 ('cid').",
    ]


def test_fasta(tmp_path: Path) -> None:
    assert records("\n>a\nAC\nGT \n>b\n\n>c > d\nA A") == ["ACGT", "", "AA"]
    rows = [f">r{i} of a gene\nACGT\nAC{'GT' * (i % 3)}\n" for i in range(40)] + [">none"]
    path = write(tmp_path / "genes.fa", *rows)
    corpus = load(DataConfig(path, protocol="lines", lowercase=True))
    assert set(spelled(corpus.split("all"), corpus.tokenizer)) == {"acgtac", "acgtacgt", "acgtacgtgt"}
    assert any("read as FASTA" in note and "1 (genes.fa), with 41 records" in note for note in corpus.notes)
    assert sum(corpus.split(split).empty for split in ("train", "valid", "test")) == 1


def test_the_names_of_unicode() -> None:
    text = sets.read_unicode()
    assert text.startswith("SPACE\nEXCLAMATION MARK\n")
    assert "LATIN SMALL LETTER E WITH ACUTE\n" in text
    assert "\nCJK UNIFIED IDEOGRAPH-4E00" not in text
    assert sets.check("unicode")[0].size == len(text)


@pytest.mark.parametrize(
    ("settings", "length", "match"),
    [
        ({}, 3, r"names.txt \(train\): no line of 1 to 3 symbols, the shortest has 5; set model.length"),
        ({"name": "text8"}, 8, "text8 has no lines: use protocol 'stream'"),
        ({"name": "synthetic/full_rank"}, 8, "is drawn: leave out protocol"),
        ({"store": "s"}, 8, r"names.txt, protocol 'lines': leave out store, or protocol"),
        ({"valid": 0.001}, 8, r"120 lines are too few for valid=0.001 and test=0.05"),
        ({"name": "binary"}, 8, "binary: not UTF-8 at byte offset 1"),
        ({"name": "unicode", "split_by": "files"}, 64, "unicode is one text"),
    ],
)  # fmt: skip
def test_errors_name_the_way_out(
    settings: dict[str, object], length: int, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "names.txt", *NAMES)
    (tmp_path / "binary").write_bytes(b"a\xff\x00b")
    with pytest.raises(InputError, match=match):
        load(DataConfig(**{"name": "names.txt", "protocol": "lines", **settings}), length=length)  # type: ignore[arg-type]


def test_a_stream_is_not_dealt_by_lines() -> None:
    with pytest.raises(InputError, match="split_by=lines deals whole lines: set protocol to lines"):
        DataConfig("a.txt", split_by="lines")


def test_from_training_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "names.txt", *NAMES, "x" * 40, "")
    out = str(tmp_path / "out")
    recipe = {
        "data": {"name": path, "protocol": "lines"},
        "model": {"family": "grouped", "length": 8, **SETTINGS["grouped"]},
        "train": {"steps": 3, "batch_size": 4, "eval_chunks": 4, "samples": 2, "trackers": []},
        "output": out,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "1 longer than model.length=8 (40 characters)" in printed
    assert hf.load(out).length_counts[7] + hf.load(out).length_counts[5] > 0
    assert main(["train", "--resume", out]) == 0

    capsys.readouterr()
    assert main(["evaluate", "--model", out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"].startswith("lines, each on its own with its length, the end counted")
    assert result["round_trip"] is True

    other = write(tmp_path / "other.txt", *NAMES[:7], "Coc 1234567890")
    assert main(["evaluate", "--model", out, "--data", other]) == 0
    assert "1 too long and 0 empty ones left out" in capsys.readouterr().out

    assert main(["generate", "--model", out, "--samples", "7"]) == 0
    drawn = capsys.readouterr().out.splitlines()
    assert len(drawn) == 7
    assert max(map(len, drawn)) <= 8

    packed, back = str(tmp_path / "names.dfl"), tmp_path / "back"
    assert main(["compress", path, "--model", out, "--output", packed]) == 0
    assert main(["decompress", packed, "--model", out, "--output", str(back)]) == 0
    assert (back / "names.txt").read_bytes() == Path(path).read_bytes()


def test_models_of_two_lengths_are_compared_on_the_same_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "names.txt", *NAMES, *["a longer one"] * 30)
    folders = []
    for family, length in (("grouped", 8), ("lstm", 16)):
        folders.append(str(tmp_path / family))
        recipe = {
            "data": {"name": path, "protocol": "lines"},
            "model": {"family": family, "length": length, **SETTINGS[family]},
            "train": {"steps": 1, "batch_size": 4, "eval_chunks": 4, "samples": 0, "trackers": []},
            "output": folders[-1],
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    capsys.readouterr()
    assert main(["compare", *folders, "--rounds", "1", "--length", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["evaluation"]["num_chunks"] == rows[1]["evaluation"]["num_chunks"]
