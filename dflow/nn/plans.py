"""Plans for the group-causal Transformer: which slot predicts which entries of an order, and what it reads.

A plan holds no weights: it is computed from an order (see `dflow.ops.orders`) and from how far the network
reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from dflow.nn.attention import rotations
from dflow.ops.orders import check_order

#: Number of classes of distances to the nearest known symbol; each class is half a power of two wide.
GAPS = 18

#: The least distance of each class but the first, ``2^(k / 2)`` rounded up: integers, exact on every device.
_EDGES = [math.isqrt((1 << k) - 1) + 1 for k in range(1, GAPS)]

#: The distance where there is no known symbol.
FAR = 1 << 20


def buckets(distances: Tensor) -> Tensor:
    """Classes 0..GAPS-1 of distances d from 1 on, half powers of two: ``min(floor(2 log2(d)), GAPS - 1)``."""
    return torch.bucketize(distances, torch.tensor(_EDGES, device=distances.device), right=True)


def gap_classes(known: Tensor) -> Tensor:
    """Classes ``(..., n, 2)`` of the distances to the nearest other known entries, before and behind each.

    Those behind are numbered from `GAPS` on. ``known`` is bool ``(..., n)``.

    >>> gap_classes(torch.tensor([True, False, False])).tolist()
    [[17, 35], [0, 35], [2, 35]]
    """
    line = torch.arange(known.shape[-1], device=known.device)
    last = torch.where(known, line, -FAR).cummax(-1).values
    following = torch.where(known, line, FAR).flip(-1).cummin(-1).values.flip(-1)
    before = line - F.pad(last[..., :-1], (1, 0), value=-FAR)
    after = F.pad(following[..., 1:], (0, 1), value=FAR) - line
    return buckets(torch.stack([before, after], -1)) + torch.tensor([0, GAPS], device=known.device)


#: Number of classes that `reading_classes` tells apart.
READING_CLASSES = 17


def reading_classes(reads: Tensor, mask: Tensor, first: int = 0) -> Tensor:
    """Classes, int64 ``(h,)``, of hidden entries by how near, on either side, a symbol is read for them.

    A distance is 1, up to 3, up to 7, or more (or there is none), on either side; the last class is that of
    entries for which nothing is read.

    Args:
        reads: bool ``(dim, dim)``, whether entry j of a law is read for entry i; on the diagonal whether
            anything is (`dflow.ops.masks.reads`). What is known is read for all of these.
        mask: bool ``(n,)``, True where an entry is known.
        first: index of the first of the others among the entries of the law.

    >>> reads = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    >>> reading_classes(reads, torch.tensor([True, False, False, False])).tolist()
    [0, 7, 16]
    """
    places = (~mask).nonzero().flatten()
    window = slice(first, first + len(places))
    reads = reads[window, window].to(mask.device)
    readable = mask.repeat(len(places), 1)
    readable[:, places] = reads
    line = torch.arange(len(places), device=mask.device)
    sides = gap_classes(readable)[line, places] - torch.tensor([0, GAPS], device=mask.device)
    before, after = (sides // 2).clamp(max=3).unbind(1)
    return torch.where(reads.diagonal(), 4 * before + after, READING_CLASSES - 1)


@dataclass
class Reading:
    """Entries to be predicted, and the symbols that are read for each.

    Attributes:
        positions: positions of the entries, (entries,).
        slots: the slot that each entry belongs to, ascending.
        sources: positions (entries, columns) of the symbols read; n where there is no symbol.
        gaps: rows of the embedding (entries, 2) for the distances to the nearest known symbols, or None.
        cuts: number of entries in the first 0, 1, 2, ... groups.
    """

    positions: Tensor
    slots: Tensor
    sources: Tensor
    gaps: Tensor | None
    cuts: list[int]

    def tensors(self) -> list[Tensor]:
        """All attributes with a row for each entry."""
        return [t for t in (self.positions, self.slots, self.sources, self.gaps) if t is not None]


@dataclass
class Plan:
    """An order as `GroupCausalTransformer` walks it.

    Attributes:
        slots: what the slots read. The position of a slot is that of the first entry that it predicts; a slot
            that predicts no entry has the position of the symbol that it carries.
        entries: the entries that the slots predict, one list for each row of a block.
        later: the entries of all rows but the first, one list after the other.
        inverse: the place of each position in ``entries``, all lists one after the other.
        least: the smallest position that a slot predicts or carries.
        rotation: of the slots' queries and keys to their positions, see `dflow.nn.attention.rotations`.
        mask: which slot attends to which, (slots, slots); None when each sees the slots before it and itself.
        ascending: whether the positions of the slots ascend.
        dim: entries of the sequence.
        block: rows of the order that one call predicts.
        around: positions (dim, columns) of the symbols around each entry from which contexts are read that
            are counted; ``dim`` where a symbol is not drawn before the entry. None where nothing is counted.
        known: positions (known,) of the entries that are known before the first call. Each has a slot, among
            the first, which carries its symbol and predicts nothing; these see each other, and all see them.
    """

    slots: Reading
    entries: list[Reading]
    later: Reading
    inverse: Tensor
    least: Tensor
    rotation: Tensor
    mask: Tensor | None
    ascending: bool
    dim: int
    block: int
    around: Tensor | None
    known: Tensor

    @cached_property
    def following(self) -> Reading:
        """The entries of all rows of a block but the first, group by group."""
        rows = self.entries[1:]
        sizes = torch.tensor([[b - a for a, b in pairwise(row.cuts)] for row in rows])
        groups = torch.arange(sizes.shape[1]).expand_as(sizes).flatten().repeat_interleave(sizes.flatten())
        by_group = groups.argsort(stable=True).to(self.slots.positions.device)
        joined = _joined(rows)
        return Reading(
            joined.positions[by_group],
            joined.slots[by_group],
            joined.sources[by_group],
            None if joined.gaps is None else joined.gaps[by_group],
            [0, *sizes.sum(0).cumsum(0).tolist()],
        )


@dataclass(frozen=True)
class Reach:
    """The neighbourhood of an entry that a network reads.

    Attributes:
        dim: longest sequence.
        carried: how many of the symbols that a lane drew last are read.
        offsets: offsets of the neighbours that are read, (neighbours,).
        gaps_row: the first row of the embedding for distances to the nearest known symbols; None where the
            network does not read these.
        counted: offsets of the symbols from which counted contexts are read, (columns,), or None.
    """

    dim: int
    carried: int
    offsets: Tensor
    gaps_row: int | None
    counted: Tensor | None = None

    def reading(
        self, drawn: Tensor, positions: Tensor, row: Tensor, carried: Tensor, slots: Tensor, cuts: list[int]
    ) -> Reading:
        """The symbols that are read for entries.

        Args:
            drawn: the row that draws each position, (dim + 1,).
            positions: positions of the entries, (entries,).
            row: the first row whose symbols are not known yet, (entries,).
            carried: positions of the symbols that the lane drew last, (entries, `carried`).
            slots: the slot that each entry belongs to, ascending.
            cuts: number of entries in the first 0, 1, 2, ... groups.
        """
        n, device = self.dim, positions.device
        around = positions[:, None] + self.offsets
        around = around.masked_fill((around < 0) | (around > n), n)
        sources = around.masked_fill(drawn[around] >= row[:, None], n)
        gaps = None
        if self.gaps_row is not None:
            away = torch.arange(n, device=device) - positions[:, None]
            known = drawn[:n] < row[:, None]
            nearest = [
                torch.where(known & (away * side > 0), away.abs(), FAR).min(1).values for side in (-1, 1)
            ]
            gaps = buckets(torch.stack(nearest, 1)) + self.gaps_row + torch.tensor([0, GAPS], device=device)
        return Reading(positions, slots, torch.cat([sources, carried], 1), gaps, cuts)


@torch.no_grad()
def make_plan(
    order: Tensor, reach: Reach, head_size: int, dtype: torch.dtype, known: Tensor | None, block: int
) -> Plan:
    """How to walk ``order``, int64 ``(R, S)``, with attention heads of ``head_size`` in ``dtype``.

    The positions ``known``, int64 ``(known,)``, are in no row of the order. A call predicts ``block`` rows.

    Raises:
        ValueError: more rows than symbols that are carried, some of which nobody would read.
    """
    if not 1 <= block <= reach.carried:
        raise ValueError(f"a call predicts 1 to {reach.carried} rows of this network, asked for {block}")
    known = order.new_zeros(0) if known is None else known
    check_order(torch.cat([order.flatten(), known])[:, None], reach.dim)
    m, n, device = block, reach.dim, order.device
    order = order.masked_fill(order >= n, n)
    order = torch.cat([order, order.new_full((-len(order) % m, order.shape[1]), n)])
    rows, lanes = order.shape
    # The row that draws each position; n, which stands for no position, is never drawn.
    drawn = torch.full((n + 1,), rows, device=device)
    drawn[order] = torch.arange(rows, device=device)[:, None].expand_as(order)
    drawn[n], drawn[known] = rows, -1
    last = _drawn_before(order, reach.carried, n)
    blocks, carried = order.unflatten(0, (-1, m)).transpose(1, 2), last[::m]
    present = blocks < n
    used = present.any(-1) | (carried < n).any(-1)
    slot = torch.full(used.shape, -1, device=device)
    slot[used] = torch.arange(int(used.sum()), device=device)
    # A slot has the position of the first entry that it predicts, else of the last symbol that it carries.
    chain = torch.cat([blocks, carried], -1)
    anchor = chain.gather(-1, (chain < n).to(torch.uint8).argmax(-1, keepdim=True))[..., 0]
    keys = torch.where(carried[..., 0] < n, carried[..., 0], anchor)[used]
    group = torch.arange(len(blocks), device=device)[:, None].expand_as(anchor)
    slots = reach.reading(drawn, anchor[used], m * group[used], carried[used], slot[used], _cuts(used))
    group_of_slot = group[used]
    if len(known):
        slots = _after(reach, drawn, known, slots)
        group_of_slot = torch.cat([torch.full_like(known, -1), group_of_slot])
        keys, slot = torch.cat([known, keys]), slot + len(known)
    entries = [
        reach.reading(drawn, blocks[..., j][at], m * group[at] + j, last[j::m][at], slot[at], _cuts(at))
        for j, at in enumerate(present.unbind(-1))
    ]
    return Plan(
        slots,
        entries,
        _joined(entries[1:] or entries),
        _places(entries, n),
        torch.cat([known, chain.min(-1).values[used]]),
        rotations(slots.positions, keys, head_size, dtype),
        None if lanes == 1 and not len(known) else group_of_slot[:, None] >= group_of_slot,
        lanes == 1 and not len(known) and bool((slots.positions.diff() > 0).all()),
        n,
        m,
        _around(drawn, reach.counted),
        known,
    )


def _drawn_before(order: Tensor, number: int, none: int) -> Tensor:
    """Positions ``(R, S, number)``: column c has what the lane drew c + 1 rows before, or ``none``."""
    rows, lanes = order.shape
    history = torch.cat([order.new_full((number, lanes), none), order])
    return torch.stack([history[number - 1 - c : number - 1 - c + rows] for c in range(number)], -1)


def _after(reach: Reach, drawn: Tensor, known: Tensor, slots: Reading) -> Reading:
    """A slot for each known entry, which carries its symbol, then ``slots``; the known ones are one group."""
    nothing = known.new_full((len(known), reach.carried - 1), reach.dim)
    carried = torch.cat([known[:, None], nothing], 1)
    line = torch.arange(len(known), device=known.device)
    before = reach.reading(drawn, known, torch.zeros_like(known), carried, line, [])
    return replace(_joined([before, slots]), cuts=[0, *(len(known) + cut for cut in slots.cuts[1:])])


def _around(drawn: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Positions (n, offsets) of the symbols around each entry, n where one is not drawn in an earlier row."""
    if offsets is None:
        return None
    n = len(drawn) - 1
    line = torch.arange(n, device=drawn.device)[:, None]
    around = line + offsets
    around = around.masked_fill((around < 0) | (around > n), n)
    return around.masked_fill(drawn[around] >= drawn[line], n)


def _cuts(entries: Tensor) -> list[int]:
    """Number of entries in the first 0, 1, 2, ... groups, from bool (groups, lanes)."""
    return [0, *entries.sum(1).cumsum(0).tolist()]


def _places(entries: list[Reading], dim: int) -> Tensor:
    """The place of each position in all lists, one after the other; 0 for a position in none."""
    positions = torch.cat([reading.positions for reading in entries])
    line = torch.arange(len(positions), device=positions.device)
    return torch.zeros(dim, dtype=torch.int64, device=positions.device).index_copy(0, positions, line)


def _joined(readings: list[Reading]) -> Reading:
    """Several lists of entries as one, without groups."""
    positions, slots, sources, *gaps = (
        torch.cat(tensors) for tensors in zip(*(reading.tensors() for reading in readings), strict=True)
    )
    return Reading(positions, slots, sources, gaps[0] if gaps else None, [])
