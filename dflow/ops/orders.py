"""Orders in which the entries of a sequence are drawn.

An order is an int64 matrix ``(G, S)``: row g lists the positions drawn together, one in each of S lanes, by
one network call (or, with blocks, by a part of one: see `dflow.nn.transformer`). Lane s is a chain: the
symbol at ``order[g, s]`` is an input where ``order[g + 1, s]`` is drawn. Every position in ``range(dim)``
occurs exactly once. Entries at or beyond ``dim`` are padding, which allows groups of unequal size, and
lengths that are no multiple of G.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def lockstep(dim: int, num_groups: int) -> Tensor:
    """Call g draws the g-th entry of every one of the ceil(dim / G) segments of length G.

    Entries of one call lie G apart, so that their dependence, which is lost, is weak; with G = dim it is the
    order from left to right.

    >>> lockstep(6, 3)
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    _check(dim, num_groups)
    lanes = -(-dim // num_groups)
    return torch.arange(lanes * num_groups).reshape(lanes, num_groups).T.contiguous()


def bit_reversed(dim: int, num_groups: int) -> Tensor:
    """Lockstep segments whose entries are drawn coarse to fine, in bit-reversed order.

    >>> bit_reversed(8, 4)
    tensor([[0, 4],
            [2, 6],
            [1, 5],
            [3, 7]])
    """
    order = lockstep(dim, num_groups)
    bits = max(1, (num_groups - 1).bit_length())
    rows = sorted(range(num_groups), key=lambda g: int(f"{g:0{bits}b}"[::-1], 2))
    return order[rows]


def shuffled(dim: int, num_groups: int, seed: int = 0) -> Tensor:
    """One fixed random order: the baseline that a good order has to beat."""
    order = lockstep(dim, num_groups)
    generator = torch.Generator().manual_seed(seed)
    return order.flatten()[torch.randperm(order.numel(), generator=generator)].reshape(order.shape)


def islands(dim: int, num_groups: int) -> Tensor:
    """Islands that grow from a seed: first to the right, then to both sides at once.

    The first entry of a lane is drawn without any neighbour, and costs more bits than later ones. An island
    has one first entry for two lanes, so that there are half as many as in `lockstep`; its left lane starts
    as late as possible.

    >>> islands(10, 4)
    tensor([[ 1, 10,  6, 10],
            [ 2, 10,  7, 10],
            [ 3, 10,  8, 10],
            [ 4,  0,  9,  5]])
    """
    _check(dim, num_groups)
    count = -(-dim // (2 * num_groups - 1))
    sizes = [dim // count + (i < dim % count) for i in range(count)]
    order = torch.full((num_groups, 2 * count), dim)
    begin = 0
    for i, size in enumerate(sizes):
        num_left = max(0, size - num_groups)
        seed = begin + num_left
        order[: size - num_left, 2 * i] = torch.arange(seed, begin + size)
        order[num_groups - num_left :, 2 * i + 1] = torch.arange(seed - 1, begin - 1, -1)
        begin += size
    used = (order < dim).any(0)
    return order[:, used]


def spread(height: int, width: int) -> Tensor:
    """Places of a grid in the order of a Bayer matrix, int64 ``(height * width,)``: neighbours come late.

    The first half, quarter, ... of them are regular grids too.

    >>> spread(2, 2)
    tensor([0, 3, 2, 1])
    """
    row, column = torch.arange(height)[:, None], torch.arange(width)
    rank = torch.zeros(height, width, dtype=torch.int64)
    for bit in range(max(height, width).bit_length()):
        i, j = row >> bit & 1, column >> bit & 1
        rank = rank * 4 + 2 * (i ^ j) + j
    return rank.flatten().argsort(stable=True)


#: Orders by name; add one here and every grouped model can use it.
ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "lockstep": lockstep,
    "islands": islands,
    "bit_reversed": bit_reversed,
    "shuffled": shuffled,
}


def check_order(order: Tensor, dim: int) -> None:
    """Raise ValueError unless every position in ``range(dim)`` occurs in ``order`` exactly once."""
    if not isinstance(order, Tensor):
        raise ValueError(f"an order is an int64 matrix (G, S), found {type(order).__name__}")
    if order.ndim != 2 or order.is_floating_point():
        raise ValueError(f"an order is an int64 matrix (G, S), found {order.dtype} {tuple(order.shape)}")
    positions = order[order < dim].flatten()
    if not torch.equal(positions.sort().values, torch.arange(dim, device=order.device)):
        raise ValueError(f"the order does not name each of the {dim} positions exactly once")


def _check(dim: int, num_groups: int) -> None:
    if not 1 <= num_groups <= dim:
        raise ValueError(f"num_groups must lie in 1..{dim} (the length), found {num_groups}")


def ranks(order: Tensor, dim: int) -> Tensor:
    """The row of ``order``, int64 ``(G, S)``, in which each position stands, int64 ``(dim,)``."""
    row = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    rank = torch.empty(dim, dtype=torch.int64, device=order.device)
    rank[order[order < dim]] = row[order < dim]
    return rank


def schedule(costs: Tensor, num_calls: int) -> Tensor:
    """How many entries each call should draw, int64 (num_calls,), at least one each, by dynamic programming.

    Drawing k entries once t are known costs k * L_t. The L_t are sorted first: without noise they could only
    fall as more entries are known. Hoogeboom et al. 2022, section 3 and appendix A.2.

    Args:
        costs: L_t for t = 0..dim-1, floating (dim,).
        num_calls: in 1..dim.

    >>> schedule(torch.tensor([3.0, 1.0, 1.0, 1.0]), 2)
    tensor([1, 3])
    """
    dim = len(costs)
    if costs.ndim != 1 or not costs.is_floating_point() or not 1 <= num_calls <= dim:
        raise ValueError(
            f"a schedule takes floating costs (dim,) and 1..dim calls, found {tuple(costs.shape)} "
            f"{costs.dtype} and {num_calls}"
        )
    line = torch.arange(dim + 1)
    level = costs.detach().cpu().double().sort(descending=True).values
    # step[t, s]: from t known entries to s by one call.
    step = (line - line[:dim, None]) * level[:, None]
    step = step.masked_fill(line <= line[:dim, None], math.inf)
    best, choices = torch.full((dim + 1,), math.inf, dtype=torch.float64), []
    best[0] = 0
    for _ in range(num_calls):
        least = (best[:dim, None] + step).min(0)
        best = least.values
        choices.append(least.indices)
    ends = [dim]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return torch.tensor(ends[::-1]).diff()
