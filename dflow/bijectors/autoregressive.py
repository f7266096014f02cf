"""Autoregressive layer: each entry is transformed given those before it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dflow.bijectors.conditioner import Conditioned, check_params
from dflow.core import Context, Elementwise, lengths_in, present
from dflow.ops.lengths import keep_absent
from dflow.ops.precision import full_precision


class Autoregressive(Conditioned):
    """``z_i = elementwise(x_i; net(x_<i))``.

    `forward` costs one parallel call. `inverse` on symbols repeats ``x <- elementwise.inverse(z, net(x))``,
    with the parallel call that `forward` uses, until nothing changes. The only fixed point is the exact
    inverse, and it is reached within dim + 1 calls from anywhere, since each adds at least one entry to the
    prefix that is right. ``inversion`` says where it starts:

    - "loop": from the result of one cached step an entry, which differs from the fixed point only where
      cached and parallel results differ by rounding. Normally dim steps and one call.
    - "jacobi": from z, without any step. It needs the fewer calls, the less entries depend on each other; two
      where the net ignores x. A call is parallel: it costs more than a step but much less than dim steps.

    `inverse` on floats (one-hot rows, reals) takes dim parallel calls and is differentiable. The attribute
    ``calls`` counts steps and calls of all inversions of symbols so far.

    Absent entries (context of lengths) stay as they are.

    Source: Papamakarios et al. 2017, arXiv 1705.07057; Tran et al. 2019, arXiv 1905.10347; Song et al.
    2021, arXiv 2002.03629 (fixed-point iteration).

    Args:
        elementwise: family of the transformation.
        net: the conditioner, a `SequenceNet`.
        dim: number of entries.
        inversion: "loop" or "jacobi"; an attribute that may be changed later and is not saved.

    Raises:
        ValueError: dim < 1, another inversion, or an ``x`` or params of another shape than announced.
    """

    def __init__(
        self,
        elementwise: Elementwise,
        net: nn.Module,
        dim: int,
        inversion: Literal["loop", "jacobi"] = "loop",
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}")
        if inversion not in ("loop", "jacobi"):
            raise ValueError(f"inversion must be 'loop' or 'jacobi', found {inversion!r}")
        self.elementwise = elementwise
        self.net = net
        self.dim = dim
        self.inversion = inversion
        self.calls = 0

    def moved(self, context: Context | None = None) -> Tensor:
        """All entries."""
        return torch.arange(self.dim, device=next(self.net.parameters()).device)

    def params(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters of all entries in one parallel call, ``(batch, dim, num_params)``."""
        if x.shape[1] != self.dim:
            raise ValueError(f"expected {self.dim} entries, found x of shape {tuple(x.shape)}")
        lengths_in(context, len(x))  # checks the context before the net sees it
        with full_precision(x):
            params = self.net(x, context)
        return check_params(params, x.shape[0], self.dim, self.elementwise.num_params)

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det ``(batch,)``."""
        with full_precision(x):
            z, log_det = self.elementwise.forward(x, self.params(x, context))
        return self._present(z, x, log_det, context)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: x like ``z``, log_det ``(batch,)``.

        Raises:
            RuntimeError: the net gives another result for the same input (dropout in training mode).
        """
        with full_precision(z):
            if z.is_floating_point():
                return self._inverse_rows(z, context)
            with torch.no_grad():
                return self._inverse_symbols(z, context)

    def _inverse_rows(self, z: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        x, terms = z, []
        for i in range(self.dim):
            params = self.params(x, context)[:, i : i + 1]
            entry, term = self.elementwise.inverse(z[:, i : i + 1], params)
            x = torch.cat([x[:, :i], entry, z[:, i + 1 :]], 1)
            terms.append(term)
        return self._present(x, z, torch.cat(terms, 1), context)

    def _inverse_symbols(self, z: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        x = z if self.inversion == "jacobi" else self._by_steps(z, context)
        for _ in range(self.dim + 1):
            new, log_det = self.elementwise.inverse(z, self.params(x, context))
            new, log_det = self._present(new, z, log_det, context)
            self.calls += 1
            if torch.equal(new, x):
                return new, log_det
            x = new
        raise RuntimeError(
            f"no inverse after {self.dim + 1} calls: the net gives another result at each call "
            "(dropout? call eval() on the model first) or looks ahead"
        )

    def _by_steps(self, z: Tensor, context: Context | None) -> Tensor:
        lengths = lengths_in(context, len(z))
        # Entries beyond the longest sequence are absent in every row.
        steps = self.dim if lengths is None else min(self.dim, max(lengths.tolist(), default=0))
        net: Any = self.net
        mask = present(context, len(z), self.dim)
        state, previous, x = net.start(z.shape[0], context), None, z.clone()
        for i in range(steps):
            params = check_params(net.step(previous, state), z.shape[0], 1, self.elementwise.num_params)
            entry = z[:, i : i + 1]
            previous, _ = self.elementwise.inverse(entry, params)
            previous = keep_absent(previous, entry, None if mask is None else mask[:, i : i + 1])
            x[:, i : i + 1] = previous
        self.calls += steps
        return x

    def _present(
        self, new: Tensor, old: Tensor, log_det: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        mask = present(context, len(new), self.dim)
        if mask is not None:
            log_det = torch.where(mask, log_det, 0)
        return keep_absent(new, old, mask), log_det.sum(1)

    @property
    def num_calls(self) -> int:
        """One step an entry and the parallel call that verifies the result; an upper bound for "jacobi"."""
        return self.dim + 1

    @property
    def forward_calls(self) -> int:
        """One."""
        return 1
