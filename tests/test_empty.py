"""Batches of no rows are scored and mapped: a loop over batches needs no case for the last one."""

from __future__ import annotations

import pytest
import torch
from cases import BIJECTORS, CONTINUOUS, build_bijector, build_continuous, context_for
from registered import score, tiny

from dflow import zoo
from dflow.ops.modular import one_hot


@pytest.mark.parametrize("name", zoo.names())
def test_every_family_scores_nothing(name: str) -> None:
    model, data = tiny(name)
    assert len(score(model, data[:0])) == 0


@pytest.mark.parametrize(
    "name", [name for name in zoo.names() if zoo.find(name).exact and zoo.find(name).kind != "labels"]
)
def test_a_round_trip_of_nothing_is_none_or_true(name: str) -> None:
    model, data = tiny(name)
    assert model.round_trip(data[:0]) in (True, None)
    assert model.round_trip(data[:0]) == model.round_trip(data)


@pytest.mark.parametrize("name", [n for n in BIJECTORS if n.startswith(("coupling", "autoregressive"))])
def test_maps_of_nothing(name: str) -> None:
    bijector = build_bijector(name, 3, 4)
    symbols = torch.zeros(0, 4, dtype=torch.int64)
    for x in (symbols, one_hot(symbols, 3, torch.float64).requires_grad_()):
        z, log_det = bijector.forward(x)
        assert z.shape == bijector.inverse(z)[0].shape == x.shape
        assert log_det.shape == (0,)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_maps_of_the_reals_of_nothing(name: str) -> None:
    shape = (2, 4, 4)
    x = torch.zeros(0, 32, dtype=torch.float64)
    assert build_continuous(name, shape).forward(x, context_for(name, shape, 0))[0].shape == x.shape
