"""What happens to a training, and to its files: kills, signals, full disks, losses that are no numbers."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from folders import SETTINGS, write_text
from forks import FORKS
from safetensors.torch import load_file

from dflow import cli, hf
from dflow.config import InputError
from dflow.objectives import Objective
from dflow.train import Preempted, load_recipe, train
from dflow.train.loop import Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def recipe_file(folder: Path, text: Path, family: str = "grouped", **settings: object) -> Path:
    values = {
        "data": {"name": str(text)},
        "model": {"family": family, "length": 16, **SETTINGS[family]},
        "train": {"steps": 6, "batch_size": 8, "samples": 0, "trackers": [], "warmup": 2} | settings,
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def work(words: list[str], size: int | None = None) -> None:
    """`dflow` in a process of its own, which may write files of so many bytes at most."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    os._exit(cli.main(words))


def killed_at_a_change(words: list[str], count: int) -> None:
    """`dflow` in a process of its own that is killed before change ``count`` of its files."""
    changes = itertools.count()
    for name in ("replace", "unlink"):
        once = getattr(Path, name)

        def change(self: Path, *args: Any, once: Any = once, **options: Any) -> Any:
            if next(changes) == count:
                os._exit(9)
            return once(self, *args, **options)

        setattr(Path, name, change)
    work(words)


def start(path: Path, out: Path, *words: str, size: int | None = None) -> BaseProcess:
    process = FORKS.Process(target=work, args=(["train", str(path), "--output", str(out), *words], size))
    process.start()
    return process


def ended(process: BaseProcess, seconds: float = 120) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All that a training ends with: weights, averages, moments, and the best model."""
    found = {f"state.{k}": v for k, v in load_file(out / "state.safetensors").items()}
    # The library maps files; some are spoiled afterwards.
    return {k: v.clone() for k, v in (found | load_file(out / "model.safetensors")).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_killed_at_fifty_random_moments_it_ends_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    """Steps, evaluations and saves follow each other so closely that every one of them is hit."""
    path = recipe_file(tmp_path, text, steps=30, save_every=3, eval_every=5, ema=0.9, keep=2)
    assert ended(start(path, tmp_path / "first")) == 0
    began = time.monotonic()
    assert ended(start(path, tmp_path / "whole")) == 0
    whole, lasted = weights(tmp_path / "whole"), time.monotonic() - began
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 50:
        out = tmp_path / f"run{runs}"
        runs += 1
        for _ in range(8):
            process = start(path, out, "--resume")
            process.join(moments.uniform(0.05, 0.8) * lasted)
            if process.exitcode is None:
                kills += 1
            process.kill()
            process.join()
        assert ended(start(path, out, "--resume")) == 0
        assert same(weights(out), whole)
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(5, 31, 5))
        found = {f.name: f.status for f in hf.check(out) if f.status != "whole"}
        assert found == {"metrics.jsonl": "unlisted", "README.md": "unlisted"}
        assert not list(out.glob(".*"))


def test_killed_before_each_change_of_a_file_it_ends_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    """Every window between two changes of the folder, those of its beginning included."""
    path = recipe_file(tmp_path, text, steps=2, eval_every=1, ema=0.9, keep=2)
    assert ended(start(path, tmp_path / "whole")) == 0
    whole = weights(tmp_path / "whole")
    for count in itertools.count():
        out = tmp_path / f"run{count}"
        words = ["train", str(path), "--output", str(out), "--resume"]
        process = FORKS.Process(target=killed_at_a_change, args=(words, count))
        process.start()
        if ended(process) == 0:
            break
        assert process.exitcode == 9
        assert ended(start(path, out, "--resume")) == 0, f"refused after {count} changes"
        assert same(weights(out), whole)
        assert not list(out.glob(".*"))
    assert count > 20


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 0), ("SIGUSR1", 0)])
def test_a_signal_stops_the_training_and_is_told_by_the_exit_code(
    name: str, code: int, text: Path, tmp_path: Path
) -> None:
    path, out = recipe_file(tmp_path, text, steps=100_000, eval_every=100_000), tmp_path / "out"
    process = start(path, out)
    while not (out / "state.safetensors").is_file():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, getattr(signal, name))
    assert ended(process) == code
    assert hf.check(out)
    run = _state(out)
    assert 0 < run["step"] < 100_000


def _state(out: Path) -> dict[str, float]:
    from safetensors import safe_open

    with safe_open(out / "state.safetensors", "pt") as file:
        found: dict[str, float] = json.loads(file.metadata()["dflow"])
    return found


def test_an_evaluation_that_is_broken_off_is_done_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path, text, steps=9, eval_every=3)
    whole = train(load_recipe(path, [f"output={tmp_path / 'whole'}"]))
    recipe, bits = load_recipe(path), Run._bits

    def interrupted(self: Run, model: object) -> float:
        if self.progress.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return bits(self, model)

    monkeypatch.setattr(Run, "_bits", interrupted)
    with pytest.raises(Preempted, match="stopped at step 6"):
        train(recipe)
    monkeypatch.undo()
    assert len((recipe.output / "metrics.jsonl").read_text().splitlines()) == 1
    assert same(weights(train(recipe, resume=True)), weights(whole))

    def rows(out: Path) -> list[tuple[int, float]]:
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["valid_bits"]) for row in lines]

    assert rows(recipe.output) == rows(whole)


def test_a_disk_that_is_full_while_saving_leaves_the_last_state(text: Path, tmp_path: Path) -> None:
    path, out = recipe_file(tmp_path, text, steps=6, eval_every=2, ema=0.9), tmp_path / "out"
    with pytest.raises(Preempted):
        _stopped(load_recipe(path), 3)
    train(load_recipe(path, [f"output={tmp_path / 'whole'}"]))
    size, before = (out / "state.safetensors").stat().st_size, weights(out)
    # A state does not fit, all other files do.
    assert ended(start(path, out, "--resume", size=size // 2)) == 2
    after = weights(out)
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("state."))
    assert {f.status for f in hf.check(out)} <= {"whole", "unlisted"}
    assert not list(out.glob(".*"))
    assert ended(start(path, out, "--resume")) == 0
    assert same(weights(out), weights(tmp_path / "whole"))


def test_a_full_disk_is_told(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import SafetensorError
    from safetensors import torch as library

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(library, "save_file", full)
    assert cli.main(["train", str(recipe_file(tmp_path, text))]) == 2
    assert f"{tmp_path / 'out'}: No space left on device; free some space" in capsys.readouterr().err


def _stopped(recipe: object, step: int) -> None:
    once = Run._one_step

    def stopping(self: Run, started: float) -> tuple[float, float]:
        result = once(self, started)
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Run._one_step = stopping  # type: ignore[method-assign]
    try:
        train(recipe)  # type: ignore[arg-type]
    finally:
        Run._one_step = once  # type: ignore[method-assign]


def broken(monkeypatch: pytest.MonkeyPatch, calls: set[int], factor: float) -> None:
    """The loss of some steps times a factor, with its gradient."""
    forward, count = Objective.forward, [0]

    def spoiled(self: Objective, *args: object) -> object:
        count[0] += 1
        loss, latents = forward(self, *args)  # type: ignore[arg-type]
        return (loss * factor if count[0] in calls else loss), latents

    monkeypatch.setattr(Objective, "forward", spoiled)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_steps_without_a_finite_loss_are_left_out(
    factor: float, clip: float, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path, text, steps=12, eval_every=12, clip=clip, ema=0.5)
    broken(monkeypatch, {3, 4, 9}, factor)
    out = train(load_recipe(path))
    assert _state(out)["step"] == 12
    assert all(bool(v.isfinite().all()) for v in weights(out).values())


def test_a_gradient_that_is_not_finite_is_left_out(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path, text, "lstm", steps=4, eval_every=4, clip=0.0)
    forward = Objective.forward

    def spoiled(self: Objective, *args: object) -> object:
        loss, latents = forward(self, *args)  # type: ignore[arg-type]
        # 0 with a slope of infinity.
        return loss + next(self.parameters()).sub(
            next(self.parameters()).detach()
        ).abs().sum().sqrt(), latents

    monkeypatch.setattr(Objective, "forward", spoiled)
    with pytest.raises(InputError, match=r"gradient is (nan|inf) at step 2, and was from the beginning"):
        train(load_recipe(path, ["train.skip=2"]))
    assert not (tmp_path / "out").exists()


def test_too_many_in_a_row_stop_with_the_last_good_weights(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path, text, steps=20, eval_every=20)
    good = train(load_recipe(path, ["train.steps=20", f"output={tmp_path / 'good'}"]))
    broken(monkeypatch, set(range(6, 100)), float("nan"))
    with pytest.raises(InputError, match="at step 8, and of the 3 steps before it: stopped with"):
        train(load_recipe(path, ["train.skip=3"]))
    monkeypatch.undo()
    out = tmp_path / "out"
    assert _state(out)["step"] == 9
    # Five good steps were made, and the same five as in the whole run.
    moments = {k: float(v) for k, v in load_file(out / "state.safetensors").items() if k.endswith(".step")}
    assert set(moments.values()) == {5.0}
    train(load_recipe(path, ["train.skip=3"]), resume=True)
    assert _state(out)["step"] == _state(good)["step"] == 20


def test_without_a_whole_state_it_goes_on_from_the_one_before(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(tmp_path, text, steps=12, save_every=3, eval_every=6, keep=3)
    out = train(load_recipe(path))
    kept = [p.name for p in sorted(out.glob("state-*"))]
    # The two before the last, and a copy of the last.
    assert kept == [f"state-{step:09}.safetensors" for step in (6, 9, 12)]
    before = weights(out)
    for name in ("state.safetensors", kept[2]):
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data)
    assert [f.name for f in hf.check(out) if f.status == "damaged"] == [kept[2], "state.safetensors"]
    train(load_recipe(path), resume=True)
    assert "damaged or changed since it was saved" in capsys.readouterr().out
    assert same(weights(out), before)
    assert _state(out)["step"] == 12
    assert not [f.name for f in hf.check(out) if f.status == "damaged"]
    for state in out.glob("state*"):
        state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be resumed"):
        train(load_recipe(path), resume=True)


def test_clock_and_seed_of_the_process_do_not_matter(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path, text, steps=4, eval_every=2)
    first = weights(train(load_recipe(path)))
    torch.manual_seed(99)
    random.seed(99)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 1e9)
    assert same(weights(train(load_recipe(path, [f"output={tmp_path / 'later'}"]))), first)


def test_models_in_pieces_are_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no process has the whole of would be saved in part."""
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(InputError, match="configured for FSDP"):
        train(load_recipe(recipe_file(tmp_path, text)))
    assert not (tmp_path / "out").exists()
