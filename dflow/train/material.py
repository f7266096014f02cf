# ruff: noqa: D102 - the methods are described in the base class
"""What a training takes from its data: batches, the rows of its evaluations, units, samples."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from dflow import hf, zoo
from dflow.config import InputError
from dflow.data import Corpus, ImageConfig, ImageSet, dealt, files, pictures
from dflow.ops.devices import moved
from dflow.train.folds import Folds
from dflow.train.patterns import pattern
from dflow.train.recipe import Recipe

#: Symbols and lengths of sentences, or rows and labels; without lengths or labels None.
Batch = tuple[Tensor, Tensor | None]

#: Chunks of text, and rows of images, of an evaluation during training, unless the recipe says how many.
_EVAL_CHUNKS, _EVAL_ROWS = 128, 2048
#: Entries of a batch of images at an evaluation, where those of training have less.
_EVAL_ENTRIES = 1 << 14
#: Most rows from which a model of images starts.
_INITIAL_ROWS = 1 << 17
#: Least number of pictures in a sample grid.
_PICTURES = 36


def mix(*numbers: int) -> int:
    """A seed that differs for every combination of ``numbers``."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


class Material(ABC):
    """The data of a training.

    Attributes:
        checksum: the checksum of the data.
        unit: the unit of the cost, "bits a character".
        short: the same unit for the progress bar.
        things: the name of what the progress bar counts a second.
        summary: lines on the data, their splits, and how they were read.
        protocol: how the validation data of an evaluation are cut and scored, in words.
    """

    checksum: str
    unit: str
    short: str
    things: str
    summary: str
    protocol: str

    @abstractmethod
    def batch(self, seed: int) -> Batch:
        """The whole batch that a seed gives: the same on every process."""

    def known(self, seed: int) -> Tensor | None:
        """Entries that are known in the batch of a seed, bool ``(n,)``; None where none can be."""
        return None

    @abstractmethod
    def entries(self, batch: Batch) -> int:
        """Number of entries (symbols, dimensions, labels) over which the loss of a batch is averaged."""

    @abstractmethod
    def count(self, batch: Batch) -> float:
        """Number of things (characters, dimensions, rows) over which the cost of a batch is reported."""

    @abstractmethod
    def valid(self, device: torch.device, rank: int, world: int) -> tuple[Iterator[Batch], float]:
        """The batches of validation data of this process, and the number of things in all of the data."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what belongs to the model beside its weights."""

    @abstractmethod
    def samples(self, model: Any, step: int, device: torch.device) -> Iterator[str]:
        """Draw samples; yields lines to print."""


@final
class Texts(Material):
    """Sequences of symbols: chunks of a stream, or sentences."""

    unit, short, things = "bits a character", "bits/char", "chars"
    folds: Folds | None = None

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        self.config, self.corpus, self.length = recipe.train, corpus, recipe.model.length
        self.checksum = corpus.checksum
        self.context, self.family = getattr(recipe.model, "context", 0), zoo.find(recipe.family)
        if self.context and corpus.protocol != "stream":
            raise InputError(
                f"model.context {self.context}: only a stream has text before a chunk, and these data are of "
                f"protocol {corpus.protocol!r}; set model.context=0"
            )
        # Refused where they are too short.
        corpus.train.crops(1, self.length + self.context, torch.Generator().manual_seed(0))
        corpus.valid.crops(1, self.length, torch.Generator().manual_seed(0))
        chunks = _EVAL_CHUNKS if self.config.eval_chunks is None else self.config.eval_chunks
        some = f"the first {chunks:,}" if chunks else "all"
        self.protocol = f"{some} chunks of {self.length:,} symbols, each on its own"
        if corpus.protocol != "stream":
            self.protocol = f"{some} {corpus.train.what}, each on its own with its length"
        head = f"{corpus.name} ({corpus.protocol}): {corpus.train.amount}, {corpus.tokenizer.size} different"
        self.summary = "\n".join([head, *dealt.lines(corpus.about())])

    def count_text(self, model: nn.Module, settings: Any) -> None:
        """Count the training text for a model that reads counts."""
        if getattr(settings, "counts", 0):
            self.folds = Folds(model, self.corpus.train, settings, self.corpus.tokenizer.size)
            self.summary += f"\n{self.folds.summary}"

    def known(self, seed: int) -> Tensor | None:
        if not self.context:
            return None
        if self.family.left_to_right:
            return torch.zeros(self.length + self.context, dtype=torch.bool)
        return pattern(self.length, self.context, self.config.known, mix(seed, 1))

    def batch(self, seed: int) -> Batch:
        generator, known = torch.Generator().manual_seed(seed), self.known(seed)
        length = self.length if known is None else len(known)
        text = self.corpus.train if self.folds is None else self.folds.text(mix(seed, 2))
        return text.crops(self.config.batch_size, length, generator)

    def entries(self, batch: Batch) -> int:
        x, lengths = batch
        return x.numel() if lengths is None else int(lengths.sum())

    def count(self, batch: Batch) -> float:
        return float(self.corpus.train.characters(*batch).sum())

    def valid(self, device: torch.device, rank: int, world: int) -> tuple[Iterator[Batch], float]:
        text, chunks = self.corpus.valid, self.config.eval_chunks
        limit = None if chunks == 0 else _EVAL_CHUNKS if chunks is None else chunks
        ids, lengths = text.chunks(self.length, limit)
        size = max(1, self.config.batch_size // world)

        def batches() -> Iterator[Batch]:
            for start in range(rank * size, len(ids), world * size):
                rows = slice(start, start + size)
                yield ids[rows].to(device), None if lengths is None else lengths[rows].to(device)

        # The end of a sentence counts as a character.
        ends = 0 if lengths is None else len(lengths)
        return batches(), float(text.characters(ids, lengths).sum()) + ends

    def save(self, folder: Path) -> None:
        self.corpus.tokenizer.save(folder)
        dealt.write(self.corpus.about(), folder)

    def samples(self, model: hf.DflowModel, step: int, device: torch.device) -> Iterator[str]:
        generator = torch.Generator(device).manual_seed(self.config.seed)
        for row in model.generate(self.config.samples, generator=generator):
            yield "  | " + self.corpus.tokenizer.decode(row.cpu()).replace("\n", "\n  | ")


@final
class Images(Material):
    """Images or a table, or images with the labels that a classifier gives them.

    Args:
        recipe: with the settings of the model that follow from the data.
        images: the data.
        labelled: the model is a classifier.
        repeated: the cost of a row is random: where the rows of an evaluation are few, it goes through them
            again.
    """

    def __init__(self, recipe: Recipe, images: ImageSet, labelled: bool, repeated: bool) -> None:
        self.recipe, self.config, self.images, self.labelled = recipe, recipe.train, images, labelled
        self.checksum = images.checksum
        #: Whether a figure is one of a whole row, not of an entry.
        self.whole_rows = labelled or images.unit == "bits"
        self.unit = "bits a label" if labelled else images.unit
        if labelled:
            self.short, self.things = "bits/label", "images"
        else:
            self.short, self.things = ("bits", "rows") if self.whole_rows else ("bits/dim", "dims")
        chunks = _EVAL_ROWS if self.config.eval_chunks is None else self.config.eval_chunks
        self.rows = images.valid.subset(chunks or images.valid.num_rows)
        self.protocol = f"the first {self.rows.num_rows:,} rows" if chunks else "all rows"
        self.passes = -(-_EVAL_ROWS // self.rows.num_rows) if repeated and not self.config.eval_chunks else 1
        head = f"{images.name} {'x'.join(map(str, images.shape))}: {images.train.amount}"
        self.summary = "\n".join([head, *dealt.lines(images.about())])

    def initial(self, entries: int) -> Tensor:
        """Rows from which the model starts: a batch, or as many as have so many entries."""
        rows = max(self.config.batch_size, min(_INITIAL_ROWS, entries // self.images.dim))
        generator = torch.Generator().manual_seed(self.config.seed)
        return self.images.train.crops(rows, self.images.dim, generator)[0]

    def batch(self, seed: int) -> Batch:
        generator, train = torch.Generator().manual_seed(seed), self.images.train
        x, labels = (
            train.labelled(self.config.batch_size, generator)
            if self.labelled
            else train.crops(self.config.batch_size, self.images.dim, generator)
        )
        if isinstance(self.recipe.data, ImageConfig) and self.recipe.data.flip:
            mirrored = x.view(-1, *self.images.shape).flip(3).flatten(1)
            x = torch.where(torch.rand(len(x), 1, generator=generator) < 0.5, mirrored, x)
        return x, labels

    def entries(self, batch: Batch) -> int:
        return len(batch[0]) if self.labelled else batch[0].numel()

    def count(self, batch: Batch) -> float:
        return len(batch[0]) if self.whole_rows else batch[0].numel()

    def valid(self, device: torch.device, rank: int, world: int) -> tuple[Iterator[Batch], float]:
        rows, num_rows = self.rows, self.rows.num_rows
        total = num_rows * self.passes
        size = max(1, self.config.batch_size // world)
        if not self.labelled:
            size = max(size, _EVAL_ENTRIES // self.images.dim)

        def batches() -> Iterator[Batch]:
            for start in range(rank * size, total, world * size):
                which = torch.arange(start, min(total, start + size)) % num_rows
                labels = rows.labels[which].to(device) if self.labelled and rows.labels is not None else None
                yield moved(rows.rows(which), device), labels

        return batches(), float(total if self.whole_rows else total * self.images.dim)

    def save(self, folder: Path) -> None:
        dealt.write(self.images.about(), folder)

    def samples(self, model: hf.DflowImageModel, step: int, device: torch.device) -> Iterator[str]:
        if self.labelled:  # a classifier draws nothing
            return
        images, generator = self.images, torch.Generator(device).manual_seed(self.config.seed)
        if images.shape[1:] == (1, 1):
            for row in model.law.sample(self.config.samples, generator=generator).tolist():
                yield f"  | {row}"
            return
        folder = self.recipe.output / "samples"
        folder.mkdir(exist_ok=True)
        levels = images.levels if isinstance(images.levels, int) else 2
        # A draw may lie outside what a picture can show.
        x = model.law.sample(max(self.config.samples, _PICTURES), generator=generator).clamp(0, levels - 1)
        path = folder / f"{step:07d}.png"
        files.write(path, pictures.grid(x.cpu(), images.shape, levels))
        yield f"  | {path}"
