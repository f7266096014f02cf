"""``dflow compact``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Results, Threads, load_model
from dflow.config import InputError


@dataclass(kw_only=True)
class Compact(Threads, Results):
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

    flags.set_threads()
    size = dataclasses.asdict(run(flags.model, flags.output, flags.digits))
    rows = [(name, f"{number:,} bytes") for name, number in size.items()]
    bits: dict[str, float] = {}
    try:
        bits = {name: bits_of(folder) for name, folder in (("before", flags.model), ("now", flags.output))}
        cost = f"{bits['now']:.4f}, before {bits['before']:.4f} ({_CHUNKS} chunks of validation data at most)"
    except InputError as error:
        cost = f"not measured: {error}"
    flags.show(
        {"folder": flags.output} | size | {"bits": bits},
        [("folder", flags.output), *rows, ("bits a character", cost)],
    )
    return 0


def bits_of(folder: str) -> float:
    """Bits a character of the beginning of the validation data that a model of text was trained with.

    Raises:
        InputError: the data are not there, or it is a model of other data.
    """
    import torch

    from dflow.data import DataConfig, Draws, load
    from dflow.evaluate import evaluate
    from dflow.models import split_calls
    from dflow.train import recipe_of

    data = recipe_of(split_calls(folder)[0]).data
    if not isinstance(data, DataConfig):
        raise InputError("`dflow evaluate` scores images and tables")
    model, tokenizer = load_model(folder, torch.device("cpu"))
    text = load(data, tokenizer, model.config.length).valid
    if isinstance(text, Draws):
        raise InputError("`dflow evaluate` compares a model with a law")
    return evaluate(model, text, limit=_CHUNKS).bpc


#: Chunks that are scored.
_CHUNKS = 32


VERBS: Verbs = (("compact", Compact, compact, "dflow compact runs/grouped -o runs/small --digits 6"),)
