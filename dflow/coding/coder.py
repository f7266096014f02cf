"""The entropy coder: a stack of numbers under integer counts, by asymmetric numeral systems.

The only module that knows the library (constriction, Bamler 2022, arXiv 2201.01741) and numpy.

The stream is defined by the integer intervals alone. A state s of 64 bits and words of 32: to push the
interval [a, a + f) of [0, 2^24), move the low word of s to the stack if ``s >= f 2^40``; then
``s <- floor(s / f) 2^24 + a + s mod f``. To pop: the symbol is that whose interval holds ``q = s mod 2^24``;
``s <- f floor(s / 2^24) + q - a``; if ``s < 2^32``, a word comes back. s starts at 0, and what is left of it
at the end goes on the stack, low word first.

Source: Duda et al. 2015, Picture Coding Symposium; Giesen 2014, arXiv 1402.3392.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dflow.coding.tables import PRECISION, Tables, check_counts
from dflow.config import InputError

try:
    import constriction
except ModuleNotFoundError:  # files alone need it: models train, score and draw without
    constriction = None

_TOTAL = 1 << PRECISION
if constriction is not None:
    _ANS: Any = constriction.stream.stack.AnsCoder
    # Without perfect=False the library searches for another rounding, hundreds of times slower.
    _CATEGORICAL: Any = constriction.stream.model.Categorical
    _ROWS: Any = _CATEGORICAL(perfect=False)
    _UNIFORM: Any = constriction.stream.model.Uniform()

#: Models of tables, with the version of the buffer that they were made from.
_MODELS: weakref.WeakKeyDictionary[Tables, tuple[int, dict[int, Any]]] = weakref.WeakKeyDictionary()


class Coder:
    """A stack: what is pushed last is popped first.

    As bytes it is little-endian words of 32 bits, the top first, so that the beginning of a stream holds what
    is popped first. An empty stack has none.

    Popping needs what was pushed to be popped under the same counts. That a stream is damaged, cut off or of
    another model shows at the end only (`finish`), and not always: keep a checksum. Any stream is popped to
    some symbols; one that is used up gives symbols still.

    Args:
        data: what `to_bytes` gave.

    Raises:
        InputError: the library is not installed.
        ValueError: not a stream.
    """

    def __init__(self, data: bytes = b"") -> None:
        """See the class."""
        if constriction is None:
            raise InputError(
                "files are coded by the library constriction, which is not installed; pip install "
                "'constriction>=0.5,<0.6'"
            )
        if len(data) % 4:
            raise ValueError(f"a stream is words of 4 bytes, found {len(data)} bytes")
        words = np.frombuffer(data, "<u4")[::-1].astype(np.uint32)
        if len(words) and words[-1] == 0:
            raise ValueError("a stream never begins with a zero word")
        self._ans = _ANS(words)

    def to_bytes(self) -> bytes:
        """The stack as bytes; it stays as it is."""
        data: bytes = self._ans.get_compressed()[::-1].astype("<u4").tobytes()
        return data

    @property
    def num_bits(self) -> int:
        """Bits on the stack; `to_bytes` has up to 31 more."""
        return int(self._ans.num_valid_bits())

    @property
    def num_below(self) -> int:
        """Words that lie below the head of 64 bits."""
        return int(self._ans.pos()[0])

    def finish(self) -> None:
        """ValueError unless the stack is empty, as it is once all that was pushed is popped."""
        if not self._ans.is_empty():
            raise ValueError(
                f"{self.num_bits} bits are left: the stream is damaged, or another model coded it"
            )

    def push(self, start: Tensor, size: Tensor) -> None:
        """Push symbols by their intervals, the last one first: they are popped in the order given.

        Args:
            start: counts below each symbol, integer ``(n,)``.
            size: count of each symbol, integer ``(n,)``.

        Raises:
            ValueError: an interval outside 0..2^24, empty, or longer than 2^24 - 2.
        """
        begin, count = (v.detach().cpu().numpy() for v in (start, size))
        if begin.ndim != 1 or begin.shape != count.shape:
            raise ValueError(f"expected (n,) twice, found {begin.shape} and {count.shape}")
        if not len(begin):
            return
        above = _TOTAL - begin - count
        if min(begin.min(), above.min()) < 0 or count.min() < 1 or count.max() > _TOTAL - 2:
            raise ValueError(f"intervals must lie in 0..2^{PRECISION}, neither empty nor all but one of it")
        # The symbol is the middle one of three, or the first or last if nothing lies below or above it. Rows
        # hold counts less one: they sum to 2^24 - 3, the library scales them by 1 and adds the one again.
        low, high = begin == 0, above == 0
        rows = np.empty((len(begin), 3), np.float32)
        rows[:, 0] = np.where(low, count, begin - high) - 1
        rows[:, 1] = np.where(low | high, 1, count) - 1
        rows[:, 2] = np.where(high, count, above - low) - 1
        self._ans.encode_reverse(1 - low.astype(np.int32) + high, _ROWS, rows)

    def pop_rows(self, counts: Tensor) -> Tensor:
        """Symbols int64 ``(n,)``, one under each row of ``counts`` ``(n, K)``."""
        check_counts(counts)
        if not len(counts):
            return torch.zeros(0, dtype=torch.int64)
        return _tensor(
            self._ans.decode(
                _ROWS, np.ascontiguousarray(counts.cpu().to(torch.float32, copy=True).sub_(1).numpy())
            )
        )

    def pop_shared(self, tables: Tables, amounts: Tensor) -> Tensor:
        """Symbols int64 ``(n,)``: the first ``amounts[0]`` under table 0, and so on; amounts ``(T,)``.

        Tables are made into models of the library when first used, and these are kept.
        """
        cumulative = tables.cumulative
        version, models = _MODELS.get(tables, (-1, {}))
        if version != cumulative._version:
            models = {}
            _MODELS[tables] = (cumulative._version, models)
        symbols = []
        used = amounts.nonzero().flatten()
        for table, amount in zip(used.tolist(), amounts[used].tolist(), strict=True):
            if table not in models:
                row = (cumulative[table].diff() - 1).float().cpu().numpy()
                models[table] = _CATEGORICAL(row, perfect=False)
            symbols.append(self._ans.decode(models[table], amount))
        return _tensor(np.concatenate(symbols)) if symbols else torch.zeros(0, dtype=torch.int64)

    def pop_bits(self, widths: Tensor) -> Tensor:
        """Numbers int64 ``(n,)`` below ``2^widths``, all equally likely; widths in 1..16."""
        if not len(widths):
            return torch.zeros(0, dtype=torch.int64)
        return _tensor(self._ans.decode(_UNIFORM, (1 << widths.cpu()).int().numpy()))


def _tensor(symbols: Any) -> Tensor:
    return torch.from_numpy(symbols).long()
