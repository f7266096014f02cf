"""The stream of `dflow.coding.coder.Coder` in plain Python, which the fast one is tested against."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from dflow.coding.tables import PRECISION, Tables


class ReferenceCoder:
    """What `Coder` does, for a test of every byte."""

    def __init__(self, data: bytes = b"") -> None:
        """``data`` as of `to_bytes`."""
        words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)][::-1]
        self._words, self._state = words, 0
        while words and self._state < 1 << 32:
            self._state = self._state << 32 | words.pop()

    def to_bytes(self) -> bytes:
        """The stack as bytes."""
        words, state = list(self._words), self._state
        while state:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        return b"".join(word.to_bytes(4, "little") for word in reversed(words))

    @property
    def num_bits(self) -> int:
        """Bits on the stack."""
        return 32 * len(self._words) + self._state.bit_length()

    def finish(self) -> None:
        """ValueError unless empty."""
        if self._words or self._state:
            raise ValueError(f"{self.num_bits} bits are left of the stream")

    def push(self, start: Tensor, size: Tensor) -> None:
        """Push symbols by their intervals, the last one first."""
        for a, f in zip(reversed(start.tolist()), reversed(size.tolist()), strict=True):
            if self._state >= f << (64 - PRECISION):
                self._words.append(self._state & 0xFFFFFFFF)
                self._state >>= 32
            self._state = (self._state // f << PRECISION) + a + self._state % f

    def _quantile(self) -> int:
        return self._state & ((1 << PRECISION) - 1)

    def _take(self, start: int, size: int) -> None:
        self._state = size * (self._state >> PRECISION) + self._quantile() - start
        if self._state < 1 << 32 and self._words:
            self._state = self._state << 32 | self._words.pop()

    def _pop(self, cumulative: list[int]) -> int:
        symbol = bisect_right(cumulative, self._quantile()) - 1
        self._take(cumulative[symbol], cumulative[symbol + 1] - cumulative[symbol])
        return symbol

    def pop_rows(self, counts: Tensor) -> Tensor:
        """Symbols, one under each row of ``counts`` ``(n, K)``."""
        rows = torch.nn.functional.pad(counts.long().cumsum(1), (1, 0)).tolist()
        return torch.tensor([self._pop(row) for row in rows], dtype=torch.int64)

    def pop_shared(self, tables: Tables, amounts: Tensor) -> Tensor:
        """Symbols: the first ``amounts[0]`` under table 0, and so on."""
        found: list[int] = []
        for table in amounts.nonzero().flatten().tolist():
            row = tables.cumulative[table].tolist()
            found += [self._pop(row) for _ in range(int(amounts[table]))]
        return torch.tensor(found, dtype=torch.int64)

    def pop_bits(self, widths: Tensor) -> Tensor:
        """Numbers below ``2^widths``."""
        found = []
        for width in widths.tolist():
            low = PRECISION - width
            found.append(self._quantile() >> low)
            self._take(found[-1] << low, 1 << low)
        return torch.tensor(found, dtype=torch.int64)
