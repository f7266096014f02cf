from __future__ import annotations

import math

import pytest
import torch

from dflow.elementwise import DISCRETE, ModAffine, ModRank, ModShift
from dflow.ops.modular import one_hot, symbols
from dflow.ops.straight_through import StraightThrough

#: The maps of dflow, without those that other tests add.
FAMILIES = dict(DISCRETE)
ALPHABETS = [2, 3, 5, 6, 9, 27, 50]


def case(family, K, rows=40, levels=None, dtype=torch.float64):
    """Every symbol at each of ``rows`` random parameter vectors; few ``levels`` make ties."""
    generator = torch.Generator().manual_seed(K)
    shape = (rows, 1, family.num_params)
    if levels is None:
        params = torch.randn(shape, generator=generator, dtype=dtype)
    else:
        params = torch.randint(levels, shape, generator=generator).to(dtype)
    return torch.arange(K).expand(rows, K), params.expand(rows, K, -1).contiguous()


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("K", ALPHABETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_permutation_exact_inverse_and_modes_agree(name, K, levels):
    family = FAMILIES[name](K, None)
    x, params = case(family, K, levels=levels)
    z, log_det = family.forward(x, params)
    assert torch.equal(z.sort(1).values, x)
    assert torch.equal(log_det, torch.zeros(x.shape, dtype=torch.float64))
    back, _ = family.inverse(z, params)
    assert torch.equal(back, x)
    rows, row_log_det = family.forward(one_hot(x, K, torch.float64), params)
    assert torch.equal(rows, one_hot(z, K, torch.float64))
    assert torch.equal(row_log_det, log_det)
    back_rows, _ = family.inverse(rows, params)
    assert torch.equal(back_rows, one_hot(x, K, torch.float64))


@pytest.mark.parametrize("K", ALPHABETS)
def test_values(K):
    x, params = case(ModShift(K), K)
    assert torch.equal(ModShift(K).forward(x, params)[0], (x - params.argmax(-1)) % K)
    family = ModAffine(K)
    x, params = case(family, K)
    units = [a for a in range(1, K) if math.gcd(a, K) == 1]
    scale = torch.tensor(units)[params[..., K:].argmax(-1)]
    assert torch.equal((family.forward(x, params)[0] * scale + params[..., :K].argmax(-1)) % K, x)
    x, params = case(ModRank(K), K)
    z, _ = ModRank(K).forward(x, params)
    by_rank = params.gather(-1, ModRank(K).inverse(x, params)[0][..., None]).squeeze(-1)
    assert (by_rank.diff(dim=1) < 0).all()
    assert torch.equal(z, (params > params.gather(-1, x[..., None])).sum(-1))


@pytest.mark.parametrize("K", ALPHABETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_zero_logits_are_the_identity_and_still_teach(name, K):
    family = FAMILIES[name](K, None)
    params = torch.zeros(1, K, family.num_params, requires_grad=True)
    x = torch.arange(K)[None]
    assert torch.equal(family.forward(x, params)[0], x)
    rows, _ = family.forward(one_hot(x, K), params)
    assert torch.equal(symbols(rows), x)
    weights = torch.randn(K, generator=torch.Generator().manual_seed(0))
    (rows @ weights).sum().backward()
    assert (params.grad[..., :K].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("to_latent", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gradients_of_rank_are_those_of_softsort(temperature, to_latent):
    K = 6
    family = ModRank(K, StraightThrough(temperature))
    x, params = case(family, K)
    params = params.clone().requires_grad_()
    rows = one_hot(x, K, torch.float64).requires_grad_()
    found, _ = (family.forward if to_latent else family.inverse)(rows, params)
    g = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gx, gparams = torch.autograd.grad(found, (rows, params), g)
    # distance[r, k] = |r-th largest logit - logit k|
    ordered = params.sort(-1, descending=True).values
    distance = (ordered[..., :, None] - params[..., None, :]).abs() / temperature
    if to_latent:
        index = x[..., None, None].expand(*x.shape, K, 1)
        soft = torch.softmax(-distance.gather(-1, index).squeeze(-1), -1)
    else:
        index = x[..., None, None].expand(*x.shape, 1, K)
        soft = torch.softmax(-distance.gather(-2, index).squeeze(-2), -1)
    (expected,) = torch.autograd.grad(soft, params, g)
    torch.testing.assert_close(gparams, expected)
    order = params.argsort(-1, descending=True)
    rank = order.argsort(-1)
    assert torch.equal(gx, g.gather(-1, rank if to_latent else order))


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_reaches_the_differentiable_mode_only(name):
    K = 9
    family = FAMILIES[name](K, StraightThrough(noise=1.0))
    x, params = case(family, K)
    torch.manual_seed(0)
    assert torch.equal(family.forward(x, params)[0], FAMILIES[name](K, None).forward(x, params)[0])
    rows = one_hot(x, K, torch.float64)
    first, second = family.forward(rows, params)[0], family.forward(rows, params)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first.sum(-1), torch.ones(x.shape, dtype=torch.float64))
    assert int(first.count_nonzero()) == x.numel()


def test_noisy_rank_is_plackett_luce():
    K, n = 3, 30_000
    logits = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
    family = ModRank(K, StraightThrough(noise=1.0))
    torch.manual_seed(0)
    first = one_hot(torch.zeros(n, 1, dtype=torch.int64), K, torch.float64)
    z, _ = family.forward(first, logits.expand(n, 1, K))
    # Rank 0 of symbol 0 has its soft-max probability, rank 2 follows by drawing without replacement.
    p = torch.softmax(logits, -1)
    last = p[1] * p[2] / (p[0] + p[2]) + p[2] * p[1] / (p[0] + p[1])
    expected = torch.stack([p[0], 1 - p[0] - last, last])
    assert (z.mean((0, 1)) - expected).abs().sum() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_dtypes(name, dtype):
    family = FAMILIES[name](6, None)
    x, params = case(family, 6, dtype=dtype)
    params.requires_grad_()
    z, log_det = family.forward(x, params)
    rows, _ = family.forward(one_hot(x, 6, dtype), params)
    assert rows.dtype == dtype
    assert log_det.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(symbols(rows), z)
    (rows * torch.arange(6)).sum().backward()
    assert params.grad.dtype == dtype


@pytest.mark.parametrize(("name", "K"), [("shift", 8192), ("affine", 1024), ("rank", 1024)])
def test_large_alphabets(name, K):
    family = FAMILIES[name](K, None)
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(2, 8, family.num_params, generator=generator, requires_grad=True)
    x = torch.randint(K, (2, 8), generator=generator)
    z, _ = family.forward(x, params)
    assert torch.equal(family.inverse(z, params)[0], x)
    rows = one_hot(x, K).requires_grad_()
    z_rows, _ = family.forward(rows, params)
    assert torch.equal(symbols(z_rows), z)
    x_rows, _ = family.inverse(z_rows, params)
    assert torch.equal(symbols(x_rows), x)
    (x_rows @ torch.randn(K, generator=generator)).sum().backward()
    for gradient in (params.grad, rows.grad):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("K", "phi"), [(2, 1), (27, 18), (50, 20), (51, 32)])
def test_scales_are_units(K, phi):
    assert ModAffine(K).num_params == K + phi
    assert ModShift(K).num_params == ModRank(K).num_params == K
    assert "K=" in repr(ModAffine(K))


@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_are_checked(name):
    for K in (1, 0, -2):
        with pytest.raises(ValueError, match=f"K={K}"):
            FAMILIES[name](K, None)
    family = FAMILIES[name](5, None)
    x, params = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, family.num_params)
    with pytest.raises(ValueError, match="params have shape"):
        family.forward(x, params[..., :-1])
    with pytest.raises(ValueError, match="int32"):
        family.forward(x.int(), params)
    with pytest.raises(ValueError, match="one-hot rows"):
        family.forward(one_hot(x, 4), params)
    with pytest.raises(ValueError, match=r"0\.\.4, found 0\.\.5"):
        family.forward(torch.tensor([[0, 5, 1]] * 2), params)
    with pytest.raises(ValueError, match=r"found -1\.\."):
        family.forward(torch.tensor([[0, -1, 1]] * 2), params)
    empty, _ = family.forward(x[:0], params[:0])
    assert empty.shape == (0, 3)


@pytest.mark.parametrize("K", [2, 5, 6, 9])
@pytest.mark.parametrize("name", ["shift", "affine"])
def test_expected_cost_is_the_mean_over_every_map(name, K):
    family = FAMILIES[name](K, StraightThrough(temperature=0.7))
    x, params = case(family, K, rows=3)
    params = params.clone().requires_grad_()
    cost = torch.randn(
        3, K, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    mean = torch.zeros(3, K, dtype=torch.float64)
    soft = [torch.softmax(part / 0.7, -1) for part in params.split(K, -1)]  # phi(K) < K: two parts at most
    for s in range(K):
        for a in range(family.num_params - K if name == "affine" else 1):
            chosen = torch.full_like(params, -9.0)
            chosen[..., s] = 9
            weight = soft[0][..., s]
            if name == "affine":
                chosen[..., K + a] = 9
                weight = weight * soft[1][..., a]
            z, _ = family.forward(x, chosen)
            mean = mean + weight * cost.gather(-1, z[..., None]).squeeze(-1)
    found = family.expected(x, params, cost)
    torch.testing.assert_close(found, mean)
    g = torch.randn(3, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.autograd.grad(mean, (params, cost), g)
    for one, other in zip(torch.autograd.grad(found, (params, cost), g), expected, strict=True):
        torch.testing.assert_close(one, other)
