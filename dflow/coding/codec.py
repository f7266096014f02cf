"""Push and pop whole distributions, which know nothing of it.

    push(law, x, coder, context)
    y = pop(law, len(x), coder, context)     # torch.equal(x, y)

A law is coded as a chain of codes, each made from what the ones before it gave: `push` walks the chain with
the data at hand, `pop` with what comes off the stack. Both run the same lines, so that they see the same
probabilities to the last bit, on one machine and with one batch. A net computes other last bits for another
batch size, device or build; a stream needs what it was coded with.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import singledispatch

import torch
from torch import Tensor

from dflow.coding.codes import Code, Intervals, RowsCode, Shared, Stack, join
from dflow.coding.frozen import Cells, FrozenMixture
from dflow.coding.integers import LogisticCode, MixtureCode, WindowCode
from dflow.coding.tables import Tables, logistic_tables, logit_counts
from dflow.core import Context, Distribution, known_in, present, span_in
from dflow.distributions import categorical
from dflow.distributions.any_order import Walk
from dflow.distributions.logistic import Logistics
from dflow.distributions.sequence import SequenceCategorical
from dflow.distributions.spectra import Spectra
from dflow.distributions.stepwise import Stepwise
from dflow.distributions.window import ConditionalWindow
from dflow.flows.walk import gathered, leaves, scattered

#: Places in the flat ``(n, dim)`` and the code of what stands there; the numbers are sent back.
Steps = Generator[tuple[Tensor, Code], Tensor, None]

#: Mixtures of logistic laws are coded together as long as they are no more than this.
_MIXTURES = 1 << 16

#: Laws of windows are coded together as long as their logits are no more than this.
_LOGITS = 1 << 20


def push(distribution: Distribution, x: Tensor, stack: Stack, context: Context | None = None) -> None:
    """Push ``x``, int64 ``(n, dim)``, so that `pop` gives it back.

    It costs ``-log2 p`` bits and next to nothing more: the rounding of probabilities to 24 bits. Absent
    entries (context of lengths) are not coded. The distribution has to be in evaluation mode.

    Raises:
        ValueError: a law without an exact code; a mode, ``x`` or context that does not fit.
    """
    _check(distribution)
    _check_data(x, getattr(distribution, "dim", None))
    with torch.no_grad():
        for leaf, values, of_leaf in scattered(distribution, x, context):
            _check(leaf)
            _push_leaf(leaf, values, stack, of_leaf)


@singledispatch
def _push_leaf(distribution: Distribution, x: Tensor, stack: Stack, context: Context | None) -> None:
    pushed: list[Intervals] = []
    with torch.no_grad():
        dim, chain = steps(distribution, len(x), context)
        _check_data(x, dim)
        line = x.flatten()
        step = next(chain, None) if len(x) else None
        while step is not None:
            places, code = step
            values = line[places]
            pushed.append(code.intervals(values.cpu()))
            step = _send(chain, values)
    stack.push(*join(pushed))


def pop(distribution: Distribution, n: int, stack: Stack, context: Context | None = None) -> Tensor:
    """Pop the ``x`` pushed last, int64 ``(n, dim)``; absent entries are 0.

    Raises:
        ValueError: as of `push`. What a stream holds that `push` has not made is popped to some ``x``.
    """
    _check(distribution)

    def value(leaf: Distribution, of_leaf: Context | None) -> Tensor:
        _check(leaf)
        return _pop_leaf(leaf, n, stack, of_leaf)

    with torch.no_grad():
        return gathered(distribution, value, context)


@singledispatch
def _pop_leaf(distribution: Distribution, n: int, stack: Stack, context: Context | None) -> Tensor:
    with torch.no_grad():
        dim, chain = steps(distribution, n, context)
        line = torch.zeros(n * dim, dtype=torch.int64, device=_device(distribution))
        step = next(chain, None) if n else None
        while step is not None:
            places, code = step
            values = code.pop(stack).to(line.device)
            line[places] = values
            step = _send(chain, values)
    return line.view(n, dim)


@_push_leaf.register
def _(distribution: Spectra, x: Tensor, stack: Stack, context: Context | None) -> None:
    with torch.no_grad():
        params, log_weights = distribution.params(context)
        _check_data(x, params.shape[1])
        code, places = _spectra(distribution, len(x), log_weights, context)
        z = distribution.elementwise.forward(x, params)[0]
    stack.push(*code.intervals(z.flatten()[places].cpu()))


@_pop_leaf.register
def _(distribution: Spectra, n: int, stack: Stack, context: Context | None) -> Tensor:
    with torch.no_grad():
        params, log_weights = distribution.params(context)
        code, places = _spectra(distribution, n, log_weights, context)
        z = torch.zeros(n, params.shape[1], dtype=torch.int64, device=params.device)
        z.view(-1)[places] = code.pop(stack).to(z.device)
        return categorical.clear_absent(
            distribution.elementwise.inverse(z, params)[0], present(context, *z.shape)
        )


def _spectra(
    distribution: Spectra, n: int, log_weights: Tensor, context: Context | None
) -> tuple[Code, Tensor]:
    _check_rows(n, len(log_weights))
    places = _places(n, log_weights.shape[1], context, log_weights.device)
    return _rows(distribution.log_law(log_weights).flatten(0, 1)[places]), places


@singledispatch
def steps(distribution: Distribution, n: int, context: Context | None) -> tuple[int, Steps]:
    """Entries of a draw, and the chain that codes n of them. Register a law of numbers here."""
    raise ValueError(
        f"no exact code for {type(distribution).__name__}: let a law over symbols extend "
        "dflow.distributions.Stepwise, whose steps a coder follows, or register its code in "
        "dflow.coding.codec.steps; a density on the reals has none"
    )


def check_code(distribution: Distribution) -> None:
    """ValueError, as of `push`, where some leaf of ``distribution`` has no exact code."""
    for leaf in leaves(distribution):
        if all(f.dispatch(type(leaf)) is f.dispatch(object) for f in (_push_leaf, steps)):
            steps(leaf, 0, None)


@steps.register
def _(distribution: categorical.Categorical, n: int, context: Context | None) -> tuple[int, Steps]:
    tables = Tables(logit_counts(distribution.log_law().detach().cpu()))
    dim = span_in(context, distribution.dim)[1]
    places = _places(n, dim, context, distribution.classes.device)
    index = distribution.classes_in(context)[places % max(1, dim)]
    return dim, _once(places, Shared(tables, index))


@steps.register
def _(distribution: categorical.ConditionalCategorical, n: int, context: Context | None) -> tuple[int, Steps]:
    logits = distribution.logits(context)
    _check_rows(n, len(logits))
    places = _places(n, logits.shape[1], context, logits.device)
    return logits.shape[1], _once(places, _rows(logits.flatten(0, 1)[places]))


@steps.register
def _(distribution: categorical.Mixture, n: int, context: Context | None) -> tuple[int, Steps]:
    """Entry by entry: the components are weighed by how well they predicted the entries before."""
    start, dim = span_in(context, distribution.dim)

    def chain() -> Steps:
        law = distribution.logits[:, start : start + dim].double().log_softmax(-1)
        weights = distribution.weight_logits.double().log_softmax(-1).expand(n, -1)
        mask = present(context, n, dim)
        for i in range(dim):
            rows = torch.arange(n, device=law.device) if mask is None else mask[:, i].nonzero().flatten()
            joint = torch.logsumexp(weights[rows, :, None] + law[:, i], 1)
            values = yield rows * dim + i, _rows(joint)
            weights = weights.index_add(0, rows, law[:, i, values].T)

    return dim, chain()


@steps.register
def _(distribution: SequenceCategorical, n: int, context: Context | None) -> tuple[int, Steps]:
    """Call by call, as `sample` draws; absent entries are shown to the net as 0.

    With known entries in the context the law is one that is made for them, by `SequenceCategorical.among`;
    they are shown to the net and not coded.
    """

    def chain() -> Steps:
        rows, state = distribution.start(n, context)
        mask, known = present(context, n, distribution.dim, takes_known=True), known_in(context)
        begin = distribution.read_known(known, state, context)
        previous = known.symbols[:, begin - 1 : begin] if known is not None and begin else None
        row_starts = torch.arange(n, device=distribution.order.device)[:, None] * distribution.dim
        for row in rows[begin:]:
            logits = distribution.net.step(previous, state)
            is_present = (
                torch.ones(n, len(row), dtype=torch.bool, device=row.device) if mask is None else mask[:, row]
            )
            previous = torch.zeros(n, len(row), dtype=torch.int64, device=row.device)
            if known is not None:
                previous = torch.where(known.mask[row], known.symbols[:, row], previous)
                is_present = is_present & ~known.mask[row]
            previous[is_present] = yield (row_starts + row)[is_present], _rows(logits[is_present])

    return distribution.dim, chain()


@steps.register
def _(distribution: Stepwise, n: int, context: Context | None) -> tuple[int, Steps]:
    """Step by step, as the law says; absent entries are not coded, and are 0."""

    def chain() -> Steps:
        mask = present(context, n, distribution.dim)
        present_at = None if mask is None else mask.flatten()
        law = distribution.steps(n, context)
        step = next(law, None)
        while step is not None:
            places, logits = step
            is_present = (
                torch.ones_like(places, dtype=torch.bool) if present_at is None else present_at[places]
            )
            symbols = torch.zeros_like(places)
            symbols[is_present] = yield places[is_present], _rows(logits[is_present])
            try:
                step = law.send(symbols)
            except StopIteration:
                return

    return distribution.dim, chain()


@steps.register
def _(distribution: Logistics, n: int, context: Context | None) -> tuple[int, Steps]:
    """All at once: entries are independent."""
    return logistic_steps(n, *distribution.unnormalised(context))


@steps.register
def _(distribution: ConditionalWindow, n: int, context: Context | None) -> tuple[int, Steps]:
    """Some rows at a time: entries are independent, and have many logits each."""

    def chain() -> Steps:
        dim, low = distribution.dim, distribution.low
        size = max(1, _LOGITS // (dim * (distribution.K + 2)))
        for start in range(0, n, size):
            piece = context and context.rows(start, min(start + size, n))
            logits = distribution.raw(piece)
            _check_rows(min(size, n - start), len(logits))
            places = start * dim + torch.arange(len(logits) * dim, device=low.device)
            yield places, WindowCode(logits, distribution.start, low)

    return distribution.dim, chain()


@steps.register
def _(distribution: FrozenMixture, n: int, context: Context | None) -> tuple[int, Steps]:
    """Under the tables that are kept with it."""
    dim = distribution.law.dim
    places = torch.arange(n * dim)
    return dim, _once(places, Cells(distribution.tables, places % dim))


@steps.register
def _(distribution: Walk, n: int, context: Context | None) -> tuple[int, Steps]:
    """Call by call, as `sample` draws."""

    def chain() -> Steps:
        dim, device = distribution.model.dim, distribution.model.costs.device
        x = torch.zeros(n, dim, dtype=torch.int64, device=device)
        is_drawn = torch.zeros(n, dim, dtype=torch.bool, device=device)
        mask = present(context, n, dim)
        longest = dim if mask is None else int(mask.sum(1).max())
        for call in range(distribution.needed(longest) if longest else 0):
            drawn, logits = distribution.step(call, x, is_drawn, context)
            x[drawn] = yield drawn.flatten().nonzero().flatten(), _rows(logits)
            is_drawn = is_drawn | drawn

    return distribution.model.dim, chain()


def logistic_steps(
    n: int, loc: Tensor, log_scale: Tensor, log_weights: Tensor | None = None
) -> tuple[int, Steps]:
    """What `steps` gives for discretized logistic laws and mixtures of them, by their parameters.

    Args:
        n: number of draws.
        loc: means ``(n, dim)``, of a mixture ``(n, dim, M)``; or with 1 in the place of n, the same for all.
        log_scale: logs of the scales, alike.
        log_weights: logs of the weights up to a constant, alike; None for a single component.

    >>> from dflow.coding.coder import Coder
    >>> def code():
    ...     return next(logistic_steps(1, torch.zeros(1, 2), torch.zeros(1, 2))[1])[1]
    >>> coder = Coder()
    >>> coder.push(*code().intervals(torch.tensor([3, -2])))
    >>> code().pop(coder)
    tensor([ 3, -2])
    """
    if loc.ndim != 2 + (log_weights is not None) or len(loc) not in (1, n):
        raise ValueError(f"expected means of {n} rows or of 1, found loc of shape {tuple(loc.shape)}")
    dim = loc.shape[1]
    places = torch.arange(n * dim, device=loc.device)
    index = places % (len(loc) * dim)

    def chain() -> Steps:
        if log_weights is None:
            code = LogisticCode(logistic_tables(), loc.flatten()[index], log_scale.flatten()[index])
            yield places, code
            return
        params = tuple(v.flatten(0, 1) for v in (loc, log_scale, log_weights))
        for piece in places.split(_MIXTURES):
            laws, rows = params, index[piece]
            if len(loc) == n:
                laws, rows = tuple(v[piece] for v in params), piece - piece[0]
            yield piece, MixtureCode(laws[0], laws[1], laws[2], rows)

    return dim, chain()


def _once(places: Tensor, code: Code) -> Steps:
    yield places, code


def _send(chain: Steps, values: Tensor) -> tuple[Tensor, Code] | None:
    try:
        return chain.send(values)
    except StopIteration:
        return None


def _rows(logits: Tensor) -> Code:
    """Code of symbols, each with logits of its own, ``(n, K)``."""
    return RowsCode(logit_counts(logits.detach().cpu()))


def _places(n: int, dim: int, context: Context | None, device: torch.device) -> Tensor:
    """Places of the entries that are present in the flat ``(n, dim)``."""
    mask = present(context, n, dim)
    if mask is None:
        return torch.arange(n * dim, device=device)
    return mask.flatten().nonzero().flatten()


def _device(distribution: Distribution) -> torch.device:
    for tensor in (*distribution.parameters(), *distribution.buffers()):
        return tensor.device
    return torch.device("cpu")


def _check(distribution: Distribution) -> None:
    if distribution.training:
        raise ValueError(
            f"{type(distribution).__name__} is in training mode, in which nets may answer at random: "
            "call eval() on it first"
        )


def _check_data(x: Tensor, dim: int | None) -> None:
    if x.dtype != torch.int64 or x.ndim != 2 or dim not in (None, x.shape[1]):
        raise ValueError(f"expected int64 (n, {dim or 'dim'}), found {x.dtype} {tuple(x.shape)}")


def _check_rows(n: int, rows: int) -> None:
    if n != rows:
        raise ValueError(f"{n} rows of x for a context of {rows}")
