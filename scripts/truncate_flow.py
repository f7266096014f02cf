"""Cut a bipartite flow after its first couplings: fewer network calls without further training.

    python scripts/truncate_flow.py runs/ptb/bipartite --calls 1 2 4

Couplings run from fine to coarse, and each is trained by itself (rule layerwise), so the first N couplings
are those that training N alone would have given. Only the factorized base is set anew, to the latents of
training text. The models are written beside the old one, as FOLDER@N.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dflow import hf, objectives
from dflow.config import InputError
from dflow.data import Tokenizer, load
from dflow.train import RECIPE, recipe_of

BATCHES = 64


def truncate(folder: Path, calls: int) -> Path:
    """Write the flow of the first ``calls`` couplings of the one in ``folder``; the new folder."""
    whole, tokenizer, recipe = hf.load(folder), Tokenizer.load(folder), recipe_of(folder)
    settings = whole.config.settings()
    if (
        whole.config.family != "bipartite"
        or not 1 <= calls <= whole.num_calls
        or recipe.train.rule
        not in (
            "auto",
            "layerwise",
        )
    ):
        raise InputError(
            f"{folder}: needs a bipartite flow of {calls} or more couplings, trained layer by layer"
        )
    output = folder.with_name(f"{folder.name}@{calls}")
    if output.exists():
        raise InputError(f"{output}: exists already; remove it first")
    config = hf.DflowConfig(
        family="bipartite", vocab_size=tokenizer.size, **(vars(settings) | {"num_flows": calls})
    )
    model = hf.DflowModel(config)
    kept = {k: v for k, v in whole.state_dict().items() if ".base." not in k}
    found = model.load_state_dict({k: v for k, v in kept.items() if k in model.state_dict()}, strict=False)
    if any(".base." not in name for name in found.missing_keys):
        raise InputError(f"{folder}: lacks {', '.join(found.missing_keys)}")
    text = load(recipe.data, tokenizer).train
    generator = torch.Generator().manual_seed(recipe.train.seed)
    model.train(False)
    batches = (text.crops(32, model.config.length, generator) for _ in range(BATCHES))
    objectives.refit(model.distribution, batches)
    hf.save(model, output)
    tokenizer.save(output)
    (output / RECIPE).write_bytes((folder / RECIPE).read_bytes())
    return output


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="output folder of `dflow train`")
    parser.add_argument("--calls", type=int, nargs="+", required=True, help="couplings to keep")
    arguments = parser.parse_args()
    for calls in arguments.calls:
        print(truncate(arguments.folder, calls))


if __name__ == "__main__":
    main()
