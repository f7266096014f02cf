"""Where the CPU waits for an accelerator: it reads a number, or has to know the shape of a result."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dflow

_PACKAGE = Path(dflow.__file__).parent

#: Operations of which the CPU reads a number, or whose result has a shape that depends on values.
_READ = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive", "_linalg_check_errors",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Within ``with``: the places in dflow at which the CPU waits for an accelerator.

    Attributes:
        places: for each wait the file and line in dflow that asks for it, and the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func.__name__, args, kwargs):
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(_PACKAGE)]
            last = frames[-1] if frames else None
            where = f"{Path(last.filename).relative_to(_PACKAGE)}:{last.lineno}" if last else "elsewhere"
            self.places.append(f"{where} {func.__name__}")
        return func(*args, **kwargs)


def _waits(operation: str, args: Any, kwargs: dict[str, Any]) -> bool:
    name = operation.partition(".")[0]
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return False
    if name in _READ or (operation == "repeat_interleave.Tensor" and kwargs.get("output_size") is None):
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "_to_copy":
        return torch.device(kwargs.get("device") or args[0].device).type == "cpu"
    return bool(name == "copy_" and args[0].device.type == "cpu")
