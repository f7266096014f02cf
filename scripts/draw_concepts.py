"""Draw the pictures of the guide's page on concepts: maps of symbols, a coupling, drafts, exact and bound."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from dflow.elementwise import ModAffine, ModRank, ModShift

BLUE, LIGHT, ORANGE, GREY = "#1f4e8c", "#cfe0f3", "#c8641e", "#8a8a8a"


def cell(axes: Axes, x: float, y: float, text: str, fill: str = "white", colour: str = "black") -> None:
    """A square with a symbol in it, its centre at (x, y)."""
    axes.add_patch(Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, facecolor=fill, edgecolor=GREY, linewidth=0.8))
    axes.text(x, y - 0.02, text, ha="center", va="center", fontsize=12, family="monospace", color=colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=1, shrinkA=0)
    )


def blank(axes: Axes, width: tuple[float, float], height: tuple[float, float]) -> None:
    axes.set(xlim=width, ylim=height, aspect="equal")
    axes.axis("off")


def maps(axes: Sequence[Axes]) -> None:
    """What the maps of one symbol do to five symbols: arrows from the data to the latent."""
    K = 5
    x = torch.arange(K)[None]
    loc = torch.eye(K)[2]
    scale = torch.eye(4)[1]  # the units modulo 5 are 1, 2, 3 and 4
    seen = torch.tensor([0.1, 0.9, 0.3, 1.5, 0.6])
    panels = [
        (ModShift(K), loc, "shift: z = x - 2 mod 5"),
        (ModAffine(K), torch.cat([loc, scale]), "affine: z = (x - 2) / 2 mod 5"),
        (ModRank(K), seen, "rank: the likeliest symbol becomes 0"),
    ]
    for ax, (family, params, title) in zip(axes, panels, strict=True):
        z = family.forward(x, params.expand(1, K, -1))[0][0].tolist()
        for a, b in enumerate(z):
            arrow(ax, (a, 1.55), (b, 0.47), BLUE)
        for symbol in range(K):
            cell(ax, symbol, 2, str(symbol), LIGHT)
            cell(ax, symbol, 0, str(symbol))
        if isinstance(family, ModRank):
            for symbol, logit in enumerate(seen.tolist()):
                ax.add_patch(Rectangle((symbol - 0.3, 2.5), 0.6, 0.6 * logit, facecolor=ORANGE, linewidth=0))
        ax.text(-0.75, 2, "x", ha="center", va="center", style="italic")
        ax.text(-0.75, 0, "z", ha="center", va="center", style="italic")
        ax.set_title(title, fontsize=10)
        blank(ax, (-1, 4.6), (-0.6, 3.5))


def coupling(ax: Axes) -> None:
    """Two couplings of eight symbols: the net reads the white symbols, the blue ones are mapped."""
    rows, names = (5.2, 2.6, 0.0), ("data x", "after coupling 1", "latent z")
    texts = ("the cat.", "t0e0c2t0", "00e002t0")
    for y, name, text in zip(rows, names, texts, strict=True):
        ax.text(-0.9, y, name, ha="right", va="center", fontsize=10)
        for i, symbol in enumerate(text):
            cell(ax, 1.15 * i, y, symbol.replace(" ", "␣"), LIGHT if symbol in "02" else "white")
    for top, hidden, what in ((rows[0], (1, 3, 5, 7), "net 1: fine"), (rows[1], (0, 4), "net 2: coarser")):
        for i in range(8):
            x = 1.15 * i
            if i in hidden:
                arrow(ax, (x, top - 0.45), (x, top - 2.15), BLUE)
                for near in (i - 1, i + 1) if top == rows[0] else (i - 2, i + 2):
                    if 0 <= near < 8:
                        arrow(ax, (1.15 * near, top - 0.45), (x - 0.12 * (i - near), top - 1.2), ORANGE)
            else:
                ax.plot([x, x], [top - 0.45, top - 2.15], color="0.8", linewidth=1, linestyle=":")
        ax.text(8.9, top - 1.25, what, ha="left", va="center", fontsize=10, color=ORANGE)
    blank(ax, (-4.2, 12.2), (-0.7, 5.8))


def drafts(ax: Axes) -> None:
    """Three calls of a causal net with drafts: proposed, accepted up to the first difference, corrected."""
    known = "the cat s"
    calls = (("at in", 3, "o"), ("n the r", 6, "m"), ("at, ", 2, "."))
    done = known
    for number, (proposed, accepted, right) in enumerate(calls):
        y = -1.9 * number
        ax.text(-0.9, y, f"call {number + 1}", ha="right", va="center", fontsize=10)
        for i, symbol in enumerate(done):
            cell(ax, i, y, symbol.replace(" ", "␣"), "0.93")
        for i, symbol in enumerate(proposed):
            x, good = len(done) + i, i < accepted
            cell(ax, x, y, symbol.replace(" ", "␣"), LIGHT if good else "white", BLUE if good else "0.65")
            if not good:
                ax.plot([x - 0.3, x + 0.3], [y - 0.3, y + 0.3], color="0.65", linewidth=1)
        ax.text(
            len(done) + accepted, y - 0.88, right, ha="center", va="center", family="monospace", color=ORANGE
        )
        ax.text(25, y, f"{accepted + 1} symbols", va="center", fontsize=10)
        done += proposed[:accepted] + right
    blank(ax, (-3.2, 28.5), (-5, 0.8))


def certainty(axes: Sequence[Axes]) -> None:
    """What the three words say: one number, a number on one side of it, a number with an error."""
    truth = 1.40
    generator = torch.Generator().manual_seed(3)
    draws = 1.40 + 0.05 * torch.randn(12, generator=generator)
    titles = (
        "exact: -log2 p itself",
        "bound: above the truth on average",
        "estimate: a mean of draws and its error",
    )
    for ax, title in zip(axes, titles, strict=True):
        ax.axvline(truth, color="black", linewidth=1, linestyle=":")
        ax.text(truth, 1.02, "truth", ha="center", va="bottom", fontsize=8)
        ax.set(xlim=(1.25, 1.75), ylim=(0, 1), yticks=[], xlabel="bits a character")
        ax.set_title(title, fontsize=10, pad=18)
        ax.spines[["top", "left", "right"]].set_visible(False)
    axes[0].plot([truth], [0.5], "o", color=BLUE, markersize=9)
    axes[1].add_patch(Rectangle((truth, 0.35), 0.22, 0.3, facecolor=LIGHT))
    axes[1].plot([truth + 0.22], [0.5], "o", color=BLUE, markersize=9)
    axes[1].text(truth + 0.11, 0.72, "gap", ha="center", fontsize=9)
    axes[2].plot(draws, torch.full((12,), 0.25), "|", color=GREY, markersize=12)
    mean, error = float(draws.mean()), float(draws.std()) / math.sqrt(12)
    axes[2].errorbar([mean], [0.6], xerr=[error], fmt="o", color=BLUE, capsize=4, markersize=9)


def permutation(axes: Sequence[Axes]) -> None:
    """All 25 sequences of two symbols: where a coupling moves their probabilities."""
    K = 5
    first = torch.tensor([0.4, 0.25, 0.15, 0.12, 0.08])
    step = torch.tensor([0.05, 0.05, 0.7, 0.15, 0.05])
    data = torch.stack([first[a] * step.roll(a) for a in range(K)])
    latent = torch.stack([data[a].roll(-a) for a in range(K)])
    for ax, table, name in zip(axes[::2], (data, latent), ("x", "z"), strict=True):
        ax.imshow(table, cmap="Blues", vmin=0, vmax=0.32)
        for a in range(K):
            for b in range(K):
                colour = "white" if table[a, b] > 0.15 else "0.25"
                ax.text(
                    b, a, f"{a}{b}", ha="center", va="center", fontsize=9, family="monospace", color=colour
                )
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_title(
            {"x": "data x: dependent symbols", "z": "latent z: independent symbols"}[name], fontsize=10
        )
    middle = axes[1]
    arrow(middle, (0.05, 0.62), (0.95, 0.62), BLUE)
    arrow(middle, (0.95, 0.38), (0.05, 0.38), ORANGE)
    middle.text(0.5, 0.68, "forward\nscores", ha="center", va="bottom", fontsize=10, color=BLUE)
    middle.text(0.5, 0.32, "inverse\ndraws", ha="center", va="top", fontsize=10, color=ORANGE)
    middle.text(0.5, 0.5, "z2 = x2 - x1 mod 5", ha="center", va="center", fontsize=9)
    middle.set(xlim=(0, 1), ylim=(0, 1))
    middle.axis("off")


def save(path: Path, figure: Figure) -> None:
    # The same bytes every time: no date, no random names.
    with rc_context({"svg.hashsalt": "dflow"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(path)


def sheet(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/images", type=Path, help="folder of the pictures")
    folder = parser.parse_args().output
    figure = sheet(9, 3)
    permutation(figure.subplots(1, 3, width_ratios=[1, 0.6, 1]))
    save(folder / "flow.svg", figure)
    figure = sheet(9, 2.6)
    maps(figure.subplots(1, 3))
    save(folder / "maps.svg", figure)
    figure = sheet(9, 3.7)
    coupling(figure.subplots())
    save(folder / "coupling.svg", figure)
    figure = sheet(9, 2.1)
    drafts(figure.subplots())
    save(folder / "drafts.svg", figure)
    figure = sheet(9, 2)
    certainty(figure.subplots(1, 3))
    save(folder / "certainty.svg", figure)


if __name__ == "__main__":
    main()
