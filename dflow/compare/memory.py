"""What codecs take of memory: each direction in a process of its own."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from dflow import plugins


class Opened(Protocol):
    """A codec at work: items to files, and back."""

    def encode(self) -> list[bytes]:
        """The files of all items."""
        ...

    def decode(self, files: Sequence[bytes]) -> None:
        """All that is in them."""
        ...


def measure(make: Callable[..., Opened], *given: Any) -> dict[str, int]:
    """Bytes by which encoding and decoding raise the peak of the resident memory.

    Each is done by a process of its own that has imported dflow and holds what is compressed, or the files.
    ``make(*given)`` is called there: what it loads (weights, tables, libraries) counts. Both have to be
    picklable.

    Raises:
        RuntimeError: such a process failed.
    """
    encode, files = _run(make, given, None)
    decode, _ = _run(make, given, files)
    return {"encode": encode, "decode": decode}


def _run(
    make: Callable[..., Opened], given: tuple[Any, ...], files: list[bytes] | None
) -> tuple[int, list[bytes]]:
    # A fork would begin with the memory of this process.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=_work, args=(there, make, given, files, torch.get_num_threads(), plugins.loaded())
    )
    process.start()
    there.close()
    try:
        found: tuple[int, list[bytes]] | str = here.recv()
    except EOFError:
        process.join()
        found = f"it ended with {process.exitcode}"
    finally:
        process.join()
    if isinstance(found, str):
        raise RuntimeError(f"memory cannot be measured: {found}")
    return found


def _work(
    pipe: Connection,
    make: Callable[..., Opened],
    given: tuple[Any, ...],
    files: list[bytes] | None,
    threads: int,
    modules: Sequence[str],
) -> None:
    """One direction, and how much of memory it took."""
    torch.set_num_threads(threads)
    for module in modules:
        plugins.load(module)
    before, made = peak(), []
    try:
        opened = make(*given)
        if files is None:
            made = opened.encode()
        else:
            opened.decode(files)
    except Exception as error:  # told by the process that waits for it
        pipe.send(f"{type(error).__name__}: {error}")
    else:
        pipe.send((peak() - before, made))


def peak() -> int:
    """Bytes of resident memory of this process at its peak."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        # Of this program alone; what getrusage tells begins with the peak of the process that started it.
        return 1024 * int(found[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
