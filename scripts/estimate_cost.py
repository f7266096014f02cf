"""Estimate on paper what a recipe would take on 1, 8 and 64 GPUs; nothing is measured on a GPU.

    python scripts/estimate_cost.py recipes/text8/*.yaml recipes/images/idf_imagenet*.yaml

Counted on this machine, on a few sequences or images: the floating-point operations of one step (forward and
backward, by torch's counter, which sees products of matrices and convolutions only) and the bytes that
autograd keeps of it. Weights, gradients, both moments and the average take 4 bytes each. Assumed: the share
of its peak that a GPU reaches (--peak and --share), and a ring that carries the gradients (4 bytes a weight)
at --link GB/s inside a machine of eight and --network GB/s a machine between machines, after the step instead
of during it. The estimate of the communication is therefore pessimistic; the rest is as good as the share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dflow import hf, objectives, zoo
from dflow.core import Distribution
from dflow.train import Recipe, load_recipe

#: Symbols of text8, and shapes of images that a recipe leaves to its data.
SYMBOLS = 27
SHAPES = {"imagenet32": [3, 32, 32], "imagenet64": [3, 64, 64], "cifar10": [3, 32, 32]}


@dataclass(frozen=True)
class Cost:
    """Of one step of a recipe.

    Attributes:
        name: of the recipe.
        parameters: that are learned.
        flops: of the step.
        kept: bytes that autograd keeps for a sequence or an image, in float32.
        batch: sequences or images of a step.
        steps: of the training.
    """

    name: str
    parameters: int
    flops: float
    kept: float
    batch: int
    steps: int


def objective_of(recipe: Recipe, rows: int) -> tuple[torch.nn.Module, Tensor]:
    """The recipe's loss, and a batch of the size of its data."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if zoo.find(recipe.family).kind == "text":
        values: dict[str, Any] = {"vocab_size": SYMBOLS, **asdict(recipe.model)}
        law = hf.DflowModel(hf.DflowConfig(family=recipe.family, **values)).distribution
        x = torch.randint(0, SYMBOLS, (rows, recipe.model.length), generator=generator)
    else:
        shape = SHAPES[recipe.data.name]
        config = dataclasses.replace(recipe.model, shape=shape, levels=[256], lowest=[0])
        x = torch.randint(0, 256, (rows, config.dim), generator=generator)
        return objectives.ExactObjective(cast(Distribution, zoo.build_image(recipe.family, config))), x
    rule = recipe.train.rule if recipe.train.rule != "auto" else objectives.default_rule(law)
    return objectives.Objective(law, cast(objectives.Rule, rule)), x


def count(recipe: Recipe, name: str, rows: int) -> Cost:
    """Operations and memory of a step."""
    objective, x = objective_of(recipe, rows)
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss, _ = objective(x, None)
        loss.backward()
    batch, steps = recipe.train.batch_size, int(recipe.train.steps or 0)
    flops = counter.get_total_flops() * batch / rows
    return Cost(
        name,
        sum(p.numel() for p in objective.parameters()),
        flops,
        sum(kept.values()) / rows,
        batch,
        steps,
    )


def estimate(cost: Cost, gpus: int, given: argparse.Namespace) -> tuple[float, float, float]:
    """Hours of the training, GB on each GPU, and the share of a step that is communication."""
    compute = cost.flops / gpus / (given.peak * 1e12 * given.share)
    # A ring sends nearly twice what it reduces; the slowest link decides.
    sent = 2 * (gpus - 1) / gpus * 4 * cost.parameters
    slowest = given.link if gpus <= 8 else given.network
    talk = sent / (slowest * 1e9)
    memory = 5 * 4 * cost.parameters + cost.kept * cost.batch / gpus
    return cost.steps * (compute + talk) / 3600, memory / 1e9, talk / (compute + talk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--rows", type=int, default=2, help="sequences or images to count on")
    parser.add_argument("--peak", type=float, default=312, help="TFLOP/s of a GPU (A100, bf16)")
    parser.add_argument("--share", type=float, default=0.3, help="of the peak that is reached")
    parser.add_argument("--link", type=float, default=200, help="GB/s between GPUs of a machine")
    parser.add_argument("--network", type=float, default=20, help="GB/s between machines")
    given = parser.parse_args()
    print("| recipe | parameters | TFLOP a step | MB kept a datum | 1 GPU | 8 GPUs | 64 GPUs |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    table = []
    for path in given.recipes:
        cost = count(load_recipe(path), path.removeprefix("recipes/").removesuffix(".yaml"), given.rows)
        cells = []
        for gpus in (1, 8, 64):
            hours, memory, talk = estimate(cost, gpus, given)
            cells.append(f"{hours:,.0f} h, {memory:.0f} GB, {talk:.0%}")
        about = f"{cost.parameters:,} | {cost.flops / 1e12:.2f} | {cost.kept / 1e6:.0f}"
        print(f"| {cost.name} | {about} | " + " | ".join(cells) + " |", flush=True)
        table.append(asdict(cost))
    print(json.dumps({"costs": table} | vars(given)))


if __name__ == "__main__":
    main()
