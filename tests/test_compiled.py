"""torch.compile traces the law of every family as one graph, but for parts that are known by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from registered import score, tiny
from torch import Tensor

from dflow import zoo

#: Where there is more than one graph: the most breaks, and what is between the graphs.
BREAKS = {
    "any_order": (3, "the number of calls is read from the order"),
    "lstm": (2, "torch does not trace nn.LSTM, whose kernel is one operation"),
    "ngram": (5, "counts are looked up, in one call, at which each function around it ends a graph"),
}


def scorer(model: Any, data: Tensor) -> Callable[[Tensor], Tensor]:
    """The log-likelihood as a function of data alone, without the checks of values of `forward`."""
    if model.config.model_kind == "labels":
        return lambda x: model.net(x.float())
    if not model.config.record.exact:
        law = model.dequantized
        noise = law.dequantizer.noise(len(data), data.shape[1])[None]
        return lambda x: law.log_weights(x, noise=noise)
    return model.distribution.log_prob


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("name", zoo.names())
def test_breaks_are_known(name: str) -> None:
    model, data = tiny(name)
    law = scorer(model, data)
    law(data)  # orders are laid and plans made, once
    torch._dynamo.reset()
    explained = torch._dynamo.explain(law)(data)
    most, _ = BREAKS.get(name, (0, ""))
    reasons = [str(reason.reason).splitlines()[0] for reason in explained.break_reasons]
    assert explained.graph_break_count <= most, reasons


@pytest.mark.slow
def test_a_compiled_flow_is_the_flow() -> None:
    model, data = tiny("bipartite")
    expected = score(model, data)
    torch._dynamo.reset()
    compiled = torch.compile(model.distribution.log_prob, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(data), expected)
    torch._dynamo.reset()
