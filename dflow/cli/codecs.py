"""``dflow codecs``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dflow.cli.flags import Verbs, flag
from dflow.cli.shared import Machine, Results, complain, print_paths
from dflow.config import InputError


@dataclass(kw_only=True)
class Codecs(Machine, Results):
    """What classical codecs, and models, make of pictures or texts.

    A table of bytes, bits and time, each file decoded and compared.
    """

    files: list[str] = field(
        default_factory=list,
        metadata={"help": "pictures, .npy arrays or texts (or a set by --data)", "positional": True},
    )
    data: str | None = flag("data set by name (`dflow data list` shows them), or a path", None)
    split: Literal["train", "valid", "test", "all"] | None = flag(
        "with --data: which part of it: train, valid, test, or all of them (default: test)", None
    )
    folder: str | None = flag("with --data: folder of the data (default: DFLOW_DATA)", None)
    limit: int | None = flag(
        "of files the first LIMIT pictures, or LIMIT bytes of each text; of --data LIMIT random pictures, or "
        "LIMIT characters",
        None,
    )
    model: list[str] = field(default_factory=list, metadata={"help": "folders of models to compress with"})
    mode: Literal["float64", "fixed", "float32"] | None = flag(
        "numbers that models of images compute in (default: float64)", None
    )
    each: bool = flag("a file for each item (default: this and --together)", False)
    together: bool = flag("all in one file", False)
    memory: bool = flag("peak memory too, each direction in a process of its own", False)
    rounds: int | None = flag("rounds of measuring (default: 3)", None)
    output: str | None = flag("folder for codecs.md and codecs.json", None, short="-o")


def codecs(flags: Codecs) -> int:
    """`dflow codecs`."""
    from dflow.compare import codecs as comparing
    from dflow.compare import material
    from dflow.hf import DflowImageModel, kind_of, split_calls

    folder = None if flags.output is None else Path(flags.output)
    if folder is not None:
        comparing.check_folder(folder)
    flags.settle()
    if flags.files and flags.data is not None:
        raise InputError(f"files and --data {flags.data}: compress the ones or the other")
    if flags.data is not None:
        found = material.of_data(flags.data, flags.split or "test", flags.folder, flags.limit)
    else:
        found = material.of_files([Path(name) for name in flags.files], flags.limit)
    is_text = isinstance(found.items[0], bytes)
    if is_text and flags.mode not in (None, "float64"):
        raise InputError(f"--mode {flags.mode}: texts are compressed in float64; leave it out")
    models: list[Any] = []
    for name in flags.model:
        if (kind_of(split_calls(name)[0]) is DflowImageModel) == is_text:
            kinds = ("images", "texts") if is_text else ("text", "pictures")
            raise InputError(f"{name}: a model of {kinds[0]}, and these are {kinds[1]}")
        models.append(
            material.text_model(name) if is_text else material.image_model(name, flags.mode or "float64")
        )
    both = flags.each == flags.together
    result = comparing.compare_codecs(
        found,
        models,
        each=flags.each or both,
        together=flags.together or both,
        rounds=3 if flags.rounds is None else flags.rounds,
        memory=flags.memory,
        progress=True,
    )
    paths = [] if folder is None else comparing.write(result, folder)
    if not flags.json:
        print(comparing.markdown(result))
        print_paths(paths)
    flags.end(json.loads(comparing.record(result)), last_line=True)
    failed = [row.name for row in result.rows if row.error and "FAILED" in row.error]
    if failed:
        complain(f"round trip failed: {', '.join(failed)}")
    return int(bool(failed))


VERBS: Verbs = (
    (
        "codecs",
        Codecs,
        codecs,
        "dflow codecs --data mnist --limit 500 --model runs/images/idf --output codecs",
    ),
)
