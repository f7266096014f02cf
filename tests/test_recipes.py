"""The recipes that come with dflow: in the wheel, by name, listed, printed and copied."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from stand_ins import ROOT

import dflow
from dflow import recipes, shipped
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("dflow", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=source, check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    assert path.name.split("-")[:2] == ["dflow", dflow.__version__]
    return path


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The folder of packages into which the wheel is unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


def run(site: Path, *words: str) -> str:
    """What a command of the unpacked wheel prints, in the working directory."""
    done = subprocess.run(
        [sys.executable, "-m", "dflow", *words],
        env=os.environ | {"PYTHONPATH": str(site)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
def test_a_wheel_has_all_recipes_and_finds_them(site: Path) -> None:
    modules = {path.relative_to(ROOT / "dflow") for path in (ROOT / "dflow").rglob("*.py")}
    assert {path.relative_to(site / "dflow") for path in (site / "dflow").rglob("*.py")} == modules
    # Of the models, which another test looks at, there is more.
    others = {path.name for path in (site / "dflow").glob("*.*") if path.suffix != ".py"}
    pages = {path.name for path in (site / "dflow" / "page").iterdir() if path.suffix != ".py"}
    assert others == {"py.typed"}
    assert pages == {"page.html", "page.css", "page.js", "plots.js"}
    assert [line.split()[0] for line in run(site, "recipes").splitlines()] == recipes.names()
    for path in FILES:
        name = path.relative_to(ROOT / "recipes")
        assert (site / "dflow" / "_recipes" / name).read_bytes() == path.read_bytes()
    small = (
        "model.length=16",
        "model.hidden_size=8",
        "train.steps=1",
        "train.eval_chunks=4",
        "train.samples=0",
    )
    run(site, "train", "demo_lstm", "--set", *small, "--output", "out")
    assert Path("out", "model.safetensors").is_file()


@pytest.mark.slow
def test_a_wheel_has_the_models_in_eight_megabytes(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = [
            f for f in archive.infolist() if f.filename.count("/") == 3 and "dflow/models/" in f.filename
        ]
    assert {f.filename.split("/")[2] for f in files} == set(shipped.names())
    assert sum(f.compress_size for f in files) <= 8e6
    for name in shipped.names():
        for path in shipped.folder_of(name).iterdir():
            assert (site / "dflow" / "models" / name / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_wheel_draws_scores_fills_compresses_and_tunes_its_model(site: Path) -> None:
    text = "Prince Andrew looked at Natasha, who was smiling, and did not know what to say.\n" * 60
    Path("text.txt").write_text(text, encoding="utf-8")
    Path("gap.txt").write_text("Prince ____ was in love.", encoding="utf-8")
    assert run(site, "generate", "--model", "tolstoy", "--n", "3").count("--- sample ") == 3
    assert run(site, "generate", "--model", "tolstoy-causal", "--draft", "counts", "--length", "80")
    assert "Prince" in run(site, "fill", "gap.txt", "--model", "tolstoy", "--size", "6")
    assert "bits" in run(site, "score", "text.txt", "--model", "tolstoy@4")
    run(site, "compress", "text.txt", "-o", "text.dfl", "--model", "tolstoy@4")
    run(site, "decompress", "text.dfl", "-o", "back", "--model", "tolstoy")
    assert Path("back", "text.txt").read_text(encoding="utf-8") == text
    assert Path("text.dfl").stat().st_size < len(text) / 4
    Path("long.txt").write_text(4 * text, encoding="utf-8")
    settings = ("data.name=long.txt", "train.steps=1", "train.minutes=5")
    run(site, "train", "--init", "tolstoy", "--set", *settings, "--output", "tuned")
    assert run(site, "models", ".").splitlines()[1].startswith("tuned")
