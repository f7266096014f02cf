"""Counts alone as a network: every order of n-grams, trusted as much as a gate says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dflow.core import Context, only_lengths
from dflow.nn.counted import Counted, loops, neighbours
from dflow.ops.counts import patterns_of
from dflow.ops.recent import Recent


@dataclass
class NgramState:
    """The last symbols drawn, ``(batch, counts)``; K before the first symbol. `past`: those of `ahead`."""

    recent: Tensor
    past: Recent | None = None


class NgramNet(nn.Module):
    """K logits of each entry from how often symbols followed the ones before it in the training text.

    It is the mixture of `Counted` without a network beside it: the share of a network belongs to the uniform
    law. Absent entries come after all present ones and so influence none of them.

    Args:
        K: size of the alphabet.
        counts: longest context, in symbols.
    """

    ahead_cost = 0.9

    def __init__(self, K: int, counts: int) -> None:
        """See the class."""
        super().__init__()
        if counts < 1:
            raise ValueError(f"counts must be at least 1, found {counts}")
        self.K, self.counts = K, counts
        self.counted = Counted(K, 0, *patterns_of(counts, False))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Logits ``(batch, n, K)`` of symbols int64 ``(batch, n)`` or one-hot rows ``(batch, n, K)``."""
        only_lengths(context, len(x))
        return self._logits(
            neighbours(x.argmax(-1) if x.is_floating_point() else x, [*range(-self.counts, 0)], self.K)
        )

    def start(self, batch: int, context: Context | None = None) -> NgramState:
        """State before the first `step` of ``batch`` sequences."""
        only_lengths(context, batch)
        return NgramState(torch.full((batch, self.counts), self.K, device=self.counted.digest.device))

    @torch.no_grad()
    def step(self, x: Tensor | None, state: NgramState) -> Tensor:
        """Logits ``(batch, 1, K)`` of the next entry, given the symbol just drawn, int64 ``(batch, 1)``."""
        if x is not None:
            state.recent = torch.cat([state.recent[:, 1:], x], 1)
        return self._logits(state.recent[:, None])

    @torch.no_grad()
    def ahead(self, x: Tensor, begins: Sequence[int], state: NgramState) -> Tensor:
        """Logits of several entries a sequence in one call, see `dflow.core.AheadNet`."""
        if state.past is None:
            state.past = Recent(state.recent, begins[0])
        return self._logits(state.past(x, torch.tensor(begins, device=x.device)))

    @property
    def single_cost(self) -> float:
        """What drafting a symbol takes, in network calls of a small Transformer: measured on a CPU."""
        return 0.01 if loops() else 0.35

    def single(self, before: Sequence[int]) -> Tensor:
        """Logits (K,) of one entry, on the CPU.

        Args:
            before: all symbols before the entry, or at least the last ``counts``.
        """
        return self._logits(torch.tensor(self._last(before)))

    def _last(self, before: Sequence[int]) -> Sequence[int]:
        """The symbols that an entry's contexts are made of; K where there is none."""
        symbols = before[-self.counts :]
        if len(symbols) < self.counts:
            symbols = [self.K] * (self.counts - len(symbols)) + list(symbols)
        return symbols

    def draft(self, before: Sequence[int], gumbel: Tensor) -> list[int]:
        """Symbols one after another under noise float64 ``(drafted, K)``, see `Counted.draft`."""
        return self.counted.draft(before, gumbel)

    @torch.no_grad()
    def read(self, x: Tensor, state: NgramState) -> None:
        """Read the first symbols ``x``, int64 ``(batch or 1, p)``; the next `step` is given the last one."""
        before = x[:, :-1].expand(len(state.recent), -1)
        state.recent = torch.cat([state.recent, before], 1)[:, before.shape[1] :]

    def _logits(self, symbols: Tensor) -> Tensor:
        uniform = self.counted.weights.weight.new_zeros(*symbols.shape[:-1], self.K)
        out: Tensor = self.counted(uniform, symbols)
        return out
