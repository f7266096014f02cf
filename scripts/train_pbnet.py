"""Train a probabilistic binary network: `dflow train` with the recipe of PBNet-S, as a script for launchers.

python scripts/train_pbnet.py          # trains the network of floats first, if missing
python scripts/train_pbnet.py recipes/binary/mnist_pbnet.yaml --set train.minutes=10
"""

import sys
from pathlib import Path

from dflow.cli import build_parser, main

RECIPES = Path(__file__).parent.parent / "recipes" / "binary"
FLOATS = Path("runs/binary/mnist_float")

if __name__ == "__main__":
    arguments = sys.argv[1:]
    resumed = "--resume" in arguments[:-1] and not arguments[arguments.index("--resume") + 1].startswith("-")
    if resumed or (arguments and arguments[0].endswith(".yaml")):
        sys.exit(main(["train", *arguments]))
    words = ["train", str(RECIPES / "mnist_pbnet_s.yaml"), *arguments]
    # For --help, or with a flag that does not exist, this is the end: nothing is trained.
    build_parser().parse_args(words)
    if not (FLOATS / "config.json").is_file():
        code = main(["train", str(RECIPES / "mnist_float.yaml")])
        if code:
            sys.exit(code)
    sys.exit(main(words))
