"""The last symbols before entries of sequences that are read a few entries at a time, with going back."""

from __future__ import annotations

import torch
from torch import Tensor

#: Entries that a network which reads several at a time can go back, from the furthest that it has read.
LOOK_BACK = 64


class Recent:
    """The symbols before each of the last entries, in a ring.

    Args:
        symbols: the symbols before the one before the first entry, int64 ``(batch, count)``; K where there is
            none.
        begin: the first entry.
    """

    def __init__(self, symbols: Tensor, begin: int) -> None:
        self.count, self._size = symbols.shape[1], symbols.shape[1] + LOOK_BACK
        with torch.inference_mode(False):
            self._rows = torch.arange(len(symbols), device=symbols.device)[:, None]
            self._ring = symbols.new_zeros(len(symbols), self._size)
            places = torch.arange(begin - self.count, begin, device=symbols.device) % self._size
            self._ring[:, places] = symbols

    def __call__(self, x: Tensor, begins: Tensor) -> Tensor:
        """The symbols before entries, int64 ``(batch, w, count)``, the nearest last.

        Args:
            x: the symbol before each entry, ``(batch, w)``.
            begins: the first of the w entries of each sequence, ``(batch,)``, up to `LOOK_BACK` before those
                read already.
        """
        line = torch.arange(1 - self.count, x.shape[1], device=x.device)
        places = (begins[:, None] + line) % self._size
        self._ring[self._rows, places[:, self.count - 1 :]] = x
        return self._ring.gather(1, places).unfold(1, self.count, 1)
