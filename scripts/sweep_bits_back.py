"""Measure local bits-back coding on several grids: cost above the bound, borrowed bits, speed.

    python scripts/sweep_bits_back.py runs/images/bits_back_mnist --data mnist --limit 256

Net bits are those of one batch of all images on a stack of random bits. They stand beside the variational
bound: of the same noise where the dequantizer is uniform, else the mean of eight draws. Auxiliary bits are
those that a single image borrows. Seconds are processor time of this process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time

import torch

from dflow import hf
from dflow.coding import Coder
from dflow.coding.bits_back import BitsBack, push, ready
from dflow.coding.local import CodingSettings
from dflow.compress.clock import clock
from dflow.data import ImageConfig, load_images
from dflow.dequantize import Uniform

GRIDS = (
    (14, 8, 8), (14, 10, 8), (16, 10, 8), (16, 12, 8), (18, 12, 8), (18, 14, 4), (18, 14, 6), (18, 14, 8),
    (18, 14, 10), (18, 14, 12), (20, 14, 8), (20, 16, 8), (24, 18, 12), (30, 14, 16),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of a dequantized flow")
    parser.add_argument("--data", default="mnist", help="name of images")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=256, help="images")
    parser.add_argument("--batch", type=int, default=64)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    model = ready(hf.load(flags.model, kind=hf.DflowImageModel).dequantized)
    data = load_images(ImageConfig(flags.data)).split(flags.split).subset(flags.limit)
    x = data.values.flatten(1).long()
    dim, uniform = x.shape[1], isinstance(model.dequantizer, Uniform)
    batches = x.split(flags.batch)
    stack = hashlib.shake_256(b"sweep").digest(len(batches[0]) * dim * 16)
    draws = []
    if not uniform:
        with torch.no_grad():
            for seed in range(8):
                g = torch.Generator().manual_seed(seed)
                draws.append(sum(float(model.log_weights(b, generator=g).sum()) for b in batches))
    print(f"{flags.data}, {flags.split}: {len(x)} images, batches of {flags.batch}, one thread")
    print("| grid | sigma | noise | net | bound | excess | auxiliary | encode | decode | with networks |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    rows = []
    for triple in GRIDS:
        settings = CodingSettings(*triple)
        code, coder, bound = BitsBack(model, dim, settings), Coder(stack), -sum(draws) / 8 if draws else 0.0
        seconds = {"encode": 0.0, "decode": 0.0, "all": 0.0}
        for batch in batches:
            if uniform:
                v = code.frame.values(code.dequantize(batch, Coder(coder.to_bytes())))
                with torch.no_grad():
                    bound -= float(model.density.log_prob(v).sum())
            with Timed(model) as encode:
                code.push(batch, coder)
            seconds["encode"] += encode.coder
            seconds["all"] += encode.total
        net = coder.num_bits - 8 * len(stack)
        for batch in reversed(batches):
            with Timed(model) as decode:
                back = code.pop(len(batch), coder)
            seconds["decode"] += decode.coder
            if not torch.equal(back, batch):
                raise SystemExit(f"{settings}: does not come back")
        if coder.to_bytes() != stack:
            raise SystemExit(f"{settings}: the stack does not come back")
        net, bound = net / x.numel(), bound / math.log(2) / x.numel()
        lent = push(code, x[:1]).random / dim
        speeds = [x.numel() / seconds[name] / 1e6 for name in ("encode", "decode", "all")]
        print(
            f"| 2^-{triple[0]} | 2^-{triple[1]} | {triple[2]} | {net:.4f} | {bound:.4f} | {net - bound:+.4f} "
            f"| {lent:.2f} | {speeds[0]:.2f} | {speeds[1]:.2f} | {speeds[2]:.3f} |",
            flush=True,
        )
        rows.append([*triple, net, bound, lent, *speeds])
    print("Bits a dimension; million dimensions a second of the coder, and of encoding with the networks.")
    print(json.dumps({"model": flags.model, "data": flags.data, "images": len(x), "rows": rows}))


class Timed:
    """Seconds of this process, in all and in the coder: by the share of the networks in what passed."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.clock = clock(model)

    def __enter__(self) -> Timed:
        self.begin, self.timed = time.process_time(), self.clock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.clock.__exit__(None, None, None)
        self.total = time.process_time() - self.begin
        self.coder = self.total * self.timed.coder / self.timed.total


if __name__ == "__main__":
    main()
