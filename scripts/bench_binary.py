"""Compare a network of signs, stored as bits, with a network of floats of the same shape: bytes and time.

    python scripts/bench_binary.py --threads 1
    python scripts/bench_binary.py --file mnist.safetensors     # an exported network of grey images

The time is that of labelling a batch of images: the smallest of several rounds, in which the networks take
turns. Without --file both networks have random weights, which do not change the time. The last line is one
JSON object.
"""

import argparse
import json
import platform
import time

import numpy as np
import torch

from dflow import zoo
from dflow.hf import PackedNetwork, pack


def settings(kind: str, program: PackedNetwork | None) -> dict:
    values = {"kind": kind, "shape": [1, 28, 28], "levels": [256], "classes": 10}
    if program is not None:
        layers = program.header.layers
        values |= {
            "shape": layers[0].inputs,
            "levels": [program.header.levels],
            "classes": layers[-1].outputs,
        }
        values["channels"] = [layer.outputs for layer in layers if layer.kernel]
        values["hidden"] = [layer.outputs for layer in layers[:-1] if not layer.kernel]
        values["kernel"] = next((layer.kernel for layer in layers if layer.kernel), 3)
        values["pooling"] = "none" if any(layer.stride > 1 for layer in layers) else "sample"
    return values


def build(kind: str, program: PackedNetwork | None = None) -> torch.nn.Sequential:
    return zoo.build_classifier("pbnet", zoo.settings("pbnet", settings(kind, program)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--file", help="an exported network (default: a fresh one)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    program = PackedNetwork.load(given.file) if given.file else None
    floats = build("float", program).eval()
    if program is None:
        x = torch.randint(256, (256, 784))
        program = pack(zoo.to_deterministic(build("probabilistic"), [x]))
    by_bytes = PackedNetwork(program.header, program.arrays, "bytes")
    print(
        f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}, {given.threads} thread(s)"
    )
    size = 4 * program.num_weights
    smaller = size / program.num_bytes
    print(f"weights: {program.num_bytes:,} bytes of bits and thresholds, {size:,} of floats: {smaller:.1f} x")
    rows = []
    for n in given.batches:
        pixels = torch.randint(program.header.levels, (n, program.dim))
        best = dict.fromkeys(("bits", "bytes", "float"), float("inf"))
        with torch.inference_mode():
            for _ in range(given.rounds + 1):
                for name, call, x in (
                    ("bits", program, pixels.numpy()),
                    ("bytes", by_bytes, pixels.numpy()),
                    ("float", floats, pixels),
                ):
                    start = time.perf_counter()
                    call(x)
                    best[name] = min(best[name], time.perf_counter() - start)
        bits, signed, real = (1e3 * seconds for seconds in best.values())
        print(
            f"batch {n}: {real:.2f} ms by floats, the baseline; {bits:.2f} ms by bits, {real / bits:.2f} x; "
            f"{signed:.2f} ms by bytes, {real / signed:.2f} x"
        )
        rows.append({"batch": n, "float_ms": real, "bits_ms": bits, "bytes_ms": signed})
    print(json.dumps({"smaller": smaller, "threads": given.threads, "latency": rows}))


if __name__ == "__main__":
    main()
