"""Verbs: their registry, their help, settings of a recipe as a table and as flags, and renamed verbs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from folders import write_model, write_text

import dflow.train
from dflow import cli, zoo
from dflow.cli import VERBS, build_parser, main, verbs
from dflow.cli.settings import settings_of, spelled, word
from dflow.cli.train import as_set
from dflow.compare import codecs
from dflow.config import InputError, convert
from dflow.data import DataConfig, ImageConfig
from dflow.train import Recipe, Schedule, TrainConfig, load_recipe


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Standard error of a command that ends with ``code``."""
    capsys.readouterr()
    try:
        ended: object = main(argv)
    except SystemExit as end:
        ended = end.code
    assert ended == code
    return capsys.readouterr().err


# -- registry and help -----------------------------------------------------------------------------------


def test_every_file_of_a_verb_is_registered() -> None:
    folder = Path(cli.__file__).parent
    modules = {
        path.stem: importlib.import_module(f"dflow.cli.{path.stem}") for path in folder.glob("[a-z]*.py")
    }
    rows = {
        row
        for name, module in modules.items()
        if name not in ("verbs", "parser")
        for row in vars(module).get("VERBS", ())
    }
    assert rows == set(VERBS)
    assert [row for name in verbs.FILES for row in modules[name].VERBS] == list(VERBS)


@pytest.mark.parametrize("words", [[], *([group] for group in verbs.GROUPS)], ids=" ".join)
def test_help_has_one_line_a_verb(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    listed = capsys.readouterr().out.partition("  VERB\n")[2].partition("\n\n")[0].splitlines()
    depth = len(words)
    names = [verb.split()[depth] for verb, *_ in VERBS if verb.split()[:depth] == words]
    assert [line.split()[0] for line in listed] == list(dict.fromkeys(names))
    assert all(len(line.split()) > 3 for line in listed)


# -- settings --------------------------------------------------------------------------------------------


def defaults(cls: type[Any]) -> dict[str, Any]:
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
    }


@pytest.mark.parametrize("name", zoo.names())
def test_every_setting_is_shown(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    family = zoo.find(name)
    assert main(["settings", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == name
    assert main(["settings", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    first, *rows = [row for row in found["settings"] if row["section"] == "model"]
    assert (first["name"], first["required"]) == ("family", True)
    sections = {"data": DataConfig if family.kind == "text" else ImageConfig, "train": TrainConfig}
    assert {row["section"] for row in found["settings"]} == {"model", *sections}
    shown = {section: [r for r in found["settings"] if r["section"] == section] for section in sections}
    for cls, listed in [(family.settings, rows), *((sections[s], shown[s]) for s in sections)]:
        expected, hints = defaults(cls), typing.get_type_hints(cls)
        assert [row["name"] for row in listed] == list(expected)
        for row in listed:
            assert row["help"]
            assert not row["required"]
            assert convert(hints[row["name"]], row["default"], row["name"]) == expected[row["name"]]
            assert any(line.split()[:1] == [row["name"]] for line in lines)


def test_defaults_are_shown_as_a_recipe_has_them() -> None:
    rows = {row.name: row for row in settings_of(TrainConfig, "train")}
    shown = {name: spelled(row) for name, row in rows.items()}
    assert (shown["steps"], shown["batch_size"], shown["shard"]) == ("null", "32", "false")
    assert (shown["alpha"], shown["mixed_precision"]) == ("-inf", '"no"')
    assert json.loads(shown["temperature"]) == dataclasses.asdict(Schedule(1.0, 1.0))
    assert (rows["minutes"].type, rows["trackers"].type) == ("float or null", "list of str")
    assert rows["mixed_precision"].type == '"no" | bf16 | fp16 | auto'
    assert "schedule: str" in rows["noise"].type
    assert [row.required for row in settings_of(Schedule, "train")] == [True, True, False, False]
    assert word("3") == '"3"'


@pytest.mark.parametrize("width", [66, 80, 130])
def test_the_table_keeps_to_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["settings"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    # Aligned: what stands in the column of meanings begins in it, on the first line of a row and on others.
    heads = [line.index("meaning") for line in out.splitlines() if line.split()[0::3] == ["name", "meaning"]]
    assert len(heads) == 4
    assert len(set(heads)) == 1
    [row] = [line for line in out.splitlines() if line.startswith("seed ")]
    assert row[heads[0] :].startswith("seed of")
    assert set(zoo.names()) <= set(out.replace(",", " ").replace(";", " ").replace(".", " ").split())


@pytest.mark.parametrize(
    ("section", "classes"), [("data", [DataConfig, ImageConfig]), ("train", [TrainConfig])]
)
def test_settings_of_a_section_alone(
    section: str, classes: list[type[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["settings", section, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["family"] is None
    expected = [(section, name) for cls in classes for name in defaults(cls)]
    assert [(row["section"], row["name"]) for row in shown["settings"]] == expected


def test_a_family_that_is_none_is_hinted_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown family 'groupde'; did you mean 'grouped'?" in said(capsys, "settings", "groupde")


# -- settings as flags -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "lstm", "lstm", write_text(tmp_path))


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that are trained by."""
    seen: list[Recipe] = []
    monkeypatch.setattr(dflow.train, "train", lambda recipe, resume, device: seen.append(recipe))
    return seen


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--train.steps", "100"], ["train.steps=100"]),
        (["--train.steps=100", "--model.hidden_size=8"], ["train.steps=100", "model.hidden_size=8"]),
        (["--data.name", "my.txt"], ["data.name=my.txt"]),
        (
            ["--train.trackers", "[]", "--train.learning_rate", "1e-3"],
            ["train.trackers=[]", "train.learning_rate=1e-3"],
        ),
        (
            ["--train.alpha", "-2.5", "--train.steps", "null"],
            ["train.alpha=-2.5", "train.steps=null", "train.minutes=1"],
        ),
        (["--train.alpha", "-inf"], ["train.alpha=-inf"]),
        (["--train.peak.start=1", "--train.peak.end", "0"], ["train.peak.start=1", "train.peak.end=0"]),
        (["--set", "train.steps=7", "train.seed=3", "--train.steps", "9"], ["train.steps=9", "train.seed=3"]),
        (["--train.steps", "9", "--set", "train.steps=7"], ["train.steps=7"]),
        (["--data.name", "a=b.txt", "--output", "out"], ["data.name=a=b.txt", "output=out"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_settings_are_flags(
    words: list[str], changes: list[str], folder: Path, recipes: list[Recipe]
) -> None:
    recipe = str(folder / "recipe.yaml")
    more = ["--train.minutes", "1"] if "train.minutes=1" in changes else []
    expected = load_recipe(recipe, changes)
    # In front of the recipe only where --set, which takes all words after it, is not the last flag.
    for argv in ([recipe, *more, *words], [*words, *more, "--threads", "1", recipe]):
        assert main(["train", *argv]) == 0
    assert recipes == [expected, expected]


def test_settings_are_flags_of_a_training_that_goes_on(folder: Path, recipes: list[Recipe]) -> None:
    for words in (["--train.minutes", "20"], ["--train.minutes=20"], ["--set", "train.minutes=20"]):
        assert main(["train", "--resume", str(folder), *words]) == 0
        assert (recipes[-1].train.minutes, recipes[-1].output) == (20.0, folder)
    assert main(["train", "--train.minutes", "20", "--resume", str(folder)]) == 0
    assert len(recipes) == 4
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize(
    "setting", ["train.stpes=3", "train.steps=many", "model.hiden_size=3", "data.nme=x", "train.steps={"]
)
def test_mistaken_settings_are_said_alike(
    setting: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(folder / "recipe.yaml")
    by_set = said(capsys, "train", recipe, "--set", setting)
    assert by_set.startswith("error: ")
    key, _, value = setting.partition("=")
    assert said(capsys, "train", recipe, f"--{key}", value) == by_set
    assert said(capsys, "train", f"--{setting}", recipe) == by_set
    assert said(capsys, "train", "--resume", str(folder), f"--{setting}").startswith("error: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.steps"], "--train.steps: a value is missing; write --train.steps VALUE"),
        (["--train.steps", "--output", "out"], "--train.steps: a value is missing"),
        (["--train.steps", "-o", "out"], "--train.steps: a value is missing"),
        (["--trian.steps", "3"], "did you mean '--train.steps'?"),
    ],
)
def test_mistaken_flags_of_settings(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = said(capsys, "train", "recipe.yaml", *words)
    assert told in error
    assert error.startswith("usage: dflow train")


def test_only_settings_of_train_are_rewritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert as_set(["a", "--output=train.steps", "--", "--train.steps", "3"])[-2:] == ["--train.steps", "3"]
    with pytest.raises(InputError, match=r"--model\.x: a value is missing"):
        as_set(["--model.x"])
    assert "unknown: --train.steps 3" in said(capsys, "check", "folder", "--train.steps", "3")
    # As other programs see it: the parser alone does the same.
    values = vars(build_parser().parse_args(["train", "--train.steps", "3", "r.yaml", "--set", "a=b", "c=d"]))
    assert (values["recipe"], values["set"]) == ("r.yaml", ["train.steps=3", "a=b", "c=d"])


# -- compare --codec, which is codecs --------------------------------------------------------------------


def test_compare_codec_is_codecs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codecs, "text_codecs", lambda: tuple(c for c in codecs_of_python() if not c.library))
    text = str(write_text(tmp_path))
    results = []
    for words in (["codecs"], ["compare", "--codec"]):
        assert (
            main([*words, text, "--rounds", "1", "--each", "--limit", "200", "--threads", "1", "--json"]) == 0
        )
        out, err = capsys.readouterr()
        record = json.loads(out)
        results.append(
            (record["material"], [(row["name"], row["how"], row["bytes"]) for row in record["rows"]])
        )
        notes = [line for line in err.splitlines() if "new name" in line]
        assert notes == ["note: `dflow codecs` is the new name of `dflow compare --codec`"] * (
            words[0] == "compare"
        )
    assert results[0] == results[1]
    assert results[0][1]


codecs_of_python = codecs.text_codecs


def test_flags_that_only_the_other_reads_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("length", "batch-size"):
        for verb in (["codecs"], ["compare", "--codec"]):
            assert f"unknown: --{name} 100" in said(capsys, *verb, "text", f"--{name}", "100")
    assert "--length is a flag of `dflow generate` and `dflow compare`" in said(
        capsys, "codecs", "text", "--length", "100"
    )
    for flag in ("--together", "--memory"):
        message = said(capsys, "compare", "m", flag)
        assert f"unknown: {flag}; {flag} is a flag of `dflow codecs`" in message
    assert "unknown: --model n" in said(capsys, "compare", "m", "--model", "n")
    assert "unknown: --codec" in said(capsys, "codecs", "--codec", "text")
