"""Models of text from their folders, without transformers, whose import alone takes two seconds."""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file
from torch import Tensor

from dflow.config import InputError
from dflow.models import counts
from dflow.models.files import (
    INDEX,
    KINDS,
    check_finite,
    check_keys,
    config_of,
    loading,
    split_calls,
    verified,
    weight_files,
)
from dflow.models.limits import AllocationLimit
from dflow.models.settings import TextConfig
from dflow.models.symbols import TextModel


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> TextModel:
    """The model of text in ``folder``, in evaluation mode; ``FOLDER@8`` is one that draws in 8 calls.

    It scores and draws as that of `dflow.hf.load`, which is one of transformers and can be trained and saved.

    Args:
        folder: written by `dflow.hf.save`, or the name of a model that comes with dflow.
        device: device of the model.

    Raises:
        InputError: no such folder, no model of text, or truncated or foreign files.
    """
    path, calls = split_calls(folder)
    values = config_of(path)
    if values["model_type"] != "dflow":
        raise InputError(f"{path}: a model of {KINDS[values['model_type']]}; this takes a model of text")
    weights = weight_files(path)
    num_bytes = verified(path, weights)
    tensors: dict[str, Tensor] = {}
    with loading(path, weights):
        config = TextConfig(**values)
        with AllocationLimit(num_bytes):
            model = TextModel(config)
            for file in weights:
                if file.name != INDEX:
                    tensors |= load_file(file)
            other = model.load_state_dict(tensors, strict=False)
        counts.load(model, path / counts.COUNTS if (path / counts.COUNTS).is_file() else None, str(path))
    check_keys(path, other._asdict())
    check_finite(weights[0], model)
    model = model.to(getattr(torch, str(values.get("dtype", "float32")))).to(device).eval()
    return model if calls is None else model.at(calls)
