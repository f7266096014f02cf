"""The tokenizer of transformers: the symbols of dflow, an exact round trip, also for older folders."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from folders import TEXT, make_model, write_model, write_text
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dflow import hf
from dflow.config import InputError
from dflow.data import Tokenizer
from dflow.data.pieces import SentencePiece
from dflow.data.tokenizers import Bytes, Characters, Numbers
from dflow.hf.tokenizer import tokenizer_of

STRANGE = "é\u2581\0\t  \n\r\U0001f600中<pad><0x41>"
WORDS = "the of a line text abc"


def folder_of(tokenizer: Tokenizer, folder: Path) -> Path:
    """A folder from before tokenizers of transformers were saved."""
    folder.mkdir()
    tokenizer.save(folder)
    config = {"model_type": "dflow", "family": "lstm", "vocab_size": tokenizer.size, "length": 8}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def texts(kind: str) -> list[str]:
    rng = random.Random(0)
    if kind == "numbers":
        return [" ".join(str(rng.randrange(20)) for _ in range(n)) for n in (1, 2, 9)]
    pool = TEXT if kind == "characters" else TEXT + STRANGE * 9 + WORDS
    made = ["".join(rng.choice(pool) for _ in range(n)) for n in (0, 1, 3, 40, 300)]
    return [*made, "<pad>" if kind != "characters" else "line", TEXT[:500]]


KINDS = {
    "characters": lambda: Characters.train(TEXT),
    "bytes": Bytes,
    "numbers": lambda: Numbers(20),
    "sentencepiece": lambda: SentencePiece.train(TEXT + "\n".join([WORDS] * 50), 300),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_has_the_symbols_of_the_vocabulary_and_comes_back(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    old = AutoTokenizer.from_pretrained(folder_of(tokenizer, tmp_path / "old"))
    pieces = tmp_path / "old" / "tokenizer.model"
    made = tokenizer_of(
        (tmp_path / "old" / "vocabulary.json").read_bytes(),
        pieces.read_bytes() if pieces.exists() else None,
    )
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    made.save_pretrained(tmp_path / "new")
    # Without dflow it is one of transformers itself: nothing but the two files is read.
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path / "new")
    for other in (old, AutoTokenizer.from_pretrained(tmp_path / "new"), plain):
        assert isinstance(other, PreTrainedTokenizerFast)
        assert (other.pad_token_id, len(other)) == (tokenizer.size, tokenizer.size + 1)
        assert other.padding_side == "left"
        for text in texts(kind):
            ids = other(text).input_ids
            assert ids == tokenizer.encode(text).tolist(), text
            assert other.decode(ids) == text


@pytest.mark.parametrize(("kind", "text"), [("characters", "line ☃"), ("numbers", "3 77")])
def test_what_the_vocabulary_lacks_is_named(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(KINDS[kind](), tmp_path / "model"))
    for given in (text, [text[:1], text]):
        with pytest.raises(
            InputError, match=r"'(☃|77)' at character \d is not in the vocabulary of \d+ symb"
        ):
            tokenizer(given)


def test_a_character_named_as_the_padding_is_text(tmp_path: Path) -> None:
    tokenizer = Characters.train("<pad> a text")
    loaded = AutoTokenizer.from_pretrained(folder_of(tokenizer, tmp_path / "model"))
    ids = loaded("a <pad>").input_ids
    assert tokenizer.size not in ids
    assert loaded.decode(ids, skip_special_tokens=True) == "a <pad>"
    batch = loaded(["a text", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids[1].tolist() == [tokenizer.size] * 5 + loaded("a").input_ids
    assert batch.attention_mask[1].tolist() == [0] * 5 + [1]


def test_damaged_vocabularies_are_named(tmp_path: Path) -> None:
    folder = folder_of(KINDS["sentencepiece"](), tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"'sentencepiece' without tokenizer.model; restore"):
        AutoTokenizer.from_pretrained(folder)
    (folder / "vocabulary.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"vocabulary.json: truncated or damaged"):
        AutoTokenizer.from_pretrained(folder)
    (folder / "vocabulary.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer.json and no vocabulary.json"):
        AutoTokenizer.from_pretrained(folder)


def test_it_is_saved_with_the_model_and_only_with_its_own(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "lstm", write_text(tmp_path))
    model = hf.load(source)
    model.save_pretrained(tmp_path / "saved")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert tokenizer.model_max_length == model.config.length
    text = "line 1"
    assert tokenizer(text).input_ids == Tokenizer.load(source).encode(text).tolist()
    assert torch.equal(hf.load(tmp_path / "saved").log_prob(torch.zeros(1, 8).long()),
                       model.log_prob(torch.zeros(1, 8).long()))  # fmt: skip
    # Saved into the folder of its training, it has the vocabulary that is there; another model has not.
    hf.save(make_model("lstm", model.config.vocab_size), source)
    assert (source / "tokenizer.json").is_file()
    (source / "tokenizer.json").unlink()
    hf.save(make_model("lstm", 5), source)
    assert not (source / "tokenizer.json").exists()
