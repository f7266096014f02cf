"""Laws drawn in groups, several groups a call: drafted cheaply, verified with the same noise.

A group is what one network call draws: an entry of each lane, or a block of them. The symbols of the next
groups are drafted from those before them in their lanes, and one call gives the laws of all of these entries.
Up to the first row of the order in which a symbol differs the draws are right, as in
`dflow.distributions.drafted`; the rest of that group follows by the small part of the network. The more
lanes, the more symbols have to be right at once, so that this pays for few lanes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dflow.config import InputError
from dflow.core import Context, Distribution, known_in, lengths_in, noise_in, present
from dflow.distributions.drafted import FEW, Drafter, OpenDraws, Run, RunDrafter, check_draft
from dflow.distributions.drafting import Pace, SameLaw, Tally
from dflow.distributions.sequence import SequenceCategorical

#: What verifying and drafting one more group takes a lane, in calls that draw one group: measured on a CPU.
_GROUP = 0.05
#: Symbols before an entry that a draft reads, at most.
_BEFORE = 32


def is_drawn_in_groups(law: Distribution) -> bool:
    """Whether a law can be a `DraftedGroups`: one in groups of several entries, by one network."""
    return (
        isinstance(law, SequenceCategorical)
        and hasattr(law.net, "groups_ahead")
        and (law.block > 1 or law.order.shape[1] > 1)
    )


class DraftedGroups(SameLaw):
    """A law in groups, drawn in fewer network calls: the same draws by the same noise, see the module.

    Batches are drawn together, at the pace of the sequence whose drafts fit least. In half precision and
    float32 a symbol can differ from that of the plain loop where two are as good as tied, since a network
    rounds differently when it reads several groups.

    Args:
        law: a `SequenceCategorical` of which `is_drawn_in_groups` holds.
        drafter: what proposes symbols, see `RunDrafter`.
        width: how many groups a call verifies beyond the next one, 0 to 32; None for as many as pay off, by
            how many were right of late, and none in batches of more than four. On any device but the CPU the
            plain loop draws, since drafts are made on the CPU.

    Attributes:
        tally: calls of the samples drawn since it was cleared.

    Raises:
        InputError: a law that is drawn in another way, a drafter without runs, or a width out of its range.
    """

    def __init__(self, law: Distribution, drafter: Drafter | RunDrafter, width: int | None = None) -> None:
        super().__init__()
        self.width, self.tally = width, Tally()
        self._check_width()
        if not isinstance(law, SequenceCategorical) or not is_drawn_in_groups(law):
            raise InputError("this model is not drawn in groups by one network; use one of family grouped")
        if (runs := getattr(drafter, "runs", None)) is None:
            raise InputError(
                "a model drawn in groups is drafted for by counts or by a model of family ngram, not by one "
                "that reads the symbols one after another"
            )
        self.law, self._runs = law, runs

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
        device, known = self.law.order.device, known_in(context)
        noise = noise_in(context, n, generator, device)
        if not n or device.type != "cpu" or (self.width is None and n > FEW):
            return self._plain(n, context, noise, prompt, length)
        law = self.law if known is None else self.law.among(known.mask)
        law.training = self.law.training
        rows, state = law.start(n, context, length)
        law.read_known(known, state, context)
        gumbel = noise.gumbel(
            torch.arange(n, device=device)[:, None], torch.arange(law.dim, device=device), law.net.K
        )
        draws = OpenDraws(state.symbols, [0] * n, 0, gumbel, noise.controls)
        forced = None if prompt is None else prompt[: law.dim]
        lengths = lengths_in(context, n)
        walk = _GroupDraw(law, rows, state, draws, forced, None if lengths is None else lengths[:, None])
        if rows:
            walk.draw(
                self._runs(draws),
                Pace(self.width, _GROUP * law.order.shape[1]),
                self.tally,
                noise.samples.tolist(),
            )
        x = state.symbols[:, : law.dim]
        x = torch.where(x == law.net.K, 0, x)
        mask = present(context, n, law.dim, takes_known=True)
        return x if mask is None else torch.where(mask, x, 0)


class _GroupDraw:
    """One batch that is drawn along the rows of an order.

    Args:
        law: the law, of the entries that are not known.
        rows: the positions of each row.
        state: of the network, at the beginning; what is known stands in its symbols.
        draws: the same symbols, and their noise.
        forced: symbols that stand at the first positions whatever is drawn there, or None.
        lengths: (batch, 1), or None.
    """

    def __init__(
        self,
        law: SequenceCategorical,
        rows: Sequence[Tensor],
        state: Any,
        draws: OpenDraws,
        forced: Tensor | None,
        lengths: Tensor | None,
    ) -> None:
        self._net, self._rows, self._block, self._state = law.net, rows, law.block, state
        self._draws, self._forced, self._lengths = draws, forced, lengths
        #: The row that draws each position; the number of rows for one that is not drawn.
        self._row_of = torch.full((law.dim,), len(rows), device=law.order.device)
        for row, positions in enumerate(rows):
            self._row_of[positions] = row
        self._places = [sorted(positions.tolist()) for positions in rows]
        #: Whether a position is drawn or known.
        self._settled: list[bool] = (state.symbols[0, : law.dim] != law.net.K).tolist()

    def draw(self, run: Run, pace: Pace, tally: Tally, samples: list[int]) -> None:
        """Draw all rows."""
        row, end = 0, len(self._rows)
        while row < end:
            tally.add(samples)
            stop = row
            if ahead := pace():
                groups = min(ahead + 1, -(-(end - row) // self._block))
                stop = self._verified(run, pace, tally, row, groups)
            else:
                pace.learn(0, 0)
            # The small part of the network draws the rest of a group.
            row = min(end, (max(stop - 1, row) // self._block + 1) * self._block)
            for rest in range(stop, row):
                self._step(rest)

    def _step(self, row: int) -> None:
        """Draw one row of the plain loop."""
        state, positions = self._state, self._rows[row]
        last = state.symbols[:, self._rows[row - 1]] if row else None
        state.row = row
        logits = self._net.step(last, state)
        self._put(positions, self._draws.draw_at(logits, positions))
        self._settle(row, row + 1)

    def _settle(self, row: int, stop: int) -> None:
        """Note that some rows are drawn."""
        for places in self._places[row:stop]:
            for place in places:
                self._settled[place] = True

    def _put(self, positions: Tensor, symbols: Tensor) -> None:
        """Let symbols stand at positions, but for those that are forced or beyond a length."""
        if self._forced is not None:
            forced = self._forced[positions.clamp(max=len(self._forced) - 1)]
            symbols = torch.where(positions < len(self._forced), forced, symbols)
        if self._lengths is not None:
            symbols = symbols.masked_fill(positions >= self._lengths, self._net.K)
        self._state.symbols[:, positions] = symbols

    def _verified(self, run: Run, pace: Pace, tally: Tally, row: int, groups: int) -> int:
        """Draft some groups from a row on, and verify them; the row up to which the draws are settled."""
        end = min(len(self._rows), row + groups * self._block)
        self._draft(run, row, end)
        state, net = self._state, self._net
        state.row = row
        positions, logits = net.groups_ahead(groups, state)
        # Rows that nobody asked for may follow in the last group.
        wanted = self._row_of[positions] < end
        positions, logits = positions[wanted], logits[:, wanted]
        drafted = state.symbols[:, positions]
        self._put(positions, self._draws.draw_at(logits, positions))
        differs = (drafted != state.symbols[:, positions]).any(0)
        wrong = int(torch.where(differs, self._row_of[positions], end).min())
        stop = min(wrong + 1, end)
        # What was drawn given a wrong symbol is not read: the order draws it later.
        right = (wrong - row) // self._block
        pace.learn(right, min(right + 1, groups))
        n = len(state.symbols)
        sizes = [len(places) for places in self._places[row:end]]
        tally.drafted += n * sum(sizes)
        tally.accepted += n * sum(sizes[: wrong - row])
        self._settle(row, stop)
        return stop

    def _draft(self, run: Run, row: int, end: int) -> None:
        """Propose symbols for the rows from ``row`` to before ``end``."""
        places = sorted(place for line in self._places[row:end] for place in line)
        cuts = [i for i, (a, b) in enumerate(pairwise(places), 1) if b != a + 1]
        spans = [(places[i], places[j - 1] + 1) for i, j in pairwise([0, *cuts, len(places)])]
        proposed: list[list[int]] = []
        for sample, symbols in enumerate(self._state.symbols.tolist()):
            proposed.append([])
            for begin, stop in spans:
                first = begin
                while first > max(0, begin - _BEFORE) and self._settled[first - 1]:
                    first -= 1
                proposed[-1] += run(sample, symbols[first:begin], begin, stop - begin)
        drafts = torch.tensor(proposed)
        check_draft(drafts, (len(proposed), len(places)), self._net.K)
        positions = torch.tensor(places)
        self._put(positions, drafts)
