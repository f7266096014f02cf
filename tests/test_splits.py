"""Which data are trained on: names of splits, pools, files and blocks; what is told and kept; all scored."""

from __future__ import annotations

import gzip
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from folders import LENGTH, make_model, write_model
from PIL import Image

from dflow import cli
from dflow.config import InputError
from dflow.data import (
    Bytes,
    Corpus,
    DataConfig,
    ImageConfig,
    SentencePiece,
    Text,
    Tokenizer,
    files,
    load,
    load_images,
    splits,
)
from dflow.evaluate import evaluate
from dflow.train import load_recipe, train
from dflow.train.tasks import task_of

APPLES, VALID, TEST = "apple pear plum\n" * 60, "VALID is held out\n" * 20, "TEST is held back\n" * 20


def put(folder: Path, **texts: str | bytes) -> Path:
    """Files by name; a double underscore is a slash, and a single one before a suffix a dot."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def parts(corpus: Corpus) -> list[str]:
    return [corpus.tokenizer.decode(corpus.split(name).ids) for name in ("train", "valid", "test")]


LAYOUTS = [
    ("train.txt", "valid.txt", "test.txt"),
    ("TRAIN.TXT", "Dev.Txt", "Testing.TXT"),
    ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    ("ptb.train.txt", "ptb.eval.txt", "ptb.tst.txt"),
    ("corpus-train.txt", "corpus-validation.txt", "corpus_test.txt"),
    ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"),
    ("text.train", "text.val", "text.test"),
    ("Train/a/x.txt", "VAL/x.txt", "test/b/c/x.txt"),
    ("en/trn/x.txt", "en/development/x.txt", "en/tests/x.txt"),
    ("training/test_of_time.txt", "devset/x.txt", "testData/x.txt"),
    ("trainA/x.txt", "valA/x.txt", "testA/x.txt"),
]


def test_folders_that_are_links_are_read(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", **{"x.txt": VALID})
    put(tmp_path / "data", **{"train/x.txt": APPLES, "test.txt": TEST})
    (tmp_path / "data" / "valid").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "train" / "loop").symlink_to(tmp_path / "data")
    assert parts(load(DataConfig(str(tmp_path / "data")))) == [APPLES, VALID, TEST]
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match="data/valid: a link to what is not there; correct the link or remove"
    ):
        load(DataConfig(str(tmp_path / "data")))


def test_an_empty_file_of_a_split_is_named(tmp_path: Path) -> None:
    put(tmp_path, **{"train.txt": APPLES, "valid.txt": "", "test.txt": TEST})
    with pytest.raises(InputError, match=r"valid\.txt: no text in it \(valid\)"):
        load(DataConfig(str(tmp_path)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
@pytest.mark.parametrize("store", [False, True])
def test_names_of_texts_tell_the_splits(layout: tuple[str, str, str], store: bool, tmp_path: Path) -> None:
    put(tmp_path / "d", **dict(zip(layout, (APPLES, VALID, TEST), strict=True)))
    config = DataConfig(str(tmp_path / "d"), store=str(tmp_path / "store") if store else None)
    corpus = load(config)
    assert parts(corpus) == [APPLES, VALID, TEST]
    assert [list(corpus.sources[s]) for s in splits.SPLITS] == [[name] for name in layout]
    assert not corpus.pooled
    # The border is part of what the checksum tells.
    moved = {layout[0]: APPLES + VALID[:18], layout[1]: VALID[18:], layout[2]: TEST}
    put(tmp_path / "moved", **moved)
    assert load(DataConfig(str(tmp_path / "moved"))).checksum != corpus.checksum
    assert load(DataConfig(str(tmp_path / "d"))).checksum == corpus.checksum


def test_packed_texts_of_a_folder_are_read(tmp_path: Path) -> None:
    put(tmp_path, **{"train.txt.GZ": gzip.compress(APPLES.encode()), "val.txt": VALID, "test.txt": TEST})
    assert parts(load(DataConfig(str(tmp_path)))) == [APPLES, VALID, TEST]


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["train.txt", "extra.txt"], r"extra\.txt, beside train\.txt, may be .* rename it"),
        (["train/a.txt", "more/deep/a.txt"], r"more, beside train, may be .* move it away"),
        (["train/a.txt", "holdout/a.txt"], r"holdout/a\.txt, beside train,"),
        (["a.txt", "held-out.txt"], r"held-out\.txt may be training, validation or test data"),
        (["train/a.txt", "train/valid.txt"], r"train/valid\.txt, beside train,"),
        (["train_test.txt", "b.txt"], r"train_test\.txt may be"),
        (
            ["valid.txt", "test.txt"],
            r"holds valid\.txt \(valid\) and test\.txt \(test\), and nothing .*train",
        ),
        (["a.txt", "test.txt"], r"a\.txt, beside test\.txt, may be"),
    ],
)
def test_what_is_not_clear_is_refused(names: list[str], named: str, tmp_path: Path) -> None:
    put(tmp_path, **{name: APPLES + name for name in names})
    for name in names:
        pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
        Image.fromarray(pixels).save((tmp_path / name).with_suffix(".png"))
    with pytest.raises(InputError, match=named):
        load(DataConfig(str(tmp_path)))
    with pytest.raises(InputError, match=named.replace("txt", "png")):
        load_images(ImageConfig(str(tmp_path)))


def test_a_missing_split_is_cut_off_the_training_text(tmp_path: Path) -> None:
    put(tmp_path / "a", **{"train.txt": APPLES, "test.txt": TEST})
    corpus = load(DataConfig(str(tmp_path / "a"), valid=0.1))
    assert parts(corpus) == [APPLES[:864], APPLES[864:], TEST]
    assert "No name tells the validation data" in corpus.notes[0]
    assert not corpus.pooled
    put(tmp_path / "b", **{"train.txt": APPLES, "valid.txt": VALID})
    for store in (None, str(tmp_path / "store")):
        corpus = load(DataConfig(str(tmp_path / "b"), test=0.1, store=store))
        assert parts(corpus) == [APPLES[:864], VALID, APPLES[864:]]
        assert corpus.tokenizer.decode(corpus.split("all").ids) == APPLES + VALID
        assert corpus.pooled
    assert corpus.checksum == load(DataConfig(str(tmp_path / "b"), test=0.1)).checksum
    with pytest.raises(InputError, match="has a split of its own for valid: leave valid out"):
        load(DataConfig(str(tmp_path / "b"), valid=0.1))


def test_without_names_of_splits_a_folder_is_one_pool(tmp_path: Path) -> None:
    put(tmp_path, **{"a.txt": APPLES, "b.TXT": VALID.lower(), "contest.txt": TEST.lower()})
    put(tmp_path, **{"._a.txt": "hidden", ".ipynb_checkpoints/a.txt": "hidden", "__MACOSX/a.txt": "hidden"})
    put(tmp_path, **{".DS_Store": "x", "notes.md": "x", "more.md": "x", "data.jsonl": "x"})
    corpus = load(DataConfig(str(tmp_path)))
    whole = "\n".join([APPLES, VALID.lower(), TEST.lower()])
    assert "".join(parts(corpus)) == whole
    assert corpus.tokenizer.decode(corpus.split("all").ids) == whole
    assert corpus.checksum == files.digest(whole.encode())
    assert corpus.pooled
    notes = " ".join(corpus.notes)
    assert "of other kinds: 3 (2 with .md, 1 with .jsonl; data.jsonl, more.md" in notes
    assert "their folders are hidden: 3." in notes
    assert "its 3 files are one pool" in notes
    # The tail is of the last file alone, and that is told.
    assert "validation and test data are the end of the joined text, from contest.txt," in notes
    assert corpus.sources["train"] == ("a.txt", "b.TXT", "contest.txt")
    assert corpus.sources["valid"] == corpus.sources["test"] == ("contest.txt",)


def test_whole_files_and_blocks_are_dealt_on_wish(tmp_path: Path) -> None:
    texts = {f"{i:02}.txt": f"{chr(97 + i)}{i:02}\n" * 50 for i in range(20)}
    put(tmp_path / "d", **texts)
    config = DataConfig(str(tmp_path / "d"), split_by="files", valid=0.1, test=0.1)
    corpus = load(config)
    files_of = {split: list(corpus.sources[split]) for split in splits.SPLITS}
    assert sorted(name for names in files_of.values() for name in names) == sorted(texts)
    # Pinned: results depend on it.
    assert [len(files_of[s]) for s in splits.SPLITS] == [16, 2, 2]
    assert parts(corpus) == ["\n".join(texts[n] for n in files_of[s]) for s in splits.SPLITS]
    stored = load(DataConfig(config.name, split_by="files", valid=0.1, test=0.1, store=str(tmp_path / "s")))
    assert parts(stored) == parts(corpus)
    assert stored.checksum == corpus.checksum
    blocks = load(DataConfig(config.name, split_by="blocks", valid=0.1, test=0.1))
    whole = "\n".join(texts.values())
    assert blocks.checksum == files.digest(whole.encode())
    cuts = [len(whole) * k // 20 for k in range(21)]
    test = "".join(whole[b - (b - a) // 10 : b] for a, b in pairwise(cuts))
    assert parts(blocks)[2] == test
    assert set(test) - set("0123456789\n") == set("abcdefghijklmnopqrst")
    assert sum(map(len, parts(blocks))) == len(whole)
    with pytest.raises(InputError, match=r"data\.split_by: blocks does not go with data.store"):
        load(DataConfig(config.name, split_by="blocks", store=str(tmp_path / "t")))
    with pytest.raises(InputError, match="needs three files at least, found 1"):
        load(DataConfig(str(tmp_path / "d" / "00.txt"), split_by="files"))


def test_line_ends_and_equal_files_are_told(tmp_path: Path) -> None:
    put(tmp_path, **{"train/a.txt": APPLES.replace("\n", "\r\n"), "train/b.txt": TEST, "test/c.txt": TEST})
    for store in (None, str(tmp_path / "store")):
        notes = " ".join(load(DataConfig(str(tmp_path), store=store)).notes)
        assert "CRLF that were read as LF: 60." in notes
    notes = " ".join(load(DataConfig(str(tmp_path))).notes)
    told = "the test data that are byte for byte files of the {} data too: 1 (test/c.txt = train/b.txt)"
    # The end of the training text is validation data here, and lies in b.txt as well.
    assert any(told.format(split) in notes for split in ("train", "valid"))


def test_models_of_version_0_1_0_score_the_pool_that_they_were_trained_on(tmp_path: Path) -> None:
    put(tmp_path, **{"train.txt": APPLES, "valid.txt": VALID, "test.txt": TEST, "x.TXT": "never read"})
    pool = "\n".join([TEST, APPLES, VALID])
    checksum = files.digest(pool.encode())
    (tmp_path / "x.TXT").rename(tmp_path / "other.TXT")
    corpus = load(DataConfig(str(tmp_path), checksum=checksum))
    assert "".join(parts(corpus)) == pool
    assert "as version 0.1.0 read them" in corpus.notes[0]
    with pytest.raises(InputError, match=r"other\.TXT, beside"):
        load(DataConfig(str(tmp_path), checksum="sha256:0"))


# -- pictures --------------------------------------------------------------------------------------------


def pictures(folder: Path, value: int, n: int = 4) -> None:
    folder.mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.full((2, 2), value + i, dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    "names", [("train", "val"), ("Train", "validation"), ("DIV2K_train_HR", "DIV2K_valid_HR")]
)
def test_folders_of_pictures_are_never_pooled_with_validation(names: tuple[str, str], tmp_path: Path) -> None:
    pictures(tmp_path / names[0] / "cats", 10, 8)
    pictures(tmp_path / names[0] / "test_tubes", 30, 8)
    pictures(tmp_path / names[1] / "cats", 100)
    pictures(tmp_path / ".thumbs", 200)
    (tmp_path / "list.csv").write_text("a")
    images = load_images(ImageConfig(str(tmp_path), test=0.25))
    assert [s.num_rows for s in (images.train, images.valid, images.test)] == [12, 4, 4]
    assert int(images.train.values.max()) < 100 > int(images.test.values.max())
    assert images.valid.values[:, 0].tolist() == [100, 101, 102, 103]
    assert images.sources["valid"] == tuple(f"{names[1]}/cats/{i}.png" for i in range(4))
    notes = " ".join(images.notes)
    assert "of other kinds: 1 (1 with .csv; list.csv)" in notes
    assert "their folders are hidden: 4." in notes
    assert "Test dealt from the rows to train on" in notes
    assert sorted(images.split("all").values[:, 0].tolist()) == [
        *range(10, 18), *range(30, 38), *range(100, 104)
    ]  # fmt: skip
    pictures(tmp_path / "extra", 1)
    with pytest.raises(InputError, match=r"extra, beside .* rename it"):
        load_images(ImageConfig(str(tmp_path)))


def test_all_tiles_lie_side_by_side_and_equal_pictures_are_told(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 10)
    pictures(tmp_path / "test", 12)
    images = load_images(ImageConfig(str(tmp_path), valid=0.25, tiles=[1, 2]))
    assert images.split("all").num_rows == 16
    images = load_images(ImageConfig(str(tmp_path), valid=0.25, tiles=[2, 1]))
    assert sorted(images.split("all").values[:, 0].tolist()) == sorted(2 * [10, 11, 12, 13, 12, 13, 14, 15])
    assert "the test data that are byte for byte files of the train data too: 1 (" in " ".join(images.notes)


def test_few_pictures_are_scored_as_a_whole(tmp_path: Path) -> None:
    pictures(tmp_path / "d", 10)
    with pytest.raises(InputError, match="4 rows are too few"):
        load_images(ImageConfig(str(tmp_path / "d")))
    images = load_images(ImageConfig(str(tmp_path / "d")), partial=True)
    assert images.split("all").values[:, 0].tolist() == [10, 11, 12, 13]
    with pytest.raises(InputError, match="too few rows for a test split; score all"):
        images.split("test")


def test_a_pool_of_version_0_1_0_is_read_as_it_was(tmp_path: Path) -> None:
    for split, value in (("train", 10), ("val", 100)):
        pictures(tmp_path / split, value, 20)
    pool = tmp_path / "pool"
    for path in sorted(tmp_path.glob("*/*.png")):
        (pool / path.parent.name[0]).mkdir(parents=True, exist_ok=True)
        (pool / path.parent.name[0] / path.name).write_bytes(path.read_bytes())
    checksum = load_images(ImageConfig(str(pool))).checksum
    for path in pool.rglob("*.png"):
        path.unlink()
    before = load_images(ImageConfig(str(tmp_path), checksum=checksum))
    assert before.checksum == checksum
    assert "as version 0.1.0 read them" in before.notes[0]
    assert load_images(ImageConfig(str(tmp_path))).checksum != checksum


# -- units -----------------------------------------------------------------------------------------------

UMLAUTS = "".join(f"Größe {i}: {'äöü€𝄞'[i % 5] * (i % 7)} und so weiter.\n" for i in range(400))


def tokenizer_of(kind: str) -> Tokenizer:
    return Bytes() if kind == "bytes" else SentencePiece.train(UMLAUTS, 320)


def by_hand(model: Any, text: str, tokenizer: Tokenizer, chunks: int | None) -> tuple[float, int]:
    """Bits a character of the first chunks, counting the characters that begin in them."""
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)[:chunks]
    with torch.no_grad():
        nats = -float(model.log_prob(ids).double().sum())
    # Decoded strictly, but for a character that is cut at the very end, which begins here.
    rest = tokenizer.decode(ids.flatten())
    characters = len(rest.rstrip("\ufffd")) + rest.endswith("\ufffd")
    return nats / math.log(2) / characters, characters


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("limit", [1, 7, 8, None])
def test_bits_are_those_of_the_characters_scored(kind: str, limit: int | None, tmp_path: Path) -> None:
    put(tmp_path, **{"train.txt": UMLAUTS, "valid.txt": UMLAUTS[:900], "test.txt": UMLAUTS[5000:9001]})
    tokenizer = tokenizer_of(kind)
    model = make_model("lstm", tokenizer.size)
    corpus = load(DataConfig(str(tmp_path)), tokenizer)
    for split, text in (("test", UMLAUTS[5000:9001]), ("all", UMLAUTS + UMLAUTS[:900] + UMLAUTS[5000:9001])):
        result = evaluate(model, corpus.split(split), limit=limit)
        expected, characters = by_hand(model, text, tokenizer, limit)
        assert result.bpc == pytest.approx(expected, rel=1e-6)
        assert result.num_characters == characters
        assert result.num_left == len(text) - characters
        assert result.characters_per_symbol == pytest.approx(characters / result.num_symbols)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_bits_of_sentences_count_their_characters(kind: str, tmp_path: Path) -> None:
    path = put(tmp_path, **{"a.txt": UMLAUTS}) / "a.txt"
    tokenizer = tokenizer_of(kind)
    corpus = load(DataConfig(str(path), protocol="sentence"), tokenizer)
    longest = corpus.split("all").longest
    model = make_model("lstm", tokenizer.size, longest, explicit_length=True)
    lines = [line for line in UMLAUTS.split("\n") if line]
    for split, chosen in (("all", lines), ("test", lines[-20:]), ("test", lines[-20:-17])):
        text = corpus.split(split)
        result = evaluate(model, text, limit=len(chosen))
        ids, lengths = text.chunks(longest, len(chosen))
        with torch.no_grad():
            nats = -float(model.log_prob(ids, lengths).double().sum())
        characters = sum(map(len, chosen)) + len(chosen)
        assert result.bpc == pytest.approx(nats / math.log(2) / characters, rel=1e-6)
        assert result.num_characters == characters


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_validation_counts_the_characters_of_its_chunks(kind: str, tmp_path: Path) -> None:
    text = UMLAUTS[:6000] + "plain ascii follows here. " * 20
    put(tmp_path, **{"train.txt": UMLAUTS, "valid.txt": text, "test.txt": TEST})
    recipe = tmp_path / "recipe.yaml"
    values = {
        "data": {"name": str(tmp_path), "tokenizer": kind, "vocab_size": 320},
        "model": {"family": "lstm", "length": LENGTH, "hidden_size": 8, "num_hidden_layers": 1},
        "train": {"steps": 1, "batch_size": 4, "eval_chunks": 9, "trackers": [], "samples": 0},
        "output": str(tmp_path / "out"),
    }
    recipe.write_text(yaml.safe_dump(values))
    task = task_of(load_recipe(recipe), False)
    batches, count = task.data.valid(torch.device("cpu"), 0, 1)
    ids = torch.cat([ids for ids, _ in batches])
    _, characters = by_hand(task.model, text, task.data.corpus.tokenizer, 9)  # type: ignore[attr-defined]
    assert len(ids) == 9
    assert count == characters
    batch = task.data.batch(3)
    if kind == "bytes":
        assert task.data.count(batch) == sum(b < 0x80 or b >= 0xC0 for b in batch[0].flatten().tolist())


def test_characters_of_what_is_drawn() -> None:
    text = Text("train", torch.zeros(9, dtype=torch.uint8), None, 9, starts=Bytes().starts)
    drawn = torch.tensor([[0x61, 0xC3, 0xA4, -1], [0xA4, -1, -1, -1]])
    assert text.characters(drawn).tolist() == [2, 0]
    assert text.characters(drawn.clamp(min=0), torch.tensor([2, 1])).tolist() == [2, 0]


# -- the command -----------------------------------------------------------------------------------------


def test_other_texts_are_scored_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = put(tmp_path, **{"text.txt": APPLES}) / "text.txt"
    model = str(write_model(tmp_path / "model", "lstm", trained))
    put(tmp_path, **{"other.txt": "plum pear\n" * 3 + "apple", "copy.txt": APPLES})
    put(tmp_path / "named", **{"train.txt": APPLES, "valid.txt": APPLES[:99], "test.txt": "pear\n" * 9})

    def scored(*flags: str) -> dict[str, Any]:
        assert cli.main(["evaluate", "--model", model, "--threads", "1", *flags]) == 0
        output = capsys.readouterr().out
        assert "characters scored" in output
        return {**json.loads(output.splitlines()[-1]), "output": output}

    found = scored("--data", str(tmp_path / "other.txt"))
    assert (found["split"], found["num_characters"], found["num_left"]) == ("all", 32, 3)
    assert "32; 3 left out, behind the last whole chunk" in found["output"]
    assert scored("--data", str(tmp_path / "named"))["split"] == "test"
    assert scored("--data", str(tmp_path / "named"), "--split", "all")["num_characters"] == 1104 - 1104 % 8
    # What the model was trained on is not scored unless one asks for it.
    assert scored()["split"] == "test"
    assert scored("--data", str(trained))["split"] == "test"
    assert scored("--data", str(tmp_path / "model" / ".." / "text.txt"))["split"] == "test"
    everything = scored("--split", "all")
    assert everything["num_characters"] == len(APPLES)
    assert "also what the model was trained on" in everything["output"]
    recipe = tmp_path / "model" / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    values["data"]["checksum"] = files.digest(APPLES.encode())
    recipe.write_text(yaml.safe_dump(values))
    assert scored("--data", str(tmp_path / "copy.txt"))["split"] == "test"
    argv = ["compare", model, "--data", str(tmp_path / "other.txt"), "--rounds", "1", "--batch-size", "1"]
    assert cli.main([*argv, "--threads", "1"]) == 0
    assert "other.txt, all" in capsys.readouterr().out


def test_what_was_dealt_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "d", **{"train.txt": APPLES, "valid.txt": VALID, "test.txt": TEST, "notes.md": "x"})
    recipe = tmp_path / "recipe.yaml"
    values = {
        "data": {"name": str(tmp_path / "d")},
        "model": {"family": "lstm", "length": LENGTH, "hidden_size": 8, "num_hidden_layers": 1},
        "train": {"steps": 1, "batch_size": 4, "trackers": [], "samples": 0},
        "output": str(tmp_path / "out"),
    }
    recipe.write_text(yaml.safe_dump(values))
    train(load_recipe(recipe))
    captured = capsys.readouterr()
    told = captured.out + captured.err
    assert f"  train: {len(APPLES)} characters, {len(APPLES)} symbols, of train.txt" in told
    assert f"  valid: {len(VALID)} characters, {len(VALID)} symbols, of valid.txt" in told
    assert "of other kinds: 1 (1 with .md; notes.md)" in told
    kept = json.loads((tmp_path / "out" / "data.json").read_text())
    assert kept["splits"]["test"] == {"characters": len(TEST), "symbols": len(TEST), "files": ["test.txt"]}
    assert cli.main(["evaluate", "--model", str(tmp_path / "out"), "--threads", "1"]) == 0
    assert f"train: {len(APPLES)} characters" in capsys.readouterr().out
    (tmp_path / "out" / "data.json").write_text("{}")
    assert cli.main(["evaluate", "--model", str(tmp_path / "out"), "--threads", "1"]) == 2
    assert "data.json: truncated or damaged" in capsys.readouterr().err
