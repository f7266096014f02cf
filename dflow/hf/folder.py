"""Model folders: each is saved completely or not at all, and loaded strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from dflow.coding import fingerprint, frozen_tables
from dflow.config import InputError
from dflow.core import Distribution
from dflow.hf.binary import DflowClassifier
from dflow.hf.counts import COUNTS
from dflow.hf.images import DflowImageModel
from dflow.hf.limits import AllocationLimit
from dflow.hf.manifest import replacing, verify
from dflow.hf.pretrained import COMPANIONS, INDEX, TABLES, WEIGHTS
from dflow.hf.symbols import DflowModel

M = TypeVar("M", DflowModel, DflowImageModel, DflowClassifier)
ModelClass = type[DflowModel] | type[DflowImageModel] | type[DflowClassifier]

#: Names of the kinds of models, and their classes, by the model type in `config.json`.
_KINDS: dict[str, tuple[str, ModelClass]] = {
    "dflow": ("text", DflowModel),
    "dflow-image": ("images or tables", DflowImageModel),
    "dflow-classifier": ("labels of images", DflowClassifier),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and messages of transformers, which would bury those of the training."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


#: Largest size of a config in bytes. A config has a few thousand; larger files are not read into memory.
_CONFIG = 1 << 20


def save(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """`save_pretrained` without messages: every file is replaced completely or not at all."""
    with _quiet():
        model.save_pretrained(folder)


def kind_of(folder: str | os.PathLike[str]) -> ModelClass:
    """The class of the model in ``folder``.

    Raises:
        InputError: no such folder, not a model of dflow.
    """
    path, _ = split_calls(folder)
    if not path.is_dir():
        what = "a file, not the folder of a model" if path.exists() else "no such folder"
        raise InputError(f"{path}: {what}; give the output folder of `dflow train`")
    file = path / "config.json"
    try:
        if file.stat().st_size > _CONFIG:
            raise ValueError(f"{file.stat().st_size:,} bytes, more than {_CONFIG:,}")
        kind = json.loads(file.read_bytes()).get("model_type")
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
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"{file}: a model of type {kind!r}, not of dflow; give a folder that dflow trained")
    return _KINDS[kind][1]


def load(
    folder: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    kind: type[M] = DflowModel,  # type: ignore[assignment]
) -> M:
    """The model in ``folder``, in evaluation mode; ``FOLDER@8`` is a model of text that draws in 8 calls.

    Args:
        folder: written by `save`.
        device: device of the model.
        kind: `DflowModel`, `DflowImageModel` or `DflowClassifier`.

    Raises:
        InputError: no such folder, no model of dflow, one of another kind, or truncated or foreign files.
    """
    path, calls = split_calls(folder)
    actual = kind_of(folder)
    if actual is not kind:
        names_of_kinds = {cls: name for name, cls in _KINDS.values()}
        raise InputError(
            f"{path}: a model of {names_of_kinds[actual]}; this takes a model of {names_of_kinds[kind]}"
        )
    file = path / "config.json"
    weights: list[Path] = weight_files(path)
    num_bytes = _verified(path, weights)
    try:
        config = kind.config_class.from_pretrained(path)
        config.settings()
        # Settings that belong to other weights may ask for any amount of memory.
        with AllocationLimit(num_bytes), _quiet():
            model: Any = kind.from_pretrained(path, config=config)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (SafetensorError, EOFError) as error:
        raise InputError(f"{_damaged(weights)}: truncated or damaged ({error}); restore the file") from None
    except Exception as error:
        # Libraries raise many types of errors for invalid settings.
        what = f"{error or type(error).__name__}"
        raise InputError(f"{path}: the checkpoint does not fit its config.json ({what[:500]})") from error
    _check_finite(model, weights[0])
    loaded: M = model.to(device).eval()
    if calls is not None:
        if not isinstance(loaded, DflowModel):
            raise InputError(
                f"{folder}: only a model of text is drawn in a number of calls; leave out @{calls}"
            )
        return loaded.at(calls)
    return loaded


def _verified(folder: Path, weights: list[Path]) -> int:
    """The bytes of the weights and of the counts beside them, once all files are found to be undamaged."""
    counts = folder / COUNTS
    stored = [*weights, counts] if counts.is_file() else weights
    verify(folder, ["config.json", *(file.name for file in stored), *COMPANIONS])
    return sum(file.stat().st_size for file in stored)


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


def _check_finite(model: PreTrainedModel, file: Path) -> None:
    """`InputError` for weights that are not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(
                f"{file}: {name} holds values that are not finite, so its training diverged or the file is "
                "damaged; restore the file, or train again with a lower train.learning_rate"
            )


def coding_tables(
    folder: str | os.PathLike[str], law: Distribution, digest: bytes | None = None
) -> dict[str, Tensor]:
    """Coding tables of the model in ``folder``, as `dflow.coding.prepare` takes them.

    A decoder needs the tables of the encoder; recomputed on another machine they could differ. So they are
    read from ``coding.safetensors``, and computed and written only where there is no such file or it belongs
    to a model that was in the folder before. Without this file coded files cannot be decoded.

    Args:
        folder: the folder of the model.
        law: the model as it was loaded from there.
        digest: its fingerprint without tables in mode float64, where that is known.

    Raises:
        InputError: a file that is truncated or damaged, or a folder that cannot be written to.
    """
    file = split_calls(folder)[0] / TABLES
    law_digest = (digest or fingerprint(law, {}, "float64")).hex()
    verify(file.parent, [TABLES])
    if file.exists():
        try:
            with safe_open(file, "pt") as stored:
                if (stored.metadata() or {}).get("law") == law_digest:
                    return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: truncated or damaged ({error}); restore the file, with which images were coded"
            ) from None
    tables = {name: tensor.contiguous() for name, tensor in frozen_tables(law).items()}
    try:
        with replacing(file.parent) as temporary:
            save_file(tables, temporary / file.name, {"law": law_digest})
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}: cannot be written ({error}), and files coded without it could not be decoded; "
            "copy the model to a folder that you can write to"
        ) from None
    return tables


def split_calls(name: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The folder and the number of calls of ``FOLDER`` or ``FOLDER@CALLS``.

    >>> split_calls("runs/grouped@8")
    (PosixPath('runs/grouped'), 8)
    """
    text = os.fspath(name)
    folder, at, calls = text.rpartition("@")
    if at and calls.isdigit() and not Path(text).exists():
        return Path(folder), int(calls)
    return Path(text), None
