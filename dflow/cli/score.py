"""``dflow score``."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Machine, finite, load_model, print_table, read_text, suit_threads
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.score import Part, TextScore


@dataclass(kw_only=True)
class Score(Machine):
    """Print the exact bits of a text under a model.

    They are those of the whole, and of each line or symbol. A model with a context scores a text of any
    length as one document. One without cuts a text that is longer than the model into chunks, each on its
    own, and says so. The bits of the lines add up to those of the whole.
    """

    file: str = argument("file of text in UTF-8, or - for standard input", stdin=True)
    model: str = flag("folder of the model")
    each: Literal["line", "symbol", "document"] = flag("parts whose bits are printed", "document")
    given: str | None = flag(
        "text that stands before that of the file; it is read and not scored (for models with a context, and "
        "for those drawn from left to right)",
        None,
    )
    format: Literal["text", "jsonl", "csv"] = flag(
        "tables, a JSON object for each part and a last one for the whole, or the same as rows of a table",
        "text",
    )
    batch_size: int = flag("number of lines or chunks scored at a time", 32)


def score(flags: Score) -> int:
    """`dflow score`."""
    from dflow.score import score as run

    name, text = read_text(flags.file)
    model, tokenizer = load_model(flags.model, flags.settle())
    suit_threads(model, flags.batch_size)
    try:
        result = run(
            model,
            tokenizer,
            text,
            each=flags.each,
            given=flags.given or "",
            batch_size=flags.batch_size,
            progress=True,
        )
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if flags.format == "text":
        show(flags, name, result)
        return 0
    whole = record("document", result) | {"protocol": result.protocol, "num_given": result.num_given}
    whole |= {"num_left": result.num_left, "file": name, "model": flags.model}
    records = [record(flags.each, part) for part in result.parts] + [whole]
    if flags.format == "jsonl":
        for row in records:
            print(json.dumps(finite(row), ensure_ascii=False))
        return 0
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*record("document", result), "protocol"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row.get(name) for name in writer.fieldnames} for row in records)
    sys.stdout.write(buffer.getvalue())
    return 0


def record(kind: str, part: Part | TextScore) -> dict[str, Any]:
    """What a part or the whole costs; the whole has neither number nor text."""
    return {
        "part": kind,
        "number": getattr(part, "number", None),
        "text": getattr(part, "text", None),
        "num_symbols": part.num_symbols,
        "num_characters": part.num_characters,
        "bits": part.bits,
        "bits_per_character": part.bits_per_character,
        "kind": "exact",
    }


def show(flags: Score, name: str, result: TextScore) -> None:
    """Print the parts and the whole as tables."""
    if result.parts:
        rows = [[flags.each, "symbols", "bits", "bits a character", "text"]]
        for part in result.parts:
            mean = "-" if part.bits_per_character is None else f"{part.bits_per_character:.4f}"
            rows.append(
                [
                    f"{part.number}",
                    f"{part.num_symbols:,}",
                    f"{part.bits:.4f}",
                    mean,
                    json.dumps(part.text, ensure_ascii=False),
                ]
            )
        print_table(rows)
        print()
    protocols = {
        "document": "document",
        "chunks": "chunks, each on its own, since the text is longer than the model",
        "lines": "lines, each a sequence of its own",
    }
    rows = [
        ["model", flags.model],
        ["text", name],
        ["protocol", protocols[result.protocol]],
        ["symbols scored", f"{result.num_symbols:,}"],
        ["characters scored", f"{result.num_characters:,}"],
        ["bits", f"{result.bits:.4f}"],
        ["bits a character", f"{result.bits_per_character:.4f}"],
        ["kind", result.kind],
    ]
    if result.num_given:
        rows.insert(3, ["symbols given", f"{result.num_given:,}"])
    if result.num_left:
        rows.insert(3, ["empty lines left out", f"{result.num_left:,}"])
    print_table(rows)


VERBS: Verbs = (("score", Score, score, "dflow score my.txt --model runs/grouped --each line"),)
