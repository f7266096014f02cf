"""Images and tables: reading and splitting what the settings name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dflow.config import InputError
from dflow.data import files, image_sets, own_images, splits, tables
from dflow.data.image_sets import CHECKERBOARD, SplitPixels
from dflow.data.known import HUB
from dflow.data.samples import ImageSet, Samples, image_set, tensor_of
from dflow.data.settings import ImageConfig, load_either
from dflow.data.splits import SPLITS

#: Settings that only pictures have a use for, and those that only the user's own data have.
_PICTURES_ONLY = ("bits", "patch", "crop", "tiles", "grey", "flip")
_OWN_ONLY = ("crop", "tiles", "valid", "test", "continuous")


def load_images(config: ImageConfig, partial: bool = False) -> ImageSet:
    """Read and split the images or the table that ``config`` names.

    Args:
        config: names them.
        partial: whether the splits for validation and test may be empty, as when all rows are scored.

    Raises:
        InputError: nothing of that name, damaged files, images of unequal sizes, more than 8 bits a value,
            settings that do not go together, missing values in a table, another checksum than the config's.
    """
    return load_either(config, lambda: _load(config, partial, False), lambda: _load(config, partial, True))


def _load(config: ImageConfig, partial: bool, before: bool) -> ImageSet:
    """The data; a folder or table as version 0.1.0 read it if ``before``."""
    if config.name == CHECKERBOARD:
        config.refuse("drawn", "folder", *_PICTURES_ONLY, *_OWN_ONLY)
        # Rows drawn from two points are draws from the law; an evaluation on both is an exact expectation.
        rows = np.array([[0, 1], [1, 0]], dtype=np.uint8)
        note = image_sets.CHECKERBOARD_NOTE
        return image_set(config.name, (2, 1, 1), 2, 0, [rows] * 3, "equally likely rows", note, unit="bits")
    known_set = image_sets.KNOWN.get(config.name)
    if known_set is not None:
        config.refuse("a known set", *_OWN_ONLY)
        return _pictures(known_set.read(files.data_folder(config.folder)), config, known_set.note)
    if config.name.startswith(HUB):
        config.refuse("a set of images", "continuous", "folder")
        pixels, note = own_images.from_repository(config, partial)
        return _pictures(pixels, config, note)
    path = config.path()
    if tables.is_table(path) and path.is_file():
        config.refuse("a table", *_PICTURES_ONLY)
        return _table(path, config, partial, before)
    config.refuse("a folder of images", "continuous")
    if not path.is_dir():
        raise InputError(f"{path}: neither a folder of images nor a .csv table (or .tsv); name one of these")
    pixels, note = own_images.from_folder(path, config, partial, before)
    return _pictures(pixels, config, note)


def _pictures(pixels: SplitPixels, config: ImageConfig, note: str) -> ImageSet:
    """Grey, patch and bits, of any images."""
    bits = pixels.depth if config.bits is None else config.bits
    if bits > pixels.depth:
        raise InputError(
            f"bits={bits}: {config.name} has {pixels.depth} bits a value; set bits to at most that"
        )
    values = []
    for array in (pixels.train, pixels.valid, pixels.test, pixels.whole):
        if array is None:
            continue
        images = own_images.grey(array) if config.grey else array
        if config.patch:
            images = own_images.centre(images, config.patch, "patch", config.name)
        values.append(images >> (pixels.depth - bits))
    _, C, H, W = values[0].shape
    rows = [array.reshape(len(array), C * H * W) for array in values]
    return image_set(
        config.name,
        (C, H, W),
        1 << bits,
        0,
        rows[:3],
        "images",
        note,
        labels=pixels.labels,
        notes=pixels.notes,
        sources=pixels.sources,
        pooled=pixels.pooled,
        whole=Samples(splits.ALL, tensor_of(rows[3])) if len(rows) > 3 else None,
    )


def _table(path: Path, config: ImageConfig, partial: bool, whole: bool) -> ImageSet:
    """A table; with the columns that count its rows if ``whole``."""
    table = tables.read(path, config.continuous, whole)
    dealt, note = splits.by_rows({"train": table.values}, config.shares, config.name, partial)
    low, high = table.values.min(0), table.values.max(0)
    columns = list(zip(table.real, low, high, strict=True))
    values = [dealt[name] for name in SPLITS]
    units = tables.units(path, table, dealt["train"])
    if not any(table.real):
        dtypes = (np.uint8, np.int16, np.int32)
        dtype = next(t for t in dtypes if np.iinfo(t).min <= low.min() and high.max() <= np.iinfo(t).max)
        values = [rows.astype(dtype) for rows in values]
    images = image_set(
        config.name,
        (len(table.columns), 1, 1),
        tuple(None if real else int(top - bottom + 1) for real, bottom, top in columns),
        tuple(None if real else int(bottom) for real, bottom, _ in columns),
        values,
        "rows",
        "; ".join(filter(None, (note, table.note, units.note))),
        columns=table.columns,
        pooled=True,
    )
    return replace(images, loc=units.loc, scale=units.scale, unfit=units.unfit) if any(table.real) else images
