"""Training: recipes, and one loop for every model."""

from dflow.train.identity import resume_command
from dflow.train.loop import Preempted, train
from dflow.train.recipe import (
    METRICS,
    RECIPE,
    STATE,
    Paper,
    Recipe,
    Schedule,
    TrainConfig,
    history,
    load_recipe,
    recipe_from,
    recipe_of,
    resumed_recipe,
)
from dflow.train.small import Size, compact, size_of

__all__ = [
    "METRICS",
    "RECIPE",
    "STATE",
    "Paper",
    "Preempted",
    "Recipe",
    "Schedule",
    "Size",
    "TrainConfig",
    "compact",
    "history",
    "load_recipe",
    "recipe_from",
    "recipe_of",
    "resume_command",
    "resumed_recipe",
    "size_of",
    "train",
]
