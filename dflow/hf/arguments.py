"""Checks of the named arguments of a model's `forward`; masks and labels are converted to lengths."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.generic import ModelOutput

from dflow.config import InputError, nearest
from dflow.ops.devices import widen

F = TypeVar("F", bound=Callable[..., Any])
Output = TypeVar("Output", bound=ModelOutput)

#: The label that transformers leaves out of a loss.
IGNORED = -100


class _Forward:
    """`forward` as transformers' Trainer reads it: see `labels_optional`."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

        @functools.wraps(forward)
        def of_the_class(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        signature = inspect.signature(forward)
        others = [p for name, p in signature.parameters.items() if name != "labels"]
        of_the_class.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        self.of_the_class = of_the_class

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Any]:
        return self.of_the_class if instance is None else MethodType(self.forward, instance)


def labels_optional(forward: F) -> F:
    """``forward`` of a model that has a loss without labels and takes them too.

    Trainer keeps the columns of a data set that are arguments of the bound method, which has ``labels``. From
    the signature on the class it concludes whether a loss needs labels: with an argument ``labels`` there,
    `Trainer.evaluate` would have no ``eval_loss`` for data without labels. So the function on the class has
    only ``return_loss``.
    """
    return cast("F", _Forward(forward))


def refuse_unknown(kwargs: Mapping[str, Any], forward: Callable[..., Any], more: str = "") -> None:
    """Refuse arguments that ``forward``, a bound method, has no name for.

    Raises:
        InputError: the message names the first unknown argument, and the known argument nearest to it.
    """
    if not kwargs:
        return
    kinds = inspect.signature(forward).parameters
    names = [name for name, p in kinds.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    name = next(iter(kwargs))
    raise InputError(f"forward takes no argument {name!r}{more}; {nearest(name, names)}")


def present_lengths(
    input_ids: Tensor, lengths: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None
) -> Tensor | None:
    """Lengths int64 ``(batch,)`` of the symbols ``(batch, n)`` that are present; None where all are.

    Args:
        input_ids: the symbols.
        lengths: the lengths themselves, or None.
        attention_mask: ``(batch, n)``, 1 for symbols that are present, which come first, and 0 for others.
        labels: ``(batch, n)``, the symbols themselves, or -100 for symbols that are not present.

    Raises:
        InputError: a mask that is no prefix, labels that are other symbols, or arguments that contradict.
    """
    counted: dict[str, Tensor] = {}
    if lengths is not None and lengths.shape == input_ids.shape[:1]:  # the model refuses other shapes
        counted["lengths"] = lengths
    if attention_mask is not None:
        counted["attention_mask"] = _of_mask(input_ids, attention_mask)
    if labels is not None:
        counted["labels"] = _of_labels(input_ids, labels)
    for (name, expected), (other_name, other) in pairwise(counted.items()):
        if not torch.equal(expected.long(), other.long()):
            row = int((expected != other).nonzero()[0])
            raise InputError(
                f"{name} says that {int(expected[row])} symbols of row {row} are present, {other_name} that "
                f"{int(other[row])} are; give one of them, or labels of {IGNORED} where the mask is 0"
            )
    if lengths is not None or not counted:
        return lengths
    name, last = list(counted.items())[-1]
    if not bool((last > 0).all()):
        row = int((last <= 0).nonzero()[0])
        raise InputError(f"{name}: no symbol of row {row} is present; leave the row out of the batch")
    return None if bool((last == input_ids.shape[1]).all()) else last


def _of_mask(input_ids: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, the symbols {tuple(input_ids.shape)}; give a 1 "
            "for each symbol that is present and a 0 for each that is not"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask has values other than 0 and 1; give a 1 for each symbol present")
    return _prefix(mask == 1, "attention_mask", "pad on the right, or give lengths=")


def _of_labels(input_ids: Tensor, labels: Tensor) -> Tensor:
    if labels.shape != input_ids.shape:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, the symbols {tuple(input_ids.shape)}; this model "
            "predicts its own symbols, so labels are input_ids (not shifted), or are left out"
        )
    scored = labels != IGNORED
    wrong = scored & (labels != input_ids)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InputError(
            f"label {int(labels[row, column])} of symbol {int(input_ids[row, column])} at ({row}, {column}): "
            f"this model predicts its own symbols, so labels are input_ids (not shifted), {IGNORED} at a "
            "padded end, or are left out"
        )
    way = "a whole sequence is scored; leave labels out, or generate with prompt= to continue one"
    return _prefix(scored, "labels", way)


def _prefix(present: Tensor, name: str, way: str) -> Tensor:
    """Lengths of rows whose present entries come first, ``(batch,)``; an InputError for other rows."""
    count = present.sum(1)
    gaps = present != (torch.arange(present.shape[1], device=present.device) < count[:, None])
    if bool(gaps.any()):
        row = int(gaps.any(1).nonzero()[0])
        raise InputError(f"{name} leaves symbols out of row {row} before others that are present; {way}")
    return count


def scaled(loss: Tensor, entries: int | Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """A mean loss over ``entries``, scaled to its share of a mean over ``num_items_in_batch``.

    Trainer passes the number of items of all batches of a step, and adds up their losses.
    """
    if num_items_in_batch is None:
        return loss
    return loss * (entries / widen(torch.as_tensor(num_items_in_batch, device=loss.device)).mean()).to(loss)


def answer(output: Output, return_dict: bool | None, config: PreTrainedConfig) -> Output | tuple[Any, ...]:
    """``output``, or as a tuple where the call or the config asks for one."""
    wanted = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return output if wanted else output.to_tuple()
