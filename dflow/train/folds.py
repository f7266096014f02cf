"""Training text in folds, so that what reads counts is trained on text that was not counted."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dflow.config import InputError
from dflow.data import Draws, Text, count
from dflow.models import counts
from dflow.nn.counted import Counted

#: Most folds: of a text in 8 folds, a batch sees counts of seven eighths.
_FOLDS = 8


class Folds:
    """The counts of a training text, and of each of its folds.

    All of the text is counted, and the model keeps these counts. In training, a batch comes from one fold,
    whose counts are left out.

    Args:
        model: its modules that read counts are given those of ``text``.
        text: the training text.
        settings: settings of the model: ``length``, ``context`` and ``counts_megabytes``.
        K: size of the alphabet.

    Raises:
        InputError: the text is drawn afresh for each batch, or too short for two folds.
    """

    def __init__(self, model: nn.Module, text: Text, settings: Any, K: int) -> None:
        if isinstance(text, Draws):
            raise InputError(
                f"model.counts {settings.counts}: these data are drawn afresh for each batch, so that "
                "nothing can be counted; set it to 0"
            )
        self.modules: list[Counted] = list(counts.counted(model))
        patterns = counts.patterns_in(model)
        self.texts, line = _folds(text, settings.length + settings.context), _line(text, K)
        cuts = [0, *torch.tensor([len(_line(fold, K)) for fold in self.texts]).cumsum(0).tolist()]
        with tqdm(total=len(patterns) * len(cuts), unit="pattern", desc="count", delay=1, leave=False) as bar:
            table = count(line, K, patterns, settings.counts_megabytes * 1000**2, tick=bar.update)
            self.tables = [
                count(line, K, patterns, entries=range(a, b), tick=bar.update).within(table)
                for a, b in pairwise(cuts)
            ]
        counts.set_counts(model, table)
        self.summary = (
            f"counts of up to {settings.counts} symbols: {len(table.keys):,} contexts, "
            f"{table.num_bytes / 1000**2:.1f} MB"
        )

    def text(self, seed: int) -> Text:
        """The fold that the batch of a seed comes from; its counts are left out from now on."""
        fold = seed % len(self.texts)
        for module in self.modules:
            module.left_out = self.tables[fold]
        return self.texts[fold]


def _folds(text: Text, length: int) -> list[Text]:
    """The text in parts of equal size, each long enough for a batch."""
    least, what = (2 * length, "symbols") if text.lengths is None else (1, text.what)
    number = min(_FOLDS, len(text.ids) // least)
    if number < 2:
        raise InputError(
            f"model.counts: the training text has {len(text.ids):,} {what}, and counts take two folds of at "
            f"least {least:,}; give more text, or set model.counts to 0"
        )
    cuts = [len(text.ids) * i // number for i in range(number + 1)]
    return [
        replace(text, ids=text.ids[a:b], lengths=None if text.lengths is None else text.lengths[a:b])
        for a, b in pairwise(cuts)
    ]


def _line(text: Text, K: int) -> Tensor:
    """The symbols of a text one after the other, with K behind each sentence."""
    if text.lengths is None:
        return text.ids
    ids = torch.nn.functional.pad(text.ids.int(), (0, 1))
    line = torch.arange(ids.shape[1])
    return ids.masked_fill(line == text.lengths[:, None], K)[line <= text.lengths[:, None]]
