from __future__ import annotations

import copy

import pytest
import torch

from dflow.ops.straight_through import SCHEDULES, StraightThrough, scheduled, straight_through


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_hard_forward_and_soft_backward(temperature):
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    g = torch.randn(50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hard = StraightThrough(temperature)(logits)
    assert torch.equal(hard, torch.nn.functional.one_hot(logits.argmax(-1), 7).double())
    (expected,) = torch.autograd.grad(torch.softmax(logits / temperature, -1), logits, g)
    (found,) = torch.autograd.grad(hard, logits, g)
    torch.testing.assert_close(found, expected)


def test_straight_through_is_hard_to_the_bit():
    soft = torch.randn(1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    hard = soft.detach().round()
    assert torch.equal(straight_through(hard, soft), hard)


def test_gumbel_noise_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    torch.manual_seed(0)
    draws = StraightThrough(noise=1.0)(logits.expand(40_000, 4))
    assert (draws.mean(0) - torch.softmax(logits, -1)).abs().sum() < 0.02
    # Half the noise is the law at half the temperature.
    draws = StraightThrough(noise=0.5)(logits.expand(40_000, 4))
    assert (draws.mean(0) - torch.softmax(2 * logits, -1)).abs().sum() < 0.02


def test_gradient_of_noisy_choice_is_that_of_the_noisy_softmax():
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    estimator, g = StraightThrough(0.7, noise=1.0), torch.arange(45.0, dtype=torch.float64).view(9, 5)
    torch.manual_seed(3)
    noisy = estimator.perturb(logits)
    (expected,) = torch.autograd.grad(torch.softmax(noisy / 0.7, -1), logits, g)
    torch.manual_seed(3)
    (found,) = torch.autograd.grad(estimator(logits), logits, g)
    torch.testing.assert_close(found, expected)


def test_without_noise_nothing_random_is_drawn():
    logits = torch.zeros(2, 3)
    before = torch.get_rng_state()
    estimator = StraightThrough()
    assert estimator.perturb(logits) is logits
    estimator(logits)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(value):
    with pytest.raises(ValueError, match="temperature"):
        StraightThrough(value)
    estimator = StraightThrough()
    with pytest.raises(ValueError, match="temperature"):
        estimator.temperature = value
    assert estimator.temperature == 1


def test_noise_must_not_be_negative():
    with pytest.raises(ValueError, match="noise"):
        StraightThrough(noise=-0.1)


def test_a_copy_is_another_object():
    estimator = StraightThrough(0.5, 0.25)
    twin = copy.deepcopy(estimator)
    twin.temperature = 2.0
    assert (estimator.temperature, twin.noise) == (0.5, 0.25)
    assert repr(estimator) == "StraightThrough(temperature=0.5, noise=0.25)"


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_from_start_to_end(name):
    end = 2.0 if name == "constant" else 0.1
    values = [scheduled(name, i / 10, 2.0, 0.1) for i in range(11)]
    assert values[0] == 2.0
    assert values[-1] == pytest.approx(end)
    assert values == sorted(values, reverse=True)


def test_schedules_check_their_arguments():
    assert scheduled("linear", 0.25, 0.0, 1.0) == 0.25
    assert scheduled("cosine", 0.5, 0.0, 1.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="'exponental'"):
        scheduled("exponental", 0.5, 1, 1)
    with pytest.raises(ValueError, match=r"1\.5"):
        scheduled("linear", 1.5, 1, 1)
    with pytest.raises(ValueError, match="positive"):
        scheduled("exponential", 0.5, 1, 0)
