"""Counts of the training text beside the weights of a model of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dflow.config import InputError
from dflow.distributions.drafted import LawDrafter
from dflow.distributions.sequence import SequenceCategorical
from dflow.models.packed_counts import is_packed, packed, unpacked
from dflow.nn.backoff import BackoffNet
from dflow.nn.counted import Counted
from dflow.ops.counts import CountsError, CountTable, Pattern

#: File of the counts.
COUNTS = "counts.safetensors"


def counted(model: nn.Module) -> Iterator[Counted]:
    """The modules of a model that read counts."""
    return (module for module in model.modules() if isinstance(module, Counted))


def set_counts(model: nn.Module, table: CountTable) -> None:
    """Let all modules of ``model`` that read counts read these."""
    for module in counted(model):
        module.use(table)


def patterns_in(model: nn.Module) -> list[Pattern]:
    """The patterns of all contexts that ``model`` reads counts of, the shortest first."""
    return sorted({pattern for module in counted(model) for pattern in module.patterns}, key=len)


def count_bytes(model: nn.Module) -> int:
    """Size of the counts of ``model``, 0 for none."""
    return max((module.table.num_bytes for module in counted(model) if module.has_table), default=0)


def counts_drafter(model: nn.Module) -> LawDrafter | None:
    """What drafts for a model by the counts of its own; None for a model without.

    Raises:
        InputError: the model has not been given its counts yet.
    """
    for module in counted(model):
        order = torch.arange(1)[:, None].to(module.table.keys.device)
        return LawDrafter(SequenceCategorical(BackoffNet(module), order, 1))
    return None


def save(model: nn.Module, folder: Path, pack: bool = False) -> None:
    """Write the counts of ``model``, if it has any; ``pack``: in less space, which takes longer."""
    module = next((module for module in counted(model) if module.has_table), None)
    if module is not None:
        table = module.table.to(torch.device("cpu"))
        tensors = packed(table, module.K, patterns_in(model)) if pack else table.tensors()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / COUNTS)


def load(model: nn.Module, file: Path | None, source: str) -> None:
    """Read the counts of ``model``, where it was saved with any.

    Args:
        model: with the digest of its counts among its weights.
        file: the file of counts; None for a folder without one.
        source: the folder or repository of the model, for messages.

    Raises:
        InputError: no file, a damaged one, or the counts of another model.
    """
    modules = [module for module in counted(model) if bool(module.digest.any())]
    if not modules:
        return
    if file is None:
        raise InputError(
            f"{source}: no {COUNTS}, and the model reads counts of its training text; restore it, or train "
            "again"
        )
    try:
        tensors, K = load_file(file), modules[0].K
        table = unpacked(tensors, K, patterns_in(model)) if is_packed(tensors) else CountTable(**tensors)
    except (SafetensorError, OSError, CountsError, TypeError) as error:
        raise InputError(f"{file}: truncated or damaged ({error}); restore it, or train again") from None
    digest = table.digest()
    if any(bytes(module.digest.tolist()) != digest for module in modules):
        raise InputError(f"{file}: the counts of another model; restore weights and counts from one training")
    largest = min(module.K for module in modules)
    if len(table.symbols) and int(table.symbols.max()) >= largest:
        raise InputError(
            f"{file}: a symbol {int(table.symbols.max())} in an alphabet of {largest}; restore it"
        )
    for module in modules:
        module.use(table)
