"""A tiny model of every registered family, and a batch for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from folders import with_counts
from stand_ins import CAPS, LISTS
from torch import Tensor

from dflow import hf, zoo

K, LENGTH = 5, 8
#: Settings that follow from the data, by the kind of the family.
OF_DATA: dict[str, dict[str, Any]] = {
    "text": {},
    "images": {"shape": [1, 4, 4], "levels": [4], "lowest": [0]},
    "labels": {"shape": [1, 8, 8], "levels": [256], "lowest": [0], "classes": 3},
}
SMALL = CAPS | {"length": LENGTH, "num_calls": 4, "context": 0}


def tiny(name: str, noise: float = 0.1, **changes: Any) -> tuple[Any, Tensor]:
    """The family ``name`` with small settings, in evaluation mode, and a batch of its data.

    Weights lie off their start, where heads of zeros keep gradients from all below them.
    """
    torch.manual_seed(0)
    family, values = zoo.find(name), dict[str, Any]()
    for field in dataclasses.fields(family.settings):
        if isinstance(field.default, int) and field.name in SMALL:
            values[field.name] = min(field.default, SMALL[field.name])
        elif field.name in LISTS:
            values[field.name] = LISTS[field.name]
    values |= OF_DATA[family.kind] | changes
    model: Any
    if family.kind == "text":
        model = with_counts(hf.DflowModel(hf.DflowConfig(name, vocab_size=K, **values)), K)
        data = torch.randint(0, K, (6, LENGTH))
    else:
        if family.kind == "images":
            model = hf.DflowImageModel(hf.DflowImageConfig(name, **values))
        else:
            model = hf.DflowClassifier(hf.DflowClassifierConfig(name, **values))
        data = torch.randint(0, values["levels"][0], (24, torch.Size(values["shape"]).numel()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval(), data


def labels(model: Any, data: Tensor) -> dict[str, Tensor]:
    """Further arguments of ``forward`` that give a loss."""
    return {"labels": torch.arange(len(data)) % 3} if model.config.model_kind == "labels" else {}


@torch.no_grad()
def score(model: Any, data: Tensor) -> Tensor:
    """Log-likelihoods in nats, exact or a bound; of a classifier the logits."""
    if model.config.model_kind == "labels":
        torch.manual_seed(1)  # its activations are drawn
        return model(data).logits
    if model.config.record.exact:
        return model.log_prob(data)
    return model.elbo(data, 2, torch.Generator().manual_seed(1)).values
