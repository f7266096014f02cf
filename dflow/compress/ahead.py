"""A text chunk after chunk, several symbols a network call: drafted with the bits of the file, and verified.

Every call is of one width: it gives the laws of so many entries, and these have the same bits wherever the
call begins and whatever stands behind an entry (`dflow.core.AheadNet`). So the encoder, which knows the text,
needs a call for as many symbols. The decoder has a drafter propose symbols, which draws them by the very bits
that decide them under the law (`dflow.coding.lanes`); one call gives the laws of all of them, and they come
off the stacks as long as they agree. What is drafted decides how many calls it takes, and never what is
decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.coding.codes import RowsCode
from dflow.coding.container import Damaged
from dflow.coding.lanes import Lanes, interleave
from dflow.coding.tables import PRECISION, logit_counts
from dflow.compress.text_coder import TextCoder, TextPlan
from dflow.compress.walker import Walker
from dflow.config import InputError
from dflow.distributions.drafted import AheadLaw, Drafter, OpenDraws, check_draft
from dflow.distributions.drafting import Pace, Tally

Array = NDArray[Any]


#: Entries of a network call, and stacks, which take some 40 bits each. Wider calls were no faster on a CPU.
WIDTH = 8


@dataclass(frozen=True)
class Drafts:
    """What proposes symbols to a decoder, and what it saves.

    Attributes:
        drafter: what proposes symbols; None for nothing, which takes a call a symbol.
        tally: the network calls, and how many proposals were right.
    """

    drafter: Drafter | None = None
    tally: Tally = field(default_factory=Tally)

    @property
    def calls(self) -> int:
        """Network calls so far, but for those that read the text before a chunk."""
        return sum(self.tally.calls.values())


def check(coder: TextCoder) -> None:
    """InputError for a model that is not decoded faster by drafts."""
    if not hasattr(AheadLaw(coder.law, coder.where).net.start(1), "even"):
        raise InputError(
            f"{coder.where}: its network computes several symbols one after another, so that drafts save no "
            "time; leave the draft out, or use a model of family transformer"
        )


class _Calls:
    """The laws of the entries of chunks, in calls of one width."""

    def __init__(self, coder: TextCoder, plan: TextPlan) -> None:
        if plan.context != coder.context:
            raise Damaged(f"declares a context of {plan.context} symbols, of a model of {coder.context}")
        self._law = AheadLaw(coder.law, coder.where)
        # Of all chunks: what the sums of a call run over has to be the same in both directions.
        self._reach = plan.context + coder.length + plan.ahead

    def start(self, tail: Tensor) -> None:
        """Begin a chunk behind the known symbols ``(1, n)``."""
        self._state = self._law.start(tail, self._reach)
        self._state.even = True

    def counts(self, before: Tensor, begin: int) -> Tensor:
        """Counts int32 ``(width, K)`` of the entries from ``begin`` on, given the symbol before each."""
        logits: Tensor = self._law.net.ahead(before, [begin], self._state)
        return logit_counts(logits[0])


def push(coder: TextCoder, plan: TextPlan, x: Tensor, lengths: Tensor, bar: Any) -> bytes:
    """Chunks ``(n, length)`` of a text on as many stacks as a call has entries."""
    calls, starts, sizes = _Calls(coder, plan), list[Tensor](), list[Tensor]()
    with closing(Walker(coder, plan)) as walker, torch.no_grad():
        for chunk, length in zip(x, lengths.tolist(), strict=True):
            draws = _OpenText(walker.tail, length, plan.ahead, coder.tokenizer.size)
            first, end = draws.known, draws.known + length
            draws.symbols[0, first:end] = chunk[:length]
            calls.start(walker.tail)
            for begin in range(first, end, plan.ahead):
                counts = calls.counts(draws.before([begin], plan.ahead), begin)
                symbols = draws.symbols[0, begin : min(begin + plan.ahead, end)]
                start, size = RowsCode(counts[: len(symbols)]).intervals(symbols)
                starts.append(start)
                sizes.append(size)
            walker.advance(chunk[None, :length])
            bar.update()
    return interleave(torch.cat(starts).tolist(), torch.cat(sizes).tolist(), plan.ahead)


def pop(
    data: bytes,
    coder: TextCoder,
    plan: TextPlan,
    lengths: Tensor,
    drafts: Drafts,
    bar: Any,
) -> Iterator[Array]:
    """The symbols of each chunk that `push` pushed.

    Raises:
        ValueError: bytes or a plan that `push` has not made.
        InputError: the drafter proposes what is no draft.
    """
    calls, stacks = _Calls(coder, plan), Lanes(data, plan.ahead)
    drafter, tally, pace = drafts.drafter, drafts.tally, None
    with closing(Walker(coder, plan)) as walker, torch.no_grad():
        for length in lengths.tolist():
            draws = _OpenText(walker.tail, length, plan.ahead, coder.tokenizer.size, stacks)
            end = draws.known + length
            calls.start(walker.tail)
            draft = None if drafter is None else drafter.start(draws)
            pace = pace or Pace.of(draft)
            while (begin := draws.begins[0]) < end:
                d = min(pace(), plan.ahead - 1, end - begin - 1)
                if draft is not None and d:
                    proposed = draft(d)
                    check_draft(proposed, (1, d), draws.K)
                    draws.symbols[:, begin : begin + d] = proposed
                taken = _agreed(calls.counts(draws.before([begin], plan.ahead), begin), draws, d, stacks)
                pace.learn(min(taken - 1, d), min(taken, d))
                draws.begins[0] += taken
                tally.add([0])
                tally.drafted, tally.accepted = tally.drafted + d, tally.accepted + taken - 1
            walker.advance(draws.symbols[:, draws.known : end].clone())
            yield draws.symbols[0, draws.known : end].numpy()
            bar.update()
    stacks.finish()


def _agreed(counts: Tensor, draws: _OpenText, drafted: int, stacks: Lanes) -> int:
    """Pop symbols into the draws, in place of the drafted ones, up to the first that differs; how many."""
    ends, begin = counts.cumsum(1), draws.begins[0]
    guesses = draws.symbols[0, begin : begin + drafted].tolist()
    for i, row in enumerate(ends[: drafted + 1]):
        symbol = stacks.pop(row.tolist())
        if i == drafted or symbol != guesses[i]:
            draws.symbols[0, begin + i] = symbol
            break
    return i + 1


class _OpenText(OpenDraws):
    """A chunk that is being decoded, as a drafter reads it: its noise is the bits that come next."""

    def __init__(self, tail: Tensor, length: int, width: int, K: int, stacks: Lanes | None = None) -> None:
        known = tail.shape[1]
        symbols = torch.cat([tail, tail.new_zeros(1, length + width)], 1)
        super().__init__(symbols, [known], known, torch.zeros(1, 0, K), None)
        self._stacks = stacks

    def draw(self, logits: Tensor, begins: Any) -> Tensor:
        """See `OpenDraws`."""
        lines = [[self.draw_one(law, 0, begins[0] + i) for i, law in enumerate(logits[0])]]
        return torch.tensor(lines)

    def noise_of(self, row: int, begin: int, w: int) -> None:
        """See `OpenDraws`: the stacks decide."""

    def draw_one(self, logits: Tensor, row: int, place: int) -> int:
        """The symbol of the law at the number that decides the one of the entry at ``place``."""
        assert self._stacks is not None
        log_p = logits.numpy()
        ends = np.exp(log_p - log_p.max()).cumsum()
        share = self._stacks.noise(place - self.begins[row]) / (1 << PRECISION)
        return min(int(ends.searchsorted(share * ends[-1], side="right")), len(ends) - 1)
