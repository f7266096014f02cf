"""The state of a training in its output folder: saved, restored, pruned; and the lock on the folder.

A state is one safetensors file with the tensors of `Weights`. Its metadata hold, as JSON under the key
``dflow``, the fields of `Progress` and the fingerprints by which a run knows its own states.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError

from dflow import hf
from dflow.config import InputError
from dflow.data import files
from dflow.train import identity, schedule
from dflow.train.recipe import METRICS, STATE, TrainConfig
from dflow.train.tasks import Task
from dflow.train.weights import Weights

try:
    import fcntl
except ImportError:  # of systems other than Unix
    fcntl = None  # type: ignore[assignment]


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: number of steps made.
        elapsed: seconds spent, evaluations included.
        best: the least rank of a model up to now.
        next_eval: when the next evaluation is due, a step or a time in seconds.
        next_save: when the next state is due, where states have times of their own.
        skipped: number of steps left out in a row up to now.
        pending: the loss at which an evaluation was broken off, else NaN.
        evaluated: the step of the last evaluation.
        loss: the loss of the last step.
    """

    step: int = 0
    elapsed: float = 0.0
    best: float = math.inf
    next_eval: float = 0.0
    next_save: float = 0.0
    skipped: int = 0
    pending: float = math.nan
    evaluated: int = -1
    loss: float = math.nan

    def fraction(self, config: TrainConfig) -> float:
        """How much of the budget is spent, in [0, 1]."""
        return schedule.fraction(config, self.step, self.elapsed)

    def after(self, config: TrainConfig, every: int | None) -> float:
        """When the next evaluation or state is due: a step, or a time in seconds."""
        unit, size = schedule.interval(config, every)
        return size + (self.step if unit == "steps" else self.elapsed)

    def is_due(self, config: TrainConfig) -> bool:
        """Whether the next evaluation is due."""
        unit, _ = schedule.interval(config, config.eval_every)
        return (self.step if unit == "steps" else self.elapsed) >= self.next_eval


class DamagedState(Exception):
    """A file of a training state that cannot be used."""


class States:
    """The states of one training; ``say`` prints a message on the main process."""

    def __init__(self, task: Task, weights: Weights, say: Callable[[str], None]) -> None:
        self.recipe, self.config, self.checksum = task.recipe, task.recipe.train, task.data.checksum
        self.weights, self.accelerator, self.say = weights, weights.accelerator, say
        self.output = task.recipe.output
        self._lock: int | None = None

    def save(self, progress: Progress) -> None:
        """All that resuming needs, in one file that is replaced whole."""
        tensors = self.weights.whole()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        about = asdict(progress) | {
            "intervals": self._intervals(),
            "recipe": identity.fingerprint(self.recipe),
            "data": self.checksum,
            "scaler": scaler.state_dict() if scaler else None,
        }
        with hf.replacing(self.output) as folder:
            safetensors.torch.save_file(tensors, folder / STATE, {"dflow": json.dumps(about)})
            if self.config.keep > 1:
                shutil.copyfile(folder / STATE, folder / f"state-{progress.step:09d}.safetensors")
        self.prune()

    def prune(self) -> None:
        """Remove states that are older than those to be kept."""
        # The newest of these is a copy of the last state, which may be the one that is damaged.
        num_kept = self.config.keep if self.config.keep > 1 else 0
        copies = [path.name for path in states(self.output) if path.name != STATE]
        hf.remove(self.output, copies[num_kept:])

    def restore(self, paths: list[Path]) -> Progress:
        """Go back to the last saved state, or the last one before it that is whole."""
        for path in paths:
            try:
                return self._with_best(self._restore(path))
            except DamagedState as error:
                self.say(str(error))
        raise InputError(
            f"{paths[0]}: truncated or foreign; the model folder itself may be whole, but this run cannot "
            "be resumed"
        )

    def _with_best(self, progress: Progress) -> Progress:
        """``progress``, which begins anew with the best model where that is damaged or gone."""
        try:
            hf.verify(self.output, ["config.json", "model.safetensors"])
            whole = (self.output / "model.safetensors").is_file()
        except InputError:
            whole = False
        if progress.best < math.inf and not whole:
            self.say(
                f"{self.output}: the best model is damaged or gone; the next evaluation is the best anew"
            )
            progress.best, progress.evaluated = math.inf, -1
        return progress

    def _restore(self, path: Path) -> Progress:
        about = _about(path)
        if not identity.is_same(self.recipe, about.get("recipe")):
            raise identity.other_settings(self.recipe)
        files.check_same(self.recipe.data.name, self.checksum, about.get("data"))
        try:
            self.weights.load(path)
            # States of versions without these fields were mostly written by an evaluation.
            values = {"evaluated": about["step"], "loss": math.nan} | about
            progress = Progress(**{name: type(old)(values[name]) for name, old in asdict(Progress()).items()})
            if about.get("intervals", self._intervals()) != self._intervals():
                # Times of other settings no longer hold; nor may steps be taken for seconds.
                progress.next_eval = progress.after(self.config, self.config.eval_every)
                progress.next_save = progress.after(self.config, self.config.save_every)
            if self.accelerator.scaler and about["scaler"]:
                self.accelerator.scaler.load_state_dict(about["scaler"])
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DamagedState(f"{path}: not a state of this run ({error})") from None
        metrics = self.output / METRICS
        if self.accelerator.is_main_process and metrics.is_file():
            _cut_metrics(metrics, progress.step)
        return progress

    def _intervals(self) -> list[Any]:
        return [list(schedule.interval(self.config, self.config.eval_every)), self.config.save_every]

    def lock(self) -> None:
        """Keep others from training into the same folder, where the system can."""
        if self._lock is None:
            self._lock = lock(self.output)

    def unlock(self) -> None:
        """Let others train into the folder."""
        if self._lock is not None:
            os.close(self._lock)


def lock(folder: Path) -> int | None:
    """Keep other processes from training into ``folder`` until the descriptor that this returns is closed.

    None where the system has no locks.

    Raises:
        InputError: another process trains into it.
    """
    can_lock: bool = fcntl is not None
    if not can_lock:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{folder}: another process is training into this folder; wait for it, or choose another output"
        ) from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def states(output: Path) -> list[Path]:
    """Training states in a folder, the last first."""
    copies = sorted(output.glob("state-*.safetensors"), reverse=True)
    return [path for path in (output / STATE, *copies) if path.is_file()]


def step_of(output: Path) -> int:
    """The step of the last saved state; 0 where it cannot be read."""
    try:
        return int(_metadata(output / STATE)["step"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0


def _metadata(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        about: dict[str, Any] = json.loads((file.metadata() or {})["dflow"])
    return about


def _about(path: Path) -> dict[str, Any]:
    """The metadata of a state that is as it was saved."""
    try:
        hf.verify(path.parent, [path.name])
        return _metadata(path)
    except InputError as error:
        raise DamagedState(str(error)) from None
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DamagedState(f"{path}: {error}") from None


def _cut_metrics(metrics: Path, step: int) -> None:
    """Remove lines after a step, and one that a machine broke off in the middle."""
    lines = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    files.write(metrics, "".join(lines).encode())
