"""A limit of the memory that the settings in a file can make the program allocate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: The limit is this number of bytes, with temporary tensors, ...
_FREE = 1 << 28

#: ... plus this many times the bytes of the weights.
_TIMES = 16

#: Each operation counts as at least this many bytes, so that endless small ones reach the limit too.
_LEAST = 1 << 13


class TooLarge(ValueError):
    """An allocation beyond the limit was refused."""


class AllocationLimit(TorchDispatchMode):
    """Inside this context, new tensors may have a limited number of bytes together.

    Args:
        num_bytes: size of the weights in the file; the limit is proportional to it.

    Raises:
        TooLarge: at the operation that would exceed the limit, before it allocates.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and what keeps a compiler out would import it, for a second."""
        return False

    def __init__(self, num_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.spent = _FREE + _TIMES * num_bytes, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count, then run."""
        kwargs = kwargs or {}
        # Eight bytes an entry, as for int64. Views and operations in place allocate nothing.
        alias = any(argument.alias_info is not None for argument in func._schema.returns)
        self._spend(0 if alias else 8 * _entries(func, args))
        return func(*args, **kwargs)

    def _spend(self, num_bytes: int) -> None:
        self.spent += max(num_bytes, _LEAST)
        if self.spent > self.limit:
            raise TooLarge(
                f"its settings need more than the {self.limit >> 20:,} MiB that fit the size of its weights"
            )


def _entries(func: Any, args: tuple[Any, ...]) -> int:
    """Upper bound of the number of entries of the result of an ATen operation."""
    name = func._schema.name.removeprefix("aten::")
    tensors = list(_tensors(args))
    most = sum(t.numel() for t in tensors)
    if name in _OF_A_SIZE:
        size = next((a for a in args if isinstance(a, (list, tuple))), args[:1])
        return int(math.prod(size))
    if name == "arange":
        numbers = [float(a) for a in args if isinstance(a, (int, float))]
        start, end, step = (0.0, *numbers, 1.0)[-3:] if len(numbers) == 1 else (*numbers, 1.0)[:3]
        return math.ceil(abs((end - start) / step)) if step else 0
    if name == "eye":
        rows, columns = (*args, args[0])[:2]
        return int(rows) * int(columns)
    if name == "repeat":
        return tensors[0].numel() * int(math.prod(args[1]))
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        a, b = tensors[-2:]
        return int(a.numel() // max(1, a.shape[-1]) * b.shape[-1])
    if torch.Tag.pointwise in func.tags and tensors:
        # Not by torch.broadcast_shapes, which imports sympy, for half a second.
        return math.prod(map(max, zip_longest(*(reversed(t.shape) for t in tensors), fillvalue=1)))
    return most


#: Operations that make a tensor of a given size.
_OF_A_SIZE = frozenset(
    (
        *("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm"),
        *("new_empty", "new_zeros", "new_ones", "new_full"),
    )
)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
