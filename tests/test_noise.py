"""Noise by address: it is Philox, it depends on its address alone, and what it draws follows the law."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BASES, DIMS, build_base, enumerate_all
from folders import make_model

from dflow.config import InputError
from dflow.core import Context
from dflow.generate import generate
from dflow.ops.noise import COMPONENTS, LENGTHS, SYMBOLS, Controls, Noise, gumbel_of, philox

K = 5


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], words: str) -> None:
    """Those of the reference implementation (Random123)."""
    tensors = [torch.tensor([word]) for word in counter]
    random_words = philox((tensors[0], tensors[1], tensors[2], tensors[3]), (key[0], key[1]))
    assert " ".join(f"{int(word):08x}" for word in random_words) == words


def test_uniform_numbers_are_even_and_never_0_or_1() -> None:
    rows, positions = torch.arange(200)[:, None], torch.arange(100)
    bits = Noise(7, torch.arange(200)).bits(rows, positions, 50).flatten()
    assert 0 <= int(bits.min()) <= int(bits.max()) < 1 << 52
    u = (bits.double() + 0.5) * 2.0**-52
    assert len(u) == 10**6
    assert len(u.unique()) == 10**6
    counts = torch.histc(u, 100, 0, 1)
    assert float(((counts - 1e4).square() / 1e4).sum()) < 160  # 99 degrees of freedom
    # The lowest bits too, and the grid is half a step off 0 and 1.
    steps = u * 2**52
    assert torch.equal(steps % 1, torch.full_like(u, 0.5))
    assert abs(float((steps.floor() % 2).mean()) - 0.5) < 0.002
    assert math.isfinite(-math.log(-math.log(1 - 2.0**-53)))


def test_without_float64_noise_keeps_its_tails_and_draws_differ_only_at_ties() -> None:
    ends = torch.tensor([0, 1, 2, (1 << 51) - 1, 1 << 51, (1 << 52) - 2, (1 << 52) - 1])
    random_bits = Noise(5, torch.arange(2000)).bits(torch.arange(2000)[:, None], torch.arange(50), 5)
    for bits in (ends, random_bits):
        exact, rounded = gumbel_of(bits, torch.float64), gumbel_of(bits, torch.float32)
        assert rounded.dtype == torch.float32
        assert float(((rounded - exact).abs() / (1 + exact.abs())).max()) < 3e-7
    logits = torch.tensor([0.0, -1.0, -2.0, -8.0, 0.5])
    scores = logits.double() + exact
    differs = scores.argmax(-1) != (logits + rounded).argmax(-1)
    first, second = scores.topk(2, -1).values.unbind(-1)
    assert int(differs.sum()) <= 2  # of 100,000
    assert bool(((first - second)[differs] < 1e-5).all())


def test_noise_depends_on_its_address_alone() -> None:
    rows, positions = torch.arange(6)[:, None], torch.arange(9)
    whole = Noise(3, torch.arange(6) + 10).gumbel(rows, positions, K)
    again = Noise(3, torch.tensor([12])).gumbel(torch.tensor([0]), torch.tensor([7]), K)
    assert torch.equal(again[0], whole[2, 7])
    shuffled = torch.tensor([5, 0, 3])
    some = Noise(3, torch.arange(6) + 10).select(shuffled)
    assert torch.equal(some.gumbel(rows, torch.arange(3), K), whole[:, shuffled])
    assert torch.equal(some.select(torch.tensor([2])).gumbel(rows, torch.arange(1), K), whole[:, [3]])
    assert torch.equal(Noise(3, torch.arange(6) + 10).rows(1, 4).gumbel(rows[:3], positions, K), whole[1:4])
    # More symbols begin with the noise of fewer.
    assert torch.equal(Noise(3, torch.arange(6) + 10).gumbel(rows, positions, 2), whole[..., :2])
    others = [
        Noise(4, torch.arange(6) + 10).gumbel(rows, positions, K),
        Noise(3 + (1 << 40), torch.arange(6) + 10).gumbel(rows, positions, K),
        Noise(3, torch.arange(6) + 10 + (1 << 33)).gumbel(rows, positions, K),
        Noise(3, torch.arange(6) + 10).gumbel(rows, positions + (1 << 20), K),
        *(Noise(3, torch.arange(6) + 10).gumbel(rows, positions, K, p) for p in (LENGTHS, COMPONENTS)),
    ]
    assert SYMBOLS not in (LENGTHS, COMPONENTS)
    for other in others:
        assert not torch.isin(other, whole).any()


@pytest.mark.parametrize(
    "name",
    # Counts of many draws at once take longest.
    [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("counts, ")) for name in BASES],
)
def test_draws_by_address_follow_the_law_and_do_not_depend_on_the_batch(name: str) -> None:
    K, n = 2, 40_000
    law = build_base(name, K).eval()
    x = enumerate_all(K, DIMS[K])
    with torch.no_grad():
        expected = n * law.log_prob(x).double().exp()
        draws = law.sample(n, Context(noise=Noise(1, torch.arange(n))))
        for part in (slice(0, 1), slice(7, 20), slice(n - 3, n)):
            samples = torch.arange(n)[part]
            assert torch.equal(law.sample(len(samples), Context(noise=Noise(1, samples))), draws[part])
    place = (draws * K ** torch.arange(DIMS[K]).flip(0)).sum(1)
    order = (x * K ** torch.arange(DIMS[K]).flip(0)).sum(1).argsort()
    counts = torch.bincount(place, minlength=len(x)).double()
    chi = float(((counts - expected[order]).square() / expected[order]).sum())
    freedom = len(x) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


FAMILIES = ["grouped", "any_order", "bipartite", "autoregressive", "multiscale", "transformer", "lstm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_the_same_in_any_batch(family: str) -> None:
    model = make_model(family, 5)
    whole = list(generate(model, 20, seed=3, batch_size=100))
    for size in (1, 7):
        again = generate(model, 20, seed=3, batch_size=size)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert torch.equal(torch.stack(list(generate(model, 5, seed=3))), torch.stack(whole[:5]))
    assert not all(torch.equal(a, b) for a, b in zip(whole, generate(model, 20, seed=4), strict=True))


def test_noise_of_other_samples_is_refused() -> None:
    law = build_base("grouped", K).eval()
    with pytest.raises(InputError, match="the noise is of 3 samples, and 4 are drawn"):
        law.sample(4, Context(noise=Noise(0, torch.arange(3))))


# -- controls ------------------------------------------------------------------------------------------------


def law_under(controls: Controls, probabilities: list[float]) -> list[float]:
    law = controls(torch.tensor(probabilities, dtype=torch.float64).log()).softmax(-1)
    return [round(p, 6) for p in law.tolist()]


def test_controls_change_the_law_as_told() -> None:
    law = [0.5, 0.25, 0.15, 0.1]
    assert law_under(Controls(), law) == law
    assert law_under(Controls(temperature=0.5), law) == [round(p * p / 0.345, 6) for p in law]
    assert law_under(Controls(top_k=2), law) == [0.666667, 0.333333, 0, 0]
    assert law_under(Controls(top_k=9), law) == law
    assert law_under(Controls(top_p=0.5), law) == [1, 0, 0, 0]
    assert law_under(Controls(top_p=0.51), law) == [0.666667, 0.333333, 0, 0]
    assert law_under(Controls(top_p=1.0), law) == law
    assert law_under(Controls(min_p=0.3), law) == [0.555556, 0.277778, 0.166667, 0]
    # Order: temperature first, then each on what is left.
    assert law_under(Controls(temperature=0.5, top_k=3, top_p=0.9), law) == [0.8, 0.2, 0, 0]
    assert law_under(Controls(top_k=1), [0.4, 0.4, 0.2]) == [0.5, 0.5, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be above 0; top_k=1 always takes the likeliest"),
        ({"temperature": -1.0}, "temperature -1.0 must be above 0"),
        ({"temperature": math.nan}, "temperature nan must be above 0"),
        ({"top_k": 0}, "top_k 0 must be at least 1"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p 1.5 must be above 0 and at most 1"),
    ],
)
def test_controls_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Controls(**values)  # type: ignore[arg-type]


@torch.no_grad()
def test_the_likeliest_symbol_is_drawn_where_asked_for() -> None:
    model = make_model("transformer", 5)
    draws = torch.stack(list(generate(model, 3, controls=Controls(top_k=1))))
    assert torch.equal(draws[0], draws[1])
    x = draws[:1]
    best = model.log_prob(x)
    # No other first symbol is likelier, and so on.
    for k in range(5):
        other = x.clone()
        other[0, -1] = k
        assert float(model.log_prob(other)) <= float(best) + 1e-6


def test_a_flow_refuses_controls_and_takes_the_neutral_ones() -> None:
    model = make_model("bipartite", 5)
    with pytest.raises(InputError, match="a flow draws latents and maps them"):
        list(generate(model, 1, controls=Controls(temperature=0.7)))
    assert len(list(generate(model, 2, controls=Controls()))) == 2
