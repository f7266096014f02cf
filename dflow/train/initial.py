"""Where a training starts from: the weights of a model of text that is there already."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace

import torch
from torch import Tensor

from dflow import models
from dflow.config import InputError
from dflow.data import Characters, Corpus, DataConfig, Tokenizer, load
from dflow.models import TextModel
from dflow.terminal import shown
from dflow.train.recipe import Recipe

#: Settings of a model that may differ from those of the model that it starts from.
_FREE = {
    *("length", "context", "num_calls", "calls"),
    *("dropout", "ngram_dropout", "counts_dropout", "counts_megabytes"),
}
#: Families whose tensors have one row for each symbol, or one in each of several tables.
_GROW = ("grouped", "transformer", "lstm", "ngram", "any_order")


def corpus_for(data: DataConfig, recipe: Recipe, init: str) -> Corpus:
    """The text ``data`` of a recipe in the symbols of the model ``init``, and further ones where it has some.

    The symbols of the model keep their numbers, so that what it has learned of them holds.

    Raises:
        InputError: the text is in symbols of another kind.
    """
    path = models.split_calls(init)[0]
    learned, length = Tokenizer.load(path), recipe.model.length
    corpus = load(data, None, length)
    fresh = corpus.tokenizer
    if isinstance(learned, Characters) and isinstance(fresh, Characters):
        more = [symbol for symbol in fresh.symbols if symbol not in set(learned.symbols)]
        if more:
            if recipe.family not in _GROW:
                raise InputError(
                    f"train.init {init}: its vocabulary lacks {_listed(more)}, and a model of family "
                    f"{recipe.family!r} cannot learn further symbols; remove them from the text"
                )
            _say(
                f"{init}: its vocabulary of {learned.size} symbols lacks {_listed(more)}; "
                f"new symbols, learned afresh: {len(more)}"
            )
        learned = Characters([*learned.symbols, *more])
    elif learned != fresh:
        raise InputError(
            f"train.init {init}: its symbols are {learned.kind} ({learned.size}), and those of the recipe "
            f"{fresh.kind} ({fresh.size}); set data.tokenizer to {learned.kind}"
            + (
                ", which a model of text learns anew, so that only equal ones go together"
                if learned.kind == "sentencepiece"
                else ""
            )
        )
    return load(replace(data, checksum=corpus.checksum), learned, length)


@torch.no_grad()
def start(model: TextModel, recipe: Recipe, init: str) -> None:
    """Copy the weights of the model ``init``.

    Raises:
        InputError: it is of another family, or has other settings that matter.
    """
    source = models.load(models.split_calls(init)[0])
    if source.config.family != recipe.family:
        raise InputError(
            f"train.init {init}: a model of family {source.config.family!r}, and the recipe is one of family "
            f"{recipe.family!r}; take a recipe of the same, or none: dflow train --init {init}"
        )
    then, now = asdict(source.config.settings()), asdict(recipe.model)
    differences = [
        f"model.{name} is {then[name]} there and {now[name]} in the recipe"
        for name in now
        if name not in _FREE and then[name] != now[name]
    ]
    if differences:
        raise InputError(f"train.init {init}: {'; '.join(differences)}; set them alike, or name no recipe")
    learned, sizes = dict(source.named_parameters()), (source.config.vocab_size, model.config.vocab_size)
    for name, weight in model.named_parameters():
        weight.copy_(_grown(learned[name].to(weight), weight, *sizes))
    counted = dict(source.named_buffers())
    for name, buffer in model.named_buffers():
        # Bases and costs in closed form, which have no weights. The law of lengths is that of the new text.
        if buffer.is_floating_point() and name != "length_counts" and counted[name].shape == buffer.shape:
            buffer.copy_(counted[name])


def _grown(old: Tensor, fresh: Tensor, before: int, now: int) -> Tensor:
    """``old`` with the rows of new symbols from ``fresh``.

    Rows are those of the symbols, and behind them others, as that of no symbol; or several tables of such
    rows one after the other, with others behind.

    Args:
        old: learned.
        fresh: of the size that is needed.
        before: size of the old alphabet.
        now: size of the new one, whose first symbols are those of the old.
    """
    for dim in range(old.ndim):
        more = fresh.shape[dim] - old.shape[dim]
        if not more:
            continue
        tables = more // (now - before)
        # One table has all of its other rows behind it, each of several has the one of no symbol.
        width = before + (tables > 1)
        places = torch.arange(old.shape[dim])
        table = (places // width).clamp(max=tables - 1)
        inside = places - table * width
        # The row of no symbol, and those behind the tables, move behind the new symbols.
        moved = places + table * (now - before) + (inside >= before) * (now - before)
        grown = fresh.narrow(1 - dim, 0, old.shape[1 - dim]).clone() if old.ndim == 2 else fresh.clone()
        old = grown.index_copy(dim, moved.to(old.device), old)
    return old


def _listed(symbols: list[str]) -> str:
    some = ", ".join(map(repr, symbols[:8]))
    return some + (f" and {len(symbols) - 8} more" if len(symbols) > 8 else "")


def _say(message: str) -> None:
    print(shown(message, sys.stderr), file=sys.stderr)
