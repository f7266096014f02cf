"""Sweeps: every combination of some values, the table of its runs, and how it goes on after a stop."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import statistics
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import SETTINGS, image_recipe, write_pictures, write_text
from forks import FORKS
from PIL import Image
from safetensors.torch import load_file

from dflow import cli
from dflow.config import InputError
from dflow.sweep import Average, Outcome, SweepTable, beside, grid_of, markdown, sweep
from dflow.sweep.grid import plan
from dflow.sweep.once import TimeLeft
from dflow.sweep.table import cells, draw
from dflow.threads import Suited, processors
from dflow.train import history, load_recipe, train
from dflow.train.loop import Run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of a tiny model, in the folder in which the test works."""
    return recipe_file(tmp_path, write_text(tmp_path))


def recipe_file(folder: Path, text: Path, **settings: object) -> Path:
    usual = {"steps": 2, "batch_size": 4, "eval_every": 1, "samples": 0, "trackers": [], "warmup": 1}
    values = {
        "data": {"name": str(text)},
        "model": {"family": "grouped", "length": 16, **SETTINGS["grouped"]},
        "train": usual | settings,
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def record(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return values


def ends(folder: Path) -> dict[str, str]:
    """How each run of a sweep ended, by the name of its folder."""
    return {Path(run["folder"]).name: run["end"] for run in record(folder)["runs"]}


def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders of all runs that make a step from now on."""
    names: list[str] = []
    once = Run._one_step

    def step(self: Run, started: float) -> tuple[float, float]:
        if self.recipe.output.name not in names:
            names.append(self.recipe.output.name)
        return once(self, started)

    monkeypatch.setattr(Run, "_one_step", step)
    return names


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_every_combination_is_the_training_that_its_settings_name(recipe: Path, tmp_path: Path) -> None:
    table = sweep(recipe, {"train.learning_rate": ["1e-3", 3e-2], "train.seed": [0, 1]}, ["train.steps=3"])
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "learning_rate=0.03,seed=0",
        "learning_rate=0.03,seed=1",
        "learning_rate=1e-3,seed=0",
        "learning_rate=1e-3,seed=1",
    ]
    settings = ["train.learning_rate=0.03", "train.seed=1", "train.steps=3", f"output={tmp_path / 'alike'}"]
    assert same(train(load_recipe(recipe, settings)), out / "learning_rate=0.03,seed=1")
    assert not same(out / "learning_rate=0.03,seed=0", out / "learning_rate=0.03,seed=1")
    for run in table.runs:
        rows = history(run.folder).rows
        assert (run.end, run.steps, run.valid) == ("done", 3, min(row["valid_bits"] for row in rows))
    figures = [run.valid for run in table.runs if run.valid is not None]
    for average, part in zip(table.averages, (figures[:2], figures[2:]), strict=True):
        assert (average.num_runs, average.mean) == (2, statistics.mean(part))
        assert average.deviation == pytest.approx(abs(part[0] - part[1]) / 2**0.5)
    assert table.best == 1
    text = (out / "sweep.md").read_text()
    assert text == markdown(table)
    assert f"| 0.03 | mean of 2 | best | {statistics.mean(figures[2:]):.4f} ± " in text
    assert record(out)["averages"][1]["mean"] == statistics.mean(figures[2:])
    assert Image.open(io.BytesIO((out / "sweep.png").read_bytes())).size[0] == 1650


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.lr=1,2"], "--sweep train.lr=1: RECIPE: train: unknown key 'lr'; "),
        (["train.learning_rat=1,2"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["train.learning_rate=1,-2"], "learning_rate=-2: RECIPE: train: learning_rate must be positive"),
        (["train.seed=0,1", "train.steps=a"], "--sweep train.seed=0 train.steps=a: "),
        (["train.learning_rate=[1e-3,2e-3]"], "with each of these write train.learning_rate=1e-3,2e-3"),
        (["learning_rate=1,2"], "write SECTION.NAME, as train.learning_rate"),
        (["train.learning_rate=1e-3,0.001"], "1e-3 and 0.001 are one value; leave one out"),
        (["train.seed=0,1,0"], "--sweep train.seed: 0 is there twice; leave one out"),
        (["train.seed=0,", "1"], "--sweep train.seed=0,: write values with commas between them"),
        (["train.seed=0", "1"], "--sweep 1: write SECTION.NAME=VALUE,VALUE without spaces"),
        (["train.seed="], "--sweep train.seed=: write values with commas between them"),
        (["model.calls=[1,2],[4"], "in brackets (a list) or in quotes"),
        (["train.seed=0", "train.seed=1"], "--sweep train.seed: given twice; write all of its values"),
        (["output=a,b"], "--sweep output: each run has a folder of its own"),
        (["data.name=RECIPE,gone.txt"], "data.name=gone.txt: gone.txt: neither a data set nor a file"),
        (["train.seed=0,1", "--set", "train.seed=3"], "train.seed: set by --set and by --sweep; leave one"),
        (["train.seed=0,1", "--set", "data.name=ptb"], "ptb: not in a local folder"),
        (["train.seed=0,1", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["train.seed=0,1", "--tracker", "wndb"], "no tracker 'wndb'; did you mean 'wandb'?"),
    ],
)  # fmt: skip
def test_a_mistake_is_an_error_before_the_first_training(
    words: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("RECIPE", str(recipe)) for word in words]
    assert cli.main(["train", str(recipe), "--sweep", *words]) == 2
    assert message.replace("RECIPE", str(recipe)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RECIPE", "--jobs", "2"], "--jobs 2 is for --sweep"),
        (["--sweep", "train.seed=0,1"], "name a recipe before --sweep"),
        (["RECIPE", "--tracker", "none", "--tracker", "wandb"], "none goes with no other"),
        (["RECIPE", "--tracker", "none", "--set", "train.trackers=[]"], "name the same setting; leave one"),
    ],
)
def test_flags_that_do_not_go_together(
    words: list[str], message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *(word.replace("RECIPE", str(recipe)) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_launcher_of_several_processes_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", str(recipe), "--sweep", "train.seed=0,1"]) == 2
    assert "leave the launcher out and give --jobs N" in capsys.readouterr().err


def test_values_are_split_as_a_list_of_yaml() -> None:
    words = ["model.calls=[1,2],[4, 8]", 'data.name="a,b.txt",c.txt', "train.noise={start: 1, end: 0},null"]
    assert grid_of(words) == {
        "model.calls": ["[1,2]", "[4, 8]"],
        "data.name": ['"a,b.txt"', "c.txt"],
        "train.noise": ["{start: 1, end: 0}", "null"],
    }


def test_names_of_folders_are_distinct_on_any_file_system(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b", "a:b", "A:B"):
        (tmp_path / name).write_text("text\n" * 50)
    grid = {"data.name": ["a b", "'a:b'", "'A:B'"], "model.calls": ["[1,2]", "[2]"]}
    names = [run.recipe.output.name for run in plan(lambda words: load_recipe(recipe, words), grid)]
    assert len({name.casefold() for name in names}) == 6
    assert names[0].startswith("name=a-b,calls=1-2-")
    assert set("".join(names)) <= set(string.ascii_letters + string.digits + "=,-")


def test_the_same_command_keeps_what_is_done_and_another_grid_adds_runs(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", ["train", str(recipe), "--sweep", "train.learning_rate=1e-3,1e-2"]
    assert cli.main(words) == 0
    names = trained(monkeypatch)
    assert cli.main([*words, "--resume"]) == 0
    assert names == []
    # With seeds, in another order, and a value spelled otherwise: the runs of seed 0 are there already.
    assert cli.main([*words[:3], "train.seed=0,1", "train.learning_rate=0.001,1e-2"]) == 0
    assert names == ["learning_rate=0.001,seed=1", "learning_rate=1e-2,seed=1"]
    runs = [(run["values"]["train.seed"], Path(run["folder"]).name) for run in record(out)["runs"]]
    assert runs[:2] == [("0", "learning_rate=1e-3"), ("0", "learning_rate=1e-2")]
    names.clear()
    # A larger budget goes on with each run.
    assert cli.main([*words, "--set", "train.steps=3"]) == 0
    assert names == ["learning_rate=1e-3", "learning_rate=1e-2"]
    names.clear()
    capsys.readouterr()
    assert cli.main([*words, "--set", "train.batch_size=8"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate=1e-3: was trained with other settings (train.batch_size: 4 then, 8 now)" in error
    assert "another --output" in error
    assert cli.main(["train", "--resume", str(out)]) == 2
    assert "a sweep; go on with its command: dflow train " in capsys.readouterr().err
    assert names == []


def test_a_run_that_fails_is_in_the_table_and_stops_no_other(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--sweep",
        "train.learning_rate=1e30,1e-2",
        "--set",
        "train.clip=0",
        "train.skip=0",
        "train.steps=4",
    ]
    assert cli.main(["train", str(recipe), *words]) == 1
    out = tmp_path / "out"
    assert list(ends(out).values()) == ["failed", "done"]
    assert "the loss or its gradient is nan at step" in record(out)["runs"][0]["reason"]
    assert "| 1e30 | failed |" in (out / "sweep.md").read_text()
    assert "the loss or its gradient is nan" in (out / "sweep.md").read_text()
    assert "1e30           failed" in capsys.readouterr().out


def test_data_that_change_between_runs_are_refused(recipe: Path, tmp_path: Path) -> None:
    sweep(recipe, {"train.seed": [0]})
    with (tmp_path / "text.txt").open("a") as file:
        file.write("Another line.\n")
    table = sweep(recipe, {"train.seed": [0, 1]})
    assert [run.end for run in table.runs] == ["done", "failed"]
    assert "the data have changed" in table.runs[1].reason


def test_a_folder_that_holds_something_else_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("of a training")
    with pytest.raises(InputError, match="exists already, and is no sweep; name another folder: --output"):
        sweep(recipe, {"train.seed": [0, 1]})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recipe.yaml"]


def interrupting(monkeypatch: pytest.MonkeyPatch, name: str, step: int, number: signal.Signals) -> None:
    """Send a signal in a step of the run in the folder of a name, once."""
    once, sent = Run._one_step, list[int]()

    def stepped(self: Run, started: float) -> tuple[float, float]:
        result = once(self, started)
        if self.recipe.output.name == name and self.progress.step + 1 == step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Run, "_one_step", stepped)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_a_signal_stops_the_sweep_and_its_command_goes_on_to_the_same_bits(
    name: str, code: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, settings = tmp_path / "it's out", ["train.steps=3", "train.learning_rate=1e-2"]
    words = ["train", str(recipe), "--set", *settings, "--sweep", "train.seed=1,2", "--output", str(out)]
    interrupting(monkeypatch, "seed=1", 2, getattr(signal, name))
    assert cli.main(words) == code
    assert ends(out) == {"seed=1": "stopped", "seed=2": "waiting"}
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("stopped the sweep, 0 of 2 runs are done; go on with: dflow train ")
    monkeypatch.undo()
    assert cli.main(shlex.split(said.partition("go on with: dflow ")[2])) == 0
    assert ends(out) == {"seed=1": "done", "seed=2": "done"}
    whole = train(load_recipe(recipe, [*settings, "train.seed=1", f"output={tmp_path / 'whole'}"]))
    assert same(whole, out / "seed=1")


def test_a_watched_training_says_how_far_it_is(recipe: Path) -> None:
    shares: list[tuple[float, str]] = []

    def watch(share: float, rate: float, things: str) -> str:
        assert rate > 0
        shares.append((share, things))
        return "run 1 of 2: "

    train(load_recipe(recipe), watch=watch)
    assert shares[-1] == (1.0, "chars")


def test_the_rest_of_a_sweep_is_estimated_by_budgets(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    recipes = [load_recipe(recipe, [f"train.steps={steps}"]) for steps in (100, 300)]
    time_left = TimeLeft(recipes, [0.5, 0.0])
    assert time_left.left() == "?"
    now[0], time_left.shares[0] = 10.0, 1.0
    # 50 steps in 10 seconds; 300 are left.
    assert (time_left.share(), time_left.left()) == (0.25, "01:00")


def test_threads_are_shared_by_the_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Suited, "sharing", 4)
    assert Suited.most() == max(1, processors() // 4)
    jobs = beside.SideBySide(3, None, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [jobs.device_of(slot) for slot in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert beside.SideBySide(2, None, torch.device("cpu")).device_of(1) == "cpu"


def swept(values: dict[str, list[str]], figure: Callable[[dict[str, str]], float | None]) -> SweepTable:
    """A table of runs that were never trained."""
    runs = [
        Outcome(run, f"out/{i}", "done", "", bits, 10, 60.0, [(5, 0.5, bits + 1), (10, 1.0, bits)])
        for i, run in enumerate({"model.x": x, "train.seed": s} for x in values["x"] for s in values["s"])
        if (bits := figure(run)) is not None
    ]  # fmt: skip
    averages = [
        Average({"model.x": x}, len(values["s"]), statistics.mean(figures), None)
        for x in values["x"]
        if (figures := [run.valid for run in runs if run.values["model.x"] == x and run.valid is not None])
    ]
    return SweepTable("recipe", "out", "", "bits a character", runs, averages, 1)


@pytest.mark.parametrize("values", [["1e-3", "1e-2", "3"], ["[1,2]", "[4,$8]"]], ids=["numbers", "words"])
def test_the_plot_shows_numbers_on_an_axis_and_others_in_lines(values: list[str]) -> None:
    table = swept(
        {"x": values, "s": ["0", "1"]}, lambda run: 2.0 + len(run["model.x"]) + int(run["train.seed"])
    )
    picture = draw(table)
    assert picture is not None
    assert Image.open(io.BytesIO(picture)).format == "PNG"
    # Two runs and a mean for each value, behind the head.
    assert len(cells(table)) == 1 + 3 * len(values)


def test_classifiers_are_compared_by_their_errors(tmp_path: Path) -> None:
    path = image_recipe(tmp_path, str(write_pictures(tmp_path / "pictures")), steps=2, eval_every=1)
    table = sweep(path, {"train.seed": [0]})
    assert table.unit.startswith("bits")
    metrics = Path(table.runs[0].folder) / "metrics.jsonl"
    rows = [
        json.loads(line) | {"valid_error as trained": 0.5 - i / 4}
        for i, line in enumerate(metrics.read_text().splitlines())
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = sweep(path, {"train.seed": [0]})
    assert (table.unit, table.runs[0].valid) == ("of the images wrong", 0.25)


def work(words: list[str], log: Path) -> None:
    """`dflow` in a process of its own."""
    torch.set_num_threads(1)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os._exit(cli.main(words))


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, write_text(tmp_path), steps=12, eval_every=3, save_every=2)
    whole = sweep(recipe, {"train.seed": [0, 1]}, (), tmp_path / "whole")
    out, log = tmp_path / "killed", tmp_path / "log"
    words = ["train", str(recipe), "--sweep", "train.seed=0,1", "--output", str(out)]
    for seconds in (0.6, 1.0, 1.4, None):
        process = FORKS.Process(target=work, args=(words, log))
        process.start()
        process.join(seconds)
        if seconds is not None:
            process.kill()
            process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert set(ends(out).values()) == {"done"}
    for run in whole.runs:
        assert same(Path(run.folder), out / Path(run.folder).name)


def work_beside(words: list[str], log: Path) -> None:
    """`dflow` in a process of its own, which forks those of its runs."""
    beside.CONTEXT = FORKS
    work(words, log)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_side_by_side_stopped_and_killed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, write_text(tmp_path), steps=400, eval_every=100, save_every=20)
    whole = sweep(recipe, {"train.seed": [0, 1, 2]}, (), tmp_path / "whole")
    out, log = tmp_path / "side", tmp_path / "log"
    words = ["train", str(recipe), "--sweep", "train.seed=0,1,2", "--output", str(out), "--jobs", "2"]

    def start() -> Any:
        process = FORKS.Process(target=work_beside, args=(words, log))
        process.start()
        return process

    process = start()
    deadline = time.monotonic() + 300
    while not all((out / f"seed={i}" / "state.safetensors").is_file() for i in (0, 1)):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(300)
    assert process.exitcode == 130, log.read_text()[-3000:]
    assert set(ends(out).values()) <= {"stopped", "waiting"}
    assert "stopping all runs after their steps" in log.read_text()
    assert "go on with: dflow train" in log.read_text()
    # Killed at once, its runs stop when they notice.
    process = start()
    process.join(1.5)
    process.kill()
    process.join()
    process = start()
    process.join(300)
    if process.exitcode == 2:
        assert "trains into" in log.read_text()
        time.sleep(5)
        process = start()
        process.join(300)
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert set(ends(out).values()) == {"done"}
    for run in whole.runs:
        assert same(Path(run.folder), out / Path(run.folder).name)
