"""Shared by networks on flat real tensors: the input joined with its context, checks of sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dflow.core import Context, only_given


def flat_input(
    x: Tensor, context: Context | None, sizes: tuple[int, int], levels: int | None, weight: Tensor
) -> Tensor:
    """``x`` with the context behind it, ``(batch, sum(sizes))``, in the dtype of ``weight``.

    Images in the order C, H, W joined like this are joined by channels.

    Args:
        x: numbers ``(batch, sizes[0])``, floating or not.
        context: given tensors ``(batch, n)`` with ``sizes[1]`` columns together; None where that is 0.
        sizes: numbers a row of x and of the context.
        levels: None, or the values 0..levels-1 of x are spread over -1..1.
        weight: a weight of the network.

    Raises:
        ValueError: another number of columns.
    """
    items = only_given(context)
    tensors = [x, *items]
    if any(item.ndim != 2 for item in tensors) or (x.shape[1], sum(i.shape[1] for i in items)) != sizes:
        raise ValueError(
            f"expected x (batch, {sizes[0]}) and a context of {sizes[1]} numbers a row, found x "
            f"{tuple(x.shape)} and {[tuple(i.shape) for i in items] or 'no context'}; class "
            "labels are given as one-hot rows"
        )
    rows = [item.to(weight.dtype) for item in tensors]
    if levels is not None:
        rows[0] = rows[0] * (2 / (levels - 1)) - 1
    return torch.cat(rows, 1) if items else rows[0]


def check_sizes(**sizes: int) -> None:
    """A ValueError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, found {size}")


def check_levels(levels: int | None) -> int | None:
    """``levels`` itself, or a ValueError where there are fewer than 2."""
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2, found {levels}")
    return levels


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Weights and bias to zero: the identity, for the parameters of a bijector."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
