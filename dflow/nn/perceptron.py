"""Perceptrons from known entries to hidden ones: of symbols, with weights by position, and of numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, only_lengths
from dflow.nn.flat import check_levels, check_sizes, flat_input, zero_
from dflow.nn.recompute import Recomputable


class InfillPerceptron(Recomputable):
    """Parameters of hidden entries given known ones, for short sequences.

    A symbol is looked up in the table of its position and the rows are added up (the first layer of a
    perceptron on one-hot rows); residual layers follow, and one product gives the params of all entries.

    Args:
        K: size of the alphabet.
        num_params: numbers for each hidden entry.
        known, hidden: int64 ``(n_known,)`` and ``(n_hidden,)``: positions in the whole sequence.
        hidden_size: width.
        num_layers: residual layers, each of two products.
        intermediate_size: width between the two; default ``4 * hidden_size``.
        dropout: rate for the output of a residual layer.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).
    """

    known: Tensor

    def __init__(
        self,
        K: int,
        num_params: int,
        known: Tensor,
        hidden: Tensor,
        *,
        hidden_size: int = 128,
        num_layers: int = 1,
        intermediate_size: int | None = None,
        dropout: float = 0.0,
        zero_head: bool = False,
    ) -> None:
        super().__init__()
        if len(known) < 1 or len(hidden) < 1:
            raise ValueError(
                f"an infilling network needs known and hidden entries, found {len(known)} and {len(hidden)}"
            )
        self.K, self.num_hidden = K, len(hidden)
        self.register_buffer("known", known.clone())
        # Row K of a position stands for an absent entry.
        self.embedding = nn.Parameter(torch.randn(len(known), K + 1, hidden_size) / len(known) ** 0.5)
        inner = intermediate_size or 4 * hidden_size
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden_size),
                nn.Linear(hidden_size, inner),
                nn.GELU(approximate="tanh"),
                nn.Linear(inner, hidden_size),
                nn.Dropout(dropout),
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, len(hidden) * num_params)
        nn.init.zeros_(self.head.bias)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters ``(batch, n_hidden, num_params)``.

        Args:
            x: int64 ``(batch, n_known)`` or one-hot rows ``(batch, n_known, K)``.
            context: lengths of whole sequences, or None.
        """
        return self.recomputed(self._forward, x, only_lengths(context, len(x)))

    def _forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        symbols = x.argmax(-1) if x.is_floating_point() else x
        if lengths is not None:
            symbols = symbols.masked_fill(self.known >= lengths[:, None], self.K)
        rows = symbols + (self.K + 1) * torch.arange(len(self.known), device=x.device)
        h: Tensor = F.embedding_bag(rows, self.embedding.flatten(0, 1), mode="sum")
        if x.is_floating_point() and x.requires_grad:
            # The sum above is that of the inference mode to the last bit. The same sum as a product with the
            # one-hot rows contributes only its gradient.
            weight = torch.where((symbols == self.K)[..., None], 0.0, x).to(h.dtype)
            soft = torch.einsum("bik,ikh->bh", weight, self.embedding.detach()[:, : self.K])
            h = h + (soft - soft.detach())
        for layer in self.layers:
            h = h + layer(h)
        out: Tensor = self.head(self.norm(h))
        params: Tensor = out.unflatten(1, (self.num_hidden, -1))
        return params


class Perceptron(Recomputable):
    """Parameters of a few entries given a few numbers: a product and SiLU, then residual ones as wide.

    A cheap conditioner of vectors, called like `dflow.nn.densenet.DenseNet`.

    Args:
        in_features: numbers in a row of the input.
        out_entries: number of entries that get parameters.
        num_params: parameters of each entry.
        hidden_size: width.
        num_layers: hidden layers.
        context_features: numbers in a row of the context; 0 for no context.
        levels: values 0..levels-1 of the input are spread over -1..1; None leaves it as it is.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).

    Raises:
        ValueError: a size below 1, fewer than 2 levels.
    """

    def __init__(
        self,
        in_features: int,
        out_entries: int,
        num_params: int = 1,
        *,
        hidden_size: int = 64,
        num_layers: int = 2,
        context_features: int = 0,
        levels: int | None = None,
        zero_head: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_entries=out_entries, num_params=num_params)
        check_sizes(hidden_size=hidden_size, num_layers=num_layers)
        self.sizes, self.num_params, self.levels = (
            (in_features, context_features),
            num_params,
            check_levels(levels),
        )
        self.first = nn.Linear(in_features + context_features, hidden_size)
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_layers - 1))
        self.head = nn.Linear(hidden_size, num_params * out_entries)
        if zero_head:
            zero_(self.head)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters ``(batch, out_entries, num_params)``.

        Args:
            x: numbers ``(batch, in_features)``.
            context: given tensors with ``context_features`` columns together.

        Raises:
            ValueError: an ``x`` or context of another size.
        """
        params: Tensor = self.features(x, context).unflatten(1, (self.num_params, -1))
        return params.transpose(1, 2)

    def features(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The output, flat, as a context for other networks: ``(batch, num_params * out_entries)``."""
        return self.recomputed(self._features, x, context)

    def _features(self, x: Tensor, context: Context | None) -> Tensor:
        h = F.silu(self.first(flat_input(x, context, self.sizes, self.levels, self.head.weight)))
        for layer in self.layers:
            h = h + F.silu(layer(h))
        out: Tensor = self.head(h)
        return out
