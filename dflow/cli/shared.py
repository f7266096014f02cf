"""What verbs share: flags, models, tables and messages."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflow.cli.flags import flag
from dflow.config import InputError
from dflow.terminal import shown
from dflow.threads import Suited, processors

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from dflow.data import Tokenizer
    from dflow.models import TextModel
    from dflow.ops.noise import Controls


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
class Threads:
    """Flag of every verb that computes."""

    threads: int | None = flag(
        "number of threads of torch on the CPU (default: one for a small model, else one a processor)", None
    )

    def set_threads(self) -> None:
        """Set the threads of torch: as given, else no more than processors; keep memory between steps."""
        import torch

        from dflow.memory import keep_memory

        keep_memory()
        Suited.free = self.threads is None and "OMP_NUM_THREADS" not in os.environ
        if self.threads is not None:
            if self.threads < 1:
                raise InputError(f"--threads {self.threads} must be at least 1")
            torch.set_num_threads(self.threads)
        elif Suited.free and processors() < torch.get_num_threads():
            torch.set_num_threads(processors())


@dataclass(kw_only=True)
class Machine(Threads):
    """Flags of every verb that computes on any device."""

    device: str = flag("device to compute on; auto: the first GPU, else the CPU", "auto")

    def settle(self) -> torch.device:
        """Set the threads, and find the device."""
        import torch

        self.set_threads()
        name = _first_gpu() if self.device == "auto" else self.device
        try:
            device = torch.device(name)
            torch.empty(1, device=device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--device {self.device}: not available here ({reason}); try --device cpu"
            ) from None
        return device

    def processes(self) -> tuple[torch.device, Accelerator | None]:
        """The device, and under a launcher the processes among which the work is shared."""
        if _alone():
            return self.settle(), None
        import torch
        from accelerate import Accelerator

        self._check_launched()
        accelerator = Accelerator(cpu=self.device == "cpu" or not torch.cuda.is_available())
        return accelerator.device, accelerator

    def settle_training(self) -> torch.device | None:
        """The device to train on; None under a launcher, where each process takes one of its own."""
        if _alone():
            return self.settle()
        import torch

        self._check_launched()
        return torch.device("cpu") if self.device == "cpu" else None

    def _check_launched(self) -> None:
        """Set the threads of a process of a launcher; InputError for a device that not each can take."""
        import torch

        self.set_threads()
        if self.device not in ("auto", "cpu", "cuda") or (
            self.device == "cuda" and not torch.cuda.is_available()
        ):
            raise InputError(
                f"--device {self.device}: under a launcher each process takes a device of its own; give cpu, "
                "cuda where there is one, or nothing"
            )


def _alone() -> bool:
    """Whether no launcher has started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _first_gpu() -> str:
    """The type of the first GPU; the CPU without one, and with a note for one that has no float64."""
    import torch

    from dflow.ops.devices import WITHOUT_FLOAT64

    gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if gpu is None:
        return "cpu"
    if gpu.type in WITHOUT_FLOAT64:
        say_once(
            f"note: computing on the CPU, since this GPU has no float64; --device {gpu.type} computes on it, "
            "and rounds sums to float32"
        )
        return "cpu"
    return gpu.type


@dataclass(kw_only=True)
class Drawing(Machine):
    """Flags of every verb that draws."""

    n: int = flag(
        "number of samples (--n is its older name, which torchrun takes for one of its own)",
        1,
        long="--samples",
    )
    seed: int = flag("seed of the draws", 0)
    batch_size: int = flag("number of samples drawn at a time", 100)
    temperature: float | None = flag(
        "number that divides the logits; below 1 likely symbols become likelier (changes the law)", None
    )
    top_k: int | None = flag("number of the likeliest symbols that can be drawn (changes the law)", None)
    top_p: float | None = flag(
        "probability: the fewest symbols that together have it can be drawn (changes the law)", None
    )
    min_p: float | None = flag(
        "share of the likeliest symbol's probability that a symbol needs to be drawn (changes the law)",
        None,
    )

    def controls(self) -> Controls:
        """The changes of the law of text; says so where there are some."""
        from dflow.ops.noise import Controls

        controls = Controls(
            1.0 if self.temperature is None else self.temperature, self.top_k, self.top_p, self.min_p
        )
        if not controls.exact:
            note = "note: temperature, top-k, top-p and min-p change the law; the draws are not exact"
            print(note, file=sys.stderr)
        return controls


def suit_threads(model: Any, batch: int, calls: int = 1) -> None:
    """Threads by the work of a batch of a model of text or of images, drawn in so many network calls."""
    Suited.to(model.config.record.multiplications(model.config.settings(), batch, calls))


def make_folder(folder: Path) -> None:
    """A folder to write into, made if its own folder is there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file; name a folder")
    if not folder.exists():
        if not folder.parent.is_dir():
            raise InputError(f"{folder}: the folder {folder.parent} does not exist; create it")
        folder.mkdir()


def load_model(folder: str, device: torch.device) -> tuple[TextModel, Tokenizer]:
    """The model and the tokenizer in ``folder``."""
    from dflow import models
    from dflow.data import Tokenizer

    model = models.load(folder, device)
    tokenizer = Tokenizer.load(models.split_calls(folder)[0])
    if tokenizer.size != model.config.vocab_size:
        raise InputError(
            f"{folder}: the vocabulary has {tokenizer.size} symbols and the model {model.config.vocab_size}; "
            "restore both files from one run"
        )
    return model, tokenizer


def read_text(file: str) -> tuple[str, str]:
    """Name and content of a file of text in UTF-8, or of standard input where it is -.

    Raises:
        InputError: it is empty, or no UTF-8.
    """
    from dflow.data import files

    name = "standard input" if file == "-" else file
    data = sys.stdin.buffer.read() if file == "-" else files.read(files.expanded(file))
    text = files.decode(data, name)
    if not text:
        raise InputError(f"{name}: empty; give a text")
    return name, text


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


def show_comparison(flags: Results, comparing: Any, result: object, folder: Path | None) -> None:
    """Print a comparison, and write it to ``folder``, by `markdown`, `record` and `write` of its module."""
    paths = [] if folder is None else comparing.write(result, folder)
    if not flags.json:
        print_lines([comparing.markdown(result), *paths])
    flags.end(json.loads(comparing.record(result)), last_line=True)


def print_lines(items: Sequence[object]) -> None:
    """Print a line each."""
    for item in items:
        print(item)


def finite(record: object) -> object:
    """``record`` with null for numbers that JSON lacks: infinite ones and NaN.

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
