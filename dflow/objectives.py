"""What training minimises, and the units in which results are told.

Three rules train a discrete flow:

- ``straight_through``: the exact likelihood of one-hot rows, with straight-through gradients through the
  arg-max of every layer (Bengio et al. 2013; Tran et al. 2019); with ``noise`` 1 in the estimator it is the
  Gumbel-softmax rule (Jang et al. 2017; Maddison et al. 2017).
- ``layerwise``: the conditioner of each layer learns to predict the symbols it will move, by cross-entropy
  (Lindt and Hoogeboom 2021, arXiv 2107.11625). No gradient crosses a layer and none is biased.
- ``likelihood``: the exact likelihood of symbols, for laws whose parameters it can reach (no bijector).

One trains an any-order model, for all orders at once:

- ``masked``: the bound of `AnyOrder.elbo` (Hoogeboom et al. 2022, arXiv 2110.02037).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.bijectors import Autoregressive, Chain, Coupling
from dflow.config import InputError
from dflow.core import Bijector, Context, Distribution
from dflow.distributions import Categorical, Walk
from dflow.elementwise import ModRank, ModShift
from dflow.elementwise.discrete import Discrete
from dflow.flows import Flow
from dflow.ops.lengths import present
from dflow.ops.modular import one_hot
from dflow.ops.straight_through import StraightThrough

Rule = Literal["likelihood", "straight_through", "gumbel", "layerwise", "masked"]


def bits(nats: float, count: float) -> float:
    """Nats to bits for each of ``count`` things (characters, symbols, dimensions).

    >>> bits(math.log(2) * 10, 5)
    2.0
    """
    return nats / (count * math.log(2))


def default_rule(distribution: Distribution) -> Rule:
    """The rule that reaches every parameter of ``distribution`` with the least bias."""
    if isinstance(distribution, Walk):
        return "masked"
    if not isinstance(distribution, Flow):
        return "likelihood"
    if closed_form(distribution) is None:
        return "straight_through"
    rankable = all(
        isinstance(m, (ModRank, ModShift)) for m in distribution.modules() if isinstance(m, Discrete)
    )
    return "layerwise" if rankable else "straight_through"


def check_rule(rule: Rule, distribution: Distribution) -> None:
    """Raise InputError for a rule under which some parameter of ``distribution`` would not learn."""
    flow = isinstance(distribution, Flow)
    if flow:
        fits, way = rule not in ("likelihood", "masked"), "straight_through, gumbel or layerwise"
    else:
        way = default_rule(distribution)
        fits = rule == way
    if not fits:
        raise InputError(f"rule {rule!r} does not train this model; use {way}")
    if rule == "layerwise":
        if closed_form(distribution) is None:
            raise InputError("rule 'layerwise' trains no base; use base 'factorized', or 'straight_through'")
        for module in distribution.modules():
            if isinstance(module, Discrete) and not isinstance(module, (ModRank, ModShift)):
                raise InputError(
                    f"rule 'layerwise' has nothing to teach the scale of {type(module).__name__}; "
                    "use elementwise 'shift' or 'rank', or rule 'straight_through' or 'gumbel'"
                )


def closed_form(distribution: Distribution) -> Categorical | None:
    """The factorized base that is a running average of latents, where there is one."""
    base = distribution.base if isinstance(distribution, Flow) else None
    return base if isinstance(base, Categorical) and not base.learned else None


def estimators(distribution: nn.Module) -> set[StraightThrough]:
    """The straight-through estimators in use; a schedule moves them all."""
    return {m.estimator for m in distribution.modules() if isinstance(m, Discrete)}


class Objective(nn.Module):
    """Loss of one batch under a rule, as a module so that processes can share its gradients.

    Args:
        distribution: the model.
        rule: see the module.
    """

    def __init__(self, distribution: Distribution, rule: Rule) -> None:
        """See the class."""
        super().__init__()
        check_rule(rule, distribution)
        self.distribution, self.rule = distribution, rule

    def forward(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor | None]:
        """Loss in nats summed over the batch, and counts of latents for a base in closed form.

        Args:
            x: symbols, int64 ``(batch, dim)``.
            context: lengths, int64 ``(batch,)``, or None.
        """
        d = self.distribution
        if isinstance(d, Walk):
            return -d.model.elbo(x, context).sum(), None
        if not isinstance(d, Flow):
            return -d.log_prob(x, context).sum(), None
        if self.rule == "layerwise":
            loss, z = _layerwise(d.bijector, x, context)
        else:
            dtype = next(d.parameters()).dtype
            K = next(m.K for m in d.modules() if isinstance(m, Discrete))
            z, log_det = d.transform(one_hot(x, K, dtype), context)
            loss = -(d.base.log_prob(z, context) + log_det).sum()
        base = closed_form(d)
        return loss, None if base is None else base.statistics(z, context)


def _layerwise(bijector: Bijector, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Sum over layers of the cross-entropy of what each moves; and the latent of symbols ``x``."""
    loss = torch.zeros((), device=x.device)
    for layer in _layers(bijector):
        if not isinstance(layer, (Coupling, Autoregressive)):
            x, _ = layer(x, context)
            continue
        params = layer.params(x, context)
        moved = (
            layer.hidden_index if isinstance(layer, Coupling) else torch.arange(x.shape[1], device=x.device)
        )
        old = x.index_select(1, moved)
        terms = F.cross_entropy(params.float().flatten(0, 1), old.flatten(), reduction="none").view(old.shape)
        new, _ = layer.elementwise(old, params.detach())
        mask = present(context, x.shape[1])
        if mask is not None:
            mask = mask.index_select(1, moved)
            terms, new = torch.where(mask, terms, 0.0), torch.where(mask, new, old)
        loss = loss + terms.sum()
        x = x.index_copy(1, moved, new)
    return loss, x


def _layers(bijector: nn.Module) -> Iterator[nn.Module]:
    if isinstance(bijector, Chain):
        for child in bijector.bijectors:
            yield from _layers(child)
    else:
        yield bijector


@torch.no_grad()
def refit(distribution: Distribution, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Set a base in closed form to the latents of ``batches`` of (symbols, lengths), exactly.

    The optimum of a factorized base for a fixed bijector is the marginals of its latents. Nothing happens
    where there is no such base.
    """
    base = closed_form(distribution)
    if base is None or not isinstance(distribution, Flow):
        return
    total: Tensor | None = None
    for x, context in batches:
        counts = base.statistics(distribution.transform(x, context)[0], context)
        total = counts if total is None else total + counts
    if total is not None:
        base.assign(total)
