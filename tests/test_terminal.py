"""What reaches standard output: one JSON document, and nothing that a terminal would obey."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from folders import image_recipe, write_model, write_pictures, write_text

from dflow import cli
from dflow.cli import VERBS, build_parser, main, options_of
from dflow.terminal import shown, visible
from dflow.threads import processors, wait_passively
from dflow.train import load_recipe, train

pytestmark = pytest.mark.slow

EVIL = "line \x1b]0;owned\x07 of\x9b2J a\u202etext\r\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# -- JSON ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    (folder / "pictures").mkdir()
    write_pictures(folder / "pictures" / "grey")
    integer = {"family": "integer", "num_levels": 1, "num_flows": 1, "hidden_size": 8, "num_hidden_layers": 1}
    path = image_recipe(folder, str(folder / "pictures" / "grey"), steps=1)
    head, _, tail = path.read_text().partition("model:")
    rest = tail[tail.index("\noutput") :]
    path.write_text(head + f"model: {json.dumps(integer)}" + rest)
    images = train(load_recipe(path))
    lstm = write_model(folder / "lstm", "lstm", text)
    return {"folder": folder, "text": text, "lstm": lstm, "images": images}


def document(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    found = capsys.readouterr().out
    assert found.count("\n") == 1
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_is_one_document_and_alone(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text, lstm, images = (models[n] for n in ("text", "lstm", "images"))
    found = document(capsys, "evaluate", "--model", lstm, "--json")
    assert (found["model"], found["kind"]) == (str(lstm), "exact")
    assert document(capsys, "evaluate", "--model", images, "--json")["kind"] == "exact"
    words = ("--rounds", 1, "--limit", 2, "--json")
    assert document(capsys, "compare", lstm, *words, "-o", "table")["rows"][0]["name"] == str(lstm)
    assert document(capsys, "compare", "--codec", text, "--each", *words)["rows"]
    packed = document(capsys, "compress", text, "--model", lstm, "-o", "text.dfl", "--json")
    assert packed["outputs"] == ["text.dfl"]
    assert packed["bytes"] == Path("text.dfl").stat().st_size
    picture = next((models["folder"] / "pictures" / "grey").iterdir())
    packed = document(capsys, "compress", picture, "--model", images, "-o", "picture.dfl", "--json")
    assert packed["bytes"] == Path("picture.dfl").stat().st_size
    for name in ("text", "picture"):
        about = document(capsys, "info", f"{name}.dfl", "--json")
        assert dict(about["rows"])["files"] == "1"
    unpacked = document(capsys, "decompress", "text.dfl", "--model", lstm, "-o", "back", "--json")
    assert unpacked == {"files": [str(Path("back") / text.name)], "damaged": []}
    assert document(capsys, "check", images, "--json")["whole"] is True
    (images / "metrics.jsonl").rename("metrics.jsonl")
    weights = (images / "state.safetensors").read_bytes()
    (images / "state.safetensors").write_bytes(weights[:-1])
    found = document(capsys, "check", images, "--json", code=1)
    assert (found["whole"], found["wrong"]) == (False, ["state.safetensors damaged"])
    (images / "state.safetensors").write_bytes(weights)
    Path("metrics.jsonl").rename(images / "metrics.jsonl")
    assert document(capsys, "plot", "training", images, "-o", "a.png", "--json") == {"file": "a.png"}
    assert document(capsys, "data", "list", "--json")[0]["name"] == "pydoc"
    assert document(capsys, "data", "check", "pydoc", "--json")[0]["size"] > 0


def test_every_verb_that_prints_results_has_json() -> None:
    without = {verb: cls for verb, cls, *_ in VERBS if not issubclass(cls, cli.Results)}
    # A training writes files, the completion of a shell is a script, and a server serves.
    assert set(without) == {"train", "generate", "fill", "score", "completion", "serve"}
    # Those that print texts have JSON lines instead.
    assert all("jsonl" in str(get_type_hints(without[v])["format"]) for v in ("generate", "fill", "score"))


def test_the_last_line_is_json_but_not_on_a_terminal(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", "--model", str(models["lstm"]), "--limit", "2"]
    assert main(words) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["num_chunks"] == 2
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(words) == 0
    assert screen.getvalue().splitlines() == table


# -- control characters ----------------------------------------------------------------------------------


def test_control_characters_are_spelled_out_on_a_terminal_only() -> None:
    told = visible(EVIL)
    assert told == "line \\x1b]0;owned\\x07 of\\x9b2J a\\u202etext\\r\n"
    assert visible(told + "\tß 漢 🙂\n") == told + "\tß 漢 🙂\n"
    assert shown(EVIL, Terminal()) == told
    assert shown(EVIL, io.StringIO()) == EVIL


def test_draws_and_names_are_spelled_out_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path, "\x1b\x07\x9b\r" * 300 + "a\n")
    odd = str(tmp_path / "\x1b[2Jmodel")
    write_model(Path(odd), "lstm", text)
    words = ["generate", "--model", odd, "--samples", "3"]
    screen, errors = Terminal(), Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", errors)
        assert main(words) == 0
        assert main(["evaluate", "--model", odd, "--limit", "1"]) == 0
        assert main(["evaluate", "--model", odd + "2"]) == 2
        with pytest.raises(SystemExit):
            main(["generate", "--model", odd, "--\x1b[2J"])
    drawn = screen.getvalue()
    assert "\\x1b" in drawn
    assert "\\x1b[2Jmodel2" in errors.getvalue()
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(drawn)
    assert not {"\x1b", "\x07", "\x9b"} & set(errors.getvalue())
    # Into files and pipes nothing is changed.
    assert main(words) == 0
    raw = capsys.readouterr().out
    assert drawn.startswith(visible(raw))
    assert "\x1b" in raw
    assert main([*words, "--output", str(tmp_path / "out.txt")]) == 0
    assert (tmp_path / "out.txt").read_bytes().decode() == raw


def test_samples_of_a_training_are_spelled_out_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_faults import recipe_file

    text = write_text(tmp_path, "\x1b\x07\x9b" * 300 + "a\n")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    train(load_recipe(recipe_file(tmp_path, text, samples=2, steps=1)))
    assert "\\x1b" in screen.getvalue()
    assert not {"\x1b", "\x07", "\x9b"} & set(screen.getvalue())


def test_a_real_terminal(tmp_path: Path) -> None:
    text = write_text(tmp_path, "\x1b\x07\x9b" * 300 + "a\n")
    model = write_model(tmp_path / "model", "lstm", text)
    screen, inner = pty.openpty()
    words = [sys.executable, "-m", "dflow", "generate", "--model", str(model), "--n", "2"]
    assert subprocess.run(words, stdout=inner, stderr=subprocess.PIPE, check=False).returncode == 0
    os.close(inner)
    drawn = os.read(screen, 10_000)
    os.close(screen)
    assert b"--- sample 2 ---" in drawn
    assert b"\\x1b" in drawn
    assert b"\x1b" not in drawn


# -- flags under launchers -------------------------------------------------------------------------------


def flags_of(cls: type[Any]) -> list[list[str]]:
    """Each flag of a verb alone, with a value."""
    parser = argparse.ArgumentParser(add_help=False)
    cli.add_flags(parser, cls)
    return [
        [option, *(["1"] if action.nargs != 0 else [])]
        for action in parser._actions
        for option in action.option_strings
    ]


def parsed(parser: Any, words: list[str]) -> list[str]:
    """What a launcher hands on."""
    found = parser.parse_args(words)
    assert found.training_script == "dflow"
    assert found.module
    arguments: list[str] = found.training_script_args
    return arguments


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_take_no_flag_for_one_of_theirs(launcher: str) -> None:
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser as make
    else:
        from accelerate.commands.launch import launch_command_parser as make
    parser, ambiguous = make(), set()
    for verb, cls, *_ in VERBS:
        for flag in flags_of(cls):
            words = [*verb.split(), *flag]
            try:
                assert parsed(parser, ["-m", "dflow", *words]) == words
            except SystemExit:
                ambiguous.add(flag[0])
            # As the guide says.
            assert parsed(parser, ["-m", "--", "dflow", *words]) == words
    # Its other name, --samples, is not.
    assert ambiguous == ({"--n"} if launcher == "torchrun" else set())


def test_a_flag_with_two_names_is_one(tmp_path: Path) -> None:
    [f] = [f for f in dataclasses.fields(cli.Generate) if f.name == "n"]
    assert options_of(f) == ["--samples", "--n"]
    for name in options_of(f):
        values = vars(build_parser().parse_args(["generate", "--model", "m", name, "7"]))
        assert values["n"] == "7"


# -- threads ---------------------------------------------------------------------------------------------

REPORT = (
    "import os, sys; before = dict(os.environ); import dflow; {}; "
    "print({{k: v for k, v in os.environ.items() if before.get(k) != v}})"
)


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("dflow.Flow", set()),
        ("from dflow.cli import main; main(['check', 'nothing'])", {"OMP_WAIT_POLICY"}),
    ],
)
def test_the_command_lets_threads_sleep_and_the_library_changes_nothing(code: str, changed: set[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(code)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found = {k for k in eval(done.stdout.splitlines()[-1]) if not k.startswith(("TORCH", "KINETO", "HF_"))}
    assert found == changed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max 100000", None),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("10000000 100000", None),
        ("odd", None),
    ],
)
def test_threads_keep_to_the_share_of_a_container(content: str, expected: int | None, tmp_path: Path) -> None:
    there = processors(tmp_path / "none")
    (tmp_path / "cpu.max").write_text(content + "\n")
    assert processors(tmp_path / "cpu.max") == (there if expected is None else min(there, expected))


@pytest.mark.parametrize("name", ["", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_waiting_is_as_the_user_has_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(other, raising=False)
    assert not wait_passively()  # torch is loaded, and has read the environment
    monkeypatch.delitem(sys.modules, "torch")
    if name:
        monkeypatch.setenv(name, "5")
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", "to be restored")
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert wait_passively() is (not name)
    assert os.environ.get("OMP_WAIT_POLICY") == (
        "5" if name == "OMP_WAIT_POLICY" else None if name else "passive"
    )
