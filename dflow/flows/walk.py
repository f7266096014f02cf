"""The leaves of a law, that is, its distributions that have no others in them, and a walk over them.

A law is a tree: a `Flow` has a base, a `Split` a conditional and a base, an `Infilled` the law of what is
hidden, and every other law is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from dflow.core import Context, Distribution
from dflow.flows.flow import Flow
from dflow.flows.infilled import Infilled
from dflow.flows.split import Split


def leaves(law: Distribution) -> Iterator[Distribution]:
    """The leaves of ``law``: a conditional before the base that it is given, the innermost base last."""
    if isinstance(law, Flow):
        yield from leaves(law.base)
    elif isinstance(law, Split):
        yield from leaves(law.conditional)
        yield from leaves(law.base)
    elif isinstance(law, Infilled):
        yield from leaves(law.law)
    else:
        yield law


def scattered(
    law: Distribution, x: Tensor, context: Context | None = None
) -> Iterator[tuple[Distribution, Tensor, Context | None]]:
    """Each leaf, in the order of `leaves`, with its values for ``x`` in either mode, and its context."""
    if isinstance(law, Flow):
        yield from scattered(law.base, law.transform(x, context)[0], context)
    elif isinstance(law, Split):
        (x_a, of_base), (x_b, of_conditional) = law.parts(x, context)
        yield from scattered(law.conditional, x_b, of_conditional)
        yield from scattered(law.base, x_a, of_base)
    elif isinstance(law, Infilled):
        yield from scattered(law.law, *law.hidden(x, context))
    else:
        yield law, x, context


def gathered(
    law: Distribution, value: Callable[[Distribution, Context | None], Tensor], context: Context | None = None
) -> Tensor:
    """The inverse of `scattered`: the ``x`` whose values at each leaf are ``value(leaf, context)``.

    Leaves are called in reverse order: the innermost base first, a conditional after the base it is given.
    """
    if isinstance(law, Flow):
        return law.bijector.inverse(gathered(law.base, value, context), context)[0]
    if isinstance(law, Split):
        x_a = gathered(law.base, value, law.contexts(None, context)[0])
        return law.join(x_a, gathered(law.conditional, value, law.contexts(x_a, context)[1]), context)
    if isinstance(law, Infilled):
        return law.whole(gathered(law.law, value, law.within(context)), context)
    return value(law, context)


def innermost(law: Distribution) -> Distribution:
    """The last leaf: the base of the innermost flow or split."""
    *_, base = leaves(law)
    return base
