"""Threads of torch: how they wait for each other, and how many there is work for."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

#: Variables by which the user may have chosen how the threads of OpenMP wait.
_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> bool:
    """Let the threads of OpenMP sleep while they wait; returns whether this call arranged it.

    By default they spin. Where other programs use the same processors a spinning thread takes the time that
    the thread it waits for needs, and training becomes several times slower (docs/guide/training.md).
    OpenMP reads the environment once, when torch is loaded, so this has to come before that. It changes the
    environment of the process and is therefore for commands, not for libraries. Nothing happens where the
    environment has a setting of its own.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _CHOSEN):
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True


def processors(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processors whose time this process may have at once, at least 1.

    torch counts those that it may run on, but not the share to which a container limits it (``limit``, the
    file of Linux that has microseconds of processor time and the period): more threads than that take turns.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limit.read_text(encoding="ascii").split()
        return max(1, min(there, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return there  # no such file, or "max": no limit
