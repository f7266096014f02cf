"""Patterns of known entries, one for each step of the training of a model of text with a context."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

#: Kinds of patterns, in the order of ``train.known``.
KINDS = ("nothing", "before", "around", "holes")

#: One in so many patterns hides fewer symbols than a chunk has, as the end of a document and small gaps do.
_SHORT = 4
#: Most gaps of a pattern of holes.
_GAPS = 8


def pattern(length: int, context: int, shares: Sequence[float], seed: int) -> Tensor:
    """A random pattern: bool ``(n,)``, True where an entry is known, n at most ``length + context``.

    "nothing": ``length`` hidden entries; "before": known ones and then hidden ones; "around": known ones on
    both sides of hidden ones; "holes": up to 8 gaps of hidden entries among known ones.

    Args:
        length: hidden entries; one pattern in four has fewer of them, any number.
        context: known entries, at most.
        shares: how often each of `KINDS` comes, up to a factor.
        seed: decides.

    >>> pattern(3, 2, [0, 1, 0, 0], 5).tolist()
    [True, False, False, False]
    """
    choose = random.Random(seed)
    kind = choose.choices(KINDS, shares)[0]
    if kind == "nothing":
        return torch.zeros(length, dtype=torch.bool)
    hidden = choose.randint(1, length) if choose.randrange(_SHORT) == 0 else length
    known = choose.randint(1, context)
    if kind == "before":
        ends = [known, 0]
    elif kind == "around":
        before = choose.randint(0, known)
        ends = [before, known - before]
    else:
        gaps = choose.randint(1, min(_GAPS, hidden, known + 1))
        # Gap i begins behind ends[i] known entries.
        cuts = sorted(choose.sample(range(known + 1), gaps))
        ends = [b - a for a, b in zip([0, *cuts], [*cuts, known], strict=True)]
    sizes = _parts(hidden, len(ends) - 1, choose)
    mask = [True] * ends[0]
    for size, after in zip(sizes, ends[1:], strict=True):
        mask += [False] * size + [True] * after
    return torch.tensor(mask)


def _parts(total: int, number: int, choose: random.Random) -> list[int]:
    """``total`` as a sum of so many numbers, each at least 1."""
    cuts = sorted(choose.sample(range(1, total), number - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
