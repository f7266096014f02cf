"""Streams of multi-level flows, cut where their levels end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dflow import zoo
from dflow.bijectors import Chain
from dflow.coding import Coder, codec, levels
from dflow.core import Context, Distribution
from dflow.distributions import Categorical, ConditionalWindow
from dflow.flows import Flow, Split


def flow(num_levels: int, size: int = 8) -> Distribution:
    torch.manual_seed(num_levels)
    settings = {"shape": [3, size, size], "levels": [256], "num_levels": num_levels, "num_flows": 1}
    small = {"hidden_size": 8, "num_hidden_layers": 1, "components": 2}
    law = zoo.build_image("integer", zoo.settings("integer", settings | small)).double().eval()
    with torch.no_grad():
        for p in law.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return law


def smooth(n: int, size: int = 8) -> Tensor:
    ramp = torch.arange(size)
    x = 40 + 9 * ramp + 12 * ramp[:, None] + 20 * torch.arange(3)[:, None, None]
    noise = torch.randint(0, 6, (n, 3, size, size), generator=torch.Generator().manual_seed(1))
    return (x + noise).view(n, -1)


def latents(law: Distribution, x: Tensor) -> list[Tensor]:
    """What each level codes, the coarsest first."""
    if isinstance(law, Flow):
        return latents(law.base, law.transform(x)[0])
    if isinstance(law, Split):
        (x_a, _), (x_b, _) = law.parts(x)
        return [*latents(law.base, x_a), x_b]
    return [x]


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 5])
def test_the_levels_are_the_stream_in_parts(num_levels, n):
    law, x = flow(num_levels), smooth(n)
    found = levels.push(law, x)
    assert levels.num_levels(law) == len(found) == num_levels
    coder = Coder()
    codec.push(law, x, coder)
    assert b"".join(found) == coder.to_bytes()
    assert torch.equal(levels.pop(law, n, found), x)


@pytest.mark.parametrize("n", [1, 4])
def test_a_beginning_of_the_stream_has_the_very_latents_of_its_levels(n):
    law, x = flow(3), smooth(n)
    found, expected = levels.push(law, x), latents(law, x)
    errors = []
    for k in (1, 2, 3):
        for generator in (None, torch.Generator().manual_seed(0)):
            y = levels.pop(law, n, found[:k], generator)
            for mine, theirs in zip(latents(law, y)[:k], expected[:k], strict=True):
                assert torch.equal(mine, theirs)
            if generator is None:
                errors.append(float((y - x).double().square().mean()))
    assert errors[0] > errors[1] > errors[2] == 0


def test_what_does_not_end_where_a_level_ends_is_refused():
    law, x = flow(3), smooth(3)
    found = levels.push(law, x)
    short, rest = found[0][:-4], found[0][-4:] + found[1]
    with pytest.raises(ValueError, match="level 1 ends elsewhere"):
        levels.pop(law, 3, [short, rest, found[2]])
    with pytest.raises(ValueError, match="ends elsewhere"):
        levels.pop(law, 2, found)
    with pytest.raises(ValueError, match="3 levels, found 4"):
        levels.pop(law, 3, [*found, b""])
    with pytest.raises(ValueError, match=r"ends elsewhere|bits are left"):
        levels.pop(law, 3, [*found[:2], found[2] + bytes(4)])


@pytest.mark.parametrize("n", [1, 4])
def test_missing_levels_of_windows_are_filled_by_their_means(n, monkeypatch):
    torch.manual_seed(0)
    settings = {"shape": [1, 8, 8], "levels": [64], "num_levels": 2, "num_flows": 0, "kept": "quarter"}
    settings |= {"prior_groups": 3, "prior": "hurdle", "hidden_size": 8, "num_hidden_layers": 1}
    law = zoo.build_image("integer", zoo.settings("integer", settings)).double().eval()
    with torch.no_grad():
        for p in law.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randint(0, 64, (n, 64))
    found = levels.push(law, x)
    assert torch.equal(levels.pop(law, n, found), x)
    coarse = levels.pop(law, n, found[:1])
    assert torch.equal(coarse.view(n, 8, 8)[:, ::2, ::2], x.view(n, 8, 8)[:, ::2, ::2])
    assert int(coarse.min()) >= 0
    assert int(coarse.max()) < 64
    # A row at a time is the same; and it is the mean of what is drawn.
    monkeypatch.setattr("dflow.distributions.window._LOGITS", 1)
    assert torch.equal(levels.pop(law, n, found[:1]), coarse)
    *_, window = (m for m in law.modules() if isinstance(m, ConditionalWindow))
    given = torch.randint(0, 64, (1, 16)).double()
    draws = window.sample(20_000, Context(given=(given.expand(20_000, -1),))).double()
    inside = (draws >= 0) & (draws < 64)
    mean = torch.where(inside, draws, 0).sum(0) / inside.sum(0)
    assert (window.rounded_mean(Context(given=(given,)))[0] - mean).abs().max() < 1.2


def test_what_has_no_mean_is_drawn_only():
    law = Split(torch.tensor([True, False]), Categorical(1, 3), Flow(Chain([]), Categorical(1, 3))).eval()
    found = levels.push(law, torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="mean of Categorical"):
        levels.pop(law, 1, found[:1])
