"""Values that are computed from buffers once, and computed again when these change."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    """A value, and the tensors and key that it was computed from."""

    value: T
    key: Hashable
    tensors: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    copies: tuple[Tensor, ...]


class Memo(Generic[T]):
    """The last value computed from some tensors; computed again when one of them, or a key, has changed.

    A tensor may be replaced (`torch.nn.Module.to`) or written to (``load_state_dict``): both are noticed.
    Values are computed outside of inference mode, since training cannot use tensors that were made inside.
    Copies and pickles of a memo are empty.

    >>> order, memo = torch.tensor([2, 0, 1]), Memo()
    >>> memo(lambda: order.argsort(), order)
    tensor([1, 2, 0])
    >>> _ = order.copy_(torch.tensor([0, 2, 1]))
    >>> memo(lambda: order.argsort(), order)
    tensor([0, 2, 1])
    """

    _entry: _Entry[T] | None = None

    def __call__(self, make: Callable[[], T], *tensors: Tensor, key: Hashable = None) -> T:
        """The value of ``make()``.

        Args:
            make: called without arguments where there is no value yet or it is out of date.
            tensors: tensors that the value depends on.
            key: anything else that it depends on: a precision, a size.
        """
        entry = self._entry
        if entry is None or not _holds(entry, tensors, key):
            with torch.inference_mode(False), torch.no_grad():
                copies = tuple(t.clone() for t in tensors)
                entry = self._entry = _Entry(make(), key, tensors, _versions(tensors), copies)
        return entry.value

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: see the class."""
        return {}


class OnCpu(Memo[tuple[Tensor, ...]]):
    """The same tensors on the CPU, copied there once: what is laid out from them waits for no device.

    >>> of_buffers, order = OnCpu(), torch.tensor([2, 0, 1])
    >>> of_buffers.of(order)
    (tensor([2, 0, 1]),)
    """

    def of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Copies of these, which must not be written to."""
        return self(lambda: tuple(tensor.cpu() for tensor in tensors), *tensors)


def _holds(entry: _Entry[Any], tensors: tuple[Tensor, ...], key: Hashable) -> bool:
    """Whether a value is still that of the tensors. Their entries are compared only after a write."""
    if entry.key != key:
        return False
    if torch.compiler.is_compiling():
        # While torch.compile traces, tensors have no versions. Code that changes an order is never traced.
        return True
    versions = _versions(tensors)
    unchanged = all(
        new is old and version is not None and version == before
        for new, old, version, before in zip(tensors, entry.tensors, versions, entry.versions, strict=True)
    )
    if unchanged:
        return True
    alike = all(
        new.device == copy.device and new.dtype == copy.dtype and torch.equal(new, copy)
        for new, copy in zip(tensors, entry.copies, strict=True)
    )
    if alike:
        entry.tensors, entry.versions = tensors, versions
    return alike


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int | None, ...]:
    """How often each tensor was written to; None for tensors of inference mode, which do not count writes."""
    return tuple(None if t.is_inference() else t._version for t in tensors)
