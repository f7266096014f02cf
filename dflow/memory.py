"""Memory of the process: what is freed is kept for the next step."""

from __future__ import annotations

import ctypes
import os
import sys

#: Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: Bytes of one block, or free at the end of the heap, up to which nothing goes back to the system.
_LARGEST = 1 << 30
#: Bytes of one block at most, before glibc 2.35.
_LARGEST_OLD = 1 << 25
#: What the user may have said of it.
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Ask the C library to keep what is freed; whether it does.

    glibc gives large blocks, and the free end of its heap, back to the system at once, which clears them
    page by page when the next step asks for them again: up to half of the time of a step on the CPU
    (docs/RESULTS.md). Nothing happens with another C library, or where the environment has settings of its
    own.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Setting the one ends the other's growing by itself: either both, or none. Older ones take no more than
    # 32 MiB as the first.
    kept = any(mallopt(_MMAP_THRESHOLD, size) == 1 for size in (_LARGEST, _LARGEST_OLD))
    return kept and mallopt(_TRIM_THRESHOLD, _LARGEST) == 1
