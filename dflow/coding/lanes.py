"""Several stacks in turn that share their words: a decoder knows the next bits of each before it needs them.

A symbol comes off a stack by the number ``q = s mod 2^24`` of its state s: it is the one whose interval holds
q (`dflow.coding.coder`). With w stacks, of which symbol i is on number ``i mod w``, the numbers of the next w
symbols are known at once. So a decoder can draft these symbols by another law, with the very numbers that
decide them under the law itself, and mostly finds what the law finds.

Each state is at least 2^32, where coding begins and decoding ends. To push the interval [a, a + f) move the
low word of s to the words if ``s >= f 2^40``; then ``s <- floor(s / f) 2^24 + a + s mod f``. Popping goes
back.

Source: interleaved coders of one stream of words, Giesen 2014, arXiv 1402.3392.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence

from dflow.coding.tables import PRECISION

#: Least value of a state between symbols.
_LEAST = 1 << 32
_WORD = (1 << 32) - 1
_MASK = (1 << PRECISION) - 1


def interleave(starts: Sequence[int], sizes: Sequence[int], lanes: int) -> bytes:
    """Symbols by their intervals of [0, 2^24), in the order of popping, on so many stacks in turn.

    It takes 32 bits a stack more than the symbols, and up to 32 for the words of its state.
    """
    states, words = [_LEAST] * lanes, list[int]()
    for i in range(len(starts) - 1, -1, -1):
        s, start, size = states[i % lanes], starts[i], sizes[i]
        if s >= size << 64 - PRECISION:
            words.append(s & _WORD)
            s >>= 32
        states[i % lanes] = (s // size << PRECISION) + start + s % size
    heads = [word for s in states for word in (s & _WORD, s >> 32)]
    words = [*heads, *reversed(words)]
    return struct.pack(f"<{len(words)}I", *words)


class Lanes:
    """What `interleave` made, to pop symbols from.

    Args:
        data: the bytes.
        lanes: number of stacks.

    Raises:
        ValueError: too few bytes for the states, or states that no stack has.

    >>> coded = Lanes(interleave([0, 1 << 23, 0], [1 << 23, 1 << 23, 1 << 23], 2), 2)
    >>> [coded.pop([1 << 23, 1 << 24]) for _ in range(3)]
    [0, 1, 0]
    >>> coded.finish()
    """

    def __init__(self, data: bytes, lanes: int) -> None:
        """See the class."""
        if len(data) % 4 or len(data) < 8 * lanes:
            raise ValueError(f"{len(data)} bytes are no {lanes} stacks")
        words: tuple[int, ...] = struct.unpack(f"<{len(data) // 4}I", data)
        self.lanes, self._words, self._place = lanes, words, 2 * lanes
        self._states = [words[2 * i] | words[2 * i + 1] << 32 for i in range(lanes)]
        if min(self._states) < _LEAST:
            raise ValueError("a state below 2^32, which no stack has")
        self._next = 0

    def noise(self, ahead: int) -> int:
        """The number below 2^24 that decides the symbol ``ahead`` of the next one, less than the lanes."""
        return self._states[(self._next + ahead) % self.lanes] & _MASK

    def pop(self, ends: Sequence[int]) -> int:
        """The next symbol, by where the interval of each symbol ends; these are its counts, added up.

        Raises:
            ValueError: no words are left.
        """
        lane = self._next % self.lanes
        s = self._states[lane]
        q = s & _MASK
        symbol = bisect_right(ends, q)
        start = ends[symbol - 1] if symbol else 0
        s = (ends[symbol] - start) * (s >> PRECISION) + q - start
        if s < _LEAST:
            if self._place == len(self._words):
                raise ValueError("the stream is used up: it is damaged, or another model coded it")
            s = s << 32 | self._words[self._place]
            self._place += 1
        self._states[lane] = s
        self._next += 1
        return symbol

    def finish(self) -> None:
        """ValueError unless all that was coded is popped."""
        if self._place < len(self._words) or any(s != _LEAST for s in self._states):
            raise ValueError("bits are left: the stream is damaged, or another model coded it")
