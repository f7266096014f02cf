"""Local bits-back: data and lent bits come back exactly, and the cost is the bound."""

from __future__ import annotations

import math

import pytest
import torch
from black_box import BlackBox
from torch import Tensor, nn

from dflow import objectives, zoo
from dflow.bijectors import (
    ActNorm,
    Autoregressive,
    Chain,
    Conv1x1,
    Coupling,
    Inverse,
    Permute,
    Reverse,
    squeeze,
)
from dflow.coding import Coder
from dflow.coding.bits_back import BitsBack, Stream, middles, pop, push, ready, sizes
from dflow.coding.densities import density
from dflow.coding.layers import layers, move
from dflow.coding.local import CodingSettings, Frame
from dflow.coding.normals import NormalCode, logit_normal, logits, normal_tables
from dflow.core import Bijector, Context, Distribution, Elementwise
from dflow.dequantize import (
    Dequantized,
    FlowDequantizer,
    Hypercube,
    NormalDequantizer,
    Orthant,
    TruncatedNormal,
    Uniform,
)
from dflow.distributions import ConditionalNormal, CovarianceNormal, StandardNormal
from dflow.distributions import Normal as NormalLaw
from dflow.elementwise import Affine, MixtureLogistic, Spline
from dflow.flows import Flow, Split
from dflow.nn.densenet import DenseNet
from dflow.nn.masked_conv import MaskedConv

SHAPE = (4, 3, 2)
DIM = 24
#: Bytes that look random.
NOISE = torch.randint(256, (1 << 18,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LENT = bytes(NOISE.tolist())


def shaken(module: nn.Module, size: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return module.double().eval().requires_grad_(False)


def net(family: nn.Module, context: int = 0) -> DenseNet:
    torch.manual_seed(1)
    return DenseNet(
        2, 2, SHAPE[1:], num_params=family.num_params, hidden_size=8, depth=2, context_channels=context
    )


def coupling(family: nn.Module, context: int = 0, swap: bool = False) -> Coupling:
    mask = torch.arange(DIM) < DIM // 2
    return Coupling(family, net(family, context), ~mask if swap else mask)


def autoregressive(context: int = 0, family: Elementwise | None = None) -> Autoregressive:
    torch.manual_seed(4)
    family = family or Affine(1.0)
    conv = MaskedConv(SHAPE, family.num_params, hidden_size=12, depth=1, context_channels=context)
    return Autoregressive(family, conv, DIM)


def glow(num: int = 2, family: Elementwise | None = None) -> Chain:
    torch.manual_seed(2)
    parts: list[Bijector] = []
    for i in range(num):
        parts += [ActNorm(SHAPE), Conv1x1(SHAPE), coupling(family or (Spline(4) if i % 2 else Affine()))]
    return Chain([*parts, ActNorm(SHAPE)])


def mixed() -> Permute:
    return Permute(torch.randperm(DIM, generator=torch.Generator().manual_seed(3)))


def tall(size: float = 1.0) -> ActNorm:
    """Scales that no grid holds together."""
    found = ActNorm(SHAPE)
    with torch.no_grad():
        found.log_scale.copy_(size * torch.tensor([-9.0, 0.0, 5.0, 2.0]))
    return found


BIJECTORS = {
    "actnorm": lambda: ActNorm(SHAPE),
    "actnorm of many sizes": tall,
    "conv": lambda: Conv1x1(SHAPE, torch.Generator().manual_seed(0)),
    "conv of a vector": lambda: Conv1x1((DIM, 1, 1), torch.Generator().manual_seed(0)),
    "affine": lambda: coupling(Affine()),
    "spline": lambda: coupling(Spline(4)),
    "mixture": lambda: coupling(MixtureLogistic(3)),
    "hidden first": lambda: coupling(Spline(4), swap=True),
    "permute": mixed,
    "reverse": Reverse,
    "squeeze": lambda: squeeze((1, 6, 4))[0],
    "autoregressive": autoregressive,
    "autoregressive mixture": lambda: autoregressive(0, MixtureLogistic(2, 3.0)),
    "chain": glow,
    "mixed up": lambda: Chain([tall(0.2), mixed(), Conv1x1(SHAPE), mixed(), coupling(Affine())]),
}


def frame() -> Frame:
    step = 2.0 ** -(19 + torch.arange(DIM) % 3).double()
    return Frame(step, 0.3 * torch.arange(DIM).double() / DIM)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("name", BIJECTORS)
def test_symbols_and_the_stack_come_back_through_every_bijector(name, inverted):
    bijector = shaken(BIJECTORS[name]())
    # Fine enough for slopes of 1/1000, which splines have.
    found, out = layers(Inverse(bijector) if inverted else bijector, frame(), CodingSettings(20, 14))
    x = torch.randint(-(2**21), 2**21, (5, DIM), generator=torch.Generator().manual_seed(1))
    coder = Coder(LENT[:4096])
    symbols = move(found, x, coder, None, True)
    # It is the map, but for the noise that was lent.
    values = frame().values(x)
    z, log_det = (bijector.inverse if inverted else bijector.forward)(values)
    assert (out.values(symbols) - z).abs().max() < 0.5 * z.abs().max().clamp(min=1)
    # What was lent and not given back, with what the steps changed, is the slope.
    cost = coder.num_bits - 8 * 4096 + 5 * float(frame().step.log2().sum() - out.step.log2().sum())
    assert abs(cost + float(log_det.sum()) / math.log(2)) < 0.05 * 5 * DIM
    assert torch.equal(move(found, symbols, coder, None, False), x)
    assert coder.to_bytes() == LENT[:4096]


def test_scaling_by_constants_costs_nothing():
    found, _ = layers(shaken(Chain([ActNorm(SHAPE), Conv1x1(SHAPE)])), frame(), CodingSettings(18, 14))
    coder = Coder(LENT[:64])
    symbols = torch.randint(-900, 900, (5, DIM), generator=torch.Generator().manual_seed(1))
    move(found, symbols, coder, None, True)
    assert coder.to_bytes() == LENT[:64]


def laws() -> dict[str, Distribution]:
    generator = torch.Generator().manual_seed(4)
    plain, full = NormalLaw(DIM, learned=True), CovarianceNormal(DIM, learned=True)
    mask = torch.arange(DIM) < DIM // 2
    split = Split(
        mask, ConditionalNormal(net(Affine())), Flow(Permute(torch.randperm(12)), StandardNormal(12))
    )
    with torch.no_grad():
        full.lower.copy_(0.3 * torch.randn(DIM, DIM, generator=generator))
    return {
        "standard": StandardNormal(DIM),
        "diagonal": plain,
        "covariance": full,
        "split": split,
        "flow": Flow(glow(), split),
    }


@pytest.mark.parametrize("name", laws())
def test_a_density_costs_what_it_says(name):
    law = shaken(laws()[name], 0.1)
    code = density(law, Frame.plain(DIM, 2.0**-12), CodingSettings())
    with torch.no_grad():
        x = (law.sample(400, generator=torch.Generator().manual_seed(2)) * 4096).round().long()
        ideal = -law.log_prob(x.double() / 4096).sum() / math.log(2) + x.numel() * 12
    coder = Coder(LENT)
    code.push(x, coder, None)
    assert abs(coder.num_bits - 8 * len(LENT) - float(ideal)) < 0.01 * x.numel()
    assert torch.equal(code.pop(len(x), coder, None), x)
    assert coder.to_bytes() == LENT


# -- models ----------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A network of values 0..15."""

    def __init__(self, num_params: int, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.net, self.flat = DenseNet(4, 4, SHAPE[1:], num_params, hidden_size=8, depth=2), flat

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.net.head.weight.dtype) / 8 - 1
        return self.net.features(x) if self.flat else self.net(x)


DEQUANTIZERS = {
    "uniform": lambda: Uniform(Hypercube()),
    "normal": lambda: NormalDequantizer(Hypercube(), Scaled(2)),
    "covariance": lambda: NormalDequantizer(Hypercube(), Scaled(2 + DIM), full=True),
    "bipartite": lambda: FlowDequantizer(
        Hypercube(),
        Chain([coupling(Affine(), 4), coupling(Affine(), 4, True), Inverse(mixed())]),
        Scaled(1, True),
    ),
    "spline": lambda: FlowDequantizer(Hypercube(), coupling(Spline(3), 4), Scaled(1, True)),
    "mixture": lambda: FlowDequantizer(Hypercube(), coupling(MixtureLogistic(3), 4), Scaled(1, True)),
    "autoregressive": lambda: FlowDequantizer(
        Hypercube(), Chain([autoregressive(4), mixed(), autoregressive(4)]), Scaled(1, True)
    ),
}


def model(name: str = "uniform", family: Elementwise | None = None) -> Dequantized:
    flow = glow(2, family)
    with torch.no_grad():
        flow[0].loc.fill_(8.0)
        flow[0].log_scale.fill_(math.log(3.0))
    found = shaken(Dequantized(Flow(flow, StandardNormal(DIM)), DEQUANTIZERS[name]()), 0.1)
    assert isinstance(found, Dequantized)
    return found


@torch.no_grad()
def data(law: Dequantized, n: int = 64) -> Tensor:
    return law.sample(n, torch.Generator().manual_seed(7))


@torch.no_grad()
def noise_of(law: Dequantized, x: Tensor, place: Tensor, bits: int) -> Tensor:
    """What the dequantizer makes these places of."""
    q, z = law.dequantizer, middles(place, bits)
    if isinstance(q, Uniform):
        return (place.double() + 0.5) / (1 << bits)
    context = q.context(x)
    if isinstance(q, FlowDequantizer):
        return q.bijector.inverse(z, Context(given=(context,)))[0]
    centred = z - context[..., 0]
    L = torch.diag_embed(context[..., 1].exp())
    if q.full:
        L = L + context[..., 2:].tril(-1)
    return torch.linalg.solve_triangular(L, centred[..., None], upper=False)[..., 0]


@torch.no_grad()
def bound(law: Dequantized, code: BitsBack, x: Tensor, stack: Coder) -> float:
    """Bits of the bound for the very noise that the stack gives."""
    place = code.dequantize(x, stack) & ((1 << code.settings.noise) - 1)
    found = law.log_weights(x, noise=noise_of(law, x, place, code.settings.noise)[None])
    return -float(found.sum()) / math.log(2)


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, None) for name in DEQUANTIZERS] + [(name, MixtureLogistic(3)) for name in ("uniform", "mixture")],
    ids=str,
)
def test_a_model_costs_its_bound_and_gives_everything_back(name, family):
    law = model(name, family)
    code, x = BitsBack(law, DIM), data(law)
    ideal = bound(law, code, x, Coder(LENT))
    coder = Coder(LENT)
    code.push(x, coder)
    excess = (coder.num_bits - 8 * len(LENT) - ideal) / x.numel()
    assert abs(excess) < 0.01
    assert torch.equal(code.pop(len(x), coder), x)
    assert coder.to_bytes() == LENT


@pytest.mark.parametrize("family", [None, MixtureLogistic(3)], ids=str)
def test_black_box_and_layers_agree(family):
    # The one sigma of a black box has to be wide in steps of x, too.
    law, settings = model(family=family), CodingSettings(16, 8, 12)
    code, x = BitsBack(law, DIM, settings), data(law, 24)
    ideal = bound(law, code, x, Coder(LENT))
    whole = BlackBox(law.density, code.frame, settings)
    coder = Coder(LENT)
    symbols = code.dequantize(x, coder)
    whole.push(symbols, coder, None)
    cost = (coder.num_bits - 8 * len(LENT) - ideal) / x.numel()
    assert abs(cost) < 0.01
    assert torch.equal(whole.pop(len(x), coder, None), symbols)
    coder = Coder(LENT)
    code.push(x, coder)
    assert abs((coder.num_bits - 8 * len(LENT) - ideal) / x.numel() - cost) < 0.01


@pytest.mark.parametrize("given", [b"", b"\0", LENT[:777], LENT])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_chains_give_back_rows_and_what_was_lent(n, given):
    law = model("bipartite")
    code, x = BitsBack(law, DIM), data(law, 40)[:n]
    found = push(code, x, given, 8)
    rows, back = pop(code, n, found.data, len(given), 8)
    assert torch.equal(rows, x)
    assert back == given
    # Random bits are lent for a row or two, not for all; a stack has 64 and up to 31 of its own.
    assert found.random <= 60 * DIM + 64
    assert n or found == Stream(found.data, 8 * len(given), 0)


def test_only_what_is_missing_is_random():
    law = model()
    code, x = BitsBack(law, DIM), data(law, 40)
    assert push(code, x, LENT).random == 0
    few = push(code, x, LENT[:8])
    assert 0 < few.random < push(code, x).random + 64


def test_batches_grow_with_what_is_coded():
    assert sum(sizes(1000, 32)) == 1000
    assert max(sizes(1000, 32)) == 32
    assert list(sizes(5, 3)) == [1] * 5
    with pytest.raises(ValueError, match="batch must be at least 1"):
        push(BitsBack(model(), DIM), data(model(), 2), batch=0)


def test_other_models_and_damage_are_seen():
    law = model()
    code, x = BitsBack(law, DIM), data(law, 8)
    stream = push(code, x).data
    with pytest.raises(ValueError, match="do not come back"):
        pop(BitsBack(model("normal"), DIM), 8, stream)
    with pytest.raises(ValueError, match="do not come back"):
        pop(code, 7, stream)
    with pytest.raises(ValueError, match="too short"):
        pop(code, 1, b"")


def test_values_far_off_are_coded_too():
    law = model()
    code = BitsBack(law, DIM)
    x = torch.randint(-(10**6), 10**6, (6, DIM), generator=torch.Generator().manual_seed(0))
    found = push(code, x)
    assert torch.equal(pop(code, 6, found.data)[0], x)


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_mixtures_of_any_shape_come_back(size):
    """Narrow components far apart: flat between them, beyond what floats can tell, and as steep as may be."""
    law = model(family=MixtureLogistic(3))
    generator = torch.Generator().manual_seed(9)
    for layer in law.density.bijector:
        if isinstance(layer, Coupling):
            head = layer.net.head.weight
            head.copy_(size * torch.randn(head.shape, generator=generator, dtype=head.dtype))
    code = BitsBack(law, DIM)
    for reach in (16, 100):
        x = torch.randint(-reach, reach, (20, DIM), generator=generator)
        found = push(code, x, LENT[:50])
        rows, back = pop(code, 20, found.data, 50)
        assert torch.equal(rows, x)
        assert back == LENT[:50]
        assert law.density.bijector.forward(x.double())[1].min() < -10_000


def test_what_cannot_be_coded_is_refused():
    density_law = NormalLaw(DIM)
    with pytest.raises(ValueError, match="Orthant"):
        BitsBack(Dequantized(density_law, NormalDequantizer(Orthant(), Scaled(2))), DIM)
    with pytest.raises(ValueError, match="TruncatedNormal"):
        BitsBack(ready(Dequantized(density_law, TruncatedNormal(Hypercube(), density_law))), DIM)
    with pytest.raises(ValueError, match="Strange"):
        layers(Strange(), frame(), CodingSettings())
    with pytest.raises(ValueError, match="Foreign"):
        density(Foreign(), frame(), CodingSettings())
    with pytest.raises(ValueError, match="expected int64"):
        BitsBack(model(), DIM).push(torch.zeros(1, DIM), Coder(LENT))
    with pytest.raises(ValueError, match="ready"):
        BitsBack(model().float(), DIM)
    with pytest.raises(ValueError, match="ready"):
        BitsBack(model().train(), DIM)
    with pytest.raises(ValueError, match="too short"):
        pop(BitsBack(model(), DIM), 1, LENT[:64], 1 << 60)
    for wrong in ({"grid": 31}, {"sigma": 15}, {"noise": 0}, {"noise": 17}):
        with pytest.raises(ValueError, match="must lie in"):
            CodingSettings(**wrong)


class Strange(Reverse.__base__):  # type: ignore[misc, name-defined]
    def forward(self, x, context=None):
        return x, x.sum(1)

    inverse = forward


class Foreign(StandardNormal.__base__):  # type: ignore[misc, name-defined]
    def log_prob(self, x, context=None):
        return x.sum(1)

    def sample(self, n, context=None, generator=None):
        return torch.zeros(n, 1)


@pytest.mark.parametrize(
    "settings", [CodingSettings(10, 6, 6), CodingSettings(14, 8, 10), CodingSettings(12, 8, 16)]
)
def test_other_grids(settings):
    law = model("bipartite")
    code, x = BitsBack(law, DIM, settings), data(law, 16)
    found = push(code, x)
    assert torch.equal(pop(code, 16, found.data)[0], x)


@pytest.mark.parametrize("elementwise", ["spline", "mixture"])
@pytest.mark.parametrize("dequantizer", ["uniform", "normal", "bipartite", "autoregressive"])
def test_models_of_the_zoo(dequantizer, elementwise):
    values = {
        "elementwise": elementwise, "dequantizer_elementwise": elementwise,
        "shape": [1, 4, 4], "levels": [256], "num_levels": 2, "num_flows": 2, "hidden_size": 8,
        "num_hidden_layers": 2, "dequantizer": dequantizer, "dequantizer_flows": 2, "context_size": 2,
        "dequantizer_hidden_size": 12, "dequantizer_hidden_layers": 1,
    }  # fmt: skip
    law = zoo.build_image("dequantized", zoo.settings("dequantized", values))
    assert isinstance(law, Dequantized)
    x = torch.randint(256, (20, 16), generator=torch.Generator().manual_seed(0))
    objectives.initialize(law, x, torch.Generator().manual_seed(0))
    code = BitsBack(ready(shaken(law, 0.05)), 16)
    found = push(code, x, LENT[:99])
    rows, back = pop(code, 20, found.data, 99)
    assert torch.equal(rows, x)
    assert back == LENT[:99]


# -- codes -------------------------------------------------------------------------------------------------


def test_normal_tables_are_the_same_everywhere():
    assert normal_tables().fingerprint() == FINGERPRINT


FINGERPRINT = "1c4cf89e935b35db1226a8a4b0568b1f1a1bed73120384c8e7b5750ed82b0842"


@pytest.mark.parametrize("scale", [0.1, 0.6, 1.0, 2.5, 7.0, 15.9, 16.0, 40.0, 1e3, 1e7])
@pytest.mark.parametrize("mean", [0.0, 0.4999, -17.3, 1e6 + 0.25])
def test_normal_codes_cost_little(scale, mean):
    x = torch.arange(-40 * max(1, int(scale)), 41 * max(1, int(scale)), max(1, int(scale / 16)))
    x = x + round(mean)
    assert len(x) < 3000
    loc, s = (torch.full((len(x),), v, dtype=torch.float64) for v in (mean, scale))
    code = NormalCode(loc, s)
    size = code.intervals(x)[1].double() / (1 << 24)
    coder = Coder()
    coder.push(*code.intervals(x))
    assert torch.equal(code.pop(coder), x)
    coder.finish()
    if scale >= 0.5:
        near = x[(x - mean).abs() < 4.9 * scale + 1].double()
        loc, s = loc[: len(near)], s[: len(near)]
        p = torch.special.ndtr((near + 0.5 - loc) / s) - torch.special.ndtr((near - 0.5 - loc) / s)
        size = NormalCode(loc, s).intervals(near.long())[1]
        # Intervals of cells and low bits: of each number those that are its own.
        own = size.double().log2().sub(24)
        cells, low = own[: len(near)], own[len(near) :]
        bits = -cells - low.view(-1, len(near)).sum(0)
        kl = float((p * (bits + p.clamp(min=1e-300).log2())).sum() / p.sum())
        assert kl < (0.01 if scale < 16 else 0.004)


def test_normal_codes_refuse_what_is_no_law():
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        NormalCode(one, one * math.inf)
    with pytest.raises(ValueError, match="expected"):
        NormalCode(one, one[:1])


def test_places_have_their_mass():
    loc = torch.tensor([0.0, 3.0, -40.0, 0.5], dtype=torch.float64)
    scale = torch.tensor([1.0, 0.1, 1e-3, 30.0], dtype=torch.float64)
    for bits in (1, 5, 8):
        every = torch.arange(1 << bits)
        line = logits(bits)
        assert torch.equal(line, -line.flip(0))
        for a, b in zip(loc, scale, strict=True):
            n = len(every)
            code = logit_normal(a.expand(n), b.expand(n), bits)
            size = code.intervals(every)[1].double().log2().sub(24).view(-1, n).sum(0).exp2()
            mass = torch.special.ndtr((line - a) / b).diff()
            assert float(size.sum()) == pytest.approx(1, abs=1e-5)
            assert (size - mass).abs().max() < 1e-5
            coder = Coder()
            coder.push(*code.intervals(every))
            assert torch.equal(code.pop(coder), every)
