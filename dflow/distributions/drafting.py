"""What drafting keeps: how many symbols to draft, what calls it took, and the law that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from dflow.config import InputError
from dflow.core import Context, Distribution, known_in, lengths_in
from dflow.distributions.sequence import SequenceCategorical
from dflow.ops.noise import Noise

#: Most symbols that are drafted at a time.
LONGEST_DRAFT = 32


@dataclass(frozen=True)
class VerifiedCall:
    """A network call that verified drafts of one sample.

    Attributes:
        sample: its number.
        begin: the first entry of the call.
        drafted: symbols that were proposed for it and the next ones.
        accepted: how many of these were right, up to the first that was not.
        drawn: the symbols that the call settled: those accepted, and where there is room for it the law's own
            symbol behind them.
    """

    sample: int
    begin: int
    drafted: list[int]
    accepted: int
    drawn: list[int]


@dataclass
class Tally:
    """What draws took.

    Attributes:
        calls: network calls for each sample, by its number.
        drafted: symbols that were drafted.
        accepted: those of them that were right, with all before them in the draft.
        log: the calls one by one, in a list that is put here before a draw; None notes none.
    """

    calls: dict[int, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    log: list[VerifiedCall] | None = None

    def add(self, samples: Sequence[int], calls: int = 1) -> None:
        """Count calls for some samples."""
        for sample in samples:
            self.calls[sample] = self.calls.get(sample, 0) + calls

    def clear(self) -> None:
        """Forget all."""
        self.calls.clear()
        self.drafted = self.accepted = 0
        if self.log is not None:
            self.log.clear()


class Pace:
    r"""How many symbols to draft: as many as pay off by how many were right of late.

    If each is right with probability a, a call with d drafts gives :math:`1 + a + \dots + a^d` symbols. It
    takes as long as 1.4 + c d calls without drafts, with c the cost of verifying a symbol and of drafting it.
    That of verifying was measured to grow with the root of the number of sequences: one sequence leaves most
    of a processor idle, many do not.
    """

    def __init__(self, fixed: int | None, cost: float) -> None:
        self._fixed, self._cost = fixed, cost
        self._right, self._tried = 0.0, 0.0

    @classmethod
    def of(cls, draft: Callable[[int], Tensor] | None) -> Pace:
        """The pace where verifying takes the same for any number of drafts; None drafts nothing."""
        return cls(0 if draft is None else None, getattr(draft, "cost", LOOK_UP))

    def __call__(self) -> int:
        """The number."""
        if self._fixed is not None:
            return self._fixed
        a = (self._right + _PRIOR * _TRIED) / (self._tried + _TRIED)
        symbols, power, best, number = 1.0, 1.0, 1.0, 0
        for d in range(1, LONGEST_DRAFT + 1):
            power *= a
            symbols += power
            rate = symbols / (_SEVERAL + self._cost * d)
            if rate > best:
                best, number = rate, d
        return number

    def learn(self, right: int, tried: int) -> None:
        """Take in how many drafted symbols were tried before the first wrong one, and were right."""
        decay = _DECAY if tried else _DECAY_UNUSED
        self._right, self._tried = decay * self._right + right, decay * self._tried + tried


def pays_off(ahead_cost: float, batch: int) -> bool:
    """Whether drafts that are always right would save more than a tenth of the time of the plain loop."""
    return 1.1 * (_SEVERAL + ahead_cost * math.sqrt(batch) * LONGEST_DRAFT) < LONGEST_DRAFT + 1


#: What a call over several entries takes, in calls over one, without what each entry adds.
_SEVERAL = 1.4
#: The share of right symbols that is assumed at first, with the weight of so many symbols.
_PRIOR, _TRIED = 0.8, 4.0
#: How fast what was seen is forgotten, a call: more slowly where nothing is drafted, until it is tried again.
_DECAY, _DECAY_UNUSED = 0.9, 0.97
#: What drafting a symbol takes, in calls: by look-ups, and by a network.
LOOK_UP, NETWORK = 0.08, 0.4


class SameLaw(Distribution):
    """A law that is drawn in another way than the one whose network it shares; all else is that law's.

    Attributes:
        law: the other one.
        tally: calls of the samples drawn since it was cleared.
        width: how many symbols or groups are drafted for a call, or None for as many as pay off.
    """

    law: SequenceCategorical
    tally: Tally
    width: int | None

    def _check_width(self) -> None:
        if self.width is not None and not 0 <= self.width <= LONGEST_DRAFT:
            raise InputError(f"width {self.width} must be from 0 to {LONGEST_DRAFT}")

    def _plain(
        self, n: int, context: Context | None, noise: Noise, prompt: Tensor | None, length: int | None
    ) -> Tensor:
        """The draws of the plain loop, with the calls that they take."""
        longest = self.law.dim if (known := known_in(context)) is None else len(known.mask)
        length = longest if length is None else min(length, longest)
        lengths = lengths_in(context, n)
        last = length if lengths is None else min(length, max(lengths.tolist(), default=0))
        self.tally.add(noise.samples.tolist(), self.law.needed(last, context))
        context = replace(Context() if context is None else context, noise=noise)
        return self.law.sample(n, context, None, prompt, length)

    @property
    def by_entry(self) -> bool:  # type: ignore[override]
        """Whether the law has terms by entry."""
        return self.law.by_entry

    @property
    def num_calls(self) -> int:
        """Calls of a sample at most: those of the law."""
        return self.law.num_calls

    def needed(self, length: int, context: Context | None = None) -> int:
        """Calls after which the first ``length`` entries are drawn, at most."""
        return self.law.needed(length, context)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """That of the law."""
        return self.law.log_prob(x, context)

    def log_prob_each(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Those of the law."""
        return self.law.log_prob_each(x, context)

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """That of the law."""
        return self.law.round_trip(x, context)
