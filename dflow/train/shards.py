"""A model in pieces: each process keeps a share of every parameter, gradient, moment and average.

That is FSDP (Zhao et al. 2023, arXiv 2304.11277) by `torch.distributed.fsdp.fully_shard`, which cuts every
parameter along its first dimension into a piece a process. A piece is a `DTensor`; whatever else the program
reads or writes is whole, so files are the same whether a model was in pieces or not.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dflow.bijectors import Autoregressive, Coupling
from dflow.config import InputError
from dflow.nn.attention import Block

try:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
except ImportError:  # before torch 2.6, or without torch.distributed
    fully_shard = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from typing_extensions import TypeIs

M = TypeVar("M", bound=nn.Module)


def shard(objective: nn.Module, device: torch.device, world: int) -> None:
    """Cut the parameters into a piece a process, in place.

    They are put together for as long as they are needed: those of a block of a Transformer, or of the network
    of a layer, while it runs (forward, and again backward); all others during the whole step.

    Args:
        objective: the module that every process calls as a whole at every step.
        device: the device on which it runs.
        world: number of processes.

    Raises:
        InputError: torch cannot, or a parameter is a single number, which has no pieces.
    """
    if fully_shard is None:
        raise InputError(
            f"train.shard needs torch.distributed of torch 2.6 or newer, found {torch.__version__}; install "
            "that, or leave out train.shard"
        )
    single = [name for name, p in objective.named_parameters() if p.ndim == 0]
    if single:
        raise InputError(
            f"train.shard cannot cut {single[0]}, a single number, into pieces; leave out train.shard, or "
            "model.rezero"
        )
    mesh = init_device_mesh(device.type, (world,))
    for unit in _units(objective):
        fully_shard(unit, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def _units(objective: nn.Module) -> list[nn.Module]:
    """Modules whose parameters only they use, and only while they are called; inner ones first."""
    layers = [m for m in objective.modules() if isinstance(m, (Coupling, Autoregressive))]
    units = {id(layer.net) for layer in layers}
    names: dict[int, list[str]] = {}
    for name, p in objective.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [
        module
        for prefix, module in reversed(list(objective.named_modules()))
        if isinstance(module, Block) or id(module) in units
        # Weights tied to others elsewhere have to be put together with these.
        if all(name.startswith(f"{prefix}.") for p in module.parameters() for name in names[id(p)])
        if any(True for _ in module.parameters())
    ]


def shell(model: M) -> M:
    """A copy of ``model`` without weights, for `fill`."""
    copied = copy.deepcopy(model)
    empty(copied)
    return copied


def empty(model: nn.Module) -> None:
    """Free the memory of the weights."""
    for p in model.parameters():
        p.data = p.new_empty(0)


def fill(model: nn.Module, pieces: list[Tensor]) -> None:
    """Put the weights together, in the order of ``model.parameters()``; every process has to do so."""
    for p, cut in zip(model.parameters(), pieces, strict=True):
        p.data = whole(cut.detach())


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together if it is in pieces: in that case every process has to do so."""
    return tensor.full_tensor() if is_piece(tensor) else tensor


def is_piece(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether a tensor is in pieces."""
    return fully_shard is not None and isinstance(tensor, DTensor)


def piece(file: Any, name: str, like: DTensor) -> Tensor:
    """The piece of this process of a whole tensor of a file, cut as ``like`` is.

    Args:
        file: an open file of safetensors.
        name: the name of the tensor.
        like: a tensor in pieces.

    Raises:
        ValueError: the tensor has another shape.
    """
    stored = file.get_slice(name)
    if list(stored.get_shape()) != list(like.shape):
        raise ValueError(f"{name} has shape {tuple(stored.get_shape())}, expected {tuple(like.shape)}")
    mesh, rows = like.device_mesh, like.shape[0]
    # As torch.chunk cuts: all pieces but the last ones are equal, and those may be short or empty.
    size = -(-rows // mesh.size())
    start = min(rows, mesh.get_local_rank() * size)
    local = stored[start : min(rows, start + size)].to(like.device)
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
