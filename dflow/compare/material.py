"""What codecs are compared on, from files and from data sets, and dflow models as codecs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dflow import hf
from dflow.compare.codecs import CodecMaterial, pictures, texts
from dflow.compare.peers import Array
from dflow.compare.runner import CodecClock, ModelCodec
from dflow.compress import (
    TextCoder,
    compress_images,
    compress_text,
    decompress_images,
    decompress_text,
    load_image_coder,
)
from dflow.compress import clock as clocks
from dflow.compress.pixels import read
from dflow.config import InputError
from dflow.data import Bytes, DataConfig, ImageConfig, image_sets, load, load_images, splits
from dflow.data.formats import SUFFIXES, png
from dflow.data.known import HUB

#: Files that hold pictures; all others are texts.
_PICTURES = SUFFIXES | {".npy"}


def of_files(paths: Sequence[Path], limit: int | None = None) -> CodecMaterial[Array] | CodecMaterial[bytes]:
    """Pictures and arrays, or texts; of pictures the first ``limit``, of each text as many bytes.

    Raises:
        InputError: no files, pictures and texts together, or pictures that cannot be read exactly.
        OSError: no such file.
    """
    if not paths:
        raise InputError(
            "name files to compress (before --model, to which all words after it belong), or a set by --data"
        )
    _check_limit(limit)
    kinds = {path.suffix.lower() in _PICTURES for path in paths}
    if len(kinds) > 1:
        raise InputError("compare pictures and texts one after the other, not in one table")
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1:,} more files"
    if kinds == {False}:
        return texts(name, [path.read_bytes()[:limit] for path in paths])
    read_pictures = [read(path) for path in paths]
    if any(picture.form.alpha == -1 for picture in read_pictures):
        raise InputError(f"{name}: partly transparent; codecs are compared on grey and RGB")
    items = [_flat(values) for picture in read_pictures for values in picture.values]
    depths = {picture.form.file_depth for picture in read_pictures}
    return pictures(name, items[:limit], max(depths))


def of_data(
    name: str, split: str, folder: str | None = None, limit: int | None = None
) -> CodecMaterial[Array] | CodecMaterial[bytes]:
    """A split of a data set, or all of it.

    Of images ``limit`` random ones, of a text as many characters from its start.

    Raises:
        InputError: as of `dflow.data.load` and `load_images`.
    """
    _check_limit(limit)
    if holds_images(name):
        data_set = load_images(ImageConfig(name, folder=folder), partial=True)
        if not isinstance(data_set.levels, int):
            raise InputError(f"{name}: a table; codecs are compared on pictures and texts")
        rows = data_set.split(split)
        values = (rows if limit is None else rows.subset(limit)).values.numpy()
        stack = values.reshape(-1, *data_set.shape).transpose(0, 2, 3, 1)
        depth = (data_set.levels - 1).bit_length()
        return pictures(f"{name}, {split}", [_flat(item) for item in stack], depth)
    config = DataConfig(name, folder=folder)
    if config.law() is not None:
        raise InputError(f"{name}: a law; codecs are compared on pictures and texts")
    corpus = load(config, Bytes())
    text = corpus.tokenizer.decode(corpus.split(split).ids)
    return texts(f"{name}, {split}", [text[:limit].encode()])


def priming(prime: str, data: str | None, folder: str | None) -> bytes:
    """The text that codecs are primed with: that of a file, or with "train" the training part of a data set.

    Raises:
        InputError: "train" without a data set, or an empty text.
        OSError: no such file.
    """
    if prime != "train":
        text = Path(prime).expanduser().read_bytes()
    elif data is None or holds_images(data):
        raise InputError("--prime train is the training part of a text in --data; name a file to prime with")
    else:
        text = b"".join(map(bytes, of_data(data, "train", folder).items))
    if not text:
        raise InputError(f"--prime {prime}: an empty text")
    return text


def holds_images(name: str) -> bool:
    """Whether a name is that of images, not of a text."""
    path = Path(name).expanduser()
    return (
        name in image_sets.KNOWN
        or name == image_sets.CHECKERBOARD
        or name.startswith(HUB)
        or (path.is_dir() and not splits.holds_text(path))
    )


def image_model(folder: str, mode: str) -> ModelCodec[Array]:
    """An integer flow, or a dequantized one by local bits-back, as a codec of pictures.

    Raises:
        InputError: as of `load_image_coder`.
    """
    # A file for each item shows what it takes, even where that is more than the values.
    coder, clock = replace(load_image_coder(folder, mode), larger=True), CodecClock()

    def encode(items: Sequence[Array]) -> bytes:
        with tempfile.TemporaryDirectory() as place:
            data, report = compress_images(_files(items, Path(place)), coder, verify=False)
        clock.add(report.encode)
        clock.auxiliary += report.auxiliary
        return data

    def decode(data: bytes) -> list[Array]:
        restored = decompress_images(data, coder, limit=1 << 62)
        clock.add(restored.clock)
        return [_flat(values) for picture in restored.pictures for values in picture.values]

    again = partial(image_model, folder, mode)
    return ModelCodec(folder.rstrip("/"), mode, _size(folder), encode, decode, clock, again)


def text_model(folder: str) -> ModelCodec[bytes]:
    """A model of text as a codec.

    Raises:
        InputError: as of `TextCoder.load`.
    """
    coder, clock = TextCoder.load(folder), CodecClock()

    def encode(items: Sequence[bytes]) -> bytes:
        data, report = compress_text({str(i): item for i, item in enumerate(items)}, coder, verify=False)
        clock.add(report.encode)
        return data

    def decode(data: bytes) -> list[bytes]:
        with clocks.clock(coder.law) as seconds:
            files = decompress_text(data, coder, limit=1 << 62)
        clock.add(seconds)
        return list(files.values())

    again = partial(text_model, folder)
    return ModelCodec(folder.rstrip("/"), "float64", _size(folder), encode, decode, clock, again)


def _files(items: Sequence[Array], place: Path) -> list[Path]:
    """Files of ``items``: one array of all where they are many of one shape."""
    if len(items) > 1 and len({(item.shape, item.dtype.str) for item in items}) == 1:
        stack = np.stack(items)
        # With four axes, so that narrow grey pictures are not taken for channels.
        np.save(place / "0.npy", stack if stack.ndim == 4 else stack[..., None])
        return [place / "0.npy"]
    paths = [place / f"{i}.png" for i in range(len(items))]
    for path, item in zip(paths, items, strict=True):
        path.write_bytes(png.write(item if item.ndim == 3 else item[..., None], 8 * item.itemsize))
    return paths


def _flat(values: Array) -> Array:
    """``(H, W)`` of one channel, else ``(H, W, C)``."""
    return values[..., 0] if values.shape[-1] == 1 else values


def _size(folder: str) -> int:
    """Bytes of what decodes beside the program: weights, and tables where there are."""
    path = hf.split_calls(folder)[0]
    # A state of training, which is there where the model was trained, decodes nothing.
    return sum(f.stat().st_size for f in path.glob("*.safetensors") if not f.name.startswith("state"))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} must be at least 1")
