"""Autoregressive layer: each entry is transformed given those before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dflow.bijectors.conditioner import check_params, full_precision
from dflow.core import Bijector, Context, Elementwise
from dflow.ops.lengths import keep_absent, lengths, present


class Autoregressive(Bijector):
    """``z_i = elementwise(x_i; net(x_<i))``.

    `forward` costs one parallel call. `inverse` on symbols takes one cached step an entry and then
    verifies with the parallel call that `forward` uses, so that it is its exact inverse although cached
    and parallel results differ in the last bits: ``x <- elementwise.inverse(z, net(x))`` is repeated
    until nothing changes, which is normally at once, and always within dim calls since each adds at
    least one entry to the prefix that is right. `inverse` on one-hot rows takes dim parallel calls and
    is differentiable.

    Absent entries (context of lengths) stay as they are.

    Source: Papamakarios et al. 2017, arXiv 1705.07057; Tran et al. 2019, arXiv 1905.10347.

    Args:
        elementwise: family of the transformation.
        net: the conditioner, a `SequenceNet`.
        dim: number of entries.

    Raises:
        ValueError: dim < 1, or an ``x`` or params of another shape than announced.
    """

    def __init__(self, elementwise: Elementwise, net: nn.Module, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}")
        self.elementwise = elementwise
        self.net = net
        self.dim = dim

    def params(self, x: Tensor, context: Context = None) -> Tensor:
        """Parameters of all entries in one parallel call, ``(batch, dim, num_params)``."""
        if x.shape[1] != self.dim:
            raise ValueError(f"expected {self.dim} entries, found x of shape {tuple(x.shape)}")
        with full_precision(x):
            params = self.net(x, context)
        return check_params(params, x.shape[0], self.dim, self.elementwise.num_params)

    def forward(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det ``(batch,)``."""
        with full_precision(x):
            z, log_det = self.elementwise.forward(x, self.params(x, context))
        return self._present(z, x, log_det, context)

    def inverse(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Latent to data: x like ``z``, log_det ``(batch,)``.

        Raises:
            RuntimeError: the net answers differently when asked twice (dropout in training mode).
        """
        with full_precision(z):
            if z.is_floating_point():
                return self._inverse_rows(z, context)
            with torch.no_grad():
                return self._inverse_symbols(z, context)

    def _inverse_rows(self, z: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        x, terms = z, []
        for i in range(self.dim):
            params = self.params(x, context)[:, i : i + 1]
            entry, term = self.elementwise.inverse(z[:, i : i + 1], params)
            x = torch.cat([x[:, :i], entry, z[:, i + 1 :]], 1)
            terms.append(term)
        return self._present(x, z, torch.cat(terms, 1), context)

    def _inverse_symbols(self, z: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        found = lengths(context)
        # Entries beyond the longest sequence are absent in every row.
        steps = self.dim if found is None else min(self.dim, max(found.tolist(), default=0))
        net: Any = self.net
        state, previous, x = net.start(z.shape[0], context), None, z.clone()
        for i in range(steps):
            params = check_params(net.step(previous, state), z.shape[0], 1, self.elementwise.num_params)
            previous, _ = self.elementwise.inverse(z[:, i : i + 1], params)
            x[:, i : i + 1] = previous
        for _ in range(self.dim + 1):
            new, log_det = self.elementwise.inverse(z, self.params(x, context))
            new, log_det = self._present(new, z, log_det, context)
            if torch.equal(new, x):
                return x, log_det
            x = new
        raise RuntimeError(
            f"no inverse after {self.dim + 1} calls: the net answers differently each time it is asked "
            "(dropout? call eval() on the model first) or looks ahead"
        )

    def _present(self, new: Tensor, old: Tensor, log_det: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        mask = present(context, self.dim)
        if mask is not None:
            log_det = torch.where(mask, log_det, 0)
        return keep_absent(new, old, mask), log_det.sum(1)

    @property
    def num_calls(self) -> int:
        """One step an entry, and the parallel call that verifies."""
        return self.dim + 1

    @property
    def forward_calls(self) -> int:
        """One."""
        return 1
