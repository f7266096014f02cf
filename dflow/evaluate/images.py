"""The likelihood of images and tables where it can be had, else bounds of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from dflow.config import InputError
from dflow.data import ImageSet, Samples
from dflow.hf import DflowImageModel
from dflow.objectives import bits

#: A row that occurs more often is scored this often, and counts as often as it occurs.
_REPEATS = 32
#: Rows times draws of one pass, and these times entries: what fits the cache of a core is twice as fast.
_PASS, _PASS_ENTRIES = 1 << 12, 1 << 18


@dataclass(frozen=True)
class ImageEvaluation:
    """What a model costs on data, in `unit`; all from the same draws of the dequantizer.

    Attributes:
        vi: minus the elbo (mean of log p(v) - log q(v | x)): an upper bound of the cost, in expectation.
        nll: minus the importance-weighted bound of `draws` draws: an upper bound in expectation, tighter.
        kl: ``vi - nll``, an estimate from below of KL(q(v | x) || p(v | x)).
        exact: the cost itself, where the density has cell masses; else None.
        vi_error: standard error of `vi` over data, None for a single one.
        nll_error: that of `nll`.
        ess: mean effective number of draws, 1 to `draws`; where it is small, `nll` hangs on a few draws and
            can lie below the truth.
        unit: "bits a dimension" or "bits" (a datum).
        kind: what vi and nll are.
        draws: of the dequantizer, for each datum.
        precision: in which they were computed.
        num_rows: data scored.
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
            f"value {images.levels - 1} is none of 0..{levels[0] - 1}; set data.bits to that of the model's "
            "recipe, or give the data it was trained on"
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

    Draws come in chunks, so that memory hangs on the batch size and not on K. A row that occurs many times
    is scored 32 times with new draws each; the expectation is the same.

    Args:
        model: scored in a copy of the precision asked for.
        data: a split.
        unit: "bits a dimension", or "bits" for those of a whole datum.
        draws: K.
        batch_size: data a pass, on each process.
        limit: score ``limit`` random rows only, always the same.
        precision: of the model and the draws; sums are in float64 in any case.
        seed: of the draws.
        progress: show a bar on stderr.
        accelerator: spread the data over its processes.

    Raises:
        InputError: nothing to score, data of another kind than the model's, a model without bounds, or a
            bound that is not finite.
    """
    for name, value in (("draws", draws), ("batch size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if not 0 <= seed < 1 << 62:
        raise InputError(f"seed {seed} must be from 0 to {(1 << 62) - 1}")
    scored = _copy(model, precision)
    law = scored.dequantized
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    rows, weights = _distinct(data.subset(limit or data.num_rows).values)
    total = len(rows)
    chunk = max(1, min(draws, min(_PASS, _PASS_ENTRIES // scored.dim) // batch_size))
    dims = 1 if unit == "bits" else scored.dim
    moments = torch.zeros(8, dtype=torch.float64)
    exact = True
    mine = range(rank * batch_size, total, world * batch_size)
    shown = progress and rank == 0
    with (
        torch.inference_mode(),
        tqdm(total=total, unit="row", desc="score", delay=1, disable=not shown) as bar,
    ):
        for start in mine:
            part = slice(start, min(total, start + batch_size))
            x = rows[part] if rows.is_floating_point() else rows[part].long()
            x = scored.check(x.to(scored.device))
            generator = torch.Generator(x.device).manual_seed(seed + start)
            found = law.assess(x, draws, chunk, generator)
            masses: Tensor | None = None
            if exact:
                try:
                    masses = law.exact_log_prob(x).double()
                except ValueError:
                    exact = False
            quantized = law.partition.quantize(law.dequantize(x, generator))
            intact = bool((quantized == x)[:, law.partition.discrete(scored.dim)].all())
            terms = [
                torch.ones_like(found.elbo),
                -found.elbo,
                found.elbo**2,
                -found.iwbo,
                found.iwbo**2,
                found.ess,
            ]
            terms.append(torch.zeros_like(found.elbo) if masses is None else -masses)
            weight = weights[part].to(x.device)
            sums = torch.stack([(t.double() * weight).sum() for t in terms]).cpu()
            moments += torch.cat([sums, torch.tensor([float(not intact)], dtype=torch.float64)])
            bar.update(len(x))
    totals = torch.cat([moments, torch.tensor([float(not exact)], dtype=torch.float64)])
    if accelerator is not None and world > 1:
        totals = accelerator.reduce(totals.to(accelerator.device), "sum").cpu()
    n, vi, vi2, nll, nll2, ess, mass, failed, inexact = totals.tolist()
    if not math.isfinite(vi) or not math.isfinite(nll):
        raise InputError(
            f"the model's bound on the {data.name} data is not finite; its training diverged or its "
            "checkpoint is damaged"
        )

    return ImageEvaluation(
        vi=bits(vi / n, dims),
        nll=bits(nll / n, dims),
        kl=bits((vi - nll) / n, dims),
        exact=None if inexact else bits(mass / n, dims),
        vi_error=_error(n, vi, vi2, dims),
        nll_error=_error(n, nll, nll2, dims),
        ess=ess / n,
        unit=unit,
        kind=f"upper bounds in expectation, from {draws:,} draws",
        draws=draws,
        precision=str(precision).removeprefix("torch."),
        num_rows=round(n),
        intact=failed == 0,
    )


@dataclass(frozen=True)
class ExactEvaluation:
    """What a model with an exact likelihood costs on data, in `unit`.

    Attributes:
        nll: minus the mean log-likelihood.
        nll_error: its standard error over data, None for a single one.
        unit: "bits a dimension" or "bits" (a datum).
        kind: "exact".
        precision: of the model; each precision makes a law of its own.
        num_rows: data scored.
        round_trip: whether the flow gave back `num_checked` data from their latents; None: not checked.
        num_checked: data that went through the round trip.
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
        model: scored in a copy of the precision asked for.
        data: a split.
        unit: "bits a dimension", or "bits" for those of a whole datum.
        batch_size: data a pass, on each process.
        limit: score ``limit`` random rows only, always the same.
        precision: of the networks, and so of what is rounded; sums are in float64 in any case.
        checks: data that go through the round trip, over all processes.
        progress: show a bar on stderr.
        accelerator: spread the data over its processes.

    Raises:
        InputError: nothing to score, data of another kind than the model's, a model without an exact
            likelihood, or a likelihood that is not finite.
    """
    for name, value in (("batch size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    scored = _copy(model, precision)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    rows = data.subset(limit or data.num_rows)
    total, dims = rows.num_rows, 1 if unit == "bits" else scored.dim
    # Rows, nats, their squares, rows checked, failures.
    sums = torch.zeros(5, dtype=torch.float64)
    with (
        torch.inference_mode(),
        tqdm(total=total, unit="row", desc="score", delay=1, disable=not (progress and rank == 0)) as bar,
    ):
        for start in range(rank * batch_size, total, world * batch_size):
            x = rows.rows(slice(start, min(total, start + batch_size))).to(scored.device)
            nats = -scored.log_prob(x).double().cpu()
            rows_checked = x[: max(0, checks - start)]
            verdict = scored.round_trip(rows_checked) if len(rows_checked) else None
            checked = 0 if verdict is None else len(rows_checked)
            found = [len(x), float(nats.sum()), float(nats.square().sum()), checked, verdict is False]
            sums += torch.tensor(found, dtype=torch.float64)
            bar.update(len(x))
    if accelerator is not None and world > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
    n, first, second, num_checked, failures = sums.tolist()
    if not math.isfinite(first):
        raise InputError(
            f"the model's likelihood of the {data.name} data is not finite; its training diverged or its "
            "checkpoint is damaged"
        )
    return ExactEvaluation(
        nll=bits(first / n, dims),
        nll_error=_error(n, first, second, dims),
        unit=unit,
        kind="exact",
        precision=str(precision).removeprefix("torch."),
        num_rows=round(n),
        round_trip=failures == 0 if num_checked else None,
        num_checked=round(num_checked),
    )


def _copy(model: DflowImageModel, precision: torch.dtype) -> DflowImageModel:
    """For scoring, in the precision asked for."""
    scored: DflowImageModel = copy.deepcopy(model).train(False)
    nn.Module.to(scored, precision)
    return scored


def _error(n: float, first: float, second: float, dims: int) -> float | None:
    """Standard error of a mean, in bits, from the sums of nats and of their squares."""
    spread = max(0.0, second / n - (first / n) ** 2)
    return bits(math.sqrt(spread / (n - 1)), dims) if n > 1 else None


def _distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to score, float64 weights that add up to the number of ``values``; see `_REPEATS`."""
    rows, counts = torch.unique(values, dim=0, return_counts=True)
    repeats = counts.clamp(max=_REPEATS)
    weights = (counts / repeats).double()
    return rows.repeat_interleave(repeats, 0), weights.repeat_interleave(repeats)
