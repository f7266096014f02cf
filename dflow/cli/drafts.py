"""What the flag ``--draft`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dflow.cli.shared import load_model
from dflow.config import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dflow.data import Tokenizer
    from dflow.distributions.drafted import Drafter
    from dflow.models import TextModel


def find_drafter(word: str, model: nn.Module, tokenizer: Tokenizer, device: torch.device) -> Drafter | None:
    """What proposes symbols of a model; None for nothing.

    Args:
        word: none, counts (of the model's own training text), auto (counts where there are any), or the
            folder of another model.
        model: the model, or its law.
        tokenizer: its vocabulary.
        device: where the other model is loaded.

    Raises:
        InputError: counts of a model without; another model that cannot draft for this one.
    """
    from dflow.distributions.drafted import LawDrafter
    from dflow.models.counts import counted, counts_drafter

    if word == "none":
        return None
    if word in ("auto", "counts"):
        drafter = counts_drafter(model)
        if drafter is None and word == "counts":
            raise InputError(
                "--draft counts: this model has no counts of its training text; give the folder of another "
                "model, as one of family ngram, or none"
            )
        return drafter
    other, vocabulary = load_model(word, device)
    if vocabulary != tokenizer:
        raise InputError(f"--draft {word}: this model was trained with another vocabulary")
    for mixture in counted(model):
        for module in counted(other):
            module.share(mixture)
    try:
        return LawDrafter(other.train(False).law)
    except InputError as error:
        raise InputError(f"--draft {word}: {error}") from None


def drafted(model: TextModel, tokenizer: Tokenizer, word: str) -> TextModel:
    """The model that draws in fewer calls by what ``word`` names; the model itself where that is nothing."""
    drafter = find_drafter(word, model, tokenizer, model.device)
    if drafter is None:
        return model
    try:
        return model.drafted(drafter)
    except InputError as error:
        raise InputError(f"--draft {word}: {error}") from None
