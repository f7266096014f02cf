"""Processes that start in a tenth of a second: forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

FORKS = multiprocessing.get_context("forkserver")

# Frozen too: collecting garbage stays quick, and the memory shared.
PRELOADED = """
import gc, accelerate, torch, torch.utils.tensorboard, transformers, dflow.cli, dflow.hf, dflow.train
torch.set_num_threads(1)
gc.collect()
gc.freeze()
"""


def start_forks(folder: Path) -> None:
    """Start the process from which the others are forked, unless there is one."""
    (folder / "preloaded_for_forks.py").write_text(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, sys.path)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        FORKS.set_forkserver_preload(["preloaded_for_forks"])
        forkserver.ensure_running()
