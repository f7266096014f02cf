"""Memory: of codecs, each direction in a process of its own; of tensors, those made in a block."""

from __future__ import annotations

import multiprocessing
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make inside of ``with``; exactly, on any device.

    Views, and results that are written into tensors that were there, take none. What an operation uses while
    it runs is not seen.

    >>> with TensorMemory() as memory:
    ...     _ = torch.zeros(100).double().sum()
    >>> memory.peak
    1200

    Attributes:
        now: bytes that exist.
        peak: the most that existed together.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it makes."""
        result = func(*args, **(kwargs or {}))
        before = _storages((args, kwargs))
        for key, storage in _storages(result).items():
            if key not in before:
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors in some values, by its identity."""
    storages = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {id(storage): storage for storage in storages}
