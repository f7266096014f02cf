"""Gradient checkpointing: the same gradients, less memory, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from registered import labels, tiny
from torch import Tensor

from dflow import zoo
from dflow.config import InputError
from dflow.nn.recompute import Recomputable, recompute
from dflow.ops.live import TensorMemory

#: Its new name is not in all versions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")


def gradients(model: Any, data: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and the most bytes that existed together on the way there."""
    model.zero_grad()
    torch.manual_seed(7)
    with TensorMemory() as memory:
        model(data, **labels(model, data)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, memory.peak


@pytest.mark.parametrize("name", zoo.names())
def test_gradients_are_the_same(name: str) -> None:
    model, data = tiny(name)
    model.train()
    if not any(isinstance(m, Recomputable) for m in model.modules()):
        with pytest.raises(InputError, match="no part of the network of this model can be computed anew"):
            recompute(model)
        return
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain, _ = gradients(model, data)
    model.load_state_dict(state)
    model.gradient_checkpointing_enable()
    assert any(isinstance(m, Recomputable) and m.gradient_checkpointing for m in model.modules())
    again, _ = gradients(model, data)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        assert torch.allclose(again[key], gradient, rtol=1e-5, atol=1e-7), key
    model.gradient_checkpointing_disable()
    assert not any(m.gradient_checkpointing for m in model.modules() if isinstance(m, Recomputable))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("grouped", {"num_hidden_layers": 6, "hidden_size": 32, "length": 64, "intermediate_size": 128}),
        ("dequantized", {"num_flows": 4, "hidden_size": 32, "num_hidden_layers": 4, "shape": [1, 8, 8]}),
    ],
)
def test_it_takes_less_memory(name: str, sizes: dict[str, Any]) -> None:
    model, _ = tiny(name, **sizes)
    model.train()
    data = torch.randint(0, 4, (16, 64))
    _, most = gradients(model, data)
    model.gradient_checkpointing_enable()
    _, fewer = gradients(model, data)
    assert fewer < 0.6 * most, (fewer, most)
