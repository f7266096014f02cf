"""Integer flows of images: laws over all integers, bijections, the same in both modes; wrong settings."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dflow import objectives, zoo
from dflow.coding import Coder, pop, push
from dflow.coding import levels as coding_levels
from dflow.config import InputError
from dflow.core import Distribution
from dflow.distributions import ConditionalLogistic, LogisticMixture, floor
from dflow.flows import Flow, Split
from dflow.hf import DflowImageConfig, DflowImageModel

SMALL = {"num_flows": 2, "hidden_size": 8, "num_hidden_layers": 2, "components": 2}
PLUS = {"permute": "inverted", "rezero": True, "activation": "silu", "norm": "group"}


def config(**settings: Any) -> zoo.IntegerConfig:
    found: zoo.IntegerConfig = zoo.settings("integer", SMALL | {"levels": [6]} | settings)
    return found


def build(noise: float = 0.3, **settings: Any) -> Distribution:
    """With weights away from heads of zeros."""
    torch.manual_seed(0)
    law = zoo.build_image("integer", config(**settings))
    assert isinstance(law, Distribution)
    with torch.no_grad():
        for p in law.parameters():
            p.add_(noise * torch.randn_like(p))
    return law.double()


def data(settings: zoo.IntegerConfig, n: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(r[0], r[1] + 1, (n,), generator=generator) for r in settings.ranges if r]
    return torch.stack(columns, 1)


def there_and_back(law: Distribution, x: Tensor) -> None:
    while isinstance(law, (Flow, Split)):
        if isinstance(law, Split):
            x = law.parts(x)[0][0]
        else:
            z, log_det = law.transform(x)
            assert z.dtype == torch.int64
            assert not log_det.any()
            assert torch.equal(law.bijector.inverse(z)[0], x)
            floats, _ = law.transform(x.double())
            assert torch.equal(floats, z.double())
            x = z
        law = law.base


VARIANTS = [
    {"split": s, "permute": p, "rezero": r, "activation": a, "norm": n}
    for s, p, r, (a, n) in itertools.product(
        ("quarter", "half"), ("kept", "inverted"), (False, True), (("relu", "none"), ("silu", "group"))
    )
]
# A level whose parts are modelled one after another, by mixtures.
GROUPED = {"kept": "quarter", "prior_groups": 3, "prior_components": 2}
VALUES = {"kept": "quarter", "prior_groups": 3, "num_flows": 0, "prior": "hurdle"}
VARIANTS += [
    GROUPED,
    VALUES,
    {"num_flows": 0, "prior": "hurdle", "activation": "silu", "norm": "group"},
    GROUPED | PLUS,
    GROUPED | {"num_flows": 0},
    {"prior_groups": 2},
    GROUPED | {"groups": 4},
    {"groups": 2},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_combination_is_a_bijection_with_gradients_everywhere(settings: dict[str, Any]) -> None:
    settings = {"shape": [1, 8, 8], "num_levels": 3} | settings
    law, x = build(**settings), data(config(**settings))
    there_and_back(law, x)
    exact, soft = law.log_prob(x), law.log_prob(x.double())
    assert exact.shape == (len(x),)
    assert torch.equal(exact, soft)
    soft.sum().backward()
    for name, p in law.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    drawn = law.sample(3, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 64)
    assert drawn.dtype == torch.int64


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": [2, 1, 1], "num_levels": 1, "levels": [3]},
        {"shape": [2, 1, 1], "num_levels": 1, "levels": [4, 2], "lowest": [-2, 7], **PLUS, "norm": "none"},
        {"shape": [3, 1, 1], "num_levels": 1, "levels": [4], **PLUS},
        {"shape": [3, 1, 1], "num_levels": 2, "levels": [3, 2, 3], "lowest": [0, 0, -1], "split": "half"},
        {"shape": [3, 1, 1], "num_levels": 2, "levels": [3], "num_flows": 1, **GROUPED, "prior_groups": 2},
        {"shape": [3, 1, 1], "num_levels": 1, "levels": [3], "groups": 3},
    ],
    ids=str,
)
def test_probabilities_sum_to_one_over_a_window(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And far fewer over the range of the data: P is a law of all integers."""
    # The floor of laws reaches beyond any window, and has tests of its own.
    monkeypatch.setattr(floor, "FLOOR", 1e-30)
    law = build(0.2, **settings)
    with torch.no_grad():
        # Scales at which the window holds all but 1e-9.
        for module in law.modules():
            if isinstance(module, (LogisticMixture, ConditionalLogistic)):
                module.unit.fill_(0.4)
    dim = settings["shape"][0]
    side = torch.arange(-320, 321) if dim == 2 else torch.arange(-36, 37)
    total = 0.0
    for first in side.split(40):
        x = torch.cartesian_prod(first, *[side] * (dim - 1))
        total += float(law.log_prob(x).detach().exp().sum())
    assert total == pytest.approx(1, abs=1e-9)
    low, high = zip(*(r for r in config(**settings).ranges if r), strict=True)
    inside = torch.cartesian_prod(*[torch.arange(a, b + 1) for a, b in zip(low, high, strict=True)])
    assert float(law.log_prob(inside).detach().exp().sum()) < 1


def test_draws_follow_the_law() -> None:
    law = build(0.2, shape=[2, 1, 1], num_levels=1, levels=[3])
    n = 20_000
    rows, counts = law.sample(n, generator=torch.Generator().manual_seed(3)).unique(dim=0, return_counts=True)
    p = law.log_prob(rows).detach().exp()
    often = counts > 30
    z = (counts - n * p) / (n * p * (1 - p)).sqrt()
    assert often.sum() > 20
    assert z[often].abs().max() < 4.5
    assert float(p.sum()) > 0.9


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rezero": True},
        {"permute": "inverted"},
        {"num_levels": 1},
        {"levels": [256]},
        GROUPED,
        VALUES,
        {"groups": 3},
    ],
    ids=str,
)
def test_it_starts_as_the_marginals_of_the_data(settings: dict[str, Any]) -> None:
    """Couplings at the identity, logistic laws where the data lie: each entry is coded about as it varies."""
    settings = {"shape": [1, 8, 8], "levels": [256], "num_levels": 3} | settings
    torch.manual_seed(0)
    law = zoo.build_image("integer", config(**settings))
    assert isinstance(law, Distribution)
    x = (100 + 10 * torch.randn(500, 64)).round().long().clamp(0, 255)
    objectives.initialize_integers(law, x)
    # Entropy of a rounded normal law of deviation 10, and a little.
    expected = math.log2(10 * math.sqrt(2 * math.pi * math.e))
    found = float(-law.log_prob(x).detach().mean()) / 64 / math.log(2)
    assert found == pytest.approx(expected, abs=0.2)


def smooth(n: int, shape: tuple[int, int, int]) -> Tensor:
    """Waves with a little noise, the same in all colours: neighbours tell nearly all."""
    generator = torch.Generator().manual_seed(2)
    C, H, W = shape
    slope, phase = torch.randn(n, 2, generator=generator) / 3, torch.rand(n, 1, 1, generator=generator) * 6
    i, j = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    waves = torch.sin(slope[:, 0, None, None] * i + slope[:, 1, None, None] * j + phase)[:, None]
    noise = torch.randn(n, C, H, W, generator=generator)
    return (128 + 90 * waves + 2 * noise).round().long().clamp(0, 255).flatten(1)


@pytest.mark.parametrize(
    "settings", [GROUPED, {"num_flows": 0, "prior_components": 3}, {"groups": 2}], ids=str
)
def test_it_starts_about_the_best_linear_prediction(settings: dict[str, Any]) -> None:
    shape, costs = (3, 8, 8), {}
    x, held = smooth(600, shape).split([500, 100])
    for start in ("marginals", "linear"):
        torch.manual_seed(0)
        law = zoo.build_image(
            "integer", config(shape=list(shape), levels=[256], num_levels=2, start=start, **settings)
        )
        assert isinstance(law, Distribution)
        objectives.initialize_integers(law, x)
        costs[start] = float(-law.log_prob(held).detach().mean()) / 192 / math.log(2)
    # Of what is factored out; the last level starts from marginals where it is not modelled in groups.
    assert costs["linear"] < costs["marginals"] - 1.5


def test_the_linear_start_is_least_squares() -> None:
    law = build(0.0, shape=[1, 4, 4], num_levels=2, num_flows=0, kept="quarter", levels=[256]).float()
    x = smooth(400, (1, 4, 4))
    objectives.initialize_integers(law, x)
    (kept, _), (rest, given) = law.base.parts(law.transform(x)[0])
    prior = law.base.conditional
    loc, log_scale = prior.params(given)
    # What is kept are 2 x 2 pixels: each of the others is predicted from them and from zeros around.
    seen = torch.nn.functional.pad((kept.double() - 128) / 128, (0, 0)).view(-1, 1, 2, 2)
    rows = torch.nn.functional.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    targets = rest.double().view(-1, 3, 4).transpose(1, 2).flatten(0, 1)
    found = torch.linalg.lstsq(rows, targets).solution
    expected = (rows @ found).view(-1, 4, 3).transpose(1, 2).flatten(1)
    assert (loc.double() - expected).abs().max() < 1.5
    spread = (rest - expected).view(-1, 3, 4).double().std((0, 2))
    scale = log_scale.double().exp().view(-1, 3, 4)[0, :, 0]
    assert torch.allclose(scale, spread * math.sqrt(3) / math.pi, rtol=0.1)


def test_parts_of_a_level_are_modelled_one_after_another() -> None:
    law = build(shape=[1, 4, 4], num_levels=2, **GROUPED)
    outer = law.base
    assert isinstance(outer, Split)
    x = data(config(shape=[1, 4, 4]), 2)
    z = law.transform(x)[0]

    def third(z: Tensor) -> Tensor:
        (_, _), (rest, given) = outer.parts(z)
        (_, _), (last, known) = outer.conditional.parts(rest, given)
        return outer.conditional.conditional.log_prob(last, known)

    # The last of three groups hangs on the kept channel and on both groups before it.
    for place in (0, 4, 8):
        other = z.clone()
        other[:, place] += 5
        assert not torch.equal(third(other), third(z))
    coder = Coder()
    push(law.eval(), x, coder)
    assert torch.equal(pop(law, len(x), coder), x)
    parts = coding_levels.push(law, x)
    assert len(parts) == 2
    coarse = coding_levels.pop(law, len(x), parts[:1])
    assert torch.equal(law.transform(coarse)[0][:, :4], z[:, :4])


def test_the_last_level_is_modelled_in_groups_places_far_apart_first() -> None:
    law = build(shape=[2, 5, 3], num_levels=1, num_flows=0, groups=4)
    x, coder = data(config(shape=[2, 5, 3]), 2), Coder()
    push(law.eval(), x, coder)
    assert torch.equal(pop(law, len(x), coder), x)
    assert coding_levels.num_levels(law) == 1
    assert torch.equal(coding_levels.pop(law, len(x), coding_levels.push(law, x)), x)
    # Of 30 entries 2, 8, 17 and 30 are known after each group; the first two stand four rows apart.
    group, base, left = torch.zeros(30), law.base, torch.arange(30)
    for number in (3, 2, 1):
        assert isinstance(base, Split)
        group[left[base.rest_index]] = number
        base, left = base.base, left[base.kept_index]
    assert [int((group == number).sum()) for number in range(4)] == [2, 6, 9, 13]
    assert left.tolist() == [0, 12]
    assert not (group[15:] < 2).any()
    # Each entry hangs on what came before it alone.
    other = x.clone()
    other[:, group == 2] += 3
    outer = law.base
    assert isinstance(outer, Split)
    assert not torch.equal(outer.log_prob(other), outer.log_prob(x))
    inner, _ = outer.base.parts(x[:, outer.kept_index])[0]
    changed, _ = outer.base.parts(other[:, outer.kept_index])[0]
    assert torch.equal(inner, changed)


def test_one_pixel_of_four_is_kept_in_all_its_colours() -> None:
    law = build(shape=[3, 4, 4], num_levels=2, kept="quarter", num_flows=0)
    x = torch.arange(48)[None]
    (kept, _), (rest, _) = law.base.parts(law.transform(x)[0])
    image = x.view(3, 4, 4)
    assert torch.equal(kept.view(3, 2, 2), image[:, ::2, ::2])
    assert torch.equal(rest.view(3, 3, 2, 2)[0], image[:, ::2, 1::2])


def test_more_groups_than_entries_are_refused() -> None:
    with pytest.raises(InputError, match="the last level has 4 entries, fewer than 5 groups"):
        build(shape=[1, 4, 4], num_levels=2, **GROUPED, groups=5)


def test_permutations_and_channels() -> None:
    def layers(**settings: Any) -> list[Any]:
        law = build(shape=[3, 4, 4], **settings)
        assert isinstance(law, Flow)
        return list(law.bijector)  # type: ignore[call-overload]

    kept, inverted = layers(num_levels=1), layers(num_levels=1, permute="inverted")
    assert (len(kept), len(inverted)) == (1 + 2 * 2, 1 + 3 * 2)
    # 12 channels of 2 x 2: three known for each that is moved.
    assert [len(kept[2].known_index), len(kept[2].hidden_index)] == [36, 12]
    half = layers(num_levels=1, split="half")
    assert [len(half[2].known_index), len(half[2].hidden_index)] == [24, 24]
    x = torch.arange(48)[None]
    there, _ = inverted[1](x)
    assert not torch.equal(there, x)
    assert torch.equal(inverted[3](there)[0], x)
    # Channels move as a whole, by the same order in every model.
    assert torch.equal(there.view(12, 4) % 4, torch.arange(4).expand(12, 4))
    assert torch.equal(there, layers(num_levels=2, permute="inverted")[1](x)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_levels": 0}, "num_levels must be at least 1"),
        ({"components": 0}, "components must be at least 1"),
        ({"hidden_size": 1}, "hidden_size"),
        ({"levels": [2, None] + [2] * 14}, "column 1 is real"),
        ({"levels": [3], "lowest": [1 << 23]}, "value 8388610 is larger than 4194304"),
        ({"shape": [1, 1, 1], "levels": [4]}, "two entries or more"),
        ({"shape": [1, 3, 3]}, "3 x 3 pixels of one channel .* even height"),
        ({"shape": [2, 1, 1], "num_levels": 3}, "fewer num_levels"),
        ({"num_flows": -1}, "num_flows must be at least 0"),
        ({"prior_groups": 3}, "2 channels are factored out of a level, fewer than 3 prior_groups"),
        ({"shape": [2, 1, 1], "num_levels": 1, "norm": "group", "hidden_size": 2}, "use norm 'none'"),
        ({"split": "third"}, "half"),
        (VALUES | {"num_flows": 2}, "num_flows=2 needs prior logistic"),
        (VALUES | {"prior_components": 2}, "prior_components=2 needs prior logistic"),
        (VALUES | {"levels": [1025]}, "up to 1024 values"),
        ({"dequantizer": "uniform"}, "unknown key 'dequantizer'"),
        ({"levels": []}, "shape and levels are missing"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        zoo.build_image("integer", config(**{"shape": [1, 4, 4]} | settings))


def test_the_model_of_transformers() -> None:
    model = DflowImageModel(
        DflowImageConfig(family="integer", **SMALL, shape=[1, 4, 4], levels=[6], num_levels=2)
    )
    assert model.exact
    x = data(config(shape=[1, 4, 4]))
    found = model(pixel_values=x.view(-1, 1, 4, 4))
    assert torch.equal(found.log_prob, model.log_prob(x))
    assert torch.equal(model.exact_log_prob(x.float()), model.log_prob(x))
    assert found.elbo is None
    assert found.loss.item() == pytest.approx(-found.log_prob.mean().item() / 16 / math.log(2), rel=1e-6)
    found.loss.backward()
    assert model.round_trip(x)
    assert model.generate(3, torch.Generator().manual_seed(0)).shape == (3, 1, 4, 4)
    for call in (lambda: model.elbo(x), lambda: model.iwbo(x, 2)):
        with pytest.raises(InputError, match="exact likelihood and no bounds; use log_prob"):
            call()
    # All integers have a probability, in the range of the data or not, as far as float32 tells them apart.
    far = torch.full((1, 16), 5).index_fill(1, torch.tensor([3]), 6)
    assert model.log_prob(far).isfinite()
    with pytest.raises(InputError, match=r"value 4194305 of entry 3 is no integer in -4194304\.\.4194304"):
        model.log_prob(far.index_fill(1, torch.tensor([3]), (1 << 22) + 1))
    settings = {"partition": "orthant", "dequantizer": "normal", "hidden_size": 8, "num_hidden_layers": 1}
    bounded = DflowImageModel(DflowImageConfig("dequantized", shape=[1, 4, 4], levels=[2], **settings))
    assert not bounded.exact
    for call in (lambda: bounded.log_prob(x // 3), lambda: bounded.round_trip(x // 3)):
        with pytest.raises(InputError, match="has bounds of its likelihood"):
            call()
