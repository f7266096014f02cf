"""Images and tables as integers (and reals): what continuous models are trained on and evaluated with.

Images are flat: ``dim = C * H * W`` entries in the order C, H, W. Values stay on the integer grid, in cells
of unit size; nothing is divided by 256, so bits a dimension need no offset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.config import InputError, nearest
from dflow.data import files, formats, image_sets, sets, splits, synthetic, tables
from dflow.data.image_sets import CHECKERBOARD, Pixels
from dflow.data.known import from_hub
from dflow.data.splits import SPLITS, Arranged

Array = NDArray[Any]

HUB = "hub:"
_SUFFIXES = formats.SUFFIXES
#: What version 0.1.0 read of a folder.
_SUFFIXES_BEFORE = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
_OWN = "of your own data (default 0.05)"


@dataclass
class ImageConfig:
    """Which images or table, read how."""

    name: str = field(
        default=CHECKERBOARD,
        metadata={
            "help": ", ".join((CHECKERBOARD, *image_sets.KNOWN)) + ", hub:OWNER/NAME (of the "
            "Hugging Face hub), or the path of a folder of images or of a .csv or .tsv table"
        },
    )
    folder: str | None = field(
        default=None, metadata={"help": "folder of the data (default: the environment variable DFLOW_DATA)"}
    )
    bits: int | None = field(
        default=None, metadata={"help": "keep the BITS highest bits of each value (default: all)"}
    )
    patch: list[int] | None = field(
        default=None, metadata={"help": "keep the patch [height, width] at the centre"}
    )
    crop: list[int] | None = field(
        default=None,
        metadata={"help": "cut each image of your own to [height, width] at its centre, to make sizes equal"},
    )
    tiles: list[int] | None = field(
        default=None,
        metadata={
            "help": "cut each image of your own into tiles [height, width]: side by side, to train on "
            "overlapping by half"
        },
    )
    grey: bool = field(default=False, metadata={"help": "turn colours into shades of grey"})
    flip: bool = field(
        default=False, metadata={"help": "mirror images to train on, left and right, at random"}
    )
    valid: float | None = field(default=None, metadata={"help": f"share for validation, {_OWN}"})
    test: float | None = field(default=None, metadata={"help": f"share for the test, {_OWN}"})
    continuous: list[str] | None = field(
        default=None,
        metadata={
            "help": "columns of a table that are real numbers (default: where any value is no integer)"
        },
    )
    checksum: str | None = field(
        default=None, metadata={"help": "of all values: another one is refused (a model's recipe has it)"}
    )

    def __post_init__(self) -> None:
        """Check the shares and sizes."""
        valid, test = self.shares
        if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
            raise InputError(f"valid={valid} and test={test} must be above 0 and leave something to train on")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise InputError(f"bits={self.bits} must lie in 1..8")
        if self.crop and self.tiles:
            raise InputError(f"crop={self.crop} and tiles={self.tiles} both cut the images: leave one out")
        for name, size in (("patch", self.patch), ("crop", self.crop), ("tiles", self.tiles)):
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise InputError(f"{name}={size} must be [height, width], each at least 1")

    @property
    def shares(self) -> tuple[float, float]:
        """For validation and for the test."""
        return (0.05 if self.valid is None else self.valid), (0.05 if self.test is None else self.test)

    def of(self, name: str) -> ImageConfig:
        """The same kind of data under another name: how they are read is kept, the shares are not."""
        kept = replace(self, name=name, valid=None, test=None, checksum=None)
        if name == CHECKERBOARD:
            return ImageConfig(name)
        if name in image_sets.KNOWN:
            return replace(kept, crop=None, tiles=None, continuous=None)
        return replace(kept, folder=None) if name.startswith(HUB) else kept

    @property
    def is_path(self) -> bool:
        """Whether `name` is the path of a folder or table, not the name of a known set."""
        known = self.name == CHECKERBOARD or self.name in image_sets.KNOWN
        return not (known or self.name.startswith(HUB))

    def located(self) -> ImageConfig:
        """The same data by absolute paths, so that they are found from any working directory.

        Raises:
            InputError: no such folder or table.
        """
        return replace(
            self,
            name=files.absolute(_path(self)) if self.is_path else self.name,
            folder=None if self.folder is None else files.absolute(self.folder),
        )

    def refuse(self, what: str, *settings: str) -> None:
        """Raise `InputError` if one of the settings is given: ``what`` has no use for it."""
        default = ImageConfig()
        for name in settings:
            if getattr(self, name) != getattr(default, name):
                raise InputError(f"{self.name} is {what} and takes no {name}: leave it out")


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
        """Rows that there are."""
        return len(self.values)

    @property
    def dim(self) -> int:
        """Entries of a row."""
        return self.values.shape[1]

    @property
    def amount(self) -> str:
        """What there is to train on, in words."""
        return f"{self.num_rows:,} {self.what} of {self.dim:,} entries to train on"

    def rows(self, which: slice | Tensor) -> Tensor:
        """Rows ``which`` to compute with: int64 ``(batch, dim)``, or float64 where some columns are real."""
        values = self.values[which]
        return values if values.is_floating_point() else values.long()

    def subset(self, n: int) -> Samples:
        """``n`` rows, always the same random ones (files are often sorted); all where there are no more."""
        if n >= self.num_rows:
            return self
        which = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(0))[:n]
        labels = None if self.labels is None else self.labels[which]
        return replace(self, values=self.values[which], labels=labels)

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
        which = torch.randint(self.num_rows, (batch,), generator=generator)
        return self.rows(which), self.labels[which]

    def chunks(self, length: int) -> tuple[Tensor, None]:
        """All rows in order, ``(n, dim)``, stored as they are: `rows` gives some of them to compute with.

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
        checksum: of the values of all splits as they are here: a result can say what it was measured on.
        unit: in which a result is told: "bits a dimension", or "bits" of a whole row.
        classes: number of labels, 0 where there are none.
        sources: names of the files that each split is taken from, where they are the user's.
        notes: sentences on how they were read.
        pooled: whether the test split is a share that was dealt, and no data of its own.
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
        parts = [self.train, self.valid, self.test]
        labels = [part.labels for part in parts if part.labels is not None]
        values = torch.cat([part.values for part in parts])
        return Samples(splits.ALL, values, self.train.what, torch.cat(labels) if labels else None)

    def about(self) -> dict[str, Any]:
        """What was dealt, as plain values: of each split its rows and files; and the notes."""
        parts = {}
        for name in SPLITS:
            samples: Samples = getattr(self, name)
            parts[name] = {samples.what: samples.num_rows, "files": list(self.sources.get(name, ()))}
        return {
            "name": self.name,
            "checksum": self.checksum,
            "splits": parts,
            "notes": list(self.notes),
        }


def load_images(config: ImageConfig, partial: bool = False) -> ImageSet:
    """Read and split the images or the table that ``config`` names.

    Args:
        config: names them.
        partial: whether the shares for validation and test may come to no row: whoever scores all rows
            needs none.

    Raises:
        InputError: Nothing of that name, damaged files, images of unequal sizes, more than 8 bits a value,
            settings that do not go together, missing values in a table, another checksum than the config's.
    """
    try:
        found = _load(config, partial, _arrange)
        files.check_same(config.name, found.checksum, config.checksum)
    except InputError:
        before = _load_before(config, partial)
        if before is None:
            raise
        return before
    return found


def _load_before(config: ImageConfig, partial: bool) -> ImageSet | None:
    """A folder or table as version 0.1.0 read it, if the checksum that a model keeps is that reading's."""
    if config.checksum is None or not config.is_path:
        return None
    try:
        path = _path(config)
        if not tables.is_table(path) or path.is_dir():
            found = _load(config, partial, _arrange_before)
        else:
            found = _table(path, config, partial, whole=True)
    except InputError:
        return None
    return found if found.checksum == config.checksum else None


def _load(config: ImageConfig, partial: bool, arrange: Callable[[Path], Arranged]) -> ImageSet:
    if config.name == CHECKERBOARD:
        config.refuse(
            "drawn", "folder", "bits", "patch", "crop", "tiles", "grey", "flip", "valid", "test", "continuous"
        )
        # Rows drawn from two points are draws from the law; an evaluation on both is an exact expectation.
        both = np.array([[0, 1], [1, 0]], dtype=np.uint8)
        return _image_set(
            config.name,
            (2, 1, 1),
            2,
            0,
            [both] * 3,
            "equally likely rows",
            image_sets.CHECKERBOARD_NOTE,
            unit="bits",
        )
    known = image_sets.KNOWN.get(config.name)
    if known is not None:
        config.refuse("a known set", "crop", "tiles", "valid", "test", "continuous")
        return _pictures(known.read(files.data_folder(config.folder)), config, known.note)
    if config.name.startswith(HUB):
        config.refuse("a set of images", "continuous", "folder")
        return _pictures(*_from_hub(config, partial))
    path = _path(config)
    if tables.is_table(path) and path.is_file():
        config.refuse("a table", "bits", "patch", "crop", "tiles", "grey", "flip")
        return _table(path, config, partial)
    config.refuse("a folder of images", "continuous")
    if not path.is_dir():
        raise InputError(f"{path}: neither a folder of images nor a .csv table (or .tsv); name one of these")
    found = arrange(path)
    sources = {split: [(str(p), p) for p in paths] for split, paths in found.parts.items()}
    pixels, config, note = _own(sources, config, partial)
    names = {
        split: tuple(found.name(Path(where)) for where in files) for split, files in pixels.sources.items()
    }
    return _pictures(replace(pixels, sources=names, notes=(*found.notes, *pixels.notes)), config, note)


def _arrange(path: Path) -> Arranged:
    """The images of a folder, by the splits that their names tell."""
    found = splits.arrange(path, lambda p, _: p.suffix.lower() in _SUFFIXES)
    if not found.parts:
        raise InputError(
            f"{path}: the folder holds no image ({', '.join(sorted(_SUFFIXES))}); put them there. "
            + " ".join(found.notes)
        )
    return found


def _arrange_before(path: Path) -> Arranged:
    """The same as version 0.1.0 had it: folders ``train``, ``valid`` and ``test``, else one pool."""
    sources = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES_BEFORE and p.is_file())
    parts: dict[str, list[Path]] = {}
    for source in sources:
        parts.setdefault(source.relative_to(path).parts[0], []).append(source)
    named = "train" in parts and len(parts) > 1 and parts.keys() <= set(SPLITS)
    ordered = {name: parts[name] for name in SPLITS if name in parts} if named else {"train": sources}
    return Arranged(path, ordered, named, (splits.BEFORE,))


def _path(config: ImageConfig) -> Path:
    path = files.expanded(config.name)
    if not files.exists(path) and (folder := files.data_folder(config.folder)):
        path = folder / config.name
    if not files.exists(path):
        if config.name in (sets.PYDOC, *sets.KNOWN) or synthetic.is_law(config.name):
            raise InputError(
                f"{config.name}: a text, and this is a model of images or tables; use a model.family of text"
            )
        if config.checksum is not None:
            raise files.gone(config.name, config.checksum)
        raise InputError(
            f"{config.name}: neither a set of images nor a folder or table; "
            + nearest(config.name, [CHECKERBOARD, *image_sets.KNOWN])
        )
    return path


# -- known sets, folders, the hub ------------------------------------------------------------------------


def _pictures(pixels: Pixels, config: ImageConfig, note: str) -> ImageSet:
    """Grey, patch and bits, of any images."""
    bits = pixels.depth if config.bits is None else config.bits
    if bits > pixels.depth:
        raise InputError(
            f"bits={bits}: {config.name} has {pixels.depth} bits a value; set bits to at most that"
        )
    parts = []
    whole = () if pixels.whole is None else (pixels.whole,)
    for part in (pixels.train, pixels.valid, pixels.test, *whole):
        images = grey(part) if config.grey else part
        if config.patch:
            images = _centre(images, config.patch, "patch", config.name)
        parts.append(images >> (pixels.depth - bits))
    _, C, H, W = parts[0].shape
    values = [part.reshape(len(part), C * H * W) for part in parts]
    dealt = _image_set(
        config.name,
        (C, H, W),
        1 << bits,
        0,
        values[: len(SPLITS)],
        "images",
        note,
        labels=pixels.labels,
        pooled=pixels.pooled,
    )
    all_rows = [Samples(splits.ALL, _tensor(part)) for part in values[len(SPLITS) :]]
    return replace(
        dealt,
        sources=pixels.sources,
        notes=(*pixels.notes, *dealt.notes),
        whole=all_rows[0] if all_rows else None,
    )


def grey(images: Array) -> Array:
    """Shades of grey ``(..., 1, H, W)`` of colours ``(..., 3, H, W)``: 0.299 R + 0.587 G + 0.114 B, rounded.

    >>> grey(np.array([255, 0, 0], dtype=np.uint8).reshape(3, 1, 1)).item()
    76
    """
    if images.shape[-3] == 1:
        return images
    weights = np.array([299, 587, 114], dtype=np.uint32).reshape(3, 1, 1)
    # In pieces: the sums take four times the room of the colours.
    flat = images.reshape(-1, *images.shape[-3:])
    out = np.empty((len(flat), 1, *images.shape[-2:]), dtype=np.uint8)
    for start in range(0, len(flat), 1024):
        piece = flat[start : start + 1024]
        out[start : start + 1024] = ((piece * weights).sum(1, keepdims=True) + 500) // 1000
    return out.reshape(*images.shape[:-3], 1, *images.shape[-2:])


def _centre(images: Array, size: Sequence[int], setting: str, where: str) -> Array:
    (H, W), (h, w) = images.shape[-2:], size
    if h > H or w > W:
        raise InputError(
            f"{setting}={list(size)} is larger than {where}, which has {H} x {W} pixels; set it lower"
        )
    top, left = (H - h) // 2, (W - w) // 2
    return images[..., top : top + h, left : left + w]


def _tiles(image: Array, size: Sequence[int] | None, overlap: bool) -> Array:
    """Tiles ``(n, C, h, w)`` of an image ``(C, H, W)``: all whole ones, or the image itself."""
    if size is None:
        return image[None]
    steps = [max(1, n // 2) if overlap else n for n in size]
    found = np.lib.stride_tricks.sliding_window_view(image, size, (1, 2))[:, :: steps[0], :: steps[1]]
    return found.transpose(1, 2, 0, 3, 4).reshape(-1, len(image), *size)


def _decode(where: str, source: Path | bytes) -> tuple[Array, int, bool]:
    """An image file as uint8 ``(C, H, W)``, C of 1 or 3, its depth (1 or 8 bits), whether it was turned."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    stored = formats.read(data, where, f"{formats.WAY} of 8 bits")
    if stored.depth > 8:
        raise InputError(f"{where}: more than 8 bits a value; convert the image to 8 bits")
    # An alpha channel that is the same everywhere says nothing.
    if stored.alpha is not None and np.ptp(stored.alpha):
        raise InputError(
            f"{where}: partly transparent; lay the image on a background, for example by ImageMagick: "
            "mogrify -background white -alpha remove -alpha off FILE"
        )
    values = formats.turned(stored.values, stored.layout.orientation).transpose(2, 0, 1)
    if 1 < stored.depth < 8:
        values = values * np.uint8(255 // ((1 << stored.depth) - 1))
    return values, 1 if stored.depth == 1 else 8, stored.layout.orientation != 1


def _own(
    sources: Mapping[str, Iterable[tuple[str, Path | bytes]]], config: ImageConfig, partial: bool
) -> tuple[Pixels, ImageConfig, str]:
    """Image files by split; a split that is missing is dealt from the rows to train on."""
    images: list[Array] = []
    depths: list[int] = []
    counts: dict[str, int] = {}
    all_sources: list[tuple[str, Path | bytes]] = []
    first, num_turned = "", 0
    for split, pairs in sources.items():
        before = len(images)
        for where, source in pairs:
            image, depth, turned = _decode(where, source)
            num_turned += turned
            if config.grey:
                image = grey(image)
            if config.crop:
                # A copy: a view would keep the whole image in memory.
                image = _centre(image, config.crop, "crop", where).copy()
            if config.tiles and (image.shape[1] < config.tiles[0] or image.shape[2] < config.tiles[1]):
                raise InputError(
                    f"tiles={config.tiles} are larger than {where}, which has {image.shape[1]} x "
                    f"{image.shape[2]} pixels; set them smaller"
                )
            first = first or where
            alike = slice(1 if config.tiles else 3)
            if images and image.shape[alike] != images[0].shape[alike]:
                (c, h, w), (C, H, W) = image.shape, images[0].shape
                ways = ["set data.grey to true, or turn all into colours"] * (c != C)
                ways += ["set data.crop to [height, width] to cut each at its centre"] * (
                    (h, w) != (H, W) and not config.tiles
                )
                way = ", and ".join(ways)
                raise InputError(
                    f"images of unequal sizes: {first} has {H} x {W} pixels in {C} channels, {where} "
                    f"{h} x {w} in {c}; {way}"
                )
            images.append(image)
            depths.append(depth)
            all_sources.append((where, source))
        counts[split] = len(images) - before
        if not counts[split]:
            raise InputError(f"{config.name}: the {split} split is empty; choose data that have some")
    depth = max(depths, default=8)
    for i, own in enumerate(depths):
        if own < depth:
            images[i] = images[i] * np.uint8(255)
    # Whole images are dealt: tiles of one may not lie in two splits.
    numbers = np.split(np.arange(len(images)), np.cumsum([*counts.values()])[:-1])
    dealt, note = _deal(dict(zip(counts, numbers, strict=True)), config, partial)
    if num_turned:
        turn = f"{num_turned:,} images turned as their EXIF orientation says"
        note = f"{note}; {turn}" if note else turn
    # A split may be empty, and has the shape of the others.
    none = _tiles(images[0], config.tiles, False)[:0]
    parts = {
        name: np.concatenate([none, *(_tiles(images[i], config.tiles, name == "train") for i in which)])
        for name, which in dealt.items()
    }
    whole = None
    if config.tiles:
        whole = np.concatenate([_tiles(images[i], config.tiles, False) for n in SPLITS for i in dealt[n]])
    each = {name: [all_sources[i] for i in dealt[name]] for name in SPLITS}
    pixels = Pixels(
        parts["train"],
        parts["valid"],
        parts["test"],
        depth,
        sources={name: tuple(where for where, _ in pairs) for name, pairs in each.items()},
        notes=tuple(splits.repeated(each)),
        pooled="test" not in counts,
        whole=whole,
    )
    return pixels, config, note


def _deal(parts: dict[str, Array], config: ImageConfig, partial: bool) -> tuple[dict[str, Array], str]:
    """The three splits: those missing are taken from the rows to train on, by a fixed shuffle.

    A file is often sorted, so that its last rows are unlike the others. The shuffle is that of a hash, which
    no version of a library changes; rows keep their order within a split.
    """
    shares = dict(zip(("valid", "test"), config.shares, strict=True))
    for name in shares.keys() & parts.keys():
        if getattr(config, name) is not None:
            raise InputError(f"{config.name} has a split of its own for {name}: leave {name} out")
    missing = {name: share for name, share in shares.items() if name not in parts}
    if not missing:
        return parts, ""
    rows = parts["train"]
    order = np.array(
        sorted(range(len(rows)), key=lambda i: hashlib.sha256(b"%d" % i).digest()), dtype=np.int64
    )
    dealt, start = dict(parts), 0
    for name, share in missing.items():
        stop = start + int(len(rows) * share)
        dealt[name] = rows[np.sort(order[start:stop])]
        start = stop
    dealt["train"] = rows[np.sort(order[start:])]
    if not partial and not all(len(part) for part in dealt.values()):
        asked = " and ".join(f"{name}={share}" for name, share in missing.items())
        raise InputError(
            f"{config.name}: {len(rows)} rows are too few for {asked}; give more data, or larger shares"
        )
    return dealt, f"{' and '.join(missing)} dealt from the rows to train on by a fixed shuffle"


def _from_hub(config: ImageConfig, partial: bool) -> tuple[Pixels, ImageConfig, str]:
    repository = config.name.removeprefix(HUB)
    if repository.count("/") != 1:
        raise InputError(f"{config.name}: name a data set of the hub as {HUB}OWNER/NAME")
    names = {"train": "train", "validation": "valid", "valid": "valid", "val": "valid", "test": "test"}

    def files_of(split: Any, name: str, column: str) -> Iterator[tuple[str, bytes]]:
        for i, row in enumerate(split.select_columns([column])):
            cell = row[column]
            where = f"{config.name}, {name} row {i}"
            if cell is None or not (cell["bytes"] or cell["path"]):
                raise InputError(f"{where}: has no image; choose a data set without gaps")
            yield where, cell["bytes"] or Path(cell["path"]).read_bytes()

    def read(of_hub: Any) -> tuple[Pixels, ImageConfig, str]:
        from datasets import Image as Feature

        # Splits of other names are neither trained on nor scored.
        found = {names[name]: split for name, split in of_hub.items() if name in names}
        if "train" not in found:
            raise InputError(f"{config.name}: has no split to train on, only {', '.join(of_hub)}")
        # In the order of training, validation and test, whatever the hub's.
        found = {name: found[name] for name in SPLITS if name in found}
        columns = [name for name, kind in found["train"].features.items() if isinstance(kind, Feature)]
        if len(columns) != 1:
            raise InputError(
                f"{config.name}: needs one column of images, found {columns or 'none'} among "
                f"{', '.join(found['train'].features)}"
            )
        [column] = columns
        undecoded = {name: split.cast_column(column, Feature(decode=False)) for name, split in found.items()}
        return _own(
            {name: files_of(split, name, column) for name, split in undecoded.items()}, config, partial
        )

    return from_hub(config.name, "the images as files", repository, read)


# -- tables ----------------------------------------------------------------------------------------------


def _table(path: Path, config: ImageConfig, partial: bool, whole: bool = False) -> ImageSet:
    table = tables.read(path, config.continuous, whole)
    dealt, note = _deal({"train": table.values}, config, partial)
    low, high = table.values.min(0), table.values.max(0)
    discrete = [not real for real in table.real]
    lowest = tuple(int(value) if d else None for d, value in zip(discrete, low, strict=True))
    levels = tuple(int(size) if d else None for d, size in zip(discrete, high - low + 1, strict=True))
    values = [dealt[name] for name in SPLITS]
    units = tables.units(path, table, dealt["train"])
    if not any(table.real):
        kinds = (np.uint8, np.int16, np.int32)
        kind = next(k for k in kinds if np.iinfo(k).min <= low.min() and high.max() <= np.iinfo(k).max)
        values = [part.astype(kind) for part in values]
    shape = (len(table.columns), 1, 1)
    notes = "; ".join(filter(None, (note, table.note, units.note)))
    images = _image_set(
        config.name, shape, levels, lowest, values, "rows", notes, columns=table.columns, pooled=True
    )
    return replace(images, loc=units.loc, scale=units.scale, unfit=units.unfit) if any(table.real) else images


def _image_set(
    name: str,
    shape: tuple[int, int, int],
    levels: int | tuple[int | None, ...],
    lowest: int | tuple[int | None, ...],
    values: Sequence[Array],
    what: str,
    note: str,
    columns: tuple[str, ...] | None = None,
    unit: str = "bits a dimension",
    labels: Sequence[Array] | None = None,
    pooled: bool = False,
) -> ImageSet:
    digest = hashlib.sha256(repr((shape, levels, columns)).encode())
    samples = []
    known: Sequence[Array | None] = labels or [None] * len(SPLITS)
    for split, part, own in zip(SPLITS, values, known, strict=True):
        digest.update(part.tobytes())
        labelled = None if own is None else torch.from_numpy(own.astype(np.int64))
        samples.append(Samples(split, _tensor(part), what, labelled))
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
        unit=unit,
        classes=1 + max(int(part.max()) for part in labels) if labels else 0,
        notes=(f"{note[0].upper()}{note[1:]}.",) if note else (),
        pooled=pooled,
    )


def _tensor(values: Array) -> Tensor:
    """As a tensor: a copy where the array cannot be written to, since torch would share it."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
