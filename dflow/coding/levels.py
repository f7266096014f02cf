"""Multi-level flows, level by level: the stream of a flow with `Split` bases, cut where its levels end.

The coarsest level is pushed last and lies on top of the stack, so that a beginning of the stream decodes to
it, exactly: what is popped does not depend on anything that lies below. What is missing is filled with the
mean of its law given what is there, or with a draw of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor

from dflow.coding import codec
from dflow.coding.coder import Coder
from dflow.core import Context, Distribution
from dflow.distributions.logistic import Logistics
from dflow.distributions.window import ConditionalWindow
from dflow.flows import Flow, Split

_WORD = 4


def num_levels(law: Distribution) -> int:
    """Levels of a law: one more than parts that are factored out before another flow."""
    if isinstance(law, Flow):
        return num_levels(law.base)
    return 1 + num_levels(law.base) if _factors_out(law) else 1


def _factors_out(law: Distribution) -> TypeGuard[Split]:
    """A `Split` of anything else than a flow is a law whose entries come in groups, all of one level."""
    return isinstance(law, Split) and isinstance(law.base, Flow)


def push(law: Distribution, x: Tensor) -> list[bytes]:
    """Code ``x``, int64 ``(n, dim)``: the bytes of each level, the coarsest first: a stream in parts.

    Raises:
        ValueError: as of `codec.push`.
    """
    coder, left = Coder(), []

    def walk(law: Distribution, x: Tensor) -> None:
        if isinstance(law, Flow):
            with torch.no_grad():
                x = law.transform(x)[0]
            return walk(law.base, x)
        # Popped down to what is on the stack now, a level is complete.
        left.append(coder.num_below)
        if _factors_out(law):
            (x_a, _), (x_b, given) = law.parts(x)
            codec.push(law.conditional, x_b, coder, given)
            return walk(law.base, x_a)
        return codec.push(law, x, coder)

    walk(law, x)
    data = coder.to_bytes()
    ends = [0, *(len(data) - _WORD * below for below in reversed(left))]
    return [data[start:end] for start, end in pairwise(ends)]


def pop(
    law: Distribution, n: int, levels: Sequence[bytes], generator: torch.Generator | None = None
) -> Tensor:
    """The ``x`` that was coded, int64 ``(n, dim)``; of fewer levels than the law has, something like it.

    Args:
        law: as of `push`.
        n: rows.
        levels: what `push` gave, or the first of them.
        generator: draw what is missing (default: its mean, rounded, which is nearest in the square).

    Raises:
        ValueError: as of `codec.pop`; levels that do not end where they should: the stream is damaged, or of
            another law.
    """
    total = num_levels(law)
    if not 1 <= len(levels) <= total:
        raise ValueError(f"the law has {total} levels, found {len(levels)}")
    coder, below = Coder(b"".join(levels)), [len(level) // _WORD for level in levels]

    def check(level: int) -> None:
        if coder.num_below != sum(below[level:]):
            raise ValueError(f"level {level} ends elsewhere: it is damaged, or another model coded it")
        if level == total:
            coder.finish()

    def walk(law: Distribution, level: int) -> Tensor:
        if isinstance(law, Flow):
            z = walk(law.base, level)
            with torch.no_grad():
                return law.bijector.inverse(z)[0]
        if not _factors_out(law):
            x = codec.pop(law, n, coder)
            check(level)
            return x
        x_a = walk(law.base, level - 1)
        given = law.contexts(x_a, None)[1]
        if level <= len(levels):
            x_b = codec.pop(law.conditional, n, coder, given)
            check(level)
        elif generator is not None:
            x_b = law.conditional.sample(n, given, generator)
        else:
            x_b = _mean(law.conditional, given)
        return law.join(x_a, x_b)

    return walk(law, total)


@torch.no_grad()
def _mean(law: Distribution, context: Context | None) -> Tensor:
    if isinstance(law, Split):
        x_a = _mean(law.base, law.contexts(None, context)[0])
        return law.join(x_a, _mean(law.conditional, law.contexts(x_a, context)[1]))
    if isinstance(law, ConditionalWindow):
        return law.mean(context)
    if not isinstance(law, Logistics):
        raise ValueError(f"the mean of {type(law).__name__} is not known: ask for all levels")
    loc, _, *log_weights = law.params(context)
    if log_weights:
        loc = (loc * log_weights[0].exp()).sum(-1)
    return loc.double().round().long()
