"""Draw the pictures in the guide: which symbols of a sequence each network call draws, given which others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dflow.ops.orders import lockstep

TEXT = "the cat sat on the mat."


def calls_of(num_groups: int, known: Sequence[int] = ()) -> list[int]:
    """For each symbol of the text the number of the call that draws it, from 1 on; 0 where it is known."""
    hidden = [position for position in range(len(TEXT)) if position not in known]
    order = lockstep(len(hidden), num_groups)
    calls = [0] * len(TEXT)
    for call, row in enumerate(order.tolist(), 1):
        for place in row:
            if place < len(hidden):
                calls[hidden[place]] = call
    return calls


def draw(axes: Axes, calls: list[int], title: str) -> None:
    """A row of cells, one for each symbol, darker the later it is drawn; grey where it is known."""
    most = max(calls)
    axes.imshow([[call / most for call in calls]], cmap="Blues", vmin=-0.2, vmax=1.6, aspect="equal")
    for position, call in enumerate(calls):
        if not call:
            axes.add_patch(Rectangle((position - 0.5, -0.5), 1, 1, color="0.85"))
    for position, (symbol, call) in enumerate(zip(TEXT, calls, strict=True)):
        axes.text(position, -0.15, symbol, ha="center", va="center", fontsize=13, family="monospace")
        axes.text(
            position, 0.3, str(call) if call else "known", ha="center", va="center", fontsize=7 if call else 5
        )
    axes.set_xticks([p - 0.5 for p in range(1, len(TEXT))], labels=[])
    axes.tick_params(length=0)
    axes.grid(color="white", linewidth=2)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")


def save(path: Path, rows: Sequence[tuple[list[int], str]]) -> None:
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    for axes, (calls, title) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        draw(axes, calls, title)
    figure.savefig(path)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/images", type=Path, help="folder of the pictures")
    folder, count = parser.parse_args().output, len(TEXT)
    save(
        folder / "orders.png",
        [
            (calls_of(count), f"transformer, lstm: one symbol a call, {count} calls"),
            (calls_of(6), "grouped: every call draws one symbol of each of 4 segments, 6 calls"),
            (calls_of(3), "grouped: shorter segments, 3 calls"),
        ],
    )
    gaps = [*range(8), *range(12, 16), *range(19, count)]
    save(
        folder / "given.png",
        [
            (calls_of(4, range(8)), "a prompt: what is known is read before the first call, 4 calls"),
            (calls_of(4, gaps), "two gaps: the text on both sides is read, 4 calls"),
            (calls_of(4, range(15, count)), "a known ending, 4 calls"),
        ],
    )


if __name__ == "__main__":
    main()
