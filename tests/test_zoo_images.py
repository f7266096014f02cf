"""Families of images: every combination of settings that is allowed is a law, every other names a way out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dflow import objectives, zoo
from dflow.config import InputError
from dflow.core import Distribution
from dflow.dequantize import Columns, Dequantized, Hypercube, Orthant
from dflow.flows import Flow, Split

SMALL = {
    "num_flows": 2, "spline_bins": 3, "hidden_size": 8, "num_hidden_layers": 2, "context_size": 2,
    "dequantizer_flows": 2, "dequantizer_hidden_size": 16, "dequantizer_hidden_layers": 1,
}  # fmt: skip
PARTITIONS, DENSITIES = ("hypercube", "orthant"), ("diagonal", "covariance", "flow")
DEQUANTIZERS = ("uniform", "normal", "covariance", "bipartite", "autoregressive", "truncated")


def allowed(partition: str, density: str, dequantizer: str) -> bool:
    return (partition, dequantizer) != ("orthant", "uniform") and (density, dequantizer) != (
        "flow",
        "truncated",
    )


COMBINATIONS = [c for c in itertools.product(PARTITIONS, DENSITIES, DEQUANTIZERS) if allowed(*c)]


def config(**settings: Any) -> zoo.DequantizedConfig:
    found: zoo.DequantizedConfig = zoo.settings(
        "dequantized", {"shape": [1, 4, 4], "levels": [2]} | SMALL | settings
    )
    return found


def build(**settings: Any) -> Dequantized:
    """Started from data as in training, with weights away from heads of zeros."""
    found = config(**settings)
    law, generator = zoo.build_image("dequantized", found), torch.Generator().manual_seed(0)
    objectives.initialize(law, data(found, 200), generator)
    law.double()
    with torch.no_grad():
        for p in law.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return law


def data(settings: zoo.DequantizedConfig, n: int = 12) -> Tensor:
    """Rows with every smallest and largest value, and random ones between."""
    generator = torch.Generator().manual_seed(1)
    columns = []
    for r in settings.ranges:
        if r is None:
            columns.append(torch.randn(n, dtype=torch.float64, generator=generator))
        else:
            column = torch.randint(r[0], r[1] + 1, (n,), generator=generator)
            column[0], column[1] = r
            columns.append(column)
    real = any(r is None for r in settings.ranges)
    return torch.stack([c.double() if real else c for c in columns], 1)


def check(law: Dequantized, settings: zoo.DequantizedConfig) -> None:
    x = data(settings)
    discrete, generator = settings.discrete, torch.Generator().manual_seed(2)
    lw = law.log_weights(x, 3, generator)
    assert lw.shape == (3, len(x))
    assert lw.isfinite().all()
    v = law.dequantize(x, generator)
    assert torch.equal(law.partition.quantize(v)[:, discrete], x[:, discrete])
    assert torch.equal(v[:, ~discrete], x[:, ~discrete].double())
    lw.sum().backward()
    for name, p in law.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    drawn = law.sample(5, generator)
    assert drawn.shape == (5, settings.dim)
    assert drawn.dtype == (torch.int64 if discrete.all() else torch.float64)
    assert torch.equal(drawn[:, discrete], drawn[:, discrete].floor())
    if settings.partition == "orthant":
        assert set(drawn[:, discrete].unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("conditioner", ["densenet", "perceptron"])
@pytest.mark.parametrize(("partition", "density", "dequantizer"), COMBINATIONS)
def test_every_combination_is_a_law(partition: str, density: str, dequantizer: str, conditioner: str) -> None:
    settings: dict[str, Any] = {
        "partition": partition, "density": density, "dequantizer": dequantizer,
        "conditioner": conditioner, "fit": "gradient",
    }  # fmt: skip
    law = build(**settings)
    assert isinstance(law.partition, Orthant if partition == "orthant" else Hypercube)
    check(law, config(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": [3, 4, 4], "levels": [256], "num_levels": 2, "dequantizer": "bipartite"},
        {"shape": [3, 4, 4], "levels": [256], "num_levels": 3, "elementwise": "affine"},
        {"shape": [1, 8, 8], "levels": [32], "num_levels": 3, "dequantizer": "autoregressive"},
        {"shape": [3, 4, 4], "levels": [256], "num_levels": 2, "mixing": "permute"},
        {"shape": [3, 4, 4], "levels": [256], "num_levels": 2, "elementwise": "mixture"},
        {"dequantizer": "bipartite", "dequantizer_elementwise": "mixture"},
        {"dequantizer": "autoregressive", "dequantizer_elementwise": "mixture", "mixture_components": 1},
        {"dequantizer": "bipartite", "dequantizer_elementwise": "spline"},
        {"dequantizer": "autoregressive", "dequantizer_elementwise": "spline"},
        {"shape": [3, 3, 5], "levels": [8], "dequantizer": "bipartite"},
        {"shape": [1, 3, 3], "dequantizer": "bipartite", "conditioner": "perceptron"},
        {"shape": [1, 3, 3], "density": "diagonal", "fit": "gradient", "dequantizer": "autoregressive"},
        {"shape": [1, 1, 1], "density": "diagonal", "fit": "gradient", "dequantizer": "normal"},
        {"shape": [5, 1, 1], "levels": [3], "num_levels": 2, "conditioner": "perceptron"},
        {"shape": [3, 1, 1], "levels": [4, 1000, 1], "lowest": [-2, 100_000, 7], "dequantizer": "normal"},
    ],
    ids=str,
)
def test_shapes_and_levels(settings: dict[str, Any]) -> None:
    check(build(**settings), config(**settings))


MIXED: dict[str, Any] = {
    "shape": [4, 1, 1],
    "levels": [4, None, 3, None],
    "lowest": [-2, None, 5, None],
    "conditioner": "perceptron",
    "fit": "gradient",
}


@pytest.mark.parametrize(("density", "dequantizer"), [c[1:] for c in COMBINATIONS if c[0] == "hypercube"])
def test_mixed_tables(density: str, dequantizer: str) -> None:
    settings = MIXED | {"density": density, "dequantizer": dequantizer}
    law = build(**settings)
    assert isinstance(law.partition, Columns)
    check(law, config(**settings))


def test_mixed_tables_on_orthants() -> None:
    settings = MIXED | {"levels": [2, None, 2, None], "lowest": [0, None, 0, None], "partition": "orthant"}
    settings |= {"dequantizer": "normal"}
    check(build(**settings), config(**settings))


def test_a_single_discrete_column_among_reals() -> None:
    settings = MIXED | {"shape": [2, 1, 1], "levels": [None, 3], "lowest": [None, 0], "dequantizer": "normal"}
    check(build(**settings), config(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partition": "orthant", "dequantizer": "uniform"}, "use partition hypercube, or dequantizer"),
        ({"density": "flow", "dequantizer": "truncated"}, "use density diagonal or covariance"),
        ({"partition": "orthant", "dequantizer": "normal", "levels": [4]}, r"found \(0, 3\); use hypercube"),
        ({"partition": "orthant", "dequantizer": "normal", "lowest": [1]}, r"found \(1, 2\); use hypercube"),
        ({"shape": []}, "shape and levels are missing"),
        ({"levels": []}, "shape and levels are missing"),
        ({"levels": [], "partition": "orthant", "dequantizer": "normal"}, "shape and levels are missing"),
        ({"shape": [4, 4]}, "channels, height and width"),
        ({"shape": [1, 0, 4]}, "channels, height and width"),
        ({"levels": [2, 2, 2]}, "one number, or 16, found 3"),
        ({"levels": [0]}, "levels must be at least 1"),
        ({"lowest": [0, 0]}, "as many as levels, 1, found 2"),
        ({"shape": [1, 1, 1]}, "a coupling needs two entries or more; use density diagonal"),
        ({"num_levels": 5}, "less than two of 16"),
        ({"num_flows": 0}, "num_flows must be at least 1"),
        ({"context_size": 0}, "context_size must be at least 1"),
        ({"shape": [2, 1, 1], "levels": [None, None]}, "nothing to dequantize"),
        ({"shape": [1, 3, 3]}, "fewer num_levels, conditioner perceptron, or data of an even"),
        ({"shape": [1, 3, 3], "density": "diagonal", "dequantizer": "bipartite"}, "conditioner perceptron"),
        ({"shape": [1, 6, 6], "num_levels": 4}, "3 x 3 pixels of one channel .* fewer num_levels"),
        ({"hidden_size": 1}, "hidden_size: "),
        ({"dequantizer_hidden_size": 2, "dequantizer": "autoregressive"}, "dequantizer_hidden_size: "),
        (MIXED | {"conditioner": "densenet", "dequantizer": "normal"}, "use conditioner perceptron"),
        (
            {"shape": [1, 1, 1], "density": "diagonal", "dequantizer": "bipartite"},
            "two entries or more; use 'normal'",
        ),
        ({"dequantizer": "gaussian"}, "'gaussian' is not allowed"),
        ({"num_flow": 3}, "did you mean 'num_flows'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_forbidden_names_the_way_out(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        zoo.build_image("dequantized", config(**settings))


# -- densities -----------------------------------------------------------------------------------------------


def to_latent(density: Distribution, v: Tensor) -> Tensor:
    """All of a multi-scale flow as one map to standard normal entries."""
    if isinstance(density, Flow):
        return to_latent(density.base, density.transform(v)[0])
    if isinstance(density, Split):
        (kept, _), (rest, given) = density.parts(v, None)
        loc, log_scale = density.conditional.params(given)
        return torch.cat([to_latent(density.base, kept), (rest - loc) * torch.exp(-log_scale)], 1)
    return v


@pytest.mark.parametrize(
    "settings",
    [
        {"num_levels": 3},
        {"num_levels": 2, "elementwise": "affine", "shape": [3, 2, 2]},
        {"num_levels": 2, "conditioner": "perceptron", "mixing": "permute"},
    ],
    ids=str,
)
def test_log_prob_is_that_of_the_jacobian(settings: dict[str, Any]) -> None:
    law = build(**settings)
    density = law.density
    for v in law.dequantize(data(config(**settings), 3)).split(1):
        jacobian = torch.autograd.functional.jacobian(lambda v: to_latent(density, v)[0], v)
        energy = 0.5 * (to_latent(density, v).square() + math.log(2 * math.pi)).sum()
        expected = torch.linalg.slogdet(jacobian.squeeze(1))[1] - energy
        torch.testing.assert_close(density.log_prob(v)[0], expected)


@pytest.mark.parametrize("dim", [2, 3, 5, 16])
def test_permutations_between_couplings_let_every_entry_hang_on_every_other(dim: int) -> None:
    settings = {"shape": [dim, 1, 1], "mixing": "permute", "num_flows": 8, "elementwise": "affine"}
    law = build(**settings, conditioner="perceptron")
    v = law.dequantize(data(config(**settings))[:1])
    jacobian = torch.autograd.functional.jacobian(lambda v: to_latent(law.density, v)[0], v)
    assert (jacobian != 0).all()
    # Without networks it moves entries, and mixes none.
    plain = zoo.build_image("dequantized", config(**settings))
    e = to_latent(plain.density, torch.arange(dim)[None] * 1.0)
    assert sorted(e[0].tolist()) == list(range(dim))


@pytest.mark.parametrize("elementwise", ["affine", "spline", "mixture"])
@torch.no_grad()
def test_a_flow_of_two_entries_integrates_to_one(elementwise: str) -> None:
    law = build(shape=[2, 1, 1], elementwise=elementwise, conditioner="perceptron")
    line = torch.linspace(-12, 12, 601, dtype=torch.float64)
    p = law.density.log_prob(torch.cartesian_prod(line, line)).exp()
    assert float(p.sum() * (line[1] - line[0]) ** 2) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "settings", [{"num_levels": 3}, {"elementwise": "affine"}, {"elementwise": "mixture"}, MIXED], ids=str
)
def test_draws_of_a_flow_are_its_inverse(settings: dict[str, Any]) -> None:
    density = build(**settings).density
    v = density.sample(200, None, torch.Generator().manual_seed(0))
    e = to_latent(density, v)
    assert isinstance(density, Flow)
    z, _ = density.transform(v)
    torch.testing.assert_close(density.bijector.inverse(z)[0], v)
    # Standard normal, entry by entry: within five standard errors.
    assert (e.mean(0).abs() < 5 / 200**0.5).all()
    assert ((e.var(0) - 1).abs() < 5 * (2 / 200) ** 0.5).all()


def test_a_gaussian_in_closed_form_has_no_parameters() -> None:
    for density, expected in (("diagonal", 0), ("covariance", 0)):
        law = zoo.build_image("dequantized", config(density=density, dequantizer="truncated"))
        assert sum(p.numel() for p in law.parameters()) == expected
        assert {name for name, _ in law.named_buffers()} >= {"density.loc", "density.moments"}


def test_dequantizers_start_as_noise_alone() -> None:
    """Heads of zeros: the logistic function of the noise, in whichever order, for every kind of network."""
    x = torch.tensor([[0] * 16, [1] * 16])
    noise = torch.randn(3, 2, 16)
    laws = [
        zoo.build_image("dequantized", config(dequantizer=kind, density="diagonal"))
        for kind in ("normal", "covariance", "bipartite", "autoregressive")
    ]
    first, *others = (law.log_weights(x, 3, noise=noise) for law in laws)
    for found in others:
        torch.testing.assert_close(found, first)


def test_families_of_text_and_images_do_not_mix() -> None:
    with pytest.raises(InputError, match="'grouped' is one of models of text, and this takes one of images"):
        zoo.build_image("grouped", config())
    with pytest.raises(InputError, match="did you mean 'dequantized'"):
        zoo.settings("dequantised", {})
