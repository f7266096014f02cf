"""Time of networks: they are found by what they are, calls and steps count once, nothing is left behind."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from dflow.compress.clock import clock, networks
from dflow.core import Context, Distribution


class Slow(nn.Module):
    """A network that calls another one, and answers by steps too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        if len(x) > 1:
            raise ValueError("too many rows")
        out: Tensor = self.inner(x)
        return out

    def step(self, x: Tensor) -> Tensor:
        out: Tensor = self(x)
        return out


class Odd(Distribution):
    """A law whose network has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = nn.ModuleList([Slow()])

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        out: Tensor = self.predictor[0](x)
        return out

    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.predictor[0].step(torch.zeros(n, 1))  # type: ignore[operator,no-any-return]


def test_networks_are_found_by_what_they_are() -> None:
    law = Odd()
    assert list(networks(law)) == [law.predictor[0]]


def test_calls_and_steps_count_once() -> None:
    law = Odd()
    with clock(law) as outer, clock(law) as seconds:
        law.log_prob(torch.zeros(1, 1))
        law.sample(1)
        time.sleep(0.01)
    assert all(0.02 <= times.network < times.total for times in (outer, seconds))
    assert seconds.coder >= 0.01
    assert seconds.network + seconds.coder == seconds.total


def test_nothing_is_left_behind_after_an_error() -> None:
    law = Odd()
    with clock(law) as seconds:
        with pytest.raises(ValueError, match="too many"):
            law.sample(2)
        law.sample(1)
    assert 0.02 <= seconds.network < seconds.total
    assert "step" not in vars(law.predictor[0])
    assert not law.predictor[0]._forward_hooks
    assert not law.predictor[0]._forward_pre_hooks
