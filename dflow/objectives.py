"""Objectives of training, and the units of results.

Four rules train a discrete flow, or any law with a map on Z/K in it (`dflow.distributions.Spectra`):

- ``straight_through``: the exact likelihood of one-hot rows, with straight-through gradients through the
  arg-max of every layer (Bengio et al. 2013; Tran et al. 2019); with ``noise`` 1 in the estimator it is the
  Gumbel-softmax rule (Jang et al. 2017; Maddison et al. 2017).
- ``layerwise``: the conditioner of each layer learns to predict the symbols that the layer maps, by
  cross-entropy (Lindt and Hoogeboom 2021, arXiv 2107.11625). No gradient crosses a layer and none is biased.
- ``expected``: each layer of shifts or affine maps minimises the mean cost of its latent under the soft-max,
  ``E_{s ~ softmax(l / temperature)} -log b(x - s)`` with b the base's law at the place of the latent: the
  exact gradient of the relaxed layer next to the base, from all K costs at once. Couplings from fine to
  coarse map each entry once, so each is next to the base. Where several layers map an entry, each minimises
  the cost as if it were the last (greedy), and no gradient crosses a layer.
- ``likelihood``: the exact likelihood of symbols, for laws in which it has a gradient for all parameters (no
  bijector).

One trains an any-order model, for all orders at once:

- ``masked``: the bound of `AnyOrder.elbo` (Hoogeboom et al. 2022, arXiv 2110.02037).

Under every rule, parameters for which the exact likelihood of symbols has a gradient (spectra and their
weights) are trained by it.

Dequantized images and tables are trained by a bound (``elbo``, ``iwbo``, ``renyi``), integer flows by
``likelihood``: the exact one of floats that hold integers, with straight-through gradients through rounding
(Hoogeboom et al. 2019, arXiv 1905.07376).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import singledispatch
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow import bijectors
from dflow.bijectors import Permute, Reverse
from dflow.bijectors.conditioner import Conditioned
from dflow.config import InputError
from dflow.core import Bijector, Context, Distribution, Elementwise, Known, only_given, present
from dflow.dequantize import Bound, Dequantized, Elbo, Iwbo, Renyi, TruncatedNormal
from dflow.distributions import Categorical, Gaussian, RankedSequence, Spectra, Walk
from dflow.distributions.logistic import Logistics
from dflow.distributions.window import ConditionalWindow
from dflow.flows import Flow, Infilled, Split
from dflow.flows.walk import innermost, scattered
from dflow.nn.classifier import head_of
from dflow.ops.modular import one_hot
from dflow.ops.straight_through import StraightThrough

Rule = Literal["likelihood", "straight_through", "gumbel", "layerwise", "expected", "masked"]
#: Rules for models of images and tables: the bound that is maximised.
BoundRule = Literal["elbo", "iwbo", "renyi"]


def bits(nats: float, count: float) -> float:
    """Nats to bits for each of ``count`` things (characters, symbols, dimensions).

    >>> bits(math.log(2) * 10, 5)
    2.0
    """
    return nats / (count * math.log(2))


def default_rule(distribution: Distribution) -> Rule:
    """The rule that trains every parameter of ``distribution`` and learns most in a given time.

    Measured by ``scripts/bench_rules.py``: layerwise before gumbel before straight_through, which at
    temperature 1 does not leave the identity even with ranks.

    Raises:
        InputError: a map on Z/K that no rule can train.
    """
    if isinstance(distribution, Walk):
        return "masked"
    if not _maps(distribution):
        return "likelihood"
    rules = _able(distribution)
    if not rules:
        reasons = "; ".join(str(_obstacle(rule, distribution)) for rule in _OF_MAPS)
        raise InputError(f"no rule trains this model: {reasons}")
    return rules[0]


def check_rule(rule: Rule, distribution: Distribution) -> None:
    """Raise InputError for a rule under which some parameter of ``distribution`` would not learn."""
    rules = _able(distribution) if _maps(distribution) else [default_rule(distribution)]
    if rule not in rules:
        reason = _obstacle(rule, distribution) if rule in _OF_MAPS and _maps(distribution) else None
        advice = f"use {' or '.join(rules)}" if rules else default_rule(distribution)
        raise InputError(f"{reason or f'rule {rule!r} does not train this model'}; {advice}")
    innermost = closed_form(distribution)
    for module in distribution.modules():
        if _counted(module) and module is not innermost:
            raise InputError(
                "only the innermost base has a closed form; let the conditional of a split learn logits"
            )


#: Rules for maps on Z/K, the one that learns most in a given time first.
_OF_MAPS: tuple[Rule, ...] = ("layerwise", "gumbel", "straight_through", "expected")


def _able(distribution: Distribution) -> list[Rule]:
    return [rule for rule in _OF_MAPS if _obstacle(rule, distribution) is None]


def _obstacle(rule: Rule, distribution: Distribution) -> str | None:
    """Why a rule of `_OF_MAPS` cannot train all of ``distribution``; None where it can."""
    for module in {type(m): m for m in _maps(distribution)}.values():
        name = type(module).__name__
        if rule == "layerwise" and not module.predicts:
            return f"rule 'layerwise' cannot train {name}, whose params do not predict the symbol"
        if rule == "expected" and not hasattr(module, "expected"):
            return f"rule 'expected' needs the mean cost over maps, and {name} has no 'expected'"
        if rule == "gumbel" and not hasattr(module, "estimator"):
            return f"rule 'gumbel' adds noise in the estimator of a map, and {name} has no 'estimator'"
        if rule in ("gumbel", "straight_through") and not _takes_rows(module, _alphabet(distribution)):
            return (
                f"rule {rule!r} needs {name}.forward to take one-hot rows (batch, dim, K), and to return "
                "rows with a gradient for params"
            )
    flows = [m for m in distribution.modules() if isinstance(m, Flow)]
    if rule in ("gumbel", "straight_through"):
        bases = {type(flow.base): flow.base for flow in flows}.values()
        blind = [type(base).__name__ for base in bases if not _scores_rows(base, distribution)]
        return f"rule {rule!r} needs {blind[0]}.log_prob to take one-hot rows too" if blind else None
    if _trained_bases(distribution):
        return f"rule {rule!r} trains no base; use a Categorical with learned=False (base 'factorized')"
    for flow in flows:
        for layer in flow.bijector.layers():
            if not isinstance(layer, Conditioned) and any(True for _ in layer.parameters()):
                return f"rule {rule!r} trains Coupling and Autoregressive layers, not {type(layer).__name__}"
    return None


def _takes_rows(module: Elementwise, K: int) -> bool:
    """Whether the differentiable mode of a map has a gradient for its params, found by a trial."""
    device = next((t.device for t in module.buffers()), torch.device("cpu"))
    with torch.enable_grad():
        params = torch.zeros(1, 1, module.num_params, device=device, requires_grad=True)
        rows = one_hot(torch.zeros(1, 1, dtype=torch.int64, device=device), K)
        try:
            z, _ = module.forward(rows, params)
        except Exception:  # code of users may fail in any way on one-hot rows
            return False
    return z.shape == rows.shape and z.requires_grad


@torch.no_grad()
def _scores_rows(base: Distribution, law: Distribution) -> bool:
    """Whether a base scores one-hot rows; all bases of dflow do, others are tried."""
    dim = getattr(base, "dim", None)
    if type(base).__module__.startswith("dflow.") or not isinstance(dim, int):
        return True
    tensor = next(iter((*base.parameters(), *base.buffers(), torch.zeros(()))))
    zeros = torch.zeros(1, dim, dtype=torch.int64, device=tensor.device)
    try:
        return base.log_prob(one_hot(zeros, _alphabet(law))).shape == (1,)
    except Exception:
        return False


def _maps(distribution: nn.Module) -> list[Elementwise]:
    return [m for m in distribution.modules() if isinstance(m, Elementwise)]


def _alphabet(distribution: nn.Module) -> int:
    """The size K of the alphabet: the attribute of the first part that has it, a map or a base."""
    for module in distribution.modules():
        if isinstance(K := getattr(module, "K", None), int):
            return K
    raise InputError("no part of the model has the size of its alphabet: give the map an attribute K")


def _trained_bases(distribution: nn.Module) -> bool:
    """Whether some flow has a base with learned parameters, which need the likelihood of its latents."""
    flows = (m for m in distribution.modules() if isinstance(m, Flow))
    return not all(_counted(flow.base) for flow in flows)


def closed_form(distribution: Distribution) -> Categorical | None:
    """The innermost base where it is factorized and a running average of latents, else None."""
    base = innermost(distribution)
    return base if _counted(base) else None


def _counted(base: nn.Module) -> TypeGuard[Categorical]:
    """Whether a base is a running average of latents, without learned parameters."""
    return isinstance(base, Categorical) and not base.learned


def estimators(distribution: nn.Module) -> set[StraightThrough]:
    """The straight-through estimators in use; a schedule sets the temperature of all of them."""
    estimators = {getattr(m, "estimator", None) for m in _maps(distribution)}
    return {e for e in estimators if isinstance(e, StraightThrough)}


def turns(distribution: Distribution) -> int:
    """Number of budgets of a law that training takes in turn, one a step; 1 for most laws.

    An any-order network is trained for all orders at once (rule ``masked``).
    """
    return 1 if isinstance(distribution, Walk) else len(distribution.budgets)


class KnownMask:
    """Which entries of a batch are known, bool ``(dim,)`` on the CPU.

    What wraps an objective for several processes moves the tensors among its arguments to the accelerator,
    and shapes follow from this one: so it is handed over in an object that it does not know.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask


class Objective(nn.Module):
    """The loss of a batch under a rule; a module, so that processes can average its gradients.

    Args:
        distribution: the model.
        rule: see the module.
    """

    def __init__(self, distribution: Distribution, rule: Rule) -> None:
        super().__init__()
        check_rule(rule, distribution)
        self.distribution, self.rule = distribution, rule

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, turn: int = 0, known: KnownMask | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Loss in nats summed over the batch, and the counts of latents for a base in closed form.

        Args:
            x: symbols, int64 ``(batch, dim)``.
            lengths: int64 ``(batch,)``, or None.
            turn: index, below `turns`, of the budget whose loss is computed, in ascending order.
            known: entries that are known: the loss is that of the others, given these.
        """
        law = self.distribution
        if turns(law) > 1:
            law = law.at(law.budgets[turn])
        context = Context(lengths=lengths, known=None if known is None else Known(x, known.mask))
        loss, z, of_base = _loss(law, x, context, self.rule)
        base = closed_form(law)
        return loss, None if base is None else base.statistics(z, of_base)


#: A loss; and the latents at the innermost base, with their context.
_Loss = tuple[Tensor, Tensor, Context | None]


@singledispatch
def _loss(law: Distribution, x: Tensor, context: Context | None, rule: Rule) -> _Loss:
    """Loss of symbols ``x`` under a rule, in nats: for a leaf, minus the exact log-likelihood."""
    rows = rule in ("straight_through", "gumbel") and _maps(law)
    return -law.log_prob(_rows(law, x) if rows else x, context).sum(), x, context


@_loss.register
def _(law: Split, x: Tensor, context: Context | None, rule: Rule) -> _Loss:
    (x_a, of_base), (x_b, of_conditional) = law.parts(x, context)
    loss, z, of_innermost = _loss(law.base, x_a, of_base, rule)
    return loss + _loss(law.conditional, x_b, of_conditional, rule)[0], z, of_innermost


@_loss.register
def _(law: Infilled, x: Tensor, context: Context | None, rule: Rule) -> _Loss:
    return _loss(law.law, *law.hidden(x, context), rule)


@_loss.register
def _(law: Flow, x: Tensor, context: Context | None, rule: Rule) -> _Loss:
    if rule in ("layerwise", "expected"):
        loss, z = _by_layers(law, x, context, rule)
        return loss, z, context
    z, log_det = law.transform(_rows(law, x), context)
    return -(law.base.log_prob(z, context) + log_det).sum(), *_latent(law.base, z, context)


@_loss.register
def _(law: Walk, x: Tensor, context: Context | None, rule: Rule) -> _Loss:
    return -law.model.elbo(x, context).sum(), x, context


def _rows(d: Distribution, x: Tensor) -> Tensor:
    return one_hot(x, _alphabet(d), next(d.parameters()).dtype)


@_loss.register
def _(law: Spectra, x: Tensor, context: Context | None, rule: Rule) -> _Loss:
    """The rule trains the map; the exact likelihood of the latents always trains weights and spectra."""
    if rule in ("straight_through", "gumbel"):
        return -law.log_prob(_rows(law, x), context).sum(), x, context
    params, log_weights = law.params(context)
    if rule == "expected":
        elementwise: Any = law.elementwise
        terms = elementwise.expected(x, params, -law.log_law(log_weights))
    else:
        z, _ = law.elementwise.forward(x, params.detach())
        terms = _cross_entropy(params, x) - law.log_latent(z, log_weights)
    mask = present(context, *x.shape)
    return (terms if mask is None else torch.where(mask, terms, 0.0)).sum(), x, context


@_loss.register
def _(law: RankedSequence, x: Tensor, context: Context | None, rule: Rule) -> _Loss:
    """As of `Spectra`: the map learns by cross-entropy, weights and shared laws by the exact likelihood."""
    params, log_p = law.losses(x, context)
    terms = _cross_entropy(params, x) - log_p
    mask = present(context, *x.shape)
    return (terms if mask is None else torch.where(mask, terms, 0.0)).sum(), x, context


def _cross_entropy(params: Tensor, x: Tensor) -> Tensor:
    """Cross-entropy of each entry, ``(batch, dim)``, in nats."""
    return F.cross_entropy(params.float().flatten(0, 1), x.flatten(), reduction="none").view(x.shape)


def _by_layers(flow: Flow, x: Tensor, context: Context | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """The sum of the losses of the layers, which each minimise their own; and the latent of ``x``."""
    loss = torch.zeros((), device=x.device)
    layers = list(flow.bijector.layers())
    places = _places(layers, x, context) if rule == "expected" else [x] * len(layers)
    base = closed_form(flow)
    for layer, place in zip(layers, places, strict=True):
        if not isinstance(layer, Conditioned):
            x, _ = layer(x, context)
            continue
        params, moved = layer.params(x, context), layer.moved(context)
        old = x.index_select(1, moved)
        elementwise: Any = layer.elementwise
        if rule == "expected" and base is not None:
            cost = -base.log_law().to(params.dtype)[base.classes_in(context)[place.index_select(1, moved)]]
            terms = elementwise.expected(old, params, cost)
        else:
            terms = _cross_entropy(params, old)
        new, _ = layer.elementwise(old, params.detach())
        mask = present(context, *x.shape)
        if mask is not None:
            mask = mask.index_select(1, moved)
            terms, new = torch.where(mask, terms, 0.0), torch.where(mask, new, old)
        loss = loss + terms.sum()
        x = x.index_copy(1, moved, new)
    return loss, x


def _places(layers: list[Bijector], x: Tensor, context: Context | None) -> list[Tensor]:
    """For each layer, the place of each of its entries in the latent, ``(batch, dim)``."""
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    places = []
    for layer in reversed(layers):
        places.append(place)
        if isinstance(layer, (Permute, Reverse)):
            place, _ = layer.inverse(place, context)
    return places[::-1]


@torch.no_grad()
def refit(distribution: Distribution, batches: Iterable[tuple[Tensor, Context | None]]) -> None:
    """Set a base in closed form to the latents of ``batches`` of (symbols, context), exactly.

    For a fixed bijector the optimal factorized base has the marginals of the latents. Nothing happens where
    there is no such base.
    """
    base = closed_form(distribution)
    if base is None:
        return
    total: Tensor | None = None
    for x, context in batches:
        counts = base.statistics(*_latent(distribution, x, context))
        total = counts if total is None else total + counts
    if total is not None:
        base.assign(total)


def _latent(d: Distribution, x: Tensor, context: Context | None) -> tuple[Tensor, Context | None]:
    """The latent of ``x`` at the innermost base, in either mode, with its context."""
    *_, (_, z, of_base) = scattered(d, x, context)
    return z, of_base


# -- models of images and tables -----------------------------------------------------------------------------


def bound_of(rule: str, draws: int, alpha: float) -> Bound:
    """The bound of a training rule: elbo (also for auto), iwbo or renyi.

    Raises:
        InputError: an importance-weighted or Renyi bound of one draw, which is the elbo.
    """
    if rule in ("elbo", "auto"):
        return Elbo(draws)
    if draws < 2:
        raise InputError(f"rule {rule!r} with {draws} draw is the elbo; set train.draws to 2 or more")
    return Iwbo(draws) if rule == "iwbo" else Renyi(draws, alpha)


def guaranteed(bound: Bound, draws: int) -> Bound:
    """The bound that evaluates a model trained under ``bound``: the elbo of one draw, or the iwbo."""
    return Elbo() if isinstance(bound, Elbo) else Iwbo(max(bound.k, draws))


def gaussian(law: Dequantized) -> Gaussian | None:
    """The density where it has a closed form, the moments of the dequantized data; else None."""
    return law.density if isinstance(law.density, Gaussian) and not law.density.learned else None


class BoundObjective(nn.Module):
    """Minus a bound; a module, so that processes can average its gradients."""

    def __init__(self, law: Dequantized, bound: Bound) -> None:
        super().__init__()
        law.check_bound(bound)
        self.law, self.bound = law, bound

    def forward(self, x: Tensor, lengths: None = None) -> tuple[Tensor, Tensor | None]:
        """Loss in nats summed over the batch, and the moments of a Gaussian density in closed form.

        Args:
            x: integers ``(batch, dim)``.
            lengths: None.
        """
        only_given(Context(lengths=lengths))
        values, statistics = self.law.objective(x, self.bound)
        return -values.sum(), statistics


@torch.no_grad()
def initialize(law: Dequantized, x: Tensor, generator: torch.Generator) -> None:
    """Set the scales of a flow, or the moments of a Gaussian, from data with logistic noise in their cells.

    On hypercubes that is uniform noise.
    """
    z = torch.logit(torch.rand(len(x), law.partition.count(x.shape[1]), generator=generator), 1e-6)
    v, _ = law.partition.place(z, law.standardize(x))
    if isinstance(law.density, Gaussian):
        law.density.initialize(law.density.statistics(v))
        # Truncated normals depend on the density: a few rounds of moments come near their fixed point.
        for _ in range(_ROUNDS * isinstance(law.dequantizer, TruncatedNormal)):
            law.density.initialize(law.density.statistics(law.dequantize(x, generator)))
    else:
        bijectors.initialize(law.density, v)


#: Rounds of moments at the start of a density with truncated normals.
_ROUNDS = 10


class LabelObjective(nn.Module):
    """The loss of a classifier's head; a module, so that processes can average its gradients."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """Loss in nats summed over the batch, of integers ``(batch, dim)`` and labels ``(batch,)``."""
        return head_of(self.net).loss(self.net(x), labels), None


class ExactObjective(nn.Module):
    """Minus the exact log-likelihood of integers; a module, so that processes can average its gradients."""

    def __init__(self, law: Distribution) -> None:
        super().__init__()
        self.law = law

    def forward(self, x: Tensor, lengths: None = None) -> tuple[Tensor, Tensor | None]:
        """Loss in nats summed over the batch, and None, since no part has a closed form.

        Args:
            x: integers ``(batch, dim)``.
            lengths: None.
        """
        only_given(Context(lengths=lengths))
        return -self.law.log_prob(x.to(next(self.law.parameters()).dtype)).sum(), None


@torch.no_grad()
def initialize_integers(law: Distribution, x: Tensor, context: Context | None = None) -> None:
    """Set locations and scales of the laws of an integer flow from data, entry by entry."""
    for leaf, values, of_leaf in scattered(law, x, context):
        if isinstance(leaf, (Logistics, ConditionalWindow)):
            leaf.initialize(values, of_leaf)
