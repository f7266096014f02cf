"""Memory: of codecs, each direction in a process of its own."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
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


def measure(make: Callable[..., Opened], *arguments: Any) -> dict[str, int]:
    """Bytes by which encoding and decoding raise the peak of the resident memory.

    Each is done by a process of its own that has imported dflow and holds what is compressed, or the files.
    ``make(*arguments)`` is called there: what it loads (weights, tables, libraries) counts. Both have to be
    picklable.

    Raises:
        RuntimeError: such a process failed.
    """
    encode, files = _run(make, arguments, None)
    decode, _ = _run(make, arguments, files)
    return {"encode": encode, "decode": decode}


def _run(
    make: Callable[..., Opened], arguments: tuple[Any, ...], files: list[bytes] | None
) -> tuple[int, list[bytes]]:
    # A fork would begin with the memory of this process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        modules = plugins.loaded()
        try:
            return pool.submit(_work, make, arguments, files, torch.get_num_threads(), modules).result()
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"memory cannot be measured: {what}") from None


def _work(
    make: Callable[..., Opened],
    arguments: tuple[Any, ...],
    files: list[bytes] | None,
    threads: int,
    modules: Sequence[str],
) -> tuple[int, list[bytes]]:
    """One direction: how much of memory it took, and the files of encoding."""
    torch.set_num_threads(threads)
    for module in modules:
        plugins.load(module)
    before = peak()
    opened = make(*arguments)
    encoded = opened.encode() if files is None else []
    if files is not None:
        opened.decode(files)
    return peak() - before, encoded


def peak() -> int:
    """Bytes of resident memory of this process at its peak."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        # Of this program alone; getrusage begins with the peak of the process that started it.
        return 1024 * int(match[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
