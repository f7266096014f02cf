"""Absent entries of a batch of sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_absent(new: Tensor, old: Tensor, mask: Tensor | None) -> Tensor:
    """``new`` where ``mask`` ``(batch, dim)`` is True, ``old`` elsewhere; both modes."""
    if mask is None:
        return new
    return torch.where(mask if new.ndim == 2 else mask[..., None], new, old)
