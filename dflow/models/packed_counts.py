"""Tables of counts in a third of their size: contexts as a tree, and integers as narrow as they can be.

A `CountTable` stores a hash for each context, and the hashes are most of its size. Here the contexts of a
pattern are stored as children of the contexts of a shorter pattern, their parents, which have one symbol
less: the number of children of each parent, and the symbol that each child adds. The hashes are computed
from these when the table is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.ops.counts import CountsError, CountTable, Pattern, factor, symbol_bits

#: Names of the tensors: contexts of each pattern; of each parent under each pattern, how many contexts it
#: has; the symbols that these add; the hashes of contexts without a parent in the table; then the columns of
#: the table in this order, with 0 for counts that `LARGE` has.
CONTEXTS, CHILDREN, ADDED, HASHES = "contexts", "children", "added", "hashes"
SIZES, SYMBOLS, COUNTS, LARGE = "sizes", "symbols", "counts", "large"
_NAMES = {CONTEXTS, CHILDREN, ADDED, HASHES, SIZES, SYMBOLS, COUNTS, LARGE}

#: Bits of a hash that tell at once that most candidates are in no table.
_FILTER = 24
#: Candidates that are looked up at a time.
_BLOCK = 1 << 22

Integers = NDArray[np.int64]


def is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of `packed`."""
    return set(tensors) == _NAMES


def packed(table: CountTable, K: int, patterns: Sequence[Pattern]) -> dict[str, Tensor]:
    """The tensors of a table, from which `unpacked` gives it back.

    Args:
        table: on the CPU.
        K: size of the alphabet.
        patterns: all patterns of its contexts, in any order.
    """
    keys = table.keys.numpy()
    finder, bits = _Finder(keys), symbol_bits(K)
    sums: dict[Pattern, Integers] = {}
    places, contexts = list[Integers](), list[int]()
    children, added = list[Integers](), list[Integers]()
    for pattern, parent, offset in _steps(patterns):
        if parent is None:
            candidates = np.zeros((1, 1), np.int64) if not pattern else np.zeros((0, 1), np.int64)
            rows, columns, place = finder.take(candidates, bits)
            sums[pattern] = np.zeros(len(place), np.int64)
        else:
            steps = np.arange(1, K + 1, dtype=np.int64) * factor(offset)
            block = max(1, _BLOCK // K)
            parts = [
                finder.take(sums[parent][i : i + block, None] + steps, bits, i)
                for i in range(0, len(sums[parent]), block)
            ]
            rows, columns, place = (
                np.concatenate([np.zeros(0, np.int64), *(part[i] for part in parts)]) for i in range(3)
            )
            sums[pattern] = sums[parent][rows] + steps[columns]
            children.append(np.bincount(rows, minlength=len(sums[parent])))
            added.append(columns)
        places.append(place)
        contexts.append(len(place))
    rest = np.flatnonzero(~finder.taken)
    of_contexts = table.sizes, table.symbols, table.counts
    ordered = _ordered(of_contexts, np.concatenate([*places, rest]))
    sizes, symbols, counts = (column.numpy() for column in ordered)
    large = counts > np.iinfo(np.uint8).max
    tensors = {
        CONTEXTS: np.array(contexts),
        CHILDREN: np.concatenate([np.zeros(0, np.int64), *children]),
        ADDED: np.concatenate([np.zeros(0, np.int64), *added]),
        HASHES: keys[rest],
        SIZES: sizes,
        SYMBOLS: symbols,
        COUNTS: np.where(large, 0, counts),
        LARGE: counts[large],
    }
    return {name: torch.from_numpy(_narrow(column)) for name, column in tensors.items()}


def unpacked(tensors: Mapping[str, Tensor], K: int, patterns: Sequence[Pattern]) -> CountTable:
    """The table that `packed` was given.

    Raises:
        CountsError: tensors that are none of a table with these patterns.
    """
    if any(t.ndim != 1 or t.dtype.is_floating_point for t in tensors.values()):
        raise CountsError("tensors that are no vectors of integers")
    column = {name: tensor.numpy().astype(np.int64) for name, tensor in tensors.items()}
    steps, bits = _steps(patterns), symbol_bits(K)
    if len(column[CONTEXTS]) != len(steps):
        raise CountsError(f"contexts of {len(column[CONTEXTS])} patterns, and there are {len(steps)}")
    sums: dict[Pattern, Integers] = {}
    children, added = _Parts(column[CHILDREN]), _Parts(column[ADDED])
    for (pattern, parent, offset), number in zip(steps, column[CONTEXTS].tolist(), strict=True):
        if parent is None:
            if not 0 <= number <= (not pattern):
                raise CountsError(f"{number} contexts of a pattern without a parent")
            sums[pattern] = np.zeros(number, np.int64)
            continue
        each, symbols = children.next(len(sums[parent])), added.next(number)
        if (len(each) and int(each.min()) < 0) or int(each.sum()) != number:
            raise CountsError("numbers of contexts that do not add up")
        sums[pattern] = np.repeat(sums[parent], each) + (symbols + 1) * factor(offset)
    children.end()
    added.end()
    keys = np.concatenate([np.concatenate(list(sums.values())) >> bits, column[HASHES]])
    counts = column[COUNTS]
    large = counts == 0
    if int(large.sum()) != len(column[LARGE]):
        raise CountsError("large counts that are missing")
    counts[large] = column[LARGE]
    sizes = column[SIZES]
    if len(sizes) != len(keys) or len(counts) != len(column[SYMBOLS]):
        raise CountsError("columns of other lengths")
    if int(sizes.min(initial=1)) < 1 or int(sizes.sum()) != len(counts):
        raise CountsError(f"the sizes of the contexts do not add up to {len(counts)} symbols")
    order = np.argsort(keys, kind="stable")
    wide = torch.from_numpy(sizes).int(), tensors[SYMBOLS], torch.from_numpy(counts).int()
    return CountTable(torch.from_numpy(keys[order]), *_ordered(wide, order))


def _steps(patterns: Sequence[Pattern]) -> list[tuple[Pattern, Pattern | None, int]]:
    """The patterns, each behind its parent, with this parent and the offset beside it; or None and 0."""
    steps, known = list[tuple[Pattern, Pattern | None, int]](), set(patterns)
    for pattern in sorted(known, key=lambda p: (len(p), p)):
        parents = [
            (pattern[:i] + pattern[i + 1 :], offset) for i, offset in reversed(list(enumerate(pattern)))
        ]
        parent, offset = next((pair for pair in parents if pair[0] in known), (None, 0))
        steps.append((pattern, parent, offset))
    return steps


def _ordered(columns: tuple[Tensor, Tensor, Tensor], order: Integers) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes, symbols and counts of contexts in another order."""
    sizes, symbols, counts = columns
    index = torch.from_numpy(order)
    begins, sizes = (sizes.cumsum(0) - sizes)[index], sizes[index]
    pairs = torch.repeat_interleave(begins - sizes.cumsum(0) + sizes, sizes) + torch.arange(len(symbols))
    return sizes, symbols[pairs], counts[pairs]


def _narrow(column: NDArray[np.integer]) -> NDArray[np.integer]:
    """The same numbers in the narrowest integers that hold them, of those that torch has."""
    low, high = int(column.min(initial=0)), int(column.max(initial=0))
    kinds = (np.uint8, np.int16, np.int32, np.int64)
    kind = next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    return np.ascontiguousarray(column.astype(kind))


class _Finder:
    """Finds which of many hashes are keys of a table; each key is found once."""

    def __init__(self, keys: Integers) -> None:
        self.keys, self.taken = keys, np.zeros(len(keys), bool)
        self._filter = np.zeros(1 << _FILTER, bool)
        self._filter[self._low(keys)] = True

    def take(self, sums: Integers, bits: int, first: int = 0) -> tuple[Integers, Integers, Integers]:
        """Of hashes ``(rows, columns)`` before they are shifted: rows, from ``first``, columns and keys."""
        candidates = sums >> bits
        rows, columns = np.nonzero(self._filter[self._low(candidates)])
        wanted = candidates[rows, columns]
        place = np.searchsorted(self.keys, wanted)
        place[place == len(self.keys)] = 0
        met = (self.keys[place] == wanted) & ~self.taken[place] if len(self.keys) else place < 0
        rows, columns, place = rows[met], columns[met], place[met]
        self.taken[place] = True
        return rows + first, columns, place

    @staticmethod
    def _low(keys: Integers) -> Integers:
        low: Integers = keys & ((1 << _FILTER) - 1)
        return low


class _Parts:
    """Takes one part of a column after another."""

    def __init__(self, column: Integers) -> None:
        self.column, self.place = column, 0

    def next(self, number: int) -> Integers:
        """The next numbers.

        Raises:
            CountsError: there are fewer.
        """
        part = self.column[self.place : self.place + number]
        self.place += number
        if number < 0 or len(part) != number:
            raise CountsError("columns that end too early")
        return part

    def end(self) -> None:
        """Raise `CountsError` where numbers are left."""
        if self.place != len(self.column):
            raise CountsError("columns that are too long")
