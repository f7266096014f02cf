"""First and last module of a classifier of images: pixels as numbers, and the head with its loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import check_lengths
from dflow.nn.moments import Moments, means, standardized
from dflow.ops.normal import ndtr_logit


class Pixels(nn.Module):
    """Integers ``0 .. levels - 1`` of flat images as integers around 0, or as floats in -1..1.

    ``2 x - (levels - 1)`` is an integer, so that the sums of the first layer are too; ``unit`` divides it by
    ``levels - 1``. The zeros of a padded border are in the middle of the range.

    Args:
        shape: (C, H, W).
        levels: number of values of a pixel.
        unit: whether to divide.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, unit: bool = False) -> None:
        super().__init__()
        self.shape, self.levels, self.unit = shape, levels, unit

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, C, H, W)`` from rows ``(batch, C * H * W)``, in the default dtype of floats."""
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        values = 2 * x.to(dtype).view(-1, *self.shape) - (self.levels - 1)
        return values / (self.levels - 1) if self.unit else values


class Head(nn.Module):
    """Logits of classes from the last sums.

    "ce": the means of the sums, for cross-entropy. "bce": the log-odds ``logit Phi(mu / sigma)`` that a sum
    is positive, for the total binary cross-entropy of all classes (equation 14 of Peters and Welling 2018);
    as logits of a soft-max they give the probabilities of the classes if exactly one sum is positive.
    """

    def __init__(self, loss: Literal["ce", "bce"] = "ce") -> None:
        super().__init__()
        if loss not in ("ce", "bce"):
            raise ValueError(f"loss {loss!r} must be ce or bce")
        self.kind = loss

    def forward(self, x: Tensor | Moments) -> Tensor:
        """Logits ``(batch, classes)``.

        Raises:
            ValueError: head "bce" for sums without a variance.
        """
        if self.kind == "ce":
            return means(x)
        if isinstance(x, Tensor):
            raise ValueError("head 'bce' needs random sums; use 'ce'")
        return ndtr_logit(standardized(x))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss in nats, summed over the batch; labels are int64 ``(batch,)``."""
        check_lengths(labels, len(logits), "labels")
        if self.kind == "ce":
            return F.cross_entropy(logits, labels, reduction="sum")
        target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum")


def head_of(net: nn.Sequential) -> Head:
    """The head of a classifier: its last module; a ValueError where that is another one."""
    head = net[-1]
    if not isinstance(head, Head):
        raise ValueError(f"a classifier ends with a head, found {type(head).__name__}")
    return head
