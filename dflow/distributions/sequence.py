"""Categorical laws of sequences, drawn group by group: autoregressive and everything between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, Distribution
from dflow.ops.orders import check_order

#: Noise is drawn ahead for as many calls as fit into this many numbers.
_NOISE_BLOCK = 1 << 22


class SequenceCategorical(Distribution):
    r"""Exact law of a sequence drawn in G groups, each in one network call given all earlier groups.

    .. math:: \log p(x) = \sum_{g=1}^{G} \sum_{i \in g} \log p(x_i \mid x_{<g})

    With one lane (``order`` of shape ``(dim, 1)``) it is the autoregressive law.

    Args:
        net: a `SequenceNet` that gives K logits an entry.
        order: int64 ``(G, S)``, see `dflow.ops.orders`; the same that the network was built with.
        dim: longest sequence.
    """

    order: Tensor

    def __init__(self, net: nn.Module, order: Tensor, dim: int) -> None:
        """See the class."""
        super().__init__()
        check_order(order, dim)
        self.net: Any = net
        self.dim = dim
        self.register_buffer("order", order.clone())

    @property
    def num_calls(self) -> int:
        """One call a group."""
        return int(self.order.shape[0])

    def log_prob(self, x: Tensor, context: Context = None) -> Tensor:
        """Exact nats (batch,) of symbols ``(batch, n)`` or one-hot rows ``(batch, n, K)``."""
        logits = self.net(x, context)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if x.is_floating_point():
            terms = (x * logits.log_softmax(-1)).sum(-1)
        else:
            terms = -F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape)
        if isinstance(context, Tensor):
            present = torch.arange(x.shape[1], device=x.device) < context[:, None]
            terms = torch.where(present, terms, 0.0)
        out: Tensor = terms.sum(1)
        return out

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Context = None,
        generator: torch.Generator | None = None,
        prompt: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """``n`` sequences, int64 ``(n, dim)``, in `num_calls` calls; absent entries are 0.

        ``prompt``, int64 ``(length,)``, is forced at the first positions while the rest is drawn. For an
        order from left to right that is the exact conditional law; for any other, an entry drawn before a
        prompt's symbol has not seen it. ``length`` leaves out groups that lie wholly at or beyond it; the
        entries before it keep the law of full draws.
        """
        device = self.order.device
        longest = self.dim if length is None else length
        if isinstance(context, Tensor):
            longest = min(longest, int(context.max()))
        groups = self._groups(longest)
        state, drawn = self.net.start(n, context), None
        parts: list[Tensor] = []
        noise: Tensor | None = None
        block = 1
        for g in range(groups):
            logits = self.net.step(drawn, state)
            if noise is None or g % block == 0:
                block = max(1, _NOISE_BLOCK // logits.numel())
                shape = (min(block, groups - g), *logits.shape)
                noise = torch.rand(shape, dtype=logits.dtype, device=device, generator=generator)
                noise = noise.log_().neg_().log_()
            # The arg-max of logits plus Gumbel noise is an exact draw (Gumbel 1954; Maddison et al. 2014).
            drawn = (logits - noise[g % block]).argmax(-1)
            if prompt is not None:
                row = self.order[g]
                forced = prompt[row.clamp(max=len(prompt) - 1)]
                drawn = torch.where(row < len(prompt), forced, drawn)
            parts.append(drawn)
        x = torch.zeros(n, int(self.order.max()) + 1, dtype=torch.int64, device=device)
        if parts:
            x[:, self.order[:groups].flatten()] = torch.cat(parts, 1)
        x = x[:, : self.dim]
        if isinstance(context, Tensor):
            x = x.masked_fill(torch.arange(self.dim, device=device) >= context[:, None], 0)
        return x

    def _groups(self, length: int) -> int:
        """Groups up to the last that holds an entry below ``length``; later ones need no call."""
        needed = (self.order < length).any(1).nonzero()
        return int(needed.max()) + 1 if len(needed) else 0

    @torch.no_grad()
    def log_prob_by_steps(self, x: Tensor, context: Context = None) -> Tensor:
        """`log_prob` of symbols computed as `sample` draws them, group by group: a check of the two."""
        limit = torch.full((len(x),), x.shape[1], device=x.device)
        if isinstance(context, Tensor):
            limit = torch.minimum(limit, context)
        state = self.net.start(len(x), None if bool((limit == self.dim).all()) else limit)
        previous, width = None, int(self.order.max()) + 1
        x = F.pad(x, (0, width - x.shape[1]))
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for row in self.order[: self._groups(int(limit.max()))]:
            log_p = self.net.step(previous, state).log_softmax(-1)
            previous = x[:, row]
            terms = log_p.gather(-1, previous[..., None]).squeeze(-1)
            total = total + torch.where(row < limit[:, None], terms, 0.0).sum(1)
        return total.to(log_p.dtype)

    @torch.no_grad()
    def sample_by_fixed_point(
        self, n: int, context: Context = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, int]:
        """The draws of `sample` with the same generator, in as many parallel calls as it takes.

        With the Gumbel noise g of all entries fixed, ``x = argmax(logits(x) + g)`` is a triangular system:
        ``x <- argmax(logits(x) + g)`` from x = 0 is right in one more group after each call, at least, and
        nothing changes any more at its only fixed point, which is the draw (Song et al. 2021, arXiv
        2002.03629). It can differ from that of `sample` where two symbols are as good as tied, since cached
        and parallel results differ in their last bits.

        Returns:
            Symbols int64 ``(n, dim)``, and the calls, from 1 to ``num_calls + 1``.

        Raises:
            RuntimeError: the net answers differently when asked twice (dropout in training mode).
        """
        device, dim = self.order.device, self.dim
        x = torch.zeros(n, dim, dtype=torch.int64, device=device)
        absent = None
        longest = dim
        if isinstance(context, Tensor):
            absent = torch.arange(dim, device=device) >= context[:, None]
            longest = min(dim, int(context.max()))
        groups = self._groups(longest)
        order = self.order[:groups]
        used, noise = order < dim, None
        for call in range(1, groups + 2):
            logits: Tensor = self.net(x, context)
            if noise is None:
                block = max(1, _NOISE_BLOCK // (n * order.shape[1] * logits.shape[-1]))
                parts = [
                    torch.rand(
                        (len(rows), n, order.shape[1], logits.shape[-1]),
                        dtype=logits.dtype,
                        device=device,
                        generator=generator,
                    )
                    for rows in order.split(block)
                ]
                noise = torch.cat(parts).log_().neg_().log_().transpose(1, 2)[used].transpose(0, 1)
            new = x.index_copy(1, order[used], (logits[:, order[used]] - noise).argmax(-1))
            if absent is not None:
                new = new.masked_fill(absent, 0)
            if torch.equal(new, x):
                return x, call
            x = new
        raise RuntimeError(
            f"no draw after {groups + 1} calls: the net answers differently each time it is asked (dropout? "
            "call eval() on the model first) or looks ahead"
        )
