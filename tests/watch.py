"""A training watched from outside: what its objective is called on, what its optimizer is given and does."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dflow import objectives


@dataclass
class Call:
    """One call of the objective: the setup in which it came, what it was called on, what it gave."""

    x: Tensor
    lengths: Tensor | None
    training: bool
    noise: list[float]
    temperature: list[float]
    turn: int
    peak: float | None
    counts: Tensor | None
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    statistics: Tensor | None = None


@dataclass
class Step:
    """One step of the optimizer: settings of its groups; by name gradients, weights before and after."""

    groups: list[dict[str, Any]]
    group_of: dict[str, int]
    gradients: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        return float(torch.stack([g.double().norm() for g in self.gradients.values()]).norm())


class Watch:
    """Within ``with``: everything that one training in this process does."""

    def __init__(self) -> None:
        self.objective: Any = None
        self.calls: list[Call] = []
        self.steps: list[Step] = []
        #: Masks of dropout layers, as they left zeros; and which entries any-order networks knew.
        self.dropped: list[Tensor] = []
        self.known: list[Tensor] = []

    def __enter__(self) -> Watch:
        self._handles = [
            register_module_forward_pre_hook(self._call),
            register_module_forward_hook(self._result),
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__ == "MaskedTransformer" and module.training:
            self.known.append(args[1].clone())
        if not isinstance(module, objectives.Objective):
            return
        self.objective, law = module, module.distribution
        base, estimators = objectives.closed_form(law), objectives.estimators(law)
        self.calls.append(
            Call(
                args[0].clone(),
                args[1],
                law.training,
                [e.noise for e in estimators],
                [e.temperature for e in estimators],
                args[2],
                None if base is None else base.peak,
                None if base is None else base.counts.clone(),
            )
        )

    def _result(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(module, nn.Dropout) and module.p and module.training:
            self.dropped.append(result == 0)
        if isinstance(module, objectives.Objective):
            self.calls[-1].loss, self.calls[-1].statistics = result[0].detach(), result[1]

    def _weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.objective.distribution.named_parameters()}

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        named = dict(self.objective.distribution.named_parameters())
        place = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        settings = ("lr", "weight_decay", "betas", "eps", "amsgrad")
        self.steps.append(
            Step(
                [{name: group[name] for name in settings} for group in optimizer.param_groups],
                {n: place[id(p)] for n, p in named.items()},
                {n: p.grad.clone() for n, p in named.items()},  # type: ignore[union-attr]
                self._weights(),
            )
        )

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps[-1].after = self._weights()
