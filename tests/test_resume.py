"""A training goes on by its folder alone, from anywhere; its data are known by their checksum."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import TEXT, image_recipe, write_pictures, write_text
from test_faults import recipe_file, same, weights

from dflow import cli
from dflow.config import InputError
from dflow.data import DataConfig, load
from dflow.train import identity, load_recipe, machine, recipe_of, resume_command, train
from dflow.train.loop import Run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def stopped(
    monkeypatch: pytest.MonkeyPatch, step: int, words: list[str], times: int = 1, apart: float = 60.0
) -> int:
    """The exit code of `dflow` with these words, stopped by Ctrl-C in a step, ``times`` times."""
    once = Run._one_step

    def interrupting(self: Run, started: float) -> tuple[float, float]:
        result = once(self, started)
        if self.progress.step + 1 == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                self.signals.time -= apart
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_one_step", interrupting)
        return cli.main(words)


def command(said: str, *rest: str) -> int:
    """Do what the last line of a message says."""
    words = shlex.split(said[said.index("dflow train --resume") :].strip().split("\n")[0].split(", or")[0])
    return cli.main([*words[1:], *rest])


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().rsplit("\n", 1)[-1]


SET = ["--set", "train.learning_rate=0.01", "train.seed=3", "data.lowercase=true"]


def test_ctrl_c_tells_a_command_that_goes_on_to_the_same_bits(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = recipe_file(tmp_path, text), tmp_path / "it's out"
    assert cli.main(["train", str(path), *SET, "--output", str(tmp_path / "whole")]) == 0
    assert stopped(monkeypatch, 4, ["train", str(path), *SET, "--output", str(out)]) == 130
    said = told(capsys)
    assert said == f"stopped at step 4 and saved; go on with: dflow train --resume {shlex.quote(str(out))}"
    # From another directory too, and with the user's recipe gone.
    monkeypatch.chdir(tmp_path.parent)
    path.unlink()
    assert command(said) == 0
    assert same(weights(out), weights(tmp_path / "whole"))


def test_ctrl_c_twice_stops_at_once_and_tells_from_where_to_go_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path, text, save_every=2, eval_every=100)
    assert stopped(monkeypatch, 4, ["train", str(path)], times=2) == 130
    said = told(capsys)
    assert said.startswith("stopped at once, without saving; go on from step 2 with: dflow train --resume")
    assert command(said) == 0
    other = tmp_path / "other"
    assert stopped(monkeypatch, 1, ["train", str(path), "--output", str(other)], times=2) == 130
    assert told(capsys) == "stopped at once, before anything was saved"
    assert not other.exists()


def test_the_echo_of_a_signal_is_no_second_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of Ctrl-C under a launcher each process hears twice."""
    monkeypatch.setattr(machine, "ECHO", 60.0)  # however slow the machine
    path = recipe_file(tmp_path, text)
    assert stopped(monkeypatch, 4, ["train", str(path)], times=2, apart=0.0) == 130
    assert "stopped at step 4 and saved" in told(capsys)


def test_resume_never_begins_what_was_not_asked_for(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = recipe_file(tmp_path, text), tmp_path / "out"
    elsewhere = tmp_path / "elsewhere"
    assert stopped(monkeypatch, 3, ["train", str(path), "--output", str(elsewhere)]) == 130
    # Without the --output of before there is nothing in the output of the recipe.
    assert cli.main(["train", str(path), "--resume"]) == 2
    said = told(capsys)
    assert said.startswith(f"error: {out}: nothing to resume; go on with a training by its folder")
    assert not out.exists()
    assert cli.main(["train", str(elsewhere / "recipe.yaml"), "--set", f"output={out}", "--resume"]) == 0
    shutil.rmtree(out)
    # Named by the user the folder may be empty: a scheduler queues the same line again and again.
    assert cli.main(["train", str(path), "--output", str(out), "--resume"]) == 0
    assert "nothing to resume yet; a new training begins" in capsys.readouterr().err
    for words in (
        ["--resume", str(tmp_path)],
        [str(out)],
        ["--resume", str(out), "--output", str(elsewhere)],
    ):
        assert cli.main(["train", *words]) == 2
    assert "the training in" in told(capsys)
    moved = tmp_path / "moved"
    shutil.move(elsewhere, moved)
    assert cli.main(["train", str(moved / "recipe.yaml"), "--resume"]) == 2
    assert command(told(capsys)) == 0


@pytest.mark.parametrize("change", ["train.seed=5", "model.hidden_size=16", "data.name=other.txt", "family"])
def test_another_run_is_refused_with_the_command_that_goes_on(
    change: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("Ωmega and other symbols. " * 200)
    path, out = recipe_file(tmp_path, text), tmp_path / "out"
    assert stopped(monkeypatch, 3, ["train", str(path)]) == 130
    if change == "family":
        path = recipe_file(tmp_path, text, "lstm")
    before = (out / "state.safetensors").read_bytes()
    words = [] if change == "family" else ["--set", change]
    assert cli.main(["train", str(path), "--resume", *words]) == 2
    said = told(capsys)
    assert "was trained with other settings" in said
    assert change.partition("=")[0] in said
    assert (out / "state.safetensors").read_bytes() == before
    assert said.endswith(f"dflow train --resume {out}")
    assert command(said) == 0


def test_the_budget_may_change_and_is_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = recipe_file(tmp_path, text), tmp_path / "out"
    assert cli.main(["train", str(path)]) == 0
    assert stopped(monkeypatch, 8, ["train", "--resume", str(out), "--set", "train.steps=9"]) == 130
    assert command(told(capsys)) == 0
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 9


def test_a_run_killed_before_its_first_state_begins_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(load_recipe(recipe_file(tmp_path, text)))
    for file in (*out.glob("*.safetensors"), out / "config.json", out / "metrics.jsonl"):
        file.unlink()
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert (out / "model.safetensors").is_file()


def test_a_state_of_the_first_version_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprint had the name of the file, and its recipe a path from the directory of the training."""
    monkeypatch.chdir(tmp_path)
    path, out = recipe_file(tmp_path, Path("text.txt")), tmp_path / "out"
    monkeypatch.setattr(identity, "fingerprint", lambda recipe: f"of {recipe.data.name}")
    monkeypatch.setattr(DataConfig, "located", lambda self: self)
    assert stopped(monkeypatch, 3, ["train", str(path), "--output", "out"]) == 130
    monkeypatch.undo()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["data"]["name"] == "text.txt"
    monkeypatch.chdir(tmp_path.parent)
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["data"]["name"] == str(text)
    # A recipe changed by hand is another run.
    monkeypatch.setattr(identity, "fingerprint", lambda recipe: "another")
    kept = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(kept.replace("seed: 0", "seed: 1"))
    assert cli.main(["train", "--resume", str(out)]) == 2


@pytest.mark.parametrize("script", ["train_text8", "train_pbnet"])
def test_scripts_for_launchers_go_on_by_the_folder(
    script: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(load_recipe(recipe_file(tmp_path, text)))
    words = ["--resume", str(out), "--set", "train.steps=7"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 0
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 7


# -- places ----------------------------------------------------------------------------------------------


def evaluated(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", "--model", str(out), "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_model_is_scored_from_anywhere_and_its_data_may_move(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe_file(tmp_path, Path("text.txt"))
    assert cli.main(["train", str(path), "--set", "data.test=0.2", "--output", "out"]) == 0
    first = evaluated(capsys, Path("out"))
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert evaluated(capsys, tmp_path / "out")["bpc"] == first["bpc"]
    out = other / "moved"
    shutil.move(tmp_path / "out", out)
    assert evaluated(capsys, out)["bpc"] == first["bpc"]
    shutil.move(text, "copied.txt")
    checksum = load(DataConfig("copied.txt")).checksum
    for words in (["evaluate", "--model", "moved"], ["train", "--resume", "moved"], ["compare", "moved"]):
        assert cli.main(words) == 2
        said = told(capsys)
        assert f"{text}: no such file" in said
        assert checksum in said
        assert "--data PATH" in said
    # It is what the model was trained on, and so are its splits; another text has the usual ones.
    found = evaluated(capsys, out, "--data", "copied.txt")
    assert (found["bpc"], found["num_chunks"], found["checksum"]) == (
        first["bpc"],
        first["num_chunks"],
        checksum,
    )
    Path("longer.txt").write_text(TEXT + "line")
    assert (
        evaluated(capsys, out, "--data", "longer.txt", "--split", "test")["num_chunks"]
        < first["num_chunks"] / 2
    )
    words = ["train", "--resume", "moved", "--set", "data.name=copied.txt", "train.steps=7"]
    assert cli.main(words) == 0
    assert evaluated(capsys, out)["checksum"] == checksum


def test_pictures_may_move_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    recipe = image_recipe(tmp_path, {"name": "pictures", "test": 0.3, "valid": 0.1}, steps=1)
    assert cli.main(["train", str(recipe)]) == 0
    first = evaluated(capsys, tmp_path / "out", "--draws", "2")
    monkeypatch.chdir(tmp_path.parent)
    assert evaluated(capsys, tmp_path / "out", "--draws", "2") == first | {"model": str(tmp_path / "out")}
    shutil.move(tmp_path / "pictures", tmp_path / "elsewhere")
    assert cli.main(["evaluate", "--model", str(tmp_path / "out")]) == 2
    assert "--data PATH" in told(capsys)
    found = evaluated(capsys, tmp_path / "out", "--draws", "2", "--data", str(tmp_path / "elsewhere"))
    assert (found["num_rows"], found["vi"]) == (first["num_rows"], first["vi"])


def test_relative_paths_are_those_of_the_working_directory_else_of_the_recipe(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path, Path("text.txt"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert load_recipe(path).data.name == str(text)
    Path("text.txt").write_text(TEXT.upper())
    assert load_recipe(path).data.name == "text.txt"
    # A folder of the first version, seen from elsewhere: its output tells where it was trained.
    trained = tmp_path / "runs" / "one"
    trained.mkdir(parents=True)
    values = yaml.safe_load(path.read_text()) | {"output": "runs/one"}
    (trained / "recipe.yaml").write_text(yaml.safe_dump(values))
    Path("text.txt").unlink()
    assert load_recipe(trained / "recipe.yaml").data.name == str(text)


@pytest.mark.parametrize("change", ["touch", "copy", "packed"])
def test_a_store_goes_by_the_text_not_by_its_time_or_place(
    change: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    first, now = load(DataConfig(str(text), store=str(store))), text
    if change == "touch":
        os.utime(text, (1, time.time() + 100))
    elif change == "copy":
        now = Path(shutil.copy(text, tmp_path / "copy.txt"))
        text.unlink()
    else:
        now = tmp_path / "text.txt.gz"
        now.write_bytes(gzip.compress(text.read_bytes()))
    again = load(DataConfig(str(now), store=str(store)))
    assert again.checksum == first.checksum
    assert torch.equal(again.test.ids, first.test.ids)
    # It is compared once.
    with monkeypatch.context() as patch:
        patch.setattr("dflow.data.stores.StoreSource.checksum", lambda self: pytest.fail("read again"))
        load(DataConfig(str(now), store=str(store)))
    changed = TEXT.replace("line", "LINE").encode()
    now.write_bytes(gzip.compress(changed) if change == "packed" else changed)
    with pytest.raises(InputError, match="another text, or of one that has changed"):
        load(DataConfig(str(now), store=str(store)))


def test_a_model_of_a_store_is_scored_after_its_text_was_touched(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path, text)
    words = ["--set", f"data.store={tmp_path / 'store'}"]
    assert cli.main(["train", str(path), *words]) == 0
    first = evaluated(capsys, tmp_path / "out")
    os.utime(text)
    assert evaluated(capsys, tmp_path / "out") == first


# -- trackers --------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "get_available_trackers", lambda: ["tensorboard"])
    path = recipe_file(tmp_path, tmp_path / "text that is not there")
    with pytest.raises(
        InputError, match=r"wandb, comet_ml not installed; pip install wandb comet-ml"
    ) as error:
        train(load_recipe(path, ["train.trackers=[wandb,tensorboard,comet_ml]"]))
    assert "--set 'train.trackers=[tensorboard]'" in str(error.value)
    with pytest.raises(InputError, match="no tracker 'wndb'; did you mean 'wandb'"):
        train(load_recipe(path, ["train.trackers=[wndb]"]))
    machine.check_trackers(["tensorboard", "all", ""])
    assert not (tmp_path / "out").exists()


def test_names_of_folders_are_quoted() -> None:
    assert resume_command(Path("-a b")) == "dflow train --resume './-a b'"


def test_a_folder_without_a_recipe_tells_how_to_name_the_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe\.yaml, which names the data; name them with --data"):
        recipe_of(tmp_path)
