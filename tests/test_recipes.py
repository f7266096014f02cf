"""The recipes that come with dflow: by name, listed, printed and copied."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from stand_ins import ROOT

from dflow import recipes
from dflow.cli import main, read_flags
from dflow.cli.train import Train, recipe_to_train
from dflow.config import InputError
from dflow.train import load_recipe

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err.strip()


def test_every_package_is_named_and_the_version_stands_in_one_place() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "dflow").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages | {"dflow._recipes"})
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]


def test_every_file_has_a_name_and_a_first_line_that_describes_it() -> None:
    names = [path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in FILES]
    assert sorted(recipes.names()) == sorted(names)
    for name, path in zip(names, FILES, strict=True):
        assert recipes.file_of(name) == path
        line = path.read_text(encoding="utf-8").splitlines()[0]
        assert line == f"# {recipes.about(name)}"
        assert line.endswith("."), f"{path}: the first line is no sentence"


@pytest.mark.parametrize("name", ["grouped", "ptb/ngram"])
def test_a_name_is_that_recipe_and_a_file_of_this_path_comes_first(name: str) -> None:
    assert load_recipe(name) == load_recipe(ROOT / "recipes" / f"{name}.yaml")
    shutil.copytree(ROOT / "recipes" / "ptb", "ptb")
    shutil.copy(ROOT / "recipes" / "lstm.yaml", name)
    assert load_recipe(name).family == "lstm"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("grouppd", "did you mean 'grouped' or "),
        ("ptb/ngrm", "did you mean 'ptb/ngram' or "),
        ("recipes/ptb/ngram.yaml", "did you mean 'ptb/ngram' or "),
        ("zzz", "no such recipe; `dflow recipes` lists"),
        ("accelerate/gpus8", "`dflow recipes accelerate/gpus8 --copy` writes them"),
        (".", "a folder; name a recipe"),
    ],
)
def test_a_word_that_is_no_recipe_is_hinted_at(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in refused(capsys, "train", word)
    with pytest.raises(InputError):
        load_recipe(word)


def test_a_folder_called_as_a_recipe() -> None:
    """Such a line stands in the queue of a scheduler: it begins a training, then goes on with it."""
    words = {"recipe": "lstm", "output": "lstm", "resume": True}
    for _ in range(2):
        assert recipe_to_train(read_flags(Train, words)).output == Path("lstm")
        Path("lstm").mkdir(exist_ok=True)
    assert recipe_to_train(read_flags(Train, {"recipe": "lstm"})).output == Path("runs/lstm")
    with pytest.raises(InputError, match="lstm: no training to go on with"):
        recipe_to_train(read_flags(Train, {"recipe": "lstm", "resume": True}))


def test_recipes_are_listed_printed_and_copied(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert lines[0].split(maxsplit=1)[1] == recipes.about("autoregressive")
    assert main(["recipes", "--json"]) == 0
    assert {"name": "lstm", "about": recipes.about("lstm")} in json.loads(capsys.readouterr().out)
    text = (ROOT / "recipes" / "ptb" / "ngram.yaml").read_text(encoding="utf-8")
    assert main(["recipes", "ptb/ngram"]) == 0
    assert capsys.readouterr().out == text
    assert main(["recipes", "ptb/ngram", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "ptb/ngram", "recipe": text}
    assert main(["recipes", "ptb/ngram", "--copy"]) == 0
    assert capsys.readouterr().out == "ngram.yaml\n"
    assert Path("ngram.yaml").read_text(encoding="utf-8") == text
    assert "ngram.yaml: exists already, and stays" in refused(capsys, "recipes", "ngram", "--copy")
    assert Path("ngram.yaml").read_text(encoding="utf-8") == text
    assert "did you mean 'ptb/ngram'" in refused(capsys, "recipes", "ptb/ngrm")
    assert "name the recipe to copy" in refused(capsys, "recipes", "--copy")
