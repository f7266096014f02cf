"""A sweep: its runs one after another in this process, or several at a time in processes of their own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from dflow.config import InputError
from dflow.data import ImageConfig, load, load_images
from dflow.sweep.beside import SideBySide
from dflow.sweep.grid import Planned, plan
from dflow.sweep.once import TimeLeft, train_once
from dflow.sweep.table import End, SweepTable, outcome_of, share_of, table_of, write
from dflow.terminal import shown
from dflow.train import RECIPE, Preempted, Recipe, load_recipe
from dflow.train.machine import check_trackers
from dflow.train.state import lock, states


def sweep(
    recipe: str | Path,
    grid: Mapping[str, Sequence[object]],
    settings: Sequence[str] = (),
    output: str | Path | None = None,
    *,
    jobs: int = 1,
    threads: int | None = None,
    device: torch.device | None = None,
    command: str = "",
) -> SweepTable:
    """Train a recipe with every combination of some values of its settings.

    Each run has a sub-folder of the output. Runs that are done already are kept, and one that was stopped is
    resumed, so that the same call goes on with a sweep, also with further values. A run that fails does not
    stop the others. The table is written into the output after each run, as ``sweep.md`` and ``sweep.json``,
    and at the end the plot ``sweep.png``.

    Args:
        recipe: name or file.
        grid: values by settings as ``train.seed``; a text is read as YAML.
        settings: that replace those of the recipe in all runs, each as ``train.minutes=3``.
        output: folder of the sweep; None for the output of the recipe.
        jobs: number of runs at a time; each of several has a process and, on the CPU, a share of the
            processors.
        threads: of each process; None for one where the model is small, else its share of the processors.
        device: None for the one that accelerate chooses.
        command: by which a user goes on, for messages.

    Raises:
        InputError: a setting or value that the recipe refuses, a value that is there twice, an output that
            holds something else, several processes of a launcher.
        KeyboardInterrupt: Ctrl-C; `Preempted` after SIGTERM or SIGUSR1.
    """
    check_alone()
    if jobs < 1:
        raise InputError(f"--jobs {jobs} must be at least 1")
    # JSON is YAML; texts are as on the command line.
    texts = {key: [_spelled(value) for value in values] for key, values in grid.items()}
    place = None if output is None else Path(output)
    otherwise = None if place is None else str(place)
    runs = plan(lambda words: load_recipe(recipe, [*settings, *words], otherwise), texts, place)
    for run in runs:
        check_trackers(run.recipe.train.trackers)
    return _Runs(str(recipe), command, runs).train(SideBySide(min(jobs, len(runs)), threads, device))


def check_alone() -> None:
    """Raise `InputError` under a launcher of several processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise InputError(
            f"--sweep: a launcher has started {world} processes, and a sweep starts its own: leave the "
            "launcher out and give --jobs N for N runs at a time, or launch the runs one by one with --set"
        )


def _check_data(recipes: Sequence[Recipe]) -> None:
    """Read the data of the recipes, so that what is wrong with them is an error before the first training."""
    for recipe in {json.dumps(asdict(recipe.data), default=str): recipe for recipe in recipes}.values():
        if isinstance(recipe.data, ImageConfig):
            load_images(recipe.data)
        else:
            load(recipe.data, None, recipe.model.length)


def _spelled(value: object) -> str:
    """A value as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _say(text: str) -> None:
    tqdm.write(shown(text, sys.stdout))


class _Runs:
    """A sweep in progress: its runs, and how each of them ended or is waiting."""

    def __init__(self, recipe: str, command: str, runs: Sequence[Planned]) -> None:
        self.recipe, self.command, self.runs = recipe, command, runs
        self.output = runs[0].recipe.output.parent
        self.outcomes = [outcome_of(run, _end_of(run)) for run in runs]

    def table(self) -> SweepTable:
        """The table as it is now."""
        return table_of(self.recipe, self.output, self.command, self.outcomes)

    def train(self, jobs: SideBySide) -> SweepTable:
        """Train what is left, and write the table."""
        left = [i for i, (outcome, _) in enumerate(self.outcomes) if outcome.end != "done"]
        _check_data([self.runs[i].recipe for i in left])
        self.output.mkdir(parents=True, exist_ok=True)
        descriptor = lock(self.output)
        number_done = len(self.runs) - len(left)
        done_before = f", {number_done} of them done already" if number_done else ""
        _say(f"{len(self.runs)} run{'s' * (len(self.runs) > 1)}{done_before}; output {self.output}")
        write(self.table(), self.output)
        time_left = TimeLeft([run.recipe for run in self.runs], [share_of(run) for run in self.runs])
        if jobs.jobs > 1:
            endings = jobs.train(left, self._recipe, time_left, _say)
        else:
            endings = self._one_by_one(left, jobs, time_left)
        try:
            for i, reason in endings:
                self.outcomes[i] = outcome_of(self.runs[i], "failed" if reason else "done", reason)
                write(self.table(), self.output)
                if reason or jobs.jobs > 1:
                    self._report(i)
        except KeyboardInterrupt as stop:
            done = sum(outcome.end == "done" for outcome, _ in self.outcomes)
            way = f"go on with: {self.command}" if self.command else "call it again to go on"
            kind = Preempted if isinstance(stop, Preempted) else KeyboardInterrupt
            raise kind(f"stopped the sweep, {done} of {len(self.runs)} runs are done; {way}") from None
        finally:
            for i in left:
                if self.outcomes[i][0].end not in ("done", "failed"):
                    self.outcomes[i] = outcome_of(self.runs[i], _end_of(self.runs[i]))
            write(self.table(), self.output, picture=True)
            if descriptor is not None:
                os.close(descriptor)
        return self.table()

    def _one_by_one(
        self, indices: Sequence[int], jobs: SideBySide, time_left: TimeLeft
    ) -> Iterator[tuple[int, str]]:
        """Train some runs in this process; the index of each, and the reason where it failed."""
        if jobs.threads is not None:
            torch.set_num_threads(jobs.threads)
        for i in indices:

            def watch(share: float, rate: float, things: str, i: int = i) -> str:
                time_left.shares[i] = share
                return f"run {i + 1} of {len(self.runs)}, {time_left.left()} left in all: "

            recipe = self._recipe(i)
            _say(f"run {i + 1} of {len(self.runs)}: {recipe.output.name}")
            reason = train_once(recipe, jobs.device, watch)
            time_left.shares[i] = 1.0
            yield i, reason

    def _recipe(self, i: int) -> Recipe:
        """The recipe of a run that begins or goes on, which refuses other data than those of a run before."""
        recipe = self.runs[i].recipe
        before = next((outcome.folder for outcome, _ in self.outcomes if outcome.end == "done"), None)
        if before is None or any(key.startswith("data.") for key in self.runs[i].values):
            return recipe
        checksum = load_recipe(Path(before) / RECIPE).data.checksum
        return replace(recipe, data=replace(recipe.data, checksum=checksum))

    def _report(self, i: int) -> None:
        """A line on a run that has ended."""
        outcome, unit = self.outcomes[i]
        name = Path(outcome.folder).name
        figure = "" if outcome.valid is None else f", {outcome.valid:.4f} {unit}"
        rest = f": {outcome.reason}" if outcome.reason else f"{figure} in {outcome.steps:,} steps"
        _say(f"run {i + 1} of {len(self.runs)}, {name}: {outcome.end}{rest}")


def _end_of(run: Planned) -> End:
    """How far a run is by its folder alone."""
    return "done" if share_of(run) >= 1 else "stopped" if states(run.recipe.output) else "waiting"
