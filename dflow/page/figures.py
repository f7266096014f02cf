"""What a model costs, as on the command line: bits by `dflow evaluate`, times by `dflow compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dflow.compare import Contestant, measure
from dflow.compare.models import drawing
from dflow.data import Text, Tokenizer
from dflow.evaluate import evaluate
from dflow.models import TextModel
from dflow.train import METRICS, history
from dflow.train.recipe import History

#: Most network calls at which a model is measured.
_MOST_CALLS = 64


@dataclass(frozen=True)
class Point:
    """A model, drawn in one number of network calls.

    Attributes:
        calls: network calls for a sample; with drafts, the mean over as many samples as rounds.
        drafted: whether the model is drawn with drafts.
        bits: exact bits a character of the test part, the number of `dflow evaluate`; None without data.
        standard_error: of the bits.
        round_trip: whether the model draws what it scores, as `dflow evaluate` checks it.
        milliseconds: from the call to the symbols of one sample, median after a warm-up.
        threads: the number of threads at which that is least.
    """

    calls: int
    drafted: bool
    bits: float | None
    standard_error: float | None
    round_trip: bool | None
    milliseconds: float
    threads: int


@dataclass(frozen=True)
class Figures:
    """The points of a model, and how its bits were measured: the words of `dflow evaluate`, or None."""

    points: list[Point]
    protocol: str | None


def budgets_of(model: TextModel) -> list[int]:
    """The numbers of network calls at which a model is drawn, up to 64; its own number where it has but one.

    Of a model that can be drawn in any number, the powers of two.
    """
    budgets = model.distribution.budgets
    if len(budgets) == 1:
        return [model.num_calls]
    return [b for b in budgets if b <= _MOST_CALLS and (b & (b - 1) == 0 or not isinstance(budgets, range))]


def figures(
    model: TextModel,
    tokenizer: Tokenizer,
    text: Text | None,
    *,
    drafted: TextModel | None = None,
    limit: int | None = None,
    rounds: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> Figures:
    """Bits and times of a model, for each number of calls in which it can be drawn.

    Args:
        model: the model.
        tokenizer: that of the model.
        text: what is scored; None leaves the bits out.
        drafted: the same model with drafts, which gets a point of its own if any are made: where none can pay
            off, as for an LSTM, the plain loop draws.
        limit: chunks of the text that are scored.
        rounds: of measuring.
        seed: of the draws.
        progress: show bars on stderr.
    """
    length = model.config.length
    models = [(model.at(calls), False) for calls in budgets_of(model)]
    models += [(drafted, True)] if drafted is not None else []
    # Characters of a sample are counted by their symbols, whether there is a text or not.
    stand_in = Text("samples", torch.zeros(0, dtype=torch.int64), None, 0, starts=tokenizer.starts)
    contestants = [Contestant(str(i), each, stand_in) for i, (each, _) in enumerate(models)]
    speeds = measure(contestants, 1, length, rounds, seed, progress)
    points, protocol = [], None
    scores: dict[int, tuple[float, float | None, bool | None]] = {}
    for (each, has_drafts), speed in zip(models, speeds, strict=True):
        calls = drawing(each, length, rounds, seed)[0]
        if each.tally is not None and not each.tally.drafted:
            continue
        if text is not None and id(each.law) not in scores:
            evaluation = evaluate(each, text, limit=limit, progress=progress)
            scores[id(each.law)] = evaluation.bpc, evaluation.standard_error, evaluation.round_trip
            protocol = evaluation.protocol
        bits, error, intact = scores.get(id(each.law), (None, None, None))
        points.append(Point(calls, has_drafts, bits, error, intact, 1e3 * speed.seconds, speed.threads))
    return Figures(points, protocol)


def curve_of(folder: str | Path) -> History | None:
    """The evaluations of a training; None where its folder has none, as that of a model that was pulled."""
    return history(folder) if (Path(folder) / METRICS).is_file() else None
