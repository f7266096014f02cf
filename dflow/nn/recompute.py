"""Gradient checkpointing: what a part of a network computes is not kept for the backward pass but made anew.

Source: Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dflow.config import InputError

T = TypeVar("T")


class Recomputable(nn.Module):
    """A part of a network whose intermediate results may be made anew in the backward pass.

    Attributes:
        gradient_checkpointing: whether they are. ``gradient_checkpointing_enable`` of transformers sets it,
            and `recompute`.
    """

    gradient_checkpointing = False

    def recomputed(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``, with the intermediate results dropped if that is asked for.

        Random numbers are the same the second time. ``function`` must change nothing, such as running
        averages. Arguments need no gradient, unlike those of checkpoints with reentrance.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            result: T = checkpoint(function, *args, use_reentrant=False)
            return result
        return function(*args)


def recompute(module: nn.Module) -> None:
    """Turn on gradient checkpointing in every part of ``module`` that has it.

    Raises:
        InputError: no part has it.
    """
    parts = [part for part in module.modules() if isinstance(part, Recomputable)]
    if not parts:
        raise InputError(
            "train.checkpointing: no part of the network of this model can be computed anew; leave it out, "
            "or let a part extend dflow.nn.recompute.Recomputable"
        )
    for part in parts:
        part.gradient_checkpointing = True
