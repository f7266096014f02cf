"""What moves with a training: functions of its settings, the step, and the share of the budget spent."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from dflow.train.recipe import TrainConfig


def fraction(config: TrainConfig, step: int, seconds: float) -> float:
    """How much of the budget is spent, in [0, 1]: of steps or of minutes, whichever is nearer to its end.

    >>> fraction(TrainConfig(steps=100, minutes=2), 40, 60)
    0.5
    """
    spent = [step / config.steps] if config.steps else []
    spent += [seconds / (60 * config.minutes)] if config.minutes else []
    return min(1.0, max(spent))


def learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """A half cosine over the budget, from the peak to its final share, under a linear warm-up.

    ``peak * (final + (1 - final) * (1 + cos(pi * fraction)) / 2) * min(1, (step + 1) / warmup)``

    Args:
        config: with the peak, its final share and the steps of the warm-up.
        step: the number of the step, from 0.
        fraction: the share of the budget that is spent before this step.

    >>> config = TrainConfig(steps=100, learning_rate=0.5, warmup=10, final_learning_rate=0.2)
    >>> [round(learning_rate(config, step, step / 100), 4) for step in (0, 4, 50, 100)]
    [0.05, 0.2492, 0.3, 0.1]
    """
    final = config.final_learning_rate
    cosine = final + (1 - final) * (1 + math.cos(math.pi * fraction)) / 2
    return config.learning_rate * cosine * min(1.0, (step + 1) / max(1, config.warmup))


def average_decay(decay: float, step: int) -> float:
    """Decay of the moving average of weights: ``min(decay, (1 + step) / (10 + step))``, steps from 0.

    A young average would be mostly the random start.

    >>> average_decay(0.9, 0), average_decay(0.9, 1000)
    (0.1, 0.9)
    """
    return min(decay, (1 + step) / (10 + step))


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of an optimizer: matrices, embeddings included, decay; vectors (biases, gains) do not."""
    learned = list(parameters)
    return [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]


def interval(config: TrainConfig, every: int | None) -> tuple[str, float]:
    """What lies between two evaluations or saves: a unit, "steps" or "seconds", and how many of these.

    Args:
        config: with the budget and the minutes between evaluations.
        every: steps; without them a tenth of the minutes of the budget, else a tenth of its steps.

    >>> interval(TrainConfig(steps=101), None), interval(TrainConfig(steps=101, minutes=5), None)
    (('steps', 11), ('seconds', 30.0))
    """
    if every is not None:
        return "steps", every
    if config.eval_minutes is None and config.minutes is None:
        return "steps", math.ceil((config.steps or 10) / 10)
    return "seconds", 60 * (config.eval_minutes or (config.minutes or 0) / 10)
