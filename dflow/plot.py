"""Plots: of a density, of a compressed file, of trainings, of several models. Each is the bytes of a PNG.

All have one style (`_figure`). Curves carry their names at their ends, in their colours, instead of a legend.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf, log10
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.config import InputError
from dflow.data import Samples
from dflow.dequantize import Partition
from dflow.hf import DflowImageModel
from dflow.ops.devices import moved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which most people can tell apart, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Without pyplot, which keeps state and may look for a display."""
    from matplotlib.figure import Figure  # a second of import that no other command needs

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Labels at 1, 2 and 5 of every power of ten; more on a short range and fewer on a long one."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    decades = log10(high / low)
    steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    # On less than half a power of ten even those leave one label or none.
    axis.set_major_locator(MaxNLocator(6) if decades < 0.5 else LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _name_curves(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside ``(x, y, name)``, the right end of a curve; names that would touch move apart.

    The limits of ``axes`` have to be settled before, since distances are measured in points on the paper.
    """
    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()
    scale = 72 / figure.dpi
    heights = [axes.transData.transform((x, y))[1] * scale for x, y, _ in ends]
    gap = 10.0
    placed: list[tuple[int, float]] = []
    for i in sorted(range(len(ends)), key=lambda i: heights[i]):
        placed.append((i, max(heights[i], placed[-1][1] + gap) if placed else heights[i]))
    # A stack of names has its middle where the middle of its points is.
    lift = float(np.mean([height - heights[i] for i, height in placed])) if placed else 0.0
    for i, height in placed:
        x, y, name = ends[i]
        axes.annotate(
            name.replace("$", r"\$"),  # no dollar in a name is mathematics
            (x, y),
            (7, height - lift - heights[i]),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_colour(i),
            annotation_clip=False,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        )


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """For each folder the shortest end of its path that no other one has.

    >>> short_names(["runs/ptb/lstm", "runs/text8/lstm", "demo/grouped@8"])
    {'runs/ptb/lstm': 'ptb/lstm', 'runs/text8/lstm': 'text8/lstm', 'demo/grouped@8': 'grouped@8'}
    """
    paths = {folder: PurePath(folder).parts for folder in folders}
    ends = {}
    for folder, names in paths.items():
        others = [other for other in paths.values() if other != names]
        size = 1
        while size < len(names) and any(other[-size:] == names[-size:] for other in others):
            size += 1
        ends[folder] = str(PurePath(*names[-size:])) if names else folder
    return ends


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
    law, device = model.dequantized, model.device
    generator = torch.Generator(device).manual_seed(0)
    x, _ = data.crops(draws, 2, torch.Generator().manual_seed(0))
    v = torch.cat([law.dequantize(moved(rows, device), generator) for rows in x.split(10_000)]).cpu()
    margin = 0.05 * float((v.quantile(0.999, 0) - v.quantile(0.001, 0)).max())
    low, high = v.quantile(0.001, 0).min().item() - margin, v.quantile(0.999, 0).max().item() + margin
    grid = torch.linspace(low, high, cells, device=device, dtype=model.dtype)
    points = torch.cartesian_prod(grid, grid)
    p = torch.cat([law.density.log_prob(rows) for rows in points.split(1 << 16)]).exp()
    edges = np.linspace(low, high, cells // 2 + 1)
    q, _, _ = np.histogram2d(v[:, 0].numpy(), v[:, 1].numpy(), bins=(edges, edges), density=True)
    panels = (("density p(v) of the model", _square(p, cells)), ("dequantized data q(v)", q))
    # One scale for both, since they are to be compared. A thin density is all spike: the colours end where
    # 99.5 % of the plane does, or at a tenth of the largest value.
    top = max(max(float(np.quantile(x, 0.995)), float(x.max()) / 10) for _, x in panels)
    figure = _figure(9, 4.4)
    places = figure.subplots(1, 2, sharey=True)
    for axes, (title, values) in zip(places, panels, strict=True):
        picture = axes.imshow(
            values.T, origin="lower", extent=(low, high, low, high), vmax=top, vmin=0, cmap="Blues"
        )
        for line, column in ((axes.axvline, 0), (axes.axhline, 1)):
            for edge in _edges(law.partition, x, column):
                line(edge, color="black", linewidth=0.5, alpha=0.4)
        axes.set(title=title, xlabel="v$_1$")
    places[0].set_ylabel("v$_2$")
    clipped = any(float(values.max()) > top for _, values in panels)
    label = (
        f"probability per unit area (darkest: {top:.3g} and more)" if clipped else "probability per unit area"
    )
    figure.colorbar(
        picture, ax=list(places), shrink=0.85, label=label, extend="max" if clipped else "neither"
    )
    return _png(figure)


def progressive(
    names: Sequence[str],
    images: Sequence[Sequence[NDArray[Any]]],
    shares: Sequence[float],
    psnr: Sequence[Sequence[float]],
) -> bytes:
    """Pictures as they are seen after each level of a compressed file; a PNG.

    As on slide 11 of Hoogeboom et al. 2019 (arXiv 1905.07376).

    Args:
        names: the names of the pictures, a row each.
        images: each picture as it is seen after each level, ``(H, W)`` or ``(H, W, 3)`` in 0..1.
        shares: the share of the file up to each level.
        psnr: peak signal-to-noise ratios of each picture after each level, in decibels; infinite where exact.
    """
    rows, columns = len(names), len(shares)
    heights = [0.4 + 2.4 * min(3, max(0.2, seen[0].shape[0] / seen[0].shape[1])) for seen in images]
    figure = _figure(2.4 * columns + 0.4, sum(heights) + 0.3)
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
                # No dollar in a name is mathematics.
                place.set_ylabel(names[row].replace("$", r"\$"), fontsize=9)
    return _png(figure)


def coverage(curve: Sequence[tuple[float, float]], levels: Mapping[str, float]) -> bytes:
    """Error on the data that an ensemble is surest of, against their share.

    The plot begins shortly before the first error, and says up to which share there is no error.

    Args:
        curve: shares and errors, both in 0..1.
        levels: errors on all of the data, by name.
    """
    shares, errors = (100 * np.array(side) for side in zip(*sorted(curve), strict=True))
    wrong = np.flatnonzero(errors > 0)
    first_wrong = int(wrong[0]) if len(wrong) else len(shares) - 1
    low = max(0.0, shares[first_wrong] - 0.15 * (100 - shares[first_wrong]) - 1)
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    axes.plot(shares, errors, marker=".", color=_colour(0))
    axes.set(
        xlim=(low, 100),
        xlabel="share of the data that is answered, the surest first (%)",
        ylabel="wrong answers among these (%)",
    )
    axes.set_ylim(bottom=0)
    _style(axes)
    # Networks with equally many errors share a line, which names them all.
    names: dict[float, list[str]] = {}
    for name, error in levels.items():
        names.setdefault(100 * error, []).append(name)
    ends = [(100.0, float(errors[-1]), "ensemble, surest first")]
    for i, (error, sharing) in enumerate(names.items(), 1):
        axes.axhline(error, color=_colour(i), linestyle="--", linewidth=1)
        ends.append((100.0, error, f"{' and '.join(sharing)}, all data: {error:.2f} %"))
    if first_wrong:
        title = f"No error on the surest {shares[first_wrong - 1]:g} % of the data"
        axes.set_title(title, fontsize=10, loc="left")
    _name_curves(axes, ends)
    return _png(figure)


def training(runs: Mapping[str, Sequence[Mapping[str, float]]], unit: str = "bits") -> bytes:
    """The cost of the validation data at each evaluation, by steps and by minutes.

    Args:
        runs: evaluations by the names of the runs, as `dflow.train.history` reads them.
        unit: the unit of the cost, "bits a character".
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(11, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    names = short_names(list(runs))
    ends = []
    for i, (name, rows) in enumerate(runs.items()):
        bits = [row["valid_bits"] for row in rows]
        minutes = [row["seconds"] / 60 for row in rows]
        panels[0].plot([row["step"] for row in rows], bits, marker=".", color=_colour(i))
        panels[1].plot(minutes, bits, marker=".", color=_colour(i))
        ends.append((minutes[-1], bits[-1], names[name]))
    panels[0].set(xlabel="steps", title="by steps")
    panels[0].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panels[1].set(xlabel="minutes", title="by time")
    values = [row["valid_bits"] for rows in runs.values() for row in rows]
    _log_where_wide(panels[0], values, f"validation: {unit}")
    for axes in panels:
        _style(axes)
    _name_curves(panels[1], ends)
    return _png(figure)


#: An evaluation of a training: steps, minutes, and the figure of the validation data.
Evaluation = tuple[int, float, float]


@dataclass(frozen=True)
class Combination:
    """Trainings of a sweep that differ in their seeds alone.

    Attributes:
        name: of its settings.
        curves: the evaluations of each training, of one at least.
        ends: the best figure of each training that is done.
        value: the setting that varies, where it is one and a number.
    """

    name: str
    curves: Sequence[Sequence[Evaluation]]
    ends: Sequence[float]
    value: float | None


def sweep(combinations: Sequence[Combination], unit: str, setting: str, best: int | None = None) -> bytes:
    """The figure of the validation data at each evaluation, and the best one of each training of a sweep.

    The second panel is over the setting that varies, where every combination has a value of it, else it has a
    line for each combination. A diamond is a mean over seeds, its bar the standard deviation.

    Args:
        combinations: all of them with a value, or none.
        unit: of the figures.
        setting: what varies.
        best: the index of the best combination.
    """
    figure = _figure(11, max(4.2, 1 + 0.2 * len(combinations)))
    learning, final = figure.subplots(1, 2)
    over_values = all(combination.value is not None for combination in combinations)
    # Else the second panel names them, in the same colours.
    _learning_curves(learning, combinations, unit, named=over_values)
    for i, combination in enumerate(combinations):
        if not combination.ends:
            continue
        mean = float(np.mean(combination.ends))
        deviation = float(np.std(combination.ends, ddof=1)) if len(combination.ends) > 1 else 0.0
        place = float(i) if combination.value is None else combination.value
        shape = {
            "fmt": "*" if i == best else "D",
            "ms": 12 if i == best else 6,
            "color": _colour(i),
            "capsize": 3,
        }
        points = [place] * len(combination.ends)
        if over_values:
            final.scatter(points, combination.ends, 16, _colour(i), alpha=0.5)
            final.errorbar(place, mean, deviation, **shape)
        else:
            final.scatter(combination.ends, points, 16, _colour(i), alpha=0.5)
            final.errorbar(mean, place, xerr=deviation, **shape)
    title = "best of each training" + ("" if best is None else "; the star is the best mean")
    if over_values:
        final.set(xlabel=setting, ylabel=f"validation: {unit}", title=title)
        _tick_values(final, [combination.value or 0.0 for combination in combinations])
    else:
        names = [combination.name.replace("$", r"\$") for combination in combinations]
        final.set(xlabel=f"validation: {unit}", title=title, ylim=(len(names) - 0.5, -0.5))
        final.set_yticks(range(len(names)), names)
    _style(final)
    return _png(figure)


def _tick_values(axes: Axes, values: Sequence[float]) -> None:
    """Label the values of a setting, where they are few; on a log scale where they are far apart."""
    if min(values) > 0 and max(values) >= 4 * min(values):
        axes.set_xscale("log")
        axes.set_xlabel(f"{axes.get_xlabel()} (log scale)")
        _log_ticks(axes.xaxis, min(values), max(values))
    if len(values) <= 8:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()


def _learning_curves(axes: Axes, combinations: Sequence[Combination], unit: str, named: bool) -> None:
    """The evaluations of all trainings, by steps; by minutes where all took equally many, and not steps."""
    every = [curve for combination in combinations for curve in combination.curves]
    steps, minutes = ([curve[-1][i] for curve in every] for i in (0, 1))
    by_time = max(steps) > min(steps) and max(minutes) < 1.05 * min(minutes)
    ends = []
    for i, combination in enumerate(combinations):
        for curve in combination.curves:
            places = [row[1] if by_time else row[0] for row in curve]
            axes.plot(places, [row[2] for row in curve], marker=".", color=_colour(i), alpha=0.7)
        last = [curve[-1] for curve in combination.curves]
        x = max(row[1] if by_time else row[0] for row in last)
        ends.append((float(x), float(np.mean([row[2] for row in last])), combination.name))
    axes.set(xlabel="minutes" if by_time else "steps", title="during the training")
    _style(axes)
    _log_where_wide(axes, [row[2] for curve in every for row in curve], f"validation: {unit}")
    if named:
        _name_curves(axes, ends)


def _log_where_wide(axes: Axes, values: Sequence[float], label: str) -> None:
    """Name the vertical axis; on a log scale where the largest value is more than twice the least."""
    axes.set_ylabel(label)
    if min(values) > 0 and max(values) > 2 * min(values):
        axes.set_yscale("log")
        axes.set_ylabel(f"{label} (log scale)")
        _log_ticks(axes.yaxis, min(values), max(values))


@dataclass(frozen=True)
class Curve:
    """One model in the plot of bits against network calls; a point for each number of calls.

    Attributes:
        name: the text at its end.
        calls: network calls to draw one sample, ascending.
        bits: exact bits a character.
        errors: standard errors of these, 0 where one is missing.
        milliseconds: latency of one sample.
        partial: for each point, whether only a part of the text was scored.
    """

    name: str
    calls: Sequence[int]
    bits: Sequence[float]
    errors: Sequence[float]
    milliseconds: Sequence[float]
    partial: Sequence[bool]


def frontier(curves: Sequence[Curve], text: str, length: int, line: tuple[str, float] | None = None) -> bytes:
    """Bits against network calls and against latency; a line joins the numbers of calls of one model.

    Args:
        curves: the models.
        text: the name of the text that was scored.
        length: symbols of a sample.
        line: name and bits of what draws nothing, as a compressor: a dashed line.
    """
    figure = _figure(11, max(4.6, 1 + 0.2 * len(curves)))
    panels = figure.subplots(1, 2, sharey=True)
    for i, curve in enumerate(curves):
        for axes, places in zip(panels, (curve.calls, curve.milliseconds), strict=True):
            axes.errorbar(places, curve.bits, curve.errors, fmt="-", color=_colour(i), capsize=3, zorder=2)
            faces = ["white" if partial else _colour(i) for partial in curve.partial]
            axes.scatter(places, curve.bits, 28, faces, edgecolors=_colour(i), zorder=3)
    if any(any(curve.partial) for curve in curves):
        figure.suptitle("Hollow points: scored on a part of the text", fontsize=9, x=0.01, ha="left")
    if line is not None:
        name, bits = line
        for axes in panels:
            axes.axhline(bits, color="0.45", linestyle="--", linewidth=1, zorder=1)
        panels[0].annotate(
            name, (0.01, bits), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=8, color="0.35",
        )  # fmt: skip
    panels[0].set_ylabel(f"exact bits a character ({text})")
    panels[0].set_xlabel("network calls for one sample (log scale)")
    panels[1].set_xlabel(f"latency of one sample of {length:,} symbols (ms, log scale)")
    for curve in curves:
        for x, y, calls in zip(curve.milliseconds, curve.bits, curve.calls, strict=True):
            panels[1].annotate(f"{calls}", (x, y), (4, 4), textcoords="offset points", fontsize=7)
    panels[1].set_title("small numbers: network calls", fontsize=9, loc="right")
    for axes in panels:
        axes.set_xscale("log")
        axes.margins(x=0.1, y=0.1)
        _style(axes)
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter("{x:g}")
    times = [ms for curve in curves for ms in curve.milliseconds]
    _log_ticks(panels[1].xaxis, min(times), max(times))
    _name_curves(panels[1], [(c.milliseconds[-1], c.bits[-1], c.name) for c in curves])
    return _png(figure)


def _square(values: Tensor, cells: int) -> np.ndarray:
    return values.view(cells, cells).cpu().double().numpy()


def _edges(partition: Partition, x: Tensor, column: int) -> list[float]:
    """Finite edges of the cells of the data in a column, each once; no edges where it is continuous."""
    if not partition.discrete(x.shape[1])[column]:
        return []
    edges = torch.cat([end[:, column] for end in partition.bounds(x[:1000], torch.float64)])
    return sorted({float(edge) for edge in edges[edges.isfinite()]})
