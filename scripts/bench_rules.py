"""Compare the training rules of a discrete flow at equal time, and what richer distributions on Z/K gain.

    python scripts/bench_rules.py --data ptb --output runs/bench_rules           # every rule that is defined
    python scripts/bench_rules.py ladder --data ptb --output runs/bench_ladder   # shift ... categorical

``rules`` trains the family ``bipartite`` (8 couplings, fine to coarse) with each map of one symbol and each
rule that reaches all its parameters. ``ladder`` trains the family ``multiscale`` with one conditioner and
increasingly rich distributions of a symbol. All models have the same networks, seed, batches and time; the
number of completed steps is printed. The time is ``--minutes`` of wall time or, on a machine with other load,
``--seconds`` of the processor: as many steps as fit, by the fastest of a few. Bits are exact, on the first
chunks of the validation text. A run whose result is in the output folder is not repeated. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dflow import hf, objectives, zoo
from dflow.compare import environment
from dflow.data import load
from dflow.evaluate import evaluate
from dflow.train import METRICS, Recipe, recipe_from, train

ANNEALED = {"start": 1.0, "end": 0.1, "schedule": "exponential"}
RULES: dict[str, dict[str, Any]] = {
    "straight-through, 0.1": {"rule": "straight_through", "temperature": {"start": 0.1, "end": 0.1}},
    "straight-through, 1": {"rule": "straight_through"},
    "straight-through, 1 to 0.1": {"rule": "straight_through", "temperature": ANNEALED},
    "gumbel": {"rule": "gumbel"},
    "expected": {"rule": "expected"},
    "layerwise": {"rule": "layerwise"},
}
#: Rules that an elementwise family has no use for.
WITHOUT = {"shift": set(), "affine": {"layerwise"}, "rank": {"expected"}}
LADDER: dict[str, dict[str, Any]] = {
    "shift": {"elementwise": "shift", "num_spectra": 1},
    "rank": {"num_spectra": 1},
    "rank, 2 spectra": {"num_spectra": 2},
    "rank, 4 spectra": {"num_spectra": 4},
    "rank, 8 spectra": {"num_spectra": 8},
    "categorical": {"conditional": "categorical"},
}


def runs(what: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name of each run, with the settings of its model and of its training."""
    if what == "ladder":
        return {name: ({"family": "multiscale"} | model, {"rule": "auto"}) for name, model in LADDER.items()}
    return {
        f"{elementwise}: {name}": ({"family": "bipartite", "elementwise": elementwise}, rule)
        for elementwise, excluded in WITHOUT.items()
        for name, rule in RULES.items()
        if name not in excluded
    }


def seconds_a_step(recipe: Recipe, K: int) -> float:
    """The processor's time for a step of ``recipe`` over an alphabet of K: the least of some.

    The median rises by a third where others share the caches.
    """
    torch.manual_seed(0)
    model = zoo.build(recipe.family, recipe.model, K)
    named = recipe.train.rule
    rule = objectives.default_rule(model) if named == "auto" else named
    objective = objectives.Objective(model, rule)
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    times = []
    for _ in range(24):
        x = torch.randint(K, (recipe.train.batch_size, recipe.model.length))
        start = time.process_time()
        objective(x)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
    return min(times)


def result_of(
    name: str, model: dict[str, Any], rule: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train and score one model, or read what an earlier run has left."""
    output = Path(arguments.output) / name.replace(": ", "_").replace(", ", "_").replace(" ", "_")
    file = output / "result.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    recipe = recipe_from(
        {
            "data": {"name": arguments.data, "protocol": "stream"},
            "model": {
                "length": arguments.length,
                "hidden_size": arguments.hidden_size,
                "num_hidden_layers": 1,
            }
            | model,
            "train": {
                "minutes": arguments.minutes,
                "batch_size": arguments.batch_size,
                "learning_rate": arguments.learning_rate,
                "warmup": 30,
                "eval_minutes": arguments.minutes,
                "eval_chunks": 4,
                "samples": 0,
                "trackers": [],
            }
            | rule,
            "output": str(output),
        },
        name,
    )
    if arguments.seconds:
        size = load(recipe.data).tokenizer.size
        steps = max(1, round(arguments.seconds / seconds_a_step(recipe, size)))
        budget = replace(recipe.train, steps=steps, minutes=None, eval_minutes=None, eval_every=steps)
        recipe = replace(recipe, train=budget)
    train(recipe)
    metrics = (output / METRICS).read_text(encoding="utf-8").splitlines()
    trained = hf.load(output)
    score = evaluate(trained, load(recipe.data).valid, limit=arguments.chunks)
    result = {
        "name": name,
        "bits": round(score.bpc, 4),
        "standard_error": score.standard_error,
        "round_trip": score.round_trip,
        "steps": json.loads(metrics[-1])["step"],
        "num_calls": trained.num_calls,
        "parameters": sum(p.numel() for p in trained.parameters()),
        "protocol": score.protocol,
    }
    file.write_text(json.dumps(result), encoding="utf-8")
    return result


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=("rules", "ladder"), default="rules", help="default: rules"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="budget of each run on the clock")
    parser.add_argument(
        "--seconds", type=float, help="budget of each run on the processor, in place of minutes"
    )
    parser.add_argument("--data", default="ptb", help="text, as in a recipe")
    parser.add_argument("--output", required=True, help="folder for the models and their results")
    parser.add_argument("--length", type=int, default=256, help="symbols of a chunk")
    parser.add_argument("--hidden-size", type=int, default=96, help="width of each network")
    parser.add_argument("--batch-size", type=int, default=8, help="chunks of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--chunks", type=int, default=256, help="validation chunks that are scored")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = environment(torch.device("cpu")) | {"cores": os.cpu_count() or 1}
    print("environment: " + ", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"settings: {vars(arguments)}\n", flush=True)
    plan = runs(arguments.what)
    results = [result_of(name, model, rule, arguments) for name, (model, rule) in plan.items()]
    print(f"\nexact bits a character of the validation text, {results[0]['protocol']}\n")
    print("| run | bits | steps | network calls | parameters |")
    print("|---|---:|---:|---:|---:|")
    for r in results:
        mark = "" if r["round_trip"] is not False else " ROUND TRIP FAILED"
        cells = (f"{r['bits']:.4f}{mark}", f"{r['steps']:,}", f"{r['num_calls']}", f"{r['parameters']:,}")
        print(f"| {r['name']} | {' | '.join(cells)} |")
    best = min(results, key=lambda r: r["bits"])
    print(f"\nbest: {best['name']}, {best['bits']:.4f} bits")
    print(json.dumps({"benchmark": arguments.what, **vars(arguments), **about, "rows": results}))


if __name__ == "__main__":
    main()
