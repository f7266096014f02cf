"""Train and evaluate every setup in the ``paper:`` block of a recipe; print the results beside the paper's.

    python scripts/reproduce.py recipes/images/checkerboard_flow.yaml --seeds 3 --jobs 2

A setup is the recipe with the settings of one entry of ``paper:``. It is trained by ``dflow train`` and
scored by ``dflow evaluate``, each in a process of its own. A setup whose model exists is not trained again.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dflow.train import Paper, load_recipe


def run(words: list[str], log: Path, threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", "dflow", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
        file.write(done.stdout)
    if done.returncode:
        sys.exit(f"dflow {' '.join(words)}: exit {done.returncode}; see {log}")
    return done.stdout


def cell(recipe: str, paper: Paper, seed: int, given: argparse.Namespace) -> dict[str, object]:
    """Train and evaluate one setup with one seed."""
    name = "-".join(s.partition("=")[2].strip("[]").replace("/", "_") for s in paper.set) or "base"
    folder = Path(given.output) / Path(recipe).stem / f"{name}-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    log, result = (folder.with_name(folder.name + suffix) for suffix in (".log", ".json"))
    settings = [*paper.set, *given.set]
    values = load_recipe(recipe, settings).as_dict()
    key = json.dumps([[values[k] for k in ("data", "model", "train")], given.draws, given.limit])
    if result.is_file() and (found := json.loads(result.read_text()))["key"] == key:
        return dict(found)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    threads = ["--threads", str(given.threads)]
    seeded = [*settings, f"train.seed={seed}", "train.trackers=[]"]
    run(["train", recipe, "--set", *seeded, "--output", str(folder), *threads], log, given.threads)
    seconds = time.monotonic() - start
    words = ["evaluate", "--model", str(folder), *threads]
    if not getattr(load_recipe(recipe, settings).model, "exact", False):
        words += ["--draws", str(given.draws)]
    words += ["--limit", str(given.limit)] if given.limit else []
    figures = json.loads(run(words, log, given.threads).splitlines()[-1])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = figures | {"key": key, "set": settings, "seed": seed, "steps": json.loads(lines[-1])["step"]}
    found |= {"train_seconds": round(seconds), "evaluate_seconds": round(time.monotonic() - start - seconds)}
    result.write_text(json.dumps(found))
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="setups at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--limit", type=int, help="score LIMIT random data only")
    parser.add_argument("--only", default="", help="only setups whose settings hold this text")
    parser.add_argument("--output", default="runs/reproduce")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="settings for all of them")
    given = parser.parse_args()
    jobs = []
    for recipe in given.recipes:
        for paper in load_recipe(recipe).paper:
            if given.only in " ".join(paper.set):
                load_recipe(recipe, [*paper.set, *given.set])  # a mistake shows before any work
                jobs += [(recipe, paper, seed) for seed in range(given.seeds)]
    distinct = {(recipe, " ".join(paper.set), seed): (recipe, paper, seed) for recipe, paper, seed in jobs}
    with ThreadPoolExecutor(given.jobs) as pool:
        results = dict(zip(distinct, pool.map(lambda job: cell(*job, given), distinct.values()), strict=True))
    rows: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    papers = {}
    for recipe, paper, seed in jobs:
        key = (Path(recipe).stem, " ".join(paper.set), paper.measure)
        rows.setdefault(key, []).append(results[recipe, key[1], seed])
        papers[key] = paper
    print(
        "| recipe | settings | measure | paper | here | vi | nll | KL | exact | draws that count | seconds |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    table = []
    for key, found in rows.items():
        paper = papers[key]

        def mean(name: str, found: list[dict[str, object]] = found) -> str:
            values = [float(str(f[name])) for f in found if f.get(name) is not None]
            if not values:
                return "-"
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.4f}{spread}"

        seconds = f"{statistics.mean(float(str(f['train_seconds'])) for f in found):.0f}"
        cells = [*key, f"{paper.value}", mean(paper.measure), mean("vi"), mean("nll"), mean("kl")]
        cells += [mean("exact"), mean("ess"), seconds]
        print("| " + " | ".join(cells) + " |")
        table.append(
            {
                "recipe": key[0],
                "set": paper.set,
                "paper": paper.value,
                "measure": paper.measure,
                "runs": found,
            }
        )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
