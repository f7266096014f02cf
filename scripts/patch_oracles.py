"""Compute floors and references for models of centre patches of binarized MNIST.

    python scripts/patch_oracles.py --folder DATA             # patches of 2 x 2 and 4 x 4 pixels

For each patch, in bits a dimension:

- The plug-in entropy of each split. No model can be below that of the split on which it is scored. For 4 x 4
  pixels it is far below the entropy of the distribution, since few rows repeat.
- The cost of the test part under independent pixels, under the histogram of the training rows with a
  pseudo-count chosen on the validation rows, and under a MADE (two layers of 256 units, Adam, the epoch that
  is best on the validation rows).

All figures are exact sums over all rows. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time

import torch
from torch import Tensor

from dflow.compare import environment
from dflow.data import ImageConfig, load_images
from dflow.distributions import SequenceCategorical
from dflow.nn.made import MADE
from dflow.ops.orders import lockstep

SPLITS = ("train", "valid", "test")
PSEUDO_COUNTS = [10.0 ** (k / 4) for k in range(-12, 13)]


def codes(x: Tensor) -> Tensor:
    """The number that the bits of each row spell."""
    return (x << torch.arange(x.shape[1])).sum(1)


def plug_in(x: Tensor) -> float:
    """Entropy of the rows' own frequencies."""
    p = torch.unique(codes(x), return_counts=True)[1].double() / len(x)
    return -float((p * p.log2()).sum()) / x.shape[1]


def histogram(train: Tensor, valid: Tensor, test: Tensor) -> tuple[float, float]:
    """Cost of the test under the smoothed frequencies of the training rows, and the pseudo-count."""
    dim = train.shape[1]
    counts = torch.bincount(codes(train), minlength=1 << dim).double()

    def cost(x: Tensor, extra: float) -> float:
        log_p = (counts + extra).log2() - math.log2(len(train) + extra * len(counts))
        return -float(log_p[codes(x)].mean()) / dim

    best = min(PSEUDO_COUNTS, key=lambda extra: cost(valid, extra))
    return cost(test, best), best


def independent(train: Tensor, test: Tensor) -> float:
    """Cost of the test under independent pixels."""
    p = train.double().mean(0)
    log_p = torch.where(test.bool(), p.log2(), (1 - p).log2())
    return -float(log_p.mean())


def made(train: Tensor, valid: Tensor, test: Tensor, epochs: int, seed: int) -> dict[str, float]:
    """Costs of all splits under the MADE of the best epoch."""
    torch.manual_seed(seed)
    dim = train.shape[1]
    model = SequenceCategorical(MADE(dim, 2, 2, [256, 256]), lockstep(dim, dim), dim)
    batch, start = 256, time.perf_counter()
    steps = epochs * (len(train) // batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    @torch.no_grad()
    def cost(x: Tensor) -> float:
        return (
            -sum(float(model.log_prob(part).double().sum()) for part in x.split(10_000))
            / x.numel()
            / math.log(2)
        )

    best, kept, best_epoch = math.inf, copy.deepcopy(model.state_dict()), 0
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(train))[: steps // epochs * batch].split(batch):
            optimizer.zero_grad()
            (-model.log_prob(train[rows]).mean()).backward()
            optimizer.step()
            schedule.step()
        now = cost(valid)
        if now < best:
            best, kept, best_epoch = now, copy.deepcopy(model.state_dict()), epoch
    model.load_state_dict(kept)
    return {
        "train": cost(train),
        "valid": best,
        "test": cost(test),
        "epoch": best_epoch,
        "seconds": time.perf_counter() - start,
    }


def oracles(side: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Bits a dimension of each split, by the name of the oracle."""
    images = load_images(ImageConfig("binarized_mnist", folder=arguments.folder, patch=[side, side]))
    train, valid, test = (s.rows(slice(None)) for s in (images.train, images.valid, images.test))
    smoothed, extra = histogram(train, valid, test)
    return {
        "plug-in entropy": {"train": plug_in(train), "valid": plug_in(valid), "test": plug_in(test)},
        "independent pixels": {"test": independent(train, test)},
        "smoothed histogram": {"test": smoothed, "pseudo_count": extra},
        "MADE": made(train, valid, test, arguments.epochs, arguments.seed),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="folder of the data (default: the environment variable DFLOW_DATA)")
    parser.add_argument("--sides", type=int, nargs="+", default=[2, 4], help="sides of the patches")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the MADE")
    parser.add_argument("--seed", type=int, default=0, help="seed of the MADE")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = environment(torch.device("cpu"))
    print("environment: " + ", ".join(f"{k} {v}" for k, v in about.items()))
    print("\nbinarized MNIST, bits a dimension (exact)\n")
    print("| patch | oracle | train | valid | test | |")
    print("|---|---|---:|---:|---:|---|", flush=True)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for side in arguments.sides:
        results[f"{side}x{side}"] = oracles(side, arguments)
        for name, row in results[f"{side}x{side}"].items():
            cells = [f"{row[split]:.4f}" if split in row else "" for split in SPLITS]
            rest = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if key not in SPLITS)
            print(f"| {side} x {side} | {name} | {' | '.join(cells)} | {rest} |", flush=True)
    print(json.dumps({"benchmark": "patch_oracles", **vars(arguments), **about, "bits_a_dimension": results}))


if __name__ == "__main__":
    main()
