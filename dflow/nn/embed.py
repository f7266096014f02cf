"""Embedding of an entry by the symbols around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Neighbours(nn.Module):
    """Sum of one vector for each neighbour and its symbol, and of one for each n-gram of neighbours.

    Neighbours are columns: column c is always the same place around an entry. Symbol K is a neighbour that is
    absent or not known. The vector of an n-gram is found by hashing, so that two n-grams may share one; these
    vectors add parameters but almost no arithmetic.

    Args:
        K: size of the alphabet.
        size: number of features.
        columns: number of neighbours.
        ngrams: for each table of n-grams, the columns that it joins.
        ngram_rows: vectors in each of these tables; 0 for no tables.
        extra: number of further vectors, whose rows in `weight` begin at `extra_row`.
        std: standard deviation of the initial vectors; those of n-grams start at zero.
        ngram_dropout: in training each n-gram of an entry is left out with this probability, and the others
            are scaled up: a network overfits to long n-grams otherwise.
    """

    hash: Tensor
    first_rows: Tensor

    def __init__(
        self,
        K: int,
        size: int,
        columns: int,
        ngrams: Sequence[Sequence[int]] = (),
        ngram_rows: int = 0,
        extra: int = 0,
        std: float = 0.02,
        ngram_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        ngrams = ngrams if ngram_rows else ()
        self.K, self.size, self.columns, self.ngram_rows = K, size, columns, ngram_rows
        self.ngram_dropout = ngram_dropout
        # A linear hash: a table's factors are zero at the columns that it does not join.
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(1 << 20, 1 << 40, (columns, len(ngrams)), generator=generator)
        joined = torch.zeros(columns, len(ngrams), dtype=torch.int64)
        for i, ngram in enumerate(ngrams):
            joined[list(ngram), i] = 1
        self.register_buffer("hash", factors * joined)
        symbols = columns * (K + 1)
        self.extra_row = symbols + len(ngrams) * ngram_rows
        first_rows = [torch.arange(columns) * (K + 1), symbols + torch.arange(len(ngrams)) * ngram_rows]
        self.register_buffer("first_rows", torch.cat(first_rows))
        self.weight = nn.Parameter(torch.randn(self.extra_row + extra, size) * std)
        # An n-gram that does not occur in training then adds nothing, rather than noise.
        with torch.no_grad():
            self.weight[symbols : self.extra_row] = 0

    def rows(self, symbols: Tensor) -> Tensor:
        """Rows of `weight` for symbols (..., columns): one for each symbol, then one for each n-gram."""
        if not self.hash.shape[1]:
            return symbols + self.first_rows
        # The sum of products is a matrix product, which torch lacks for integers on a GPU.
        keys = (symbols[..., None] * self.hash).sum(-2).remainder_(self.ngram_rows)
        return torch.cat([symbols, keys], -1) + self.first_rows

    def forward(self, symbols: Tensor, extra: Tensor | None = None) -> Tensor:
        """Features (..., size) of entries with the neighbours ``symbols``, int64 (..., columns).

        ``extra`` holds rows of further vectors to add, (..., number of vectors).
        """
        rows = self.rows(symbols)
        if extra is not None:
            rows = torch.cat([rows, extra.expand(*rows.shape[:-1], -1)], -1)
        weights = None
        if self.training and self.ngram_dropout and self.hash.shape[1]:
            weights = torch.ones(rows.shape, dtype=self.weight.dtype, device=rows.device)
            ngram_weights = weights[..., self.columns : self.columns + self.hash.shape[1]]
            ngram_weights.bernoulli_(1 - self.ngram_dropout).div_(1 - self.ngram_dropout)
            weights = weights.flatten(0, -2)
        h: Tensor = F.embedding_bag(rows.flatten(0, -2), self.weight, mode="sum", per_sample_weights=weights)
        return h.view(*rows.shape[:-1], self.size)

    def gradient_of(self, x: Tensor, sources: Tensor) -> Tensor:
        """Zeros (batch, entries, size) with the gradient of the features for one-hot rows.

        Apart from n-grams, which have no gradient here, the features are linear in one-hot rows.

        Args:
            x: one-hot rows (batch, n, K).
            sources: index (entries, columns) into these rows; n where there is no symbol.
        """
        tables = self.weight.detach()[: self.columns * (self.K + 1)]
        tables = tables.unflatten(0, (self.columns, self.K + 1))[:, : self.K]
        rows = F.pad(x.to(tables.dtype), (0, 0, 0, 1))
        products = [(rows @ tables[j])[:, sources[:, j]] for j in range(self.columns)]
        soft = torch.stack(products).sum(0)
        return soft - soft.detach()
