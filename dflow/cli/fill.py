"""``dflow fill``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Drawing, load_model, read_text, suit_threads
from dflow.config import InputError


@dataclass(kw_only=True)
class Fill(Drawing):
    """Fill the gaps of a text, given the text around them.

    Every mark in the text is a gap of so many symbols. A grouped, any_order, bipartite or multiscale model
    that was trained with a model.context reads the text on both sides of a gap; a transformer or an lstm
    continues a text that ends with its gap.
    """

    file: str = argument("file of text in UTF-8 with marks, or - for standard input", stdin=True)
    model: str = flag("folder of the model")
    gap: str = flag("mark that stands for a gap in the text", "____")
    size: list[int] = flag("number of symbols of each gap, or one number for all", many=True)
    rank: bool = flag("print the samples by their probability, the likeliest first", False)
    format: Literal["text", "jsonl"] = flag(
        "the text itself, or a JSON object a line with the log-probability of what fills the gaps", "text"
    )
    output: str | None = flag(
        "file to write, whole or not at all (default: standard output)", None, short="-o"
    )


def fill(flags: Fill) -> int:
    """`dflow fill`."""
    from dflow.fill import fill as run
    from dflow.fill import gapped, spell
    from dflow.generate import check_output, say, write_whole

    if not flags.size:
        raise InputError("--size is missing: give the number of symbols of each gap, or one for all")
    output = None if flags.output is None else Path(flags.output)
    if output is not None:
        check_output(output)
    controls = flags.controls()
    name, text = read_text(flags.file)
    model, tokenizer = load_model(flags.model, flags.settle())
    suit_threads(model, min(flags.n, flags.batch_size), model.num_calls)
    lines = []
    try:
        symbols, hidden = gapped(tokenizer, text, flags.gap, flags.size)
        options = {"seed": flags.seed, "batch_size": flags.batch_size}
        samples = run(model, symbols, hidden, flags.n, controls=controls, **options)
        if flags.rank:
            samples = iter(sorted(samples, key=lambda filled: -filled.log_prob))
        for number, filled in enumerate(samples, 1):
            if flags.format == "jsonl":
                line = spell(filled, hidden, tokenizer, controls.exact) + "\n"
            else:
                # One text alone is as the file is, filled.
                title = f"--- sample {number}, log-probability {filled.log_prob:.4f} nats ---\n"
                written = tokenizer.decode(filled.ids)
                line = title + written + "\n" if flags.n > 1 else written
            if output is None:
                say(line)
            else:
                lines.append(line)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if output is not None:
        write_whole(output, "".join(lines).encode("utf-8", "replace"))
    return 0


VERBS: Verbs = (
    ("fill", Fill, fill, "dflow fill letter.txt --model runs/grouped --size 20 --samples 5 --rank"),
)
