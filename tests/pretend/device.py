"""``torch.device("pretend")`` after `start`: an accelerator for tests, see pretend.cpp.

Torch then takes the whole process for one with an accelerator: tests start one of their own for it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import torch

NAME = "pretend"
_SOURCE = Path(__file__).parent / "pretend.cpp"
_TORCH = Path(torch.__file__).parent


def compiler() -> str | None:
    """The C++ compiler, or None where there is none (or a system of another kind)."""
    return None if os.name != "posix" else shutil.which(os.environ.get("CXX", "c++"))


def build() -> Path:
    """The library of the device, compiled where this source was not yet, with this version of torch.

    It lies in the folder of temporary files. Several processes may ask for it at once.

    Raises:
        CalledProcessError: the source does not compile; the compiler has said why.
    """
    import fcntl  # which not every system has

    text = _SOURCE.read_bytes() + f"{torch.__version__} {_TORCH}".encode()
    digest = hashlib.sha256(text).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"dflow-pretend-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest}.so"
    with (folder / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            fresh = library.with_suffix(".part")
            include = _TORCH / "include"
            headers = [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"]
            linked = [f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
            flags = ["-O0", "-w", "-std=c++20", "-fPIC", "-shared"]
            command = [str(compiler()), *flags, *headers, str(_SOURCE), "-o", str(fresh), *linked]
            subprocess.run(command, check=True)
            fresh.rename(library)
    return library


class _Module(types.ModuleType):
    """What torch asks the module ``torch.pretend`` for."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def synchronize(self, device: object = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.ops.pretend.manual_seed(seed % (1 << 63))

    manual_seed_all = manual_seed

    def get_rng_state(self, device: object = NAME) -> torch.Tensor:
        state: torch.Tensor = torch.ops.pretend.get_state()
        return state

    def set_rng_state(self, state: torch.Tensor, device: object = NAME) -> None:
        torch.ops.pretend.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def start(library: Path, float64: bool = True) -> torch.device:
    """Make the device known to torch in this process, with float64 or without; returns it."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(str(library))
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module(NAME, _Module(f"torch.{NAME}"))
    torch.ops.pretend.float64(float64)
    plain = torch.Tensor.__deepcopy__

    def deep_copy(tensor: torch.Tensor, memo: dict[int, object]) -> object:
        """Torch copies the storage of a tensor, which devices of this kind cannot."""
        if tensor.device.type != NAME or id(tensor) in memo:
            return memo[id(tensor)] if id(tensor) in memo else plain(tensor, memo)
        new = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, tensor.requires_grad)
        memo[id(tensor)] = new
        return new

    torch.Tensor.__deepcopy__ = deep_copy  # type: ignore[method-assign]
    return torch.device(NAME)
