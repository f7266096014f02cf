"""Model folders: each is saved completely or not at all, and loaded strictly."""

from __future__ import annotations

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
from dflow.hf.images import DflowImageModel
from dflow.hf.text import DflowModel
from dflow.models.files import (
    KINDS,
    TABLES,
    check_finite,
    config_of,
    loading,
    model_type,
    split_calls,
    verified,
    weight_files,
)
from dflow.models.limits import AllocationLimit
from dflow.models.manifest import replacing, verify

M = TypeVar("M", DflowModel, DflowImageModel, DflowClassifier)
ModelClass = type[DflowModel] | type[DflowImageModel] | type[DflowClassifier]

#: The classes of models, by the model type in `config.json`.
_KINDS: dict[str, ModelClass] = {
    "dflow": DflowModel,
    "dflow-image": DflowImageModel,
    "dflow-classifier": DflowClassifier,
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


def save(
    model: PreTrainedModel, folder: str | os.PathLike[str], state: dict[str, Tensor] | None = None
) -> None:
    """`save_pretrained` without messages: every file is replaced completely or not at all.

    Args:
        model: the model.
        folder: to write into.
        state: what to write for its weights, as in another precision; default themselves.
    """
    with _quiet():
        model.save_pretrained(folder, state_dict=state)


def kind_of(folder: str | os.PathLike[str]) -> ModelClass:
    """The class of the model in ``folder``.

    Raises:
        InputError: no such folder, not a model of dflow.
    """
    return _KINDS[model_type(folder)]


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
    actual = config_of(path)["model_type"]
    if _KINDS[actual] is not kind:
        expected = next(name for name, cls in _KINDS.items() if cls is kind)
        raise InputError(f"{path}: a model of {KINDS[actual]}; this takes a model of {KINDS[expected]}")
    weights: list[Path] = weight_files(path)
    num_bytes = verified(path, weights)
    with loading(path, weights):
        config = kind.config_class.from_pretrained(path)
        config.settings()
        # Settings that belong to other weights may ask for any amount of memory.
        with AllocationLimit(num_bytes), _quiet():
            model: Any = kind.from_pretrained(path, config=config)
    check_finite(weights[0], model)
    loaded: M = model.to(device).eval()
    if calls is not None:
        if not isinstance(loaded, DflowModel):
            raise InputError(
                f"{folder}: only a model of text is drawn in a number of calls; leave out @{calls}"
            )
        return loaded.at(calls)
    return loaded


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
