"""Exported networks: every sign and sum equal to those of the network of signs; files that are refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from test_zoo_binary import data, network

from dflow import zoo
from dflow.config import InputError
from dflow.hf import packed
from dflow.hf.packed import PackedNetwork, pack
from dflow.nn.batch_norm import StochasticBatchNorm
from dflow.nn.moments import Moments, Signs, StochasticSign


def trained(**changes):
    """Normalisations that turn, shift and level channels, as a training may."""
    net = network(**changes)
    torch.manual_seed(1)
    for module in net:
        if isinstance(module, StochasticBatchNorm):
            with torch.no_grad():
                module.weight.copy_(torch.randn(len(module.weight)))
                module.weight[1] = 0
                module.bias.copy_(torch.randn(len(module.bias)) / 2)
    return net


def fixed_of(rule="map", **changes):
    return zoo.to_deterministic(trained(**changes), [data(60)], rule, torch.Generator().manual_seed(3))


@torch.no_grad()
def steps(net, x):
    """What comes out of each sign, and the last sums, of a network of given weights."""
    found, value = [], x
    for module in net:
        value = module(value)
        if isinstance(module, StochasticSign):
            assert isinstance(value, Signs)
            mean = value.mean if value.mean.ndim == 4 else value.mean[:, :, None, None]
            found.append((mean > 0).permute(0, 2, 3, 1).numpy())
        if module is zoo.binary.layers(net)[-1]:
            found.append((value.mean if isinstance(value, Moments) else value).numpy())
    return found, value.numpy()


@pytest.mark.parametrize("rule", ["map", "ternary", "sample"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "bce", "channels": [7, 70], "hidden": [65, 3]},
        {"pooling": "none", "channels": [9, 16]},
        {"batch_norm": False},
        {"shape": [3, 9, 8], "kernel": 5},
        {"channels": [], "hidden": [33]},
        {"channels": [], "hidden": []},
    ],
    ids=str,
)
def test_bit_for_bit(rule, changes, monkeypatch):
    net = network(**changes)
    shape = net[0].shape
    x = torch.randint(256, (50, shape[0] * shape[1] * shape[2]), generator=torch.Generator().manual_seed(2))
    # The extremes of the sums of a first layer too.
    x[0], x[1] = 0, 255
    fixed = zoo.to_deterministic(trained(**changes), [x], rule, torch.Generator().manual_seed(3))
    program = pack(fixed, rule)
    expected, logits = steps(fixed, x)
    found = program.steps(x.numpy())
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert np.array_equal(own, other)
    scores = program(x.numpy())
    if changes.get("head") == "bce":
        scores = (
            torch.special.log_ndtr(torch.tensor(scores)) - torch.special.log_ndtr(-torch.tensor(scores))
        ).numpy()
    assert np.allclose(scores, logits, atol=1e-4, rtol=1e-4)
    assert np.array_equal(program.steps(x.numpy()[7:8])[-1], found[-1][7:8])
    by_bytes = PackedNetwork(program.header, program.arrays, "bytes")
    for own, other in zip(by_bytes.steps(x.numpy()), expected, strict=True):
        assert np.array_equal(own, other)
    assert np.array_equal(by_bytes(x.numpy()), program(x.numpy()))
    for n in (0, 1):
        assert np.array_equal(by_bytes(x.numpy()[:n]), program(x.numpy()[:n]))
    # Without numpy 2.
    monkeypatch.setattr(packed, "_popcount", packed._by_table)
    assert np.array_equal(program.steps(x.numpy())[-1], found[-1])


def test_deterministic_baseline_is_packed_too():
    fixed = fixed_of(kind="binary")
    x = data(20)
    expected, _ = steps(fixed, x)
    for own, other in zip(pack(fixed).steps(x.numpy()), expected, strict=True):
        assert np.array_equal(own, other)


def test_file_comes_back_and_is_small(tmp_path):
    program = pack(fixed_of(channels=[32, 64], hidden=[512]))
    path = tmp_path / "net.bin"
    path.write_bytes(program.to_bytes())
    again = PackedNetwork.load(path)
    x = data(9).numpy()
    assert np.array_equal(again(x), program(x))
    assert again.header == program.header
    assert 4 * program.num_weights > 25 * program.num_bytes
    assert again.to_bytes() == program.to_bytes()


def test_every_flipped_bit_is_refused(tmp_path):
    program = pack(fixed_of(channels=[2], hidden=[3]))
    path = tmp_path / "net.bin"
    data_ = program.to_bytes()
    rng = np.random.default_rng(0)
    places = {*range(0, 12), *rng.integers(len(data_), size=300).tolist(), len(data_) - 1}
    for place in sorted(places):
        for bit in rng.permutation(8)[:2]:
            broken = bytearray(data_)
            broken[place] ^= 1 << int(bit)
            path.write_bytes(broken)
            with pytest.raises(InputError):
                PackedNetwork.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        PackedNetwork.load(tmp_path / "none")
    known = pack(fixed_of())
    with pytest.raises(InputError, match="products 'byte' must be one of bits, bytes"):
        PackedNetwork(known.header, known.arrays, "byte")
    path = tmp_path / "net.bin"
    for content in (b"", b"PNG", pack(fixed_of()).to_bytes()[:-5]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"net.bin"):
            PackedNetwork.load(path)


def test_sizes_without_end_are_refused_before_anything_is_made(tmp_path):
    path = tmp_path / "net.bin"
    told = json.dumps({"header": asdict(pack(fixed_of()).header), "sha256": ""})
    for about in (told.replace('"inputs": [1, 8, 8]', '"inputs": [1, 60000, 60000]', 1), "[" * 200_000):
        assert about != told
        path.write_bytes(save({"x": np.zeros(3)}, {"dflow": about}))
        with pytest.raises(InputError, match=r"net.bin: damaged"):
            PackedNetwork.load(path)


def test_inputs_are_checked():
    program = pack(fixed_of())
    for x, said in (
        (np.zeros((2, 63), np.uint8), "expected integers"),
        (np.zeros((2, 64)), "float64"),
        (np.full((2, 64), 256), "0..255"),
    ):
        with pytest.raises(InputError, match=said):
            program(x)
    assert program(np.zeros((0, 64), np.uint8)).shape == (0, 3)


def test_networks_that_are_not_packed():
    with pytest.raises(InputError, match="other than -1 and 1"):
        pack(network().eval())
    with pytest.raises(InputError, match="pixels of integers"):
        pack(network(kind="float").eval())
