"""The command line: one verb a function, its flags the fields of a dataclass.

What a verb needs is imported when it runs, so that ``dflow --help`` is quick.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO, Union

import dflow
from dflow import plugins
from dflow.config import InputError, convert, nearest
from dflow.terminal import shown, visible
from dflow.threads import processors, wait_passively

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from dflow.compress import ImageCoder
    from dflow.data import Corpus, DataConfig, ImageConfig, ImageSet, Tokenizer
    from dflow.evaluate import Evaluation, ExactEvaluation, ImageEvaluation, LawEvaluation
    from dflow.hf import DflowModel
    from dflow.train import Recipe


def flag(
    help: str, default: Any = dataclasses.MISSING, short: str | None = None, long: str | None = None
) -> Any:
    """A field that is the flag ``--name``, required where it has no default.

    ``short`` is another name like ``-o``, ``long`` another one like ``--samples``, which is shown first.
    """
    return field(default=default, metadata={"help": help, "short": short, "long": long})


def options_of(f: dataclasses.Field[Any]) -> list[str]:
    """The flags by which a field is set, those that are shown first in front."""
    names = [f.metadata.get("short"), f.metadata.get("long"), "--" + f.name.replace("_", "-")]
    return [name for name in names if name]


def argument(help: str) -> Any:
    """A field that is a positional argument; a list takes one or more."""
    return field(metadata={"help": help, "positional": True})


@dataclass(kw_only=True)
class Results:
    """Flag of every verb that prints results."""

    json: bool = flag("print one JSON document on standard output, and no table", False)

    def show(self, record: object, *tables: Sequence[Sequence[str]], last_line: bool = False) -> None:
        """Print the record as JSON where it is asked for, else the tables.

        ``last_line``: into files and pipes the record follows the tables, as one line.
        """
        if not self.json:
            for rows in tables:
                print_table(rows)
        self.end(record, last_line)

    def end(self, record: object, last_line: bool = False) -> None:
        """Print the record alone, where it is asked for."""
        if self.json or (last_line and not sys.stdout.isatty()):
            print(json.dumps(finite(record)))


@dataclass(kw_only=True)
class Machine:
    """Flags of every verb that computes."""

    threads: int | None = flag("threads of torch on the CPU (default: one a processor)", None)
    device: str = flag("device to compute on; auto: the first GPU, else the CPU", "auto")

    def settle(self) -> torch.device:
        """Set the threads, and find the device."""
        import torch

        set_threads(self.threads)
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.empty(1, device=device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--device {self.device}: not to be had here ({reason}); try --device cpu"
            ) from None
        return device

    def processes(self) -> tuple[torch.device, Accelerator | None]:
        """The device, and under a launcher the processes among which the work is shared."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return self.settle(), None
        import torch
        from accelerate import Accelerator

        set_threads(self.threads)
        if self.device not in ("auto", "cpu", "cuda") or (
            self.device == "cuda" and not torch.cuda.is_available()
        ):
            raise InputError(
                f"--device {self.device}: under a launcher each process takes a device of its own; give cpu, "
                "cuda where there is one, or nothing"
            )
        accelerator = Accelerator(cpu=self.device == "cpu" or not torch.cuda.is_available())
        return accelerator.device, accelerator


@dataclass(kw_only=True)
class Source:
    """Flags of every verb that scores data."""

    data: str | None = flag(
        "data set by name (`dflow data list` shows them), or a path (default: what the model was trained on)",
        None,
    )
    folder: str | None = flag("folder of the data (default: as in training, or DFLOW_DATA)", None)
    split: Literal["train", "valid", "test", "all"] | None = flag(
        "which part of the data: train, valid, test, or all of them (default: test; of a text, folder or "
        "table of your own that the model was not trained on and that has no test split, all)",
        None,
    )
    limit: int | None = flag(
        "score the first LIMIT chunks only; of images and tables LIMIT random rows", None
    )

    def config(self, folder: str, model: DflowModel) -> DataConfig:
        """The data section of the recipe that the model in ``folder`` was trained by, changed by the flags.

        How a text is cut is no choice: a model is one of sentences or of a stream.
        """
        from dflow.data import DataConfig, load
        from dflow.hf import split_calls
        from dflow.train import recipe_of

        path = split_calls(folder)[0]
        trained: DataConfig | None = None
        if self.data is None or (path / "recipe.yaml").is_file():
            found = recipe_of(path).data
            if not isinstance(found, DataConfig):
                raise InputError(f"{path}: its recipe.yaml tells of images; restore both files from one run")
            trained = found
        if trained is None or not self.names(trained):
            kept = None if trained is None else trained.folder
            fresh = DataConfig(name=str(self.data), folder=self.folder or kept)
            same = trained is not None and is_same(load, trained, fresh)
            trained = dataclasses.replace(trained, name=fresh.name) if trained and same else fresh
        protocol: Literal["stream", "sentence"] = "sentence" if model.config.explicit_length else "stream"
        if self.data is not None:  # whatever it is by now
            trained = dataclasses.replace(trained, checksum=None)
        return dataclasses.replace(trained, protocol=protocol, folder=self.folder or trained.folder)

    def part(self, data: Corpus | ImageSet, *folders: str) -> str:
        """The split to score: what --split says, or what is safe for the models in ``folders``.

        Data that were cut into splits by a share alone are scored as a whole, unless one of the models was
        trained on them.
        """
        if self.split is not None:
            return self.split
        if self.data is None or not data.pooled:
            return "test"
        return "test" if any(self.trained_on(data, folder) for folder in folders) else "all"

    def trained_on(self, data: Corpus | ImageSet, folder: str) -> bool:
        """Whether the model in ``folder`` was trained on these data, under this name or another one."""
        from dflow.data import files
        from dflow.hf import split_calls
        from dflow.train import recipe_of

        path = split_calls(folder)[0]
        if self.data is None:
            return True
        if not (path / "recipe.yaml").is_file():
            return False
        trained = recipe_of(path).data
        if self.data == trained.name or data.checksum == trained.checksum:
            return True
        places = [files.expanded(name) for name in (self.data, trained.name)]
        bases = [files.data_folder(f) for f in (self.folder or trained.folder, trained.folder)]
        resolved = [
            {p.resolve() for p in (place, base / place if base else place) if files.exists(p)}
            for place, base in zip(places, bases, strict=True)
        ]
        return bool(resolved[0] & resolved[1])

    def images(self, folder: str) -> ImageConfig:
        """Images or the table on which the model in ``folder`` was trained, changed by the flags."""
        from dflow.data import ImageConfig, load_images
        from dflow.train import recipe_of

        trained = ImageConfig()
        if self.data is None or (Path(folder) / "recipe.yaml").is_file():
            found = recipe_of(folder).data
            if not isinstance(found, ImageConfig):
                raise InputError(f"{folder}: its recipe.yaml tells of text; restore both files from one run")
            trained = found
        if not self.names(trained):
            fresh = trained.of(str(self.data))
            fresh = dataclasses.replace(fresh, folder=self.folder or fresh.folder)
            same = is_same(load_images, trained, fresh)
            trained = dataclasses.replace(trained, name=fresh.name) if same else fresh
        if self.data is not None:
            trained = dataclasses.replace(trained, checksum=None)
        return dataclasses.replace(trained, folder=self.folder or trained.folder)

    def names(self, trained: DataConfig | ImageConfig) -> bool:
        """Whether the data are those that a model was trained on, by their name or path."""
        from dflow.data.files import absolute

        if self.data is None or self.data == trained.name:
            return True
        return trained.is_path and absolute(self.data) == absolute(trained.name)


@dataclass(kw_only=True)
class Train:
    """Train a model by a recipe, or go on with a training: dflow train --resume FOLDER."""

    recipe: str = argument("recipe, a YAML file; with --resume also the folder of a training")
    set: list[str] = field(
        default_factory=list,
        metadata={
            "help": "settings that replace those of the recipe: train.minutes=3 model.num_calls=16 ..."
        },
    )
    output: str | None = flag("folder of the model (default: that of the recipe)", None, short="-o")
    resume: bool = flag(
        "go on: with the training in FOLDER by the recipe that it keeps (--resume FOLDER), or with that of a "
        "recipe in its output (RECIPE --resume)",
        False,
    )
    threads: int | None = flag("threads of torch on the CPU (default: one a processor)", None)


@dataclass(kw_only=True)
class Evaluate(Source, Machine, Results):
    """Exact bits of a model on a text or on images, or bounds of them; its distance from a synthetic law.

    Of a classifier accuracy, nll and calibration: of the propagated law, of the network of its most probable
    signs, and of ensembles of networks drawn from it.

    A failed round trip ends with exit code 1.
    """

    model: str = flag("folder of the model")
    batch_size: int | None = flag("chunks scored at a time (default: 32; of a law 1024, images 100)", None)
    draws: int | None = flag("draws of the dequantizer for each image or row (default: 256)", None)
    precision: Literal["float64", "float32"] | None = flag(
        "in which models of images are computed: float64 (default), float32", None
    )
    seed: int | None = flag("seed of the draws of the dequantizer, or of networks (default: 0)", None)


@dataclass(kw_only=True)
class Export(Machine, Results):
    """Write a network of signs as bits: one file, small and fast, of a model that `dflow train` made.

    Its normalisations are estimated anew on training images, and it is compared with the network it was made
    of before it is written.
    """

    model: str = flag("folder of the model, a network of random or given signs")
    output: str = flag("file to write, whole or not at all", short="-o")
    rule: Literal["map", "ternary", "sample"] = flag(
        "weights: the most probable, 0 where they are undecided, or a draw", "map"
    )
    seed: int = flag("seed of the draw", 0)
    images: int = flag("training images to estimate on", 2560)
    data: str | None = flag("images to estimate on (default: what the model was trained on)", None)
    folder: str | None = flag("folder of the data (default: as in training, or DFLOW_DATA)", None)


@dataclass(kw_only=True)
class Generate(Machine):
    """Draw text, images or rows from a model. Seed and batch size fix the result on one kind of machine."""

    model: str = flag("folder of the model")
    n: int = flag(
        "how many samples (--n is its older name, which torchrun takes for one of its own)",
        1,
        long="--samples",
    )
    length: int | None = flag("symbols of each (default: the model's length)", None)
    seed: int = flag("seed of the draws", 0)
    batch_size: int = flag("samples drawn at a time", 100)
    prompt: str | None = flag("text that each sample begins with, for models that can continue one", None)
    format: Literal["text", "jsonl", "png", "npy", "csv"] | None = flag(
        "text (default), or jsonl: a JSON object a line; of images png (default), a grid, or npy, csv; of "
        "tables csv (default) or npy",
        None,
    )
    output: str | None = flag(
        "file to write, whole or not at all (default: standard output; of images samples.FORMAT)",
        None,
        short="-o",
    )


@dataclass(kw_only=True)
class Compare(Source, Machine, Results):
    """Bits, network calls and speed of several models, with ratios to the LSTM among them.

    With --codec: what classical codecs, and models given by --model, make of pictures or texts: bytes, bits,
    time.
    """

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders of the models; with --codec pictures, .npy arrays or texts (or --data)",
            "positional": True,
        },
    )
    codec: bool = flag("compare codecs on files", False)
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
    batch_size: int = flag("samples drawn together where characters a second are measured", 100)
    rounds: int | None = flag("rounds of measuring (default: 10, of codecs 3)", None)
    output: str | None = flag(
        "folder for compare.md, compare.json and compare.png; of codecs codecs.md and codecs.json",
        None,
        short="-o",
    )


@dataclass(kw_only=True)
class PlotDensity(Machine, Results):
    """Density p(v) and dequantized data q(v) of a model of two dimensions, as pictures side by side."""

    model: str = flag("folder of the model")
    output: str = flag("PNG file to write, whole or not at all", "density.png", short="-o")
    cells: int = flag("points of the plot a side", 400)


@dataclass(kw_only=True)
class PlotCoverage(Source, Machine, Results):
    """Error of an ensemble of drawn networks on the share of the data where its members agree most."""

    model: str = flag("folder of the model, a network of random signs")
    output: str = flag("PNG file to write, whole or not at all", "coverage.png", short="-o")
    members: int = flag("networks of the ensemble", 16)
    seed: int = flag("seed of their draws", 0)


@dataclass(kw_only=True)
class Compress(Results):
    """Compress pictures by a flow, integer or dequantized, or any files by a model of text, without loss.

    Every value of a picture or an array (.npy of uint8 or uint16) comes back; ICC profiles, EXIF data and the
    bytes of the original file do not. A picture comes back as PNG. By a model of text every byte comes back.

    By a dequantized flow (local bits-back) the first pictures need auxiliary bits: those of a file that comes
    back with the pictures, or else random ones, which make a file of few pictures larger than they are.
    """

    files: list[str] = field(
        metadata={
            "help": "pictures or .npy arrays; for a model of text files of any kind",
            "positional": True,
        }
    )
    output: str = flag("file to write, whole or not at all; with --separate a folder", short="-o")
    model: str = flag("folder of the model")
    mode: Literal["float64", "fixed", "float32"] = flag(
        "numbers that the networks compute in: float64; fixed, integers, the same on every machine; float32, "
        "fastest, decodes on this machine only",
        "float64",
    )
    separate: bool = flag("a file for each", False)
    tiles: int | None = flag(
        "tiles of a segment, which is coded by itself (default: those of 2^19 values)", None
    )
    no_verify: bool = flag("do not decode and compare before writing", False)
    auxiliary: str | None = flag(
        "of a dequantized flow: file whose bits to lend; it is stored too and comes back (default: random)",
        None,
    )
    allow_larger: bool = flag("of a dequantized flow: also where the result is larger than the values", False)
    grid: int | None = flag("of a dequantized flow: latents on multiples of 2^-GRID (default: 18)", None)
    sigma: int | None = flag("of a dequantized flow: local deviations of 2^-SIGMA (default: 14)", None)
    noise: int | None = flag("of a dequantized flow: bits of noise a dimension (default: 12)", None)
    batch_size: int = flag("tiles, or chunks of a text, that the networks see at a time", 64)
    threads: int | None = flag("threads of torch on the CPU (default: one a processor)", None)


@dataclass(kw_only=True)
class Decompress(Results):
    """Give back what was compressed, or with --levels coarse pictures from a beginning of the file."""

    files: list[str] = field(metadata={"help": ".dfl files", "positional": True})
    output: str = flag("folder to write into; nothing in it is replaced", short="-o")
    model: str = flag("folder of the model that compressed them")
    levels: int | None = flag("levels to use, the coarsest first; the file may be cut off behind them", None)
    limit: int = flag("values, or bytes of text, that a file may declare", 1 << 28)
    batch_size: int = flag("tiles that the networks see at a time", 64)
    threads: int | None = flag("threads of torch on the CPU (default: one a processor)", None)


@dataclass(kw_only=True)
class Info(Results):
    """What is in a .dfl file: model, mode, files, bytes and bits of each level. Needs no model."""

    file: str = argument(".dfl file")


@dataclass(kw_only=True)
class Check(Results):
    """Say whether a model folder is whole: every file as it was saved, and a model that loads."""

    model: str = argument("folder of the model")


@dataclass(kw_only=True)
class PlotProgressive(Results):
    """Pictures of a .dfl file as they are seen after each level, with their share of the file and PSNR."""

    file: str = argument(".dfl file")
    model: str = flag("folder of the model that compressed it")
    output: str = flag("PNG file to write, whole or not at all", "progressive.png", short="-o")
    rows: int = flag("pictures to show, the first ones", 6)
    threads: int | None = flag("threads of torch on the CPU (default: one a processor)", None)


@dataclass(kw_only=True)
class PlotTraining(Results):
    """What the validation data cost while models were trained, by steps and by minutes."""

    runs: list[str] = field(metadata={"help": "folders of the models", "positional": True})
    output: str = flag("PNG file to write, whole or not at all", "training.png", short="-o")


@dataclass(kw_only=True)
class DataList(Results):
    """The texts and images known by name, and which are there."""

    folder: str | None = flag("folder of the data (default: DFLOW_DATA)", None)


@dataclass(kw_only=True)
class DataPrepare(Results):
    """Fetch a text or a set of images into the folder, unless it is there, and check it."""

    name: str = argument("name of the set")
    folder: str | None = flag("folder of the data (default: DFLOW_DATA)", None)


@dataclass(kw_only=True)
class DataCheck(Results):
    """Check the files of a text or a set of images against their known sizes and checksums."""

    name: str = argument("name of the set")
    folder: str | None = flag("folder of the data (default: DFLOW_DATA)", None)


# -- verbs -----------------------------------------------------------------------------------------------


def train(flags: Train) -> int:
    """`dflow train`; asked by a scheduler to make room it ends with 0, so that it may be queued again."""
    from dflow.train import Preempted
    from dflow.train import train as run

    set_threads(flags.threads)
    recipe = recipe_to_train(flags)
    try:
        run(recipe, resume=flags.resume)
    except Preempted as stop:
        say_once(str(stop))
    return 0


def recipe_to_train(flags: Train) -> Recipe:
    """The recipe that the flags of `dflow train` name; --resume never begins what was not asked for."""
    from dflow.train import STATE, load_recipe, resume_command, resumed_recipe

    path = Path(flags.recipe)
    if path.is_dir():
        if not flags.resume:
            raise InputError(
                f"{path}: a folder; name a recipe, or go on with the training in it: {resume_command(path)}"
            )
        if flags.output is not None:
            raise InputError(f"--output {flags.output}: the training in {path} stays there; leave it out")
        return resumed_recipe(path, flags.set)
    if flags.resume and not path.exists():
        raise InputError(f"{path}: neither the folder of a training nor a recipe; name one of these")
    recipe = load_recipe(path, flags.set, flags.output)
    if flags.output is not None:
        recipe = dataclasses.replace(recipe, output=Path(flags.output))
    empty = not recipe.output.exists() or (recipe.output.is_dir() and not any(recipe.output.iterdir()))
    if not (flags.resume and empty):
        return recipe
    if flags.output is None and not any(word.startswith("output=") for word in flags.set):
        # Whoever trained into another folder would train from the beginning, into this one.
        named = path.parent if (path.parent / STATE).is_file() else Path("FOLDER")
        raise InputError(
            f"{recipe.output}: nothing to resume; go on with a training by its folder: "
            f"{resume_command(named)}, or leave out --resume to begin one"
        )
    say_once(f"{recipe.output}: nothing to resume yet; a new training begins")
    return recipe


def evaluate(flags: Evaluate) -> int:
    """`dflow evaluate`; under ``accelerate launch`` the chunks are spread over the processes."""
    from dflow.data import Draws, load
    from dflow.evaluate import evaluate as run
    from dflow.evaluate import evaluate_law
    from dflow.hf import DflowClassifier, DflowImageModel, kind_of

    if kind_of(flags.model) is DflowClassifier:
        return evaluate_classifier(flags)
    device, accelerator = flags.processes()
    if kind_of(flags.model) is DflowImageModel:
        return evaluate_pictures(flags, device, accelerator)
    for name in ("draws", "precision", "seed"):
        if getattr(flags, name) is not None:
            raise InputError(f"--{name} is for models of images or tables; {flags.model} is one of text")
    model, tokenizer = load_model(flags.model, device)
    corpus = load(flags.config(flags.model, model), tokenizer)
    split = flags.part(corpus, flags.model)
    text = corpus.split(split)
    options: dict[str, Any] = {"progress": True, "limit": flags.limit, "accelerator": accelerator}
    if flags.batch_size is not None:
        options["batch_size"] = flags.batch_size
    result: Evaluation | LawEvaluation
    if isinstance(text, Draws):
        result = evaluate_law(model, text, **options)
        rows = law_rows(result, corpus)
    else:
        result = run(model, text, **options)
        rows = [
            ("text", f"{corpus.name}, {split}"),
            ("protocol", result.protocol),
            ("characters scored", f"{result.num_characters:,}{left_out(result, flags.limit)}"),
            ("symbols scored", f"{result.num_symbols:,} in {result.num_chunks:,} chunks"),
            ("bits a character", f"{result.bpc:.4f}"),
            ("standard error", told(result.standard_error)),
            ("kind", result.kind),
        ]
    checked = "draws" if isinstance(text, Draws) else "chunks"
    rows = [("model", flags.model), *rows, ("round trip", verdict(result, checked))]
    rows += data_rows(flags, corpus, split)
    if accelerator is None or accelerator.is_main_process:
        about = {"model": flags.model, "data": corpus.name, "split": split, "checksum": corpus.checksum}
        flags.show(about | dataclasses.asdict(result), rows, last_line=True)
    if accelerator is not None:
        accelerator.end_training()
    if result.round_trip is False:
        complain(f"{flags.model}: the round trip failed; the figures above do not describe what it draws")
        return 1
    return 0


def left_out(result: Evaluation, limit: int | None) -> str:
    """How many characters of a text are not scored, and why."""
    if not result.num_left:
        return ", all of them"
    reason = (
        "behind the last whole chunk" if "chunks" in result.protocol else "in sentences that are too long"
    )
    return f"; {result.num_left:,} left out, {reason if limit is None else 'beyond the limit'}"


def data_rows(flags: Evaluate, data: Corpus | ImageSet, split: str) -> list[tuple[str, str]]:
    """Lines of the table on what the model was trained on, and on how the data were read."""
    from dflow.data import dealt
    from dflow.hf import split_calls

    kept = dealt.read(split_calls(flags.model)[0])
    rows = []
    if kept is not None:
        [train, *_] = dealt.lines(kept)
        rows.append(("trained on", f"{kept['name']}, {train.strip()}"))
    if split == "all" and flags.trained_on(data, flags.model):
        rows.append(("note", "all splits are scored, also what the model was trained on"))
    return rows + [("note", note) for note in data.notes]


def evaluate_classifier(flags: Evaluate) -> int:
    """`dflow evaluate` of a classifier, on one process."""
    from dflow.data import load_images
    from dflow.evaluate import evaluate_labels
    from dflow.hf import DflowClassifier, load

    for name in ("draws", "precision"):
        if getattr(flags, name) is not None:
            raise InputError(f"--{name} is for models of images or tables; {flags.model} is a classifier")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a classifier is evaluated by one process; run dflow without a launcher")
    model = load(flags.model, flags.settle(), DflowClassifier)
    images = load_images(flags.images(flags.model))
    split = flags.part(images, flags.model)
    options: dict[str, Any] = {
        n: getattr(flags, n) for n in ("batch_size", "seed") if getattr(flags, n) is not None
    }
    result = evaluate_labels(
        model, images.split(split), images.train, limit=flags.limit, progress=True, **options
    )
    about = {"model": flags.model, "data": images.name, "split": split, "checksum": images.checksum}
    flags.show(
        about | dataclasses.asdict(result),
        [
            ("model", flags.model),
            ("data", f"{images.name}, {split}: {result.num_rows:,} images"),
            ("estimated on", f"{result.num_estimated:,} training images"),
        ],
        [
            ("network", "accuracy %", "standard error", "nll (nats)", "ece %"),
            *(
                (
                    s.name,
                    f"{100 * s.accuracy:.2f}",
                    f"{100 * s.accuracy_error:.2f}",
                    f"{s.nll:.4f}",
                    f"{100 * s.ece:.2f}",
                )
                for s in result.scores
            ),
        ],
        last_line=True,
    )
    return 0


def export(flags: Export) -> int:
    """`dflow export`."""
    import torch

    from dflow.data import load_images
    from dflow.generate import check_output, write_whole
    from dflow.hf import DflowClassifier, agrees, load, pack

    output = Path(flags.output)
    check_output(output)
    if flags.images < 2:
        raise InputError(f"--images {flags.images} must be at least 2")
    model = load(flags.model, flags.settle(), DflowClassifier)
    images = load_images(Source(data=flags.data, folder=flags.folder).images(flags.model))
    x = images.train.subset(flags.images).rows(slice(None)).to(model.device)
    generator = torch.Generator().manual_seed(flags.seed)
    net = model.binarized(x, flags.rule, generator)
    program = pack(net, flags.rule)
    if not agrees(program, net, x[:_COMPARED]):
        complain(
            f"{flags.model}: the exported network differs from the one it was made of; nothing is written"
        )
        return 1
    content = program.to_bytes()
    write_whole(output, content)
    small, whole = (4 * program.num_weights / size for size in (program.num_bytes, len(content)))
    about = {
        "file": flags.output,
        "rule": flags.rule,
        "weights": program.num_weights,
        "bytes": len(content),
        "bytes_of_weights": program.num_bytes,
        "compared_images": min(len(x), _COMPARED),
    }
    flags.show(
        about,
        [
            ("file", flags.output),
            ("weights", f"{program.num_weights:,}, {flags.rule}"),
            ("bytes", f"{len(content):,}, of these {program.num_bytes:,} of weights and thresholds"),
            ("smaller than float32", f"{small:.1f} times, {whole:.1f} with the header"),
            ("compared", f"every sum of {min(len(x), _COMPARED)} images"),
        ],
    )
    return 0


#: Images on which an exported network is compared with the one it was made of.
_COMPARED = 256


def plot_output(name: str) -> Path:
    """Where a plot goes, if nothing is there."""
    from dflow.generate import check_output

    output = Path(name)
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {name}: plots are PNG files; let the name end with .png")
    check_output(output)
    return output


def plot_coverage(flags: PlotCoverage) -> int:
    """`dflow plot coverage`."""
    from dflow import plot
    from dflow.data import load_images
    from dflow.evaluate import evaluate_labels
    from dflow.generate import write_whole
    from dflow.hf import DflowClassifier, load

    output = plot_output(flags.output)
    if flags.members < 2:
        raise InputError(f"--members {flags.members} must be at least 2")
    model = load(flags.model, flags.settle(), DflowClassifier)
    images = load_images(flags.images(flags.model))
    result = evaluate_labels(
        model,
        images.split(flags.part(images, flags.model)),
        images.train,
        ensembles=(flags.members,),
        limit=flags.limit,
        seed=flags.seed,
        progress=True,
    )
    if result.coverage is None:
        raise InputError(f"{flags.model}: no weight is random, and so no ensemble; train kind probabilistic")
    propagated, binarized, ensemble = result.scores
    write_whole(
        output,
        plot.coverage(result.coverage, {s.name: 1 - s.accuracy for s in (propagated, binarized, ensemble)}),
    )
    return show_file(flags, output)


def evaluate_pictures(flags: Evaluate, device: torch.device, accelerator: Accelerator | None) -> int:
    """`dflow evaluate` of a model of images or a table."""
    import torch

    from dflow.data import load_images
    from dflow.evaluate import check_data, evaluate_exact, evaluate_images
    from dflow.hf import DflowImageModel, load

    model = load(flags.model, device, DflowImageModel)
    names = ["batch_size"]
    if not model.exact:
        names += ["draws", "seed"]
    elif flags.draws is not None or flags.seed is not None:
        raise InputError(f"--draws and --seed are for bounds; {flags.model} has an exact likelihood")
    images = load_images(flags.images(flags.model), partial=True)
    check_data(model, images)
    split = flags.part(images, flags.model)
    options: dict[str, Any] = {n: getattr(flags, n) for n in names if getattr(flags, n) is not None}
    if flags.precision is not None:
        options["precision"] = getattr(torch, flags.precision)
    options |= {"unit": images.unit, "limit": flags.limit, "progress": True, "accelerator": accelerator}
    result: ExactEvaluation | ImageEvaluation
    if model.exact:
        result = evaluate_exact(model, images.split(split), **options)
        rows, sound = exact_rows(result, images.name, split), result.round_trip is not False
        wrong = "the round trip failed; the figures above do not describe what it draws"
    else:
        result = evaluate_images(model, images.split(split), **options)
        rows, sound = image_rows(result, images.name, split), result.intact
        wrong = "a draw left the cell of its datum; the figures above do not hold"
    if accelerator is None or accelerator.is_main_process:
        about = {"model": flags.model, "data": images.name, "split": split, "checksum": images.checksum}
        flags.show(
            about | dataclasses.asdict(result),
            [("model", flags.model), *rows, *data_rows(flags, images, split)],
            last_line=True,
        )
    if accelerator is not None:
        accelerator.end_training()
    if not sound:
        complain(f"{flags.model}: {wrong}")
        return 1
    return 0


def verdict(result: Evaluation | LawEvaluation | ExactEvaluation, checked: str) -> str:
    """What the round trip came to, in words."""
    if result.round_trip is None:
        return "not checked: the law has no steps (see dflow.distributions.Stepwise)"
    return f"{'intact' if result.round_trip else 'FAILED'} on {result.num_checked} {checked}"


def exact_rows(result: ExactEvaluation, name: str, split: str) -> list[tuple[str, str]]:
    """Lines of the table for images under an exact likelihood."""
    return [
        ("data", f"{name}, {split}: {result.num_rows:,} rows"),
        ("unit", result.unit),
        ("nll", f"{told(result.nll)} (standard error {told(result.nll_error)})"),
        ("kind", f"{result.kind}, {result.precision}"),
        ("round trip", verdict(result, "rows")),
    ]


def image_rows(result: ImageEvaluation, name: str, split: str) -> list[tuple[str, str]]:
    """Lines of the table for images."""
    few = result.ess < _FEW_DRAWS < result.draws
    rows = [
        ("data", f"{name}, {split}: {result.num_rows:,} rows"),
        ("unit", result.unit),
        ("vi", f"{told(result.vi)} (standard error {told(result.vi_error)})"),
        ("nll", f"{told(result.nll)} (standard error {told(result.nll_error)})"),
        ("KL(q, p)", told(result.kl)),
        ("effective draws", f"{result.ess:.1f} of {result.draws:,}" + ", few: nll may lie too low" * few),
        ("kind", f"{result.kind}, {result.precision}"),
    ]
    if result.exact is not None:
        rows.insert(5, ("exact", told(result.exact)))
    return [*rows, ("cells", "intact" if result.intact else "FAILED")]


#: Effective draws under which an importance-weighted bound hangs on the luck of a few.
_FEW_DRAWS = 10


def told(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def law_rows(result: LawEvaluation, corpus: Corpus) -> list[tuple[str, str]]:
    """Lines of the table for a law."""
    exact = result.kind == "exact"
    scored = "all {:,} outcomes, weighted" if exact else "{:,} draws that no training has seen"
    return [
        ("law", f"{corpus.name}: {corpus.law!r}"),
        ("scored", scored.format(result.num_sequences)),
        ("nats a sequence", told(result.nats)),
        ("bits an entry", told(result.bits)),
        ("standard error", "0 (exact)" if exact else f"{told(result.standard_error)} nats"),
        ("entropy", f"{told(result.entropy)} nats"),
        ("gap (KL)", f"{told(result.gap)} nats"),
        ("independent entries", f"{told(result.factorized)} nats"),
        ("uniform", f"{told(result.uniform)} nats"),
        ("kind", result.kind),
    ]


def generate(flags: Generate) -> int:
    """`dflow generate`; under ``accelerate launch`` the batches are spread over the processes."""
    from dflow.generate import check_output, write
    from dflow.generate import generate as run
    from dflow.hf import DflowClassifier, DflowImageModel, kind_of

    if kind_of(flags.model) is DflowClassifier:
        raise InputError(f"{flags.model}: a model of labels, which draws nothing; give one of text or images")
    if kind_of(flags.model) is DflowImageModel:
        return generate_pictures(flags)
    if flags.format not in (None, "text", "jsonl"):
        raise InputError(f"--format {flags.format}: this is a model of text; use text or jsonl")
    output = None if flags.output is None else Path(flags.output)
    if output is not None:
        check_output(output)
    device, accelerator = flags.processes()
    model, tokenizer = load_model(flags.model, device)
    prompt = None
    if flags.prompt is not None:
        try:
            prompt = tokenizer.encode(flags.prompt)
        except InputError as error:
            raise InputError(f"--prompt: {error}") from None
    samples = run(
        model,
        flags.n,
        length=flags.length,
        seed=flags.seed,
        batch_size=flags.batch_size,
        prompt=prompt,
        progress=output is not None or not sys.stdout.isatty(),
        accelerator=accelerator,
    )
    if accelerator is None or accelerator.is_main_process:
        write(samples, tokenizer, flags.format or "text", output)
    else:
        collections.deque(samples, 0)
    if accelerator is not None:
        accelerator.end_training()
    return 0


def _format_of(
    output: str | None, asked: Literal["png", "npy", "csv"] | None
) -> Literal["png", "npy", "csv"] | None:
    """The format that is asked for, or that the name of a file tells of."""
    if output is None:
        return asked
    known: dict[str, Literal["png", "npy", "csv"]] = {".png": "png", ".npy": "npy", ".csv": "csv"}
    told = known.get(Path(output).suffix.lower())
    if (told is None and asked is None) or (told and asked and told != asked):
        raise InputError(
            f"--output {output}: no name of a file of format {asked or 'png, npy or csv'}; let it end with "
            f".{asked or 'png, .npy or .csv, or give --format'}"
        )
    return asked or told


def generate_pictures(flags: Generate) -> int:
    """`dflow generate` of a model of images or a table."""
    from dflow import generate as drawing
    from dflow.hf import DflowImageModel, load

    for name in ("length", "prompt"):
        if getattr(flags, name) is not None:
            raise InputError(f"--{name} is for models of text; {flags.model} is one of images or tables")
    if flags.format == "text" or flags.format == "jsonl":
        raise InputError(f"--format {flags.format}: this is a model of images or tables; use png, npy or csv")
    device, accelerator = flags.processes()
    model = load(flags.model, device, DflowImageModel)
    pictures = drawing.is_picture(model.config.shape)
    kind = _format_of(flags.output, flags.format) or ("png" if pictures else "csv")
    if kind == "png" and not pictures:
        raise InputError(f"--format png: {flags.model} draws no pictures; use csv or npy")
    output = Path(flags.output or f"samples.{kind}")
    drawing.check_output(output)
    x = drawing.generate_images(
        model,
        flags.n,
        seed=flags.seed,
        batch_size=flags.batch_size,
        progress=True,
        accelerator=accelerator,
    )
    if accelerator is None or accelerator.is_main_process:
        levels, real = set(model.config.levels), [r is None for r in model.config.settings().ranges]
        most = max(levels) if None not in levels else None
        data = drawing.encode_images(x, kind, most, model.config.columns, real)
        drawing.write_whole(output, data)
        print(output)
    if accelerator is not None:
        accelerator.end_training()
    return 0


def plot_density(flags: PlotDensity) -> int:
    """`dflow plot density`."""
    from dflow import plot
    from dflow.data import load_images
    from dflow.generate import write_whole
    from dflow.hf import DflowImageModel, load

    output = plot_output(flags.output)
    model = load(flags.model, flags.settle(), DflowImageModel)
    data = load_images(Source().images(flags.model)).train
    write_whole(output, plot.density(model, data, flags.cells))
    return show_file(flags, output)


def compare(flags: Compare) -> int:
    """`dflow compare`."""
    from dflow import compare as comparing
    from dflow.data import load

    if flags.codec:
        return compare_codecs(flags)
    for name in ("model", "mode", "each", "together", "memory"):
        if getattr(flags, name):
            raise InputError(f"--{name} goes with --codec; models are named without it")
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
        batch_size=flags.batch_size,
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


def compress(flags: Compress) -> int:
    """`dflow compress`."""
    from dflow.generate import check_output
    from dflow.hf import DflowClassifier, DflowImageModel, kind_of

    set_threads(flags.threads)
    files, output = [Path(name) for name in flags.files], Path(flags.output)
    if folder := next((file for file in files if file.is_dir()), None):
        raise InputError(f"{folder}: a folder; name the files in it, for example {folder / '*'}")
    if kind_of(flags.model) is DflowClassifier:
        raise InputError(f"{flags.model}: a model of labels, which codes nothing; give one of text or images")
    is_text = kind_of(flags.model) is not DflowImageModel
    jobs = [(output, files)]
    if flags.separate:
        make_folder(output)
        stems = [file.stem for file in files]
        names = [file.name if is_text or stems.count(file.stem) > 1 else file.stem for file in files]
        jobs = [(output / f"{name}.dfl", [file]) for name, file in zip(names, files, strict=True)]
        check_distinct(files, [target for target, _ in jobs], "be written to")
    for target, _ in jobs:
        check_output(target)
    return compress_files(flags, jobs) if is_text else compress_pictures(flags, jobs)


def compress_pictures(flags: Compress, jobs: list[tuple[Path, list[Path]]]) -> int:
    """`dflow compress` by a model of images."""
    from dflow.compress import LIMIT, BitsBackCoder, ImageCoder, compress_images
    from dflow.generate import write_whole

    coder = tuned(ImageCoder.load(flags.model, flags.mode, flags.batch_size), flags)
    reports, notes = [], list[str]()
    for target, group in jobs:
        data, report = compress_images(
            group, coder, tiles=flags.tiles, verify=not flags.no_verify, progress=True
        )
        write_whole(target, data)
        reports.append(report)
        notes += report.lines
        if report.declared > LIMIT:
            notes.append(f"{target}: to decompress it takes --limit {report.declared}")
    total, values = sum(r.bytes for r in reports), sum(r.values for r in reports)
    encode, network = sum(r.encode.total for r in reports), sum(r.encode.network for r in reports)
    given, random = sum(r.given for r in reports), sum(r.random for r in reports)
    net = total - given - random
    show_notes(flags, notes)
    about: dict[str, Any] = {
        "outputs": [str(target) for target, _ in jobs],
        "files": sum(len(group) for _, group in jobs),
        "bytes": total,
        "header_bytes": sum(r.header for r in reports),
        "values": values,
        "bits_a_dimension": 8 * total / values,
        "random_bytes": random,
        "given_bytes": given,
        "segments": sum(r.segments for r in reports),
        "raw_segments": sum(r.raw for r in reports),
        "seconds": encode,
        "network_seconds": network,
        "verified": not flags.no_verify,
        "notes": notes,
    }
    flags.show(
        about,
        [
            ("files", f"{about['files']:,} in {len(jobs):,}"),
            ("bytes", f"{total:,}, of these {sum(r.header for r in reports):,} of headers"),
            ("bits a dimension", f"{8 * total / values:.4f} of {values:,}"),
            *[
                ("auxiliary", f"{random:,} random bytes, {given:,} that come back"),
                ("net", f"{net:,} bytes, {8 * net / values:.4f} bits a dimension"),
            ]
            * isinstance(coder, BitsBackCoder),
            (
                "segments",
                f"{sum(r.segments for r in reports):,}, {sum(r.raw for r in reports):,} of them raw",
            ),
            ("encoded in", f"{encode:.2f} s, networks {network:.2f}, coder {encode - network:.2f}"),
            ("verified", "no (--no-verify)" if flags.no_verify else "decoded and compared"),
        ],
    )
    return 0


def check_distinct(files: Sequence[Path], names: Sequence[object], would: str) -> None:
    """`InputError` for two of the files that ``would`` (be written to, come back as) one of the names."""
    first: dict[object, Path] = {}
    for file, name in zip(files, names, strict=True):
        if name in first:
            raise InputError(
                f"{first[name]} and {file} would both {would} {name}; rename one, or compress them by two "
                "commands, each with an --output of its own"
            )
        first[name] = file


def show_notes(flags: Results, notes: Sequence[str]) -> None:
    """A line each, where they are not part of a JSON document."""
    if not flags.json:
        for note in notes:
            print(note)


def tuned(coder: ImageCoder, flags: Compress) -> ImageCoder:
    """``coder`` as the flags of bits-back ask for it."""
    from dflow.compress import BitsBackCoder
    from dflow.compress.pixels import check_name

    asked = {name: getattr(flags, name) for name in ("grid", "sigma", "noise")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not isinstance(coder, BitsBackCoder):
        check_no_bits_back(flags, "an integer flow")
        return coder
    try:
        settings = dataclasses.replace(coder.settings, **asked)
    except ValueError as error:
        raise InputError(str(error)) from None
    lend = None
    if flags.auxiliary is not None:
        path = Path(flags.auxiliary)
        if wrong := check_name(path.name):
            raise InputError(f"{str(path)!r}: its name {wrong}; rename the file")
        lend = (path.name, path.read_bytes())
        if flags.separate:
            raise InputError("--auxiliary lends to one file; leave out --separate")
    return dataclasses.replace(coder, settings=settings, lend=lend, larger=flags.allow_larger)


def check_no_bits_back(flags: Compress, what: str) -> None:
    """`InputError` for a flag of dequantized flows."""
    for name in ("auxiliary", "allow_larger", "grid", "sigma", "noise"):
        if getattr(flags, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} is for dequantized flows; {flags.model} is {what}")


def compress_files(flags: Compress, jobs: list[tuple[Path, list[Path]]]) -> int:
    """`dflow compress` by a model of text."""
    from dflow.compress import TextCoder, compress_text
    from dflow.generate import write_whole

    if flags.mode != "float64" or flags.tiles is not None:
        what = "--tiles" if flags.tiles is not None else f"--mode {flags.mode}"
        raise InputError(f"{what} is for models of images; {flags.model} is one of text")
    check_no_bits_back(flags, "one of text")
    for _, group in jobs:
        check_distinct(group, [file.name for file in group], "come back as")
    coder, reports, notes = TextCoder.load(flags.model), [], list[str]()
    for target, group in jobs:
        data, report = compress_text(
            {file.name: file.read_bytes() for file in group},
            coder,
            batch=flags.batch_size,
            verify=not flags.no_verify,
            progress=True,
        )
        write_whole(target, data)
        reports.append(report)
        notes += [f"{target}: {note}" for note in report.notes]
    total, raw = sum(r.bytes for r in reports), sum(r.raw for r in reports)
    encode, network = sum(r.encode.total for r in reports), sum(r.encode.network for r in reports)
    show_notes(flags, notes)
    about = {
        "outputs": [str(target) for target, _ in jobs],
        "files": sum(r.files for r in reports),
        "bytes": total,
        "header_bytes": sum(r.header for r in reports),
        "raw_bytes": raw,
        "bits_a_byte": 8 * total / raw if raw else None,
        "symbols": sum(r.symbols for r in reports),
        "seconds": encode,
        "network_seconds": network,
        "verified": not flags.no_verify,
        "notes": notes,
    }
    flags.show(
        about,
        [
            ("files", f"{sum(r.files for r in reports):,} in {len(jobs):,}"),
            ("bytes", f"{total:,}, of these {sum(r.header for r in reports):,} of headers"),
            ("bits a byte", f"{8 * total / raw:.4f} of {raw:,}" if raw else "none: nothing in them"),
            ("symbols", f"{sum(r.symbols for r in reports):,}"),
            ("encoded in", f"{encode:.2f} s, networks {network:.2f}, coder {encode - network:.2f}"),
            ("verified", "no (--no-verify)" if flags.no_verify else "decoded and compared"),
        ],
    )
    return 0


def decompress(flags: Decompress) -> int:
    """`dflow decompress`."""
    from dflow.coding.container import TEXT, kind_of
    from dflow.compress import decompress_images, decompress_text
    from dflow.compress.pixels import write
    from dflow.generate import check_output, write_whole

    set_threads(flags.threads)
    folder = Path(flags.output)
    make_folder(folder)
    written: list[str] = []

    def keep(file: str, content: bytes) -> None:
        # Once more: a folder may take two names for one.
        check_output(folder / file)
        write_whole(folder / file, content)
        written.append(str(folder / file))
        if not flags.json:
            print(folder / file)

    for name in flags.files:
        data = Path(name).read_bytes()
        if kind_of(data) == TEXT:
            if flags.levels is not None:
                raise InputError(f"--levels is for pictures; {name} holds text")
            files = decompress_text(data, flags.model, name=name, limit=flags.limit, progress=True)
            for file in files:
                check_output(folder / file)
            for file, content in files.items():
                keep(file, content)
            continue
        lent: dict[str, bytes] = {}
        pictures = decompress_images(
            data,
            flags.model,
            name=name,
            levels=flags.levels,
            limit=flags.limit,
            batch=flags.batch_size,
            progress=True,
            lent=lent,
        )
        for file in (*(picture.form.file for picture in pictures), *lent):
            check_output(folder / file)
        for file, content in lent.items():
            keep(file, content)
        for picture in pictures:
            keep(picture.form.file, write(picture))
    flags.end({"files": written})
    return 0


def info(flags: Info) -> int:
    """`dflow info`."""
    from dflow.coding.container import TEXT, kind_of
    from dflow.compress import describe_images, describe_text

    data = Path(flags.file).read_bytes()
    rows = (describe_text if kind_of(data) == TEXT else describe_images)(data, flags.file)
    # Two files may be called as a line of the table is, so the lines are pairs.
    flags.show({"file": flags.file, "rows": rows}, rows)
    return 0


def check(flags: Check) -> int:
    """`dflow check`; exit code 1 where a file is damaged or missing, or the model cannot be loaded."""
    from dflow import hf
    from dflow.hf import kind_of

    kind = kind_of(flags.model)
    folder, _ = hf.split_calls(flags.model)
    found = hf.check(folder)
    if not flags.json:
        print_table(table_of(found))
    wrong = [f"{f.name} {f.status}" for f in found if f.status in ("damaged", "missing")]
    try:
        needed = {"config.json", *(file.name for file in hf.weight_files(folder))}
        hf.load(flags.model, kind=kind)  # type: ignore[type-var]
    except InputError as error:
        wrong.append(str(error))
    files = [dataclasses.asdict(f) for f in found]
    flags.end({"model": flags.model, "whole": not wrong, "wrong": wrong, "files": files})
    if wrong:
        complain(f"{flags.model}: not whole: " + "; ".join(wrong))
        return 1
    unlisted = sorted(needed & {f.name for f in found if f.status == "unlisted"})
    if flags.json:
        return 0
    if unlisted:
        print(
            f"{flags.model}: the model loads; that {', '.join(unlisted)} are as they were saved cannot be "
            f"checked, since no {hf.MANIFEST} lists them"
        )
    else:
        print(f"{flags.model}: whole; the model loads")
    return 0


def plot_training(flags: PlotTraining) -> int:
    """`dflow plot training`."""
    from dflow import plot
    from dflow.generate import write_whole
    from dflow.train import history

    output = plot_output(flags.output)
    runs = {folder: history(folder) for folder in flags.runs}
    # Trainings of version 0.1.0 did not note their unit: plain "bits".
    units = {run.unit: folder for folder, run in runs.items() if run.unit != "bits"}
    if len(units) > 1:
        raise InputError("; ".join(f"{f} is measured in {u}" for u, f in units.items()) + ": plot them apart")
    data = plot.training({folder: run.rows for folder, run in runs.items()}, next(iter(units), "bits"))
    write_whole(output, data)
    return show_file(flags, output)


def plot_progressive(flags: PlotProgressive) -> int:
    """`dflow plot progressive`."""
    from dflow import plot
    from dflow.compress import stages
    from dflow.generate import write_whole

    set_threads(flags.threads)
    output = plot_output(flags.output)
    if flags.rows < 1:
        raise InputError(f"--rows {flags.rows} must be at least 1")
    found = stages(Path(flags.file).read_bytes(), flags.model, name=flags.file, progress=True)
    names = [picture.form.file for picture in found[0].pictures][: flags.rows]
    write_whole(
        output,
        plot.progressive(
            names,
            [[stage.pictures[i].preview() for stage in found] for i in range(len(names))],
            [stage.share for stage in found],
            [[stage.psnr[i] for stage in found] for i in range(len(names))],
        ),
    )
    return show_file(flags, output)


def make_folder(folder: Path) -> None:
    """A folder to write into, made if its own folder is there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file; name a folder")
    if not folder.exists():
        if not folder.parent.is_dir():
            raise InputError(f"{folder}: the folder {folder.parent} does not exist; create it")
        folder.mkdir()


def compare_codecs(flags: Compare) -> int:
    """`dflow compare --codec`."""
    from dflow.compare import codecs, material
    from dflow.hf import DflowImageModel, kind_of, split_calls

    folder = None if flags.output is None else Path(flags.output)
    if folder is not None:
        codecs.check_folder(folder)
    flags.settle()
    if flags.models and flags.data is not None:
        raise InputError(f"files and --data {flags.data}: compress the ones or the other")
    if flags.data is not None:
        found = material.of_data(flags.data, flags.split or "test", flags.folder, flags.limit)
    else:
        found = material.of_files([Path(name) for name in flags.models], flags.limit)
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
    result = codecs.compare_codecs(
        found,
        models,
        each=flags.each or both,
        together=flags.together or both,
        rounds=3 if flags.rounds is None else flags.rounds,
        memory=flags.memory,
        progress=True,
    )
    paths = [] if folder is None else codecs.write(result, folder)
    if not flags.json:
        print(codecs.markdown(result))
        print_paths(paths)
    flags.end(json.loads(codecs.record(result)), last_line=True)
    failed = [row.name for row in result.rows if row.error and "FAILED" in row.error]
    if failed:
        complain(f"round trip failed: {', '.join(failed)}")
    return int(bool(failed))


def data_list(flags: DataList) -> int:
    """`dflow data list`."""
    from dflow.data import list_sets

    return show_records(flags, list_sets(flags.folder))


def data_prepare(flags: DataPrepare) -> int:
    """`dflow data prepare`."""
    from dflow.data import prepare

    return show_records(flags, prepare(flags.name, flags.folder))


def data_check(flags: DataCheck) -> int:
    """`dflow data check`."""
    from dflow.data import check

    return show_records(flags, check(flags.name, flags.folder))


#: Verb, flags, function, example.
VERBS: tuple[tuple[str, type[Any], Callable[[Any], int], str], ...] = (
    ("train", Train, train, "dflow train recipes/grouped.yaml --set train.minutes=3 --output runs/quick"),
    ("evaluate", Evaluate, evaluate, "dflow evaluate --model runs/grouped --data text8 --split test"),
    ("export", Export, export, "dflow export --model runs/binary/mnist_pbnet_s -o mnist.safetensors"),
    (
        "generate",
        Generate,
        generate,
        "dflow generate --model runs/grouped --samples 100 --seed 1 --output samples.txt",
    ),
    ("compare", Compare, compare, "dflow compare runs/grouped runs/lstm --output comparison"),
    ("compress", Compress, compress, "dflow compress *.png -o pictures.dfl --model runs/images/idf"),
    ("decompress", Decompress, decompress, "dflow decompress pictures.dfl -o back --model runs/images/idf"),
    ("check", Check, check, "dflow check runs/grouped"),
    ("info", Info, info, "dflow info pictures.dfl"),
    ("plot density", PlotDensity, plot_density, "dflow plot density --model runs/images/checkerboard"),
    ("plot coverage", PlotCoverage, plot_coverage, "dflow plot coverage --model runs/binary/mnist_pbnet_s"),
    (
        "plot progressive",
        PlotProgressive,
        plot_progressive,
        "dflow plot progressive pictures.dfl --model runs/images/idf -o levels.png",
    ),
    (
        "plot training",
        PlotTraining,
        plot_training,
        "dflow plot training runs/ptb/grouped16 runs/ptb/transformer -o curves.png",
    ),
    ("data list", DataList, data_list, "dflow data list --folder texts"),
    ("data prepare", DataPrepare, data_prepare, "dflow data prepare text8 --folder texts"),
    ("data check", DataCheck, data_check, "dflow data check ptb --folder texts"),
)


#: What the verbs of two words are about.
GROUPS = {
    "data": "texts and images: list, prepare, check",
    "plot": "pictures of a model: density, coverage, progressive, training",
}


# -- what verbs share ------------------------------------------------------------------------------------


def set_threads(threads: int | None) -> None:
    """Set the threads of torch: as given, else no more than processors; and keep memory between steps."""
    import torch

    from dflow.memory import keep_memory

    keep_memory()
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads {threads} must be at least 1")
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and processors() < torch.get_num_threads():
        torch.set_num_threads(processors())


def is_same(load: Callable[[Any], Any], trained: Any, fresh: Any) -> bool:
    """Whether ``fresh`` names what a model was trained on, moved to another place: by the checksum.

    Then its splits are those of the training, whatever their shares.
    """
    if trained.checksum is None or not (trained.is_path and fresh.is_path):
        return False
    try:
        load(dataclasses.replace(trained, name=fresh.name, folder=fresh.folder))
    except InputError:
        return False
    return True


def load_model(folder: str, device: torch.device) -> tuple[DflowModel, Tokenizer]:
    """The model and the tokenizer in ``folder``."""
    from dflow import hf
    from dflow.data import Tokenizer

    model = hf.load(folder, device)
    tokenizer = Tokenizer.load(hf.split_calls(folder)[0])
    if tokenizer.size != model.config.vocab_size:
        raise InputError(
            f"{folder}: the vocabulary has {tokenizer.size} symbols and the model {model.config.vocab_size}; "
            "restore both files from one run"
        )
    return model, tokenizer


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def table_of(records: Sequence[Any]) -> list[list[str]]:
    """Dataclasses of one kind, under the names of their fields."""
    names = [f.name for f in dataclasses.fields(records[0])]
    cells = [[getattr(record, name) for name in names] for record in records]
    return [names, *([f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in cells)]


def show_records(flags: Results, records: Sequence[Any]) -> int:
    """Print dataclasses of one kind as a table, or as a JSON list."""
    flags.show([dataclasses.asdict(record) for record in records], table_of(records))
    return 0


def show_file(flags: Results, output: Path) -> int:
    """Print which file was written."""
    flags.show({"file": str(output)}, [[str(output)]])
    return 0


def print_paths(paths: Sequence[Path]) -> None:
    """A line each."""
    for path in paths:
        print(path)


def finite(record: object) -> object:
    """``record`` with null for numbers that JSON lacks: infinite ones, and those that are none.

    >>> finite({"bits": [1.5, float("inf")]})
    {'bits': [1.5, None]}
    """
    if isinstance(record, float):
        return record if math.isfinite(record) else None
    if isinstance(record, dict):
        return {key: finite(value) for key, value in record.items()}
    return [finite(value) for value in record] if isinstance(record, (list, tuple)) else record


def complain(message: str) -> None:
    """One error on stderr."""
    remark(f"error: {message}")


def remark(message: str) -> None:
    """One line on stderr that is no error."""
    print(shown(message, sys.stderr), file=sys.stderr)


def say_once(message: str) -> None:
    """One line on stderr, by the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        remark(message)


class _Terminal(io.TextIOBase):
    """A terminal to which nothing is written that it would obey."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        self._stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return True


# -- flags -----------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """An argument for each field of ``cls``; values stay text, `read_flags` converts them."""
    hints = typing.get_type_hints(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.default is not dataclasses.MISSING):
        kind = hints[f.name]
        options: dict[str, Any] = {"help": f.metadata["help"].replace("%", "%%")}
        if typing.get_origin(kind) in (Union, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if f.metadata.get("positional"):
            required = f.default_factory is dataclasses.MISSING
            nargs: dict[str, Any] = {}
            if typing.get_origin(kind) is list:
                nargs = {"nargs": "+"} if required else {"nargs": "*", "default": argparse.SUPPRESS}
            parser.add_argument(f.name, metavar=f.name.upper(), **options, **nargs)
            continue
        name = options_of(f)
        if len(name) > 1:
            options["dest"] = f.name
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.default not in (None, dataclasses.MISSING) and kind is not bool:
            options["help"] += f" (default: {f.default})"
        if kind is bool:
            parser.add_argument(*name, action="store_const", const=True, default=argparse.SUPPRESS, **options)
        elif typing.get_origin(kind) is list:
            parser.add_argument(
                *name, nargs="+", action="extend", default=argparse.SUPPRESS, metavar="WORD", **options
            )
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(
                *name,
                metavar="|".join(typing.get_args(kind)),
                default=argparse.SUPPRESS,
                required=required,
                **options,
            )
        else:
            parser.add_argument(
                *name, metavar=f.name.upper(), default=argparse.SUPPRESS, required=required, **options
            )


#: Fields that name files.
_FILES = ("file", "files", "models", "output", "auxiliary")


def read_flags(cls: type[Any], values: dict[str, Any]) -> Any:
    """``cls`` from the texts given, each as the type of its field."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    converted = {}
    for name, value in values.items():
        options = [option for option in options_of(fields[name]) if option.startswith("--")]
        label = name if fields[name].metadata.get("positional") else " or ".join(options)
        converted[name] = convert(hints[name], value, label)
        if name in _FILES and "-" in (value if isinstance(value, list) else [value]):
            raise InputError(
                f"{label} -: neither standard input nor standard output can be named here; for a file that "
                "is called - write ./-"
            )
        if name == "seed" and converted[name] is not None and not 0 <= converted[name] < 1 << 63:
            raise InputError(f"seed {value} must be from 0 to {(1 << 63) - 1}")
    return cls(**converted)


class _Parser(argparse.ArgumentParser):
    """Says which flags may have taken what is missing."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        greedy = [a.option_strings[-1] for a in self._actions if a.option_strings and a.nargs == "+"]
        if "required" in message and greedy:
            message += f"; all words after {' or '.join(greedy)} belong to it, so give these before"
        super().error(shown(message, sys.stderr))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="dflow",
        description="Normalizing flows of discrete data: text in few network calls, dequantized images.",
        epilog="example: dflow train recipes/grouped.yaml",
    )
    parser.add_argument("--version", action="version", version=f"dflow {dflow.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    groups: dict[str, Any] = {}
    for verb, cls, function, example in VERBS:
        group, _, name = verb.rpartition(" ")
        if group and group not in groups:
            inner = verbs.add_parser(group, help=GROUPS[group], epilog=f"example: {example}")
            groups[group] = inner.add_subparsers(metavar="VERB", required=True)
        doc = str(cls.__doc__)
        sub = (groups[group] if group else verbs).add_parser(
            name, help=doc.partition(". ")[0].rstrip("."), description=doc, epilog=f"example: {example}"
        )
        add_flags(sub, cls)
        sub.add_argument(
            "--import",
            dest="_modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="module of yours, a name or a .py file, that adds families and the like; once for each",
        )
        sub.set_defaults(_cls=cls, _function=function, _parser=sub)
    return parser


def hint(word: str, cls: type[Any]) -> str:
    """What may have been meant by a flag that a verb does not have."""
    if not word.startswith("-"):
        return ""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    if cls is Train:
        from dflow.train import TrainConfig

        if name in {f.name for f in dataclasses.fields(TrainConfig)}:
            return f"; settings of the recipe are given by --set train.{name}=VALUE"
    flags = [
        option for f in dataclasses.fields(cls) if "positional" not in f.metadata for option in options_of(f)
    ]
    return f"; {nearest(word.partition('=')[0], flags)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit code.

    0, 1 (a check failed), 2 (what was given cannot be used), 130 (stopped by Ctrl-C).
    """
    # What a terminal or a log cannot show must not end a training of hours.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    wait_passively()
    values = vars(parse_words(argv))
    cls, function, modules = (values.pop(name) for name in ("_cls", "_function", "_modules"))
    screen = _Terminal(sys.stdout) if sys.stdout.isatty() else sys.stdout
    with contextlib.redirect_stdout(screen):
        return run(function, cls, values, modules)


def parse_words(argv: Sequence[str] | None) -> argparse.Namespace:
    """The verb and its flags; ends with exit code 2 where they are none."""
    found, unknown = build_parser().parse_known_args(argv)
    parser = found._parser
    del found._parser
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}{hint(unknown[0], found._cls)}")
    return found


def run(
    function: Callable[[Any], int], cls: type[Any], values: dict[str, Any], modules: Sequence[str] = ()
) -> int:
    """Run a verb; what goes wrong outside of dflow becomes a line on stderr and an exit code."""
    try:
        plugins.load_installed()
        for module in modules:
            plugins.load(module)
        code = function(read_flags(cls, values))
        sys.stdout.flush()  # a closed pipe or a full disk shows here, not when nobody can say so any more
        return int(code)
    except InputError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the interpreter must not fail on its last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            what += "; free some space and run again"
        complain(f"{error.filename}: {what}" if error.filename else what)
        return 2
    except KeyboardInterrupt as error:
        # Stopping is no error.
        say_once(str(error) or "interrupted")
        return 128 + signal.SIGINT
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        complain("out of memory; choose a smaller batch size")
        return 2


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; torch says so on the CPU in words only."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
    )
