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
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(
        target=_work, args=(sender, make, arguments, files, torch.get_num_threads(), plugins.loaded())
    )
    process.start()
    sender.close()
    try:
        result: tuple[int, list[bytes]] | str = receiver.recv()
    except EOFError:
        process.join()
        result = f"it ended with {process.exitcode}"
    finally:
        process.join()
    if isinstance(result, str):
        raise RuntimeError(f"memory cannot be measured: {result}")
    return result


def _work(
    pipe: Connection,
    make: Callable[..., Opened],
    arguments: tuple[Any, ...],
    files: list[bytes] | None,
    threads: int,
    modules: Sequence[str],
) -> None:
    """One direction, and how much of memory it took."""
    torch.set_num_threads(threads)
    for module in modules:
        plugins.load(module)
    before, files_made = peak(), []
    try:
        opened = make(*arguments)
        if files is None:
            files_made = opened.encode()
        else:
            opened.decode(files)
    except Exception as error:  # raised by the process that waits for it
        pipe.send(f"{type(error).__name__}: {error}")
    else:
        pipe.send((peak() - before, files_made))


def peak() -> int:
    """Bytes of resident memory of this process at its peak."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        # Of this program alone; getrusage begins with the peak of the process that started it.
        return 1024 * int(match[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
