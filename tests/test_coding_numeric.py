"""Numeric modes: the same bits from every batch, order, thread and library; tables that are kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BASES, DIMS, build_base, enumerate_all
from reference_coder import ReferenceCoder
from safetensors.torch import load_file, save_file
from tiny import tiny_flow
from torch import Tensor, nn
from torch.nn import functional as F

from dflow import hf
from dflow.bijectors import Coupling
from dflow.coding import (
    MODES,
    Coder,
    fingerprint,
    frozen_tables,
    in_pieces,
    one_thread,
    pop,
    prepare,
    push,
)
from dflow.coding.frozen import Cells, FrozenMixture, MixtureTables, mixture_tables
from dflow.config import InputError
from dflow.core import Context
from dflow.distributions import Categorical, ConditionalLogistic, ConditionalWindow, Logistic, LogisticMixture
from dflow.distributions.logistic import log_mass
from dflow.elementwise import IntegerShift
from dflow.flows import Flow
from dflow.nn.densenet import DenseNet
from dflow.nn.fixed import FRACTION_BITS, FixedDenseNet

TOTAL = 1 << 24


def pictures(n: int = 64, dim: int = 64) -> Tensor:
    """Smooth ones, noise and constants."""
    generator = torch.Generator().manual_seed(0)
    smooth = 128 + 5 * torch.randn(n - 4, dim, generator=generator).cumsum(1)
    noise = torch.randint(0, 256, (2, dim), generator=generator)
    constant = torch.tensor([[0], [255]]).expand(2, dim)
    return torch.cat([smooth.round().long().clamp(0, 255), noise, constant])


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def onednn(on: bool) -> Iterator[None]:
    # `flags` sets TF32 too, and warns of it.
    before = torch.backends.mkldnn.set_flags(on)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before)


def everywhere(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Answers at batch 16, 1 and 5, one and two threads, oneDNN on and off."""
    found = []
    for n in (1, 2):
        with threads(n), torch.no_grad():
            for rows in (16, 1, 5):
                found.append(torch.cat([net(part) for part in x.split(rows)]))
            with onednn(False):
                found.append(net(x))
    return found


def dense(
    size: tuple[int, int] = (8, 8), channels: int = 6, hidden: int = 64, scale: float = 1.0
) -> DenseNet:
    torch.manual_seed(0)
    net = DenseNet(
        channels, 2, size, 2, hidden_size=hidden, depth=4, zero_head=False, activation="relu"
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    return net


# Networks


@pytest.mark.parametrize("mode", ["float64", "fixed"])
def test_couplings_give_the_same_bits_for_every_batch_thread_and_library(mode):
    net = dense()
    net = net.double() if mode == "float64" else FixedDenseNet(net)
    x = ((pictures(16, 6 * 64) - 128) / 128).double()
    first, *others = everywhere(net, x)
    assert first.dtype == torch.float64
    assert float(first.std()) > 0.01
    for other in others:
        assert torch.equal(first, other)


def by_integers(net: FixedDenseNet, x: Tensor) -> Tensor:
    """The network in int64: places unfolded, products of matrices, shifts."""

    def product(layer: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = layer.weight.flatten(1).long(), layer.bias.long()
        if layer.weight.ndim == 2:
            return (h[:, None] * weight).sum(2) + bias, layer.step.log2().long()
        k = layer.weight.shape[-1]
        columns = F.unfold(h.double(), k, padding=k // 2).long()
        sums = torch.stack([weight @ column for column in columns]) + bias[:, None]
        return sums.unflatten(2, h.shape[2:]), layer.step.log2().long()

    h = torch.floor(x * (1 << FRACTION_BITS) + 0.5).clamp(-(1 << 26), 1 << 26).long()
    if net.size != (1, 1):
        h = h.unflatten(1, (-1, *net.size))
    for layer in net.layers:
        inner = h
        for part in layer:
            sums, exponent = product(part, inner)
            assert (exponent < 0).all()
            inner = (sums + (1 << (-exponent - 1)) >> -exponent).clamp(0, 1 << 26)
        h = torch.cat([h, inner], 1)
    sums, exponent = product(net.head, h)
    assert int(sums.abs().max()) > 1 << 26
    out = sums.double() * 2.0 ** (exponent - FRACTION_BITS)
    return out.flatten(1).view(len(x), net.num_params, -1).transpose(1, 2)


@pytest.mark.parametrize(
    ("size", "scale"), [((4, 4), 1), ((4, 4), 30), ((1, 1), 1), ((4, 4), 2**-14)], ids=str
)
def test_fixed_networks_compute_what_int64_does(size, scale):
    net = FixedDenseNet(dense(size, hidden=32, scale=scale))
    x = pictures(16, 6 * size[0] * size[1]).double() / 128 - 1
    # Beyond the range of the data, where inputs are held.
    x[-1, ::2] = 1e6
    assert torch.equal(net(x), by_integers(net, x))


def test_fixed_networks_give_the_same_bits_in_every_order_of_summation():
    net, x = FixedDenseNet(dense()), (pictures(8, 6 * 64) - 128).double() / 128
    conv = net.layers[2][1]
    h = torch.floor(1e5 * x.view(8, 6, 8, 8)).abs().repeat(1, conv.weight.shape[1] // 6 + 1, 1, 1)
    h = h[:, : conv.weight.shape[1]].contiguous()
    order = torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(1))
    expected = conv(h)
    permuted = F.conv2d(h[:, order], conv.weight[:, order], conv.bias, padding=1) * conv.step
    assert torch.equal(torch.floor(permuted + 0.5).clamp(0, 1 << 26), expected)
    assert torch.equal(conv(h.to(memory_format=torch.channels_last)), expected)
    # What it is for: without integers the order shows.
    weight = dense().double().layers[2][2].weight.detach()
    assert not torch.equal(F.conv2d(h[:, order], weight[:, order]), F.conv2d(h, weight))


def test_fixed_networks_are_near_to_those_they_are_made_of():
    net, x = dense(), (pictures(64, 6 * 64) - 128).double() / 128
    with torch.no_grad():
        difference = FixedDenseNet(net)(x) - net.double()(x)
    assert 0 < float(difference.abs().max()) < 1e-3


def test_sums_that_could_be_inexact_are_refused_beforehand():
    wide = dense((2, 2), channels=3)
    with torch.no_grad():
        wide.head.weight.fill_(0.125)
        FixedDenseNet(wide)
        wide.head.bias.fill_(2.0**30)
    with pytest.raises(
        ValueError, match=r"sums of \d+ products of 14 and 26 bits and a bias .* beyond 2\^53"
    ):
        FixedDenseNet(wide)
    with torch.no_grad():
        wide.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        FixedDenseNet(wide)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"activation": "silu"}, "activation 'silu'"), ({"norm": "group"}, "norm 'group'")],
    ids=["silu", "group"],
)
def test_what_has_no_integer_form_is_named_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=f"{message}.*train with activation relu.*mode float64"):
        prepare(tiny_flow(**settings), "fixed")


def test_laws_that_are_not_of_integers_are_refused_in_fixed_mode():
    net = nn.Linear(1, 1)
    coupling = Coupling(IntegerShift(), net, torch.tensor([True, False]))
    for law, message in (
        (Categorical(3, 4), "the law is a Categorical"),
        (Flow(coupling, Logistic(2)), r"bijector\.net is a Linear"),
        (ConditionalLogistic(net, 2, 3), "mixture that a network gives"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*mode float64"):
            prepare(law, "fixed")
    with pytest.raises(ValueError, match="'int8' is not one of float64, fixed, float32"):
        prepare(Logistic(2), "int8")
    with pytest.raises(ValueError, match="'int8' is not one of"):
        fingerprint(Logistic(2), {}, "int8")


# Tables


def mixtures(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    loc, log_scale = 255 * draw(40, 5), 5 * draw(40, 5) - 1
    if kind == "wide":  # 16 bits, sharp components beside wide ones
        loc, log_scale = 65535 * draw(40, 5), 12 * draw(40, 5) - 3
    if kind == "sharp":
        log_scale = log_scale - 8
    if kind == "one":
        loc, log_scale = 1e9 * loc[:, :1], 20 * draw(40, 1)
    return loc, log_scale, 3 * draw(*loc.shape).log_softmax(1)


def ideal(x: Tensor, loc: Tensor, log_scale: Tensor, log_weights: Tensor) -> Tensor:
    terms = log_mass(x[..., None].double(), loc, log_scale) + log_weights.log_softmax(1)
    return -torch.logsumexp(terms, -1) / math.log(2)


@pytest.mark.parametrize("kind", ["usual", "wide", "sharp", "one"])
def test_frozen_mixtures_cost_what_the_law_says(kind):
    """Expected excess of 40 laws, by a draw from each at evenly spread quantiles of a component."""
    loc, log_scale, log_weights = mixtures(kind)
    tables = mixture_tables(loc, log_scale, log_weights)
    assert tables.K <= 4098
    n = 5001
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    logit = u.log() - (-u).log1p()
    index = torch.arange(40).repeat_interleave(n)
    total = torch.zeros(40, dtype=torch.float64)
    for m in range(loc.shape[1]):
        x = (loc[:, m, None] + log_scale[:, m, None].exp() * logit).round().long().flatten()
        spent = bits(tables, x, index)
        found = (spent - ideal(x, loc[index], log_scale[index], log_weights[index])).view(40, n).mean(1)
        total += log_weights.softmax(1)[:, m] * found
    assert float(total.max()) < 0.002
    assert float(total.min()) > -0.0005


def bits(tables: MixtureTables, x: Tensor, index: Tensor) -> Tensor:
    """What each number costs, by the tables' definition."""
    offset = x - tables.base[index]
    symbol = tables.find(offset, index)
    counts = tables.cumulative.diff(dim=1)[index, symbol].double()
    spent = 24 - counts.log2()
    inside = (symbol > 0) & (symbol < tables.K - 1)
    spent[inside] += tables.widths[index[inside], symbol[inside] - 1]
    over = torch.where(offset < 0, -1 - offset, offset - tables.ends[index, -1])[~inside]
    orders = tables.orders[index[~inside]].long()
    spent[~inside] += 2 * ((over >> orders) + 1).double().log2().floor() + 1 + orders
    return spent


@pytest.mark.parametrize("kind", ["usual", "wide", "sharp", "one"])
def test_numbers_of_frozen_mixtures_come_back_wherever_they_lie(kind):
    tables = mixture_tables(*mixtures(kind))
    ends = tables.base[:, None] + tables.ends[:, [0, 1, -1]]
    far = torch.tensor([[-(1 << 40), -1, 0, 1, 1 << 40]]).expand(40, 5)
    x = torch.cat([ends - 1, ends, ends + 1, far], 1).clamp(-(1 << 40), 1 << 40)
    index = torch.arange(40)[:, None].expand_as(x).flatten()
    x = x.flatten()
    streams = []
    for coder in (Coder(), ReferenceCoder()):
        coder.push(*Cells(tables, index).intervals(x))
        streams.append(coder.to_bytes())
        assert torch.equal(Cells(tables, index).pop(coder), x)
        coder.finish()
    assert streams[0] == streams[1]
    with pytest.raises(ValueError, match=r"numbers must lie in \+-2\^40"):
        Cells(tables, index[:1]).intervals(torch.tensor([(1 << 40) + 1]))


def test_cells_cover_the_window_and_hold_its_mass():
    loc, log_scale, log_weights = mixtures("usual")
    tables = mixture_tables(loc, log_scale, log_weights)
    for t in range(40):
        x = int(tables.base[t]) + torch.arange(int(tables.ends[t, -1]))
        p = 2 ** -ideal(x, loc[t], log_scale[t], log_weights[t : t + 1])
        symbol = tables.find(x - tables.base[t], torch.full_like(x, t))
        mass = torch.zeros(tables.K, dtype=torch.float64).index_add(0, symbol, p)
        counts = tables.cumulative[t].diff()
        difference = (counts - 1 - mass * (TOTAL - tables.K)).abs()
        difference[[0, -1, int(counts.argmax())]] = 0
        assert float(difference.max()) <= 1
        assert torch.equal(torch.bincount(symbol, minlength=tables.K)[1:-1], tables.ends[t].diff())
        assert int(counts[0] + counts[-1]) < 40 * TOTAL / math.exp(12) + 2


def test_tables_that_are_not_are_refused():
    good = FrozenMixture.freeze(LogisticMixture(2, 2))
    MixtureTables(**good)
    bad = {
        "counts": good["counts"] + 1,
        "base": good["base"] + (1 << 50),
        "widths": torch.full_like(good["widths"], 60),
        "orders": good["orders"].long(),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=r"counts|windows|widths|orders"):
            MixtureTables(**good | {name: value})
    with pytest.raises(ValueError, match="2 tables for a law of 3"):
        FrozenMixture(LogisticMixture(3, 2), MixtureTables(**good))
    nan = torch.full((1, 2), math.nan)
    with pytest.raises(ValueError, match="not finite"):
        mixture_tables(nan, nan, nan)
    with pytest.raises(ValueError, match="three times"):
        mixture_tables(nan, nan[0], nan)


# Whole laws


HURDLE = {"num_flows": 0, "prior": "hurdle", "prior_groups": 2}


@pytest.mark.parametrize("settings", [{}, HURDLE], ids=["shifts", "hurdle"])
@pytest.mark.parametrize("mode", MODES)
def test_streams_come_back_and_cost_what_the_likelihood_says(mode, settings):
    law, x = tiny_flow(**settings), pictures()
    before = {name: value.clone() for name, value in law.state_dict().items()}
    ready, coder = prepare(law, mode), Coder()
    assert not any(p.requires_grad for p in ready.parameters())
    push(ready, x, coder)
    expected = -float(ready.log_prob(x).sum()) / math.log(2)
    assert abs(coder.num_bits - expected) < 0.002 * x.numel() + 64
    assert torch.equal(pop(ready, len(x), coder), x)
    coder.finish()
    assert law.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in law.state_dict().items())
    # The mode changes next to nothing of the likelihood.
    exact = prepare(law, "float64").log_prob(x) / (x.shape[1] * math.log(2))
    assert float((ready.log_prob(x) / (x.shape[1] * math.log(2)) - exact).abs().mean()) < 0.002


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("mode", ["float64", "fixed"])
def test_encoder_and_decoder_may_differ_in_batch_threads_and_library(mode, shape):
    law = tiny_flow(shape)
    x, coder = pictures(dim=math.prod(shape)), Coder()
    with threads(2):
        push(prepare(law, mode), x, coder)
    data = coder.to_bytes()
    for rows, on in ((1, True), (7, False)):
        with threads(1), onednn(on):
            ready, again = in_pieces(in_pieces(prepare(law, mode), 3), rows), Coder(data)
            assert torch.equal(pop(ready, len(x), again), x)
            again.finish()


LAWS = {
    "convolutions": {},
    "one place": {"num_levels": 3},
    "silu and norm": {"activation": "silu", "norm": "group"},
    "hurdle": HURDLE,
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("mode", ["float64", "float32"])
def test_networks_answer_a_row_alike_in_any_company(mode, name):
    """To the last bit, where a product of matrices of one row or a norm would not."""
    shape = (1, 8, 8)
    law, x = prepare(tiny_flow(shape, hidden_size=32, **LAWS[name]), mode), pictures(16)
    nets = [m.net for m in law.modules() if isinstance(m, (Coupling, ConditionalLogistic, ConditionalWindow))]
    seen: dict[nn.Module, list[Tensor]] = {}

    def see(net: nn.Module, given: Any, out: Tensor) -> None:
        seen.setdefault(net, []).append(out)

    for net in nets:
        net.register_forward_hook(see)
    with torch.no_grad():
        law.log_prob(x)
        together = {net: found.pop() for net, found in seen.items()}
        for row in x.split(1):
            law.log_prob(row)
    assert len(together) == len(nets) > 1
    for net, found in seen.items():
        assert torch.equal(torch.cat(found), together[net])


def test_pieces_have_the_rows_asked_for():
    seen: list[int] = []

    class Net(nn.Module):
        def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
            seen.append(len(x))
            assert context is None or [len(c) for c in context.given] == [len(x)] * 2
            return x.double()[..., None]

    coupling = Coupling(IntegerShift(), Net(), torch.tensor([True, False]))
    law, x = Flow(coupling, Logistic(2)), torch.arange(14).view(7, 2)
    expected = coupling.params(x)
    # What is not known to answer alike in any batch sees one row at a time, whatever is asked for.
    ready = prepare(law, "float64")
    for given, asked, rows in ((law, 3, [3, 3, 1]), (law, 4, [4, 3]), (law, 7, [7]), (ready, 3, [1] * 7)):
        found = in_pieces(given, asked)
        for context in (None, Context(given=(x[:, 0], x[:, 1]))):
            seen.clear()
            assert torch.equal(found.bijector.net(x[:, :1], context), expected)
            assert seen == rows
        assert found.bijector.net(x[:0, :1]).shape == (0, 1, 1)
    with pytest.raises(ValueError, match="rows must be at least 1, found 0"):
        in_pieces(law, 0)


def test_pieces_are_refused_where_a_network_keeps_a_state():
    for name in ("grouped", "any order, random"):
        with pytest.raises(ValueError, match="keeps a state"):
            in_pieces(build_base(name, 3), 4)
    in_pieces(build_base("spectra", 3), 4)


@pytest.mark.parametrize("name", BASES)
def test_laws_on_symbols_are_prepared_and_come_back(name):
    law = prepare(build_base(name, 3), "float64")
    assert all(p.dtype == torch.float64 for p in law.parameters())
    x, coder = enumerate_all(3, DIMS[3]), Coder()
    push(law, x, coder)
    expected = -float(law.log_prob(x).sum()) / math.log(2)
    assert abs(coder.num_bits - expected) < 0.002 * x.numel() + 64
    assert torch.equal(pop(law, len(x), coder), x)
    with pytest.raises(ValueError, match=r"mode fixed: .* use mode float64"):
        prepare(build_base(name, 3), "fixed")


def test_one_thread_is_one_thread():
    with threads(2):
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2


# What is kept


def test_tables_are_taken_as_they_were_kept():
    law = tiny_flow()
    tables = frozen_tables(law)
    assert {name.rpartition(".")[2] for name in tables} == {"counts", "base", "widths", "orders", "log_unit"}
    name = next(name for name in tables if name.endswith(".counts"))
    other = {**tables, name: tables[name].clone()}
    counts, rows = other[name], torch.arange(len(tables[name]))
    largest = counts.argmax(1)
    amount = counts[rows, largest] // 4
    counts[rows, largest] -= amount
    counts[rows, (largest + 1) % counts.shape[1]] += amount
    streams = []
    for kept in (None, tables, other):
        coder = Coder()
        push(prepare(law, "float64", kept), pictures(), coder)
        streams.append(coder.to_bytes())
    assert streams[0] == streams[1] != streams[2]
    single = Logistic(3)
    assert torch.equal(
        prepare(single, "float32").log_prob(torch.ones(1, 3)), single.log_prob(torch.ones(1, 3))
    )


def test_tables_of_another_law_are_refused():
    law = tiny_flow()
    tables = frozen_tables(law)
    for other in (tiny_flow((1, 16, 16)), tiny_flow(num_levels=1), Logistic(4)):
        with pytest.raises(ValueError, match="tables of"):
            prepare(other, "float64", tables)
    first = next(iter(tables))
    for kept in ({k: v for k, v in tables.items() if k != first}, {**tables, "x.y": torch.zeros(1)}):
        with pytest.raises(ValueError, match="tables of"):
            prepare(law, "float64", kept)
    log_unit = next(name for name in tables if name.endswith("log_unit"))
    with pytest.raises(ValueError, match="logs of units"):
        prepare(law, "float64", {**tables, log_unit: tables[log_unit] + 1})
    with pytest.raises(ValueError, match="prepared already"):
        prepare(prepare(law, "float64"), "float64")


def test_fingerprints_change_with_all_that_decoding_depends_on():
    law = tiny_flow()
    tables = frozen_tables(law)
    assert len(fingerprint(law, tables, "fixed")) == 32
    assert fingerprint(tiny_flow(), frozen_tables(tiny_flow()), "fixed") == fingerprint(law, tables, "fixed")
    found = {fingerprint(law, tables, mode) for mode in MODES}
    found |= {fingerprint(law, {}, "fixed"), fingerprint(law, tables, "fixed", b"vocabulary")}
    found |= {fingerprint(tiny_flow(permute="inverted"), tables, "fixed")}
    name = next(iter(tables))
    found.add(fingerprint(law, {**tables, name: tables[name] + 1}, "fixed"))
    found.add(fingerprint(law, {**tables, "other": torch.zeros(())}, "fixed"))
    found.add(fingerprint(tiny_flow().double(), tables, "fixed"))
    with torch.no_grad():
        next(law.parameters()).view(-1)[3] += 2.0**-20
    found.add(fingerprint(law, tables, "fixed"))
    assert len(found) == 10


def test_the_tiny_flow_is_the_same_everywhere():
    """Golden files of other tests hang on it."""
    assert fingerprint(tiny_flow(), {}, "fixed").hex()[:16] == "caa4e23ca8a283a0"


def test_tables_lie_beside_the_weights(tmp_path: Path):
    law = tiny_flow()
    made = hf.coding_tables(tmp_path, law)
    file = tmp_path / "coding.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "manifest.json"]
    expected = frozen_tables(law)
    assert all(torch.equal(expected.pop(name), value) for name, value in made.items())
    assert not expected
    # They are read, not made again.
    stored = load_file(file)
    first = next(iter(stored))
    stored[first] += 1
    meta = {"law": fingerprint(law, {}, "float64").hex()}
    save_file(stored, file, meta)
    with pytest.raises(InputError, match=r"coding\.safetensors: damaged or changed since it was saved"):
        hf.coding_tables(tmp_path, law)
    (tmp_path / "manifest.json").unlink()
    assert torch.equal(hf.coding_tables(tmp_path, law)[first], made[first] + 1)
    # Another model was trained into the folder.
    other = tiny_flow(num_flows=1)
    again, expected = hf.coding_tables(tmp_path, other), frozen_tables(other)
    assert all(torch.equal(expected[name], value) for name, value in again.items())
    assert not torch.equal(again[first], made[first])
    (tmp_path / "manifest.json").unlink()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"coding\.safetensors: truncated or damaged"):
        hf.coding_tables(tmp_path, law)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=r"coding\.safetensors"):
        hf.coding_tables(tmp_path, law)
