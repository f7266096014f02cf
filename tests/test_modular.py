from __future__ import annotations

import pytest
import torch

from dflow.ops import modular


def reference(x, loc, scale, K, to_latent):
    """The multilinear extension itself: a sum over all symbols, locs and scales."""
    units = modular.units(K).tolist()
    table = torch.zeros(K, K, len(units), K, dtype=torch.float64)
    for k in range(K):
        for j in range(K):
            for a, unit in enumerate(units):
                image = (k - j) * pow(unit, -1, K) if to_latent else k * unit + j
                table[k, j, a, image % K] = 1
    return torch.einsum("nk,nj,na,kjac->nc", x, loc, scale, table)


def rows(K, scaled):
    """Every combination of symbol, loc and scale as one-hot rows that require gradients."""
    n_units = len(modular.units(K)) if scaled else 1
    grid = torch.cartesian_prod(torch.arange(K), torch.arange(K), torch.arange(n_units))
    sizes = (K, K, len(modular.units(K)))
    return [
        modular.one_hot(column, size, torch.float64).requires_grad_()
        for column, size in zip(grid.T, sizes, strict=True)
    ]


@pytest.mark.parametrize("to_latent", [True, False])
@pytest.mark.parametrize("K", range(2, 13))
def test_affine_has_the_values_and_gradients_of_the_multilinear_extension(K, to_latent):
    arguments = rows(K, scaled=True)
    found = (modular.affine if to_latent else modular.unaffine)(*arguments)
    expected = reference(*arguments, K, to_latent)
    assert torch.equal(found, expected)
    g = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(K))
    for ours, theirs in zip(
        torch.autograd.grad(found, arguments, g), torch.autograd.grad(expected, arguments, g), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("to_latent", [True, False])
@pytest.mark.parametrize("K", range(2, 13))
def test_shift_is_affine_with_scale_one(K, to_latent):
    x, loc, one = rows(K, scaled=False)
    found = (modular.shift if to_latent else modular.unshift)(x, loc)
    expected = reference(x, loc, one, K, to_latent)
    assert torch.equal(found, expected)
    g = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(K))
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, loc), g), torch.autograd.grad(expected, (x, loc), g), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("K", "phi"), [(2, 1), (27, 18), (50, 20), (51, 32), (91, 72), (251, 250)])
def test_units_and_inverses(K, phi):
    units, inverses = modular.units(K), modular.inverses(K)
    assert len(units) == phi
    assert units[0] == 1
    assert torch.equal(units.sort().values, units)
    assert torch.equal(units * inverses[units] % K, torch.ones(phi, dtype=torch.int64))
    assert int((inverses > 0).sum()) == phi


def test_one_argument_may_need_no_gradient():
    x, loc, scale = rows(6, scaled=True)
    for kept in range(3):
        arguments = [a if i == kept else a.detach() for i, a in enumerate((x, loc, scale))]
        modular.affine(*arguments).sum().backward()
    assert all(a.grad is not None for a in (x, loc, scale))


def test_dtypes_of_gradients_are_those_of_the_arguments():
    x = modular.one_hot(torch.tensor([[1]]), 5, torch.bfloat16).requires_grad_()
    loc = modular.one_hot(torch.tensor([[3]]), 5, torch.float64).requires_grad_()
    z = modular.shift(x, loc)
    assert z.dtype == torch.bfloat16
    z.sum().backward()
    assert (x.grad.dtype, loc.grad.dtype) == (torch.bfloat16, torch.float64)


def test_a_hundred_layers_leave_rows_one_hot_to_the_bit():
    x = modular.one_hot(torch.arange(251), 251)
    loc = modular.one_hot(torch.arange(251).flip(0), 251)
    z = x
    for _ in range(128):
        z = modular.unshift(z, loc)
    assert torch.equal(z.sort(-1).values[:, -1], torch.ones(251))
    assert int(z.count_nonzero()) == 251
    for _ in range(128):
        z = modular.shift(z, loc)
    assert torch.equal(z, x)


def test_symbols_and_one_hot_are_inverse():
    x = torch.arange(12).view(3, 4)
    assert torch.equal(modular.symbols(modular.one_hot(x, 12)), x)
    assert modular.symbols(x) is x
    assert modular.one_hot(x, 12, torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="int32"):
        modular.symbols(x.int())


@pytest.mark.parametrize("K", [1, 0, -3])
def test_alphabets_have_two_symbols(K):
    with pytest.raises(ValueError, match=f"K={K}"):
        modular.units(K)
    with pytest.raises(ValueError, match=f"K={K}"):
        modular.inverses(K)


def test_shapes_are_checked():
    x = modular.one_hot(torch.tensor([1, 2]), 6)
    with pytest.raises(ValueError, match="loc"):
        modular.shift(x, x[:1])
    with pytest.raises(ValueError, match="scale"):
        modular.affine(x, x, x)
