# ruff: noqa: D102 - the methods are described in the base class
"""How a model is trained and judged: its objective, what moves with the steps, its cost, its rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from dflow import hf, objectives
from dflow.core import Context
from dflow.dequantize import Iwbo, TruncatedNormal
from dflow.distributions import Categorical, Gaussian
from dflow.ops.devices import widen
from dflow.train.material import Batch, Images, mix
from dflow.train.recipe import Schedule, TrainConfig

#: Entries of the data from which a Gaussian starts, which needs many rows.
_INITIAL_GAUSSIAN = 1 << 22
#: The same for a flow, whose layers are set channel by channel.
INITIAL_FLOW = 1 << 18
#: Images on which normalisations are re-estimated to show how good the binarized network is.
_REESTIMATED = 2560


@dataclass(frozen=True)
class Judgement:
    """How good a model is.

    Attributes:
        rank: a number that is least for the best model, the same on every process.
        shares: other figures of the evaluation, by name, for its line of metrics.
        notes: lines on them to print.
    """

    rank: float
    shares: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Method:
    """How a model is trained and judged; one whose likelihood is exact, unless a subclass says otherwise.

    Attributes:
        config: the settings of the training.
        objective: gives the loss of a batch in nats, summed, and statistics for a closed form or None.
        rule: the training rule.
        kind: the kind of the cost at an evaluation: "exact" or the name of a bound.
        rank_unit: the unit of the rank of a model, None where it is that of its cost.
    """

    rank_unit: str | None = None

    def __init__(self, config: TrainConfig, objective: nn.Module, rule: str, kind: str = "exact") -> None:
        self.config, self.objective, self.rule, self.kind = config, objective, rule, kind

    def nats(self, model: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        """Minus the log-likelihood of a batch, or its bound with random ``noise``: summed, float64."""
        log_p: Tensor = model.log_prob(*(tensor for tensor in batch if tensor is not None))
        return -widen(log_p).sum()

    def judge(self, model: Any, bits: float, device: torch.device) -> Judgement:
        """How good a model is that costs so many bits."""
        return Judgement(bits)

    def closed_form(self, model: Any) -> Any:
        """The part of a model that has a closed form and is moved by statistics, or None."""
        return None

    def momentum(self, step: int, fraction: float) -> float:
        """Memory of the part with a closed form, after a fraction of the training."""
        return self.config.base_momentum

    def turn(self, step: int) -> tuple[int, ...]:
        """Further arguments of the objective: of symbols, which of the laws of several budgets is trained."""
        return ()

    def schedule(self, step: int, fraction: float) -> None:
        """Set what moves with the training to its values at this step."""
        return

    def ready(self, model: Any, batches: Iterator[tuple[Tensor, Context]]) -> AbstractContextManager[None]:
        """Within it a model in evaluation mode is as it is to be evaluated and saved.

        ``batches`` are some of the training: of symbols, what is known and how long they are.
        """
        return nullcontext()


@final
class Symbols(Method):
    """A law of symbols of Z/K, whose maps, orders and base move with the training."""

    def __init__(self, config: TrainConfig, model: hf.DflowModel | hf.DflowImageModel) -> None:
        law = model.distribution
        rule = objectives.default_rule(law) if config.rule == "auto" else config.rule
        super().__init__(config, objectives.Objective(law, cast(objectives.Rule, rule)), rule)
        self.base = self.closed_form(model)
        self.estimators, self.turns = objectives.estimators(law), objectives.turns(law)

    def closed_form(self, model: Any) -> Categorical | None:
        return objectives.closed_form(model.distribution)

    def turn(self, step: int) -> tuple[int, ...]:
        # From the seed and the step, so that all processes and resumed runs take the same.
        return (mix(self.config.seed + 2, step) % self.turns,)

    def schedule(self, step: int, fraction: float) -> None:
        config = self.config
        noise = config.noise or (Schedule(1.0, 0.0) if self.rule == "gumbel" else Schedule(0.0, 0.0))
        for estimator in self.estimators:
            estimator.temperature = config.temperature.at(fraction)
            estimator.noise = noise.at(fraction)
        if self.base is not None:
            self.base.peak = config.peak.at(fraction) if config.peak and fraction < config.peak.until else 0.0

    @contextmanager
    def ready(self, model: Any, batches: Iterator[tuple[Tensor, Context]]) -> Iterator[None]:
        """With a base at the exact optimum for its weights.

        In training the base is a running average over weights of earlier steps, and may be pulled; it is
        again so afterwards.
        """
        base = self.closed_form(model)
        if base is None:
            yield
            return
        peak, counts = base.peak, base.counts.clone()
        base.peak = 0.0
        objectives.refit(model.distribution, batches)
        try:
            yield
        finally:
            base.peak = peak
            base.counts.copy_(counts)


@final
class Bounds(Method):
    """Integers under a density: bounds of the likelihood."""

    def __init__(self, config: TrainConfig, model: hf.DflowImageModel, data: Images) -> None:
        self.law = law = model.dequantized
        self.bound = objectives.bound_of(config.rule, config.draws, config.alpha)
        self.evaluated = objectives.guaranteed(self.bound, config.eval_draws)
        objective = objectives.BoundObjective(law, self.bound)
        super().__init__(config, objective, self.bound.name, f"bound: {self.evaluated.name}")
        x = data.initial(_INITIAL_GAUSSIAN if isinstance(law.density, Gaussian) else INITIAL_FLOW)
        objectives.initialize(law, x, torch.Generator().manual_seed(config.seed))

    def nats(self, model: hf.DflowImageModel, batch: Batch, noise: torch.Generator) -> Tensor:
        # At once no more draws than a step of the training holds.
        bounds = model.dequantized.assess(batch[0], self.evaluated.k, self.bound.k, noise)
        return -(bounds.iwbo if isinstance(self.evaluated, Iwbo) else bounds.elbo).sum()

    def closed_form(self, model: hf.DflowImageModel) -> Any:
        return objectives.gaussian(model.dequantized)

    def momentum(self, step: int, fraction: float) -> float:
        momentum, dequantizer = self.config.base_momentum, self.law.dequantizer
        if not isinstance(dequantizer, TruncatedNormal) and not any(True for _ in dequantizer.parameters()):
            return momentum
        # The moments lag behind a dequantizer that still moves, and in the end it hardly does: the window
        # grows with the training.
        return min(momentum, 1 - 1 / (32 + step * (1 + 2 * fraction) / 4))


@final
class Likelihood(Method):
    """Integers under an integer flow: the likelihood itself."""

    def __init__(self, config: TrainConfig, model: hf.DflowImageModel, data: Images) -> None:
        super().__init__(config, objectives.ExactObjective(model.distribution), "likelihood")
        objectives.initialize_integers(model.distribution, data.initial(INITIAL_FLOW))


@final
class Classification(Method):
    """Labels of images under a classifier; the cost is that of the propagated law.

    The best model is that with the fewest errors, binarized where it can be: bits grow with the certainty
    of a few wrong answers while errors still fall.
    """

    rank_unit = "of the images wrong"

    def __init__(self, config: TrainConfig, model: hf.DflowClassifier, data: Images) -> None:
        objective = objectives.LabelObjective(model.net)
        settings = model.config.settings()
        super().__init__(config, objective, settings.head, "of the network as it is evaluated")
        self.data, self.binarized = data, settings.kind != "float"

    def nats(self, model: hf.DflowClassifier, batch: Batch, noise: torch.Generator) -> Tensor:
        x, labels = batch
        return nn.functional.nll_loss(widen(model.log_prob(x)), cast(Tensor, labels), reduction="sum")

    @torch.no_grad()
    def judge(self, model: hf.DflowClassifier, bits: float, device: torch.device) -> Judgement:
        nets = {"as trained": model.net}
        if self.binarized:
            rows = self.data.images.train.subset(_REESTIMATED).rows(slice(None))
            nets["binarized"] = model.binarized(rows.to(device))
        wrong = dict.fromkeys(nets, 0)
        torch.manual_seed(mix(self.config.seed, 0))  # pooling may draw
        batches, count = self.data.valid(device, 0, 1)
        for x, labels in batches:
            for name, net in nets.items():
                wrong[name] += int((net(x).argmax(1) != labels).sum())
        accuracies = ", ".join(f"{name} {1 - n / count:.2%}" for name, n in wrong.items())
        return Judgement(
            # Among models with equally many errors the fewest bits decide, by far less than one image.
            list(wrong.values())[-1] / count + 1e-9 * min(bits, 100.0),
            {f"valid_error {name}": n / count for name, n in wrong.items()},
            (f"  | accuracy on the validation data: {accuracies}",),
        )
