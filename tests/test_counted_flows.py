"""Flows and levels whose networks mix in counts of the training text."""

from __future__ import annotations

import pytest
import torch
from cases import DIMS, code, counting, enumerate_all, randomize, uneven

from dflow import objectives, zoo
from dflow.core import Context, Distribution
from dflow.nn.attention import TransformerSize
from dflow.nn.counted import Counted
from dflow.nn.infill import InfillTransformer
from dflow.ops.modular import one_hot

EVERY_SECOND = (-7, -5, -3, -1, 1, 3, 5, 7)

LAWS: dict[str, dict[str, object]] = {
    "strides": {"family": "bipartite", "num_flows": 5},
    "halves": {"family": "bipartite", "num_flows": 2, "masks": "halves", "elementwise": "shift"},
    "blocks": {"family": "bipartite", "num_flows": 7, "masks": "blocks"},
    "spectra": {"family": "multiscale"},
    "one spectrum": {"family": "multiscale", "num_spectra": 1, "elementwise": "shift"},
    "categorical": {"family": "multiscale", "conditional": "categorical", "num_levels": 2},
}


def fresh(name: str, K: int, dim: int, **more: object) -> Distribution:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "window": 3, "length": dim, "counts": 4}
    values = {**sizes, "counts_dropout": 0.0, **LAWS[name], **more}
    family = str(values.pop("family"))
    return counting(zoo.build(family, zoo.settings(family, values), K), K)


def build(name: str, K: int, dim: int) -> Distribution:
    return uneven(randomize(fresh(name, K, dim)))  # type: ignore[return-value]


def modules(law: Distribution) -> list[Counted]:
    return [module for module in law.modules() if isinstance(module, Counted)]


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_probabilities_sum_to_one_for_each_length_and_modes_agree(name: str, K: int) -> None:
    dim = DIMS[K]
    law, x = build(name, K, dim), enumerate_all(K, dim)
    for T in (dim, dim - 1):
        context = None if dim == T else Context(lengths=torch.full((len(x),), T))
        log_prob = law.log_prob(x, context)
        first = code(x[:, :T], K) * K ** (dim - T)
        assert abs(float(log_prob[first.unique()].exp().sum()) - 1) < 1e-12
        rows = law.log_prob(one_hot(x, K, torch.float64), context)
        torch.testing.assert_close(rows, log_prob, rtol=0, atol=1e-12)
        assert law.round_trip(x, context) is not False
    # A map must not depend on how many entries there are, or on whether gradients are wanted.
    with torch.enable_grad():
        assert torch.equal(law.log_prob(x).detach(), law.log_prob(x))
    other = torch.stack([law.log_prob(row[None])[0] for row in x[:4]])
    torch.testing.assert_close(other, law.log_prob(x)[:4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_counts_are_read(name: str) -> None:
    K, dim = 3, 8
    law, x = build(name, K, dim), torch.randint(0, 3, (50, 8), generator=torch.Generator().manual_seed(0))
    before = law.log_prob(x)
    for module in modules(law):
        counting(module, K)
        table = module.table
        module.use(table.where(torch.zeros_like(table.keys, dtype=torch.bool)))
    assert not torch.allclose(law.log_prob(x), before)


def test_patterns_are_those_of_the_symbols_that_a_coupling_reads() -> None:
    def offsets(**more: object) -> list[tuple[int, ...]]:
        return [module.offsets for module in modules(fresh("strides", 3, 32, window=8, **more))]

    assert offsets(num_flows=9) == [EVERY_SECOND, (-6, -2, 2, 6), (-4, 4), (-8, 8)]
    assert offsets(num_flows=3, masks="halves") == [EVERY_SECOND]
    # Each of these hides one position, and the second reads the latent of the first.
    assert offsets(num_flows=2, masks="single") == [(-4, -3, -2, -1)]
    assert offsets(num_flows=31, masks="blocks")[-2:] == [(-2, -1), (-1,)]
    # Symbols known around: also contiguous ones.
    assert offsets(num_flows=3, context=4)[2] == (-4, -3, -2, -1, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("strides", "layerwise"),
        ("strides", "gumbel"),
        ("strides", "straight_through"),
        ("halves", "expected"),
        ("spectra", "layerwise"),
        ("spectra", "straight_through"),
        ("one spectrum", "expected"),
        ("categorical", "likelihood"),
    ],
)
def test_every_rule_trains_the_gate(name: str, rule: objectives.Rule) -> None:
    K, dim = 5, 16
    torch.manual_seed(0)
    law = uneven(fresh(name, K, dim)).train()
    x = torch.randint(0, K, (8, dim), generator=torch.Generator().manual_seed(0))
    objective = objectives.Objective(law, rule)
    optimizer = torch.optim.Adam(law.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss, _ = objective(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for module in modules(law):
        assert module.weights.weight.grad is not None
        assert module.weights.weight.grad.abs().sum() > 0
    assert sum(losses[-5:]) < sum(losses[:5])


def test_how_sure_the_mixture_is_moves_the_weights_of_spectra_and_trains_no_mixture() -> None:
    K, known = 5, torch.arange(0, 8, 2)
    net = InfillTransformer(K, K + 3, known, known + 1, TransformerSize(8, 1, 2, window=2, counts=2))
    randomize(counting(net, K))
    x = torch.randint(0, K, (2, 4))
    out = net(x)
    torch.testing.assert_close(out[..., :K].exp().sum(-1), torch.ones(2, 4).double())
    gate = net.counted
    assert isinstance(gate, Counted)
    out[..., K:].sum().backward()
    assert gate.weights.weight.grad is None or not gate.weights.weight.grad.any()
    assert isinstance(net.counted.sureness, torch.nn.Sequential)
    assert all(parameter.grad is not None for parameter in net.counted.sureness.parameters())
