"""Sums and draws in float64, on devices that have it; in float32 on those that do not (GPUs of Apple)."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

#: Types of devices without float64: making such a tensor there is an error.
WITHOUT_FLOAT64 = {"mps"}


def widest(device: torch.device) -> torch.dtype:
    """The widest floating type of a device.

    >>> widest(torch.device("cpu")), widest(torch.device("mps"))
    (torch.float64, torch.float32)
    """
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def widen(x: Tensor) -> Tensor:
    """The numbers in the widest floating type of their device."""
    return x.to(widest(x.device))


def float64(x: Tensor) -> Tensor:
    """The numbers in float64: on their device or, where that has none, on the CPU.

    For what is computed seldom and needs the digits: moments, matrices that are inverted.
    """
    return (x.cpu() if x.device.type in WITHOUT_FLOAT64 else x).double()


def moved(x: Tensor, device: torch.device) -> Tensor:
    """The numbers on a device; those of float64 in its widest type."""
    return x.to(device, widest(device)) if x.dtype == torch.float64 else x.to(device)


def all_moved(value: T, device: torch.device) -> T:
    """A list or dataclass of tensors, of lists and of dataclasses, with every tensor on a device."""
    moved_value: Any = value
    if isinstance(value, Tensor):
        moved_value = value.to(device)
    elif isinstance(value, list):
        moved_value = [all_moved(item, device) for item in value]
    elif is_dataclass(value) and not isinstance(value, type):
        fields_moved = {f.name: all_moved(getattr(value, f.name), device) for f in fields(value)}
        moved_value = replace(value, **fields_moved)
    return cast(T, moved_value)


def maybe(mask: Tensor) -> bool:
    """Whether an entry of a mask may be True. Only the CPU looks: an accelerator would be waited for."""
    return mask.device.type != "cpu" or bool(mask.any())
