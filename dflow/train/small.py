"""Small copies of models: weights in float16 and fewer digits, counts without their hashes."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from dflow import hf, shipped
from dflow.config import InputError
from dflow.data import dealt
from dflow.models import counts
from dflow.models.files import TABLES
from dflow.train.recipe import METRICS, RECIPE, load_recipe

#: Binary digits of a number in float16, the first of which is 1 and is not stored.
DIGITS = torch.finfo(torch.float16).bits - 5
#: Files of a training that are copied with the model.
_COPIED = (METRICS, dealt.DEALT)


@dataclass(frozen=True)
class Size:
    """Bytes of a model's files, as they lie in the folder and as a zip file (a wheel) holds them."""

    weights: int
    counts: int
    whole: int
    zipped: int


def compact(source: str | os.PathLike[str], output: str | os.PathLike[str], digits: int = DIGITS) -> Size:
    """Write a small copy of a model into a folder of its own.

    Weights are stored in float16, and are computed with in float32 as before. Of matrices only the first
    ``digits`` binary digits are kept: what is left out takes its place in the folder, and hardly any in a zip
    file. Counts are the same, packed (`dflow.models.packed_counts`).

    Args:
        source: folder of the model, or its name.
        output: folder to write, which has no files yet.
        digits: from 2 to `DIGITS`.

    Raises:
        InputError: an argument outside its range, a folder with files, or weights too large for float16.
    """
    path, calls = hf.split_calls(source)
    if calls is not None:
        raise InputError(f"{source}: all numbers of calls have the same weights; leave out @{calls}")
    if not 2 <= digits <= DIGITS:
        raise InputError(f"digits {digits}: give 2 to {DIGITS}, which is all of float16")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is there already, and stays; name a folder that is new or empty")
    model = hf.load(path, kind=hf.kind_of(path))  # type: ignore[type-var]
    model.companions = {name: data for name, data in model.companions.items() if name != TABLES}
    with tempfile.TemporaryDirectory() as scratch, hf.replacing(folder) as temporary:
        hf.save(model, scratch, _rounded(model, digits))
        counts.save(model, Path(scratch), pack=True)
        for file in Path(scratch).iterdir():
            if file.name not in (hf.MANIFEST, shipped.CARD):
                shutil.copyfile(file, temporary / file.name)
        for name in _COPIED:
            if (path / name).is_file():
                shutil.copyfile(path / name, temporary / name)
        if (path / RECIPE).is_file():
            text = yaml.safe_dump(_portable(path / RECIPE), sort_keys=False)
            (temporary / RECIPE).write_text(text, encoding="utf-8")
    if (path / shipped.CARD).is_file():
        # Users change it, so that it is none of the files that are checked.
        shutil.copyfile(path / shipped.CARD, folder / shipped.CARD)
    return size_of(folder)


def size_of(folder: Path) -> Size:
    """The sizes of a model's files."""
    files = [file for file in folder.iterdir() if file.is_file()]
    sizes = {file.name: file.stat().st_size for file in files}
    return Size(
        sum(size for name, size in sizes.items() if name.startswith("model")),
        sizes.get(counts.COUNTS, 0),
        sum(sizes.values()),
        sum(len(zlib.compress(file.read_bytes(), 9)) for file in files),
    )


def _rounded(model: nn.Module, digits: int) -> dict[str, Tensor]:
    """The state of a model with its weights in float16, those of matrices to so many digits."""
    weights = {id(p) for p in model.parameters()}
    rounded: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if id(tensor) in weights and id(tensor) not in rounded:
            fraction, exponent = torch.frexp(tensor.detach())
            if tensor.ndim > 1:
                fraction = (fraction * 2**digits).round() / 2**digits
            rounded[id(tensor)] = torch.ldexp(fraction, exponent).half()
            if not bool(rounded[id(tensor)].isfinite().all()):
                raise InputError(f"{name}: has weights beyond 65504, the largest number of float16")
    # Weights under two names stay one.
    return {name: rounded.get(id(tensor), tensor.detach()) for name, tensor in state.items()}


def _portable(file: Path) -> dict[str, object]:
    """A recipe without the places on this machine at which known data and the trained folder lie."""
    recipe = load_recipe(file)
    if not recipe.data.is_path:
        recipe = replace(recipe, data=replace(recipe.data, folder=None))
    if recipe.output.is_absolute():
        recipe = replace(recipe, output=Path(recipe.output.name))
    return recipe.as_dict()
