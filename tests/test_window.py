"""Categorical laws of a window: sums, draws, starts, and the code of them."""

from __future__ import annotations

import math

import pytest
import torch
from reference_coder import ReferenceCoder
from torch import Tensor, nn

from dflow.coding import Coder, codec, integers
from dflow.core import Context
from dflow.distributions import ConditionalWindow

K = 5
LOW = torch.tensor([-2, 7])


class Net(nn.Module):
    """Logits of two entries from two numbers."""

    def __init__(self, symbols: int = K + 2) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2 * symbols)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x.to(self.linear.weight.dtype))
        return found.unflatten(1, (2, -1))


def build() -> ConditionalWindow:
    law = ConditionalWindow(Net(), LOW, K).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in law.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator))
        law.start.copy_(torch.randn(K + 2, generator=generator))
    return law.eval()


def context(n: int, dtype: torch.dtype = torch.float64) -> Context:
    return Context(given=(torch.tensor([[1.0, -0.5]], dtype=dtype).expand(n, 2),))


def hurdle(logits: Tensor, common: int, floor: float = 2.0**-16) -> list[float]:
    """Probabilities of the symbols, one by one, with the share of an even law."""
    values = logits.tolist()
    first = 1 / (1 + math.exp(-values[common]))
    total = sum(math.exp(v) for i, v in enumerate(values) if i != common)
    shares = [first if i == common else (1 - first) * math.exp(v) / total for i, v in enumerate(values)]
    return [(1 - floor) * p + floor / len(values) for p in shares]


def by_hand(law: ConditionalWindow, entry: int, x: int) -> float:
    p = hurdle(law.logits(context(1))[0, entry], law.common)
    offset = x - int(LOW[entry])
    if 0 <= offset < K:
        return p[offset + 1]
    far = -1 - offset if offset < 0 else offset - K
    q = (far + 1).bit_length() - 1
    return p[0 if offset < 0 else -1] * 2.0 ** -(q + 1) / 2**q


def test_masses_are_those_of_the_formula_and_sum_to_one() -> None:
    law = build()
    x = torch.cartesian_prod(torch.arange(-40, 41), torch.arange(-40, 41))
    expected = [
        math.log(a * b)
        for a in [by_hand(law, 0, i) for i in range(-40, 41)]
        for b in [by_hand(law, 1, i) for i in range(-40, 41)]
    ]
    torch.testing.assert_close(law.log_prob(x, context(len(x))).detach(), torch.tensor(expected).double())
    # All octaves of the tails have half of what is left.
    far = 2**12 - 1
    line = torch.arange(-2 - far, 3 + far)
    rows = torch.stack([line, torch.full_like(line, 8)], 1)
    found = (law.log_prob(rows, context(len(rows))).exp() / by_hand(law, 1, 8)).sum()
    p = hurdle(law.logits(context(1))[0, 0], law.common)
    assert float(found.detach()) == pytest.approx(1 - (p[0] + p[-1]) * 2.0**-12, abs=1e-12)


def test_no_symbol_of_a_window_costs_more_than_its_bound() -> None:
    law = ConditionalWindow(Net(), LOW, K).double()
    with torch.no_grad():
        law.net.linear.weight.zero_()
        law.net.linear.bias.zero_()
        law.net.linear.bias[:: K + 2] = 1e9
        # The most frequent symbol is sure not to come, or sure to come.
        for start in (-1e9, 1e9):
            law.start[1] = start
            line = torch.arange(-1, K + 1)
            rows = LOW + torch.stack([line, line], 1)
            bits = -law.log_prob(rows, context(len(rows))) / math.log(2)
            # A tail adds a bit for its first value.
            assert float(bits.max()) <= 2 * (16 + math.log2(K + 2) + 1)
            assert float(bits.max()) > 2 * 16


def test_modes_agree_and_gradients_reach_the_net() -> None:
    law, x = build(), torch.tensor([[0, 9], [-90, 7], [2, 4000]])
    value = law.log_prob(x, context(3))
    assert torch.equal(law.log_prob(x.double(), context(3)), value)
    value.sum().backward()
    for p in law.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert p.grad.abs().sum() > 0
    single = build().float()
    assert single.log_prob(x, context(3, torch.float32)).dtype == torch.float32
    torch.testing.assert_close(
        single.log_prob(x, context(3, torch.float32)).double(), value, rtol=1e-5, atol=1e-5
    )


def test_draws_are_those_of_the_law() -> None:
    law, n = build(), 40_000
    x = law.sample(n, context(n), torch.Generator().manual_seed(2))
    assert x.dtype == torch.int64
    assert torch.equal(x, law.sample(n, context(n), torch.Generator().manual_seed(2)))
    for entry in range(2):
        expected = torch.tensor([by_hand(law, entry, i) for i in range(-300, 301)])
        found = torch.bincount(x[:, entry].clamp(-300, 300) + 300, minlength=601) / n
        # Total variation of an empirical law: about sqrt(2 / (pi n)) sum sqrt(p) / 2.
        limit = 2 * (2 / (math.pi * n)) ** 0.5 * float(expected.sqrt().sum()) / 2
        assert float((found - expected).abs().sum()) / 2 < limit + 0.005
    with pytest.raises(ValueError, match="3 draws from a context of 2"):
        law.sample(3, context(2))


def test_it_starts_from_how_often_values_are_seen() -> None:
    law = build()
    nn.init.zeros_(law.net.linear.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(law.net.linear.bias)  # type: ignore[union-attr, arg-type]
    x = torch.stack([torch.tensor([-2, -2, 0, 90]), torch.tensor([7, 7, 9, 7])], 1)
    law.initialize(x)
    counts = torch.tensor([0, 5, 0, 2, 0, 0, 1]) + 0.5
    assert law.common == 1
    for entry in range(2):
        found = torch.tensor(hurdle(law.logits(context(1))[0, entry], 1))
        torch.testing.assert_close(found, counts / counts.sum())
    torch.testing.assert_close(law.law(context(1))[0].float(), (counts / counts.sum()).expand(2, -1))


@pytest.mark.parametrize("logits", [1 << 20, 1, 1000])
def test_a_stream_costs_what_the_law_says_and_takes_any_integer(
    logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "_LOGITS", logits)
    law, n = build(), 400
    x = law.sample(n, context(n), torch.Generator().manual_seed(3))
    x[::97, 0], x[5, 1], x[6, 1] = 10**9, -(10**6), 12
    assert bool((x > 10).any())
    coder = Coder()
    codec.push(law, x, coder, context(n))
    bits = -float(law.log_prob(x, context(n)).detach().sum()) / math.log(2)
    assert coder.num_bits == pytest.approx(bits, abs=0.002 * x.numel() + 64)
    again = Coder(coder.to_bytes())
    assert torch.equal(codec.pop(law, n, again, context(n)), x)
    again.finish()


@pytest.mark.parametrize("symbols", [4, 9, 258])
def test_laws_that_are_nearly_sure_cost_what_they_say(symbols: int) -> None:
    """The common symbol nearly sure, and next to impossible; one symbol over all others."""
    rows, entries = 40, 3
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, entries, symbols, generator=generator, dtype=torch.float64)
    start = torch.linspace(0, 1, symbols)
    common = symbols - 1
    logits[0:10, :, common] += 30
    logits[10:20, :, common] -= 30
    logits[20:30, :, 1] += 25
    low = torch.tensor([0, -4, 1000])
    law = torch.tensor([hurdle(row, common, 0.0) for row in (logits + start).flatten(0, 1)]).double()
    # A law that is nearly sure tells the others apart still. Tails are another test's.
    symbol = 1 + law[:, 1:-1].multinomial(1, generator=generator).squeeze(1)
    x = (symbol - 1).view(rows, entries) + low
    code = integers.WindowCode(logits.mT.contiguous().mT, start, low)
    coder, reference = Coder(), ReferenceCoder()
    for stack in (coder, reference):
        stack.push(*code.intervals(x.flatten()))
    assert coder.to_bytes() == reference.to_bytes()
    for stack in (Coder(coder.to_bytes()), ReferenceCoder(coder.to_bytes())):
        assert torch.equal(code.pop(stack), x.flatten())
        stack.finish()
    # Those of the first rows have to leave the common symbol first: 22 or 23 bits, then what they are worth.
    bits = -law.gather(1, symbol[:, None]).squeeze(1).log2()
    others = torch.softmax((logits + start).index_fill(2, torch.tensor(common), -math.inf), -1).flatten(0, 1)
    sure = law[:, common] > 1 - 2.0**-22
    bits[sure] = 23 - others.gather(1, symbol[:, None]).squeeze(1).log2()[sure]
    assert coder.num_bits == pytest.approx(float(bits.sum()), abs=0.02 * x.numel() + 64)
    with pytest.raises(ValueError, match="finite"):
        integers.WindowCode(logits.index_fill(0, torch.tensor(3), math.nan), start, low)


def test_wrong_arguments_are_named() -> None:
    law = build()
    for call, message in [
        (lambda: ConditionalWindow(Net(), LOW.double(), K), "low must be int64"),
        (lambda: ConditionalWindow(Net(), LOW, 1), "K = 1"),
        (lambda: ConditionalWindow(Net(), LOW, 1025), "K = 1025"),
        (lambda: law.log_prob(torch.zeros(3, 2)), "needs a context"),
        (lambda: law.log_prob(torch.zeros(3, 3), context(3)), "expected int64 or floating"),
        (lambda: law.log_prob(torch.zeros(3, 2), context(2)), "3 rows, the context 2"),
        (lambda: ConditionalWindow(Net(9), LOW, K).logits(context(1)), "the net gave params"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
