"""The command line from outside: output, exit codes, and errors in place of tracebacks."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from folders import LENGTH, TEXT, corpus_of, make_model, write_model, write_text

import dflow.generate
import dflow.train
from dflow import cli
from dflow.cli import VERBS, add_flags, build_parser, flag, main, read_flags
from dflow.cli.shared import _first_gpu
from dflow.config import InputError
from dflow.evaluate import evaluate
from dflow.models import TextModel


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.fixture
def lstm(tmp_path: Path, text: Path) -> str:
    return str(write_model(tmp_path / "lstm", "lstm", text))


@pytest.fixture
def grouped(tmp_path: Path, text: Path) -> str:
    return str(write_model(tmp_path / "grouped", "grouped", text))


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert main(argv) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# -- help ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [verb for verb, *_ in VERBS])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    assert f"example: dflow {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "cls", "function", "example"), VERBS)
def test_every_example_parses(verb: str, cls: type[Any], function: Any, example: str) -> None:
    values = vars(build_parser().parse_args(example.split()[1:]))
    assert values.pop("_cls") is cls
    assert values.pop("_function") is function
    assert values.pop("_modules") == []
    assert values.pop("_parser").prog == f"dflow {verb}"
    assert isinstance(read_flags(cls, values), cls)


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, dflow.cli\n"
        "try: dflow.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("train", "evaluate", "generate", "compare", "data"))


@pytest.mark.parametrize("argv", [[], ["data"], ["trian"], ["generate"], ["evaluate", "--modle", "m"]])
def test_wrong_words_end_with_usage_and_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_flags_from_fields() -> None:
    @dataclass(kw_only=True)
    class Flags:
        model: str = flag("a model")
        names: list[str] = field(metadata={"help": "names", "positional": True})
        rate: float | None = flag("100% of it", None)
        batch_size: int = flag("size", 3)
        kind: Literal["a", "b"] = flag("kind", "a")
        on: bool = flag("switch", False)

    # get_type_hints looks in the module, where a class of a function is not: the types stand here.
    Flags.__annotations__ |= {"model": str, "names": list[str], "rate": float | None, "batch_size": int}
    Flags.__annotations__ |= {"kind": Literal["a", "b"], "on": bool}
    parser = argparse.ArgumentParser()
    add_flags(parser, Flags)
    parse = lambda *argv: read_flags(Flags, vars(parser.parse_args(argv)))  # noqa: E731
    assert parse("x", "y", "--model", "m") == Flags(model="m", names=["x", "y"])
    given = parse("x", "--model", "m", "--rate", "1e-3", "--batch-size", "7", "--kind", "b", "--on")
    assert given == Flags(model="m", names=["x"], rate=1e-3, batch_size=7, kind="b", on=True)
    with pytest.raises(InputError, match="--batch-size: expected int, found 'many'"):
        parse("x", "--model", "m", "--batch-size", "many")
    with pytest.raises(InputError, match="--kind: 'c' is not allowed"):
        parse("x", "--model", "m", "--kind", "c")
    assert "100% of it" in parser.format_help()


# -- evaluate --------------------------------------------------------------------------------------------


def test_evaluate_by_the_recipe(lstm: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", lstm]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    corpus = corpus_of(text)
    expected = evaluate(make_model("lstm", corpus.tokenizer.size), corpus.test)
    assert found["bpc"] == expected.bpc
    assert (found["kind"], found["split"], found["round_trip"]) == ("exact", "test", True)
    table = "\n".join(out[:-1])
    for shown in (
        f"{expected.bpc:.4f}",
        f"{expected.standard_error:.4f}",
        "exact",
        expected.protocol,
        "intact",
    ):
        assert shown in table
    assert f"{expected.num_symbols:,}" in table


def test_evaluate_on_another_text_split_and_limit(
    lstm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1], encoding="utf-8")
    argv = ["evaluate", "--model", lstm, "--data", str(other), "--split", "valid", "--limit", "2"]
    assert main([*argv, "--batch-size", "1", "--threads", "1", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["data"], found["split"], found["num_chunks"]) == (str(other), "valid", 2)
    assert torch.get_num_threads() == 1


def test_evaluate_needs_no_recipe_where_the_data_are_named(
    lstm: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(lstm) / "recipe.yaml").unlink()
    assert "recipe.yaml" in fails(capsys, "evaluate", "--model", lstm)
    assert main(["evaluate", "--model", lstm, "--data", str(text), "--limit", "1"]) == 0


def test_a_failed_round_trip_is_exit_code_1(
    lstm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextModel, "round_trip", lambda *_: False)
    assert main(["evaluate", "--model", lstm, "--limit", "2"]) == 1
    streams = capsys.readouterr()
    assert json.loads(streams.out.splitlines()[-1])["round_trip"] is False
    assert "FAILED" in streams.out
    assert "round trip failed" in streams.err


def test_sentence_models(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_model(tmp_path / "s", "lstm", text, protocol="sentence", length=40))
    copy = tmp_path / "copy.txt"
    copy.write_text(TEXT, encoding="utf-8")
    assert main(["evaluate", "--model", folder]) == 0
    assert "sentences" in json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]
    assert main(["evaluate", "--model", folder, "--data", str(copy)]) == 0
    assert "sentences" in json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]
    assert main(["generate", "--model", folder, "--n", "3", "--format", "jsonl"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--limit", "0"], "limit 0"),
        (["--limit", "two"], "--limit"),
        (["--split", "tset"], "test"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "ptb", "--folder", "nowhere"], "nowhere"),
        (["--threads", "0"], "--threads 0"),
        (["--device", "abacus"], "--device abacus"),
        (["--batch-size", "0"], "batch size 0"),
    ],
)
def test_evaluate_refuses(lstm: str, argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in fails(capsys, "evaluate", "--model", lstm, *argv)


def test_a_text_with_foreign_symbols_names_them(
    lstm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "greek.txt"
    other.write_text("line Ω " * 100, encoding="utf-8")
    assert "Ω" in fails(capsys, "evaluate", "--model", lstm, "--data", str(other))


@pytest.mark.parametrize("damage", ["folder", "config", "weights", "vocabulary", "other vocabulary"])
def test_a_folder_that_is_no_model_is_refused(
    damage: str, lstm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(lstm)
    if damage == "folder":
        folder = tmp_path / "none"
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-20])
    elif damage == "vocabulary":
        (folder / "vocabulary.json").unlink()
    else:
        corpus_of(write_text(tmp_path, "other text\n" * 50)).tokenizer.save(folder)
    for verb in (["evaluate", "--model"], ["generate", "--model"], ["compare"]):
        assert str(folder) in fails(capsys, *verb, str(folder))


# -- generate --------------------------------------------------------------------------------------------


def test_generate_to_stdout_and_to_a_file(
    lstm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", lstm, "--n", "5", "--seed", "3", "--format", "jsonl"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in shown.splitlines()]
    assert [len(line["text"]) for line in lines] == [LENGTH] * 5
    output = tmp_path / "samples.jsonl"
    assert main([*argv, "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert output.read_text(encoding="utf-8") == shown
    assert main(["generate", "--model", lstm, "--n", "5", "--seed", "4", "--format", "jsonl"]) == 0
    assert capsys.readouterr().out != shown
    assert "exists already" in fails(capsys, *argv, "--output", str(output))
    assert output.read_text(encoding="utf-8") == shown


def test_generate_with_a_prompt(lstm: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", lstm, "--n", "3", "--prompt", "line", "--length", "6", "--format", "jsonl"]
    assert main(argv) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert all(t.startswith("line") and len(t) == 6 for t in texts)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--n", "0"], "number of samples 0"),
        (["--n", "-1"], "number of samples -1"),
        (["--n", "x"], "--n"),
        (["--length", "9"], "1 to 8"),
        (["--length", "0"], "length 0"),
        (["--prompt", "Ω"], "--prompt: symbol 'Ω'"),
        (["--prompt", ""], "0 symbols"),
        (["--format", "xml"], "--format: 'xml'"),
        (["--output", "no/such/folder/out.txt"], "no/such/folder"),
        (["--seed", "-1"], "seed -1"),
    ],
)
def test_generate_refuses(lstm: str, argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in fails(capsys, "generate", "--model", lstm, *argv)


def test_a_full_disk_is_an_error_that_names_the_file(
    lstm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    output = tmp_path / "out.txt"
    message = fails(capsys, "generate", "--model", lstm, "--output", str(output))
    assert message.startswith(f"error: {output}: No space left on device")
    assert "free some space" in message
    assert not [p for p in tmp_path.iterdir() if "out.txt" in p.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_standard_output_is_an_error_too(lstm: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dflow", "data", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(lstm: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dflow", "generate", "--model", lstm, "--n", "100000", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert b"Error" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "secret.txt"),
            2,
            "secret.txt: Permission denied",
        ),
        (OSError("odd"), 2, "odd"),
        (MemoryError(), 2, "smaller batch size"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "smaller batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "smaller batch size"),
    ],
)
def test_what_goes_wrong_outside_is_said_in_words(
    error: BaseException,
    code: int,
    said: str,
    lstm: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(dflow.generate, "generate", fail)
    assert said in fails(capsys, "generate", "--model", lstm, code=code)


@pytest.mark.parametrize("said", ["", "stopped at step 3 and saved; go on with: dflow train --resume out"])
def test_ctrl_c_is_no_error(
    said: str, lstm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt(*[said] * bool(said))

    monkeypatch.setattr(dflow.generate, "generate", stop)
    assert main(["generate", "--model", lstm]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (said or "interrupted")
    monkeypatch.setenv("RANK", "1")  # the first of several processes says it for all
    assert main(["generate", "--model", lstm]) == 130
    assert said not in capsys.readouterr().err or not said


def test_a_bug_keeps_its_traceback(lstm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(dflow.generate, "generate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "--model", lstm])


# -- compare ---------------------------------------------------------------------------------------------


def test_compare(lstm: str, grouped: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results"
    argv = ["compare", grouped, lstm, "--batch-size", "3", "--rounds", "1", "--limit", "4", "--threads", "1"]
    assert main([*argv, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert [row["name"] for row in found["rows"]] == [grouped, lstm]
    assert found["reference"] == lstm
    assert found["text"].endswith("text.txt, test")
    assert (output / "compare.md").read_text(encoding="utf-8") in out
    assert json.loads((output / "compare.json").read_text()) == found
    assert (output / "compare.png").stat().st_size > 5000
    assert "exists already" in fails(capsys, *argv, "--output", str(output))


def test_compare_refuses(lstm: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "length 9" in fails(capsys, "compare", lstm, "--length", "9")
    assert "one name" in fails(capsys, "compare", lstm, lstm)


# -- train and data --------------------------------------------------------------------------------------


def test_train_hands_on_recipe_overrides_and_output(
    lstm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, bool]] = []
    monkeypatch.setattr(dflow.train, "train", lambda recipe, resume, device: calls.append((recipe, resume)))
    recipe = str(Path(lstm) / "recipe.yaml")
    argv = ["train", recipe, "--set", "train.steps=7", "model.hidden_size=16", "--set", "train.seed=5"]
    assert main([*argv, "--output", str(tmp_path / "new"), "--resume"]) == 0
    [(given, resume)] = calls
    assert resume is True
    assert (given.train.steps, given.train.seed, given.model.hidden_size) == (7, 5, 16)
    assert given.output == tmp_path / "new"
    assert main(["train", recipe]) == 0
    assert calls[1][0].output == Path(lstm)
    assert calls[1][1] is False


def test_train_refuses(lstm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(lstm) / "recipe.yaml")
    assert "no such recipe; `dflow recipes` lists" in fails(capsys, "train", str(tmp_path / "none.yaml"))
    misspelt = fails(capsys, "train", recipe.replace("recipe.yaml", "recpie.yaml"))
    assert "recpie.yaml: no such recipe; did you mean 'recipe.yaml'?" in misspelt
    assert "neither the folder of a training nor" in fails(
        capsys, "train", "--resume", str(tmp_path / "none")
    )
    assert "did you mean 'steps'" in fails(capsys, "train", recipe, "--set", "train.stpes=3")
    assert "exists already" in fails(capsys, "train", recipe)
    bare = tmp_path / "bare.yaml"
    bare.write_text(re.sub("(?m)^output:.*$", "", Path(recipe).read_text(encoding="utf-8")), encoding="utf-8")
    assert "key 'output' is missing" in fails(capsys, "train", str(bare))
    # An output on the command line is one.
    assert "exists already" in fails(capsys, "train", str(bare), "--output", lstm)
    assert "a folder; name it alone" in fails(
        capsys, "compress", lstm, recipe, "-o", str(tmp_path / "a.dfl"), "--model", lstm
    )


def test_data_verbs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "list", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("pydoc", "ptb", "text8"))
    assert out.splitlines()[0].split()[0] == "name"
    assert main(["data", "check", "pydoc"]) == 0
    assert "sha256:" in capsys.readouterr().out
    assert main(["data", "prepare", "pydoc"]) == 0
    assert "text8" in fails(capsys, "data", "check", "text9")
    assert "ptb" in fails(capsys, "data", "check", "ptb", "--folder", str(tmp_path))


def test_python_dash_m_is_the_same_command() -> None:
    assert importlib.import_module("dflow.__main__").main is cli.main
    done = subprocess.run(
        [sys.executable, "-m", "dflow", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("dflow 0")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("gpu", "chosen", "note"), [(None, "cpu", ""), ("cuda", "cuda", ""), ("mps", "cpu", "--device mps")]
)
def test_the_first_gpu_is_taken_if_it_has_float64(
    gpu: str | None,
    chosen: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    device = None if gpu is None else torch.device(gpu)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    assert _first_gpu() == chosen
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("device", ["nonsense", "cuda:1"])
def test_under_a_launcher_devices_are_not_to_be_chosen(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = write_model(tmp_path, "lstm", write_text(tmp_path))
    for verb in (["evaluate", "--model", str(model)], ["train", "recipe.yaml"]):
        assert cli.main([*verb, "--device", device]) == 2
        assert f"--device {device}: under a launcher" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(10**20)])
def test_seeds_are_numbers_of_63_bits(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--model", "none", "--output", "net", "--seed", seed]) == 2
    assert f"seed {seed} must be from 0 to 9223372036854775807" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "recipe.yaml", "--minutes", "3"], "are given by --set train.minutes=VALUE"),
        (["generate", "--model", "m", "--outputt", "x"], "did you mean '--output'?"),
    ],
)
def test_mistaken_flags_show_the_usage_of_their_verb(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith(f"usage: dflow {words[0]}")


def test_plots_are_png_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "training", str(tmp_path), "-o", str(tmp_path / "curve.jpg")]) == 2
    assert "plots are PNG files" in capsys.readouterr().err
    assert main(["evaluate", "--model", "none", "--device", "meta"]) == 2
