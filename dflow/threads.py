"""Threads of torch: how they wait for each other."""

from __future__ import annotations

import os
import sys

#: Variables by which the user may have chosen how the threads of OpenMP wait.
_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> bool:
    """Let the threads of OpenMP sleep while they wait; returns whether this call arranged it.

    By default they spin. Where other programs use the same processors a spinning thread takes the time that
    the thread it waits for needs, and training becomes several times slower (docs/guide.md, "Threads").
    OpenMP reads the environment once, when torch is loaded, so this has to come before that. It changes the
    environment of the process and is therefore for commands, not for libraries. Nothing happens where the
    environment has a setting of its own.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _CHOSEN):
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True
