"""The loss of a model in training mode, by its family's rule, and updates of its parts in closed form.

Parts in closed form (counts of a base, moments of a density) have no gradient. They are running averages over
the batches for which gradients are recorded, as in batch normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dflow import objectives
from dflow.config import InputError
from dflow.core import Context, Distribution
from dflow.dequantize import Dequantized, Elbo
from dflow.distributions import CovarianceNormal, Gaussian

#: Momentum of the running averages of parts in closed form, a batch; the default of `dflow train`.
MOMENTUM = 0.98


def trained_by_likelihood(law: Distribution) -> bool:
    """Whether the exact log-likelihood of symbols trains every part of ``law``.

    A law that can be drawn in several numbers of calls has several likelihoods, which training alternates.
    """
    likelihood = objectives.default_rule(law) == "likelihood" and objectives.closed_form(law) is None
    return likelihood and objectives.turns(law) == 1


def reached(law: Distribution) -> bool:
    """Whether the exact log-likelihood of symbols has a gradient for every parameter of ``law``."""
    return objectives.default_rule(law) in ("likelihood", "masked")


def loss_of_symbols(law: Distribution, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Loss in nats, summed over symbols int64 ``(batch, dim)``, by the rule of `objectives.default_rule`."""
    rule = objectives.default_rule(law)
    objective, base = objectives.Objective(law, rule), objectives.closed_form(law)
    moves = torch.is_grad_enabled()
    if base is not None and moves and not bool(base.counts.any()):
        # Under a uniform base all latents cost the same, so that no map would learn.
        with _evaluating(law):
            objectives.refit(law, [(x, Context(lengths=lengths))])
    # One of the budgets of the law at random; `dflow train` takes all of them in turn.
    budgets = objectives.turns(law)
    turn = int(torch.randint(budgets, ())) if budgets > 1 else 0
    with _noise(law, float(rule == "gumbel")):
        loss, counts = objective(x, lengths, turn)
    if base is not None and counts is not None and moves:
        base.update(counts, MOMENTUM)
    total: Tensor = loss
    return total


def elbo_of_values(law: Dequantized, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The evidence lower bound in nats ``(batch,)`` of integers ``(batch, dim)``, from one draw."""
    density = objectives.gaussian(law)
    if density is None:
        return law.objective(x, Elbo(), generator)[0]
    moves = torch.is_grad_enabled()
    if moves and not bool(density.moments.any()):
        initialize(law, x)
    with _copies(density):
        values, statistics = law.objective(x, Elbo(), generator)
    if moves and statistics is not None:
        density.update(statistics, MOMENTUM)
    return values


def initialize(law: Dequantized | Distribution, x: Tensor) -> None:
    """Start a model of images or tables from data, integers ``(batch, dim)``.

    Raises:
        InputError: fewer rows than a full covariance needs.
    """
    if isinstance(law, Dequantized):
        if isinstance(law.density, CovarianceNormal) and len(x) <= x.shape[1]:
            raise InputError(
                f"a covariance of {x.shape[1]} entries needs more rows than that to start from, found "
                f"{len(x)}; call model.initialize(pixel_values) with more of the data before the training"
            )
        seed = int(torch.randint(1 << 62, ()))
        objectives.initialize(law, x, torch.Generator().manual_seed(seed))
    elif objectives.closed_form(law) is not None:
        with _evaluating(law):
            objectives.refit(law, [(x.long(), None)])
    else:
        objectives.initialize_integers(law, x.to(next(law.parameters()).dtype))


class _OfTraining(torch.autograd.Function):
    """The identity, without a gradient: see `evaluated`."""

    @staticmethod
    def forward(ctx: object, loss: Tensor) -> Tensor:
        """The loss."""
        return loss.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        """Refuse."""
        raise InputError(
            "the loss of a flow in evaluation mode is its exact cost, whose gradient does not reach its "
            "maps; call model.train() before the forward pass"
        )


def evaluated(loss: Tensor) -> Tensor:
    """``loss``, an exact cost without a gradient for some parameters; its backward pass is refused."""
    guarded: Tensor = _OfTraining.apply(loss)  # type: ignore[no-untyped-call]
    return guarded


@contextmanager
def _evaluating(law: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, and no update of running averages."""
    modules = [module for module in law.modules() if module.training]
    law.eval()
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def _noise(law: nn.Module, noise: float) -> Iterator[None]:
    """Set the Gumbel noise of the straight-through estimators for a while."""
    before = {estimator: estimator.noise for estimator in objectives.estimators(law)}
    for estimator in before:
        estimator.noise = noise
    try:
        yield
    finally:
        for estimator, value in before.items():
            estimator.noise = value


@contextmanager
def _copies(law: Gaussian) -> Iterator[None]:
    """Replace its buffers by copies for a while, since a backward pass needs the values before an update."""
    before = dict(law.named_buffers(recurse=False))
    for name, buffer in before.items():
        setattr(law, name, buffer.clone())
    try:
        yield
    finally:
        for name, buffer in before.items():
            setattr(law, name, buffer)
