from __future__ import annotations

import torch
from cases import enumerate_all

from dflow.nn.embed import Neighbours
from dflow.ops.modular import one_hot


@torch.no_grad()
def test_tables_of_n_grams_read_just_their_symbols():
    K, columns = 3, 3
    embed = Neighbours(K, 4, columns, [[0, 1], [0, 1, 2]], 1000, extra=2)
    rows = embed.rows(enumerate_all(K + 1, columns))
    assert rows.shape == ((K + 1) ** columns, 5)
    assert rows.max() < embed.extra_row == len(embed.weight) - 2
    # No two of the 16 pairs or 64 triples share a row here, and the third symbol is no part of a pair.
    assert len(rows[:, 3].unique()) == (K + 1) ** 2
    assert len(rows[:, 4].unique()) == (K + 1) ** 3


@torch.no_grad()
def test_features_are_the_sum_of_the_rows():
    embed = Neighbours(3, 4, 2, [[0, 1]], 50, extra=3).double()
    symbols = torch.randint(0, 4, (5, 6, 2))
    extra = embed.extra_row + torch.randint(0, 3, (6, 1))
    rows = torch.cat([embed.rows(symbols), extra.expand(5, 6, 1)], -1)
    torch.testing.assert_close(embed(symbols, extra), embed.weight[rows].sum(-2))


def test_gradient_of_rows_is_that_of_the_linear_features():
    K, n = 4, 3
    embed = Neighbours(K, 5, 2, std=1.0).double()
    x = torch.randint(0, K, (1, n))
    sources = torch.tensor([[n, 1], [0, 2], [1, n]])
    rows = one_hot(x, K, torch.float64).requires_grad_()
    zero = embed.gradient_of(rows, sources)
    assert not zero.any()
    weights = torch.randn_like(zero)
    (gradient,) = torch.autograd.grad((zero * weights).sum(), rows)

    def value(y):
        padded = torch.cat([y, torch.full((1, 1), K)], 1)
        return (embed(padded[:, sources]) * weights).sum()

    for j in range(n):
        for k in range(K):
            other = x.clone()
            other[0, j] = k
            torch.testing.assert_close(value(other) - value(x), gradient[0, j, k] - gradient[0, j, x[0, j]])
