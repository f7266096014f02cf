"""``dflow compare``."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dflow.cli.codecs import Codecs, codecs
from dflow.cli.flags import Verbs, flag
from dflow.cli.shared import Machine, Results, load_model, print_paths, remark
from dflow.cli.source import Source
from dflow.config import InputError


@dataclass(kw_only=True)
class Compare(Source, Machine, Results):
    """Bits, network calls and speed of several models.

    With ratios to the LSTM among them. With --codec: as `dflow codecs`, which is its new name.
    """

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders of the models; with --codec pictures, .npy arrays or texts (or --data)",
            "positional": True,
        },
    )
    codec: bool = flag("compare codecs on files: the older name of `dflow codecs`", False)
    model: list[str] = field(
        default_factory=list, metadata={"help": "with --codec: folders of models to compress with"}
    )
    mode: Literal["float64", "fixed", "float32"] | None = flag(
        "with --codec: numbers that models of images compute in (default: float64)", None
    )
    each: bool = flag("with --codec: a file for each item (default: this and --together)", False)
    together: bool = flag("with --codec: all in one file", False)
    memory: bool = flag("with --codec: peak memory too, each direction in a process of its own", False)
    length: int | None = flag("symbols of a drawn sample (default: the longest that all can draw)", None)
    batch_size: int | None = flag(
        "samples drawn together where characters a second are measured (default: 100)", None
    )
    rounds: int | None = flag("rounds of measuring (default: 10, of codecs 3)", None)
    output: str | None = flag(
        "folder for compare.md, compare.json and compare.png; of codecs codecs.md and codecs.json",
        None,
        short="-o",
    )


def compare(flags: Compare) -> int:
    """`dflow compare`."""
    from dflow import compare as comparing
    from dflow.data import load

    if flags.codec:
        return renamed(flags)
    for name in ("model", "mode", "each", "together", "memory"):
        if getattr(flags, name):
            raise InputError(f"--{name} is for `dflow codecs`; models to compare are named without it")
    if not flags.models:
        raise InputError("name at least one model to compare")
    folder = None if flags.output is None else Path(flags.output)
    if folder is not None:
        comparing.check_folder(folder)
    device = flags.settle()
    loaded = [load_model(name, device) for name in flags.models]
    config = flags.config(flags.models[0], loaded[0][0])
    corpora = [load(config, tokenizer) for _, tokenizer in loaded]
    split = flags.part(corpora[0], *flags.models)
    contestants = [
        comparing.Contestant(name.rstrip("/"), model, corpus.split(split))
        for name, (model, _), corpus in zip(flags.models, loaded, corpora, strict=True)
    ]
    for note in corpora[0].notes:
        print(f"note: {note}", file=sys.stderr)
    result = comparing.compare(
        contestants,
        length=flags.length,
        batch_size=100 if flags.batch_size is None else flags.batch_size,
        rounds=10 if flags.rounds is None else flags.rounds,
        limit=flags.limit,
        text=f"{config.name}, {split}",
        progress=True,
    )
    paths = [] if folder is None else comparing.write(result, folder)
    if not flags.json:
        print(comparing.markdown(result))
        print_paths(paths)
    flags.end(json.loads(comparing.record(result)), last_line=True)
    return 0


def renamed(flags: Compare) -> int:
    """`dflow compare --codec`, handed on to `dflow codecs`."""
    for name in ("length", "batch_size"):
        if getattr(flags, name) is not None:
            label = name.replace("_", "-")
            raise InputError(f"--{label} is for models, and --codec compares codecs; leave one of them out")
    remark("note: `dflow codecs` is the new name of `dflow compare --codec`")
    shared = {f.name: getattr(flags, f.name) for f in dataclasses.fields(Codecs) if f.name != "files"}
    return codecs(Codecs(files=flags.models, **shared))


VERBS: Verbs = (("compare", Compare, compare, "dflow compare runs/grouped runs/lstm --output comparison"),)
