"""Measure what changes the last bits of the outputs of a network: batch size, threads, oneDNN, other rows.

    python scripts/check_determinism.py

The networks have the usual sizes and random weights, and are evaluated without the wrapping of
`dflow.coding.prepare`. "=" stands for equal bits; otherwise the table has the share of numbers that differ
and the largest difference. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from dflow import zoo
from dflow.coding import codec
from dflow.nn.densenet import DenseNet
from dflow.nn.fixed import FixedDenseNet

K, LENGTH = 27, 64
Evaluate = Callable[[Tensor], Tensor]


class _Nowhere:
    """A stack that keeps nothing."""

    def push(self, start: Tensor, size: Tensor) -> None:
        pass


def dense(rows: int, size: int, mode: str, norm: str = "none") -> tuple[Evaluate, Tensor]:
    torch.manual_seed(0)
    active = "relu" if norm == "none" else "silu"
    net = DenseNet(
        6, 2, (size, size), 2, hidden_size=96, depth=4, activation=active, norm=norm, zero_head=False
    )
    dtype = torch.float32 if mode == "float32" else torch.float64
    net = FixedDenseNet(net) if mode == "fixed" else net.to(dtype)
    return net.eval(), torch.randint(-128, 128, (rows, 6 * size * size)).to(dtype) / 128


def text(family: str, rows: int, mode: str, **settings: object) -> tuple[Evaluate, Tensor]:
    """All logits that `push` sees, call by call."""
    torch.manual_seed(0)
    law = zoo.build(family, zoo.settings(family, {"length": LENGTH, **settings}), K)
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    law = (law.double() if mode == "float64" else law).eval()

    def evaluate(x: Tensor) -> Tensor:
        seen, rows = [], codec._rows
        codec._rows = lambda logits: seen.append(logits.view(len(x), -1)) or rows(logits)  # type: ignore
        try:
            codec.push(law, x, _Nowhere())  # type: ignore[arg-type]
        finally:
            codec._rows = rows
        return torch.cat(seen, 1)

    return evaluate, torch.randint(0, K, (rows, LENGTH))


CASES: dict[str, Callable[[int, str], tuple[Evaluate, Tensor]]] = {
    "convolutions, relu, 14x14": lambda rows, mode: dense(rows, 14, mode),
    "convolutions, silu, group norm, 14x14": lambda rows, mode: dense(rows, 14, mode, "group"),
    "one place, relu": lambda rows, mode: dense(rows, 1, mode),
    "grouped, 8 calls": lambda rows, mode: text("grouped", rows, mode, hidden_size=128, num_calls=8),
    "transformer": lambda rows, mode: text("transformer", rows, mode, hidden_size=64, num_hidden_layers=2),
    "lstm": lambda rows, mode: text("lstm", rows, mode, hidden_size=96, num_hidden_layers=1),
}


def compare(found: Tensor, expected: Tensor) -> str:
    if torch.equal(found, expected):
        return "="
    difference = (found - expected).abs()
    return f"{float((difference > 0).double().mean()):.0%} {float(difference.max()):.0e}"


@torch.no_grad()
def measure(evaluate: Evaluate, x: Tensor) -> dict[str, str]:
    torch.set_num_threads(1)
    expected, found = evaluate(x), {}
    for rows in (8, 2, 1):
        found[f"batch {rows}"] = compare(torch.cat([evaluate(part) for part in x.split(rows)]), expected)
    few = torch.cat([x[:5], torch.zeros_like(x[5:])])
    found["other rows"] = compare(evaluate(few)[:5], expected[:5])
    before = torch.backends.mkldnn.set_flags(False)[0]
    found["oneDNN off"] = compare(evaluate(x), expected)
    torch.backends.mkldnn.set_flags(before)
    single = evaluate(x[:1])
    torch.set_num_threads(2)
    found["2 threads"] = compare(evaluate(x), expected)
    found["2 threads, batch 1"] = compare(evaluate(x[:1]), single)
    torch.set_num_threads(1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help="of the full batch (default %(default)s)")
    parser.add_argument("--only", help="cases whose name holds this")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
          f"against a batch of {given.rows} with 1 thread")  # fmt: skip
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, make in CASES.items():
        if given.only and given.only not in name:
            continue
        exact = ["fixed"] if "relu" in name else []
        for mode in (*exact, "float64", "float32"):
            line = found.setdefault(name, {})[mode] = measure(*make(given.rows, mode))
            print(f"  {name:38} {mode:8}", "   ".join(f"{k}: {v}" for k, v in line.items()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
