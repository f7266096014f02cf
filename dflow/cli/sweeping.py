"""``dflow train --sweep``."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflow import plugins
from dflow.cli.flags import label
from dflow.cli.shared import print_lines, print_table, say_once
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.cli.train import Train


def train_sweep(flags: Train) -> int:
    """Train every combination; 1 where a run failed."""
    from dflow.cli.train import tuning
    from dflow.sweep import FILES, cells, check_alone, grid_of, notes, sweep
    from dflow.train import Preempted

    check_alone()
    grid = grid_of(flags.sweep)
    for word in flags.set:
        if (key := word.partition("=")[0]) in grid:
            raise InputError(f"{key}: set by --set and by --sweep; leave one of them out")
    if flags.recipe is None and flags.init is None:
        raise InputError("name a recipe before --sweep (`dflow recipes` lists them), or a model by --init")
    recipe: str | Path = flags.recipe or ""
    settings = flags.set
    if flags.init is not None:
        recipe, settings = tuning(flags, flags.init)
    device = flags.settle()
    try:
        table = sweep(
            recipe,
            grid,
            settings,
            flags.output,
            jobs=1 if flags.jobs is None else flags.jobs,
            threads=flags.threads,
            device=device,
            command=command_of("train", flags),
        )
    except Preempted as stop:
        say_once(str(stop))
        return 0
    print()
    print_table(cells(table))
    print()
    files = [Path(table.output) / name for name in FILES]
    print_lines([*notes(table), *(file for file in files if file.is_file())])
    return int(any(run.end != "done" for run in table.runs))


def command_of(verb: str, flags: Any) -> str:
    """The command line of a verb and its flags, by which a user repeats it."""
    words, last = ["dflow", verb], list[str]()
    for module in plugins.loaded():
        last += ["--import", module]
    for f in dataclasses.fields(flags):
        value = getattr(flags, f.name)
        if value in (None, False, []) or value == f.default:
            continue
        if f.metadata.get("positional"):
            words.append(str(value))
        else:
            last += [label(f.name)]
            last += [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join([*words, *last])
