"""``dflow codecs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Machine, Results, complain, show_comparison
from dflow.config import InputError


@dataclass(kw_only=True)
class Codecs(Machine, Results):
    """Compare classical codecs and models on pictures or texts.

    The table has bytes, bits and times; each file is decoded and compared.
    """

    files: list[str] = argument("pictures, .npy arrays or texts (or a set by --data)", many=True)
    data: str | None = flag("data set by name (`dflow data list` shows them), or a path", None)
    split: Literal["train", "valid", "test", "all"] | None = flag(
        "part of --data: train, valid, test, or all of them (default: test)", None
    )
    folder: str | None = flag("folder of --data (default: DFLOW_DATA)", None)
    limit: int | None = flag(
        "number of pictures, the first ones of files or random ones of --data; of texts, number of bytes of "
        "each file or of characters of --data (default: all)",
        None,
    )
    model: list[str] = flag("folders of models to compress with", many=True)
    prime: str | None = flag(
        "text that PPMd and zstd have read before, as a model has read its training text: a file, or train "
        "for the training part of --data",
        None,
    )
    mode: Literal["float64", "fixed", "float32"] | None = flag(
        "kind of numbers that models of images compute in (default: float64)", None
    )
    each: bool = flag("compress each item into a file of its own (default: this and --together)", False)
    together: bool = flag("compress all items into one file", False)
    memory: bool = flag("measure peak memory too, each direction in a process of its own", False)
    rounds: int = flag("number of rounds of measuring", 3)
    output: str | None = flag("folder for codecs.md and codecs.json", None, short="-o")


def codecs(flags: Codecs) -> int:
    """`dflow codecs`."""
    from dflow.compare import codecs as comparing
    from dflow.compare import material
    from dflow.compare.primed import primed_codecs
    from dflow.hf import DflowImageModel, kind_of, split_calls

    folder = None if flags.output is None else Path(flags.output)
    if folder is not None:
        comparing.check_folder(folder)
    flags.settle()
    if flags.files and flags.data is not None:
        raise InputError(f"files and --data {flags.data}: compress the ones or the other")
    if flags.data is not None:
        stock = material.of_data(flags.data, flags.split or "test", flags.folder, flags.limit)
    else:
        stock = material.of_files([Path(name) for name in flags.files], flags.limit)
    is_text = isinstance(stock.items[0], bytes)
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
    primed: Any = ()
    if flags.prime is not None:
        if not is_text:
            raise InputError(f"--prime {flags.prime}: only codecs of texts are primed; leave it out")
        primed = primed_codecs(material.priming(flags.prime, flags.data, flags.folder))
    unspecified = flags.each == flags.together
    result = comparing.compare_codecs(
        stock,
        models,
        each=flags.each or unspecified,
        together=flags.together or unspecified,
        rounds=flags.rounds,
        primed=primed,
        memory=flags.memory,
        progress=True,
    )
    show_comparison(flags, comparing, result, folder)
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
