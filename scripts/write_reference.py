"""Write the reference pages of the guide: settings of a recipe, commands and their flags, precisions.

The settings are those that ``dflow settings --json`` prints, the commands those of the parser of the command
line, the precisions those of every registered family, each of which a test tries. So the pages cannot say
anything else than the program does. A test compares them with what this script writes; run it after a change
of a setting, of a flag or of the families:

    python scripts/write_reference.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dflow import cli, zoo
from dflow.hf.pretrained import NOT_TRAINED

SETTINGS = """\
# Reference: settings of a recipe

This page is written by `python scripts/write_reference.py` from what `dflow settings` prints.

A recipe is a YAML file with the sections `data`, `model` and `train`, and with `output`, the folder of the
model. A setting that a recipe leaves out has the default of the tables below; an unknown name is an error
that names the nearest known one. On the command line `--set SECTION.NAME=VALUE`, or a flag of its own such
as `--train.steps 100`, replaces a setting. `null` is YAML for "no value". [Training](training.md) describes
recipes.
"""

COMMANDS = """\
# Reference: commands

This page is written by `python scripts/write_reference.py` from the parser of the command line.

**Exit codes.** 0: success; also a training that a scheduler asked to stop and that saved its state. 1: a
check failed, for example a round trip, or a run of a sweep. 2: the input cannot be used; one line on standard
error says what is wrong and what to do. 130: stopped by Ctrl-C.

**Standard output and standard error.** Every command that prints results takes `--json`. Standard output is
then one JSON document and nothing else, so that `dflow evaluate --model out --json | jq .bpc` works.
Progress bars, errors and whatever imported modules print go to standard error. An infinite number is `null`
in JSON. Two commands have other forms: `dflow generate --format jsonl` writes one JSON object for each
sample, and `dflow train` writes its measurements to `metrics.jsonl` in the folder of the model. Without
`--json`, `evaluate`, `compare` and `codecs` print a table to a terminal; into a file or a pipe they write
the same JSON as the last line after the table.

**Terminals.** Control characters in generated text and in file names are shown on a terminal as `\\x1b` and
the like. Files and pipes receive them unchanged.
"""


PRECISION = """\
# Precision

This page is written by `python scripts/write_reference.py` from the registered families. A test tries each
cell of its table.

## Which precision for what

| task | precision |
|---|---|
| train | weights in float32; `train.mixed_precision: bf16` (or `fp16`) makes networks faster |
| score and draw | float32; weights in bfloat16 or float16 take half of the memory |
| compress | float64 or integers, whatever the weights are saved in: see [Compression](compression.md) |

```python
import torch
from transformers import AutoModel
import dflow.hf

model = AutoModel.from_pretrained("demo/grouped", dtype=torch.bfloat16)
model.save_pretrained("demo/half")
```

The commands take such a folder as any other: `dflow generate --model demo/half`.

## What is kept in float32

- Log-probabilities, soft-max, mixtures and the noise that symbols are drawn by: float32 or float64 in every
  precision. Probabilities sum to 1 as in a model of float32.
- Maps on Z/K and on the integers are exact in every precision: one network output selects one permutation,
  in both modes and in both directions. In half precision it may select another permutation than in float32,
  so that it is another law, a little worse or better.
- Everything that is no weight: counts and moments of parts in closed form, running averages, ranges of the
  data. A model in half precision that is saved and loaded has them as before.
- Linear layers, splines and affine maps of the reals: computed in float32 from the weights as they are.

## What is only close

A law that a network draws group by group is scored in one pass. In half precision both round differently: the
log-probability of a symbol differs by some 0.0005 nats in bfloat16, 0.0001 in float16. The round trip of
`dflow evaluate` allows for that. Who needs the same probabilities in both ways loads the model in float32.

A trained model of Penn Treebank (`recipes/ptb/context_grouped.yaml`: 2.2 million weights, and counts of up to
10 symbols) on all of the test split, by `dflow evaluate --model MODEL` on a CPU, *exact*: 1.471292 bits a
character in float32, and 1.471295 saved in bfloat16, where the standard error is 0.0043. Both round trips (16
chunks) held, and the model in bfloat16 drew 100 samples.

## Families

"mixed" is training by `train.mixed_precision` or `torch.autocast`, with weights in float32.

"""


#: Columns of the table of precisions, and the dtype that each stands for.
PRECISIONS = {
    "float64": "float64",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "mixed bf16": "bfloat16",
    "mixed fp16": "float16",
}


def abilities(family: zoo.Family, precision: str) -> list[str]:
    """What models of a family do in a precision: score, train, draw."""
    able = ["score"]
    if precision != "float16":
        able.append("train")
    if family.kind != "labels":
        able.append("draw")
    return able


def write_precision() -> str:
    """The page on precision, with the table of all families."""
    lines = [_row("family", *PRECISIONS), "|" + "---|" * (1 + len(PRECISIONS))]
    for name in zoo.names():
        cells = [", ".join(abilities(zoo.find(name), precision)) for precision in PRECISIONS]
        lines.append(_row(f"`{name}`", *cells))
    notes = [
        f"- {NOT_TRAINED[0].upper()}{NOT_TRAINED[1:]}.",
        "- Classifiers (`pbnet`) give probabilities of labels, and draw nothing.",
        "- Where autocast asks for float16, the recurrence of `lstm` on a CPU is computed in float32, since "
        "there is no such kernel, and so are the sums of `pbnet` and of networks of signs, since squares of "
        "pixels exceed its range.",
    ]
    return PRECISION + "\n".join([*lines, "", *notes, ""])


def write_settings() -> str:
    """The page of all settings: those of the data, of training, and of each family of models."""
    general = _settings()
    parts = [SETTINGS]
    titles = list(dict.fromkeys(row["part"] for row in general["settings"]))
    for title in titles:
        if title != "model":
            parts.append(_settings_table(f"`{title.split()[0]}`", title, general["settings"]))
    for kind, names in general["families"].items():
        for name in names:
            rows = _settings(name)["settings"]
            parts.append(_settings_table(f"`model`, family `{name}` ({kind})", f"model {name}", rows))
    return "\n".join(parts)


def write_commands() -> str:
    """The page of all commands, in the order of ``dflow --help``."""
    return "\n".join([COMMANDS, *(_command(name, parser) for name, parser in _verbs(cli.build_parser()))])


def _settings(*family: str) -> dict[str, Any]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert cli.main(["settings", *family, "--json"]) == 0
    record: dict[str, Any] = json.loads(output.getvalue())
    return record


def _settings_table(heading: str, part: str, rows: Sequence[dict[str, Any]]) -> str:
    of = part.partition(" of ")[2]
    lines = [f"## {heading}{f': {of}' if of else ''}", "", "| name | type | default | meaning |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        if row["part"] == part and row["name"] != "family":
            default = "required" if row["required"] else f"`{_spelled(row['default'])}`"
            lines.append(_row(f"`{row['name']}`", row["type"], default, row["help"]))
    return "\n".join([*lines, ""])


def _spelled(default: object) -> str:
    """A default as a recipe has it: a word is in quotes only where YAML would read something else."""
    if isinstance(default, str) and (yaml.safe_load(default) == default or default.endswith("inf")):
        return default
    return json.dumps(default, ensure_ascii=False)


def _verbs(parser: argparse.ArgumentParser, name: str = "dflow") -> Iterator[tuple[str, Any]]:
    """Every parser below ``parser`` that takes no further verb."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    for group in groups:
        for word, inner in group.choices.items():
            yield from _verbs(inner, f"{name} {word}")


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    about = " ".join((parser.description or "").split())
    example = (parser.epilog or "").removeprefix("example: ")
    lines = [f"## `{name}`", "", about, "", "```", example, "```", "", "| argument | meaning |", "|---|---|"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            lines.append(_row(f"`{_flag(action)}`", (action.help or "").replace("%%", "%")))
    return "\n".join([*lines, ""])


def _flag(action: argparse.Action) -> str:
    """How an argument is written: its names, and what follows them."""
    value = str(action.metavar or action.dest.upper())
    more = {"+": f"{value} ...", "*": f"[{value} ...]", "?": f"[{value}]", 0: ""}
    value = more.get(action.nargs, value) if action.nargs is not None else value
    text = f"{', '.join(action.option_strings)} {value}".strip()
    return f"{text} (required)" if action.required and action.option_strings else text


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PAGES = {"settings.md": write_settings, "commands.md": write_commands, "precision.md": write_precision}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", default="docs/guide", type=Path, help="folder of the pages")
    folder = parser.parse_args().output
    for name, write in PAGES.items():
        (folder / name).write_text(write(), encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
