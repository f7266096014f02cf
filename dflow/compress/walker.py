"""Chunks of a text that are coded one after another, each given the text before it."""

from __future__ import annotations

import torch
from torch import Tensor

from dflow.coding.container import Damaged
from dflow.compress.text_coder import TextCoder, TextPlan
from dflow.core import Context, Distribution, Known
from dflow.data import GrowingCounts
from dflow.distributions import SequenceCategorical
from dflow.models.counts import counted, patterns_in


class Walker:
    """The laws of chunks that are coded one after another, each given the text before it.

    Args:
        coder: of a model with a context.
        plan: what the header says.
    """

    def __init__(self, coder: TextCoder, plan: TextPlan) -> None:
        self.coder, self.plan = coder, plan
        self.text = torch.zeros(1, 0, dtype=torch.int64)
        modules = list(counted(coder.law))
        self.growing: GrowingCounts | None = None
        if plan.weight:
            if not modules:
                raise Damaged("is coded with counts that adapt, and the model has none")
            self.growing = GrowingCounts(coder.tokenizer.size, patterns_in(coder.law), plan.weight)
        for module in modules:
            module.also = self.growing

    def close(self) -> None:
        """Leave the model as it was: other files may be coded in another way by the same one."""
        for module in counted(self.coder.law):
            module.also = None

    @property
    def tail(self) -> Tensor:
        """The known symbols before the next chunk, ``(1, known)``."""
        return self.text[:, max(0, self.text.shape[1] - self.plan.context) :]

    def law(self, length: int) -> tuple[Distribution, Context, Tensor]:
        """The law of the next chunk, its context, and the known symbols before it, ``(1, known)``."""
        tail = self.tail
        mask = torch.arange(tail.shape[1] + length) < tail.shape[1]
        law, symbols = self.coder.law, torch.cat([tail, tail.new_zeros(1, length)], 1)
        if isinstance(law, SequenceCategorical):
            law = law.among(mask)
        return law.eval(), Context(known=Known(symbols, mask)), tail

    def advance(self, chunk: Tensor) -> None:
        """Take a chunk, int64 ``(1, n)``, for known from now on."""
        self.text = torch.cat([self.text, chunk], 1)
        if self.growing is not None:
            self.growing.extend(chunk[0])
