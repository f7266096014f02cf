"""Where the CPU waits for an accelerator: it reads a number, or has to know the shape of a result."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dflow

_PACKAGE = Path(dflow.__file__).parent

#: Operations of which the CPU reads a number, or whose result has a shape that depends on values.
_READ = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive", "_linalg_check_errors",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Within ``with``: the places in dflow at which the CPU waits.

    On a device of its own a copy to the CPU is one too, which on the CPU itself is no operation.

    Attributes:
        places: for each wait the operation, and the file and line in dflow that asks for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if self._waits(name, func.__name__, args, kwargs or {}):
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(_PACKAGE)]
            where = (
                f"{Path(frames[-1].filename).relative_to(_PACKAGE)}:{frames[-1].lineno}" if frames else "?"
            )
            self.places.append(f"{name} at {where}")
        return func(*args, **(kwargs or {}))

    def _waits(self, name: str, overload: str, args: Any, kwargs: dict[str, Any]) -> bool:
        if name in _READ or (overload == "repeat_interleave.Tensor" and kwargs.get("output_size") is None):
            return True
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name == "_to_copy":
            target = torch.device(kwargs.get("device") or args[0].device)
            return target.type == "cpu" and args[0].device.type not in ("cpu", "meta")
        return name == "copy_" and args[0].device.type == "cpu" != args[1].device.type
