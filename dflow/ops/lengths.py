"""Which entries of a batch of sequences are present."""

from __future__ import annotations

import torch
from torch import Tensor

# `dflow.core.Context`, spelled out: core is a neighbour on this floor.
_Context = Tensor | tuple[Tensor, ...] | None


def lengths(context: _Context) -> Tensor | None:
    """The lengths in ``context``, int64 ``(batch,)``, or None when every entry is present.

    Lengths are the one kind of context that is one-dimensional and int64; in a tuple the last such
    tensor is meant.

    >>> lengths((torch.zeros(2, 3), torch.tensor([3, 1])))
    tensor([3, 1])
    """
    items = context if isinstance(context, tuple) else (context,)
    for item in reversed(items):
        if item is not None and item.ndim == 1 and item.dtype == torch.int64:
            return item
    return None


def present(context: _Context, dim: int) -> Tensor | None:
    """Bool ``(batch, dim)``, True where an entry is present; None when all are.

    >>> present(torch.tensor([2, 0]), 3)
    tensor([[ True,  True, False],
            [False, False, False]])
    """
    found = lengths(context)
    return None if found is None else torch.arange(dim, device=found.device) < found[:, None]


def keep_absent(new: Tensor, old: Tensor, mask: Tensor | None) -> Tensor:
    """``new`` where ``mask`` ``(batch, dim)`` is True, ``old`` elsewhere; both modes."""
    if mask is None:
        return new
    return torch.where(mask if new.ndim == 2 else mask[..., None], new, old)
