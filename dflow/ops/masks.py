"""Masks of couplings over a sequence: the known and the hidden positions of each coupling.

Each function takes the number of positions and of couplings and gives a pair (known, hidden), bool ``(dim,)``
each, for every coupling, in the order in which data pass through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def strides(dim: int, num_flows: int) -> list[tuple[Tensor, Tensor]]:
    """Masks (known, hidden) of couplings from fine to coarse.

    Coupling l of the first round hides the positions that are 2^l mod 2^(l+1) and knows those that are
    0 mod 2^(l+1), so that no symbol is transformed before a coupling conditions on it: conditioning on
    transformed symbols gains almost nothing. Rounds after the first swap the two sets.

    >>> [(k.nonzero().flatten().tolist(), h.nonzero().flatten().tolist()) for k, h in strides(4, 3)]
    [([0, 2], [1, 3]), ([0], [2]), ([1, 3], [0, 2])]
    """
    positions = torch.arange(dim)
    levels = (dim - 1).bit_length()
    masks = []
    for i in range(num_flows):
        stride = 1 << (i % levels)
        known, hidden = positions % (2 * stride) == 0, positions % (2 * stride) == stride
        masks.append((known, hidden) if (i // levels) % 2 == 0 else (hidden, known))
    return masks


def halves(dim: int, num_flows: int) -> list[tuple[Tensor, Tensor]]:
    """Masks of couplings that alternately hide the odd and the even positions, and know the others.

    >>> [(k.nonzero().flatten().tolist(), h.nonzero().flatten().tolist()) for k, h in halves(4, 2)]
    [([0, 2], [1, 3]), ([1, 3], [0, 2])]
    """
    odd = torch.arange(dim) % 2 == 1
    return [(~odd, odd) if i % 2 == 0 else (odd, ~odd) for i in range(num_flows)]


def single(dim: int, num_flows: int) -> list[tuple[Tensor, Tensor]]:
    """Masks of couplings that hide one position in turn, the last first, and know all others.

    With ``dim`` couplings every position is transformed given at least as much as in an autoregressive layer,
    and a position given *all* others has the least entropy.

    >>> [(k.nonzero().flatten().tolist(), h.nonzero().flatten().tolist()) for k, h in single(3, 2)]
    [([0, 1], [2]), ([0, 2], [1])]
    """
    positions = torch.arange(dim)
    return [(positions != p, positions == p) for p in (dim - 1 - i % dim for i in range(num_flows))]


def blocks(dim: int, num_flows: int) -> list[tuple[Tensor, Tensor]]:
    """Masks of couplings that hide one of ``num_flows + 1`` blocks, the last first, and know all before it.

    Every coupling conditions on symbols that are not transformed yet. ``dim - 1`` couplings make up an
    autoregressive layer; further couplings begin again with the last block.

    >>> [(k.nonzero().flatten().tolist(), h.nonzero().flatten().tolist()) for k, h in blocks(5, 2)]
    [([0, 1, 2, 3], [4]), ([0, 1], [2, 3])]
    """
    positions = torch.arange(dim)
    last_first = list(torch.tensor_split(positions, min(num_flows, dim - 1) + 1))[:0:-1]
    hidden = [last_first[i % len(last_first)] for i in range(num_flows)]
    return [(positions < block[0], (positions >= block[0]) & (positions <= block[-1])) for block in hidden]


#: Masks (known, hidden) of couplings by name, from the number of positions and of couplings.
MASKS: dict[str, Callable[[int, int], list[tuple[Tensor, Tensor]]]] = {
    "strides": strides,
    "halves": halves,
    "single": single,
    "blocks": blocks,
}


def first_of(number: int) -> int:
    """How many positions of `strides`, counted from 1, so many entries leave out at the beginning.

    The first and the last of them are then in the two finest couplings. Where both ends are next to symbols
    that are known otherwise, these are always read by networks that learn from many entries.

    >>> [first_of(number) for number in (1, 2, 3, 4, 5)]
    [0, 0, 0, 2, 0]
    """
    return 2 if number % 4 == 0 else 0


def reads(masks: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What the first coupling that hides a position knows: bool ``(dim, dim)``, a row for each position.

    On the diagonal it is whether any coupling hides the position.

    >>> reads(strides(4, 2)).int().tolist()
    [[0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    """
    table = torch.zeros(len(masks[0][0]), len(masks[0][0]), dtype=torch.bool)
    for known, hidden in masks:
        first = (hidden & ~table.diagonal()).nonzero().flatten()
        table[first] = known
        table[first, first] = True
    return table
