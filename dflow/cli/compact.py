"""``dflow compact``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Results


@dataclass(kw_only=True)
class Compact(Results):
    """Make a small copy of a model.

    Weights are stored in float16 and computed with in float32; counts are the same, in a third of their size.
    Every command takes the copy; only resuming its training needs the original.
    """

    model: str = argument("folder of the model")
    output: str = flag("folder to write, new or empty", short="-o")
    digits: int = flag(
        "number of binary digits of the weights in matrices, 2 to 11, which is all of float16; fewer make no "
        "smaller folder, but a smaller zip file or wheel of it",
        11,
    )


def compact(flags: Compact) -> int:
    """`dflow compact`."""
    from dflow.train import compact as run

    size = run(flags.model, flags.output, flags.digits)
    rows = [(name, f"{number:,} bytes") for name, number in dataclasses.asdict(size).items()]
    flags.show({"folder": flags.output} | dataclasses.asdict(size), [("folder", flags.output), *rows])
    return 0


VERBS: Verbs = (("compact", Compact, compact, "dflow compact runs/grouped -o runs/small --digits 6"),)
