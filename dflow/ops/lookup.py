"""Embedding lookup that reads symbols and one-hot rows alike, with the same values to the last bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        index = x.argmax(-1)
        ctx.save_for_backward(index, weight)
        return weight[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (g,) = gradients
        index, weight = ctx.saved_tensors
        to_x = g @ weight.T if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = torch.zeros_like(weight)
            to_weight.index_add_(0, index.flatten(), g.flatten(0, -2).to(weight.dtype))
        return to_x, to_weight


def lookup(x: Tensor, weight: Tensor) -> Tensor:
    """The rows of ``weight`` at the symbols ``x``.

    A matrix product with one-hot rows gives the same in exact arithmetic, but reduced precision (TF32,
    autocast) rounds it, and then training and inference disagree. So the forward pass is an index in both
    modes; the backward pass is that of the product.

    Args:
        x: symbols, int64 ``(...)``, or hard one-hot rows, floating ``(..., K)``.
        weight: ``(K, features)``.

    Returns:
        ``(..., features)``.
    """
    if x.is_floating_point():
        out: Tensor = _Lookup.apply(x, weight)  # type: ignore[no-untyped-call]
        return out
    return torch.nn.functional.embedding(x, weight)
