"""One loop for every evaluation: batches, figures of each row, sums over all processes, means and errors.

What differs is a `Scorer`: which rows there are, and the figures of a batch of them.

>>> class Even(Scorer):
...     model, what, num_rows = nn.Identity(), "share of even numbers", 5
...     def score(self, rows):
...         return Rows({"nats": (torch.arange(5)[rows] % 2 == 0).double()})
>>> total(Even(), batch_size=2).mean("nats")
0.6
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from dflow import objectives
from dflow.config import InputError
from dflow.models.counts import counted


@dataclass(frozen=True)
class Rows:
    """The figures of a batch of rows.

    Attributes:
        values: figures ``(rows,)`` by the names of the scorer: nats, or whatever is averaged.
        sizes: what the figures are averaged over, ``(rows,)``: the characters of each row; default 1.
        weights: how often each row counts, ``(rows,)``; default 1. They add up to the number of rows.
    """

    values: Mapping[str, Tensor]
    sizes: Tensor | None = None
    weights: Tensor | None = None


class Scorer(ABC):
    """Rows of data, and their figures under a model.

    Attributes:
        model: set to evaluation mode while it is scored.
        names: the names of the figures.
        optional: the names of figures that may be missing, as NaN.
        row: the word for a row on the progress bar.
        what: what is scored, for the error: "likelihood of the test text".
        num_rows: rows to score.
        num_checks: rows to check.
        random: whether figures are of draws, with one seed for each batch.
    """

    model: nn.Module
    names: tuple[str, ...] = ("nats",)
    optional: tuple[str, ...] = ()
    row: str = "row"
    what: str
    num_rows: int
    num_checks: int = 0
    random: bool = False

    @abstractmethod
    def score(self, rows: slice) -> Rows:
        """The figures of the rows from ``start`` to ``stop``."""

    def check(self, rows: slice) -> bool | None:
        """Whether the figures of these rows can be trusted; None where that cannot be checked."""
        return None

    def close(self) -> None:
        """Let counts of the model that have grown with the rows stand still again."""
        for module in counted(self.model):
            module.also = None


@dataclass(frozen=True)
class Totals:
    """Sums over the rows of all processes.

    Attributes:
        count: the number of rows, by their weights.
        size: the sum of their sizes.
        sums: ``(sum v, sum v^2, sum v s)`` by name, for values v and sizes s, each times the weight.
        squared_sizes: ``sum s^2``.
        num_checked: rows that were checked.
        failed: whether one of the checks failed.
    """

    count: float
    size: float
    squared_sizes: float
    sums: Mapping[str, Sequence[float]]
    num_checked: int
    failed: bool

    def mean(self, name: str) -> float:
        """``sum v / sum s``."""
        return self.sums[name][0] / self.size

    def error(self, name: str) -> float | None:
        """The standard error of `mean`, None for a single row.

        That of a ratio of means (Cochran 1977, Sampling Techniques, section 2.11), ``r = sum v / sum s``:

            sqrt(sum (v - r s)^2 n / (n - 1)) / sum s
        """
        if self.count <= 1:
            return None
        mean, (_, squares, products) = self.mean(name), self.sums[name]
        residuals = max(0.0, squares - 2 * mean * products + mean**2 * self.squared_sizes)
        return math.sqrt(residuals * self.count / (self.count - 1)) / self.size

    def bits(self, name: str, entries: int = 1) -> tuple[float, float | None]:
        """`mean` and `error` of nats as bits, for each of so many entries of a row."""
        error = self.error(name)
        return objectives.bits(self.mean(name), entries), error and objectives.bits(error, entries)

    @property
    def round_trip(self) -> bool | None:
        """Whether all checks succeeded, None where nothing was checked."""
        return not self.failed if self.num_checked else None


def total(
    scorer: Scorer, batch_size: int, progress: bool = False, accelerator: Accelerator | None = None
) -> Totals:
    """Score and check all rows, ``batch_size`` at a time on each process.

    Batch i goes to process i modulo their number. Where there would be fewer batches than processes they are
    smaller, unless results depend on their size. Sums are in float64.

    Raises:
        InputError: a mean that is not finite.
    """
    rank, world = share(accelerator)

    def batches(num_rows: int) -> list[slice]:
        size = batch_size if scorer.random else max(1, min(batch_size, -(-num_rows // world)))
        starts = range(rank * size, num_rows, world * size)
        return [slice(start, min(num_rows, start + size)) for start in starts]

    shares = batches(scorer.num_rows)
    sums = torch.zeros(3 + 3 * len(scorer.names), dtype=torch.float64)
    checks = torch.zeros(2, dtype=torch.float64)
    with (
        torch.inference_mode(),
        evaluating(scorer.model),
        closing(scorer),
        tqdm(
            total=sum(rows.stop - rows.start for rows in shares),
            unit=scorer.row,
            desc="score",
            delay=1,
            mininterval=1,
            disable=not (progress and rank == 0),
        ) as bar,
    ):
        for rows in shares:
            sums += _sums(scorer.score(rows), scorer.names)
            bar.update(rows.stop - rows.start)
        for rows in batches(scorer.num_checks):
            verdict = scorer.check(rows)
            if verdict is not None:
                checks += torch.tensor([rows.stop - rows.start, not verdict])
    totals = torch.cat([sums, checks])
    if accelerator is not None and world > 1:
        totals = accelerator.reduce(totals.to(accelerator.device), "sum")
    count, size, squared_sizes = totals[:3].tolist()
    num_checked, failures = totals[-2:].tolist()
    by_name = dict(zip(scorer.names, totals[3:-2].view(-1, 3).tolist(), strict=True))
    if not all(math.isfinite(by_name[name][0]) for name in scorer.names if name not in scorer.optional):
        raise InputError(
            f"the model's {scorer.what} is not finite; its training diverged or its checkpoint is damaged"
        )
    return Totals(count, size, squared_sizes, by_name, int(num_checked), failures > 0)


def _sums(rows: Rows, names: tuple[str, ...]) -> Tensor:
    """The sums of `Totals` over a batch, float64 ``(3 + 3 * names,)`` on the CPU."""
    values = torch.stack([rows.values[name].cpu().double() for name in names])
    ones = torch.ones(values.shape[1], dtype=torch.float64)
    weights = ones if rows.weights is None else rows.weights.cpu().double()
    sizes = ones if rows.sizes is None else rows.sizes.cpu().double()
    figures = torch.stack([values, values**2, values * sizes], 1).flatten(0, 1)
    return (torch.cat([torch.stack([ones, sizes, sizes**2]), figures]) * weights).sum(1)


def share(accelerator: Accelerator | None) -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then the mode that the model had, even after an error."""
    mode = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(mode)


def check_positive(**numbers: int | None) -> None:
    """Raise `InputError` for a number below 1; underscores of its name are spaces in the message."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"{name.replace('_', ' ')} {value} must be at least 1")
