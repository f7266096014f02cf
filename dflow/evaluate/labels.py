"""Accuracy, cost and calibration of the labels of a classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dflow.config import InputError
from dflow.core import check_lengths
from dflow.data import Samples
from dflow.evaluate.driver import check_positive
from dflow.hf import DflowClassifier

#: Bins of confidence over which calibration is measured.
_BINS = 15


@dataclass(frozen=True)
class LabelScore:
    """One network, or an ensemble, on the data.

    Attributes:
        name: propagated, binarized, ensemble of n; network where nothing is random.
        accuracy: share of labels that are right.
        accuracy_error: its standard error over data.
        nll: minus the mean log-probability of the label, in nats.
        ece: expected calibration error: mean distance of confidence from accuracy, over 15 bins of
            confidence (Guo et al. 2017, arXiv 1706.04599).
    """

    name: str
    accuracy: float
    accuracy_error: float
    nll: float
    ece: float


@dataclass(frozen=True)
class LabelEvaluation:
    """Scores of all that a classifier can be made into.

    Attributes:
        scores: in the order propagated, binarized, ensembles.
        coverage: pairs of a share of the data, those on which the members of the largest ensemble agree
            most, and the error on them; None without an ensemble of two or more.
        num_rows: number of images scored.
        num_estimated: number of training images on which normalisations were re-estimated.
        kind: "exact": the figures are those of the networks, and ensembles are of seeded draws.
    """

    scores: list[LabelScore]
    coverage: list[tuple[float, float]] | None
    num_rows: int
    num_estimated: int
    kind: str = "exact"


def evaluate_labels(
    model: DflowClassifier,
    data: Samples,
    train: Samples,
    *,
    ensembles: Sequence[int] = (1, 4, 16),
    batch_size: int = 250,
    limit: int | None = None,
    estimated: int = 2560,
    seed: int = 0,
    progress: bool = False,
) -> LabelEvaluation:
    """Score ``model``, what it is binarized to, and ensembles of networks drawn from its law.

    An ensemble predicts the mean of its members' probabilities. A smaller one is the beginning of a larger.

    Args:
        model: in evaluation mode.
        data: a split with labels.
        train: data on which normalisations are re-estimated.
        ensembles: sizes; left out where no weight is random.
        batch_size: number of images a pass.
        limit: score ``limit`` random images only, always the same.
        estimated: number of images to re-estimate on, always the same.
        seed: the seed of the draws of weights, and of pooling.
        progress: show a bar on stderr.

    Raises:
        InputError: no labels, sizes below 1, data of another kind than the model's.
    """
    check_positive(batch_size=batch_size, limit=limit, ensemble=min(ensembles, default=1))
    rows = data.subset(limit or data.num_rows)
    if rows.labels is None:
        raise InputError(f"the {data.name} data have no labels; use mnist or cifar10")
    device = next(model.parameters()).device
    x, labels = model.check(rows.rows(slice(None))), rows.labels
    drawn = max(ensembles, default=0) if model.config.settings().kind == "probabilistic" else 0
    estimated_on = train.subset(estimated).rows(slice(None)).to(device)
    generator = torch.Generator().manual_seed(seed)
    predicted = list[tuple[str, Tensor]]()
    with (
        torch.inference_mode(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(unit="net", desc="score", delay=1, disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for name, net in _networks(model, estimated_on, drawn, generator):
            # float64, in which no probability of a soft-max is 0 for want of digits.
            batches = [net(batch.to(device)).cpu().double().softmax(1) for batch in x.split(batch_size)]
            predicted.append((name, torch.cat(batches)))
            bar.update()
    named = [(name, probabilities) for name, probabilities in predicted if name]
    members = [probabilities for name, probabilities in predicted if not name]
    named += [(f"ensemble of {n}", torch.stack(members[:n]).mean(0)) for n in ensembles if drawn]
    return LabelEvaluation(
        scores=[score(name, probabilities, labels) for name, probabilities in named],
        coverage=None if drawn < 2 else _points(*coverage(torch.stack(members), labels)),
        num_rows=len(x),
        num_estimated=0 if model.config.settings().kind == "float" else len(estimated_on),
    )


def _networks(
    model: DflowClassifier, estimated_on: Tensor, drawn: int, generator: torch.Generator
) -> Iterator[tuple[str, nn.Sequential]]:
    """The networks that a classifier can be made into, by name; those of an ensemble have none."""
    kind = model.config.settings().kind
    yield "propagated" if kind == "probabilistic" else "network", model.net
    if kind != "float":
        yield "binarized", model.binarized(estimated_on)
    for _ in range(drawn):
        yield "", model.binarized(estimated_on, "sample", generator)


def score(name: str, probabilities: Tensor, labels: Tensor) -> LabelScore:
    """Figures of predicted ``probabilities`` ``(n, classes)`` for ``labels`` ``(n,)``."""
    check_lengths(labels, len(probabilities), "labels")
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    accuracy = float(right.mean())
    log = probabilities.gather(1, labels[:, None]).log()
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, confidence.double() - right)
    return LabelScore(
        name=name,
        accuracy=accuracy,
        accuracy_error=math.sqrt(accuracy * (1 - accuracy) / len(labels)),
        nll=-float(log.mean()),
        ece=float(gaps.abs().sum()) / len(labels),
    )


def coverage(members: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Error of an ensemble on the data that it is surest of, by how little its members differ.

    Data are sorted by the variance, over members, of the probability of the class that the ensemble
    predicts; equal ones by how probable it is (Peters and Welling 2018).

    Args:
        members: probabilities ``(members, n, classes)``.
        labels: ``(n,)``.

    Returns:
        Shares of the data 1/n .. 1, and the error on each.
    """
    check_lengths(labels, members.shape[1], "labels")
    mean, predicted = members.mean(0).max(1)
    spread = members.gather(2, predicted.expand(len(members), -1)[..., None])[..., 0].var(0)
    order = torch.argsort(mean, descending=True, stable=True)
    order = order[torch.argsort(spread[order], stable=True)]
    wrong = (predicted != labels)[order].double()
    count = torch.arange(1, len(labels) + 1, dtype=torch.float64)
    return count / len(labels), wrong.cumsum(0) / count


def _points(shares: Tensor, errors: Tensor) -> list[tuple[float, float]]:
    """Every twentieth of the data, and every two hundredth of the last tenth, where a good model errs."""
    n = len(shares)
    steps = [10 * i for i in range(1, 18)] + list(range(180, 201))
    places = sorted({max(1, round(n * i / 200)) - 1 for i in steps})
    return [(float(shares[i]), float(errors[i])) for i in places]
