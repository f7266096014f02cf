from __future__ import annotations

import math

import pytest
import torch
from folders import SETTINGS
from torch.nn import functional as F

from dflow import objectives, zoo
from dflow.bijectors import Chain, Coupling
from dflow.config import InputError
from dflow.flows import Flow

K, LENGTH = 4, 8


def build(family, **changes):
    torch.manual_seed(0)
    config = zoo.settings(family, SETTINGS[family] | {"length": LENGTH} | changes)
    return zoo.build(family, config, K)


def shaken(model):
    """Off the identity start, where zero heads keep gradients from everything below them."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(
    ("family", "changes", "rule"),
    [
        ("transformer", {}, "likelihood"),
        ("grouped", {}, "likelihood"),
        ("lstm", {}, "likelihood"),
        ("any_order", {"ngram_rows": 1}, "masked"),
        ("bipartite", {"num_flows": 3}, "layerwise"),
        ("bipartite", {"num_flows": 3}, "straight_through"),
        ("bipartite", {"num_flows": 3}, "gumbel"),
        ("bipartite", {"num_flows": 3, "elementwise": "affine"}, "gumbel"),
        ("bipartite", {"num_flows": 3, "elementwise": "shift", "base": "mixture"}, "straight_through"),
        ("autoregressive", {"num_flows": 2}, "layerwise"),
        ("autoregressive", {"num_flows": 2}, "gumbel"),
        ("autoregressive", {"num_flows": 1, "base": "autoregressive"}, "straight_through"),
    ],
)
def test_gradients_reach_every_parameter(family, changes, rule):
    model = shaken(build(family, **changes))
    objective = objectives.Objective(model, rule)
    for estimator in objectives.estimators(model):
        estimator.noise = float(rule == "gumbel")
    loss, _ = objective(torch.randint(0, K, (32, LENGTH)))
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_without_noise_the_straight_through_loss_is_the_exact_one():
    for family in ("bipartite", "autoregressive"):
        model = shaken(build(family, num_flows=3))
        x = torch.randint(0, K, (16, LENGTH))
        loss, counts = objectives.Objective(model, "straight_through")(x)
        assert loss.item() == pytest.approx(-model.log_prob(x).sum().item(), rel=1e-5)
        assert torch.equal(counts, model.base.statistics(model.transform(x)[0]))
        lengths = torch.randint(1, LENGTH + 1, (16,))
        loss, _ = objectives.Objective(model, "straight_through")(x, lengths)
        assert loss.item() == pytest.approx(-model.log_prob(x, lengths).sum().item(), rel=1e-5)


def test_the_layerwise_loss_is_each_layers_cross_entropy_and_its_latent_the_models():
    model = shaken(build("bipartite", num_flows=3))
    x = torch.randint(0, K, (16, LENGTH))
    loss, counts = objectives.Objective(model, "layerwise")(x)
    assert isinstance(model.bijector, Chain)
    expected, h = 0.0, x
    for layer in model.bijector.bijectors:
        assert isinstance(layer, Coupling)
        params = layer.params(h)
        hidden = h[:, layer.hidden_index]
        expected += F.cross_entropy(params.flatten(0, 1), hidden.flatten(), reduction="sum").item()
        h, _ = layer(h)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(counts, model.base.statistics(h))


def test_layerwise_loss_leaves_absent_entries_out():
    model = shaken(build("bipartite", num_flows=3))
    objective = objectives.Objective(model, "layerwise")
    x = torch.randint(0, K, (16, LENGTH))
    lengths = torch.randint(1, LENGTH, (16,))
    loss, counts = objective(x, lengths)
    other = torch.where(torch.arange(LENGTH) < lengths[:, None], x, (x + 1) % K)
    again, same = objective(other, lengths)
    assert loss.item() == pytest.approx(again.item(), rel=1e-6)
    assert torch.equal(counts, same)
    assert counts.sum() == lengths.sum()


def test_refit_finds_the_optimum_of_the_base():
    model = shaken(build("bipartite", num_flows=3))
    x = torch.randint(0, K, (500, LENGTH))
    objectives.refit(model, [(x[:250], None), (x[250:], None)])
    best = model.log_prob(x).sum().item()
    counts = model.base.counts.clone()
    for _ in range(5):
        model.base.assign(counts * (1 + 0.2 * torch.rand_like(counts)))
        assert model.log_prob(x).sum().item() < best + 1e-3
    grouped = build("grouped")
    before = grouped.log_prob(x)
    objectives.refit(grouped, [(x, None)])
    assert torch.equal(grouped.log_prob(x), before)


def test_default_rules():
    rules = {
        "grouped": "likelihood",
        "transformer": "likelihood",
        "lstm": "likelihood",
        "any_order": "masked",
        "bipartite": "layerwise",
        "autoregressive": "layerwise",
    }
    assert {f: objectives.default_rule(build(f)) for f in rules} == rules
    assert objectives.default_rule(build("bipartite", elementwise="affine")) == "straight_through"
    assert objectives.default_rule(build("bipartite", base="mixture")) == "straight_through"


@pytest.mark.parametrize(
    ("family", "changes", "rule", "message"),
    [
        ("grouped", {}, "gumbel", "use likelihood"),
        ("grouped", {}, "masked", "use likelihood"),
        ("any_order", {}, "likelihood", "use masked"),
        ("bipartite", {}, "masked", "use straight_through, gumbel or layerwise"),
        ("bipartite", {}, "likelihood", "use straight_through, gumbel or layerwise"),
        ("bipartite", {"base": "mixture"}, "layerwise", "trains no base"),
        ("bipartite", {"elementwise": "affine"}, "layerwise", "scale of ModAffine"),
    ],
)
def test_rules_that_would_leave_something_untrained_are_refused(family, changes, rule, message):
    with pytest.raises(InputError, match=message):
        objectives.Objective(build(family, **changes), rule)


@pytest.mark.parametrize("rule", ["layerwise", "gumbel"])
def test_every_rule_learns_dependence(rule):
    """Odd symbols repeat the even ones before them: half of the bits can go."""
    model = build("bipartite", num_flows=1, hidden_size=16)
    assert isinstance(model, Flow)
    objective = objectives.Objective(model, rule)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    torch.manual_seed(1)

    def batch(n):
        return torch.randint(0, K, (n, LENGTH // 2)).repeat_interleave(2, 1)

    for step in range(150):
        for estimator in objectives.estimators(model):
            estimator.noise = max(0.0, 1 - step / 100) if rule == "gumbel" else 0.0
        loss, counts = objective(batch(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.base.update(counts, 0.9)
    objectives.refit(model, [(batch(1000), None)])
    bits = objectives.bits(-model.log_prob(batch(1000)).sum().item(), 1000 * LENGTH)
    assert bits < 1.1  # of 2 without learning; the optimum is 1
    assert math.isfinite(bits)
