"""Compare two ways to draw: from left to right, and by parallel (Jacobi) iterations to a fixed point.

    python scripts/bench_inversion.py --model runs/ptb/autoregressive
    python scripts/bench_inversion.py --model runs/ptb/transformer

For an autoregressive flow this compares `Autoregressive.inverse` of the same latents by ``loop`` (one cached
step a symbol) and by ``jacobi`` (parallel calls). For a model that draws symbols itself it compares `sample`
and `sample_by_fixed_point` with the same noise. Both take turns after one draw each as a warm-up. The results
are the number of network calls, medians of the wall time and of the processor time, and whether both gave the
same symbols. Ratios are of the processor time on a CPU, which other load changes little, else of the wall
time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dflow import hf
from dflow.bijectors import Autoregressive
from dflow.compare import environment
from dflow.distributions import SequenceCategorical
from dflow.flows import Flow

Draw = Callable[[int, int], tuple[Tensor, int]]


def ways(model: hf.DflowModel) -> dict[str, Draw]:
    """Each way to draw: from a number of samples and a seed to symbols and network calls."""
    d = model.distribution

    def generator(seed: int) -> torch.Generator:
        return torch.Generator(model.device).manual_seed(seed)

    if isinstance(d, SequenceCategorical):
        return {
            "loop": lambda n, seed: (d.sample(n, generator=generator(seed)), d.num_calls),
            "jacobi": lambda n, seed: d.sample_by_fixed_point(n, generator=generator(seed)),
        }
    layers = [m for m in d.modules() if isinstance(m, Autoregressive)]
    if not isinstance(d, Flow) or not layers:
        raise SystemExit(f"error: a {model.config.family} model has nothing to draw from left to right")

    def inverse(inversion: str) -> Draw:
        def draw(n: int, seed: int) -> tuple[Tensor, int]:
            for layer in layers:
                layer.inversion, layer.calls = inversion, 0  # type: ignore[assignment]
            x = d.sample(n, generator=generator(seed))
            return x, d.base.num_calls + sum(layer.calls for layer in layers)

        return draw

    return {"loop": inverse("loop"), "jacobi": inverse("jacobi")}


def measure(model: hf.DflowModel, n: int, rounds: int) -> list[dict[str, Any]]:
    """Both ways by turns at ``n`` samples."""
    found = ways(model)
    seconds: dict[str, list[float]] = {way: [] for way in found}
    busy: dict[str, list[float]] = {way: [] for way in found}
    calls: dict[str, list[int]] = {way: [] for way in found}
    same, symbols = 0, 0
    for seed in range(-1, rounds):
        drawn = []
        for way, draw in found.items():
            start, begun = time.perf_counter(), time.process_time()
            x, used = draw(n, seed + 1)
            drawn.append(x.cpu())
            if seed >= 0:
                seconds[way].append(time.perf_counter() - start)
                busy[way].append(time.process_time() - begun)
                calls[way].append(used)
        same, symbols = same + int((drawn[0] == drawn[1]).sum()), symbols + drawn[0].numel()
    cost = busy if model.device.type == "cpu" else seconds
    return [
        {
            "samples": n,
            "way": way,
            "calls": statistics.mean(calls[way]),
            "fewest": min(calls[way]),
            "most": max(calls[way]),
            "ms": round(1e3 * statistics.median(seconds[way]), 2),
            "processor_ms": round(1e3 * statistics.median(busy[way]), 2),
            "speed": round(statistics.median(cost["loop"]) / statistics.median(cost[way]), 3),
            "equal_symbols": same / symbols,
        }
        for way in found
    ]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 16], help="drawn at a time")
    parser.add_argument("--rounds", type=int, default=10, help="draws that are timed")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = hf.load(arguments.model, arguments.device)
    about = environment(model.device) | {"cores": os.cpu_count() or 1}
    print("environment: " + ", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{arguments.model}: {model.config.family}, samples of {model.config.length} symbols\n")
    print("| samples | way | network calls (fewest to most) | ms | processor's ms | speed | equal symbols |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    results = []
    with torch.inference_mode():
        for n in arguments.samples:
            for row in measure(model, n, arguments.rounds):
                results.append(row)
                calls = f"{row['calls']:.1f} ({row['fewest']} to {row['most']})"
                spent = f"{row['ms']:.1f} | {row['processor_ms']:.1f} | {row['speed']:.2f}x"
                print(f"| {n} | {row['way']} | {calls} | {spent} | {row['equal_symbols']:.6f} |", flush=True)
    print(json.dumps({"benchmark": "inversion", **vars(arguments), **about, "rows": results}))


if __name__ == "__main__":
    main()
