"""Sweeps: a recipe trained with every combination of some values of its settings, and a table of the runs."""

from dflow.sweep.grid import SWEEP, grid_of
from dflow.sweep.runner import check_alone, sweep
from dflow.sweep.table import FILES, Average, Outcome, SweepTable, cells, command_in, markdown, notes

__all__ = [
    "FILES",
    "SWEEP",
    "Average",
    "Outcome",
    "SweepTable",
    "cells",
    "check_alone",
    "command_in",
    "grid_of",
    "markdown",
    "notes",
    "sweep",
]
