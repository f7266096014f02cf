"""Measure the entropy coder in symbols a second, against the reference coder in plain Python.

    python scripts/bench_coder.py

- logistic: integers under discretized logistic distributions with random means and scales, including the
  look-up of the tables.
- categorical: symbols under a row of probabilities each, which are rounded to counts beforehand.

One thread, processor time, best of --rounds. Every round trip is checked, and both coders must write the
same bytes; the reference codes fewer symbols. The last line is one JSON object with millions of symbols a
second and bits a symbol above the ideal.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dflow.coding import Coder, integer_counts, logistic_tables
from dflow.coding.codes import Code, RowsCode
from dflow.coding.integers import LogisticCode

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from reference_coder import ReferenceCoder


def measure(
    make: Callable[[], Code], x: torch.Tensor, kind: type, rounds: int
) -> tuple[float, float, int, bytes]:
    """Symbols a second pushed and popped, the bits and the stream."""
    best = [math.inf, math.inf]
    for _ in range(rounds):
        coder = kind()
        start = time.process_time()
        coder.push(*make().intervals(x))
        middle = time.process_time()
        bits, data = coder.num_bits, coder.to_bytes()
        again = time.process_time()
        found = make().pop(coder)
        end = time.process_time()
        if not torch.equal(found, x):
            raise RuntimeError("the numbers popped are not those pushed")
        best = [min(best[0], middle - start), min(best[1], end - again)]
    return len(x) / best[0], len(x) / best[1], bits, data


def logistic(n: int, generator: torch.Generator) -> tuple[Callable[[], Code], torch.Tensor, float]:
    loc = 40 * torch.randn(n, dtype=torch.float64, generator=generator)
    log_scale = 5 * torch.rand(n, dtype=torch.float64, generator=generator) - 2
    u = torch.rand(n, dtype=torch.float64, generator=generator).clamp(1e-12, 1 - 1e-12)
    x = (loc + log_scale.exp() * (u.log() - (-u).log1p())).round().long()
    a, b = (x - 0.5 - loc) / log_scale.exp(), (x + 0.5 - loc) / log_scale.exp()
    a, b = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)
    ideal = -float((b.sigmoid() - a.sigmoid()).log2().sum())
    return lambda: LogisticCode(logistic_tables(), loc, log_scale), x, ideal


def categorical(n: int, K: int, generator: torch.Generator) -> tuple[Callable[[], Code], torch.Tensor, float]:
    law = (2 * torch.randn(n, K, dtype=torch.float64, generator=generator)).softmax(1)
    x = law.multinomial(1, generator=generator).squeeze(1)
    counts = integer_counts(law)
    return lambda: RowsCode(counts), x, -float(law.gather(1, x[:, None]).log2().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--symbols", type=int, default=400_000, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, 1 thread, {given.symbols} symbols, "
          f"processor time, best of {given.rounds}; M symbols/s, bits a symbol over the ideal")  # fmt: skip
    generator, found = torch.Generator().manual_seed(0), {}
    logistic_tables()
    for name in ("logistic", "27", "50", "256"):
        n = given.symbols if name != "256" else given.symbols // 4
        make, x, ideal = (
            logistic(n, generator) if name == "logistic" else categorical(n, int(name), generator)
        )
        push, pop, bits, _ = measure(make, x, Coder, given.rounds)
        few, small, _ = (logistic(20_000, generator) if name == "logistic"
                         else categorical(20_000, int(name), generator))  # fmt: skip
        streams = [measure(few, small, kind, 2) for kind in (Coder, ReferenceCoder)]
        if streams[0][3] != streams[1][3]:
            raise RuntimeError("the streams of the coder and of the reference differ")
        slow_push, slow_pop = streams[1][:2]
        name = name if name == "logistic" else f"categorical {name}"
        found[name] = {
            "push": round(push / 1e6, 2),
            "pop": round(pop / 1e6, 2),
            "reference_push": round(slow_push / 1e6, 4),
            "reference_pop": round(slow_pop / 1e6, 4),
            "excess": round((bits - ideal) / n, 5),
        }
        print(f"  {name:16} push {push / 1e6:6.2f} ({push / slow_push:5.0f}x the reference)   "
              f"pop {pop / 1e6:6.2f} ({pop / slow_pop:5.0f}x)   {(bits - ideal) / n:+.5f}")  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
