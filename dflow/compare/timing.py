"""Models that draw by turns: what a draw takes, at the number of threads that is best for each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dflow.coding import one_thread
from dflow.compress.clock import progress_bar
from dflow.data import Text
from dflow.models import TextModel


@dataclass(frozen=True)
class Contestant:
    """A model under its name, and the text that all are scored on, spelled in its vocabulary."""

    name: str
    model: TextModel
    text: Text


@dataclass(frozen=True)
class Speed:
    """The median over rounds, at the number of threads that was best for this model."""

    seconds: float
    characters: float
    threads: int
    rounds: int


def timed(
    contestants: Sequence[Contestant],
    draw: Callable[[Contestant, torch.Generator], Tensor],
    rounds: int,
    seed: int,
    what: str | None = None,
) -> list[Speed]:
    """Time draws, models by turns, after one draw of each to warm up.

    Timed is everything from the call of ``draw`` to the symbols on the CPU.

    Args:
        contestants: the models.
        draw: gives symbols, int64 ``(n, length)``, -1 where one is absent; their characters are counted.
        rounds: of measuring.
        seed: of the draws.
        what: title of a bar on stderr; None for no bar.
    """
    most = torch.get_num_threads()
    settings = sorted({1, most}) if contestants[0].model.device.type == "cpu" else [most]
    turns = [(i, threads) for i in range(len(contestants)) for threads in settings]
    seconds: dict[tuple[int, int], list[float]] = {turn: [] for turn in turns}
    characters: list[list[float]] = [[] for _ in contestants]
    bar = progress_bar(len(turns) * (rounds + 1), "draw", what or "", what is not None)
    # Each draw sets its number of threads; that of before comes back at the end.
    with bar, one_thread(), torch.inference_mode(), evaluating(contestants):
        for r in range(-1, rounds):
            for turn in turns:
                i, threads = turn
                torch.set_num_threads(threads)
                generator = torch.Generator(contestants[i].model.device).manual_seed(seed + r + 1)
                begin = time.perf_counter()
                ids = draw(contestants[i], generator).cpu()
                duration = time.perf_counter() - begin
                bar.update()
                if r >= 0:
                    seconds[turn].append(duration)
                    characters[i].append(float(contestants[i].text.characters(ids).sum()))
    result = []
    for i in range(len(contestants)):
        median, threads = min((statistics.median(seconds[i, t]), t) for t in settings)
        result.append(Speed(median, statistics.median(characters[i]), threads, rounds))
    return result


@contextmanager
def evaluating(contestants: Sequence[Contestant]) -> Iterator[None]:
    """Evaluation mode of all models, and then the mode that each had."""
    modes = [c.model.training for c in contestants]
    for c in contestants:
        c.model.train(False)
    try:
        yield
    finally:
        for c, mode in zip(contestants, modes, strict=True):
            c.model.train(mode)


def thread_count(n: int) -> str:
    """A number of threads in words."""
    return f"{n} thread" if n == 1 else f"{n} threads"
