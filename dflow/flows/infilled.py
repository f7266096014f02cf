"""A law of the hidden entries of a sequence becomes one of sequences of which any entries may be known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dflow.config import InputError
from dflow.core import Around, Context, Distribution, Known, known_in, lengths_in
from dflow.ops.memo import Memo


class Infilled(Distribution):
    r"""``log p(hidden | known) = log law(hidden; known)``, for any pattern of known entries.

    The law inside is one of the hidden entries alone, in the order in which they stand: of any number of them
    up to ``length``, some of those that it is built for. Its context says what stands around them
    (`dflow.core.Around`), and its nets read it. Whatever they do with it, the law is normalised over the
    hidden entries.

    Args:
        law: of ``length`` hidden entries, or a few more.
        length: most hidden entries; of a sequence of which nothing is known, the number that are drawn.
        first: from the number of hidden entries to the index of the first, among those of the law; default 0.

    Raises:
        InputError: more hidden entries, no hidden ones, or lengths together with known entries.
    """

    def __init__(self, law: Distribution, length: int, first: Callable[[int], int] | None = None) -> None:
        super().__init__()
        self.law, self.length, self.first = law, length, first
        #: The mask of before, as long as it is the same: the layers inside then need not compare it too.
        self._mask: Memo[Tensor] = Memo()

    def within(self, context: Context | None, n: int | None = None) -> Context:
        """The context of the law inside, for a sequence of n entries, known and hidden.

        None for as many as are drawn: those of the mask of known entries, or `length`.
        """
        lengths, known = lengths_in(context), known_in(context)
        nothing = torch.zeros(self.length if n is None else n, dtype=torch.bool)
        mask = nothing if known is None else known.mask
        if n not in (None, len(mask)):
            raise InputError(f"known entries of a sequence of {len(mask)} entries, for one of {n}")
        if not torch.compiler.is_compiling():
            mask = self._mask(mask.clone, mask)
        places = (~mask).nonzero().flatten()
        if not len(places):
            raise InputError("every entry is known, so that there is nothing to score or to draw")
        if len(places) > self.length:
            raise InputError(f"{len(places)} hidden entries, and this law takes at most {self.length}")
        if lengths is not None and len(places) < len(mask):
            raise InputError("this law takes known entries in sequences of one length; leave the lengths out")
        symbols = None if known is None or len(places) == len(mask) else known.symbols
        first = 0 if self.first is None else self.first(len(places))
        around, context = Around(mask, symbols, first, len(places), first), context or Context()
        noise = context.noise and context.noise.select(places.to(context.noise.samples.device))
        return replace(context, known=None, noise=noise, around=around)

    def hidden(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Context]:
        """The hidden entries of ``x``, in either mode, and their context."""
        within, known = self.within(context, x.shape[1]), known_in(context)
        return x if known is None else x.index_select(1, _hidden(known, x.device)), within

    def whole(self, hidden: Tensor, context: Context | None = None) -> Tensor:
        """The whole sequences: the inverse of `hidden`, for symbols."""
        known = known_in(context)
        if known is None:
            return hidden
        return known.symbols.index_copy(1, _hidden(known, hidden.device), hidden)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact nats ``(batch,)`` of the hidden entries given the known ones, which ``x`` holds too."""
        return self.law.log_prob(*self.hidden(x, context))

    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws, int64 ``(n, length)``, or as long as the mask of known entries."""
        return self.whole(self.law.sample(n, self.within(context), generator), context)

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """That of the law inside."""
        return self.law.round_trip(*self.hidden(x, context))

    @property
    def num_calls(self) -> int:
        """The calls of the law inside."""
        return self.law.num_calls


def _hidden(known: Known, device: torch.device) -> Tensor:
    """The places of the entries that are not known, int64."""
    return (~known.mask).nonzero().flatten().to(device)
