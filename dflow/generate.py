"""Draw text and images from a model, and write them whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dflow.config import InputError
from dflow.core import Context
from dflow.data import Tokenizer, files, pictures
from dflow.distributions.drafted import Drafter
from dflow.models import TextModel, prompted
from dflow.models.counts import counts_drafter
from dflow.ops.noise import Controls, Noise
from dflow.terminal import shown

if TYPE_CHECKING:
    # Drawing text needs neither, and they take two seconds to import.
    from accelerate import Accelerator

    from dflow.hf import DflowImageModel

Format = Literal["text", "jsonl"]
ImageFormat = Literal["png", "npy", "csv"]


def generate(
    model: TextModel,
    n: int,
    *,
    length: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
    prompt: Tensor | None = None,
    controls: Controls | None = None,
    progress: bool = False,
    accelerator: Accelerator | None = None,
) -> Iterator[Tensor]:
    """``n`` draws, one tensor int64 ``(length,)`` each, on the CPU; -1 marks absent entries.

    Without controls they are exact. A sample is fixed by the seed and its number, on one kind of machine,
    whatever the batch size and the number of processes; a larger ``n`` begins with the samples of a smaller.
    Networks round differently for other batch sizes: where two symbols are as good as tied, another may win.

    Args:
        model: the law to draw from; its mode is restored.
        n: number of draws.
        length: number of symbols of each draw; default the model's.
        seed: from 0 to 2^63 - 1.
        batch_size: number of draws at a time.
        prompt: int64 ``(m,)``, the first symbols of each draw.
        controls: changes of the law, as temperature; None for the model's own.
        progress: show a bar on stderr.
        accelerator: spread the batches over its processes; each of them gets all draws.

    Raises:
        InputError: an argument outside its range; at once, not at the first draw.
    """
    longest, documents = model.config.length, model.documents
    _check(n, batch_size, seed)
    if length is not None and (length < 1 or (length > longest and documents is None)):
        raise InputError(
            f"length {length} is not a length this model can draw; take one of 1 to {longest}, or a model "
            "that was trained with a model.context"
            + f", which a {model.config.family} model has not"
            * (model.config.record.known == "no")
        )
    if prompt is not None:
        most = length or (longest if documents is None else len(prompt) + longest)
        if not 1 <= len(prompt) < most:
            raise InputError(
                f"the prompt has {len(prompt)} symbols; it needs at least 1 and fewer than the length {most}"
            )
        low, high = (int(v) for v in prompt.aminmax())
        if low < 0 or high >= model.config.vocab_size:
            raise InputError(
                f"prompt: symbol {low if low < 0 else high} is outside the vocabulary, 0 to "
                f"{model.config.vocab_size - 1}"
            )

    def draw(numbers: range) -> Tensor:
        samples = torch.arange(numbers.start, numbers.stop, device=model.device)
        noise = Noise(seed, samples, controls=None if _neutral(controls) else controls)
        return model.generate(len(numbers), length=length, prompt=prompt, noise=noise)

    return _draw(model, draw, n, batch_size, progress, accelerator)


def faster(
    model: TextModel, n: int, controls: Controls | None = None, drafter: Drafter | None = None
) -> TextModel:
    """The model, or the one that draws the same by drafts, whichever is faster on this machine.

    Each draws the beginning of ``n`` samples a few times, in turn; the shortest time counts.

    Args:
        model: the model.
        n: samples that are drawn together.
        controls: as of `generate`.
        drafter: what proposes symbols; by default the counts of the model. Without any, and for a model that
            takes no drafts, nothing is measured.
    """
    try:
        drafter = counts_drafter(model) if drafter is None else drafter
        if drafter is None:
            return model
        drafted = model.drafted(drafter)
    except InputError:
        return model
    length, seconds = min(_TIMED, model.config.length), dict[TextModel, float]()
    for _ in range(_ROUNDS):
        for each in (model, drafted):
            begin = time.perf_counter()
            deque(generate(each, n, length=length, batch_size=n, controls=controls), 0)
            seconds[each] = min(time.perf_counter() - begin, seconds.get(each, math.inf))
    if drafted.tally is not None:
        drafted.tally.clear()
    return min(seconds, key=lambda each: seconds[each])


#: Symbols of a sample that is drawn to measure the time, and how often it is drawn.
_TIMED, _ROUNDS = 48, 3


def generate_images(
    model: DflowImageModel,
    n: int,
    *,
    seed: int = 0,
    batch_size: int = 100,
    progress: bool = False,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """``n`` exact draws ``(n, C, H, W)``, on the CPU.

    They are fixed by the seed and the batch size, on one kind of machine, whatever the number of processes. A
    larger ``n`` begins with the full batches of a smaller one.

    Raises:
        InputError: an argument outside its range.
    """
    _check(n, batch_size, seed)
    generator = torch.Generator(model.device)

    def draw(numbers: range) -> Tensor:
        # Each batch has randomness of its own.
        text = f"{seed},{numbers.start // batch_size}".encode()
        generator.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
        return model.generate(len(numbers), generator=generator)

    return torch.stack([*_draw(model, draw, n, batch_size, progress, accelerator)])


def _check(n: int, batch_size: int, seed: int) -> None:
    for name, value in (("number of samples", n), ("batch size", batch_size)):
        if value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed {seed} must be from 0 to {(1 << 63) - 1}")


def _draw(
    model: TextModel | DflowImageModel,
    draw: Callable[[range], Tensor],
    n: int,
    batch_size: int,
    progress: bool,
    accelerator: Accelerator | None,
) -> Iterator[Tensor]:
    """Rows one after another, drawn in rounds, a batch a process; ``draw`` takes the numbers of a batch."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    batches = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    with tqdm(
        total=n, unit="sample", desc="draw", delay=1, mininterval=1, disable=not progress or rank > 0
    ) as bar:
        for first in range(0, len(batches), world):
            # A process that has no batch in the last round draws the last again, so that all send as much.
            numbers = batches[min(first + rank, len(batches) - 1)]
            mode = model.training
            model.train(False)
            try:
                with torch.inference_mode():
                    x = draw(numbers)
            finally:
                model.train(mode)
            if accelerator and world > 1:
                filled = x.new_zeros(batch_size, *x.shape[1:])
                filled[: len(numbers)] = x
                x = accelerator.gather(filled)[: n - first * batch_size]
            bar.update(len(x))
            yield from x.cpu()


def encode_images(
    x: Tensor,
    kind: ImageFormat,
    levels: int | None,
    columns: Sequence[str] = (),
    real: Sequence[bool] = (),
) -> bytes:
    """Draws ``(n, C, H, W)`` as a PNG of all of them in a grid, an array of numpy, or lines of numbers.

    Args:
        x: draws; a picture shows values outside its levels as the nearest of these.
        kind: format of the file.
        levels: number of values of an entry of a picture.
        columns: names of the entries (default: x1, x2, ...).
        real: for each entry, whether it is a real number (default: no entry is).

    Raises:
        InputError: a picture of data that are no pictures.
    """
    if kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, x.numpy(), allow_pickle=False)
        return buffer.getvalue()
    if kind == "csv":
        return _table(x.flatten(1), columns, real).encode()
    if levels is None or not is_picture(x.shape[1:]):
        raise InputError("these data are no pictures; use --format csv or npy")
    shape = (x.shape[1], x.shape[2], x.shape[3])
    # A draw may lie outside what a picture can show.
    return pictures.grid(x.flatten(1).clamp(0, levels - 1), shape, levels)


def _table(x: Tensor, columns: Sequence[str], real: Sequence[bool]) -> str:
    """Rows ``(n, D)`` as CSV with a header, without which dflow would not read it; integers as integers."""
    dim = x.shape[1]
    each = real or [False] * dim
    values = [(column if r else column.long()).tolist() for column, r in zip(x.T, each, strict=True)]
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(columns or [f"x{i}" for i in range(1, dim + 1)])
    lines.writerows(zip(*values, strict=True))
    return buffer.getvalue()


def is_picture(shape: Sequence[int]) -> bool:
    """Whether data of a shape (C, H, W) are pictures: grey or in colours, and more than one pixel."""
    return shape[0] in (1, 3) and tuple(shape[1:]) != (1, 1)


@torch.inference_mode()
def pieces(
    model: TextModel,
    tokenizer: Tokenizer,
    number: int,
    *,
    length: int | None = None,
    seed: int = 0,
    prompt: Tensor | None = None,
    controls: Controls | None = None,
    stop: str | None = None,
) -> Iterator[str]:
    """The text of sample ``number`` of `generate`, piece by piece as chunks are drawn, the prompt first.

    Args:
        model: one that was trained with a context.
        tokenizer: that of the model.
        number: of the sample, from 0.
        length: number of symbols.
        seed: as of `generate`.
        prompt: int64 ``(m,)``, the first symbols.
        controls: as of `generate`.
        stop: the text ends before this where it comes up behind the prompt, and nothing more is drawn.

    Raises:
        InputError: a model without a context.
    """
    if model.documents is None:
        raise InputError("this model was trained without a model.context and draws no text piece by piece")
    noise = Noise(
        seed, torch.tensor([number], device=model.device), controls=None if _neutral(controls) else controls
    )
    before = 0 if prompt is None else len(prompt)
    known = None if prompt is None else prompted(prompt.to(model.device), 1)
    ids = torch.zeros(0, dtype=torch.int64)
    begin = len(tokenizer.decode(prompt)) if prompt is not None else 0
    shown_up_to = 0
    length = before + model.config.length if length is None else length
    for drawn in model.documents.stream(1, Context(noise=noise, known=known), length=length):
        ids = torch.cat([ids, drawn[0].cpu()])
        text = tokenizer.decode(ids)
        end = cut(text, stop, begin)
        if end is None and len(ids) < length:
            # The next piece may complete a character, or what the text stops at.
            held = len(text) - len(text.rstrip("\ufffd")) if stop is None else len(stop)
            yield text[shown_up_to : max(shown_up_to, len(text) - held)]
            shown_up_to = max(shown_up_to, len(text) - held)
            continue
        yield text[shown_up_to:end]
        return


def cut(text: str, stop: str | None, begin: int) -> int | None:
    """Where ``stop`` comes up first in ``text`` from ``begin`` on, None where it does not."""
    place = text.find(stop, begin) if stop else -1
    return None if place < 0 else place


def _neutral(controls: Controls | None) -> bool:
    return controls is None or controls.exact


@dataclass(frozen=True)
class Spelling:
    """How samples are written.

    Attributes:
        tokenizer: makes text of symbols.
        format: "text", each sample under a title line (samples that are a line each need no title), or
            "jsonl", an object a line: ``text``, ``num_symbols`` and ``exact``.
        exact: whether the samples follow the law of the model.
        stop: samples end before this text, where it comes up.
        begin: number of characters of the prompt, in which it does not count.
        lines: the samples are lines; a line break that is drawn is spelled as backslash and n in text.
    """

    tokenizer: Tokenizer
    format: Format = "text"
    exact: bool = True
    stop: str | None = None
    begin: int = 0
    lines: bool = False

    def __call__(self, ids: Tensor, number: int = 1) -> str:
        """Sample ``number``, counted from 1, of its symbols."""
        text = self.tokenizer.decode(ids)
        text = text[: cut(text, self.stop, self.begin)]
        if self.format == "text":
            text = text.replace("\n", "\\n") if self.lines else text
            return f"{self.title(number)}{text}\n"
        values = {"text": text, "num_symbols": int((ids >= 0).sum()), "exact": self.exact}
        return json.dumps(values, ensure_ascii=False) + "\n"

    def title(self, number: int) -> str:
        """The line above a sample, which may hold line breaks of its own."""
        return "" if self.lines or self.tokenizer.one_line else f"--- sample {number} ---\n"


def write(samples: Iterator[Tensor], spell: Spelling, output: Path | None) -> None:
    """Write samples to the file ``output``, which appears when all are in it, or to stdout as they come.

    Raises:
        InputError: ``output`` exists, or its folder does not.
        OSError: the disk is full, or the like; names ``output``, and leaves nothing behind.
    """
    if output is None:
        for number, ids in enumerate(samples, 1):
            say(spell(ids, number))
        return
    check_output(output)
    # An output is whole or absent, so it waits in memory: a million samples of 256 symbols are 256 MB.
    text = "".join(spell(ids, number) for number, ids in enumerate(samples, 1))
    write_whole(output, text.encode("utf-8", "replace"))


def say(text: str) -> None:
    """Print text at once; a character that the terminal cannot show does not end a long draw."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(shown(text.encode(encoding, "replace").decode(encoding), sys.stdout))
    sys.stdout.flush()


def check_output(output: Path) -> None:
    """Refuse an output that exists, or whose folder does not.

    Raises:
        InputError: it cannot be written without loss, or at all.
    """
    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: exists already; remove it or choose another output")
    if not output.parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} does not exist; create it")


def write_whole(output: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: with the name of ``output``, which the operating system leaves out where a disk is full.
    """
    try:
        files.write(output, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(output)) from error
