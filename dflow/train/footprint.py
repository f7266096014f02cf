"""What a training takes of memory, estimated before it starts."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dflow.nn.batch_norm import StochasticBatchNorm
from dflow.nn.counted import Counted
from dflow.nn.recompute import recompute
from dflow.objectives import KnownMask
from dflow.ops.live import TensorMemory
from dflow.train.material import mix
from dflow.train.tasks import Task

#: Bytes of weights below which memory is no question.
_LEAST = 1 << 20
#: Rows of a batch on which what a step takes is measured; it grows with the rows in a straight line.
_FEW, _MORE = 2, 4


@dataclass(frozen=True)
class Footprint:
    """Bytes that a process of a training takes, beside its data.

    Attributes:
        weights: weights, and their moving averages where there are any.
        moments: both moments of Adam.
        step: gradients, and intermediate results that the backward pass needs.
    """

    weights: int
    moments: int
    step: int

    def __str__(self) -> str:
        """A line.

        >>> print(Footprint(8 * 10**6, 16 * 10**6, 10**9))
        memory about 1,024 MB: weights 8 MB, moments 16 MB, gradients and intermediate results 1,000 MB
        """
        total, weights, moments, step = (
            f"{size / 1000**2:,.0f} MB"
            for size in (self.weights + self.moments + self.step, self.weights, self.moments, self.step)
        )
        return (
            f"memory about {total}: weights {weights}, moments {moments}, gradients and intermediate results "
            f"{step}"
        )


def footprint(task: Task, world: int) -> Footprint | None:
    """An estimate for each of ``world`` processes, from steps on a few rows with a copy of the model.

    The copy is on the CPU, where attention keeps other tensors than on a GPU. Compilers and sharding, which
    take less, are left out. None for small models.
    """
    config, objective = task.recipe.train, task.method.objective
    weights = sum(p.numel() * p.element_size() for p in objective.parameters())
    if weights < _LEAST:
        return None
    # Tables of counts are read only, and can be larger than all weights.
    mixtures = [m for m in objective.modules() if isinstance(m, Counted) and m.has_table]
    shared = [table for m in mixtures for table in (m.table, m.left_out)]
    probe = copy.deepcopy(objective, {id(table): table for table in shared})
    for module in probe.modules():
        if isinstance(module, StochasticBatchNorm):
            module.shared = False
    if config.checkpointing:
        recompute(probe)
    rows = max(1, config.batch_size // (world * config.accumulation))
    few, more = min(rows, _FEW), min(rows, _MORE)
    least = _step(task, probe, few)
    a_row = (_step(task, probe, more) - least) / (more - few) if more > few else 0.0
    step = round(least + a_row * (rows - few))
    return Footprint(weights * (2 if config.ema else 1), 2 * weights, step)


def _step(task: Task, probe: nn.Module, rows: int) -> int:
    """The most bytes that exist together in a step on the first rows of a batch, beside weights and data."""
    config = task.recipe.train
    x, lengths = task.data.batch(mix(config.seed, 0))
    known = task.data.known(mix(config.seed, 0))
    probe.zero_grad(set_to_none=True)
    task.method.schedule(0, 0.0)
    turn: tuple[Any, ...] = task.method.turn(0)
    if known is not None:
        turn = (*turn, KnownMask(known))
    half = nullcontext() if config.mixed_precision == "no" else torch.autocast("cpu", torch.bfloat16)
    with torch.random.fork_rng([]), TensorMemory() as memory:
        with half:
            loss, _ = probe(x[:rows], None if lengths is None else lengths[:rows], *turn)
        loss.backward()
    peak: int = memory.peak
    return peak
