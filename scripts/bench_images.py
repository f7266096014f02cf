"""Measure the cost of dequantizers and densities of images, as ratios on one machine in one run.

    python scripts/bench_images.py

- Dequantizers: one training step (ELBO, forward and backward) relative to that with uniform noise and the
  same density.
- Density: drawing relative to scoring, and a training step of a spline flow relative to an affine one.
- Evaluation with many draws: the peak memory with 1000 draws relative to that with 10.

After a warm-up each measurement takes turns with its baseline; the result is the median of --rounds. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from dflow import objectives, zoo
from dflow.dequantize import Dequantized, Elbo

DEQUANTIZERS = ("uniform", "normal", "bipartite", "autoregressive")


def build(given: argparse.Namespace, **settings: object) -> tuple[Dequantized, torch.Tensor]:
    values = {
        "shape": given.shape,
        "levels": [256],
        "num_levels": 2,
        "num_flows": 4,
        "elementwise": "affine",
        "hidden_size": given.hidden_size,
        "num_hidden_layers": 3,
        "dequantizer_hidden_size": given.hidden_size,
        "dequantizer_hidden_layers": 3,
        "dequantizer_flows": 2,
    }
    torch.manual_seed(0)
    config = zoo.settings("dequantized", values | settings)
    law = zoo.build_image("dequantized", config)
    generator = torch.Generator().manual_seed(0)
    # A smooth picture with noise: neighbours alike, as in photographs.
    x = torch.randint(0, 256, (given.batch, config.dim), generator=generator) // 8 + 100
    objectives.initialize(law, x, generator)
    return law, x


def step(law: Dequantized, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        law.zero_grad(set_to_none=True)
        values, _ = law.objective(x, Elbo(1))
        (-values.mean()).backward()

    return run


def medians(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, by turns."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def peak(given: argparse.Namespace, draws: int) -> float:
    """MiB that an evaluation with ``draws`` draws adds to the peak of a process of its own."""
    words = ["--memory", str(draws), "--batch", str(given.batch), "--hidden-size", str(given.hidden_size)]
    words += ["--shape", *map(str, given.shape), "--threads", str(given.threads)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(done.stdout)


def memory(given: argparse.Namespace) -> None:
    law, x = build(given, dequantizer="bipartite")
    with torch.inference_mode():
        law.assess(x[:4], 8, 8, torch.Generator().manual_seed(0))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        law.assess(x[:4], given.memory, 8, torch.Generator().manual_seed(0))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shape", type=int, nargs=3, default=[3, 32, 32])
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory:
        memory(given)
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {given.threads} threads, batch {given.batch}, "
          f"shape {given.shape}, hidden_size {given.hidden_size}")  # fmt: skip
    steps = medians({name: step(*build(given, dequantizer=name)) for name in DEQUANTIZERS}, given.rounds)
    print("\ntraining step, affine flow, over uniform noise")
    for name, value in steps.items():
        print(f"  {name:16} {value:8.1f} ms  {value / steps['uniform']:.2f}x")
    law, x = build(given)
    spline, _ = build(given, elementwise="spline")
    with torch.no_grad():
        v = law.dequantize(x, torch.Generator().manual_seed(0))
        passes = medians(
            {
                "score": lambda: law.density.log_prob(v),
                "draw": lambda: law.density.sample(given.batch),
                "score, spline": lambda: spline.density.log_prob(v),
                "draw, spline": lambda: spline.density.sample(given.batch),
            },
            given.rounds,
        )
    print("\ndensity, over scoring with the affine flow")
    for name, value in passes.items():
        print(f"  {name:16} {value:8.1f} ms  {value / passes['score']:.2f}x")
    grown = {str(draws): peak(given, draws) for draws in (10, 1000)}
    print("\nmemory that an evaluation of 4 images adds to one with 8 draws, in chunks of 8")
    for draws, value in grown.items():
        print(f"  {draws:>5} draws {value:8.1f} MiB")
    print(json.dumps({"step_ms": steps, "pass_ms": passes, "memory_mib": grown}))


if __name__ == "__main__":
    main()
