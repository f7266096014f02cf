"""The floor under laws of integers: sums to one, bounds every cost, is drawn as often as it should be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dflow.distributions import Logistic, LogisticMixture
from dflow.distributions import logistic as module
from dflow.distributions.floor import FLOOR, gamma_bits, gamma_draws, instead_of, with_floor
from dflow.distributions.logistic import LEAST


def floor_alone(offset: Tensor) -> Tensor:
    """U of the module: where a law gives nothing, the floor is all there is."""
    return with_floor(torch.full(offset.shape, -math.inf, dtype=torch.float64), offset).exp() / FLOOR


def test_the_floor_sums_to_one() -> None:
    j = torch.arange(2**16 - 1)
    # All integers of an octave share half of what is left.
    assert float((2.0 ** -gamma_bits(j)).sum()) == pytest.approx(1 - 2.0**-16, abs=1e-15)
    both = torch.arange(-(2**16) + 1, 2**16 - 1)
    assert float(floor_alone(both).sum()) == pytest.approx(1 - 2.0**-16, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("components", [1, 3])
def test_no_value_costs_more_than_its_bound_however_sure_the_law(components: int, dtype: torch.dtype) -> None:
    law = LogisticMixture(4, components, centre=torch.tensor(127.0)).to(dtype)
    with torch.no_grad():
        law.raw[:, components : 2 * components] = LEAST
    x = torch.arange(-896, 1152)
    plain = module.log_mass(
        x[0].to(dtype), torch.tensor(127.0, dtype=dtype), torch.tensor(LEAST, dtype=dtype)
    )
    assert -float(plain) / math.log(2) > 1e8
    bits = -law.log_prob(x[:, None].expand(-1, 4)).detach() / 4 / math.log(2)
    bound = 18 + 2 * ((x - 127).abs() + 1).log2()
    assert bool((bits <= bound + 1e-3).all())
    assert float(bits.max()) < 40
    # What the law expects costs no more than the share that the floor takes.
    if components == 1:
        assert float(bits[x == 127]) == pytest.approx(-math.log2(1 - FLOOR), abs=1e-5)
    law.log_prob(x[:, None].expand(-1, 4)).sum().backward()
    assert bool(law.raw.grad.isfinite().all())


def test_draws_of_the_floor_follow_it() -> None:
    generator = torch.Generator().manual_seed(3)
    n = 200_000
    u = torch.rand(n, 2, dtype=torch.float64, generator=generator)
    middle = torch.tensor([5, -9])
    draws = instead_of(torch.zeros(n, 2, dtype=torch.int64), middle, torch.ones(n, 2, dtype=torch.bool), u)
    near = torch.arange(-30, 31)
    for offset in (draws - middle).T:
        expected = n * floor_alone(near)
        seen = torch.stack([(offset == value).sum() for value in near.tolist()])
        statistic = float(((seen - expected) ** 2 / expected).sum())
        # 61 cells; a tail of about 1e-6.
        assert statistic < 125
    assert torch.equal(gamma_draws(1 - u) >= 0, torch.ones_like(u, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_is_drawn_as_often_as_its_share_and_apart_from_the_law(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "widest", lambda device: dtype)
    n = 1 << 23
    draws, at, u = module._standard((n,), torch.Generator().manual_seed(1), torch.device("cpu"))
    mean = n * FLOOR
    assert abs(int(at.sum()) - mean) < 5 * math.sqrt(mean)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    # Where the floor is drawn, its uniform numbers are uniform, and the law's draws are as anywhere.
    assert abs(float(u[at].mean()) - 0.5) < 5 / math.sqrt(12 * mean)
    assert abs(float((draws[at] > 0).double().mean()) - 0.5) < 5 / math.sqrt(4 * mean)


def test_samples_hold_values_of_the_floor() -> None:
    law = Logistic(64)
    with torch.no_grad():
        law.raw[:, 1] = LEAST
    x = law.sample(1 << 14, generator=torch.Generator().manual_seed(0))
    n = x.numel() * FLOOR
    # Half of what the floor draws is 0 or -1, and 0 is what the law draws.
    far = int((x != 0).sum())
    assert abs(far - 0.75 * n) < 6 * math.sqrt(n)
