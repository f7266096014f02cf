"""Pictures of a model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import isinf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.config import InputError
from dflow.data import Samples
from dflow.dequantize import Partition
from dflow.hf import DflowImageModel


@torch.no_grad()
def density(model: DflowImageModel, data: Samples, cells: int = 400, draws: int = 200_000) -> bytes:
    """p(v) of a model of two dimensions, beside a histogram of its dequantized data ``E_x q(v | x)``; a PNG.

    As in figure 2 of Hoogeboom et al. 2020 (arXiv 2001.11235). White lines are the edges of cells.

    Raises:
        InputError: another number of dimensions, a model without a density, too few ``cells``.
    """
    if model.dim != 2:
        raise InputError(f"a density is drawn in two dimensions; this model has {model.dim}")
    if cells < 2:
        raise InputError(f"cells {cells} must be at least 2")
    from matplotlib.figure import Figure  # a second of import that no other verb needs

    law, device = model.dequantized, model.device
    generator = torch.Generator(device).manual_seed(0)
    x, _ = data.crops(draws, 2, torch.Generator().manual_seed(0))
    v = torch.cat([law.dequantize(part.to(device), generator) for part in x.split(10_000)]).cpu()
    low, high = v.quantile(0.001, 0).min().item() - 0.5, v.quantile(0.999, 0).max().item() + 0.5
    grid = torch.linspace(low, high, cells, device=device, dtype=model.dtype)
    points = torch.cartesian_prod(grid, grid)
    p = torch.cat([law.density.log_prob(part) for part in points.split(1 << 16)]).exp()
    edges = np.linspace(low, high, cells // 2 + 1)
    q, _, _ = np.histogram2d(v[:, 0].numpy(), v[:, 1].numpy(), bins=(edges, edges), density=True)
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(1, 2),
        (("density p(v)", _square(p, cells)), ("dequantized data q(v)", q)),
        strict=True,
    ):
        # A thin density is all spike: the colours end where 99.5 % of the plane does, or at a tenth of it.
        top = max(float(np.quantile(values, 0.995)), float(values.max()) / 10)
        shown = axes.imshow(
            values.T, origin="lower", extent=(low, high, low, high), vmax=top, vmin=0, cmap="magma"
        )
        for line, column in ((axes.axvline, 0), (axes.axhline, 1)):
            for edge in _edges(law.partition, x, column):
                line(edge, color="white", linewidth=0.5, alpha=0.5)
        axes.set(title=title, xlabel="v$_1$", ylabel="v$_2$")
        figure.colorbar(shown, ax=axes, shrink=0.85)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def progressive(
    names: Sequence[str],
    images: Sequence[Sequence[NDArray[Any]]],
    shares: Sequence[float],
    psnr: Sequence[Sequence[float]],
) -> bytes:
    """Pictures as they are seen after each level of a compressed file; a PNG.

    As on slide 11 of Hoogeboom et al. 2019 (arXiv 1905.07376).

    Args:
        names: of the pictures, a row each.
        images: of each picture what is seen after each level, ``(H, W)`` or ``(H, W, 3)`` in 0..1.
        shares: of the file, up to each level.
        psnr: of each picture after each level, in decibels; infinite where nothing is missing.
    """
    from matplotlib.figure import Figure

    rows, columns = len(names), len(shares)
    heights = [0.4 + 2.4 * min(3, max(0.2, seen[0].shape[0] / seen[0].shape[1])) for seen in images]
    figure = Figure(figsize=(2.4 * columns + 0.4, sum(heights) + 0.3), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, axes in enumerate(places):
        for column, place in enumerate(axes):
            place.imshow(images[row][column], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            place.set(xticks=[], yticks=[])
            value = psnr[row][column]
            place.set_xlabel("exact" if isinf(value) else f"{value:.1f} dB", fontsize=9)
            if not row:
                place.set_title(f"{100 * shares[column]:.0f} % of the file", fontsize=10)
            if not column:
                # Of a name no dollar is mathematics.
                place.set_ylabel(names[row].replace("$", r"\$"), fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def coverage(curve: Sequence[tuple[float, float]], levels: Mapping[str, float]) -> bytes:
    """Error on the data that an ensemble is surest of, against their share; a PNG.

    Args:
        curve: shares and errors, both in 0..1.
        levels: by name, errors on all of the data.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    shares, errors = (100 * np.array(side) for side in zip(*curve, strict=True))
    # A good model errs in the last tenth, if anywhere.
    for axes, low in zip(figure.subplots(1, 2, sharey=True), (0, 90), strict=True):
        axes.plot(shares, errors, marker=".", label="surest by spread")
        for i, (name, error) in enumerate(levels.items()):
            axes.axhline(
                100 * error, color=f"C{i + 1}", linestyle="--", linewidth=0.8, label=f"{name}, all data"
            )
        axes.set(xlabel="coverage, % of the data", xlim=(low, 100.0 + (100 - low) / 100))
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("error, %")
    figure.axes[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def training(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """What the validation data cost at each evaluation, by steps and by minutes; a PNG.

    Args:
        runs: by name, evaluations as `dflow.train.history` reads them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, rows in runs.items():
        bits = [row["valid_bits"] for row in rows]
        panels[0].plot([row["step"] for row in rows], bits, marker=".", label=name)
        panels[1].plot([row["seconds"] / 60 for row in rows], bits, marker=".", label=name)
    panels[0].set(xlabel="steps", ylabel="validation, bits")
    panels[1].set(xlabel="minutes")
    found = [row["valid_bits"] for rows in runs.values() for row in rows]
    if min(found) > 0 and max(found) > 4 * min(found):
        panels[0].set_yscale("log")
    panels[1].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _square(values: Tensor, cells: int) -> np.ndarray:
    return values.view(cells, cells).double().cpu().numpy()


def _edges(partition: Partition, x: Tensor, column: int) -> list[float]:
    """Finite edges of the cells of the data in a column, each once; none where it is continuous."""
    if not partition.discrete(x.shape[1])[column]:
        return []
    both = torch.cat([end[:, column] for end in partition.bounds(x[:1000], torch.float64)])
    return sorted({float(e) for e in both[both.isfinite()]})
