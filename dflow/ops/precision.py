"""Precision: what stays in float32 where weights or autocast are in half, and when two sums agree."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

#: Dtypes in which weights may be, but in which no probability is computed.
HALF = (torch.bfloat16, torch.float16)


def at_least_float32(x: Tensor) -> Tensor:
    """``x``; in float32 where it is in half precision.

    >>> at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which nothing is computed in another precision than that of its tensors: autocast off.

    On Z/K an arg-max of the parameters selects the map: under autocast the differentiable mode and the exact
    mode would select different maps wherever two logits are close. On the reals, log-determinants and
    standardized entries need all their digits.
    """
    return torch.autocast(device_type=x.device.type, enabled=False)


def without_float16(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which autocast is off if it is to float16, for what exceeds its range or has no kernel."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        return full_precision(x)
    return nullcontext()


def agree(a: Tensor, b: Tensor, network: nn.Module) -> bool:
    """Whether log-probabilities that ``network`` gave in two ways, in nats, agree up to its rounding.

    A network in half precision, by its weights or by autocast, rounds each intermediate result to a relative
    ``eps`` of 2^-8 (bfloat16) or 2^-10 (float16), in other places if it reads other numbers of entries at
    once. So one and the same law has log-probabilities that differ by a few ``eps``.
    """
    weight = next(network.parameters(), None)
    dtype = torch.float32 if weight is None else weight.dtype
    kind = a.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    relative, absolute = 1e-4, 1e-3
    if dtype in HALF:
        relative, absolute = torch.finfo(dtype).eps, 16 * torch.finfo(dtype).eps
    return torch.allclose(a.cpu().double(), b.cpu().double(), rtol=relative, atol=absolute)
