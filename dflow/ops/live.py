"""How many bytes of tensors exist at a time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
