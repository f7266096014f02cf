"""The loss of a model in training mode: that of its family's rule; and what moves while it is trained.

What has a closed form (counts of a base, moments of a density) has no gradient. It follows the batches while
gradients are recorded, as the running averages of a normalisation do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dflow import objectives
from dflow.config import InputError
from dflow.core import Distribution
from dflow.dequantize import Dequantized, Elbo
from dflow.distributions import CovarianceNormal, Gaussian

#: Memory of what has a closed form, a batch; the default of `dflow train`.
MOMENTUM = 0.98


def trained_by_likelihood(law: Distribution) -> bool:
    """Whether minus the exact log-likelihood of symbols is what trains every part of ``law``.

    A law of several numbers of calls has as many likelihoods, which training takes by turns.
    """
    likelihood = objectives.default_rule(law) == "likelihood" and objectives.closed_form(law) is None
    return likelihood and objectives.turns(law) == 1


def reached(law: Distribution) -> bool:
    """Whether the gradient of the exact log-likelihood of symbols reaches every parameter of ``law``."""
    return objectives.default_rule(law) in ("likelihood", "masked")


def loss_of_symbols(law: Distribution, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Loss in nats, summed over symbols int64 ``(batch, dim)``, by the rule of `objectives.default_rule`."""
    rule = objectives.default_rule(law)
    objective, base = objectives.Objective(law, rule), objectives.closed_form(law)
    moves = torch.is_grad_enabled()
    if base is not None and moves and not bool(base.counts.any()):
        # Of a uniform base every latent costs the same, and no map would learn from it.
        with _evaluating(law):
            objectives.refit(law, [(x, lengths)])
    # Of the numbers of calls that a law is trained for one, at random: training takes all of them by turns.
    several = objectives.turns(law)
    turn = int(torch.randint(several, ())) if several > 1 else 0
    with _noise(law, float(rule == "gumbel")):
        loss, counts = objective(x, lengths, turn)
    if base is not None and counts is not None and moves:
        base.update(counts, MOMENTUM)
    found: Tensor = loss
    return found


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
    """An exact cost that reaches some of the parameters only: to train those alone is refused."""
    found: Tensor = _OfTraining.apply(loss)  # type: ignore[no-untyped-call]
    return found


@contextmanager
def _evaluating(law: nn.Module) -> Iterator[None]:
    """Within, no dropout, and no batch is averaged into a normalisation."""
    modules = [module for module in law.modules() if module.training]
    law.eval()
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def _noise(law: nn.Module, noise: float) -> Iterator[None]:
    """Within, the straight-through estimators draw by so much Gumbel noise."""
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
    """Within, its buffers are copies, which a backward pass may still need when they have moved on."""
    before = dict(law.named_buffers(recurse=False))
    for name, buffer in before.items():
        setattr(law, name, buffer.clone())
    try:
        yield
    finally:
        for name, buffer in before.items():
            setattr(law, name, buffer)
