"""Any-order laws of sequences: one network that predicts every entry from any others.

Absorbing-state diffusion and masked language models are the same family (Hoogeboom et al. 2022,
arXiv 2110.02037; Austin et al. 2021, arXiv 2107.03006; Shi et al. 2024, arXiv 2406.04329). Over all orders
such a model has a bound (`AnyOrder.elbo`). Along one fixed order, or along an order that is a function of the
symbols drawn so far, it has an exact likelihood (`Walk`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.config import InputError
from dflow.core import Context, Distribution, known_in, lengths_in, noise_in, present
from dflow.ops.devices import widest
from dflow.ops.memo import Memo, OnCpu
from dflow.ops.modular import check_alphabet
from dflow.ops.orders import check_order, ranks, schedule
from dflow.ops.precision import agree, at_least_float32

#: As many calls of a fixed order are scored at once as have at most this many entries together.
_ENTRIES = 1 << 13

#: Entropies are compared in steps of this many nats.
_STEP = 2.0**-10

#: Factor by which each visit to an entry of `AnyOrder.costs` decreases the weight of earlier visits.
_MOMENTUM = 0.99


#: Places of m entries, int64 ``(batch, m)``, ascending; which of them a call draws, bool ``(batch, m)``; and
#: the logits of all m, ``(batch, m, K)``.
Entries = tuple[Tensor, Tensor, Tensor]


class AnyOrder(nn.Module):
    """The order-agnostic model: a network, and the mean cost of an entry at each step.

    Args:
        net: called as ``net(x, known, context)`` with a bool mask ``known (batch, n)``; gives K logits an
            entry and never reads entries that are not known.
        dim: longest sequence.
        K: size of the alphabet.

    Attributes:
        costs: mean nats of an entry once t entries of ``dim`` are known, (dim,): a running average that
            `elbo` updates in training mode. The input of `schedule`.
    """

    costs: Tensor

    def __init__(self, net: nn.Module, dim: int, K: int) -> None:
        """See the class."""
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}")
        self.net: Any = net
        self.dim, self.K = dim, check_alphabet(K)
        # Costs that fall linearly, for which groups of equal size are best.
        self.register_buffer("costs", math.log(K) * torch.arange(dim, 0, -1) / dim)
        self._sizes: Memo[Tensor] = Memo()

    def logits(self, x: Tensor, known: Tensor, context: Context | None = None) -> Tensor:
        """Logits (batch, n, K) of every entry given the known ones, at least float32."""
        logits: Tensor = self.net(x, known, context)
        return at_least_float32(logits)

    def elbo(
        self,
        x: Tensor,
        context: Context | None = None,
        generator: torch.Generator | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        r"""Unbiased estimate (batch,) of a bound on the log-likelihood, in nats: its mean over all orders.

        .. math:: \mathbb{E}_{t, k} \frac{n}{n - t} \sum_{i \notin k} \log p(x_i \mid x_k)

        with t uniform in 0..n-1 and k a set of t known entries (Hoogeboom et al. 2022, eq. 6). One network
        call; the t of a batch are spread evenly, each still uniform (Kingma et al. 2021, arXiv 2107.00630,
        section I.1).

        With ``sizes`` (calls,), how many entries each call draws, it is the bound for such groups instead:
        one random order for each sequence, walked to its end. With known entries in the context it is a bound
        of the others given these: all orders begin with them.
        """
        batch, n = x.shape[:2]
        if sizes is not None and int(sizes.sum()) < n:
            raise ValueError(f"calls of sizes {sizes.tolist()} do not draw all of {n} entries")
        mask, before = present(context, batch, n, takes_known=True), known_in(context)
        noise = torch.rand(batch, n, device=x.device, generator=generator)
        # Entries that the context knows come first, absent ones last.
        noise = noise if before is None else noise.masked_fill(before.device_mask, -1.0)
        rank = (noise if mask is None else noise.masked_fill(~mask, 2.0)).argsort(1).argsort(1)
        if sizes is not None:
            calls = torch.arange(len(sizes), device=x.device).repeat_interleave(sizes.to(x.device))
            return self.log_prob_along(x, calls[rank], len(sizes), context)
        known, count = self._known(x, context), self._count(x, context)
        offset = torch.arange(batch, dtype=widest(x.device), device=x.device) / max(1, batch)
        position = (offset + torch.rand((), dtype=offset.dtype, device=x.device, generator=generator)) % 1
        hidden = count - known
        t = known + torch.minimum((position * hidden).long(), hidden - 1)
        return self.elbo_given(x, rank < t[:, None], context)

    def elbo_given(self, x: Tensor, known: Tensor, context: Context | None = None) -> Tensor:
        """The term of `elbo` for the known entries ``known``, bool (batch, n); not all may be known.

        In training mode it moves `costs`.
        """
        mask, count = present(context, *x.shape[:2], takes_known=True), self._count(x, context)
        known = known if mask is None else known & mask
        hidden = ~known if mask is None else ~known & mask
        total = torch.where(hidden, self._terms(x, known, context), 0.0).sum(1)
        t = known.sum(1)
        if self.training:
            self._note(t * self.dim // count, -total.detach() / (count - t))
        return total * ((count - self._known(x, context)) / (count - t)).to(total.dtype)

    @torch.no_grad()
    def _note(self, t: Tensor, costs: Tensor) -> None:
        total, visits = torch.zeros_like(self.costs), torch.zeros_like(self.costs)
        total.index_add_(0, t, costs.to(total.dtype))
        visits.index_add_(0, t, torch.ones_like(costs, dtype=total.dtype))
        # A cost counts for neighbouring t too: it would take many steps to visit each t by itself.
        reach = self.dim // 32
        total, visits = (F.pad(v, (reach, reach)).unfold(0, 2 * reach + 1, 1).sum(1) for v in (total, visits))
        self.costs.lerp_(total / visits.clamp(min=1), 1 - _MOMENTUM**visits)

    def log_prob_along(
        self, x: Tensor, calls: Tensor, num_calls: int, context: Context | None = None
    ) -> Tensor:
        """Exact nats (batch,), the sum of `terms_along` in float64."""
        terms = self.terms_along(x, calls, num_calls, context)
        return terms.sum(1, dtype=widest(x.device)).to(terms.dtype)

    def terms_along(self, x: Tensor, calls: Tensor, num_calls: int, context: Context | None = None) -> Tensor:
        """Exact nats of each entry (batch, n) if call ``calls[b, i]`` draws entry i of sequence b.

        Args:
            x: symbols ``(batch, n)`` or one-hot rows ``(batch, n, K)``.
            calls: int64 (batch, n) or (n,), in 0..num_calls-1.
            num_calls: network passes that it takes; several passes are joined up to a bounded memory.
            context: lengths, or None.
        """
        batch, n = x.shape[:2]
        calls, mask = calls.expand(batch, n), present(context, batch, n, takes_known=True)
        at_once = max(1, _ENTRIES // max(1, batch * n))
        each = torch.zeros(batch, n, device=x.device)
        for call in torch.arange(num_calls, device=x.device)[:, None, None].split(at_once):
            copies = len(call)
            terms = self._terms(
                x.expand(copies, *x.shape).flatten(0, 1),
                (calls < call).flatten(0, 1),
                context and context.repeat(copies),
            ).view(copies, batch, n)
            drawn = calls == call if mask is None else (calls == call) & mask
            # One call at most draws an entry, so that this sum is exact.
            each = each + torch.where(drawn, terms, 0.0).sum(0)
        return each

    @torch.no_grad()
    def measure(
        self, x: Tensor, points: int = 33, generator: torch.Generator | None = None, batch_size: int = 32
    ) -> Tensor:
        """Costs (dim,) on held-out symbols ``x``, int64 (texts, dim), with one random mask for each and t.

        Measured at ``points`` values of t spread evenly, linear between them. `costs` is left as it is.
        """
        if x.shape[1:] != (self.dim,) or not len(x) or not 1 <= points <= self.dim:
            raise ValueError(
                f"costs are measured on texts (n, {self.dim}) at 1..{self.dim} points, "
                f"found {tuple(x.shape)} and {points}"
            )
        measured = torch.linspace(0, self.dim - 1, points, dtype=torch.float64).round().long()
        costs = torch.zeros(points, dtype=torch.float64)
        for i, t in enumerate(measured.tolist()):
            for batch in x.split(batch_size):
                noise = torch.rand(batch.shape, device=x.device, generator=generator)
                known = noise.argsort(1).argsort(1) < t
                costs[i] -= self._terms(batch, known, None)[~known].cpu().sum(dtype=torch.float64)
            costs[i] /= len(x) * (self.dim - t)
        line = torch.arange(self.dim)
        right = torch.searchsorted(measured, line).clamp(max=points - 1)
        left = (right - 1).clamp(min=0)
        share = (line - measured[left]) / (measured[right] - measured[left]).clamp(min=1)
        return costs[left].lerp(costs[right], share.double())

    def sizes(self, num_calls: int) -> Tensor:
        """`schedule` of the present `costs`, int64 (num_calls,)."""
        return self._sizes(lambda: schedule(self.costs, num_calls), self.costs, key=num_calls)

    def _terms(self, x: Tensor, known: Tensor, context: Context | None) -> Tensor:
        """Log-probability (batch, n) of each entry of ``x`` given the known ones."""
        logits = self.logits(x, known, context)
        if x.is_floating_point():
            return (x * logits.log_softmax(-1)).sum(-1)
        return -F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape)

    def _known(self, x: Tensor, context: Context | None) -> Tensor:
        """Present entries that the context knows, (batch,)."""
        before, mask = known_in(context), present(context, *x.shape[:2], takes_known=True)
        if before is None:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        known = before.device_mask[: x.shape[1]].expand(*x.shape[:2])
        return (known if mask is None else known & mask).sum(1)

    def _count(self, x: Tensor, context: Context | None) -> Tensor:
        """Entries present, (batch,)."""
        lengths = lengths_in(context, len(x))
        return torch.full((len(x),), x.shape[1], device=x.device) if lengths is None else lengths


class Walk(Distribution):
    """Exact law of an any-order model whose entries are drawn in an order that the drawn ones determine.

    Symbols of one call are independent given those of earlier calls, so that their probabilities multiply.
    They add up to one because the order does not depend on hidden symbols (DUEL, arXiv 2603.01367).
    """

    by_entry = True

    #: Builds the walk of another number of calls from the model and that number; None where it is not known.
    other: Callable[[AnyOrder, int], Walk] | None = None

    def __init__(self, model: AnyOrder, num_calls: int) -> None:
        """``num_calls`` lies in 1..model.dim."""
        super().__init__()
        if not 1 <= num_calls <= model.dim:
            raise ValueError(f"num_calls must lie in 1..{model.dim} (the length), found {num_calls}")
        self.model, self._num_calls = model, num_calls

    @property
    def budgets(self) -> Sequence[int]:
        """Any number up to the length, where `other` is known."""
        return [self.num_calls] if self.other is None else range(1, self.model.dim + 1)

    def at(self, calls: int) -> Walk:
        """The walk of ``calls`` network calls; it shares the model with this one."""
        if calls == self.num_calls:
            return self
        if self.other is None or calls not in self.budgets:
            raise ValueError(f"no walk of {calls} calls; there are {self.budgets}")
        return self.other(self.model, calls).to(self.model.costs.device).train(self.training)

    @property
    def num_calls(self) -> int:
        """Passes over the whole sequence."""
        return self._num_calls

    @abstractmethod
    def entries(self, call: int, x: Tensor, known: Tensor, context: Context | None) -> Entries:
        """What a call may draw, given the known entries: the number m depends on no tensor of the device."""

    def step(self, call: int, x: Tensor, known: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """The entries that a call draws, bool (batch, n), and their logits (entries, K), given known ones."""
        places, drawn, logits = self.entries(call, x, known, context)
        return torch.zeros_like(known).scatter(1, places, drawn), logits[drawn]

    def needed(self, length: int, context: Context | None = None) -> int:
        """Calls after which the first ``length`` entries are drawn, given those that the context knows."""
        return self.num_calls

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

        ``prompt``, int64 ``(m,)``, is known at the first positions before the first call, so that every entry
        is drawn given it. Calls that draw only entries at or beyond ``length`` are left out.
        """
        device, before = self.model.costs.device, known_in(context)
        dim = self.model.dim if before is None else len(before.mask)
        x = torch.zeros(n, dim, dtype=torch.int64, device=device)
        known = self._begin(n, dim, context, device)
        if before is not None:
            x = torch.where(before.device_mask, before.symbols, x)
        if prompt is not None:
            x[:, : len(prompt)], known[:, : len(prompt)] = prompt, True
        lengths, mask = lengths_in(context), present(context, n, dim, takes_known=True)
        longest = dim if length is None else length
        if lengths is not None:
            longest = min(longest, max(1, *lengths.tolist()))
        noise, samples = noise_in(context, n, generator, device), torch.arange(n, device=device)[:, None]
        for call in range(self.needed(longest, context)):
            places, drawn, logits = self.entries(call, x, known, context)
            symbols = noise.draw(logits, samples, places)
            x = x.scatter(1, places, torch.where(drawn, symbols, x.gather(1, places)))
            known = known.scatter(1, places, drawn | known.gather(1, places))
        return x if mask is None else torch.where(mask, x, 0)

    def _begin(self, batch: int, n: int, context: Context | None, device: torch.device) -> Tensor:
        """Entries that are known before the first call, bool ``(batch, n)``."""
        before = known_in(context)
        if before is None:
            return torch.zeros(batch, n, dtype=torch.bool, device=device)
        if bool(before.mask.all()):
            raise InputError("every entry is known, so that there is nothing to score or to draw")
        return before.mask[:n].to(device).expand(batch, n)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact nats (batch,) of symbols ``(batch, n)`` or one-hot rows ``(batch, n, K)``.

        With known entries in the context, which ``x`` holds too, of the others given these.
        """
        return self.log_prob_by_steps(x, context)

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """Whether `log_prob_by_steps` and `log_prob` agree up to rounding."""
        steps = self.log_prob_by_steps(x, context)
        return agree(steps, self.log_prob(x, context), self.model)

    def log_prob_by_steps(self, x: Tensor, context: Context | None = None) -> Tensor:
        """`log_prob` computed as `sample` draws."""
        terms = self._terms_by_steps(x, context)
        return terms.sum(1, dtype=widest(x.device)).to(terms.dtype)

    def log_prob_each(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The terms of `log_prob`, ``(batch, n)``; 0 for entries that are absent or known.

        The term of an entry is its log-probability given all that earlier calls draw, and the known entries.
        """
        return self._terms_by_steps(x, context)

    def _terms_by_steps(self, x: Tensor, context: Context | None) -> Tensor:
        known = self._begin(len(x), x.shape[1], context, x.device)
        each = torch.zeros(x.shape[:2], device=x.device)
        for call in range(self.needed(x.shape[1], context)):
            places, drawn, logits = self.entries(call, x, known, context)
            log_p = logits.log_softmax(-1)
            if x.is_floating_point():
                terms = (_at(x, places) * log_p).sum(-1)
            else:
                terms = log_p.gather(-1, x.gather(1, places)[..., None]).squeeze(-1)
            each = each.to(terms.dtype)
            each = each.scatter(1, places, torch.where(drawn, terms, each.gather(1, places)))
            known = known.scatter(1, places, drawn | known.gather(1, places))
        return each


class Ordered(Walk):
    """Along one fixed order.

    Args:
        model: the any-order model.
        order: int64 ``(G, S)``, see `dflow.ops.orders`.
        num_calls: number of calls, for an order with one lane, ``(dim, 1)``: each draws as many rows as
            `AnyOrder.sizes` says. Default G, one row a call.
    """

    rank: Tensor
    #: The order over any number of entries in any number of calls, or None: see `calls`.
    lay: Callable[[int, int], Tensor] | None = None

    def __init__(self, model: AnyOrder, order: Tensor, num_calls: int | None = None) -> None:
        """See the class."""
        check_order(order, model.dim)
        if num_calls is not None and order.shape[1] != 1:
            raise ValueError(f"num_calls is for orders with one lane, found {order.shape[1]} lanes")
        super().__init__(model, len(order) if num_calls is None else num_calls)
        self.merged = num_calls is not None
        self.register_buffer("rank", ranks(order, model.dim))
        self._on_cpu = OnCpu()
        self._placed: Memo[tuple[Tensor, list[Tensor], list[Tensor]]] = Memo()

    def calls(self, context: Context | None = None) -> Tensor:
        """The call that draws each entry, int64 (dim,) on the CPU; -1 for an entry that the context knows.

        With a way to lay orders one is laid over the other entries, of a sequence of any length; else calls
        that would draw known entries alone are left out.
        """
        [calls] = self._on_cpu.of(self.rank)
        if self.merged:
            sizes = self.model.sizes(self.num_calls)
            calls = torch.arange(self.num_calls).repeat_interleave(sizes)[calls]
        before = known_in(context)
        if before is None:
            return calls
        hidden = ~before.mask
        if self.lay is None:
            places = torch.unique(calls[: len(hidden)][hidden], return_inverse=True)[1]
        else:
            number = int(hidden.sum())
            places = ranks(self.lay(number, min(number, self.num_calls)), number)
        return torch.full_like(hidden, -1, dtype=torch.int64).masked_scatter(hidden, places)

    def needed(self, length: int, context: Context | None = None) -> int:
        """See `Walk.needed`."""
        return int(self._by_call(context)[0][:length].max()) + 1

    def _by_call(self, context: Context | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The call of each entry, and the places of each call, on the CPU; the places on the device.

        The device is waited for once for an order.
        """
        before = known_in(context)
        depends_on = [self.rank, self.model.costs, *([] if before is None else [before.mask])]

        def placed() -> tuple[Tensor, list[Tensor], list[Tensor]]:
            calls = self.calls(context)
            places = [(calls == call).nonzero().flatten() for call in range(self.num_calls)]
            moved = torch.cat(places).to(self.rank.device).split([len(part) for part in places])
            return calls, places, list(moved)

        return self._placed(placed, *depends_on, key=len(depends_on))

    def entries(self, call: int, x: Tensor, known: Tensor, context: Context | None) -> Entries:
        """See `Walk.entries`."""
        batch, n = x.shape[:2]
        _, places, moved = self._by_call(context)
        at = moved[call][: int((places[call] < n).sum())].expand(batch, -1)
        mask = present(context, batch, n, takes_known=True)
        drawn = ~known.gather(1, at)
        drawn = drawn if mask is None else drawn & mask.gather(1, at)
        return at, drawn, _at(self.model.logits(x, known, context), at)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact nats (batch,) of symbols ``(batch, n)`` or rows ``(batch, n, K)``, several calls at once."""
        terms = self.log_prob_each(x, context)
        return terms.sum(1, dtype=widest(x.device)).to(terms.dtype)

    def log_prob_each(self, x: Tensor, context: Context | None = None) -> Tensor:
        """See `Walk.log_prob_each`; several calls at once."""
        self._begin(len(x), x.shape[1], context, x.device)
        calls = self._by_call(context)[0][: x.shape[1]].to(x.device)
        return self.model.terms_along(x, calls, self.needed(x.shape[1], context), context)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """The rows ``(batch, m, K)`` of ``values`` ``(batch, n, K)`` at places ``(batch, m)``."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


class Confident(Walk):
    """Every call draws in each segment the entry of least entropy given what is known.

    The segments are those of `dflow.ops.orders.lockstep`, of ``num_calls`` entries each. Entries of one call
    are drawn independently and so should lie apart, while the entries of least entropy often lie side by
    side. A call that draws fewer entries than there are segments takes those of least entropy among the
    candidates; a call that draws more goes on with the second entry of each segment.

    Entropies are rounded first. Otherwise rounding errors would decide between equal ones, and a sequence
    could be scored in another order than it was drawn in. Of equal entropies the left one comes first.

    Args:
        model: the any-order model.
        num_calls: number of calls.
        measured: draw as many entries in each call as `AnyOrder.sizes` says, instead of equally many. For a
            sequence that is shorter than ``dim`` the numbers shrink in proportion.
    """

    def __init__(self, model: AnyOrder, num_calls: int, measured: bool = False) -> None:
        """See the class."""
        super().__init__(model, num_calls)
        self.measured = measured

    def _done(self, calls: int) -> int:
        """Entries of a whole sequence that are drawn after so many calls."""
        if self.measured:
            return int(self.model.sizes(self.num_calls)[:calls].sum())
        return -(-self.model.dim * calls // self.num_calls)

    def entries(self, call: int, x: Tensor, known: Tensor, context: Context | None) -> Entries:
        """See `Walk.entries`."""
        n, dim, done = x.shape[1], self.model.dim, self._done(call + 1)
        mask, lengths = present(context, len(x), n, takes_known=True), lengths_in(context)
        count = torch.full((len(x),), n, device=x.device) if lengths is None else lengths
        hidden = ~known if mask is None else ~known & mask
        logits = self.model.logits(x, known, context)
        entropy = torch.special.entr(logits.detach().softmax(-1)).sum(-1)
        entropy = (entropy / _STEP).round().masked_fill(~hidden, math.inf)
        before = known_in(context)
        if before is not None:
            at_first = before.device_mask[:n] if mask is None else before.device_mask[:n] & mask
            count = count - at_first.expand(len(x), n).sum(1)
        # Rounded up, so that the last call completes the sequence.
        quota = -(-count * done // dim) - (count - hidden.sum(1))
        segments = F.pad(entropy, (0, -n % self.num_calls), value=math.inf).unflatten(1, (-1, self.num_calls))
        place = segments.argsort(dim=2, stable=True).argsort(2).flatten(1)[:, :n]
        overall = entropy.argsort(dim=1, stable=True).argsort(1)
        ranked = (place * n + overall).masked_fill(~hidden, n * n).argsort(dim=1, stable=True)
        # No sequence has a quota beyond that of a whole one of which nothing is known.
        most = min(n, done - self._done(call))
        at, rank = ranked[:, :most].sort(1)
        return at, (rank < quota[:, None]) & hidden.gather(1, at), _at(logits, at)
