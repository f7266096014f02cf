"""Counts of the symbols that stand in a context, for contexts of many patterns, counted once and looked up.

A *pattern* is a tuple of offsets from an entry, as (-1, -2, -3) for the three symbols before it, and (-1, 1)
for its two neighbours; a *context* is a pattern and the symbols at its offsets. The contexts of all patterns
are in one table, by 64-bit hashes of theirs, so that one search finds them all.
"""

from __future__ import annotations

import copy
import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Pattern = tuple[int, ...]


class CountsError(ValueError):
    """Tensors that are no table of counts."""


def factor(offset: int) -> int:
    """An odd number of 64 bits, as a signed one: the weight of an offset in hashes (SplitMix64)."""
    z = (2 * abs(offset) + (offset > 0)) * 0x9E3779B97F4A7C15 % (1 << 64)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ z >> 27) * 0x94D049BB133111EB % (1 << 64)
    z = (z ^ z >> 31) | 1
    return z - (1 << 64) if z >> 63 else z


def symbol_bits(K: int) -> int:
    """Bits of a symbol; the hash of a context has the others of 64."""
    return max(1, (K - 1).bit_length())


def patterns_of(longest: int, both_sides: bool) -> tuple[list[int], list[Pattern]]:
    """Offsets of the symbols that are read around an entry, and the patterns of its contexts.

    They are the empty pattern, those of up to ``longest`` symbols before the entry, and with ``both_sides``
    those of symbols after it, and of about as many before as after it. The latter are shorter: of two sides,
    fewer symbols say as much.

    >>> patterns_of(2, True)
    ([-2, -1, 1, 2], [(), (-1,), (-1, -2), (1,), (1, 2), (-1, 1)])
    """
    line = range(1, longest + 1)
    return patterns_among([-offset for offset in line], line if both_sides else (), longest)


def patterns_among(
    left: Sequence[int], right: Sequence[int], longest: int
) -> tuple[list[int], list[Pattern]]:
    """The same where only some symbols are known, as every second one.

    Args:
        left: offsets of the known symbols before an entry, the nearest first.
        right: offsets of those after it, alike.
        longest: most symbols of a pattern.

    >>> patterns_among([-1, -3], [1], 2)
    ([-3, -1, 1], [(), (-1,), (-1, -3), (1,), (-1, 1)])
    """
    before = [tuple(left[:n]) for n in range(min(longest, len(left)) + 1)]
    after = [tuple(right[:n]) for n in range(1, min(longest, len(right), _LONGEST_AFTER) + 1)]
    around = [
        a + b
        for a in before[1:]
        for b in after
        if len(a + b) <= min(longest, _LONGEST_AROUND) and abs(len(a) - len(b)) <= 1
    ]
    patterns = before + after + around
    return sorted({offset for pattern in patterns for offset in pattern}), patterns


#: Symbols of the longest contexts after an entry, and around it.
_LONGEST_AFTER, _LONGEST_AROUND = 4, 8


class CountRow(NamedTuple):
    """The counts of one context: its symbols, and how often each stands there."""

    symbols: list[int]
    counts: list[int]


class CountSource(Protocol):
    """What counts can be read from."""

    def dense(self, keys: Tensor, present: Tensor, K: int) -> Tensor:
        """Counts of all K symbols in contexts, see `CountTable.dense`."""
        ...

    def rows(self, key: int) -> Sequence[CountRow]:
        """Rows of one context by its hash, whose sum `dense` gives; on the CPU, without tensors."""
        ...


@dataclass(frozen=True, eq=False)
class CountTable:
    """How often each symbol stands in each context.

    Args:
        keys: hashes of the contexts, int64 ``(contexts,)``, ascending.
        sizes: number of different symbols in each context, int32 ``(contexts,)``, at least 1.
        symbols: the symbols of one context after another, ascending in each, uint8, int16 or int32
            ``(pairs,)``.
        counts: how often each of these stands there, int32 ``(pairs,)``, at least 1.

    Attributes:
        starts: the first pair of each context, and the number of pairs, int64 ``(contexts + 1,)``.
        widest: the most different symbols of a context.

    Raises:
        CountsError: tensors of other dtypes or shapes, or with other values.
    """

    keys: Tensor
    sizes: Tensor
    symbols: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        """Check the tensors, and find the first pair of each context."""
        for name, dtypes in _DTYPES.items():
            tensor = getattr(self, name)
            if tensor.ndim != 1 or tensor.dtype not in dtypes:
                raise CountsError(
                    f"{name} must be a vector of {dtypes[0]}, found {tensor.dtype} {tuple(tensor.shape)}"
                )
        if len(self.keys) != len(self.sizes) or len(self.symbols) != len(self.counts):
            raise CountsError(
                f"{len(self.keys)} keys, {len(self.sizes)} sizes, {len(self.symbols)} symbols and "
                f"{len(self.counts)} counts do not belong together"
            )
        if bool((self.sizes < 1).any()) or int(self.sizes.sum()) != len(self.symbols):
            raise CountsError(f"the sizes of the contexts do not add up to {len(self.symbols)} symbols")
        if bool((self.counts < 1).any()) or bool((self.symbols < 0).any()):
            raise CountsError("a count below 1, or a symbol below 0")
        if bool((self.keys.diff() < 0).any()):
            raise CountsError("keys that do not ascend")
        starts = torch.cat([self.sizes.new_zeros(1, dtype=torch.int64), self.sizes.cumsum(0)])
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "widest", int(self.sizes.max()) if len(self.sizes) else 0)

    starts: Tensor = field(init=False)
    widest: int = field(init=False)

    def __deepcopy__(self, memo: object) -> CountTable:
        """The table itself: nothing changes it."""
        return self

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that make the table."""
        return {name: getattr(self, name) for name in _DTYPES}

    def digest(self) -> bytes:
        """SHA-256 of the table."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {len(tensor)} ".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.digest()

    def to(self, device: torch.device) -> CountTable:
        """The table on a device."""
        if self.keys.device == device:
            return self
        # Checked already: on the device, every check would be waited for.
        moved = copy.copy(self)
        for name in (*_DTYPES, "starts"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved

    def dense(self, keys: Tensor, present: Tensor, K: int) -> Tensor:
        """Counts of all K symbols in contexts, float32 ``(..., K)``; zeros for contexts not in the table.

        Args:
            keys: hashes of contexts, int64 ``(...)``.
            present: bool ``(...)``, False where the symbols of a context are not all known.
            K: size of the alphabet.
        """
        if keys.device.type != "cpu":
            return self._padded(keys.flatten(), present.flatten(), K).view(*keys.shape, K)
        out = torch.zeros(keys.numel() * K, device=keys.device)
        if len(self.keys):
            rows = present.flatten().nonzero()[:, 0]
            wanted = keys.flatten()[rows]
            index = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
            met = self.keys[index] == wanted
            rows, index = rows[met], index[met]
            begins, sizes = self.starts[index], self.sizes[index]
            # Pair p of all contexts one after the other belongs to context `of[p]`, and is pair `pairs[p]` of
            # the table.
            of = torch.repeat_interleave(sizes)
            pairs = (begins - sizes.cumsum(0) + sizes)[of] + torch.arange(len(of), device=keys.device)
            out[rows[of] * K + self.symbols[pairs].long()] = self.counts[pairs].float()
        return out.view(*keys.shape, K)

    def _padded(self, keys: Tensor, present: Tensor, K: int) -> Tensor:
        """`dense` of vectors, with as many pairs for each context as the largest has.

        Shapes then follow from shapes, so that an accelerator is not waited for. It takes more operations.
        """
        out = torch.zeros(len(keys), K, device=keys.device)
        if not len(self.keys):
            return out
        line, last = torch.arange(self.widest, device=keys.device), len(self.symbols) - 1
        together = max(1, _TOGETHER // self.widest)
        for wanted, is_present, rows in zip(*(t.split(together) for t in (keys, present, out)), strict=True):
            index = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
            met = is_present & (self.keys[index] == wanted)
            pairs = (self.starts[index][:, None] + line).clamp_(max=last)
            inside = met[:, None] & (line < self.sizes[index][:, None])
            # A symbol stands once among the pairs of a context: one number that is not 0 is added to each.
            rows.scatter_add_(1, self.symbols[pairs].long(), self.counts[pairs] * inside.float())
        return out

    def within(self, other: CountTable) -> CountTable:
        """The contexts that are in ``other`` too."""
        if not len(other.keys):
            return self.where(torch.zeros_like(self.keys, dtype=torch.bool))
        index = torch.searchsorted(other.keys, self.keys).clamp_(max=len(other.keys) - 1)
        return self.where(other.keys[index] == self.keys)

    def totals(self) -> Tensor:
        """How often each context was met, int64 ``(contexts,)``."""
        sums = torch.cat([self.counts.new_zeros(1, dtype=torch.int64), self.counts.cumsum(0)])
        return sums[self.starts].diff()

    def where(self, contexts: Tensor) -> CountTable:
        """The contexts of a mask."""
        pairs = torch.repeat_interleave(contexts, self.sizes)
        return CountTable(self.keys[contexts], self.sizes[contexts], self.symbols[pairs], self.counts[pairs])


_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "keys": (torch.int64,),
    "sizes": (torch.int32,),
    "symbols": (torch.uint8, torch.int16, torch.int32),
    "counts": (torch.int32,),
}


class ContextReader:
    """The hashes of the contexts of entries, from the symbols around each.

    Args:
        K: size of the alphabet.
        offsets: offsets of the columns of symbols.
        patterns: patterns over these offsets.
    """

    def __init__(self, K: int, offsets: Sequence[int], patterns: Sequence[Pattern]) -> None:
        self.K, self.bits = K, symbol_bits(K)
        self.factors = torch.tensor(
            [[factor(offset) if offset in pattern else 0 for pattern in patterns] for offset in offsets]
        )
        #: For each pattern an earlier one that it goes on from, and the further columns with their factors.
        self._steps: list[tuple[int, list[tuple[int, int]]]] = []
        for j, pattern in enumerate(patterns):
            earlier = [i for i in range(j) if patterns[i] == pattern[: len(patterns[i])]]
            parent = max(earlier, key=lambda i: len(patterns[i]), default=-1)
            more = pattern[len(patterns[parent]) if earlier else 0 :]
            self._steps.append((parent, [(list(offsets).index(offset), factor(offset)) for offset in more]))

    def __call__(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Hashes of the contexts, int64 ``(..., patterns)``, and whether all symbols of each are known.

        Args:
            symbols: int64 ``(..., columns)``, K where there is no symbol or it is not known.
        """
        if self.factors.device != symbols.device:
            self.factors = self.factors.to(symbols.device)
        keys = ((symbols + 1)[..., None] * self.factors).sum(-2) >> self.bits
        absent = ((symbols == self.K)[..., None] & (self.factors != 0)).any(-2)
        return keys, ~absent

    def one(self, symbols: Sequence[int]) -> list[int | None]:
        """The same for one entry: the hash of each context, or None where a symbol is not known."""
        sums: list[int | None] = []
        for parent, columns in self._steps:
            total = sums[parent] if parent >= 0 else 0
            for column, weight in columns:
                if total is None or symbols[column] == self.K:
                    total = None
                    break
                total += (symbols[column] + 1) * weight
            sums.append(total)
        return [None if total is None else _signed(total) >> self.bits for total in sums]


def _signed(number: int) -> int:
    """An integer modulo 2^64, as int64 has it."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


class RowReader:
    """Looks up single contexts of a table without tensors, whose overhead would be most of the time.

    Keys are hashes and lie evenly, so that a list of where each of many equal parts of their range begins
    leaves a search among a few.
    """

    def __init__(self, table: CountTable) -> None:
        table = table.to(torch.device("cpu"))
        keys = table.keys
        low, high = (int(keys[0]), int(keys[-1])) if len(keys) else (0, 0)
        self._shift = max(0, (high - low).bit_length() - (len(keys) // _PART).bit_length())
        self._low, self._high = low >> self._shift, high >> self._shift
        borders = torch.arange(self._low, self._high + 1) << self._shift
        begins = torch.searchsorted(keys, borders)
        ends = torch.cat([begins, begins.new_tensor([len(keys)])])
        arrays = [tensor.numpy() for tensor in (keys, table.starts, table.symbols, table.counts, ends)]
        self._keys, self._starts, self._symbols, self._counts, self._begins = (array.data for array in arrays)
        #: What `dflow.nn.loops` reads: arrays of these tensors, and how a key leads to its part.
        self.arrays = (*arrays, self._low, self._high, self._shift)

    def __call__(self, key: int) -> CountRow | None:
        """The row of a context by its hash; None where the context is not in the table."""
        part = key >> self._shift
        if not self._low <= part <= self._high:
            return None
        end = self._begins[part - self._low + 1]
        i = bisect_left(self._keys, key, self._begins[part - self._low], end)
        if i == end or self._keys[i] != key:
            return None
        pairs = slice(self._starts[i], self._starts[i + 1])
        return CountRow(self._symbols[pairs].tolist(), self._counts[pairs].tolist())


#: Pairs of an accelerator's look-up that are in memory at once.
_TOGETHER = 1 << 22

#: Keys of a part, on average.
_PART = 16
