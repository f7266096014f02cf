"""One run of a sweep, whose failure is a reason and no exception; and how long the others will take."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence

import torch
from tqdm import tqdm

from dflow.config import InputError
from dflow.train import Recipe, train
from dflow.train.machine import Watch


def train_once(recipe: Recipe, device: torch.device | None, watch: Watch) -> str:
    """Begin a run or go on with it; returns the reason where it fails, else "".

    Whatever is wrong with one run, the others may be right. `KeyboardInterrupt` passes.
    """
    try:
        train(recipe, resume=True, device=device, watch=watch)
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


class TimeLeft:
    """How much of a sweep is done, and how long the rest will take.

    A run counts as much as its budget, where all have one in the same unit.

    Attributes:
        shares: of the budget of each run that is spent; 1 where it has ended.
    """

    def __init__(self, recipes: Sequence[Recipe], shares: Sequence[float]) -> None:
        configs = [recipe.train for recipe in recipes]
        budgets = next(
            (
                budgets
                for budgets in ([c.minutes for c in configs], [c.steps for c in configs])
                if all(budgets)
            ),
            [1.0] * len(configs),
        )
        self._budgets = [float(budget or 0) for budget in budgets]
        self.shares = list(shares)
        self._began, self._before = time.monotonic(), self.share()

    def share(self) -> float:
        """The share of the whole sweep that is done."""
        spent = sum(share * budget for share, budget in zip(self.shares, self._budgets, strict=True))
        return spent / sum(self._budgets)

    def left(self) -> str:
        """The time that the rest of the sweep will take, as in a progress bar."""
        done = self.share() - self._before
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self._began) * (1 - self.share()) / done
        return str(tqdm.format_interval(seconds))
