"""Bits of what stands in a gap, given the text on both sides and given the text before it alone.

    python scripts/bench_gaps.py runs/ptb/context_grouped@{1,4,16,32} runs/ptb/context_transformer --gap 32

The text is cut into windows: a gap in the middle, and half of the model's context on either side. Every
window is scored exactly, with standard errors over windows. Models that read only what stands before have no
bits for both sides.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from torch import Tensor

from dflow import hf
from dflow.config import InputError
from dflow.core import Context, Known
from dflow.data import Tokenizer, load
from dflow.train import recipe_of


def windows_of(text: Tensor, size: int, limit: int | None) -> Tensor:
    """The first ``limit`` windows of a text that lie beside each other, (windows, size)."""
    number = len(text) // size if limit is None else min(limit, len(text) // size)
    return text[: number * size].view(number, size).long()


@torch.inference_mode()
def bits(law: Any, windows: Tensor, hidden: slice, batch_size: int) -> tuple[float, float, int]:
    """Mean bits of a symbol of the gap, its standard error, and the network calls of a draw."""
    mask = torch.ones(windows.shape[1], dtype=torch.bool)
    mask[hidden] = False
    gap = int((~mask).sum())
    contexts = [Context(known=Known(x, mask)) for x in windows.split(batch_size)]
    nats = [-law.log_prob(context.known.symbols, context).double() for context in contexts if context.known]
    each = torch.cat(nats) / (gap * math.log(2))
    calls = law.needed(windows.shape[1], contexts[0])
    return float(each.mean()), float(each.std() / math.sqrt(len(each))), calls


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one model."""
    folder, _ = hf.split_calls(name)
    model, tokenizer = hf.load(name), Tokenizer.load(folder)
    context, gap = model.config.context, arguments.gap
    if not context or not 0 < gap <= model.config.length:
        raise InputError(
            f"{name}: needs a model with a context, and a gap of 1 to {model.config.length} symbols, found "
            f"context {context} and gap {gap}"
        )
    ids = getattr(load(recipe_of(folder).data, tokenizer), arguments.split).ids
    half = context // 2
    windows = windows_of(ids, 2 * half + gap, arguments.limit)
    hidden, row = slice(half, half + gap), {"model": name, "windows": len(windows), "gap": gap, "sides": half}
    if model.config.record.known == "anywhere":
        row["both"], row["both_error"], row["calls"] = bits(model.law, windows, hidden, arguments.batch_size)
    left = windows[:, : half + gap]
    row["left"], row["left_error"], row["calls"] = bits(model.law, left, hidden, arguments.batch_size)
    return row


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="output folders of `dflow train`, with @calls if wished")
    parser.add_argument("--gap", type=int, default=32, help="symbols of the gap")
    parser.add_argument("--split", choices=["train", "valid", "test"], default="test")
    parser.add_argument("--limit", type=int, help="windows that are scored, at most (default: all)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print("| model | network calls | bits given both sides | bits given the text before |\n|---|---|---|---|")
    for name in arguments.models:
        row = measure(name, arguments)
        rows.append(row)
        both = f"{row['both']:.4f} ± {row['both_error']:.4f}" if "both" in row else "-"
        left = f"{row['left']:.4f} ± {row['left_error']:.4f}"
        print(f"| {name} | {row['calls']} | {both} | {left} |", flush=True)
    print(json.dumps({"torch": torch.__version__, "threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
