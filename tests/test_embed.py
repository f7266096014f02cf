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


@torch.no_grad()
def test_n_grams_are_left_out_in_training_alone():
    torch.manual_seed(0)
    embed = Neighbours(3, 4, 2, [[0, 1], [0, 1]], 50, extra=3, ngram_dropout=0.25).double()
    embed.weight.normal_()
    symbols = torch.tensor([[1, 2]]).expand(20_000, 2)
    extra = torch.tensor([embed.extra_row])
    rows = torch.cat([embed.rows(symbols[0]), extra])
    parts = embed.weight[rows]
    seen = embed(symbols, extra.expand(len(symbols), 1)).unique(dim=0, return_counts=True)
    expected = {
        (a, b): parts[[0, 1, 4]].sum(0) + (a * parts[2] + b * parts[3]) / 0.75 for a in (0, 1) for b in (0, 1)
    }
    assert len(seen[0]) == 4
    for (a, b), value in expected.items():
        place = (seen[0] - value).abs().sum(1).argmin()
        torch.testing.assert_close(seen[0][place], value)
        share = (0.75 if a else 0.25) * (0.75 if b else 0.25)
        assert abs(float(seen[1][place]) / 20_000 - share) < 0.02
    torch.testing.assert_close(embed.eval()(symbols[:1], extra[None]), parts.sum(0)[None])


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
