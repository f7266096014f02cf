"""The three contracts of dflow, bijectors, elementwise families and distributions; and their context.

The dtype is the mode. On Z/K a floating tensor holds one-hot rows ``(batch, dim, K)`` and is
differentiable; an int64 tensor holds symbols ``(batch, dim)`` and is exact. Integers in, integers
out; floats in, floats out. Both modes agree on every hard input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dflow.config import InputError
from dflow.ops.noise import Noise

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Known:
    """Entries of sequences that are known; a law with them in its context is that of the others, given these.

    A prompt, the text before a chunk, what stands after a gap: all are known entries.

    Args:
        symbols: int64 ``(batch, n)``; what stands where an entry is not known is never read.
        mask: bool ``(n,)``, True where an entry is known, in all sequences of the batch. It is kept on the
            CPU: shapes follow from it, and an accelerator that holds it would be waited for.

    Raises:
        InputError: tensors of other dtypes or shapes.
    """

    symbols: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        """Check dtypes and shapes."""
        symbols, mask = self.symbols, self.mask
        if (symbols.dtype, symbols.ndim, mask.dtype, mask.ndim) != (torch.int64, 2, torch.bool, 1) or (
            symbols.shape[1] != len(mask)
        ):
            raise InputError(
                "known entries are symbols int64 (batch, n) and a mask bool (n,), found "
                f"{_shown(symbols)} and {_shown(mask)}"
            )
        object.__setattr__(self, "mask", mask.cpu())

    @property
    def device_mask(self) -> Tensor:
        """The mask on the device of the symbols."""
        return self.mask.to(self.symbols.device)


@dataclass(frozen=True, eq=False)
class Around:
    """What stands around the entries of a law or layer of hidden entries alone, see `dflow.flows.Infilled`.

    Args:
        mask: bool ``(n,)`` on the CPU, True where an entry of the whole sequence is known, False at all
            hidden ones.
        symbols: int64 ``(batch, n)``, those of the whole sequence, right where they are known; None where
            nothing is known.
        first: index of the first hidden entry, among the entries that the outermost law is built for.
        number: entries of this law or layer.
        start: index of the first of these, among the entries that this law or layer is built for.
    """

    mask: Tensor
    symbols: Tensor | None
    first: int
    number: int
    start: int

    def rows(self, start: int, end: int) -> Around:
        """The same of some of the sequences."""
        return replace(self, symbols=None if self.symbols is None else self.symbols[start:end])

    def repeat(self, times: int) -> Around:
        """The same of ``times`` copies of the batch, one after another."""
        return replace(self, symbols=None if self.symbols is None else self.symbols.repeat(times, 1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Context:
    """The condition of a law, a layer or a network; None is accepted in place of an empty context.

    Args:
        lengths: lengths of sequences, int64 ``(batch,)``; entries at or beyond the length are absent.
        given: tensors with a row for each sequence, which networks read: features, class labels, and inside
            `Split` the kept entries.
        noise: what symbols are drawn by; None for that of a generator.
        known: entries that are known; None for none.
        around: what stands around the entries, where these are the hidden ones of a longer sequence.

    Raises:
        InputError: lengths of another dtype or shape, or a ``given`` that is not a tuple of tensors.
    """

    lengths: Tensor | None = None
    given: tuple[Tensor, ...] = ()
    noise: Noise | None = None
    known: Known | None = None
    around: Around | None = None

    def __post_init__(self) -> None:
        """Check dtypes and shapes; the number of rows is checked where the batch is known."""
        if self.lengths is not None:
            check_lengths(self.lengths)
        if not isinstance(self.given, tuple) or not all(isinstance(item, Tensor) for item in self.given):
            raise InputError(f"given holds a tuple of tensors, found {_shown(self.given)}; {_WAY}")

    def rows(self, start: int, end: int) -> Context:
        """The context of the rows from ``start`` to before ``end``."""
        lengths = None if self.lengths is None else self.lengths[start:end]
        noise = None if self.noise is None else self.noise.rows(start, end)
        known = self.known and replace(self.known, symbols=self.known.symbols[start:end])
        features = tuple(item[start:end] for item in self.given)
        around = self.around and self.around.rows(start, end)
        return Context(lengths=lengths, given=features, noise=noise, known=known, around=around)

    def repeat(self, times: int) -> Context:
        """The context of ``times`` copies of the batch, one after another."""
        lengths = None if self.lengths is None else self.lengths.repeat(times)
        given = (item.repeat(times, *[1] * (item.ndim - 1)) for item in self.given)
        known = self.known and replace(self.known, symbols=self.known.symbols.repeat(times, 1))
        around = self.around and self.around.repeat(times)
        return Context(lengths=lengths, given=tuple(given), known=known, around=around)


_WAY = "lengths are passed as Context(lengths=n), all that a network reads as Context(given=(features,))"


def _shown(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_lengths(lengths: object, batch: int | None = None, name: str = "lengths") -> None:
    """InputError unless ``lengths`` (or labels, by ``name``) are an int64 tensor ``(batch,)``."""
    if not (
        isinstance(lengths, Tensor)
        and (lengths.dtype, lengths.ndim) == (torch.int64, 1)
        and batch in (None, len(lengths))
    ):
        expected = "batch" if batch is None else batch
        if not isinstance(lengths, Tensor):
            advice = f"torch.as_tensor({name}) is a tensor"
        elif lengths.dtype != torch.int64:
            advice = f"{name}.long() has the right dtype"
        else:
            advice = "give a vector with one number for each row"
        raise InputError(
            f"{name} must be int64 ({expected},), one for each row of the batch, found {_shown(lengths)}; "
            f"{advice}"
        )


def lengths_in(context: Context | None, batch: int | None = None) -> Tensor | None:
    """The lengths, int64 ``(batch,)``, or None when every entry is present.

    Raises:
        InputError: a context that is not a `Context`, or lengths of another number of sequences.
    """
    if context is None:
        return None
    if not isinstance(context, Context):
        raise InputError(f"context must be a dflow.core.Context, found {_shown(context)}; {_WAY}")
    if context.lengths is not None and batch is not None:
        check_lengths(context.lengths, batch)
    return context.lengths


def only_lengths(context: Context | None, batch: int | None = None) -> Tensor | None:
    """`lengths_in`, for networks that read nothing else: InputError for a context with given tensors."""
    lengths = lengths_in(context, batch)
    if context is not None and context.given:
        raise InputError(
            f"this network reads no given tensors, found {', '.join(map(_shown, context.given))}; use a "
            "Perceptron, DenseNet or MaskedConv with room for them, or a network of your own that reads "
            "context.given"
        )
    return lengths


def only_given(context: Context | None) -> tuple[Tensor, ...]:
    """The given tensors, for layers and laws without lengths: InputError for a context with lengths."""
    if lengths_in(context) is not None:
        raise InputError(
            "lengths are for models of sequences of symbols; this one takes all entries as present"
        )
    if context is not None and context.known is not None:
        raise InputError("known entries are for laws of symbols; this one takes none")
    if context is not None and context.noise is not None:
        raise InputError("noise by address is for laws of symbols; draw from this one with a generator")
    return () if context is None else context.given


def conditioned(net: Callable[..., T], context: Context | None) -> T:
    """The output ``net(x, rest)`` of the net of a conditional law, with x the first of the given tensors.

    ``rest`` is the context without x. It is left out where it is empty, so that the net may take one tensor.

    Raises:
        ValueError: a context without given tensors.
    """
    lengths, around = lengths_in(context), around_for(net, context)
    if context is None or not context.given:
        raise ValueError("a conditional law needs a context: Context(given=(features,))")
    x, *others = context.given
    if lengths is None and around is None and not others:
        return net(x)
    return net(x, Context(lengths=lengths, given=tuple(others), around=around))


def around_for(net: object, context: Context | None) -> Around | None:
    """What stands around the entries of a layer or law, for its net, whose attribute ``takes_known`` is true.

    Raises:
        InputError: another net, which would not read it.
    """
    lengths_in(context)
    around = None if context is None else context.around
    if around is not None and not getattr(net, "takes_known", False):
        raise InputError(_NO_KNOWN)
    return around


def span_in(context: Context | None, dim: int) -> tuple[int, int]:
    """The entries of a law or layer that is built for ``dim``: the first, and how many there are.

    These are all, unless it is one of hidden entries alone.
    """
    lengths_in(context)
    around = None if context is None else context.around
    return (0, dim) if around is None else (around.start, around.number)


def known_in(context: Context | None) -> Known | None:
    """The entries that are known, or None."""
    lengths_in(context)
    return None if context is None else context.known


def noise_in(
    context: Context | None, n: int, generator: torch.Generator | None, device: torch.device
) -> Noise:
    """The noise that ``n`` sequences of symbols are drawn by: that of the context, else one of a generator.

    Raises:
        InputError: noise of another number of samples.
    """
    lengths_in(context)
    if context is None or context.noise is None:
        return Noise.of(generator, n, device)
    if len(context.noise.samples) != n:
        raise InputError(f"the noise is of {len(context.noise.samples)} samples, and {n} are drawn")
    return context.noise


def present(context: Context | None, batch: int, dim: int, *, takes_known: bool = False) -> Tensor | None:
    """Bool ``(batch, dim)``, True where an entry is present; None when all are.

    Raises:
        InputError: known entries, for a law or layer that does not say that it takes them.

    >>> present(Context(lengths=torch.tensor([2, 0])), 2, 3)
    tensor([[ True,  True, False],
            [False, False, False]])
    """
    lengths = lengths_in(context, batch)
    if context is not None and context.known is not None and not takes_known:
        raise InputError(_NO_KNOWN)
    return None if lengths is None else torch.arange(dim, device=lengths.device) < lengths[:, None]


_NO_KNOWN = (
    "this law takes no known entries; grouped and any-order models, and bipartite and multiscale ones with a "
    "context, take them anywhere, laws drawn from left to right before the others"
)


class Bijector(nn.Module, ABC):
    """An invertible map between data ``x`` and latent ``z`` of the same shape.

    ``log_det`` is the log of the absolute Jacobian determinant of the map just applied, in nats, of
    shape ``(batch,)``; it is exactly 0 on Z/K and on the integers.
    """

    @abstractmethod
    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: ``(z, log_det)``."""

    @abstractmethod
    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: ``(x, log_det)``."""

    @property
    def num_calls(self) -> int:
        """Sequential network evaluations that one `inverse` costs."""
        return 0

    def layers(self) -> Iterator[Bijector]:
        """The layers of the bijector, in the order in which data pass through them."""
        yield self


class Elementwise(nn.Module, ABC):
    """A family of one-dimensional bijections that holds no weights.

    ``params`` has shape ``(batch, dim, num_params)`` and comes from a conditioner. ``log_det`` has
    shape ``(batch, dim)``: one term an entry, summed by the layer that owns the family.
    """

    #: Numbers that a conditioner has to give for each entry.
    num_params: int

    #: On Z/K: whether the params of an entry are K logits that can learn to predict its symbol. Then the rule
    #: ``layerwise`` of `dflow.objectives` can train it; see there for what the other rules need.
    predicts: bool = False

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Data to latent: ``(z, log_det)``."""

    @abstractmethod
    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Latent to data: ``(x, log_det)``."""


class Distribution(nn.Module, ABC):
    """A normalised law with exact likelihood and exact sampling.

    A bound is never called ``log_prob``.
    """

    @abstractmethod
    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, shape ``(batch,)``."""

    @abstractmethod
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws, in the inference dtype of the domain."""

    #: Whether the law has terms by entry, see `log_prob_each`.
    by_entry: bool = False

    def log_prob_each(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The terms of `log_prob`, ``(batch, n)`` in nats: one an entry, 0 for those that are not scored.

        Raises:
            InputError: the law is not `by_entry`: it has no terms for single entries.
        """
        raise InputError(
            f"{type(self).__name__} gives whole sequences a probability, and single entries no share in it"
        )

    #: Whether `log_prob` and `sample` read one table of probabilities, so that they cannot disagree.
    one_table: bool = False

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """Whether drawing and scoring agree, checked on ``x`` in the inference dtype.

        None where nothing was checked: the law has no check of its own and is not `one_table`. See
        `dflow.distributions.Stepwise` for a check.
        """
        return True if self.one_table else None

    @property
    def num_calls(self) -> int:
        """Sequential network evaluations that one `sample` costs."""
        return 0

    def needed(self, length: int, context: Context | None = None) -> int:
        """Network evaluations after which the first ``length`` entries of one sequence are drawn.

        With known entries in the context: of the others given these.
        """
        return self.num_calls

    @property
    def budgets(self) -> Sequence[int]:
        """The numbers of network evaluations in which the law can be drawn, the arguments of `at`."""
        return [self.num_calls]

    def at(self, calls: int) -> Distribution:
        """The law that is drawn in ``calls`` network evaluations; it shares the network with this one.

        Raises:
            ValueError: the law cannot be drawn in that number of calls.
        """
        if calls != self.num_calls:
            raise ValueError(f"no law of {calls} calls; there are {list(self.budgets)}")
        return self

    def rounded_mean(self, context: Context | None = None) -> Tensor:
        """The mean of each entry of a law of integers, rounded: int64 ``(batch, dim)``.

        Raises:
            ValueError: the mean has no closed form.
        """
        raise ValueError(f"the mean of {type(self).__name__} is not known: ask for all levels")


def agreed(*checks: bool | None) -> bool | None:
    """The result of several checks together: False where one failed, else None where one was not made.

    >>> agreed(True, None), agreed(None, False), agreed(True, True)
    (None, False, True)
    """
    return False if False in checks else None if None in checks else True


class SequenceNet(Protocol):
    """The network of a sequence law or layer: one pass for scoring, one step for each row when drawing.

    It is an ``nn.Module``, built with an order ``(R, S)`` (see `dflow.ops.orders`), S = 1 in autoregressive
    layers. A network that can walk other orders has a method ``plan(order)``, and takes its result as third
    argument of the call and of `start`.
    """

    def __call__(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Params ``(batch, dim, P)`` by position in both modes; they depend on earlier rows only."""
        ...

    def start(self, batch: int, context: Context | None = None) -> Any:
        """The state before the first step; its type is private to the network."""
        ...

    def step(self, x: Tensor | None, state: Any) -> Tensor:
        """Params ``(batch, m, P)`` of the m entries of the next row, given the symbols ``x`` of the last row.

        ``x`` is int64, None at the first step. Padding (entries at or beyond ``dim``) is in neither tensor.
        """
        ...


class AheadNet(SequenceNet, Protocol):
    """A network of sequences, drawn from left to right, that reads several entries in one call.

    So symbols that were drafted are verified in one call, and those that were wrong are gone back behind.

    Attributes:
        ahead_cost: what one more entry in a call takes, in calls of one entry, for one sequence on a CPU.

    A state may have an attribute ``even``. Set to True, calls of `ahead` of one width give an entry of one
    sequence the same bits wherever they begin and whatever stands behind it, on one machine and one thread.
    """

    ahead_cost: float

    def ahead(self, x: Tensor, begins: Sequence[int], state: Any) -> Tensor:
        """Params ``(batch, w, P)`` of the w entries of each sequence from its begin on, as w steps give them.

        What a state has read at and beyond the begins is forgotten. It is the state of `start`, or of
        `start` and then ``read`` of so many symbols as the begins are at the first call; never of `step`.

        Args:
            x: the symbol before each of the w entries, int64 ``(batch, w)``; K before the first entry.
            begins: the first of the entries of each sequence: at most one beyond the entries of the calls
                before, and at least `dflow.ops.recent.LOOK_BACK` - 32 before the furthest of these.
            state: see above.
        """
        ...
