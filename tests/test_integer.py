"""Every bijector of the integers: exact both ways, the same in both modes, straight-through gradients."""

from __future__ import annotations

import math

import pytest
import torch
from cases import INTEGER, SHAPES, Shape, randomize
from torch import Tensor

from dflow.bijectors import Coupling
from dflow.core import Bijector
from dflow.elementwise import IntegerShift

every = pytest.mark.parametrize(("name", "shape"), [(n, s) for n in INTEGER for s in SHAPES], ids=str)


def build(name: str, shape: Shape) -> Bijector:
    """With weights at which shifts are some units, of either sign."""
    bijector = randomize(INTEGER[name](shape))
    with torch.no_grad():
        for parameter in bijector.parameters():
            parameter.div_(parameter[0].numel() ** 0.5)
    return bijector  # type: ignore[return-value]


def grid(shape: Shape) -> Tensor:
    """All rows of -2..2 where there are few, else random ones."""
    dim = math.prod(shape)
    if dim <= 4:
        return torch.cartesian_prod(*[torch.arange(-2, 3)] * dim)
    return torch.randint(-9, 10, (400, dim), generator=torch.Generator().manual_seed(0))


@every
def test_bijection(name: str, shape: Shape) -> None:
    bijector, x = build(name, shape), grid(shape)
    for there, back in ((bijector.forward, bijector.inverse), (bijector.inverse, bijector.forward)):
        z, log_det = there(x)
        assert z.dtype == torch.int64
        assert torch.equal(log_det, torch.zeros(len(x), dtype=log_det.dtype))
        assert len(z.unique(dim=0)) == len(x.unique(dim=0))
        found, log_det = back(z)
        assert torch.equal(found, x)
        assert torch.equal(log_det, torch.zeros(len(x), dtype=log_det.dtype))
        assert not torch.equal(z, x)


@every
def test_modes_agree(name: str, shape: Shape) -> None:
    bijector, x = build(name, shape), grid(shape)
    for move in (bijector.forward, bijector.inverse):
        z, log_det = move(x.double())
        assert z.dtype == log_det.dtype == torch.float64
        assert torch.equal(z, move(x)[0].double())
        assert torch.equal(log_det, torch.zeros(len(x), dtype=torch.float64))


@every
def test_gradients_reach_the_data_and_every_parameter(name: str, shape: Shape) -> None:
    bijector, x = build(name, shape), grid(shape)[:50].double().requires_grad_()
    for move in (bijector.forward, bijector.inverse):
        bijector.zero_grad()
        z, _ = move(x)
        found = torch.autograd.grad((z * torch.randn_like(z)).sum(), [x, *bijector.parameters()])
        for gradient in found:
            assert gradient.isfinite().all()
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_takes_the_rounding_for_the_identity(shape: Shape) -> None:
    coupling, x = build("coupling", shape), grid(shape)[:20].double().requires_grad_()
    assert isinstance(coupling, Coupling)
    weights = torch.randn(len(x), math.prod(shape), dtype=torch.float64)
    variables = [x, *coupling.parameters()]
    for move, sign in ((coupling.forward, -1), (coupling.inverse, 1)):
        found = torch.autograd.grad((move(x)[0] * weights).sum(), variables)
        hidden = x[:, coupling.hidden_index] + sign * coupling.params(x).squeeze(-1)
        soft = (hidden * weights[:, coupling.hidden_index]).sum()
        soft = soft + (x * weights)[:, coupling.known_index].sum()
        for a, b in zip(found, torch.autograd.grad(soft, variables), strict=True):
            torch.testing.assert_close(a, b)


def test_values_of_the_shift() -> None:
    shift, t = IntegerShift(), torch.tensor([[0.5, 1.5, -0.5, -2.5, 2.6, 1e6, -1e6]])
    rounded = torch.tensor([[0, 2, 0, -2, 3, 10**6, -(10**6)]])
    x = torch.arange(7)[None]
    for params in (t[..., None], t[..., None].double(), t[..., None].requires_grad_()):
        z, log_det = shift.forward(x, params)
        assert torch.equal(z, x - rounded)
        assert not z.requires_grad
        assert torch.equal(log_det, torch.zeros(1, 7))
        assert torch.equal(shift.inverse(z, params)[0], x)
        floats, log_det = shift.forward(x.double(), params)
        assert torch.equal(floats, z.double())
        assert not log_det.any()
    # 2^40 and more, where int64 is exact and float32 is not.
    far = torch.tensor([[2**40 + 1]])
    assert shift.forward(far, torch.tensor([[[3.0]]]))[0].item() == 2**40 - 2
    # Half precision is too coarse to be rounded as it is.
    half = torch.tensor([[[300.25]]], dtype=torch.bfloat16)
    assert shift.forward(torch.tensor([[0]]), half)[0].item() == -round(half.float().item())


def test_wrong_arguments_are_named() -> None:
    shift, params = IntegerShift(), torch.zeros(2, 3, 1)
    for x in (torch.zeros(2, 3, 1), torch.zeros(2, 3).half(), torch.zeros(2, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="expected int64, float32 or float64"):
            shift.forward(x, params)
    for bad in (math.nan, math.inf, 1e30):
        with pytest.raises(ValueError, match="a translation is not finite, or beyond"):
            shift.forward(torch.zeros(2, 3, dtype=torch.int64), params + bad)
    with pytest.raises(ValueError, match=r"params have shape \(2, 3, 1\), expected \(2, 2, 1\)"):
        shift.inverse(torch.zeros(2, 2), params)
