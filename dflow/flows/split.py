"""Factor a part out and model it given the rest."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dflow.core import Context, Distribution, agreed, lengths_in, present, span_in
from dflow.ops.memo import Memo, OnCpu


class Split(Distribution):
    """``log p(x) = log conditional(x_b | x_a) + log base(x_a)``, x_a the kept entries, x_b the others.

    The context of the conditional has ``x_a`` as its first given tensor, before those of the outer context.
    The length of a part is the number of its entries before the length T of the whole; the conditional gets
    the lengths of x_a too, as its last given tensor.

    In a law of hidden entries alone (`dflow.flows.Infilled`) there are some of the entries only, and both
    parts get what stands around them.

    Source: Dinh et al. 2017, arXiv 1605.08803 (multi-scale); Lindt and Hoogeboom 2021, arXiv 2107.11625
    (split priors).

    Args:
        mask: bool ``(dim,)``, True for entries kept.
        conditional: law of x_b given x_a.
        base: law of x_a.

    Raises:
        ValueError: a mask that is not bool ``(dim,)`` or leaves a part empty; an ``x`` of another dim.
    """

    kept_index: Tensor
    rest_index: Tensor

    def __init__(self, mask: Tensor, conditional: Distribution, base: Distribution) -> None:
        super().__init__()
        if mask.dtype != torch.bool or mask.ndim != 1 or mask.all() or not mask.any():
            raise ValueError(f"mask must be bool (dim,) with both values, found {mask.dtype} {mask.tolist()}")
        self.dim = len(mask)
        self.conditional = conditional
        self.base = base
        self.register_buffer("kept_index", mask.nonzero().flatten())
        self.register_buffer("rest_index", (~mask).nonzero().flatten())
        self._on_cpu = OnCpu()
        self._span: Memo[tuple[Tensor, Tensor, int, int]] = Memo()

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``."""
        (x_a, of_base), (x_b, of_conditional) = self.parts(x, context)
        return self.conditional.log_prob(x_b, of_conditional) + self.base.log_prob(x_a, of_base)

    def parts(self, x: Tensor, context: Context | None = None) -> tuple[tuple[Tensor, Context | None], ...]:
        """``x_a`` with the context of the base, and ``x_b`` with that of the conditional."""
        start, n = span_in(context, self.dim)
        if x.shape[1] != n:
            raise ValueError(f"expected {n} entries, found x of shape {tuple(x.shape)}")
        present(context, len(x), n)
        kept, rest, _, _ = self._places(start, n)
        x_a, x_b = x.index_select(1, kept), x.index_select(1, rest)
        of_base, of_conditional = self.contexts(x_a, context)
        return (x_a, of_base), (x_b, of_conditional)

    def _places(self, start: int, n: int) -> tuple[Tensor, Tensor, int, int]:
        """Kept and other entries among the n from ``start`` on, counted from there; those before them."""
        both = self.kept_index, self.rest_index
        if n == self.dim:
            return *both, 0, 0
        device = self.kept_index.device

        def places() -> tuple[Tensor, Tensor, int, int]:
            on_cpu = self._on_cpu.of(*both)
            kept, rest = (
                (index[(index >= start) & (index < start + n)] - start).to(device) for index in on_cpu
            )
            kept_before, rest_before = (int((index < start).sum()) for index in on_cpu)
            return kept, rest, kept_before, rest_before

        return self._span(places, *both, key=(start, n))

    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws: x_a from the base, then x_b given x_a."""
        present(context, n, self.dim)
        x_a = self.base.sample(n, self.contexts(None, context)[0], generator)
        x_b = self.conditional.sample(n, self.contexts(x_a, context)[1], generator)
        return self.join(x_a, x_b, context)

    def join(self, x_a: Tensor, x_b: Tensor, context: Context | None = None) -> Tensor:
        """``x`` from its parts: the inverse of `parts`."""
        start, n = span_in(context, self.dim)
        kept, rest, _, _ = self._places(start, n)
        x = x_a.new_empty(len(x_a), n, *x_a.shape[2:])
        return x.index_copy(1, kept, x_a).index_copy(1, rest, x_b)

    def contexts(self, x_a: Tensor | None, context: Context | None) -> tuple[Context | None, Context]:
        """The contexts of base and conditional; without ``x_a`` only that of the base is valid."""
        lengths, given = lengths_in(context), () if context is None else context.given
        with_kept = given if x_a is None else (x_a, *given)
        start, n = span_in(context, self.dim)
        noise, around = (None, None) if context is None else (context.noise, context.around)
        kept_places, rest_places, *before = self._places(start, n)
        kept, rest = (
            Context(
                noise=noise and noise.select(index),
                around=around and replace(around, number=len(index), start=skipped),
            )
            for index, skipped in zip((kept_places, rest_places), before, strict=True)
        )
        if lengths is None:
            of_base = context if noise is None and around is None else replace(kept, given=given)
            return of_base, replace(rest, given=with_kept)
        total = lengths.clamp(max=n)
        num_kept = (kept_places < total[:, None]).sum(1)
        return (
            replace(kept, lengths=num_kept, given=given),
            replace(rest, lengths=total - num_kept, given=(*with_kept, num_kept)),
        )

    def rounded_mean(self, context: Context | None = None) -> Tensor:
        """The mean of the base, joined with the mean of the conditional given it."""
        x_a = self.base.rounded_mean(self.contexts(None, context)[0])
        return self.join(x_a, self.conditional.rounded_mean(self.contexts(x_a, context)[1]), context)

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """The round trips of both parts, each by itself."""
        (x_a, of_base), (x_b, of_conditional) = self.parts(x, context)
        return agreed(self.base.round_trip(x_a, of_base), self.conditional.round_trip(x_b, of_conditional))

    @property
    def num_calls(self) -> int:
        """The calls of the base and of the conditional."""
        return self.base.num_calls + self.conditional.num_calls
