"""Images and tables as integers (and reals): what continuous models are trained on and evaluated with.

Images are flat: ``dim = C * H * W`` entries in the order C, H, W. Values stay on the integer grid, in cells
of unit size; nothing is divided by 256, so bits a dimension need no offset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dflow.config import InputError, nearest
from dflow.data import splits
from dflow.data.arrays import Array
from dflow.data.splits import SPLITS


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows of one split: ``values`` of shape ``(n, dim)``, in a compact dtype.

    Integers, or float64 where some columns are real numbers. Labels are int64 ``(n,)``, where there are some.
    """

    name: str
    values: Tensor
    what: str = "images"
    labels: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.values)

    @property
    def dim(self) -> int:
        """Entries of a row."""
        return self.values.shape[1]

    @property
    def amount(self) -> str:
        """How much there is to train on, in words."""
        return f"{self.num_rows:,} {self.what} of {self.dim:,} entries to train on"

    def rows(self, indices: slice | Tensor) -> Tensor:
        """Rows to compute with: int64 ``(batch, dim)``, or float64 where some columns are real."""
        values = self.values[indices]
        return values if values.is_floating_point() else values.long()

    def subset(self, n: int) -> Samples:
        """``n`` rows, always the same random ones (files are often sorted); all where there are no more."""
        if n >= self.num_rows:
            return self
        indices = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(0))[:n]
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, values=self.values[indices], labels=labels)

    def crops(self, batch: int, length: int, generator: torch.Generator | None = None) -> tuple[Tensor, None]:
        """``batch`` random rows, drawn with replacement, as `rows` gives them.

        The draw depends on nothing but the generator, which is on the CPU.

        Raises:
            InputError: ``length`` is not the number of entries of a row.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be positive")
        self._fits(length)
        return self.rows(torch.randint(self.num_rows, (batch,), generator=generator)), None

    def labelled(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``batch`` random rows as in `crops`, and their labels, int64 ``(batch,)``.

        Raises:
            InputError: the data have no labels.
        """
        if self.labels is None:
            raise InputError(f"the {self.name} data have no labels; use mnist or cifar10")
        indices = torch.randint(self.num_rows, (batch,), generator=generator)
        return self.rows(indices), self.labels[indices]

    def chunks(self, length: int) -> tuple[Tensor, None]:
        """All rows in order, ``(n, dim)``, as they are stored: `rows` gives rows to compute with.

        Raises:
            InputError: ``length`` is not the number of entries of a row.
        """
        self._fits(length)
        return self.values, None

    def _fits(self, length: int) -> None:
        if length != self.dim:
            raise InputError(
                f"the {self.name} data have {self.dim} entries a row and the model's length is {length}; set "
                "the model's shape to that of the data, or leave it out"
            )


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images or a table in three splits.

    Attributes:
        shape: ``(C, H, W)`` of an image; ``(D, 1, 1)`` of a table of D columns.
        levels: number of values of each entry: of images one number, values are ``0 .. levels - 1``; of a
            table the number of integers from the smallest to the largest value of each column (over all
            splits), None for real columns.
        lowest: the smallest value, in the same way.
        columns: names of the columns of a table.
        loc: mean of each real column of a table over the rows to train on, None for a discrete one; None
            where no column is real.
        scale: its standard deviation, in the same way.
        unfit: why no density can be learned from these data; empty where one can.
        checksum: of the values of all splits as they are read: a result can say what it was measured on.
        unit: of results: "bits a dimension", or "bits" of a whole row.
        classes: number of different labels, 0 for data without labels.
        sources: names of the files that each split is taken from, where they are the user's.
        notes: sentences on how they were read.
        pooled: whether the test split is a share of a pool, and no data of its own.
        whole: all rows, where the rows to train on overlap.
    """

    name: str
    shape: tuple[int, int, int]
    levels: int | tuple[int | None, ...]
    lowest: int | tuple[int | None, ...]
    train: Samples
    valid: Samples
    test: Samples
    checksum: str
    note: str = ""
    columns: tuple[str, ...] | None = None
    unit: str = "bits a dimension"
    classes: int = 0
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pooled: bool = False
    whole: Samples | None = None
    loc: tuple[float | None, ...] | None = None
    scale: tuple[float | None, ...] | None = None
    unfit: str = ""

    @property
    def dim(self) -> int:
        """Entries of a row."""
        return self.train.dim

    def split(self, name: str) -> Samples:
        """The split called ``name``: train, valid or test; or all of them, in this order.

        Raises:
            InputError: no split of that name, or no row in it.
        """
        if name == splits.ALL:
            return self._all()
        if name not in SPLITS:
            raise InputError(f"no split {name!r}; {nearest(name, [*SPLITS, splits.ALL])}")
        samples: Samples = getattr(self, name)
        if not samples.num_rows:
            raise InputError(
                f"{self.name}: too few rows for a {name} split; score all of them with --split all"
            )
        return samples

    def _all(self) -> Samples:
        if self.whole is not None:
            return self.whole
        samples = (self.train, self.valid, self.test)
        labels = [split.labels for split in samples if split.labels is not None]
        values = torch.cat([split.values for split in samples])
        return Samples(splits.ALL, values, self.train.what, torch.cat(labels) if labels else None)

    def about(self) -> dict[str, Any]:
        """The splits as plain values: the rows and files of each; and the notes."""
        amounts = {
            samples.name: {samples.what: samples.num_rows, "files": list(self.sources.get(samples.name, ()))}
            for samples in (self.train, self.valid, self.test)
        }
        return {"name": self.name, "checksum": self.checksum, "splits": amounts, "notes": list(self.notes)}


def image_set(
    name: str,
    shape: tuple[int, int, int],
    levels: int | tuple[int | None, ...],
    lowest: int | tuple[int | None, ...],
    values: Sequence[Array],
    what: str,
    note: str,
    *,
    columns: tuple[str, ...] | None = None,
    labels: Sequence[Array] | None = None,
    notes: Sequence[str] = (),
    **attributes: Any,
) -> ImageSet:
    """The set of the rows ``values`` of each split, ``(n, dim)``, and their labels, ``(n,)``.

    The note follows the ``notes`` as a sentence; other attributes are those of `ImageSet`.
    """
    digest = hashlib.sha256(repr((shape, levels, columns)).encode())
    samples = []
    for i, (split, rows) in enumerate(zip(SPLITS, values, strict=True)):
        digest.update(rows.tobytes())
        classes = None if labels is None else torch.from_numpy(labels[i].astype(np.int64))
        samples.append(Samples(split, tensor_of(rows), what, classes))
    train, valid, test = samples
    return ImageSet(
        name=name,
        shape=shape,
        levels=levels,
        lowest=lowest,
        train=train,
        valid=valid,
        test=test,
        checksum=f"sha256:{digest.hexdigest()}",
        note=note,
        columns=columns,
        classes=1 + max(int(classes.max()) for classes in labels) if labels else 0,
        notes=(*notes, f"{note[0].upper()}{note[1:]}.") if note else tuple(notes),
        **attributes,
    )


def tensor_of(values: Array) -> Tensor:
    """An array as a tensor: a copy where the array cannot be written to, since torch would share it."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
