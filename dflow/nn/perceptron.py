"""A perceptron from known entries to hidden ones, in which every position has weights of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context
from dflow.ops.lengths import lengths


class InfillPerceptron(nn.Module):
    """Parameters of hidden entries given known ones, for short sequences.

    A symbol is looked up in the table of its position and the rows are added up (the first layer of a
    perceptron on one-hot rows); residual layers follow, and one product gives all hidden entries together.

    Args:
        K: size of the alphabet.
        num_params: numbers for each hidden entry.
        known, hidden: int64 ``(n_known,)`` and ``(n_hidden,)``: positions in the whole sequence.
        hidden_size: width.
        num_layers: residual layers, each of two products.
        intermediate_size: width between the two; default ``4 * hidden_size``.
        dropout: of what a residual layer adds.
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
        """See the class."""
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

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """Parameters ``(batch, n_hidden, num_params)``.

        Args:
            x: int64 ``(batch, n_known)`` or one-hot rows ``(batch, n_known, K)``.
            context: lengths of the whole sequences, int64 ``(batch,)``, or None.
        """
        symbols = x.argmax(-1) if x.is_floating_point() else x
        found = lengths(context)
        if found is not None:
            symbols = symbols.masked_fill(self.known >= found[:, None], self.K)
        rows = symbols + (self.K + 1) * torch.arange(len(self.known), device=x.device)
        h: Tensor = F.embedding_bag(rows, self.embedding.flatten(0, 1), mode="sum")
        if x.is_floating_point() and x.requires_grad:
            # The sum above is what the inference mode computes, to the last bit. The same sum as a product
            # with the one-hot rows adds nothing but its gradient.
            weight = torch.where((symbols == self.K)[..., None], 0.0, x)
            soft = torch.einsum("bik,ikh->bh", weight, self.embedding.detach()[:, : self.K])
            h = h + (soft - soft.detach())
        for layer in self.layers:
            h = h + layer(h)
        out: Tensor = self.head(self.norm(h))
        return out.view(len(x), self.num_hidden, -1)
