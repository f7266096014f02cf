"""Modules whose weights may be in half precision, and whose buffers are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dflow.ops.precision import HALF


class KeepsBuffers(nn.Module):
    """Weights may be in half precision. Buffers are not: counts, moments, ranges and running averages.

    They take a share of the memory that is not worth it, and a count beyond 256 would not grow.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and buffer.dtype not in HALF
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in buffers:
            moved = getattr(module, name)
            if moved.dtype in HALF:
                setattr(module, name, buffer.to(moved.device))
        return self
