"""The user's own images, from files or the hub to three splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dflow.config import InputError
from dflow.data import formats, splits
from dflow.data.arrays import Array
from dflow.data.image_sets import SplitPixels
from dflow.data.known import from_hub, repository_of
from dflow.data.settings import ImageConfig
from dflow.data.splits import SPLITS, Arranged

#: An image file: its name in messages, and its path or content.
File = tuple[str, Path | bytes]
#: Suffixes of the images that version 0.1.0 read of a folder.
_SUFFIXES_BEFORE = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
#: The splits that the hub's names mean.
_HUB_SPLITS = {"train": "train", "validation": "valid", "valid": "valid", "val": "valid", "test": "test"}


@dataclass(frozen=True)
class _OwnPicture:
    """An image file, decoded.

    Attributes:
        name: of the file, for messages.
        source: path or content of the file.
        values: uint8 ``(C, H, W)``, C of 1 or 3.
        depth: 1 or 8 bits.
        turned: whether the file says how to turn the image.
    """

    name: str
    source: Path | bytes
    values: Array
    depth: int
    turned: bool


def grey(images: Array) -> Array:
    """Shades of grey ``(..., 1, H, W)`` of colours ``(..., 3, H, W)``: 0.299 R + 0.587 G + 0.114 B, rounded.

    >>> grey(np.array([255, 0, 0], dtype=np.uint8).reshape(3, 1, 1)).item()
    76
    """
    if images.shape[-3] == 1:
        return images
    weights = np.array([299, 587, 114], dtype=np.uint32).reshape(3, 1, 1)
    # Block by block: the sums take four times the memory of the colours.
    flat = images.reshape(-1, *images.shape[-3:])
    shades = np.empty((len(flat), 1, *images.shape[-2:]), dtype=np.uint8)
    for start in range(0, len(flat), 1024):
        block = flat[start : start + 1024]
        shades[start : start + 1024] = ((block * weights).sum(1, keepdims=True) + 500) // 1000
    return shades.reshape(*images.shape[:-3], 1, *images.shape[-2:])


def centre(images: Array, size: Sequence[int], setting: str, name: str) -> Array:
    """The patch ``[height, width]`` at the centre of images ``(..., H, W)``.

    Raises:
        InputError: the patch is larger than the images; the message names the ``setting`` and the images.
    """
    (H, W), (h, w) = images.shape[-2:], size
    if h > H or w > W:
        raise InputError(
            f"{setting}={list(size)} is larger than {name}, which has {H} x {W} pixels; set it lower"
        )
    y, x = (H - h) // 2, (W - w) // 2
    return images[..., y : y + h, x : x + w]


def from_folder(path: Path, config: ImageConfig, partial: bool, before: bool) -> tuple[SplitPixels, str]:
    """The images of a folder, and a note on how they were read; see `load_images`."""
    if before:
        arranged = _arrange_before(path)
    else:
        kind = f"image ({', '.join(sorted(formats.SUFFIXES))})"
        arranged = splits.arrange(
            path, lambda p, _: p.suffix.lower() in formats.SUFFIXES, kind, "put them there"
        )
    sources = {split: [(str(p), p) for p in paths] for split, paths in arranged.paths.items()}
    pixels, note = _from_files(sources, config, partial)
    names = {
        split: tuple(arranged.name(Path(name)) for name in listed) for split, listed in pixels.sources.items()
    }
    return replace(pixels, sources=names, notes=(*arranged.notes, *pixels.notes)), note


def _arrange_before(path: Path) -> Arranged:
    """The images of a folder as version 0.1.0 took them: by folders called as the splits are, or one pool."""
    pool = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES_BEFORE and p.is_file())
    folders: dict[str, list[Path]] = {}
    for image in pool:
        folders.setdefault(image.relative_to(path).parts[0], []).append(image)
    named = "train" in folders and len(folders) > 1 and folders.keys() <= set(SPLITS)
    paths = {split: folders[split] for split in SPLITS if split in folders} if named else {"train": pool}
    return Arranged(path, paths, named, (splits.BEFORE,))


def from_repository(config: ImageConfig, partial: bool) -> tuple[SplitPixels, str]:
    """The images of a data set on the hub, and a note on how they were read; see `load_images`."""

    def files_of(split: Any, name: str, column: str) -> Iterator[File]:
        for i, row in enumerate(split.select_columns([column])):
            cell, row_name = row[column], f"{config.name}, {name} row {i}"
            if cell is None or not (cell["bytes"] or cell["path"]):
                raise InputError(f"{row_name}: has no image; choose a data set without gaps")
            yield row_name, cell["bytes"] or Path(cell["path"]).read_bytes()

    def read(hub_splits: Any) -> tuple[SplitPixels, str]:
        from datasets import Image

        # Splits of other names are neither trained on nor scored.
        by_name = {_HUB_SPLITS[name]: split for name, split in hub_splits.items() if name in _HUB_SPLITS}
        if "train" not in by_name:
            raise InputError(f"{config.name}: has no split to train on, only {', '.join(hub_splits)}")
        features = by_name["train"].features
        columns = [name for name, kind in features.items() if isinstance(kind, Image)]
        if len(columns) != 1:
            raise InputError(
                f"{config.name}: needs one column of images, found {columns or 'none'} among "
                f"{', '.join(features)}"
            )
        [column] = columns
        # In the order of training, validation and test, whatever the hub's.
        undecoded = {
            name: by_name[name].cast_column(column, Image(decode=False)) for name in SPLITS if name in by_name
        }
        sources = {name: files_of(split, name, column) for name, split in undecoded.items()}
        return _from_files(sources, config, partial)

    return from_hub(config.name, "the images as files", repository_of(config.name), read)


def _from_files(
    sources: Mapping[str, Iterable[File]], config: ImageConfig, partial: bool
) -> tuple[SplitPixels, str]:
    """Image files by split; a split that is missing is dealt from the images to train on."""
    pictures: list[_OwnPicture] = []
    rows = {}
    for split, files in sources.items():
        if split != "train" and getattr(config, split) is not None:
            raise InputError(f"{config.name} has a split of its own for {split}: leave {split} out")
        start = len(pictures)
        for name, source in files:
            picture = _decode(name, source, config)
            if pictures:
                _check_alike(pictures[0], picture, config)
            pictures.append(picture)
        if len(pictures) == start:
            raise InputError(f"{config.name}: the {split} split is empty; choose data that have some")
        rows[split] = np.arange(start, len(pictures))
    # Whole images are dealt, since tiles of one image must not lie in two splits.
    dealt, note = splits.by_rows(rows, config.shares, config.name, partial)
    num_turned = sum(picture.turned for picture in pictures)
    if num_turned:
        note += "; " * bool(note) + f"{num_turned:,} images turned as their EXIF orientation says"
    depth = max(picture.depth for picture in pictures)
    for i, picture in enumerate(pictures):
        if picture.depth < depth:
            pictures[i] = replace(picture, values=picture.values * np.uint8(255))
    chosen = {split: [pictures[i] for i in dealt[split]] for split in SPLITS}
    # A split may be empty, and has the shape of the others.
    empty = _tiles(pictures[0].values, config.tiles, False)[:0]
    train, valid, test = (_stacked(chosen[split], config.tiles, split == "train", empty) for split in SPLITS)
    everything = [picture for split in SPLITS for picture in chosen[split]]
    pixels = SplitPixels(
        train,
        valid,
        test,
        depth,
        sources={split: tuple(picture.name for picture in chosen[split]) for split in SPLITS},
        notes=tuple(splits.repeated({s: [(p.name, p.source) for p in chosen[s]] for s in SPLITS})),
        pooled="test" not in rows,
        whole=_stacked(everything, config.tiles, False, empty) if config.tiles else None,
    )
    return pixels, note


def _decode(name: str, source: Path | bytes, config: ImageConfig) -> _OwnPicture:
    """An image file, in grey and cropped where the settings say so."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    stored = formats.read(data, name, f"{formats.WAY} of 8 bits")
    if stored.depth > 8:
        raise InputError(f"{name}: more than 8 bits a value; convert the image to 8 bits")
    # An alpha channel that is the same everywhere says nothing.
    if stored.alpha is not None and np.ptp(stored.alpha):
        raise InputError(
            f"{name}: partly transparent; lay the image on a background, for example by ImageMagick: "
            "mogrify -background white -alpha remove -alpha off FILE"
        )
    values = formats.turned(stored.values, stored.layout.orientation).transpose(2, 0, 1)
    if 1 < stored.depth < 8:
        values = values * np.uint8(255 // ((1 << stored.depth) - 1))
    if config.grey:
        values = grey(values)
    if config.crop:
        # A copy: a view would keep the whole image in memory.
        values = centre(values, config.crop, "crop", name).copy()
    H, W = values.shape[1:]
    if config.tiles and (config.tiles[0] > H or config.tiles[1] > W):
        raise InputError(
            f"tiles={config.tiles} are larger than {name}, which has {H} x {W} pixels; set them smaller"
        )
    return _OwnPicture(name, source, values, 1 if stored.depth == 1 else 8, stored.layout.orientation != 1)


def _check_alike(picture: _OwnPicture, other: _OwnPicture, config: ImageConfig) -> None:
    """Raise `InputError` unless two images have the same number of channels and, without tiles, one size."""
    (C, H, W), (c, h, w) = picture.values.shape, other.values.shape
    ways = ["set data.grey to true, or turn all into colours"] if c != C else []
    if (h, w) != (H, W) and not config.tiles:
        ways.append("set data.crop to [height, width] to cut each at its centre")
    if ways:
        raise InputError(
            f"images of unequal sizes: {picture.name} has {H} x {W} pixels in {C} channels, {other.name} "
            f"{h} x {w} in {c}; {', and '.join(ways)}"
        )


def _tiles(image: Array, size: Sequence[int] | None, overlap: bool) -> Array:
    """Tiles ``(n, C, h, w)`` of an image ``(C, H, W)``: all whole ones, or the image itself."""
    if size is None:
        return image[None]
    down, right = (max(1, n // 2) if overlap else n for n in size)
    windows = np.lib.stride_tricks.sliding_window_view(image, size, (1, 2))[:, ::down, ::right]
    return windows.transpose(1, 2, 0, 3, 4).reshape(-1, len(image), *size)


def _stacked(
    pictures: Iterable[_OwnPicture], size: Sequence[int] | None, overlap: bool, empty: Array
) -> Array:
    """The tiles of all images; ``empty`` where there are no images."""
    return np.concatenate([empty, *(_tiles(picture.values, size, overlap) for picture in pictures)])
