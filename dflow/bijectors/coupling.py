"""Coupling layer: some entries are transformed given others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dflow.bijectors.conditioner import Conditioned, check_params
from dflow.core import Context, Elementwise, around_for, lengths_in, present, span_in
from dflow.ops.lengths import keep_absent
from dflow.ops.memo import Memo, OnCpu
from dflow.ops.precision import full_precision


@dataclass(frozen=True)
class _Halves:
    """Sizes of known and hidden entries that are the two halves of a row."""

    sizes: tuple[int, int]
    known_first: bool


def _halves(known: Tensor, hidden: Tensor, dim: int) -> _Halves | None:
    line = list(range(dim))
    known_first, hidden_first = known.tolist() + hidden.tolist(), hidden.tolist() + known.tolist()
    if known_first == line:
        return _Halves((len(known), len(hidden)), True)
    return _Halves((len(hidden), len(known)), False) if hidden_first == line else None


class Coupling(Conditioned):
    """``z_hidden = elementwise(x_hidden; net(x_known))``, every other entry as it was.

    The net is called as ``net(x_known, context)`` with ``x_known`` ``(batch, n_known)`` or
    ``(batch, n_known, K)`` and returns ``(batch, n_hidden, num_params)``: it sees only what is known
    and returns parameters of the hidden entries only. Both directions cost one call. With lengths as context
    absent entries stay as they are, and the net has to ignore the absent ones among its input.

    In a law of hidden entries alone (`dflow.flows.Infilled`) there are some of the entries only. Then the net
    reads what the context knows around them, as its attribute ``takes_known`` says; such a net may do without
    any entry that the mask lets it see.

    Source: Dinh et al. 2017, arXiv 1605.08803; Tran et al. 2019, arXiv 1905.10347 (bipartite flow).

    Args:
        elementwise: family of the transformation.
        net: the conditioner.
        mask: bool ``(dim,)``, True for entries that the net sees.
        hidden: bool ``(dim,)``, True for entries to transform; default ``~mask``.

    Raises:
        ValueError: masks that overlap, are empty, not bool or of different shapes; an ``x`` or params of
            another shape than announced.
    """

    known_index: Tensor
    hidden_index: Tensor

    def __init__(
        self, elementwise: Elementwise, net: nn.Module, mask: Tensor, hidden: Tensor | None = None
    ) -> None:
        super().__init__()
        hidden = ~mask if hidden is None else hidden
        for name, value in (("mask", mask), ("hidden", hidden)):
            may_be_empty = name == "mask" and getattr(net, "takes_known", False)
            if value.dtype != torch.bool or value.ndim != 1 or not (may_be_empty or value.any()):
                raise ValueError(
                    f"{name} must be bool (dim,) with at least one True, found {value.dtype} "
                    f"{tuple(value.shape)} with {int(value.sum())} True"
                )
        if mask.shape != hidden.shape:
            raise ValueError(f"mask has {len(mask)} entries, hidden {len(hidden)}")
        if (mask & hidden).any():
            raise ValueError(f"entries {(mask & hidden).nonzero().flatten().tolist()} are known and hidden")
        self.elementwise = elementwise
        self.net = net
        self.dim = len(mask)
        self.register_buffer("known_index", mask.nonzero().flatten())
        self.register_buffer("hidden_index", hidden.nonzero().flatten())
        self._two: Memo[_Halves | None] = Memo()
        self._some: Memo[tuple[Tensor, Tensor]] = Memo()
        self._on_cpu = OnCpu()
        self._halves()

    def _halves(self) -> _Halves | None:
        """The two halves, as in images; None where entries are mixed. Slices are much faster than indices."""
        return self._two(
            lambda: _halves(self.known_index, self.hidden_index, self.dim),
            self.known_index,
            self.hidden_index,
        )

    def _places(self, start: int, n: int) -> tuple[Tensor, Tensor]:
        """Known and hidden entries among the n from ``start`` on, int64, counted from there."""
        both = self.known_index, self.hidden_index
        if n == self.dim:
            return both
        device = self.known_index.device

        def some() -> tuple[Tensor, Tensor]:
            known, hidden = (
                (index[(index >= start) & (index < start + n)] - start).to(device)
                for index in self._on_cpu.of(*both)
            )
            return known, hidden

        return self._some(some, *both, key=(start, n))

    def _cut(self, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """Known and hidden entries."""
        start, n = span_in(context, self.dim)
        if x.shape[1] != n:
            raise ValueError(f"expected {n} entries, found x of shape {tuple(x.shape)}")
        halves = self._halves()
        if halves is None or n < self.dim:
            known, hidden = self._places(start, n)
            return x.index_select(1, known), x.index_select(1, hidden)
        head, tail = x.split(halves.sizes, 1)
        return (head, tail) if halves.known_first else (tail, head)

    def _join(self, x: Tensor, known: Tensor, hidden: Tensor, moved: Tensor) -> Tensor:
        """``x`` with other hidden entries."""
        halves = self._halves()
        if halves is None or x.shape[1] < self.dim:
            return x.index_copy(1, moved, hidden)
        return torch.cat([known, hidden] if halves.known_first else [hidden, known], 1)

    def params(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters of the hidden entries, ``(batch, n_hidden, num_params)``.

        They depend only on the known entries of ``x``, which are the same in data and latent.
        """
        return self._params(*self._cut(x, context), context)

    def _params(self, known: Tensor, hidden: Tensor, context: Context | None) -> Tensor:
        # Both check the context before the net sees it.
        lengths_in(context, len(known))
        around_for(self.net, context)
        with full_precision(known):
            params = self.net(known, context)
        return check_params(params, len(hidden), hidden.shape[1], self.elementwise.num_params)

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det ``(batch,)``."""
        return self._map(x, context, True)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: x like ``z``, log_det ``(batch,)``."""
        return self._map(z, context, False)

    def _map(self, x: Tensor, context: Context | None, to_latent: bool) -> tuple[Tensor, Tensor]:
        known, old = self._cut(x, context)
        params = self._params(known, old, context)
        with full_precision(x):
            new, log_det = (self.elementwise.forward if to_latent else self.elementwise.inverse)(old, params)
        mask, moved = present(context, *x.shape[:2]), self.moved(context)
        if mask is not None:
            mask = mask.index_select(1, moved)
            new = keep_absent(new, old, mask)
            log_det = torch.where(mask, log_det, 0)
        return self._join(x, known, new, moved), log_det.sum(1)

    def moved(self, context: Context | None = None) -> Tensor:
        """The hidden entries."""
        return self._places(*span_in(context, self.dim))[1]

    @property
    def num_calls(self) -> int:
        """One."""
        return 1

    @property
    def forward_calls(self) -> int:
        """One."""
        return 1
