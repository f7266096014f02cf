"""Laws from left to right, drawn several symbols a call: drafted cheaply, verified with the same noise.

Every symbol of a draw is the arg-max of the law's log-probabilities plus Gumbel noise that belongs to its
place (`dflow.ops.noise`). Something cheaper that adds the *same* noise to log-probabilities of its own mostly
finds the same symbol. So it drafts some symbols ahead, and one call of the network gives the law at all of
them and at the next one: those up to the first that differs are right, and so is the law's own symbol there.
The draw is that of the plain loop, symbol by symbol, whatever was drafted.

Source: drafting and verifying is that of Stern et al. 2018 (arXiv 1811.03115) and Leviathan et al. 2022
(arXiv 2211.17192). With shared noise in place of rejection it is the predictive sampling of Wiggers and
Hoogeboom 2020 (arXiv 2002.09928).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dflow.config import InputError
from dflow.core import Context, Distribution, known_in, lengths_in, noise_in, present
from dflow.distributions.sequence import SequenceCategorical
from dflow.ops.devices import widen
from dflow.ops.memo import Memo
from dflow.ops.noise import Controls

#: Most symbols that are drafted at a time.
LONGEST_DRAFT = 32
#: Entries of a call: sequences that end before others of their batch are verified so far beyond their end.
_BEYOND = LONGEST_DRAFT + 1
#: Noise of so many numbers is in memory at a time; more samples are drawn one part after another.
_NOISE_BLOCK = 1 << 23
#: Most sequences for which symbols are drafted one by one, without tensors of all.
_FEW = 4


@dataclass
class OpenDraws:
    """Sequences that are being drawn, as a drafter reads them.

    Attributes:
        symbols: int64 ``(n, columns)``; what stands at or beyond the begin of a sequence is not drawn yet.
        begins: how many symbols of each sequence are drawn or known.
        known: how many of them were known at the start, of all sequences.
        gumbel: noise of the entries from ``known`` on, float64 ``(n, columns - known, K)``.
        controls: changes of the law, or None.
    """

    symbols: Tensor
    begins: list[int]
    known: int
    gumbel: Tensor
    controls: Controls | None
    #: The noise of single entries, made when it is first needed.
    _noise: list[tuple[Tensor, ...]] | None = field(default=None, init=False)

    @property
    def K(self) -> int:
        """Size of the alphabet."""
        return self.gumbel.shape[2]

    @property
    def prefix(self) -> Tensor:
        """The symbols that were known at the start, (n, known)."""
        return self.symbols[:, : self.known]

    def before(self, begins: Sequence[int], width: int) -> Tensor:
        """The symbol before each of ``width`` entries from ``begins`` on, (n, width); K before the first."""
        first = begins[0]
        if all(begin == first for begin in begins):
            if first:
                return self.symbols[:, first - 1 : first - 1 + width]
            blank = self.symbols.new_full((len(begins), 1), self.K)
            return torch.cat([blank, self.symbols[:, : width - 1]], 1)
        places = self._places(begins, width) - 1
        return self.symbols.gather(1, places.clamp(min=0)).masked_fill(places < 0, self.K)

    def draw(self, logits: Tensor, begins: Sequence[int]) -> Tensor:
        """Symbols (n, width) of laws with ``logits`` (n, width, K), of the entries from ``begins`` on."""
        first, width = begins[0] - self.known, logits.shape[1]
        if all(begin == begins[0] for begin in begins):
            noise = self.gumbel[:, first : first + width]
        else:
            rows = torch.arange(len(begins), device=logits.device)[:, None]
            noise = self.gumbel[rows, self._places(begins, width) - self.known]
        return (self._controlled(widen(logits)) + noise).argmax(-1)

    def draw_one(self, logits: Tensor, row: int, place: int) -> int:
        """The symbol of one law with ``logits`` (K,), of the entry at ``place`` of a sequence."""
        if self._noise is None:
            self._noise = [noise.unbind(0) for noise in self.gumbel]
        return int((self._controlled(logits) + self._noise[row][place - self.known]).argmax())

    def noise_of(self, row: int, begin: int, w: int) -> Tensor | None:
        """The noise of w entries of a sequence, (w, K), where it alone decides what is drawn, else None."""
        first = begin - self.known
        return self.gumbel[row, first : first + w] if self.controls is None else None

    def _controlled(self, logits: Tensor) -> Tensor:
        return logits if self.controls is None else self.controls(logits)

    def _places(self, begins: Sequence[int], width: int) -> Tensor:
        first = torch.tensor(begins, device=self.symbols.device)
        return first[:, None] + torch.arange(width, device=self.symbols.device)


class Drafter(Protocol):
    """Proposes symbols ahead. What it proposes decides how fast a law is drawn, and never what is drawn."""

    def start(self, draws: OpenDraws) -> Callable[[int], Tensor]:
        """Begin to draft for some sequences.

        Returns:
            What proposes, for a number w, the next w symbols of each sequence, int64 ``(n, w)`` in 0..K-1. It
            reads ``draws``, which goes on between its calls, and does best to draw by their `draw`. It may
            have an attribute ``cost``: what a symbol takes, in network calls of the law.
        """
        ...


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
        return cls(0 if draft is None else None, getattr(draft, "cost", _LOOK_UP))

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


def _pays_off(ahead_cost: float, batch: int) -> bool:
    """Whether drafts that are always right would save more than a tenth of the time of the plain loop."""
    return 1.1 * (_SEVERAL + ahead_cost * math.sqrt(batch) * LONGEST_DRAFT) < LONGEST_DRAFT + 1


#: What a call over several entries takes, in calls over one, without what each entry adds.
_SEVERAL = 1.4
#: The share of right symbols that is assumed at first, with the weight of so many symbols.
_PRIOR, _TRIED = 0.8, 4.0
#: How fast what was seen is forgotten, a call: more slowly where nothing is drafted, until it is tried again.
_DECAY, _DECAY_UNUSED = 0.9, 0.97
#: What drafting a symbol takes, in calls: by look-ups, and by a network.
_LOOK_UP, _NETWORK = 0.08, 0.4


class AheadLaw:
    """A law from left to right whose network reads several entries a call.

    Args:
        law: a `SequenceCategorical` whose network is a `dflow.core.AheadNet`.
        name: what to call it in messages.

    Raises:
        InputError: another law.
    """

    def __init__(self, law: Distribution, name: str) -> None:
        if not isinstance(law, SequenceCategorical) or not _from_left_to_right(law):
            raise InputError(
                f"{name} is not drawn from left to right, one symbol a call, with a network that reads "
                "several at a time; use one of family transformer, lstm or ngram"
            )
        self.law, self.net = law, law.net
        self._plan: Memo[Any] = Memo()
        self._reach = 0

    def start(self, known: Tensor, reach: int) -> Any:
        """The state of the network for entries before ``reach``, which has read the known (n, entries)."""
        n = len(known)
        extra: tuple[Any, ...] = ()
        if hasattr(self.net, "plan"):
            self._reach = max(self._reach, reach)
            key = (self._reach, next(self.net.parameters()).dtype)
            line = torch.arange(self._reach, device=known.device)[:, None]
            extra = (self._plan(lambda: self.net.plan(line, None, len(line)), key=(key, known.device)),)
        state = self.net.start(n, None, *extra)
        if known.shape[1]:
            once = n > 1 and bool((known == known[:1]).all())
            self.net.read(known[:1] if once else known, state)
        return state


def _from_left_to_right(law: SequenceCategorical) -> bool:
    line = torch.arange(law.dim, device=law.order.device)[:, None]
    return law.block == 1 and hasattr(law.net, "ahead") and torch.equal(law.order, line)


class LawDrafter:
    """Drafts by another law over the same symbols, drawn from left to right.

    Args:
        law: a `SequenceCategorical` whose network is a `dflow.core.AheadNet`.

    Raises:
        InputError: another law.
    """

    def __init__(self, law: Distribution) -> None:
        self._reader = AheadLaw(law, "the model that drafts")

    def start(self, draws: OpenDraws) -> Callable[[int], Tensor]:
        """See `Drafter`."""
        net = self._reader.net
        if hasattr(net, "single") and len(draws.begins) <= _FEW and draws.symbols.device.type == "cpu":
            return _OneByOne(net, draws)
        return _Following(self._reader, draws)


class _OneByOne:
    """Drafts by a network that gives single entries in little time, from the symbols before them."""

    def __init__(self, net: Any, draws: OpenDraws) -> None:
        self._net, self._draws = net, draws
        self.cost = getattr(net, "single_cost", _LOOK_UP)

    def __call__(self, w: int) -> Tensor:
        draws, single = self._draws, self._net.single
        drafts: list[list[int]] = []
        for row, begin in enumerate(draws.begins):
            line: list[int] = draws.symbols[row, :begin].tolist()
            noise = draws.noise_of(row, begin, w)
            if noise is not None:
                drafts.append(self._net.draft(line, noise))
                continue
            for place in range(begin, begin + w):
                line.append(draws.draw_one(single(line), row, place))
            drafts.append(line[begin:])
        return torch.tensor(drafts)


class _Following:
    """Drafts by a network with a state, which first reads what was drawn since the last draft."""

    def __init__(self, reader: AheadLaw, draws: OpenDraws) -> None:
        self._net, self._draws = reader.net, draws
        self._state = reader.start(draws.prefix, draws.symbols.shape[1])
        self.cost = _LOOK_UP if hasattr(reader.net, "single") else _NETWORK
        #: The first entry of each sequence that the network has not given yet.
        self._reached = list(draws.begins)

    def __call__(self, w: int) -> Tensor:
        draws = self._draws
        drafts: list[Tensor] = []
        logits = self._catch_up()
        for j in range(w):
            begins = [begin + j for begin in draws.begins]
            if j:
                logits = self._net.ahead(drafts[-1], begins, self._state)
            drafts.append(draws.draw(logits, begins))
        self._reached = [begin + w for begin in draws.begins]
        return torch.cat(drafts, 1)

    def _catch_up(self) -> Tensor:
        """Logits (n, 1, K) of the next entry of each sequence."""
        draws, targets = self._draws, self._draws.begins
        while True:
            begins = [min(pair) for pair in zip(self._reached, targets, strict=True)]
            behind = [target - begin for target, begin in zip(targets, begins, strict=True)]
            width = min(LONGEST_DRAFT, max(behind) + 1)
            logits: Tensor = self._net.ahead(draws.before(begins, width), begins, self._state)
            if max(behind) < width:
                return logits[torch.arange(len(begins)), behind][:, None]
            self._reached = [begin + width for begin in begins]


class Drafted(Distribution):
    """A law drawn in fewer network calls: the same draws by the same noise, see the module.

    It scores and draws as the law itself, with which it shares everything. Batches are drawn together, each
    sequence at its own pace. In half precision and float32 a symbol can differ from that of the plain loop
    where two are as good as tied, since a network rounds differently when it reads several entries.

    Args:
        law: a `SequenceCategorical` from left to right whose network is a `dflow.core.AheadNet`.
        drafter: what proposes symbols.
        width: how many symbols are drafted for a call, 0 to 32; None for as many as pay off, by how many
            were right of late. Where none can pay off, as for an LSTM, the plain loop draws.

    Attributes:
        tally: calls of the samples drawn since it was cleared.

    Raises:
        InputError: a law that is drawn in another way, or a width out of its range.
    """

    def __init__(self, law: Distribution, drafter: Drafter, width: int | None = None) -> None:
        super().__init__()
        if width is not None and not 0 <= width <= LONGEST_DRAFT:
            raise InputError(f"width {width} must be from 0 to {LONGEST_DRAFT}")
        self._reader = AheadLaw(law, "this model")
        self.law: SequenceCategorical = self._reader.law
        self.drafter, self.width, self.tally = drafter, width, Tally()

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

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Context | None = None,
        generator: torch.Generator | None = None,
        prompt: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """The draws of the law, int64 ``(n, dim)``; arguments as of `SequenceCategorical.sample`.

        Raises:
            InputError: the drafter proposes what is no draft; and the errors of the law.
        """
        known, device = known_in(context), self.law.order.device
        dim = self.law.dim if known is None else len(known.mask)
        if known is not None:
            # Refuses what is not known from the beginning on.
            self.law.among(known.mask)
            prefix = known.symbols[:, : int(known.mask.sum())]
        else:
            prefix = torch.zeros(1, 0, dtype=torch.int64, device=device) if prompt is None else prompt[None]
        noise = noise_in(context, n, generator, device)
        lengths = lengths_in(context, n)
        longest = dim if length is None else min(length, dim)
        ends = [longest] * n if lengths is None else lengths.clamp(max=longest).tolist()
        before, last, K = prefix.shape[1], max(ends, default=0), self.law.net.K
        if self.width is None and not _pays_off(self.law.net.ahead_cost, n):
            self.tally.add(noise.samples.tolist(), self.law.needed(last, context))
            context = replace(Context() if context is None else context, noise=noise)
            return self.law.sample(n, context, None, prompt, length)
        x = torch.zeros(n, dim, dtype=torch.int64, device=device)
        x[:, :before] = prefix[:, :dim]
        together = max(1, _NOISE_BLOCK // (K * max(1, last - before + _BEYOND)))
        for start in range(0, n if last > before else 0, together):
            rows = slice(start, min(n, start + together))
            part, numbers = noise.rows(rows.start, rows.stop), torch.arange(rows.stop - start, device=device)
            places = torch.arange(before, last, device=device)
            gumbel = part.gumbel(numbers[:, None], places, K)
            gumbel = torch.nn.functional.pad(gumbel, (0, 0, 0, _BEYOND))
            symbols = torch.nn.functional.pad(x[rows, :last], (0, _BEYOND))
            draws = OpenDraws(symbols, [before] * len(symbols), before, gumbel, noise.controls)
            self._draw(draws, ends[rows], part.samples.tolist())
            x[rows, before:last] = draws.symbols[:, before:last]
        mask = present(context, n, dim, takes_known=True)
        return x if mask is None else torch.where(mask, x, 0)

    def _draw(self, draws: OpenDraws, ends: list[int], samples: list[int]) -> None:
        """Draw all sequences up to their ends."""
        net, draft = self.law.net, self.drafter.start(draws)
        state = self._reader.start(draws.prefix, draws.symbols.shape[1])
        begins = draws.begins
        verifying, drafting = net.ahead_cost * math.sqrt(len(begins)), getattr(draft, "cost", _LOOK_UP)
        pace = Pace(self.width, verifying + drafting)
        if draws.known:
            # One call has read what is known.
            self.tally.add(samples)
        while (left := max(end - begin for begin, end in zip(begins, ends, strict=True))) > 0:
            d = min(pace(), left - 1)
            x = draws.before(begins, 1)
            drafted: list[list[int]] = [[]] * len(begins)
            if d:
                proposed = draft(d)
                check_draft(proposed, (len(begins), d), draws.K)
                x, drafted = torch.cat([x, proposed], 1), proposed.tolist()
            drawn = draws.draw(net.ahead(x, begins, state), begins)
            right = tried = 0
            for row, (line, guess) in enumerate(zip(drawn.tolist(), drafted, strict=True)):
                begin, rest = begins[row], ends[row] - begins[row]
                if rest <= 0:
                    continue
                agreed = next((j for j in range(d) if line[j] != guess[j]), d)
                right, tried = right + agreed, tried + min(agreed + 1, d)
                taken = min(agreed + 1, rest)
                draws.symbols[row, begin : begin + taken] = drawn[row, :taken]
                begins[row] = begin + taken
                self.tally.add(samples[row : row + 1])
                self.tally.accepted += min(agreed, rest)
                self.tally.drafted += min(d, rest)
                if self.tally.log is not None:
                    call = VerifiedCall(samples[row], begin, guess[:rest], min(agreed, rest), line[:taken])
                    self.tally.log.append(call)
            pace.learn(right, tried)


def check_draft(proposed: Tensor, shape: tuple[int, int], K: int) -> None:
    """InputError unless a drafter has proposed symbols of an alphabet, in a tensor of ``shape``."""
    if proposed.dtype != torch.int64 or tuple(proposed.shape) != shape:
        raise InputError(
            f"a draft is symbols int64 {shape}, found {proposed.dtype} {tuple(proposed.shape)}; see "
            "dflow.distributions.drafted.Drafter"
        )
    low, high = (int(value) for value in proposed.aminmax())
    if low < 0 or high >= K:
        raise InputError(
            f"the drafter proposes symbol {low if low < 0 else high}, outside of 0 to {K - 1}; drafter and "
            "model need one vocabulary"
        )
