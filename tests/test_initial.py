"""Trainings that start from the weights of a model (dflow train --init)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import SETTINGS, TEXT
from torch import Tensor

from dflow import cli, models
from dflow.config import InputError
from dflow.data import Tokenizer
from dflow.train import history, initial, load_recipe, train
from dflow.train.tasks import task_of

LENGTH = 16


def recipe(folder: Path, name: str, text: str, family: str = "transformer", **train_settings: Any) -> Path:
    """A recipe of a small model of ``text`` in the folder ``name``."""
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    values = {
        "data": {"name": str(folder / f"{name}.txt")},
        "model": {"family": family, "length": LENGTH, **SETTINGS[family]},
        "train": {"steps": 1, "batch_size": 16, "samples": 0, "trackers": [], "warmup": 1, **train_settings},
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that has learned a text."""
    folder = tmp_path_factory.mktemp("initial")
    return train(load_recipe(recipe(folder, "base", TEXT, steps=120, eval_every=120, learning_rate=0.03)))


def scored(folder: Path, text: str) -> Tensor:
    model, tokenizer = models.load(folder), Tokenizer.load(folder)
    with torch.no_grad():
        return model.log_prob(tokenizer.encode(text)[: 8 * LENGTH].view(-1, LENGTH))


def test_it_starts_at_far_fewer_bits_and_resumes_without_the_first_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(trained, tmp_path / "model")
    other = TEXT.replace("text", "teZt")
    path = recipe(tmp_path, "other", other, learning_rate=1e-5)
    fresh = history(train(load_recipe(path))).rows[0]["valid_bits"]
    words = ["train", str(path), "--init", str(base), "--output", str(tmp_path / "tuned")]
    assert cli.main(words) == 0
    tuned = history(tmp_path / "tuned").rows[0]["valid_bits"]
    assert tuned < fresh - 1
    assert "lacks 'Z'; new symbols, learned afresh: 1" in capsys.readouterr().err
    assert load_recipe(tmp_path / "tuned" / "recipe.yaml").train.init == str(base)
    old, new = (Tokenizer.load(folder) for folder in (base, tmp_path / "tuned"))
    assert "".join(new.symbols) == "".join(old.symbols) + "Z"  # type: ignore[attr-defined]
    shutil.rmtree(base)
    assert cli.main(["train", "--resume", str(tmp_path / "tuned"), "--set", "train.steps=3"]) == 0
    assert cli.main(["train", str(tmp_path / "tuned"), "--resume", "--init", "x"]) == 2
    assert "has begun; leave it out" in capsys.readouterr().err


def test_without_a_recipe_it_is_that_of_the_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text(TEXT[::-1], encoding="utf-8")
    words = ["train", "--init", str(trained), "--set", f"data.name={text}", "train.steps=1"]
    assert cli.main(words) == 2
    assert "name the folder of the new model: --output FOLDER" in capsys.readouterr().err
    assert cli.main([*words, "--output", str(tmp_path / "tuned")]) == 0
    tuned = load_recipe(tmp_path / "tuned" / "recipe.yaml")
    assert (tuned.family, tuned.data.name) == ("transformer", str(text))
    assert cli.main(["train"]) == 2
    assert "name a recipe" in capsys.readouterr().err
    assert cli.main(["train", "--set", "train.steps=3", "recipe.yaml"]) == 2
    assert "all words after --set belong to it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "grouped",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("transformer", "lstm", "any_order")),
        "bipartite",
    ],
)
@pytest.mark.parametrize("further", ["", "Ä"])
def test_what_was_learned_of_known_symbols_is_kept(family: str, further: str, tmp_path: Path) -> None:
    base = train(load_recipe(recipe(tmp_path, "base", TEXT, family, steps=3, learning_rate=0.03)))
    path = recipe(tmp_path, "tuned", further + TEXT, family)
    wanted = load_recipe(path, [f"train.init={base}"])
    if family == "bipartite" and further:
        with pytest.raises(InputError, match="cannot learn further symbols"):
            task_of(wanted, False)
        return
    model: Any = task_of(wanted, False).model
    source = models.load(base)
    ids = Tokenizer.load(base).encode(TEXT)[: 8 * LENGTH].view(-1, LENGTH)
    model.eval()
    with torch.no_grad():
        before, now = source.log_prob(ids), model.log_prob(ids)
    if not further:
        assert torch.equal(before, now)
    # The new symbol takes as much of each probability as an untrained one takes.
    assert ((before - now).abs() < 0.1 * LENGTH).all()
    for name, weight in source.named_parameters():
        assert set(weight.flatten().tolist()) <= set(model.get_parameter(name).flatten().tolist())


def test_rows_of_several_tables_keep_their_symbols() -> None:
    """Two tables of three symbols and no symbol, and a further row."""
    old, fresh = torch.arange(9.0)[:, None], -torch.ones(13, 1)
    grown = initial._grown(old, fresh, 3, 5)[:, 0].tolist()
    assert grown == [0, 1, 2, -1, -1, 3, 4, 5, 6, -1, -1, 7, 8]
    assert initial._grown(torch.arange(4.0), -torch.ones(6), 3, 5).tolist() == [0, 1, 2, -1, -1, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.family=lstm", "model.num_attention_heads=null"],
            "unknown|family 'transformer', and the rec",
        ),
        (
            ["model.hidden_size=16", "model.window=4", "model.dropout=0.5"],
            "hidden_size is 8 there and 16 in the recipe; model.window is 8 there and 4 in the recipe; set",
        ),
        (["data.tokenizer=bytes"], "symbols are characters .*set data.tokenizer to characters"),
    ],
)
def test_what_does_not_fit_is_named(trained: Path, changes: list[str], message: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, "other", TEXT)
    with pytest.raises(InputError, match=message):
        task_of(load_recipe(path, [f"train.init={trained}", *changes]), False)
