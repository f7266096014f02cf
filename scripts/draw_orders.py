"""Draw the picture in docs/guide/concepts.md: which symbols of a sequence each network call draws."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dflow.ops.orders import lockstep

TEXT = "the cat sat on the mat."


def calls_of(num_groups: int) -> list[int]:
    """For each symbol of the text the number of the call that draws it, from 1 on."""
    order = lockstep(len(TEXT), num_groups)
    calls = [0] * len(TEXT)
    for call, row in enumerate(order.tolist(), 1):
        for position in row:
            if position < len(TEXT):
                calls[position] = call
    return calls


def draw(axes: Axes, calls: list[int], title: str) -> None:
    """A row of cells, one for each symbol, darker the later it is drawn."""
    most = max(calls)
    axes.imshow([[call / most for call in calls]], cmap="Blues", vmin=-0.2, vmax=1.6, aspect="equal")
    for position, (symbol, call) in enumerate(zip(TEXT, calls, strict=True)):
        axes.text(position, -0.15, symbol, ha="center", va="center", fontsize=13, family="monospace")
        axes.text(position, 0.3, str(call), ha="center", va="center", fontsize=7)
    axes.set_xticks([p - 0.5 for p in range(1, len(TEXT))], labels=[])
    axes.tick_params(length=0)
    axes.grid(color="white", linewidth=2)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/images/orders.png", type=Path)
    flags = parser.parse_args()
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(3, 1)
    count = len(TEXT)
    draw(panels[0], calls_of(count), f"transformer, lstm: one symbol a call, {count} calls")
    draw(panels[1], calls_of(6), "grouped: every call draws one symbol of each of 4 segments, 6 calls")
    draw(panels[2], calls_of(3), "grouped: shorter segments, 3 calls")
    figure.savefig(flags.output)
    print(flags.output)


if __name__ == "__main__":
    main()
