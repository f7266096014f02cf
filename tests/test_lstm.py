"""The LSTM baseline: causal, the same in both modes and in both passes, and regularised where it says."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dflow.core import Context
from dflow.nn.lstm import LSTM, locked_dropout

K, P = 4, 3


def make(dtype: torch.dtype = torch.float64, **settings: Any) -> LSTM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 6, "num_layers": 2, "embedding_size": 5}
    net = LSTM(K, P, **{**sizes, **settings}).to(dtype)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return net.eval()


def every(dim: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(K), repeat=dim)))


def stepped(net: LSTM, x: Tensor) -> Tensor:
    state = net.start(len(x))
    rows = [net.step(None, state)]
    rows += [net.step(x[:, i : i + 1], state) for i in range(x.shape[1] - 1)]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 7])
def test_step_by_step_is_the_full_pass(layers: int, batch: int) -> None:
    net, x = make(num_layers=layers), torch.randint(K, (batch, 9))
    assert torch.allclose(stepped(net, x), net(x), atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_read_in_one_call_is_what_steps_read(rows: int) -> None:
    net = make().train()  # a step drops nothing, and neither does a read
    for length in (1, 2, 5):
        x = torch.randint(0, K, (rows, length + 1), generator=torch.Generator().manual_seed(length))
        state = net.start(3)
        net.read(x[:, :length], state)
        rest = torch.cat([net.step(x[:, i : i + 1].expand(3, 1), state) for i in (length - 1, length)], 1)
        torch.testing.assert_close(rest, stepped(net, F.pad(x, (0, 1)).expand(3, -1))[:, length:])


def test_parameters_depend_on_all_earlier_symbols_and_on_no_other() -> None:
    net, x = make(), every(4)
    out = net(x)
    for i in range(4):
        change = torch.cat([x[:, :i], (x[:, i:] + 1) % K], 1)
        assert torch.allclose(net(change)[:, : i + 1], out[:, : i + 1], atol=1e-12)
        if i < 3:
            other = x.clone()
            other[:, i] = (other[:, i] + 1) % K
            assert ((net(other)[:, i + 1 :] - out[:, i + 1 :]).abs().amax((0, 2)) > 1e-4).all()


def test_symbols_and_one_hot_rows_give_the_same() -> None:
    net, x = make(), every(3)
    assert torch.equal(net(F.one_hot(x, K).double()), net(x))


def test_gradient_to_one_hot_rows_is_that_of_the_embedding_product() -> None:
    net = make()
    rows = F.one_hot(torch.randint(K, (2, 5)), K).double().requires_grad_()
    net(rows).square().sum().backward()
    dense = rows.detach().clone().requires_grad_()
    h = torch.cat([net.before.expand(2, 1, -1), dense[:, :-1] @ net.embedding], 1)
    for layer in net.layers:
        h = layer(h)[0]
    net.head(h).square().sum().backward()
    assert rows.grad is not None
    assert dense.grad is not None
    assert rows.grad[:, :-1].abs().amin() > 0
    assert torch.allclose(rows.grad, dense.grad, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_every_parameter(training: bool) -> None:
    net = make().train(training)
    net(torch.randint(K, (8, 6))).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_absent_entries_influence_nothing() -> None:
    net, lengths = make(), Context(lengths=torch.tensor([2, 4]))
    x = torch.tensor([[1, 2, 0, 0], [3, 1, 2, 0]])
    noisy = torch.tensor([[1, 2, 3, 1], [3, 1, 2, 0]])
    out, other = net(x, lengths), net(noisy, lengths)
    assert torch.equal(out[0, :2], other[0, :2])
    assert torch.equal(out[1], other[1])


def test_the_step_follows_every_change_of_the_parameters() -> None:
    net, x = make(), every(3)[:9]
    stepped(net, x)
    for p in net.parameters():
        p.data[0] += 0.3  # invisible to version counters
        assert torch.allclose(stepped(net, x), net(x), atol=1e-12)
    net.float()
    assert torch.allclose(stepped(net, x), net(x), atol=1e-5)
    twin = copy.deepcopy(net)
    twin.load_state_dict({k: v * 0.5 for k, v in net.state_dict().items()})
    assert torch.allclose(stepped(twin, x), twin(x), atol=1e-5)
    assert torch.allclose(stepped(net, x), net(x), atol=1e-5)
    assert not torch.allclose(net(x), twin(x), atol=1e-3)


def test_the_layout_is_kept_while_nothing_changes_and_is_no_state() -> None:
    net = make()
    assert net.start(1).weights is net.start(5).weights
    assert not any("laid" in key for key in net.state_dict())


def test_a_state_made_in_inference_mode_serves_outside_and_the_other_way() -> None:
    net = make()
    with torch.inference_mode():
        state = net.start(2)
        net.step(None, state)
    net.step(torch.zeros(2, 1, dtype=torch.int64), state)
    with torch.inference_mode():
        net.step(torch.zeros(2, 1, dtype=torch.int64), state)
    assert not net.step(torch.ones(2, 1, dtype=torch.int64), state).requires_grad


def test_states_are_independent() -> None:
    net, x = make(), torch.randint(K, (2, 3, 5))
    states = [net.start(3), net.start(3)]
    rows: list[list[Tensor]] = [[], []]
    for i in range(5):
        for r, s, symbols in zip(rows, states, x, strict=True):
            r.append(net.step(symbols[:, i - 1 : i] if i else None, s))
    for r, symbols in zip(rows, x, strict=True):
        assert torch.allclose(torch.cat(r, 1), net(symbols), atol=1e-12)


def test_locked_dropout_has_one_mask_for_all_positions() -> None:
    torch.manual_seed(0)
    out = locked_dropout(torch.ones(400, 3, 10), 0.25)
    assert torch.equal(out[:, :1].expand(-1, 3, -1), out)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(out.mean().item() - 1) < 0.05


RATES = ["dropout", "dropout_hidden", "dropout_input", "dropout_embedding", "weight_drop"]


@pytest.mark.parametrize("name", RATES)
def test_each_rate_acts_in_training_alone_by_the_seed_alone(name: str) -> None:
    net = make(**{rate: 0.0 for rate in RATES} | {name: 0.5})
    x = torch.randint(K, (4, 6))
    plain = net(x)
    net.train()
    torch.manual_seed(1)
    first = net(x)
    second = net(x)
    torch.manual_seed(1)
    again = net(x)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    net.eval()
    assert torch.equal(net(x), plain)


def test_without_rates_training_is_evaluation() -> None:
    net, x = make(**dict.fromkeys(RATES, 0.0)), torch.randint(K, (4, 6))
    assert torch.equal(net.train()(x), net.eval()(x))


def test_dropped_weights_are_one_mask_for_the_whole_pass() -> None:
    net = make(**dict.fromkeys(RATES, 0.0) | {"weight_drop": 0.5})
    x = torch.randint(K, (3, 6))
    torch.manual_seed(5)
    out = net.train()(x)
    torch.manual_seed(5)
    for layer in net.layers:
        kept = layer.weight_hh_l0.data
        kept.copy_(F.dropout(kept, 0.5))
        assert 0 < (kept == 0).sum() < kept.numel()
    assert torch.allclose(net.eval()(x), out, atol=1e-12)


def test_tied_weights_are_one_parameter() -> None:
    net = LSTM(K, K, hidden_size=6, embedding_size=6, tied=True).eval()
    assert net.head.weight is net.embedding
    x = torch.randint(K, (3, 5))
    assert torch.allclose(stepped(net, x), net(x), atol=1e-6)
    free = LSTM(K, K, hidden_size=6, embedding_size=6)
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in net.parameters()) == 24


def test_single_position() -> None:
    net = make()
    assert torch.allclose(net(torch.tensor([[1], [2]])), net(torch.tensor([[3], [3]])))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"embedding_size": -1}, "embedding_size=-1"),
        ({"weight_drop": 1.0}, "weight_drop=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"tied": True}, "tied"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make(**settings)


def test_each_rate_drops_its_share_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, weights and outputs of layers, by how many zeros they hold, and how much larger the rest is."""
    rates = {"dropout": 0.1, "dropout_hidden": 0.2, "dropout_input": 0.3, "weight_drop": 0.4}
    net, kernel = make(num_layers=2, hidden_size=40, embedding_size=30, **rates), torch.lstm
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(h: Tensor, state: Any, weights: list[Tensor], *rest: Any) -> Any:
        seen.append((h, weights[1]))
        return kernel(h, state, weights, *rest)

    monkeypatch.setattr(torch, "lstm", spy)
    net.head.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[0])))
    x = torch.randint(K, (400, 3))
    with torch.no_grad():
        net(x)
        plain = seen.copy()
        seen.clear()
        net.train()(x)
    found = {
        "dropout_input": (seen[0][0], plain[0][0]),
        "weight_drop": (seen[0][1], plain[0][1]),
        "dropout_hidden": (seen[1][0], None),
        "dropout": (seen[2][0], None),
    }
    for name, (some, whole) in found.items():
        rate, kept = rates[name], some != 0
        # Masks are shared by positions: 400 rows or 160 rows of weights of 30 features or more are free.
        entries = kept.numel() / (1 if name == "weight_drop" else 3)
        assert abs(float(kept.double().mean()) - (1 - rate)) < 5 * (rate * (1 - rate) / entries) ** 0.5
        if whole is not None:
            torch.testing.assert_close(some[kept], whole[kept] / (1 - rate))
    hidden = seen[1][0]
    assert float(hidden.abs().max()) > 1  # of tanh, so larger by 1 / 0.8


def test_whole_symbols_are_dropped_from_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, kernel, seen = LSTM(600, P, 6, 1, 5, 0.0, 0.0, 0.0, 0.25, 0.0), torch.lstm, []

    def spy(h: Tensor, *rest: Any) -> Any:
        seen.append(h)
        return kernel(h, *rest)

    monkeypatch.setattr(torch, "lstm", spy)
    x = torch.arange(600).expand(2, -1)
    with torch.no_grad():
        net(x)
    first = seen[0][:, 1:]
    assert torch.equal(first[0], first[1])
    kept = (first[0] != 0).any(1)
    assert torch.equal(first[0] != 0, kept[:, None].expand_as(first[0]))
    torch.testing.assert_close(first[0][kept], net.embedding[:-1][kept].detach() / 0.75)
    assert abs(float(kept.double().mean()) - 0.75) < 5 * (0.25 * 0.75 / 599) ** 0.5
