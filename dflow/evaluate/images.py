"""The likelihood of images and tables where the model has it, else bounds of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dflow.config import InputError
from dflow.data import ImageSet, Samples
from dflow.evaluate.driver import Rows, Scorer, check_positive, total
from dflow.hf import DflowImageModel
from dflow.ops.devices import WITHOUT_FLOAT64, moved

#: A row that occurs more often is scored this often, and counts as often as it occurs.
_REPEATS = 32
#: Rows times draws of one pass, and these times entries: what fits the cache of a core is twice as fast.
_PASS, _PASS_ENTRIES = 1 << 12, 1 << 18


@dataclass(frozen=True)
class ImageEvaluation:
    """The cost of data under a model, in `unit`; all from the same draws of the dequantizer.

    Attributes:
        vi: minus the elbo (mean of log p(v) - log q(v | x)): an upper bound of the cost, in expectation.
        nll: minus the importance-weighted bound of `draws` draws: an upper bound in expectation, tighter.
        kl: ``vi - nll``, an estimate from below of KL(q(v | x) || p(v | x)).
        exact: the cost itself, where the density has cell masses; else None.
        vi_error: standard error of `vi` over data, None for a single one.
        nll_error: standard error of `nll`.
        ess: mean effective number of draws, 1 to `draws`; where it is small, `nll` depends on a few draws and
            can lie below the truth.
        unit: "bits a dimension" or "bits" (a datum).
        kind: the kind of the figures vi and nll.
        draws: number of draws of the dequantizer for each datum.
        precision: the dtype in which the figures were computed.
        num_rows: number of data scored.
        intact: whether every draw fell into the cell of its datum.
    """

    vi: float
    nll: float
    kl: float
    exact: float | None
    vi_error: float | None
    nll_error: float | None
    ess: float
    unit: str
    kind: str
    draws: int
    precision: str
    num_rows: int
    intact: bool


def check_data(model: DflowImageModel, images: ImageSet) -> None:
    """Refuse data of another kind than the model's, which its law would score all the same.

    Raises:
        InputError: pictures of more levels, or a table of other columns or in another order.
    """
    levels, columns = model.config.levels, model.config.columns
    if isinstance(images.levels, int) and len(levels) == 1 and images.levels > levels[0]:
        raise InputError(
            f"{images.name}: values of {images.levels} levels, and this model was trained on {levels[0]}: "
            f"value {images.levels - 1} is not one of 0..{levels[0] - 1}; set data.bits to that of the "
            "model's recipe, or give the data it was trained on"
        )
    if columns and images.columns and list(images.columns) != columns:
        raise InputError(
            f"{images.name}: the columns are {', '.join(images.columns)}, and this model was trained on "
            f"{', '.join(columns)}; give the same columns in the same order"
        )


def evaluate_images(
    model: DflowImageModel,
    data: Samples,
    *,
    unit: str = "bits a dimension",
    draws: int = 256,
    batch_size: int = 100,
    limit: int | None = None,
    precision: torch.dtype = torch.float64,
    seed: int = 0,
    progress: bool = False,
    accelerator: Accelerator | None = None,
) -> ImageEvaluation:
    r"""Bounds of the cost of ``data`` under ``model``.

    With weights :math:`w_k = p(v_k) / q(v_k \mid x)`, :math:`v_k \sim q(\cdot \mid x)`, for K draws

    .. math:: \mathrm{vi} = -\tfrac 1 K \sum_k \log w_k, \qquad \mathrm{nll} = -\log \tfrac 1 K \sum_k w_k .

    Draws come in chunks: the memory depends on the batch size and not on K. A row that occurs many times is
    scored 32 times with new draws each; the expectation is the same.

    Args:
        model: scored in a copy of the precision asked for; on the CPU in float64 where its device has none.
        data: a split.
        unit: "bits a dimension", or "bits" for those of a whole datum.
        draws: K.
        batch_size: number of data a pass, on each process.
        limit: score ``limit`` random rows only, always the same.
        precision: the dtype of the model and the draws; sums are in float64 in any case.
        seed: the seed of the draws.
        progress: show a bar on stderr.
        accelerator: spread the data over its processes.

    Raises:
        InputError: data of another kind than the model's, a model without bounds, a bound that is not finite.
    """
    check_positive(draws=draws, batch_size=batch_size, limit=limit)
    if not 0 <= seed < 1 << 62:
        raise InputError(f"seed {seed} must be from 0 to {(1 << 62) - 1}")
    scorer = _Estimates(_copy(model, precision), data.subset(limit or data.num_rows), draws, batch_size, seed)
    totals = total(scorer, batch_size, progress, accelerator)
    dims = 1 if unit == "bits" else model.dim
    (vi, vi_error), (nll, nll_error) = totals.bits("vi", dims), totals.bits("nll", dims)
    exact, _ = totals.bits("exact", dims)
    return ImageEvaluation(
        vi=vi,
        nll=nll,
        kl=vi - nll,
        exact=None if math.isnan(exact) else exact,
        vi_error=vi_error,
        nll_error=nll_error,
        ess=totals.mean("ess"),
        unit=unit,
        kind=f"upper bounds in expectation, from {draws:,} draws",
        draws=draws,
        precision=str(precision).removeprefix("torch."),
        num_rows=round(totals.count),
        intact=not totals.failed,
    )


class _Estimates(Scorer):
    """Bounds of the likelihood of images from draws of the dequantizer."""

    model: DflowImageModel
    names, optional, random = ("vi", "nll", "ess", "exact"), ("ess", "exact"), True

    def __init__(self, model: DflowImageModel, data: Samples, draws: int, batch_size: int, seed: int) -> None:
        self.model, self.law, self.draws, self.seed = model, model.dequantized, draws, seed
        self.what = f"bound on the {data.name} data"
        self.values, self.weights = _distinct(data.values)
        self.num_rows = self.num_checks = len(self.values)
        self.chunk = max(1, min(draws, min(_PASS, _PASS_ENTRIES // model.dim) // batch_size))
        self.has_masses = True

    def score(self, rows: slice) -> Rows:
        x, generator = self._batch(rows)
        bounds = self.law.assess(x, self.draws, self.chunk, generator)
        values = {"vi": -bounds.elbo, "nll": -bounds.iwbo, "ess": bounds.ess}
        values["exact"] = torch.full_like(bounds.elbo, math.nan)
        if self.has_masses:
            try:
                values["exact"] = -self.law.exact_log_prob(x)
            except ValueError:
                self.has_masses = False
        return Rows(values, weights=self.weights[rows])

    def check(self, rows: slice) -> bool:
        x, generator = self._batch(rows)
        quantized = self.law.partition.quantize(self.law.dequantize(x, generator))
        return bool((quantized == x)[:, self.law.partition.discrete(self.model.dim)].all())

    def _batch(self, rows: slice) -> tuple[Tensor, torch.Generator]:
        """Rows on the device of the model, and the randomness of their draws."""
        x = self.values[rows]
        x = self.model.check(moved(x if x.is_floating_point() else x.long(), self.model.device))
        return x, torch.Generator(x.device).manual_seed(self.seed + rows.start)


@dataclass(frozen=True)
class ExactEvaluation:
    """The cost of data under a model with an exact likelihood, in `unit`.

    Attributes:
        nll: minus the mean log-likelihood.
        nll_error: its standard error over data, None for a single one.
        unit: "bits a dimension" or "bits" (a datum).
        kind: "exact".
        precision: the dtype of the model; each dtype makes a law of its own.
        num_rows: number of data scored.
        round_trip: whether the flow gave back `num_checked` data from their latents; None: not checked.
        num_checked: number of data that went through the round trip.
    """

    nll: float
    nll_error: float | None
    unit: str
    kind: str
    precision: str
    num_rows: int
    round_trip: bool | None
    num_checked: int


def evaluate_exact(
    model: DflowImageModel,
    data: Samples,
    *,
    unit: str = "bits a dimension",
    batch_size: int = 100,
    limit: int | None = None,
    precision: torch.dtype = torch.float64,
    checks: int = 100,
    progress: bool = False,
    accelerator: Accelerator | None = None,
) -> ExactEvaluation:
    r"""The cost of ``data`` under an integer flow: :math:`-\tfrac 1 n \sum_i \log P(x_i)`, without a draw.

    P sums to 1 over all integers, not over the range of the data.

    Args:
        model: scored in a copy of the precision asked for; on the CPU in float64 where its device has none.
        data: a split.
        unit: "bits a dimension", or "bits" for those of a whole datum.
        batch_size: number of data a pass, on each process.
        limit: score ``limit`` random rows only, always the same.
        precision: the dtype of the networks, whose outputs are rounded; sums are in float64 in any case.
        checks: number of data that go through the round trip, over all processes.
        progress: show a bar on stderr.
        accelerator: spread the data over its processes.

    Raises:
        InputError: nothing to score, data of another kind than the model's, a model without an exact
            likelihood, or a likelihood that is not finite.
    """
    check_positive(batch_size=batch_size, limit=limit)
    scorer = _LikelihoodScorer(_copy(model, precision), data, limit, checks)
    totals = total(scorer, batch_size, progress, accelerator)
    nll, nll_error = totals.bits("nats", 1 if unit == "bits" else model.dim)
    return ExactEvaluation(
        nll=nll,
        nll_error=nll_error,
        unit=unit,
        kind="exact",
        precision=str(precision).removeprefix("torch."),
        num_rows=round(totals.count),
        round_trip=totals.round_trip,
        num_checked=totals.num_checked,
    )


class _LikelihoodScorer(Scorer):
    """The likelihood of images itself."""

    model: DflowImageModel

    def __init__(self, model: DflowImageModel, data: Samples, limit: int | None, checks: int) -> None:
        self.model, self.data = model, data.subset(limit or data.num_rows)
        self.what = f"likelihood of the {data.name} data"
        self.num_rows = self.data.num_rows
        self.num_checks = min(checks, self.num_rows)

    def score(self, rows: slice) -> Rows:
        return Rows({"nats": -self.model.log_prob(self.data.rows(rows).to(self.model.device))})

    def check(self, rows: slice) -> bool | None:
        return self.model.round_trip(self.data.rows(rows).to(self.model.device))


def _copy(model: DflowImageModel, precision: torch.dtype) -> DflowImageModel:
    """A copy of the model in another precision; on the CPU where its device has none such."""
    copied = copy.deepcopy(model)
    if precision == torch.float64 and model.device.type in WITHOUT_FLOAT64:
        copied = copied.cpu()
    return nn.Module.to(copied, precision)


def _distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to score, float64 weights that add up to the number of ``values``; see `_REPEATS`."""
    rows, counts = torch.unique(values, dim=0, return_counts=True)
    repeats = counts.clamp(max=_REPEATS)
    weights = (counts / repeats).double()
    return rows.repeat_interleave(repeats, 0), weights.repeat_interleave(repeats)
