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
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dflow.config import InputError
from dflow.core import Context, Distribution, known_in, lengths_in, noise_in, present
from dflow.distributions.drafting import (
    LONGEST_DRAFT,
    LOOK_UP,
    NETWORK,
    Pace,
    SameLaw,
    Tally,
    VerifiedCall,
    pays_off,
)
from dflow.distributions.sequence import SequenceCategorical
from dflow.ops.devices import widen
from dflow.ops.memo import Memo
from dflow.ops.noise import Controls

#: Entries of a call: sequences that end before others of their batch are verified so far beyond their end.
_BEYOND = LONGEST_DRAFT + 1
#: Noise of so many numbers is in memory at a time; more samples are drawn one part after another.
_NOISE_BLOCK = 1 << 23
#: Most sequences for which symbols are drafted one by one, without tensors of all.
FEW = 4


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

    def draw_at(self, logits: Tensor, places: Tensor) -> Tensor:
        """Symbols (n, w) of laws with ``logits`` (n, w, K), of the entries at some places, (w,)."""
        return (self._controlled(widen(logits)) + self.gumbel[:, places - self.known]).argmax(-1)

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


#: Proposes w symbols of a sequence: its number, the symbols right before them, the first place, and w.
Run = Callable[[int, list[int], int, int], list[int]]


class RunDrafter(Protocol):
    """Proposes runs of symbols anywhere in a sequence, for laws that are drawn in groups."""

    @property
    def runs(self) -> Callable[[OpenDraws], Run] | None:
        """Begin to draft for some sequences; None where the drafter cannot."""
        ...


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
        if hasattr(net, "single") and len(draws.begins) <= FEW and draws.symbols.device.type == "cpu":
            return _OneByOne(net, draws)
        return _Following(self._reader, draws)

    @property
    def runs(self) -> Callable[[OpenDraws], Run] | None:
        """See `RunDrafter`; None where the network of the law does not give single entries."""
        net = self._reader.net
        return (lambda draws: _OneByOne(net, draws).run) if hasattr(net, "single") else None


class _OneByOne:
    """Drafts by a network that gives single entries in little time, from the symbols before them."""

    def __init__(self, net: Any, draws: OpenDraws) -> None:
        self._net, self._draws = net, draws
        self.cost = getattr(net, "single_cost", LOOK_UP)

    def __call__(self, w: int) -> Tensor:
        draws = self._draws
        lines = [draws.symbols[row, :begin].tolist() for row, begin in enumerate(draws.begins)]
        return torch.tensor([self.run(row, line, len(line), w) for row, line in enumerate(lines)])

    def run(self, row: int, before: list[int], begin: int, w: int) -> list[int]:
        """Symbols of w entries of a sequence from ``begin`` on, from those right before them."""
        noise = self._draws.noise_of(row, begin, w)
        if noise is not None:
            symbols: list[int] = self._net.draft(before, noise)
            return symbols
        line = list(before)
        for place in range(begin, begin + w):
            line.append(self._draws.draw_one(self._net.single(line), row, place))
        return line[len(before) :]


class _Following:
    """Drafts by a network with a state, which first reads what was drawn since the last draft."""

    def __init__(self, reader: AheadLaw, draws: OpenDraws) -> None:
        self._net, self._draws = reader.net, draws
        self._state = reader.start(draws.prefix, draws.symbols.shape[1])
        self.cost = LOOK_UP if hasattr(reader.net, "single") else NETWORK
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


class Drafted(SameLaw):
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
        self.drafter, self.width, self.tally = drafter, width, Tally()
        self._check_width()
        self._reader = AheadLaw(law, "this model")
        self.law: SequenceCategorical = self._reader.law

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
        if self.width is None and not pays_off(self.law.net.ahead_cost, n):
            return self._plain(n, context, noise, prompt, length)
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
        verifying, drafting = net.ahead_cost * math.sqrt(len(begins)), getattr(draft, "cost", LOOK_UP)
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
