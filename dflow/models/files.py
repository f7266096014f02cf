"""The files of a model folder: what it is called, which files there are, and whether they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from dflow import shipped
from dflow.config import InputError
from dflow.models.counts import COUNTS
from dflow.models.manifest import verify

#: File of the coding tables.
TABLES = "coding.safetensors"

#: Files beside the weights that belong to a model: its vocabulary, and its coding tables.
COMPANIONS = ("vocabulary.json", "tokenizer.model", TABLES)

WEIGHTS = "model.safetensors"
#: Where weights are in several files: the list of the weights in each.
INDEX = WEIGHTS + ".index.json"

#: Names of the kinds of models, by the model type in `config.json`.
KINDS = {
    "dflow": "text",
    "dflow-image": "images or tables",
    "dflow-classifier": "labels of images",
}

#: Largest size of a config in bytes. A config has a few thousand; larger files are not read into memory.
_CONFIG = 1 << 20


class Foreign(InputError):
    """A model of another program."""


def split_calls(name: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The folder and the number of calls of ``FOLDER`` or ``FOLDER@CALLS``.

    ``FOLDER`` may also be the name of a model that comes with dflow, where no folder is called so.

    >>> split_calls("runs/grouped@8")
    (PosixPath('runs/grouped'), 8)
    """
    text = os.fspath(name)
    folder, at, calls = text.rpartition("@")
    if at and calls.isdigit() and not Path(text).exists():
        return _place(folder), int(calls)
    return _place(text), None


def _place(name: str) -> Path:
    """The folder of a name: one in the working directory, else that of a model that comes with dflow."""
    return shipped.folder_of(name) if name in shipped.names() and not Path(name).exists() else Path(name)


def config_of(path: Path) -> dict[str, Any]:
    """What the ``config.json`` of the model in the folder ``path`` says, of which the type is known.

    Raises:
        InputError: no such folder, no model; `Foreign` where it is one of another program.
    """
    if not path.is_dir():
        if path.exists():
            raise InputError(
                f"{path}: a file, not the folder of a model; give the output folder of `dflow train`"
            )
        names = shipped.names()
        coming = f", or the name of a model that comes with dflow ({', '.join(names)})" if names else ""
        raise InputError(f"{path}: no such folder; give the output folder of `dflow train`{coming}")
    file = path / "config.json"
    try:
        if file.stat().st_size > _CONFIG:
            raise ValueError(f"{file.stat().st_size:,} bytes, more than {_CONFIG:,}")
        values: dict[str, Any] = json.loads(file.read_bytes())
        kind = values.get("model_type")
    except FileNotFoundError:
        if (path / "recipe.yaml").is_file():
            raise InputError(
                f"{path}: no model yet, the training was stopped before its first evaluation; go on with "
                f"`dflow train {path / 'recipe.yaml'} --output {path} --resume`"
            ) from None
        raise InputError(
            f"{path}: not a model (no config.json); give the output folder of `dflow train`"
        ) from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: truncated or not a config ({error}); restore the file") from None
    if not isinstance(kind, str) or kind not in KINDS:
        raise Foreign(f"{file}: a model of type {kind!r}, not of dflow; give a folder that dflow trained")
    return values


def model_type(name: str | os.PathLike[str]) -> str:
    """The type of the model of a name, a key of `KINDS`, without loading it.

    Raises:
        InputError: see `config_of`.
    """
    return str(config_of(split_calls(name)[0])["model_type"])


def verified(folder: Path, weights: list[Path]) -> int:
    """The bytes of the weights and of the counts beside them, once all files are found to be undamaged."""
    counts = folder / COUNTS
    stored = [*weights, counts] if counts.is_file() else weights
    verify(folder, ["config.json", *(file.name for file in stored), *COMPANIONS])
    return sum(file.stat().st_size for file in stored)


@contextmanager
def loading(folder: Path, weights: list[Path]) -> Iterator[None]:
    """Within it errors become those of the files of a model folder.

    Raises:
        InputError: the file that is truncated or damaged, or does not go with the others.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    except (SafetensorError, EOFError) as error:
        raise InputError(f"{_damaged(weights)}: truncated or damaged ({error}); restore the file") from None
    except Exception as error:
        # Libraries raise many types of errors for invalid settings.
        what = f"{error or type(error).__name__}"
        raise InputError(f"{folder}: the checkpoint does not fit its config.json ({what[:500]})") from error


def check_keys(source: str | os.PathLike[str], other: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model, by the names of weights that it lacks or has beside the model's.

    Args:
        source: folder of the model, or its name on the hub.
        other: names under ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``.

    Raises:
        InputError: some of these.
    """
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if other.get(what):
            names = ", ".join(str(k) for k in sorted(other[what], key=str)[:3])
            raise InputError(
                f"{os.fspath(source)}: the checkpoint is foreign to its config.json: "
                f"{what.replace('_', ' ')} {names}; restore both files from one run"
            )


def check_finite(file: Path, model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        InputError: it names the file of the weights and the first of these.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(
                f"{file}: {name} holds values that are not finite, so its training diverged or the "
                "file is damaged; restore the file, or train again with a lower train.learning_rate"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the model in ``folder``; an index of them comes first.

    Raises:
        InputError: weights are missing, also some that the index lists; an invalid index.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder}: no {WEIGHTS}; the checkpoint is incomplete, restore or retrain it")
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not shards or any(Path(name).name != name or name == INDEX for name in shards):
            raise ValueError("files that do not lie beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: truncated or no index of weights ({error}); restore the file") from None
    for name in shards:
        if not (folder / name).is_file():
            raise InputError(
                f"{folder}: no {name}, a file of weights that {INDEX} lists; the checkpoint is incomplete, "
                "restore or retrain it"
            )
    return [index, *(folder / name for name in shards)]


def _damaged(weights: list[Path]) -> Path:
    """The first of the files that cannot be opened."""
    for file in weights:
        try:
            if file.name != INDEX:
                with safe_open(file, "pt"):
                    pass
        except (SafetensorError, OSError):
            return file
    return weights[-1]
