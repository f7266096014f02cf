"""A law of the integers of a window, with tails: any shape, spikes included."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dflow.core import Context, only_given
from dflow.distributions.conditional import Conditional, check_rows
from dflow.distributions.floor import FLOOR, gamma_bits, gamma_draws
from dflow.distributions.logistic import check_numbers
from dflow.ops.devices import float64, widen, widest
from dflow.ops.memo import Memo

#: Most integers that a window holds.
MOST = 1024

#: Logits that `ConditionalWindow.rounded_mean` computes at a time.
_LOGITS = 1 << 20


class ConditionalWindow(Conditional):
    """Entries independent given the context, each with a probability for every integer of a window.

    A hurdle model over K + 2 symbols: with logits ``l = start + net(context)`` and the symbol c that is most
    frequent in the data, ``h[c] = sigmoid(l[c])``. The other symbols share the remaining probability, ``h[k]
    = (1 - h[c]) softmax(l without l[c])[k]``. ``p[k] = (1 - f) h[k] + f / (K + 2)`` with the share f = 2^-16
    of an even law, so that no symbol costs more than ``16 + log2(K + 2)`` bits, 24.01 for K = 256, however
    sure the net is. ``P(x_i) = p_i[x_i - low_i + 1]`` in the window
    ``low_i .. low_i + K - 1``. The first and the last symbol are the tails: the jth integer beyond an end, j
    from 0, has a share of ``2^-(2 q + 1)`` of its tail, ``q = floor(log2(j + 1))``. P sums to 1 over all
    integers. No gradient goes to x.

    One logit decides whether x is the most frequent value; where it is, a coder reads nothing else.

    The net is called as ``net(x, rest)``, see `dflow.core.conditioned`; it returns
    ``(batch, dim, K + 2)``. Inside a `Split` x is the kept entries.

    Source: van den Oord et al. 2016, arXiv 1601.06759 (a soft-max over the values of a pixel); Mullahy 1986,
    Journal of Econometrics 33 (hurdle models); Elias 1975 (the gamma code, whose lengths the tails have).

    Args:
        net: see above.
        low: first integer of the window of each entry, int64 ``(dim,)``.
        K: integers of a window, 2..1024.

    Raises:
        ValueError: a low of another dtype or shape, a K outside its range; no context, or a net that returns
            another shape.
    """

    one_table = True

    low: Tensor
    start: Tensor

    def __init__(self, net: nn.Module, low: Tensor, K: int) -> None:
        super().__init__()
        if low.ndim != 1 or not len(low) or low.dtype != torch.int64:
            raise ValueError(f"low must be int64 (dim,), found {low.dtype} {tuple(low.shape)}")
        if not 2 <= K <= MOST:
            raise ValueError(f"a window holds 2..{MOST} integers, found K = {K}")
        self.net, self.dim, self.K = net, len(low), K
        self.register_buffer("low", low.clone())
        self.register_buffer("start", torch.zeros(K + 2))
        self._common: Memo[int] = Memo()

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"dim={self.dim}, K={self.K}"

    @property
    def common(self) -> int:
        """The most frequent symbol, that of the largest ``start``: one logit decides whether it is drawn."""
        return self._common(lambda: int(self.start.argmax()), self.start)

    def logits(self, context: Context | None) -> Tensor:
        """Logits of the symbols, ``(batch, dim, K + 2)``, at least float32."""
        return self.raw(context) + self.start

    def law(self, context: Context | None) -> Tensor:
        """Probabilities of the symbols, float64 ``(batch, dim, K + 2)``."""
        logits, c = widen(self.logits(context)), self.common
        common = logits[..., c].sigmoid()
        law = _without(logits, c).softmax(-1) * (1 - common)[..., None]
        law[..., c] = common
        return law.mul_(1 - FLOOR).add_(FLOOR / (self.K + 2))

    def raw(self, context: Context | None) -> Tensor:
        """The logits without ``start``: the output of the net."""
        only_given(context)
        return self.outputs(context, self.dim, self.K + 2)

    def symbols(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Symbols 0..K + 1 of integers ``x``, and their index j in a tail; 0 inside the window."""
        offset = x - self.low
        far = torch.where(offset < 0, -1 - offset, offset - self.K).clamp_min(0)
        return offset.clamp(-1, self.K) + 1, far

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``, summed in float64.

        Args:
            x: int64 ``(batch, dim)``, or floats that hold integers.
            context: see the class.

        Returns:
            In the dtype of ``x`` if that is floating, else in that of the logits.

        Raises:
            ValueError: an ``x`` that is neither, or of another shape, or a context of another batch.
        """
        check_numbers(x, self.dim)
        logits = self.logits(context)
        if len(logits) != len(x):
            raise ValueError(f"x has {len(x)} rows, the context {len(logits)}")
        symbol, far = self.symbols(x.long())
        # One log-sum-exp an entry and two logits are enough, without a log-softmax of all symbols.
        common = self.common
        gate, logit = logits[..., common], logits.gather(-1, symbol[..., None]).squeeze(-1)
        others = logit - _without(logits, common).logsumexp(-1)
        is_common = symbol == common
        terms = nn.functional.logsigmoid(torch.where(is_common, gate, -gate)) + torch.where(
            is_common, 0, others
        )
        even = torch.full_like(terms, math.log(FLOOR / (self.K + 2)))
        terms = torch.logaddexp(terms + math.log1p(-FLOOR), even)
        beyond = (symbol == 0) | (symbol == self.K + 1)
        tails = torch.where(beyond, -math.log(2) * gamma_bits(far), 0)
        total = (widen(terms) + tails).sum(-1)
        return total.to(x.dtype if x.is_floating_point() else logits.dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws, int64 ``(n, dim)``, one a row of the context."""
        law = self.law(context)
        check_rows(n, len(law))
        symbol = law.flatten(0, 1).multinomial(1, generator=generator).view(law.shape[:2])
        u = torch.rand(n, self.dim, dtype=law.dtype, device=law.device, generator=generator)
        far = gamma_draws(1 - u)
        offset = symbol - 1
        offset = torch.where(symbol == 0, -1 - far, torch.where(symbol == self.K + 1, self.K + far, offset))
        return self.low + offset

    @torch.no_grad()
    def rounded_mean(self, context: Context | None = None) -> Tensor:
        """The means given that the entry lies in its window, rounded, int64 ``(batch, dim)``.

        Computed for a few rows of the context at a time, since each has many logits.
        """
        size = max(1, _LOGITS // (self.dim * (self.K + 2)))
        values = torch.arange(self.K, dtype=widest(self.low.device), device=self.low.device)
        means = []
        for start in range(0, len(context.given[0]) if context and context.given else 1, size):
            law = self.law(context and context.rows(start, start + size))[..., 1:-1]
            # The window may have a probability of 0.
            inside = law.sum(-1).clamp_min(torch.finfo(law.dtype).tiny)
            means.append(self.low + (law @ values / inside).round().long())
        return torch.cat(means)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Context | None = None) -> None:
        """Start from the frequencies of the symbols of all entries of data ``(n, dim)``.

        Counts are smoothed by 1/2 (Krichevsky and Trofimov 1981).
        """
        symbol, _ = self.symbols(x.long())
        counts = float64(torch.bincount(symbol.flatten(), minlength=self.K + 2)) + 0.5
        share, c = counts / counts.sum(), int(counts.argmax())
        start = share.log()
        # Log-odds are at least the log of the share, so that this stays the largest start.
        start[c] = share[c].logit()
        self.start.copy_(start)


def _without(logits: Tensor, symbol: int) -> Tensor:
    """Logits, with minus infinity for one symbol."""
    return logits.index_fill(-1, torch.tensor(symbol, device=logits.device), -math.inf)
