"""Compare the training loop with the simplest one, and measure a second process and the making of batches.

    python scripts/bench_train.py
    python scripts/bench_train.py recipes/grouped.yaml --steps 60

- `plain`: the same network, batch, clipping and optimizer (fused AdamW) in a loop of ten lines, without
  schedules, averages, checks, progress bars or saves. `dflow`: `dflow.train.train`.
- `compiled`: the plain loop with `torch.compile`, from its second step on. `dflow compiled`: dflow with
  `train.compile`.
- `returned`: dflow without `keep_memory`, with the settings of the C library. The plain loop keeps memory as
  dflow does.
- `two`: dflow on two processes of one thread each (gloo), with half of the batch each, relative to one
  process of one thread with the whole batch. The efficiency is half the ratio of the times. `pieces`: the
  same, each process with half of the model as well (`train.shard`).
- `batch`: making a batch, as a share of a step.

Each kind runs in a process of its own, in turn, once with few steps and once with more; the difference is the
time of the steps, without the start and the evaluation at the end. The peak memory is that of the whole
process. Results are medians of --rounds; --only selects kinds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dflow.memory import keep_memory
from dflow.train import load_recipe, train
from dflow.train.tasks import task_of


def settings(given: argparse.Namespace, steps: int, output: str) -> list[str]:
    budget = [f"train.steps={steps}", "train.minutes=null", "train.trackers=[]", "train.samples=0"]
    budget += [f"train.{name}=true" for name in ("compile", "shard") if given.worker == f"dflow-{name}"]
    return [*budget, f"train.eval_every={steps}", "train.eval_chunks=1", f"output={output}", *given.set]


def plain(given: argparse.Namespace, steps: int, output: str, compiled: bool) -> float:
    """The simplest loop that trains the same: seconds of the steps."""
    task = task_of(load_recipe(given.recipe, settings(given, steps, output)), False)
    config, objective = task.recipe.train, task.method.objective
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    forward = torch.compile(objective) if compiled else objective
    objective.train()
    began = 0.0
    for step in range(steps):
        if step == 1:
            began = time.perf_counter()
        x, lengths = batch = task.data.batch(step)
        loss, _ = forward(x, lengths)
        (loss / task.data.entries(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def work(given: argparse.Namespace) -> None:
    """One run, in a process of its own."""
    torch.set_num_threads(given.threads)
    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        output = given.output or str(Path(folder) / "out")
        if given.worker == "batch":
            task = task_of(load_recipe(given.recipe, settings(given, given.steps, output)), False)
            task.data.batch(0)
            began = time.perf_counter()
            for step in range(given.steps):
                task.data.batch(step)
            seconds = time.perf_counter() - began
        elif given.worker.startswith("dflow"):
            began = time.perf_counter()
            train(load_recipe(given.recipe, settings(given, given.steps, output)))
            seconds = time.perf_counter() - began
        else:
            seconds = plain(given, given.steps, output, given.worker == "compiled")
    if int(os.environ.get("RANK", "0")) == 0:
        # KiB here, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({"seconds": seconds, "peak_mib": peak / (1 << 20 if peak > 1 << 30 else 1)}))


def run(given: argparse.Namespace, worker: str, steps: int, threads: int, world: int = 1) -> dict[str, float]:
    words = [__file__, given.recipe, "--worker", worker, "--steps", str(steps), "--threads", str(threads)]
    words += ["--set", *given.set] if given.set else []
    if world > 1:
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--rdzv-backend=c10d"]
        words = [*launch, "--rdzv-endpoint=localhost:0", *words]
    with tempfile.TemporaryDirectory() as folder:
        if world > 1:
            words += ["--output", str(Path(folder) / "out")]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if worker == "dflow-returned":
            environment["GLIBC_TUNABLES"] = ""
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=False, env=environment
        )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"seconds"'))
    found: dict[str, float] = json.loads(line)
    return found


def per_step(given: argparse.Namespace, worker: str, threads: int, world: int = 1) -> tuple[float, float]:
    """Seconds a step, by the difference of a long and a short run; and the peak of memory."""
    few, many = (run(given, worker, n, threads, world) for n in (given.steps // 4, given.steps))
    return (many["seconds"] - few["seconds"]) / (given.steps - given.steps // 4), many["peak_mib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/transformer.yaml")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="settings of the recipe")
    parser.add_argument("--only", nargs="+", help="of the kinds: plain, dflow, compiled, ...")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given)
        return
    kinds = {
        "plain": ("plain", given.threads, 1),
        "dflow": ("dflow", given.threads, 1),
        "compiled": ("compiled", given.threads, 1),
        "dflow compiled": ("dflow-compile", given.threads, 1),
        "returned": ("dflow-returned", given.threads, 1),
        "one": ("dflow", 1, 1),
        "two": ("dflow", 1, 2),
        "pieces": ("dflow-shard", 1, 2),
    }
    kinds = {name: kind for name, kind in kinds.items() if not given.only or name in given.only}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    peaks: dict[str, list[float]] = {name: [] for name in kinds}
    for name, (worker, threads, world) in kinds.items():
        if "compiled" in name:
            # The compiler keeps what it has made: the first run alone waits for it.
            run(given, worker, given.steps // 4, threads, world)
    for _ in range(given.rounds):
        for name, (worker, threads, world) in kinds.items():
            each, peak = per_step(given, worker, threads, world)
            seconds[name].append(each)
            peaks[name].append(peak)
    batch = run(given, "batch", given.steps, given.threads)["seconds"] / given.steps
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    peak = {name: statistics.median(found) for name, found in peaks.items()}
    print("| loop | threads | ms a step | peak memory (MiB) |\n|---|---:|---:|---:|")
    for name, (_, threads, world) in kinds.items():
        of = f"{world} x {threads}" if world > 1 else str(threads)
        print(f"| {name} | {of} | {1e3 * middle[name]:.1f} | {peak[name]:.0f} |")
    told = {
        "throughput over plain": (middle, "plain", "dflow", 1),
        "compiled over plain": (middle, "plain", "compiled", 1),
        "dflow compiled over dflow": (middle, "dflow", "dflow compiled", 1),
        "throughput over returned": (middle, "returned", "dflow", 1),
        "efficiency of two processes": (middle, "one", "two", 2),
        "efficiency of two with a piece each": (middle, "one", "pieces", 2),
        "memory over plain": (peak, "dflow", "plain", 1),
        "memory of a piece over the whole": (peak, "pieces", "two", 1),
    }
    ratios = {n: of[a] / (by * of[b]) for n, (of, a, b, by) in told.items() if a in kinds and b in kinds}
    if "dflow" in kinds:
        ratios["batch over step"] = batch / middle["dflow"]
    print("\n" + "\n".join(f"- {name}: {value:.3f}" for name, value in ratios.items()))
    about = {"recipe": given.recipe, "torch": torch.__version__, "machine": platform.processor()}
    print(json.dumps(about | {"seconds": seconds, "peak_mib": peaks, "ratios": ratios}))


if __name__ == "__main__":
    main()
