"""Documents: sequences of any length, chunk after chunk, each given the last symbols before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dflow.config import InputError
from dflow.core import Context, Distribution, Known, known_in, lengths_in, noise_in
from dflow.ops.devices import widen, widest

#: Windows that are scored together hold at most so many entries.
_ENTRIES = 1 << 14


class Documents(Distribution):
    r"""Exact law of a sequence of any length n, whose chunks are given the ``context`` symbols before them.

    .. math:: \log p(x) = \sum_c \log p(x_{a_c : a_c + L} \mid x_{a_c - C : a_c})

    Chunks have L symbols, the last one what is left. Symbols at the beginning may be known (`Known`): then
    the first chunk begins behind them, and it is the law of the others given these.

    Args:
        law: takes known entries that stand before the others, and sequences of up to ``length + context``.
        length: L, symbols of a chunk.
        context: C, symbols before a chunk that it is given, at most.

    Raises:
        ValueError: a length below 1, or a negative context.
    """

    def __init__(self, law: Distribution, length: int, context: int) -> None:
        super().__init__()
        if length < 1 or context < 0:
            raise ValueError(f"length {length} must be at least 1, and context {context} not negative")
        self.law, self.length, self.context = law, length, context

    def chunks(self, n: int, known: int = 0) -> Iterator[tuple[int, int, int]]:
        """The chunks of n symbols, the first of them known: begin of the window, of the chunk, and end."""
        for begin in range(known, n, self.length):
            yield max(0, begin - self.context), begin, min(n, begin + self.length)

    @property
    def by_entry(self) -> bool:  # type: ignore[override]
        """Whether the law of the chunks has terms by entry."""
        return self.law.by_entry

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact nats ``(batch,)`` of those of the symbols, int64 ``(batch, n)``, that are not known."""
        if self.by_entry:
            return self.log_prob_each(x, context).sum(1)
        total = torch.zeros(len(x), dtype=widest(x.device), device=x.device)
        for _, _, windows in self._together(x, context):
            terms = widen(self.law.log_prob(windows.symbols, Context(known=windows)))
            total += terms.view(-1, len(x)).sum(0)
        return total

    def log_prob_each(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The terms of `log_prob`, float64 ``(batch, n)``; 0 for symbols that are known."""
        each = torch.zeros(x.shape, dtype=widest(x.device), device=x.device)
        for starts, before, windows in self._together(x, context):
            terms = widen(self.law.log_prob_each(windows.symbols, Context(known=windows)))
            for start, chunk in zip(starts, terms.split(len(x)), strict=True):
                each[:, start + before : start + chunk.shape[1]] = chunk[:, before:]
        return each

    def _together(self, x: Tensor, context: Context | None) -> Iterator[tuple[list[int], int, Known]]:
        """Windows of one shape, scored together: where they begin, the number of known symbols, all symbols.

        The windows of all sequences that begin at one place follow one another.
        """
        batch, n = x.shape
        groups: dict[tuple[int, int], list[int]] = {}
        for window, begin, end in self.chunks(n, self._known(context, n)):
            groups.setdefault((begin - window, end - begin), []).append(window)
        for (before, hidden), starts in groups.items():
            together = max(1, _ENTRIES // (batch * (before + hidden)))
            mask = _mask(before, hidden)
            for i in range(0, len(starts), together):
                some = starts[i : i + together]
                windows = torch.cat([x[:, start : start + before + hidden] for start in some])
                yield some, before, Known(windows, mask)

    def sample(
        self,
        n: int,
        context: Context | None = None,
        generator: torch.Generator | None = None,
        length: int | None = None,
    ) -> Tensor:
        """``n`` documents, int64 ``(n, length)``; default length: a chunk behind what is known."""
        return torch.cat(list(self.stream(n, context, generator, length)), 1)

    def stream(
        self,
        n: int,
        context: Context | None = None,
        generator: torch.Generator | None = None,
        length: int | None = None,
    ) -> Iterator[Tensor]:
        """The parts of `sample` as they are drawn, int64 ``(n, any)``: what is known, then the chunks."""
        known = known_in(context)
        before = 0 if known is None else int(known.mask.sum())
        total = before + self.length if length is None else length
        self._known(context, total)
        device = next(self.law.parameters()).device
        noise = noise_in(context, n, generator, device)
        tail = torch.zeros(n, 0, dtype=torch.int64, device=device)
        if known is not None and before:
            tail = known.symbols[:, :before]
            yield tail
        for window, begin, end in self.chunks(total, before):
            tail = tail[:, tail.shape[1] - (begin - window) :]
            hidden = end - begin
            mask = _mask(begin - window, hidden)
            symbols = torch.cat([tail, tail.new_zeros(n, hidden)], 1)
            # Noise by the place in the document: another cut into chunks draws with the same.
            places = replace(noise, positions=torch.arange(window, end, device=device))
            drawn = self.law.sample(n, Context(known=Known(symbols, mask), noise=places))
            yield drawn[:, begin - window :]
            tail = drawn

    def needed(self, length: int, context: Context | None = None) -> int:
        """Network evaluations in which one document of ``length`` symbols is drawn, chunk after chunk."""
        device, total = next(self.law.parameters()).device, 0
        for window, begin, end in self.chunks(length, self._known(context, length)):
            mask = _mask(begin - window, end - begin)
            known = Known(torch.zeros(1, end - window, dtype=torch.int64, device=device), mask)
            total += self.law.needed(end - window, Context(known=known))
        return total

    def _known(self, context: Context | None, n: int) -> int:
        """How many symbols at the beginning are known."""
        if lengths_in(context) is not None:
            raise InputError(
                "documents of a batch have one length; score or draw those of another by themselves"
            )
        known = known_in(context)
        if known is None:
            return 0
        before = int(known.mask.sum())
        if not bool(known.mask[:before].all()):
            raise InputError("of a document, known symbols stand at the beginning")
        if before >= n:
            raise InputError(f"{before} symbols are known of {n}: there is nothing left to score or to draw")
        return before


def _mask(before: int, hidden: int) -> Tensor:
    """The mask of entries of which the first are known."""
    return torch.arange(before + hidden) < before
