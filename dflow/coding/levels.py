"""Multi-level flows, level by level: the stream of a flow with `Split` bases, cut where its levels end.

The coarsest level is pushed last and lies on top of the stack, so that a beginning of the stream decodes to
it, exactly: what is popped does not depend on anything that lies below. What is missing is filled with the
mean of its law given what is there, or with a draw of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dflow.coding import codec
from dflow.coding.coder import Coder
from dflow.core import Bijector, Distribution
from dflow.flows import Flow, Split

_WORD = 4


def num_levels(law: Distribution) -> int:
    """Levels of a law: one more than parts that are factored out before another flow."""
    return 1 + len(_levels(law)[0])


def _levels(law: Distribution) -> tuple[list[tuple[list[Bijector], Split]], list[Bijector], Distribution]:
    """The bijectors of each level but the coarsest and the `Split` in which it ends, the finest level first.

    Then the bijectors of the coarsest level, and its law. A `Split` of anything else than a flow is a law
    whose entries come in groups, all of one level.
    """
    finer: list[tuple[list[Bijector], Split]] = []
    while True:
        bijectors = []
        while isinstance(law, Flow):
            bijectors.append(law.bijector)
            law = law.base
        if not (isinstance(law, Split) and isinstance(law.base, Flow)):
            return finer, bijectors, law
        finer.append((bijectors, law))
        law = law.base


@torch.no_grad()
def push(law: Distribution, x: Tensor) -> list[bytes]:
    """Code ``x``, int64 ``(n, dim)``: the bytes of each level, the coarsest first: a stream in parts.

    Raises:
        ValueError: as of `codec.push`.
    """
    coder, below = Coder(), []
    finer, last_bijectors, coarsest = _levels(law)
    for bijectors, split in finer:
        x = _to_latent(bijectors, x)
        # Popped down to what is on the stack now, a level is complete.
        below.append(coder.num_below)
        (x, _), (x_b, of_conditional) = split.parts(x)
        codec.push(split.conditional, x_b, coder, of_conditional)
    below.append(coder.num_below)
    codec.push(coarsest, _to_latent(last_bijectors, x), coder)
    data = coder.to_bytes()
    ends = [0, *(len(data) - _WORD * words for words in reversed(below))]
    return [data[start:end] for start, end in pairwise(ends)]


def _to_latent(bijectors: Sequence[Bijector], x: Tensor) -> Tensor:
    for bijector in bijectors:
        x = bijector.forward(x)[0]
    return x


def _to_data(bijectors: Sequence[Bijector], z: Tensor) -> Tensor:
    for bijector in reversed(bijectors):
        z = bijector.inverse(z)[0]
    return z


@torch.no_grad()
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

    finer, last_bijectors, coarsest = _levels(law)
    x = codec.pop(coarsest, n, coder)
    check(1)
    x = _to_data(last_bijectors, x)
    for level, (bijectors, split) in enumerate(reversed(finer), start=2):
        of_conditional = split.contexts(x, None)[1]
        if level <= len(levels):
            x_b = codec.pop(split.conditional, n, coder, of_conditional)
            check(level)
        elif generator is not None:
            x_b = split.conditional.sample(n, of_conditional, generator)
        else:
            x_b = split.conditional.rounded_mean(of_conditional)
        x = _to_data(bijectors, split.join(x, x_b))
    return x
