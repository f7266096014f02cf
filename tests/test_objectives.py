from __future__ import annotations

import math

import pytest
import torch
from folders import SETTINGS
from torch.nn import functional as F

from dflow import objectives, zoo
from dflow.bijectors import Autoregressive, Chain, Coupling, Reverse
from dflow.config import InputError
from dflow.core import Context
from dflow.flows import Flow, Split
from dflow.flows.walk import innermost

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
        ("autoregressive", {"num_flows": 1, "base": "spectra"}, "likelihood"),
        ("bipartite", {"num_flows": 3, "elementwise": "shift"}, "expected"),
        ("bipartite", {"num_flows": 3, "elementwise": "affine"}, "expected"),
        ("autoregressive", {"num_flows": 2, "elementwise": "affine"}, "expected"),
        ("multiscale", {"conditional": "categorical"}, "likelihood"),
        ("multiscale", {}, "layerwise"),
        ("multiscale", {}, "gumbel"),
        ("multiscale", {"elementwise": "affine", "num_spectra": 1}, "expected"),
    ],
)
def test_gradients_reach_every_parameter(family, changes, rule):
    model = shaken(build(family, **changes))
    objective = objectives.Objective(model, rule)
    for estimator in objectives.estimators(model):
        estimator.noise = float(rule == "gumbel")
    x = torch.randint(0, K, (32, LENGTH))
    objectives.refit(model, [(x % 2, None)])  # a uniform base costs the same at every latent
    loss, _ = objective(x)
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
        assert loss.item() == pytest.approx(
            -model.log_prob(x, Context(lengths=lengths)).sum().item(), rel=1e-5
        )


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
        "multiscale": "layerwise",
    }
    assert {f: objectives.default_rule(build(f)) for f in rules} == rules
    assert objectives.default_rule(build("bipartite", elementwise="affine")) == "gumbel"
    assert objectives.default_rule(build("bipartite", base="mixture")) == "gumbel"
    assert objectives.default_rule(build("multiscale", conditional="categorical")) == "likelihood"


@pytest.mark.parametrize(
    ("family", "changes", "rule", "message"),
    [
        ("grouped", {}, "gumbel", "use likelihood"),
        ("grouped", {}, "masked", "use likelihood"),
        ("any_order", {}, "likelihood", "use masked"),
        ("bipartite", {}, "masked", "use layerwise or gumbel or straight_through"),
        ("bipartite", {}, "likelihood", "use layerwise or gumbel or straight_through"),
        ("bipartite", {"base": "mixture"}, "layerwise", "trains no base"),
        ("bipartite", {"elementwise": "affine"}, "layerwise", "cannot train ModAffine"),
        ("bipartite", {"base": "mixture", "elementwise": "shift"}, "expected", "trains no base"),
        ("bipartite", {}, "expected", "ModRank has no 'expected'"),
        ("multiscale", {}, "likelihood", "use layerwise or gumbel or straight_through"),
        ("multiscale", {"conditional": "categorical"}, "layerwise", "use likelihood"),
        ("multiscale", {}, "expected", "no 'expected'"),
    ],
)
def test_rules_that_would_leave_something_untrained_are_refused(family, changes, rule, message):
    with pytest.raises(InputError, match=message):
        objectives.Objective(build(family, **changes), rule)


@pytest.mark.parametrize(
    ("rule", "elementwise"), [("layerwise", "rank"), ("gumbel", "rank"), ("expected", "affine")]
)
def test_every_rule_learns_dependence(rule, elementwise):
    """Odd symbols repeat the even ones before them: half of the bits can go."""
    model = build("bipartite", num_flows=1, hidden_size=16, elementwise=elementwise)
    assert isinstance(model, Flow)
    objective = objectives.Objective(model, rule)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    torch.manual_seed(1)

    def batch(n):
        return torch.randint(0, K, (n, LENGTH // 2)).repeat_interleave(2, 1)

    for step in range(150):
        for estimator in objectives.estimators(model):
            estimator.noise = max(0.0, 1 - step / 100) if rule == "gumbel" else 0.0
        # The marginals are uniform: every latent costs the same until the base is drawn to some symbol.
        model.base.peak = 0.5 if rule == "expected" and step < 50 else 0.0
        loss, counts = objective(batch(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.base.update(counts, 0.9)
    objectives.refit(model, [(batch(1000), None)])
    bits = objectives.bits(-model.log_prob(batch(1000)).sum().item(), 1000 * LENGTH)
    assert bits < 1.1  # of 2 without learning; the optimum is 1
    assert math.isfinite(bits)


def test_a_law_around_a_split_counts_what_reaches_the_innermost_base():
    inner = shaken(build("multiscale", elementwise="shift"))
    coupling = shaken(build("bipartite", num_flows=1, elementwise="shift")).bijector
    flow = Flow(coupling, inner)
    x = torch.randint(0, K, (16, LENGTH))
    loss, counts = objectives.Objective(flow, "straight_through")(x)
    assert loss.item() == pytest.approx(-flow.log_prob(x).sum().item(), rel=1e-5)
    assert torch.equal(counts, innermost(flow).statistics(coupling(x)[0][:, :1]))
    half = build("bipartite", length=4)
    with pytest.raises(InputError, match="conditional of a split"):
        objectives.Objective(Split(torch.arange(LENGTH) < 4, half, build("bipartite", length=4)), "gumbel")


def by_enumeration(model, x, lengths=None, temperature=1.0):
    """The loss of rule expected, shift by shift, for couplings and reversals of shifts."""
    loss, h, dim = 0.0, x, x.shape[1]
    layers = list(model.bijector.bijectors)
    law = model.base.log_law()[model.base.classes]
    for i, layer in enumerate(layers):
        if not isinstance(layer, (Coupling, Autoregressive)):
            h, _ = layer(h, Context(lengths=lengths))
            continue
        moved = layer.hidden_index.tolist() if isinstance(layer, Coupling) else range(dim)
        params = layer.params(h, Context(lengths=lengths))
        turns = sum(isinstance(later, Reverse) for later in layers[i:])
        for b in range(len(x)):
            T = dim if lengths is None else int(lengths[b])
            for j, p in enumerate(moved):
                place = T - 1 - p if turns % 2 else p
                if p < T:
                    for s in range(K):
                        share = torch.softmax(params[b, j] / temperature, -1)[s]
                        loss = loss - share * law[place, (h[b, p] - s) % K]
        h = layer(h, Context(lengths=lengths))[0].detach()
    return loss


@pytest.mark.parametrize(
    ("family", "changes"),
    [("bipartite", {"num_flows": 3}), ("bipartite", {"num_flows": 5}), ("autoregressive", {"num_flows": 3})],
)
@pytest.mark.parametrize("lengths", [None, torch.tensor([8, 5, 1])])
def test_expected_loss_and_gradient_are_those_of_all_shifts(family, changes, lengths):
    model = shaken(build(family, elementwise="shift", **changes)).double()
    model.base.assign(9 * torch.rand_like(model.base.counts))
    for estimator in objectives.estimators(model):
        estimator.temperature = 0.6
    x = torch.randint(0, K, (3, LENGTH))
    loss, counts = objectives.Objective(model, "expected")(x, lengths)
    expected, context = by_enumeration(model, x, lengths, 0.6), Context(lengths=lengths)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(counts, model.base.statistics(model.transform(x, context)[0], context))
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters)
    for one, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_next_to_the_base_straight_through_shifts_have_the_gradient_of_the_expected_loss():
    """So what `expected` gains over straight-through shifts, with one layer an entry, is time alone."""
    model = shaken(build("bipartite", num_flows=3, elementwise="shift")).double()
    model.base.assign(9 * torch.rand_like(model.base.counts))
    x = torch.randint(0, K, (16, LENGTH))
    parameters = list(model.parameters())
    for temperature in (1.0, 0.3):
        for estimator in objectives.estimators(model):
            estimator.temperature = temperature
        losses = [objectives.Objective(model, rule)(x)[0] for rule in ("expected", "straight_through")]
        for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lengths", [None, torch.tensor([8, 5, 1] * 4)])
def test_spectra_learn_ranks_by_cross_entropy_and_the_rest_by_likelihood(lengths):
    model = shaken(build("multiscale", num_spectra=3)).double()
    x = torch.randint(0, K, (12, LENGTH))
    loss, counts = objectives.Objective(model, "layerwise")(x, lengths)
    expected, law, h, own = 0.0, model, x, Context(lengths=lengths)
    while isinstance(law, Split):
        (kept, context), (rest, given) = law.parts(h, own)
        params, _ = law.conditional.params(given)
        terms = F.cross_entropy(params.flatten(0, 1), rest.flatten(), reduction="none").view(rest.shape)
        there = (
            torch.ones_like(terms)
            if lengths is None
            else torch.arange(rest.shape[1]) < given.lengths[:, None]
        )
        expected += (terms * there).sum() - law.conditional.log_prob(rest, given).sum()
        law, h, own = law.base, kept, context
    expected = expected - law.log_prob(h, own).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(counts, law.statistics(h, own))
    objectives.refit(model, [(x, Context(lengths=lengths))])
    assert torch.equal(law.counts, counts)


@pytest.mark.parametrize("lengths", [None, torch.tensor([8, 5, 1] * 4)])
def test_a_base_of_spectra_learns_by_likelihood_and_its_map_by_cross_entropy(lengths):
    model = shaken(build("autoregressive", num_flows=1, base="spectra")).double()
    x, context = torch.randint(0, K, (12, LENGTH)), Context(lengths=lengths)
    loss, counts = objectives.Objective(model, "likelihood")(x, lengths)
    logits, log_p = model.losses(x, context)
    terms = F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view(x.shape)
    there = torch.ones_like(terms) if lengths is None else torch.arange(LENGTH) < lengths[:, None]
    expected = (terms * there).sum() - model.log_prob(x, context).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert counts is None
    torch.testing.assert_close(log_p * there, model.log_prob_each(x, context), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [{"num_flows": 2}, {"num_flows": 1, "elementwise": "shift"}, {"num_flows": 1, "inversion": "jacobi"}],
)
def test_a_base_of_spectra_is_that_of_one_bijector_of_ranks(changes):
    with pytest.raises(InputError, match="a base of spectra is that of one bijector of ranks"):
        build("autoregressive", base="spectra", **changes)


def test_spectra_under_the_other_rules_cost_what_they_are():
    x = torch.randint(0, K, (12, LENGTH))
    for elementwise, rule in (
        ("rank", "straight_through"),
        ("shift", "straight_through"),
        ("shift", "expected"),
    ):
        model = shaken(build("multiscale", elementwise=elementwise)).double()
        for estimator in objectives.estimators(model):
            estimator.temperature = 1e-3  # one-hot: the mean over maps is that of the arg-max
        loss, _ = objectives.Objective(model, rule)(x)
        assert loss.item() == pytest.approx(-model.log_prob(x).sum().item(), rel=1e-4)
