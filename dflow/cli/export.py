"""``dflow export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dflow.cli.flags import Verbs, flag
from dflow.cli.shared import Machine, Results, complain
from dflow.cli.source import Source
from dflow.config import InputError


@dataclass(kw_only=True)
class Export(Machine, Results):
    """Write a network of signs as bits, a small and fast file.

    The model is one that `dflow train` wrote. Its normalisations are estimated anew on training images, and
    the bits are compared with the network before they are written.
    """

    model: str = flag("folder of the model, a network of random or given signs")
    output: str = flag("file to write, whole or not at all", short="-o")
    rule: Literal["map", "ternary", "sample"] = flag(
        "rule for the weights: the most probable ones, 0 where they are undecided, or a draw", "map"
    )
    seed: int = flag("seed of the draw", 0)
    images: int = flag("number of training images to estimate on", 2560)
    data: str | None = flag("images to estimate on (default: what the model was trained on)", None)
    folder: str | None = flag("folder of the data (default: as in training, or DFLOW_DATA)", None)


def export(flags: Export) -> int:
    """`dflow export`."""
    import torch

    from dflow.data import load_images
    from dflow.generate import check_output, write_whole
    from dflow.hf import DflowClassifier, agrees, load, pack

    output = Path(flags.output)
    check_output(output)
    if flags.images < 2:
        raise InputError(f"--images {flags.images} must be at least 2")
    model = load(flags.model, flags.settle(), DflowClassifier)
    images = load_images(Source(data=flags.data, folder=flags.folder).images(flags.model))
    x = images.train.subset(flags.images).rows(slice(None)).to(model.device)
    generator = torch.Generator().manual_seed(flags.seed)
    net = model.binarized(x, flags.rule, generator)
    program = pack(net, flags.rule)
    if not agrees(program, net, x[:_COMPARED]):
        complain(
            f"{flags.model}: the exported network differs from the one it was made of; nothing is written"
        )
        return 1
    content = program.to_bytes()
    write_whole(output, content)
    small, whole = (4 * program.num_weights / size for size in (program.num_bytes, len(content)))
    about = {
        "file": flags.output,
        "rule": flags.rule,
        "weights": program.num_weights,
        "bytes": len(content),
        "bytes_of_weights": program.num_bytes,
        "compared_images": min(len(x), _COMPARED),
    }
    flags.show(
        about,
        [
            ("file", flags.output),
            ("weights", f"{program.num_weights:,}, {flags.rule}"),
            ("bytes", f"{len(content):,}, of these {program.num_bytes:,} of weights and thresholds"),
            ("smaller than float32", f"{small:.1f} times, {whole:.1f} with the header"),
            ("compared", f"every sum of {min(len(x), _COMPARED)} images"),
        ],
    )
    return 0


#: Images on which an exported network is compared with the one it was made of.
_COMPARED = 256


VERBS: Verbs = (
    ("export", Export, export, "dflow export --model runs/binary/mnist_pbnet_s -o mnist.safetensors"),
)
