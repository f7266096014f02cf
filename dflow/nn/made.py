"""Masked autoencoder for distribution estimation: a feed-forward sequence net."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, only_lengths
from dflow.nn.recompute import Recomputable
from dflow.ops.modular import check_alphabet, one_hot


class MADE(Recomputable):
    """Params at i depend on ``x[:, :i]`` only, by masks on the weights of a feed-forward net.

    The masks are buffers applied at each call, so that training cannot change them. Both modes run the same
    products on the same rows and agree to the bit. The net ignores lengths, which is right: absent entries
    come last.

    Source: Germain et al. 2015, arXiv 1502.03509.

    Args:
        dim: number of entries.
        K: size of the alphabet.
        num_params: numbers to give for each entry.
        hidden_sizes: units of each hidden layer.

    Raises:
        ValueError: dim < 1, K < 2, no hidden layer or an empty one, an ``x`` of another dim.

    >>> MADE(3, 5, 4, [8])(torch.tensor([[0, 1, 2]])).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, dim: int, K: int, num_params: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        if dim < 1 or not hidden_sizes or min(hidden_sizes) < 1:
            raise ValueError(f"dim and hidden sizes must be at least 1, found {dim}, {list(hidden_sizes)}")
        self.dim = dim
        self.K = check_alphabet(K)
        self.num_params = num_params
        # A unit of degree d may depend on the first d entries; params at i have degree i.
        entries = torch.arange(dim)
        degrees = [(entries + 1).repeat_interleave(K)]
        degrees += [torch.arange(size) % max(1, dim - 1) + 1 for size in hidden_sizes]
        degrees += [entries.repeat_interleave(num_params)]
        self.layers = nn.ModuleList(_MaskedLinear(a, b) for a, b in pairwise(degrees))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Params ``(batch, dim, num_params)`` of symbols ``(batch, dim)`` or rows ``(batch, dim, K)``."""
        only_lengths(context, len(x))
        if x.shape[1] != self.dim:
            raise ValueError(f"expected {self.dim} entries, found x of shape {tuple(x.shape)}")
        return self.recomputed(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        dtype = self._first.dtype
        h: Tensor = (x if x.is_floating_point() else one_hot(x, self.K, dtype)).to(dtype).flatten(1)
        for i, layer in enumerate(self.layers):
            h = layer(h if i == 0 else F.relu(h))
        return h.view(-1, self.dim, self.num_params)

    def start(self, batch: int, context: Context | None = None) -> _MadeState:
        """State before the first entry."""
        only_lengths(context, batch)
        return _MadeState(torch.zeros(batch, self.dim, dtype=torch.int64, device=self._first.device))

    def step(self, x_prev: Tensor | None, state: _MadeState) -> Tensor:
        """Params ``(batch, 1, num_params)`` of the next entry: one full call."""
        if x_prev is not None:
            state.x[:, state.known : state.known + 1] = x_prev
            state.known += 1
        params: Tensor = self(state.x)
        return params[:, state.known : state.known + 1]

    @property
    def _first(self) -> Tensor:
        return next(self.parameters())


class _MadeState:
    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.known = 0


class _MaskedLinear(nn.Linear):
    """A unit reads the inputs whose degree is at most its own."""

    mask: Tensor

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__(len(inputs), len(outputs))
        self.register_buffer("mask", inputs <= outputs[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.where(self.mask, self.weight, 0), self.bias)
