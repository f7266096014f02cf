"""Train on text8: `dflow train` with a text8 recipe, as a script for launchers.

accelerate launch scripts/train_text8.py                      # the grouped model on all GPUs
accelerate launch scripts/train_text8.py recipes/text8/bipartite.yaml --set train.steps=1000
torchrun --nproc_per_node 2 scripts/train_text8.py            # two processes on a CPU
torchrun --nproc_per_node 2 scripts/train_text8.py --resume runs/text8/grouped
"""

import sys
from pathlib import Path

from dflow.cli import main

RECIPE = Path(__file__).parent.parent / "recipes" / "text8" / "grouped.yaml"

if __name__ == "__main__":
    arguments = sys.argv[1:]
    resumed = "--resume" in arguments[:-1] and not arguments[arguments.index("--resume") + 1].startswith("-")
    named = resumed or (bool(arguments) and arguments[0].endswith(".yaml"))
    sys.exit(main(["train", *([] if named else [str(RECIPE)]), *arguments]))
