"""How the runs of a sweep ended: one table, with means over seeds, the best combination, and a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from dflow import plot
from dflow.compare.results import document
from dflow.config import InputError
from dflow.generate import write_whole
from dflow.sweep.grid import SEED, SWEEP, Planned, short_keys
from dflow.train import history
from dflow.train.schedule import fraction

#: Files in the folder of a sweep: the table, its record, the plot.
TABLE, PLOT = "sweep.md", "sweep.png"
FILES = (TABLE, SWEEP, PLOT)

End = Literal["done", "failed", "stopped", "waiting"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, or how far it is.

    Attributes:
        values: its value of each swept setting.
        folder: its model folder.
        end: done, failed, stopped (resumed when the sweep goes on) or waiting.
        reason: why it failed.
        valid: the best figure of the validation data up to now, by which its model was chosen.
        steps: at its last evaluation.
        seconds: at its last evaluation.
        curve: steps, minutes and figure of each evaluation.
    """

    values: dict[str, str]
    folder: str
    end: End
    reason: str = ""
    valid: float | None = None
    steps: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Average:
    """A combination of settings, without the seed.

    Attributes:
        values: of the settings.
        num_runs: number of its runs that are done.
        mean: of their figures; None without any.
        deviation: their standard deviation, with n - 1; None with fewer than two.
    """

    values: dict[str, str]
    num_runs: int
    mean: float | None
    deviation: float | None


@dataclass(frozen=True)
class SweepTable:
    """The runs of a sweep.

    Attributes:
        recipe: name or path of the recipe.
        output: folder of the sweep.
        command: the command that goes on with it; empty where it was begun from Python.
        unit: the unit of the figures; empty before the first.
        runs: in the order of the grid.
        averages: of each combination, in the same order.
        best: the index of the best of these: that of the least mean among those with the most runs done.
            None with a single one, and where the validation data differ.
    """

    recipe: str
    output: str
    command: str
    unit: str
    runs: list[Outcome]
    averages: list[Average]
    best: int | None

    def runs_of(self, average: Average) -> list[Outcome]:
        """The runs of a combination."""
        return [run for run in self.runs if without_seed(run.values) == average.values]


def without_seed(values: Mapping[str, str]) -> dict[str, str]:
    """Values of the settings, without the seed."""
    return {key: text for key, text in values.items() if key != SEED}


def outcome_of(run: Planned, end: End, reason: str = "") -> tuple[Outcome, str]:
    """How a run ended, with what its folder says of its evaluations, and the unit of its figures."""
    folder = run.recipe.output
    try:
        rows = history(folder)
    except InputError:
        return Outcome(run.values, str(folder), end, reason), ""
    unit, curve = rows.unit, []
    for row in rows.rows:
        # A classifier is chosen by the last of its errors.
        errors = [name for name in row if name.startswith("valid_error")]
        figure = row[errors[-1] if errors else "valid_bits"]
        if math.isfinite(figure):
            curve.append((int(row["step"]), row["seconds"] / 60, figure))
        unit = "of the images wrong" if errors else unit
    last = rows.rows[-1]
    valid = min((figure for *_, figure in curve), default=None)
    return Outcome(
        run.values, str(folder), end, reason, valid, int(last["step"]), last["seconds"], curve
    ), unit


def share_of(run: Planned) -> float:
    """The share of its budget that a run had spent at its last evaluation; 1 only where it has a model."""
    folder = run.recipe.output
    try:
        last = history(folder).rows[-1]
    except InputError:
        return 0.0  # not begun, or a line that was broken off, which is removed when the run goes on
    share = fraction(run.recipe.train, int(last["step"]), last["seconds"])
    return share if (folder / "config.json").is_file() else 0.0


def table_of(recipe: str, output: Path, command: str, outcomes: Sequence[tuple[Outcome, str]]) -> SweepTable:
    """The table of some runs and the units of their figures."""
    runs = [run for run, _ in outcomes]
    units = {unit for _, unit in outcomes} - {""}
    averages = []
    for values in dict.fromkeys(tuple(without_seed(run.values).items()) for run in runs):
        figures = [
            run.valid
            for run in runs
            if run.end == "done" and run.valid is not None and without_seed(run.values) == dict(values)
        ]
        averages.append(
            Average(
                dict(values),
                len(figures),
                statistics.mean(figures) if figures else None,
                statistics.stdev(figures) if len(figures) > 1 else None,
            )
        )
    best, unit = _best(averages, runs, units), " or ".join(sorted(units))
    return SweepTable(recipe, str(output), command, unit, runs, averages, best)


def _best(averages: Sequence[Average], runs: Sequence[Outcome], units: set[str]) -> int | None:
    comparable = len(units) == 1 and not any(key.startswith("data.") for key in runs[0].values)
    most = max(average.num_runs for average in averages)
    if not comparable or not most or len(averages) == 1:
        return None
    means = [
        (average.mean, i)
        for i, average in enumerate(averages)
        if average.num_runs == most and average.mean is not None
    ]
    return min(means)[1]


def cells(table: SweepTable) -> list[list[str]]:
    """Head and rows: a line a run, and behind the seeds of a combination one with their mean."""
    keys = list(table.runs[0].values)
    short = short_keys(keys)
    failed = any(run.reason for run in table.runs)
    rows = [[*short.values(), "state", f"validation ({table.unit or 'bits'})", "steps", "minutes"]]
    for i, average in enumerate(table.averages):
        best = ", best" if i == table.best else ""
        runs = table.runs_of(average)
        seeds = len(runs) > 1
        for run in runs:
            valid = "" if run.valid is None else f"{run.valid:.4f}"
            end = run.end + ("" if seeds else best)
            row = [*run.values.values(), end, valid, f"{run.steps:,}", f"{run.seconds / 60:.1f}"]
            # What to do about it follows a semicolon; that is for a training by itself.
            rows.append([*row, run.reason.partition("; ")[0]] if failed else row)
        if seeds:
            values = average.values | {SEED: f"mean of {average.num_runs}"}
            spread = "" if average.deviation is None else f" ± {average.deviation:.4f}"
            mean = "" if average.mean is None else f"{average.mean:.4f}{spread}"
            row = [*(values[key] for key in keys), best.removeprefix(", "), mean, "", ""]
            rows.append([*row, ""] if failed else row)
    if failed:
        rows[0].append("reason")
    return rows


def notes(table: SweepTable) -> list[str]:
    """What the figures are, and which combination is the best."""
    lines = ["Validation: the figure by which the model of a run was chosen, the least of its evaluations."]
    if any(average.deviation is not None for average in table.averages):
        lines.append("± is the standard deviation of the seeds (n - 1).")
    if table.best is not None:
        best = table.averages[table.best]
        short = short_keys(list(best.values))
        named = ", ".join(f"{short[key]} {text}" for key, text in best.values.items())
        runs = [run for run in table.runs_of(best) if run.end == "done" and run.valid is not None]
        least = min(runs, key=lambda run: run.valid or 0.0)
        lines.append(f"Best: {named} ({best.mean:.4f} {table.unit}); its best run: {least.folder}")
    elif any(key.startswith("data.") for key in table.runs[0].values):
        lines.append("The runs have different data, so that none is called the best.")
    return lines


def markdown(table: SweepTable) -> str:
    """The table and its notes."""
    head, *rows = cells(table)
    return document(head, len(table.runs[0].values) + 1, rows, notes(table))


def write(table: SweepTable, folder: Path, picture: bool = False) -> list[Path]:
    """Write the record and the table into ``folder``, and the plot; each file whole or not at all."""
    files = {SWEEP: json.dumps(asdict(table), indent=1).encode(), TABLE: markdown(table).encode()}
    if picture and (drawn := draw(table)) is not None:
        files[PLOT] = drawn
    for name, data in files.items():
        write_whole(folder / name, data)
    return [folder / name for name in files]


def draw(table: SweepTable) -> bytes | None:
    """The plot of the runs, a PNG; None before the first evaluation."""
    short = short_keys(list(table.averages[0].values))
    setting, values = _numeric(table.averages)
    combinations, best = list[plot.Combination](), None
    for i, average in enumerate(table.averages):
        runs = table.runs_of(average)
        curves = [run.curve for run in runs if run.curve]
        if not curves:
            continue
        name = ", ".join(f"{short[key]} {text}" for key, text in average.values.items()) or "all seeds"
        ends = [run.valid for run in runs if run.end == "done" and run.valid is not None]
        best = len(combinations) if i == table.best else best
        combinations.append(plot.Combination(name, curves, ends, None if values is None else values[i]))
    return plot.sweep(combinations, table.unit, setting, best) if combinations else None


def _numeric(averages: Sequence[Average]) -> tuple[str, list[float] | None]:
    """The name of the setting that varies, "" unless it is one alone; and its values, None if not numbers."""
    varying = [key for key in averages[0].values if len({average.values[key] for average in averages}) > 1]
    if len(varying) != 1:
        return "", None
    try:
        return varying[0], [float(average.values[varying[0]]) for average in averages]
    except ValueError:
        return varying[0], None


def command_in(folder: Path) -> str:
    """The command that goes on with the sweep in a folder.

    Raises:
        InputError: its record is damaged.
    """
    file = folder / SWEEP
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["command"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: not the record of a sweep; give the command of the sweep again") from None
