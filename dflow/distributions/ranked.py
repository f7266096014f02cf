"""A discrete autoregressive flow whose base has a few shared laws, mixed for each entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dflow.core import Context
from dflow.distributions.sequence import SequenceCategorical
from dflow.distributions.spectra import log_laws, power_laws
from dflow.ops.precision import at_least_float32


class _Ranked(nn.Module):
    """Log-probabilities in place of the logits and weights that a network from left to right gives."""

    def __init__(self, net: nn.Module, K: int, components: int) -> None:
        super().__init__()
        self.net, self.K = net, K
        self.spectra = nn.Parameter(power_laws(components, K))

    def parts(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., K), and the log-probability of each rank, (..., K)."""
        log_weights = out[..., self.K :].log_softmax(-1)
        return out[..., : self.K], torch.logsumexp(log_weights[..., None] + log_laws(self.spectra), -2)

    def _law(self, out: Tensor) -> Tensor:
        logits, by_rank = self.parts(at_least_float32(out))
        # Which symbol has each rank: the most probable one has rank 0.
        order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
        return torch.empty_like(by_rank).scatter(-1, order, by_rank)

    def forward(self, x: Tensor, context: Context | None = None, *plan: Any) -> Tensor:
        return self._law(self.net(x, context, *plan))

    def plan(self, *arguments: Any) -> Any:
        net: Any = self.net
        return net.plan(*arguments)

    def start(self, batch: int, context: Context | None = None, *plan: Any) -> Any:
        net: Any = self.net
        return net.start(batch, context, *plan)

    def read(self, x: Tensor, state: Any) -> None:
        net: Any = self.net
        net.read(x, state)

    @torch.no_grad()
    def step(self, x: Tensor | None, state: Any) -> Tensor:
        net: Any = self.net
        return self._law(net.step(x, state))

    @torch.no_grad()
    def ahead(self, x: Tensor, begins: Sequence[int], state: Any) -> Tensor:
        net: Any = self.net
        return self._law(net.ahead(x, begins, state))

    @property
    def ahead_cost(self) -> float:
        net: Any = self.net
        cost: float = net.ahead_cost
        return cost


class RankedSequence(SequenceCategorical):
    r"""Symbols from left to right; each is mapped to its rank, and ranks follow a mixture of C shared laws.

    .. math:: p(x_i \mid x_{<i}) = \sum_{c=1}^{C} w_{ic} \, S_{c, z_i}, \qquad
        z_i = \text{rank of } x_i \text{ by the logits } l_i(x_{<i})

    It is a discrete flow of one autoregressive layer (`dflow.bijectors.Autoregressive` with
    `dflow.elementwise.ModRank`). A factorized base has one law of ranks for every context; here the net also
    gives the weights w of C laws S, so that an entry can be more certain in one context than in another. As
    it is a law from left to right it is drawn, coded and drafted as one, with a step for each symbol.

    Logits have no gradient by the likelihood. They learn to predict the symbols by cross-entropy, while w and
    S learn by the exact likelihood (`dflow.objectives`).

    Args:
        net: a `SequenceNet` from left to right with ``K + components`` numbers for each entry.
        order: see `SequenceCategorical`.
        dim: number of entries.
        K: size of the alphabet.
        components: C.

    Raises:
        ValueError: components < 1.

    Source: Lindt and Hoogeboom 2021, arXiv 2107.11625 (maps by sorting probabilities).
    """

    def __init__(self, net: nn.Module, order: Tensor, dim: int, K: int, components: int) -> None:
        if components < 1:
            raise ValueError(f"components must be at least 1, found {components}")
        super().__init__(_Ranked(net, K, components), order, dim)

    def losses(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, dim, K)``, and the log-likelihood of each entry, which trains w and S."""
        ranked: Any = self.net
        logits, by_rank = ranked.parts(at_least_float32(ranked.net(x, context)))
        line = logits.detach().gather(-1, x[..., None])
        symbols = torch.arange(logits.shape[-1], device=x.device)
        before = (logits.detach() > line) | ((logits.detach() == line) & (symbols < x[..., None]))
        return logits, by_rank.gather(-1, before.sum(-1, keepdim=True))[..., 0]
