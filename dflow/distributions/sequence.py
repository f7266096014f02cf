"""Categorical laws of sequences, drawn group by group: autoregressive and everything between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.config import InputError
from dflow.core import Context, Distribution, Known, known_in, lengths_in, noise_in, present
from dflow.ops.devices import widest
from dflow.ops.memo import Memo, OnCpu
from dflow.ops.orders import check_order
from dflow.ops.precision import agree, at_least_float32

#: Noise is drawn ahead for as many calls as fit into this many numbers.
_NOISE_BLOCK = 1 << 22


class SequenceCategorical(Distribution):
    r"""Exact law of a sequence drawn in G groups, each in one network call given all earlier groups.

    .. math:: \log p(x) = \sum_{g=1}^{G} \sum_{i \in g} \log p(x_i \mid x_{<g})

    With one lane (``order`` of shape ``(dim, 1)``) it is the autoregressive law. With blocks of m rows a call
    draws m rows of the order, the later ones each given the rows before it by a small part of the network.

    Args:
        net: a `SequenceNet` that gives K logits an entry.
        order: int64 ``(R, S)``, see `dflow.ops.orders`; the same that the network was built with.
        dim: longest sequence.
        block: rows that the network draws in one call.
        others: further orders that the network can walk, each with its block and a law of its own: see `at`.
        known: bool ``(dim,)``, entries that are in no row of the order since they are known, or None.

    Attributes:
        lay: the order over any number of entries in any number of rows, for networks that can walk any order
            and read known entries before; None for a law that is drawn from left to right.
    """

    by_entry = True

    order: Tensor
    lay: Callable[[int, int], Tensor] | None = None

    def __init__(
        self,
        net: nn.Module,
        order: Tensor,
        dim: int,
        block: int = 1,
        others: Sequence[tuple[Tensor, int]] = (),
        known: Tensor | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.net: Any = net
        self.dim, self.block = dim, block
        # A contiguous copy: a matrix of one column may keep unusual strides, and torch refuses to broadcast
        # such a matrix to other processes because it believes that its entries overlap.
        self.register_buffer("order", order.clone(memory_format=torch.contiguous_format))
        #: By number of calls: the name of the order, and the rows of a call.
        self._names = {-(-len(order) // block): ("order", block)}
        for i, (other, rows) in enumerate(others):
            self.register_buffer(f"order_{i}", other.clone(memory_format=torch.contiguous_format))
            check_order(other, dim)
            self._names.setdefault(-(-len(other) // rows), (f"order_{i}", rows))
        read_before = order.new_zeros(0) if known is None else known.nonzero().flatten().to(order.device)
        check_order(torch.cat([order.flatten(), read_before])[:, None], dim)
        self._laws: dict[int, Memo[SequenceCategorical]] = {calls: Memo() for calls in self._names}
        #: Whether order or block differ from those that the network was built with, so that it needs a plan.
        self._planned = getattr(net, "block", block) != block
        self._plan: Memo[Any] = Memo()
        self._rows: Memo[tuple[list[Tensor], list[int]]] = Memo()
        self._among: Memo[SequenceCategorical] = Memo()
        self._on_cpu = OnCpu()
        #: Entries that are known, bool (dim,), on the CPU: they are neither scored nor drawn.
        self._known: Tensor | None = None
        #: The same on the device.
        self._mask: Tensor | None = None
        #: Positions of the known entries that the network reads before the first call.
        self._slots: Tensor | None = None

    @property
    def budgets(self) -> list[int]:
        """Numbers of network calls for which there is an order."""
        return sorted(self._names)

    def at(self, calls: int) -> SequenceCategorical:
        """The law of another order, drawn in ``calls`` network calls; it shares the network with this one.

        Raises:
            ValueError: there is no such order.
        """
        if calls == self.num_calls:
            return self
        if calls not in self._names:
            raise ValueError(f"no order of {calls} calls; there are {self.budgets}")
        name, block = self._names[calls]
        order: Tensor = getattr(self, name)

        def law() -> SequenceCategorical:
            law = SequenceCategorical(self.net, order, self.dim, block)
            law._planned, law.lay = True, self.lay
            return law

        other = self._laws[calls](law, order)
        other.training = self.training
        return other

    def _extra(self) -> tuple[Any, ...]:
        """The plan of the order, made once; nothing where it is the order that the network was built with."""
        if not self._planned:
            return ()
        dtype = next(self.net.parameters()).dtype

        def plan() -> Any:
            return self.net.plan(*self._on_cpu.of(self.order), self._slots, self.dim, self.block)

        return (self._plan(plan, self.order, key=dtype),)

    def _of(self, context: Context | None) -> SequenceCategorical:
        """The law that a context asks for: this one, or that of the entries that are not known."""
        known = known_in(context)
        if known is None or self._mask is not None:
            return self
        law = self.among(known.mask)
        law.training = self.training
        return law

    def among(self, known: Tensor) -> SequenceCategorical:
        """The law of the entries that are not ``known``, bool ``(n,)``, given those that are.

        ``known`` is on the CPU. The law shares the network and takes sequences of any length n. With a way to
        lay orders it is drawn in as many calls as this one, or in one for each hidden entry if these are
        fewer: the known entries are read before the first call, and an order is laid over the others.
        Without, it is drawn from left to right.

        Raises:
            InputError: every entry is known; or the law is drawn from left to right, and entries are known
                behind one that is not.
        """
        return self._among(lambda: self._among_known(known), known)

    def _among_known(self, known: Tensor) -> SequenceCategorical:
        hidden, n = (~known).nonzero().flatten(), len(known)
        if not len(hidden):
            raise InputError("every entry is known, so that there is nothing to score or to draw")
        if self.lay is None:
            if not bool(known[: int(known.sum())].all()):
                raise InputError(
                    "this law is drawn from left to right: it takes what stands before, and not what stands "
                    "after; a grouped or any-order model takes both"
                )
            order = torch.arange(n)[:, None]
            law = SequenceCategorical(self.net, order, n)
            law._planned = hasattr(self.net, "plan")
        else:
            rows = self.lay(len(hidden), min(len(hidden), self.num_calls * self.block))
            places = torch.cat([hidden, hidden.new_full((1,), n)])
            order = places[rows.clamp(max=len(hidden))]
            law = SequenceCategorical(self.net, order, n, self.block, known=known)
            law._planned, law._slots = True, known.nonzero().flatten()
        device = self.order.device
        law.order, law._known, law._mask = order.to(device), known, known.to(device)
        law._on_cpu(lambda: (order,), law.order)
        return law

    @property
    def num_calls(self) -> int:
        """One call a block of rows."""
        return -(-len(self.order) // self.block)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact nats (batch,) of symbols ``(batch, n)`` or one-hot rows ``(batch, n, K)``.

        With known entries in the context, which ``x`` holds too, of the others given these.
        """
        out: Tensor = self.log_prob_each(x, context).sum(1)
        return out

    def log_prob_each(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The terms of `log_prob`, ``(batch, n)``; 0 for entries that are absent or known.

        The term of an entry is its log-probability given all earlier groups, and the known entries.
        """
        if (law := self._of(context)) is not self:
            return law.log_prob_each(x, context)
        mask = present(context, len(x), x.shape[1], takes_known=True)
        logits = at_least_float32(self.net(x, context, *self._extra()))
        if x.is_floating_point():
            terms = (x * logits.log_softmax(-1)).sum(-1)
        else:
            terms = -F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape)
        if mask is not None:
            terms = torch.where(mask, terms, 0.0)
        if self._mask is not None:
            terms = torch.where(self._mask[: x.shape[1]], 0.0, terms)
        each: Tensor = terms
        return each

    def next_logits(self, x: Tensor) -> Tensor:
        """Logits ``(batch, n + 1, K)`` of symbols ``(batch, n)`` and of one more, each given those before it.

        For a law that is drawn from left to right. Behind as many symbols as the law has entries, the network
        is asked for one place further than it was trained.

        Raises:
            ValueError: a law in another order.
        """
        if self.lay is not None or self.order.shape[1] > 1:
            raise ValueError("this law is not drawn from left to right, and has no law of the next entry")
        n = x.shape[1]
        law = self if n < self.dim else self.among(torch.arange(n + 1, device=x.device) < n)
        return at_least_float32(law.net(F.pad(x, (0, 1)), None, *law._extra()))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Context | None = None,
        generator: torch.Generator | None = None,
        prompt: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """``n`` sequences, int64 ``(n, dim)``, in `num_calls` calls; absent entries are 0.

        With known entries in the context the others are drawn given these. ``prompt``, int64 ``(length,)``,
        is forced at the first positions while the rest is drawn. For an order from left to right that is the
        exact conditional law; for any other, an entry drawn before a prompt's symbol has not seen it.
        ``length`` leaves out groups that lie wholly at or beyond it; the entries before it keep the law of
        full draws.
        """
        if (law := self._of(context)) is not self:
            return law.sample(n, context, generator, prompt, length)
        device = self.order.device
        noise, samples = noise_in(context, n, generator, device), torch.arange(n, device=device)[:, None]
        (calls, state), drawn = self.start(n, context, length), None
        x = torch.zeros(n, self.dim, dtype=torch.int64, device=device)
        known = known_in(context)
        if known is not None:
            is_known = known.device_mask
            x = torch.where(is_known, known.symbols, x)
        begin = self.read_known(known, state, context)
        if begin and known is not None:
            drawn = known.symbols[:, begin - 1 : begin]
        ahead: list[Tensor] = []
        for g, positions in enumerate(calls[begin:], start=begin):
            logits = self.net.step(drawn, state)
            if not ahead:
                # As many calls' as fit, and at least this one's.
                several = _as_fit(calls[g:], n * logits.shape[-1])
                gumbel = noise.gumbel(samples, torch.cat(several), logits.shape[-1])
                ahead = list(gumbel.split([len(entries) for entries in several], 1))
            drawn = noise.draw(logits, samples, positions, ahead.pop(0))
            if prompt is not None:
                forced = prompt[positions.clamp(max=len(prompt) - 1)]
                drawn = torch.where(positions < len(prompt), forced, drawn)
            if known is not None:
                drawn = torch.where(is_known[positions], known.symbols[:, positions], drawn)
            x[:, positions] = drawn
        mask = present(context, n, self.dim, takes_known=True)
        return x if mask is None else torch.where(mask, x, 0)

    def _num_read(self, known: Known | None) -> int:
        """Known entries at the beginning that the network reads in one call, in place of a call for each."""
        if known is None or self._slots is not None or not hasattr(self.net, "read"):
            return 0
        return int(known.mask.sum())

    def read_known(self, known: Known | None, state: Any, context: Context | None) -> int:
        """Let the network read what is known before the first call; returns how many rows that spares.

        What is known alike of all sequences is read once, and the state copied.
        """
        if known is None or not hasattr(self.net, "read"):
            return 0
        places = known.mask.nonzero().flatten().to(known.symbols.device)
        begin, symbols = self._num_read(known), known.symbols.index_select(1, places)
        once = len(symbols) > 1 and symbols.shape[1] > 0 and lengths_in(context) is None
        once = once and bool((symbols == symbols[:1]).all())
        if begin or once:
            self.net.read(symbols[:1] if once else symbols, state)
        return begin

    def start(
        self, n: int, context: Context | None = None, length: int | None = None
    ) -> tuple[list[Tensor], Any]:
        """Begin to draw n sequences: the positions of each row, and the state for ``net.step``."""
        longest, lengths = self.dim if length is None else length, lengths_in(context, n)
        if lengths is not None:
            longest = min(longest, max(lengths.tolist(), default=0))
        return self._drawn(longest), self.net.start(n, context, *self._extra())

    def needed(self, length: int, context: Context | None = None) -> int:
        """Network calls after which the first ``length`` entries are drawn; one reads what is known."""
        if (law := self._of(context)) is not self:
            return law.needed(length, context)
        read = self._num_read(known_in(context))
        return min(1, read) + -(-(len(self._drawn(length)) - read) // self.block)

    def calls(self, context: Context | None = None) -> Tensor:
        """The network call that draws each entry, int64 ``(dim,)``, from 0; -1 for known ones."""
        if (law := self._of(context)) is not self:
            return law.calls(context)
        read = self._num_read(known_in(context))
        calls = torch.full((self.dim,), -1, device=self.order.device)
        for row, positions in enumerate(self._drawn(self.dim)[read:]):
            calls[positions] = min(1, read) + row // self.block
        return calls if self._mask is None else calls.masked_fill(self._mask, -1)

    def _drawn(self, length: int) -> list[Tensor]:
        """Positions of each row, up to the last that holds one below ``length``: later ones need no call."""
        rows, lasts = self._rows(self._rows_of_order, self.order)
        return rows[: max((i + 1 for i, least in enumerate(lasts) if least < length), default=0)]

    def _rows_of_order(self) -> tuple[list[Tensor], list[int]]:
        """The positions of each row, and the least of them; the device is waited for once for an order."""
        rows = [row[row < self.dim] for row in self._on_cpu.of(self.order)[0]]
        positions = torch.cat(rows).to(self.order.device).split([len(row) for row in rows])
        return list(positions), [int(row.min()) for row in rows]

    @torch.no_grad()
    def log_prob_by_steps(self, x: Tensor, context: Context | None = None) -> Tensor:
        """`log_prob` of symbols, computed group by group as `sample` draws: a check that both agree."""
        if (law := self._of(context)) is not self:
            return law.log_prob_by_steps(x, context)
        if not len(x):
            return self.log_prob(x, context)
        limit, lengths = torch.full((len(x),), x.shape[1], device=x.device), lengths_in(context, len(x))
        if lengths is not None:
            limit = torch.minimum(limit, lengths)
        shortened = None if bool((limit == self.dim).all()) else limit
        known = None if self._known is None else Known(x, self._known)
        trimmed = Context(lengths=shortened, given=() if context is None else context.given, known=known)
        state = self.net.start(len(x), trimmed, *self._extra())
        previous = None
        x = F.pad(x, (0, self.dim - x.shape[1]))
        total = torch.zeros(len(x), dtype=widest(x.device), device=x.device)
        for row in self._drawn(int(limit.max())):
            log_p = at_least_float32(self.net.step(previous, state)).log_softmax(-1)
            previous = x[:, row]
            terms = log_p.gather(-1, previous[..., None]).squeeze(-1)
            scored = row < limit[:, None]
            if self._mask is not None:
                scored = scored & ~self._mask[row]
            total = total + torch.where(scored, terms, 0.0).sum(1)
        return total.to(log_p.dtype)

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """Whether `log_prob_by_steps` and `log_prob` agree up to rounding."""
        steps = self.log_prob_by_steps(x, context)
        return agree(steps, self.log_prob(x, context), self.net)

    @torch.no_grad()
    def sample_by_fixed_point(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, int]:
        """The draws of `sample` with the same generator, in as many parallel calls as it takes.

        With the Gumbel noise g of all entries fixed, ``x = argmax(logits(x) + g)`` is a triangular system:
        ``x <- argmax(logits(x) + g)`` from x = 0 is right in one more row after each call, at least, and
        nothing changes any more at its only fixed point, which is the draw (Song et al. 2021, arXiv
        2002.03629). It can differ from that of `sample` where two symbols are almost tied, since cached
        and parallel results differ by rounding.

        Returns:
            Symbols int64 ``(n, dim)``, and the number of calls, from 1 to the rows of the order plus 1.

        Raises:
            RuntimeError: the net gives another result for the same input (dropout in training mode).
        """
        device, dim = self.order.device, self.dim
        x = torch.zeros(n, dim, dtype=torch.int64, device=device)
        mask, lengths = present(context, n, dim), lengths_in(context, n)
        longest = dim if lengths is None else min(dim, max(lengths.tolist(), default=0))
        rows, gumbel = self._drawn(longest), None
        noise, samples = noise_in(context, n, generator, device), torch.arange(n, device=device)[:, None]
        used = torch.cat(rows)
        for call in range(1, len(rows) + 2):
            logits: Tensor = self.net(x, context, *self._extra())[:, used]
            if gumbel is None:
                gumbel = noise.gumbel(samples, used, logits.shape[-1])
            new = x.index_copy(1, used, noise.draw(logits, samples, used, gumbel))
            if mask is not None:
                new = torch.where(mask, new, 0)
            if torch.equal(new, x):
                return x, call
            x = new
        raise RuntimeError(
            f"no draw after {len(rows) + 1} calls: the net gives another result at each call "
            "(dropout? call eval() on the model first) or looks ahead"
        )


def _as_fit(calls: list[Tensor], size: int) -> list[Tensor]:
    """The first of some calls: at least one, and as many as fit with ``size`` numbers of noise an entry."""
    entries, number = 0, 0
    for positions in calls:
        entries += len(positions)
        if number and entries * size > _NOISE_BLOCK:
            break
        number += 1
    return calls[:number]
