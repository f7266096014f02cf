"""Threads of torch: how they wait for each other, and how many of them a piece of work is worth."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

#: Environment variables by which users choose how the threads of OpenMP wait.
_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> bool:
    """Let the threads of OpenMP sleep while they wait; returns whether this call arranged it.

    By default they spin. Where other programs use the same processors a spinning thread takes the time that
    the thread it waits for needs, and training becomes several times slower (docs/guide/training.md).
    OpenMP reads the environment once, when torch is loaded, so this has to come before that. It changes the
    environment of the process and is therefore for commands, not for libraries. Nothing happens where one of
    the variables is set already.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _CHOSEN):
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True


def processors(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Number of processors that this process can use at the same time, at least 1.

    torch counts the processors that it may run on, but not the share of their time to which a container is
    limited: more threads than that would take turns. ``limit`` is the file of Linux that holds this limit:
    the microseconds of processor time in each period, and the length of the period.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limit.read_text(encoding="ascii").split()
        return max(1, min(available, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return available  # no such file, or "max": no limit


#: Multiplications of one layer, for a batch, from which several threads are faster than one (docs/LOG.md).
PAYS = 12_000_000


class Suited:
    """The number of threads by the size of the work, where a command may choose it.

    Attributes:
        free: whether it may: a command sets this where its user has chosen no number. A program that uses
            dflow as a library keeps its own number.
        sharing: number of processes that compute side by side and share the processors.
    """

    free = False
    sharing = 1

    @classmethod
    def to(cls, multiplications: int | None) -> None:
        """One thread for fewer multiplications than `PAYS`, else `most`; None changes nothing."""
        if cls.free and multiplications is not None:
            import torch

            torch.set_num_threads(1 if multiplications < PAYS else cls.most())

    @classmethod
    def most(cls) -> int:
        """This process's share of the processors, at least 1."""
        return max(1, processors() // cls.sharing)
