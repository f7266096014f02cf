"""Memory of the process: freed memory stays for the next step, and garbage is looked for rarely."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

#: Parameters of mallopt, as in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: Bytes of one block, or free at the end of the heap, up to which nothing goes back to the system.
_LARGEST = 1 << 30
#: Bytes of one block at most, before glibc 2.35.
_LARGEST_OLD = 1 << 25
#: Variables by which the user may set it.
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Ask the C library to keep freed memory; returns whether it does.

    glibc gives large blocks, and the free end of its heap, back to the system at once, which clears them
    page by page when the next step asks for them again: up to half of the time of a step on the CPU
    (docs/RESULTS.md). Nothing happens with another C library, or where the environment already sets it.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # To set one of them stops the growth of the other, so both are set. Older versions take no more than
    # 32 MiB for the first.
    has_threshold = any(mallopt(_MMAP_THRESHOLD, size) == 1 for size in (_LARGEST, _LARGEST_OLD))
    return has_threshold and mallopt(_TRIM_THRESHOLD, _LARGEST) == 1


def collect_rarely() -> None:
    """Let Python look for circular garbage rarely: importing torch makes a million objects, and no garbage.

    Looking through them again and again takes half a second of a command.
    """
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])


#: New objects after which Python looks for garbage among them; 700 or 2000 by default.
_OBJECTS = 100_000
