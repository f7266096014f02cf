"""A model that has been used is as good as a fresh one: trained, given other weights, moved."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from folders import LENGTH, SETTINGS, make_model
from test_hf_forward import FLOW, IMAGES, TEXTS, idle, image, symbols, text, values
from torch import Tensor

from dflow import hf
from dflow.bijectors import Coupling
from dflow.elementwise import ModShift
from dflow.nn.table import InfillTable
from dflow.ops.memo import Memo

K = 5


def use(model: hf.DflowModel, x: Tensor) -> None:
    """Everything that may leave something behind, as the commands do it: in inference mode."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        model.generate(2)
        model.generate(2, length=3)
        model.log_prob(x)
        model.round_trip(x)
    model.train(training)


@pytest.mark.parametrize(("family", "changes"), TEXTS, ids=str)
def test_what_was_drawn_or_scored_from_can_be_trained(family: str, changes: dict[str, Any]) -> None:
    model = text(family, changes)
    use(model, symbols(4))
    for budget in budgets(model):
        use(model.at(budget), symbols(4))
    for mode in (True, False):
        loss = model.train(mode)(symbols()).loss
        if mode:
            loss.backward()
            assert idle(model) == []
    if family in ("grouped", "transformer", "lstm", "any_order", "multiscale"):
        model.log_prob(symbols()).sum().backward()


@pytest.mark.parametrize(("family", "settings"), IMAGES, ids=str)
def test_an_image_model_that_was_used_can_be_trained(family: str, settings: dict[str, Any]) -> None:
    model = image(family, settings)
    model.initialize(values(model))
    model.eval()
    with torch.inference_mode():
        model.generate(2)
        model(values(model))
    model.train()(values(model)).loss.backward()
    assert idle(model) == []


def budgets(model: hf.DflowModel) -> list[int]:
    """Numbers of calls that belong to the weights; an any-order model makes the others from its settings."""
    numbers = model.distribution.budgets
    return [model.num_calls] if isinstance(numbers, range) else list(numbers)


#: Pairs of settings whose weights have the same shapes, but other orders, masks or positions.
PAIRS = [
    ("grouped", {"order": "lockstep", "num_calls": 4}, {"order": "bit_reversed", "num_calls": 4}),
    ("grouped", {"order": "lockstep", "num_calls": 4}, {"order": "islands", "num_calls": 4}),
    ("grouped", {"order": "lockstep", "calls": [4]}, {"order": "shuffled", "calls": [4]}),
    ("any_order", {"order": "lockstep"}, {"order": "islands"}),
    ("any_order", {"order": "random"}, {"order": "bit_reversed"}),
    ("bipartite", {"masks": "halves", "num_flows": 1, "conditioner": "table", "elementwise": "shift"},
                  {"masks": "blocks", "num_flows": 1, "conditioner": "table", "elementwise": "shift"}),
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("family", "one", "other"), PAIRS, ids=str)
def test_other_weights_bring_their_order(
    family: str, one: dict[str, Any], other: dict[str, Any], assign: bool, mode: Any
) -> None:
    K = 2 if one.get("conditioner") == "table" else 5

    def build(changes: dict[str, Any], seed: int) -> hf.DflowModel:
        torch.manual_seed(seed)
        settings = SETTINGS[family] | {"length": LENGTH} | changes
        model = hf.DflowModel(hf.DflowConfig(family=family, vocab_size=K, **settings))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5 * torch.randn_like(p))
        return model.eval()

    used, fresh = build(one, 0), build(other, 1)
    state = fresh.state_dict()
    x = torch.randint(0, K, (6, LENGTH))
    with mode():
        for budget in budgets(used):
            used.at(budget).log_prob(x)
            used.at(budget).generate(2)
    used.load_state_dict(copy.deepcopy(state), assign=assign)
    for budget in budgets(used):
        models = used.at(budget), fresh.at(budget)
        with mode():
            torch.testing.assert_close(models[0].log_prob(x), models[1].log_prob(x))
            assert models[0].round_trip(x)
            draws = [m.generate(3, generator=torch.Generator().manual_seed(0)) for m in models]
        assert torch.equal(*draws)


def test_couplings_follow_their_masks() -> None:
    half, odd = torch.arange(4) < 2, torch.arange(4) % 2 == 0

    def build(mask: Tensor) -> Coupling:
        net = InfillTable(3, 3, mask.nonzero().flatten(), (~mask).nonzero().flatten())
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn_like(p))
        return Coupling(ModShift(3), net, mask)

    x = torch.randint(3, (9, 4))
    for before, after in ((half, odd), (odd, half), (half, ~half)):
        used, fresh = build(before), build(after)
        used.forward(x)
        used.load_state_dict(fresh.state_dict())
        assert torch.equal(used.forward(x)[0], fresh.forward(x)[0])
        assert torch.equal(used.inverse(used.forward(x)[0])[0], x)


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_a_used_model_is_moved_copied_and_pickled(family: str) -> None:
    model, x = make_model(family, K), symbols(6)
    use(model, x)
    expected = make_model(family, K).double().log_prob(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(other.log_prob(x), make_model(family, K).log_prob(x))
        other.double()
        torch.testing.assert_close(other.log_prob(x), expected)
        use(other, x)
        other.float()
        torch.testing.assert_close(other.log_prob(x), make_model(family, K).log_prob(x))


def test_a_memo_is_made_anew_when_a_tensor_or_the_key_has_changed() -> None:
    made: list[int] = []
    memo: Memo[Tensor] = Memo()

    def double(x: Tensor, key: int = 0) -> Tensor:
        def make() -> Tensor:
            made.append(1)
            return 2 * x

        return memo(make, x, key=key)

    with torch.inference_mode():
        x = torch.arange(3.0)
        assert not double(x).is_inference()
        assert torch.equal(double(x), 2 * torch.arange(3.0))
        assert len(made) == 1
        x.add_(1)  # tensors of inference mode do not count what is written to them
        assert double(x).tolist() == [2, 4, 6]
    y = x.clone()
    double(y)
    assert len(made) == 2
    y[0] = 7
    assert double(y).tolist() == [14, 4, 6]
    double(y, 1)
    double(y.double(), 1)
    assert len(made) == 5
    assert copy.deepcopy(memo)._entry is None


def test_settings_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, density = make_model("grouped", K), image("dequantized", FLOW | {"levels": [2]})
    monkeypatch.setattr(hf.DflowConfig, "settings", None)
    monkeypatch.setattr(hf.DflowImageConfig, "settings", None)
    model(symbols(2))
    density.eval()(values(density))
