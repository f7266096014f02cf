"""Time and memory of the affine map on one-hot rows, forward and backward.

    python scripts/bench_ops.py

Compares, for ``z = (x - loc) / scale mod K`` with gradients to x, loc and scale:

- dflow: index arithmetic forward, gathers backward (``dflow.ops.modular.affine``);
- contraction: the field's way (edward2): loc by K rolled copies of the rows, scale by contracting rows,
  scales and a constant K x K x K tensor, here over the units only and as two matrix products;
- tables: the fastest dense version we found: loc by Fourier transform (exact only to rounding), scale by
  reading rows at a K x K table of products, which spares a factor K but not the N x K x K intermediate;
- integers: ``(x - loc) * inverse[scale] % K`` on int64 symbols, without gradients, as the floor.

Every dense version is checked against dflow, values and gradients, before it is timed. Each measurement
has a process of its own: median of the repetitions after a warm-up, and growth of the peak resident
memory over inputs in place. The last line is one JSON object.
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
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("dflow", "tables", "contraction", "integers")
TARGET = 20.0


def minus_by_copies(x: Tensor, loc: Tensor) -> Tensor:
    """One-hot ``x - loc``: copy j of the rows is x rolled back by j, and loc picks one."""
    import torch

    copies = torch.cat([x, x[:, :-1]], 1).unfold(1, x.shape[-1], 1)  # [n, j, c] = x[n, c + j]
    return torch.bmm(loc[:, None], copies)[:, 0]


def minus_by_fourier(x: Tensor, loc: Tensor) -> Tensor:
    """One-hot ``x - loc`` to rounding: a circular correlation."""
    import torch

    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(loc).conj(), n=x.shape[-1])


def build(method: str, K: int, n: int) -> tuple[Callable[[], Any], Callable[[], float]]:
    """The call to time, and its largest difference to dflow in values and gradients."""
    import torch

    from dflow.ops import modular

    generator = torch.Generator().manual_seed(K)
    units, inverses = modular.units(K), modular.inverses(K)
    symbols = [torch.randint(high, (n,), generator=generator) for high in (K, K, len(units))]
    g = torch.randn(n, K, generator=generator)
    if method == "integers":
        x, loc, scale = symbols[0], symbols[1], units[symbols[2]]
        expected = modular.affine(
            *[modular.one_hot(s, h) for s, h in zip(symbols, (K, K, len(units)), strict=True)]
        )

        def integers() -> Tensor:
            return ((x - loc) * inverses[scale]).remainder(K)

        return integers, lambda: float((modular.one_hot(integers(), K) - expected).abs().max())
    rows = [
        modular.one_hot(s, high).requires_grad_() for s, high in zip(symbols, (K, K, len(units)), strict=True)
    ]
    factors = inverses[units]
    line = torch.arange(K)

    def ours(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return modular.affine(x, loc, scale, factors)

    if method == "dflow":
        function = ours
    elif method == "tables":
        products = (line * units[:, None] % K).flatten()  # z = y / a is found at y = z * a

        def function(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
            y = minus_by_fourier(x, loc).index_select(1, products)
            return torch.bmm(scale[:, None], y.view(n, len(units), K))[:, 0]

    else:
        table = torch.zeros(K, len(units), K)  # [y, a, z]
        table[line[:, None], torch.arange(len(units)), line[:, None] * factors % K] = 1
        table = table.flatten(1)

        def function(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
            y = minus_by_copies(x, loc)
            return torch.bmm(scale[:, None], (y @ table).view(n, len(units), K))[:, 0]

    def call() -> tuple[Tensor, ...]:
        z = function(*rows)
        return (z.detach(), *torch.autograd.grad(z, rows, g))

    def difference() -> float:
        z = ours(*rows)
        expected = (z.detach(), *torch.autograd.grad(z, rows, g))
        return max(float((a - b).abs().max()) for a, b in zip(call(), expected, strict=True))

    return call, difference


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(method: str, K: int, n: int, seconds: float, threads: int) -> dict[str, Any]:
    """One measurement, in a fresh process."""
    import torch

    torch.set_num_threads(threads)
    call, difference = build(method, K, n)
    if method in ("dflow", "integers"):  # small: let the first call load what it needs
        build(method, 5, 2)[0]()
    before = peak_memory()
    call()  # warm-up
    memory = peak_memory() - before
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {
        "method": method,
        "K": K,
        "ms": 1000 * statistics.median(times),
        "mib": memory / 2**20,
        "repetitions": len(times),
        "difference": difference(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def measure_apart(method: str, K: int, n: int, *options: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--worker", method, "--K", str(K), "--n", str(n)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{method} at K={K} failed with status {done.returncode}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not result["difference"] < 1e-4:
        raise SystemExit(f"{method} at K={K} differs from dflow by {result['difference']}")
    return result


def main() -> None:
    """Run every measurement and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--K", type=int, nargs="+", default=[27, 51, 97, 251], help="sizes of the alphabet")
    parser.add_argument("--n", type=int, default=4096, help="symbols in a batch")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on one measurement")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(
            json.dumps(
                measure(arguments.worker, arguments.K[0], arguments.n, arguments.seconds, arguments.threads)
            )
        )
        return
    rows, results = [], []
    options = ("--seconds", str(arguments.seconds), "--threads", str(arguments.threads))
    for K in arguments.K:
        found = {m: measure_apart(m, K, arguments.n, *options) for m in METHODS}
        results += found.values()
        ours = found["dflow"]
        rows.append(
            {
                "K": K,
                **{f"{m}_ms": round(found[m]["ms"], 3) for m in METHODS},
                **{f"{m}_mib": round(found[m]["mib"], 1) for m in METHODS},
                "speed_over_contraction": round(found["contraction"]["ms"] / ours["ms"], 1),
                "speed_over_tables": round(found["tables"]["ms"] / ours["ms"], 1),
                "time_over_integers": round(ours["ms"] / found["integers"]["ms"], 1),
            }
        )
    environment = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": results[0]["threads"],
        "python": platform.python_version(),
        "torch": results[0]["torch"],
    }
    print("environment: " + ", ".join(f"{k} {v}" for k, v in environment.items()))
    print(f"affine, forward and backward, N = {arguments.n}, float32; ms (peak MiB); integers forward only\n")
    print("| K | dflow | tables | contraction | integers | over tables | over contraction |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row[f'{m}_ms']:.3g} ({row[f'{m}_mib']:.0f})" for m in METHODS]
        ratios = f"{row['speed_over_tables']:.1f}x | {row['speed_over_contraction']:.1f}x"
        print(f"| {row['K']} | {' | '.join(cells)} | {ratios} |")
    last = rows[-1]
    met = min(last["speed_over_contraction"], last["speed_over_tables"]) >= TARGET
    print(f"\ntarget at K={last['K']}: {TARGET:.0f}x over either dense version: {'met' if met else 'missed'}")
    print(json.dumps({"benchmark": "ops", "n": arguments.n, **environment, "rows": rows, "met": met}))


def processor() -> str:
    """Name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
