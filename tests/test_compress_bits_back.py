"""Pictures under dequantized flows: they and what was lent come back, or there is one clear error."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dflow import hf
from dflow.cli import main
from dflow.coding import container
from dflow.coding.bits_back import CodingSettings
from dflow.coding.container import Segment
from dflow.compare.codecs import compare_codecs, markdown, pictures
from dflow.compare.material import image_model
from dflow.compare.peers import picture_codecs
from dflow.compress import (
    BitsBackCoder,
    compress_images,
    decompress_images,
    describe_images,
    load_image_coder,
)
from dflow.compress.coders import FileHead
from dflow.config import InputError

SMALL = {
    "num_flows": 2, "spline_bins": 3, "hidden_size": 8, "num_hidden_layers": 2, "context_size": 2,
    "dequantizer_flows": 2, "dequantizer_hidden_size": 12, "dequantizer_hidden_layers": 1,
}  # fmt: skip
#: Bytes that look random.
LENT = random.Random(0).randbytes(3000)


def values(n: int = 40) -> np.ndarray:
    """Grey pictures, narrow about 128."""
    return np.random.default_rng(0).normal(128, 2, (n, 4, 4)).round().astype(np.uint8)


def model_folder(folder: Path, **settings: object) -> Path:
    """Of pictures as `values`, its densities fitted by hand."""
    torch.manual_seed(0)
    config = hf.DflowImageConfig("dequantized", shape=[1, 4, 4], levels=[256], **(SMALL | settings))
    model = hf.DflowImageModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
        first = next(m for m in model.modules() if type(m).__name__ == "ActNorm")
        first.loc.fill_(128.5)
        first.log_scale.fill_(math.log(2.0))
    hf.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "uniform")


@pytest.fixture(scope="module")
def coder(folder):
    loaded = load_image_coder(folder, batch=8)
    assert isinstance(loaded, BitsBackCoder)
    return loaded


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.npy"
    np.save(path, values())
    return path


@pytest.fixture(scope="module")
def sample(coder, file):
    return compress_images([file], replace(coder, lend=("lent.bin", LENT[:200])))[0]


@pytest.mark.parametrize("dequantizer", ["uniform", "normal", "bipartite"])
def test_pictures_come_back_under_every_dequantizer(tmp_path, file, dequantizer):
    coder = load_image_coder(model_folder(tmp_path / "model", dequantizer=dequantizer), batch=8)
    data, report = compress_images([file], coder, analytic=True)
    [picture] = decompress_images(data, coder).pictures
    assert np.array_equal(picture.values[..., 0], values())
    assert report.net + report.auxiliary == report.bytes
    assert report.given == 0 < report.random < 16 * 8
    # The bound is of other noise; a stack has 64 to 95 bits of its own, heads and names the rest.
    assert abs(8 * report.net - report.analytic) < 0.25 * report.values + 8 * report.header + 160


def test_what_was_lent_comes_back_and_is_not_counted(coder, file, sample):
    [picture], lent, _ = decompress_images(sample, coder)
    assert np.array_equal(picture.values[..., 0], values())
    assert lent == {"lent.bin": LENT[:200]}
    data, report = compress_images([file], replace(coder, lend=("lent.bin", LENT)))
    assert (report.given, report.random) == (3000, 0)
    alone = compress_images([file], coder)[1]
    assert abs(report.net - alone.net) < 40
    rows = dict(describe_images(data))
    assert rows["kind"] == "images, by bits back"
    assert rows["auxiliary"] == "0 random bytes, 3,000 that come back, lent.bin"
    assert rows["net"].startswith(f"{report.net:,} bytes")


def test_segments_are_chains_of_their_own(coder, file):
    by = replace(coder, lend=("lent.bin", LENT[:64]), larger=True)
    data, report = compress_images([file], by, tiles=15)
    [picture], lent, _ = decompress_images(data, coder)
    assert np.array_equal(picture.values[..., 0], values())
    assert lent == {"lent.bin": LENT[:64]}
    assert report.segments == 3
    assert report.random > compress_images([file], coder)[1].random


def test_a_single_picture_is_refused_unless_told(tmp_path, coder):
    np.save(tmp_path / "one.npy", values(1)[0])
    with pytest.raises(InputError, match=r"too few share them.*--auxiliary.*--allow-larger"):
        compress_images([tmp_path / "one.npy"], coder)
    # Where a file is lent already, the way out is another.
    with pytest.raises(InputError, match=r"beyond the 20 bytes that lent\.bin lends.* of a larger file"):
        compress_images([tmp_path / "one.npy"], replace(coder, lend=("lent.bin", LENT[:20])))
    with pytest.raises(InputError, match=r"worse than that\. Compress more of them together, use an int"):
        compress_images([tmp_path / "one.npy"], replace(coder, lend=("lent.bin", LENT)))
    for by in (replace(coder, larger=True), replace(coder, lend=("lent.bin", LENT), larger=True)):
        data, _ = compress_images([tmp_path / "one.npy"], by)
        assert np.array_equal(decompress_images(data, coder).pictures[0].values[0, ..., 0], values(1)[0])


def test_other_grids_are_told_by_the_file(coder, file):
    by = replace(coder, settings=CodingSettings(16, 11, 10), larger=True)
    data, _ = compress_images([file], by)
    assert np.array_equal(decompress_images(data, coder).pictures[0].values[..., 0], values())


def test_values_that_no_model_expects_come_back(tmp_path, coder):
    wild = np.random.default_rng(1).integers(0, 256, (2, 9, 7)).astype(np.uint8)
    np.save(tmp_path / "a.npy", wild)
    data, _ = compress_images([tmp_path / "a.npy"], replace(coder, larger=True))
    assert np.array_equal(decompress_images(data, coder).pictures[0].values[..., 0], wild)


# -- damage ----------------------------------------------------------------------------------------------


def test_200_mutations_are_refused(coder, sample):
    rng = random.Random(1)
    for i in range(200):
        data = bytearray(sample)
        place = rng.randrange(len(data))
        if i % 4 == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif i % 4 == 1:
            del data[place : place + rng.randrange(1, 9)]
        elif i % 4 == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            data[place : place + 4] = rng.randbytes(4)
        if bytes(data) == sample:
            continue
        with pytest.raises(InputError):
            decompress_images(bytes(data), coder)


def with_chain(sample: bytes, chain: bytes) -> bytes:
    """The file with another chain, all checksums but that of the pictures right."""
    found = container.read(sample)
    [segment] = found.segments
    return container.write(replace(found, segments=(Segment(segment.crc, False, (chain,)),)))


def test_chains_that_are_wrong_behind_right_checksums_give_no_picture(coder, sample):
    chain, rng = container.read(sample).segments[0].levels[0], random.Random(2)
    places = [*range(16), *(rng.randrange(16, len(chain)) for _ in range(8))]
    for place in places:
        data = bytearray(chain)
        data[place] ^= 1 << rng.randrange(7)
        try:
            [picture], lent, _ = decompress_images(with_chain(sample, bytes(data)), coder)
        except InputError as error:
            assert "segment 1" in str(error)  # noqa: PT017
        else:
            # So few pictures are coded one by one, whatever the largest batch.
            assert place == 3
            assert np.array_equal(picture.values[..., 0], values())
            assert lent == {"lent.bin": LENT[:200]}


HEAD = FileHead(CodingSettings(), 8, 2, 200, "lent.bin", 1)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (replace(HEAD, given=1 << 59), "declares more borrowed bytes than it contains"),
        (replace(HEAD, random=1 << 39), "declares more borrowed bytes than it contains"),
        (replace(HEAD, batch=0), "declares more borrowed bytes than it contains"),
        (replace(HEAD, name="../a"), "names a place"),
        (replace(HEAD, name=""), "is not a file name"),
        (replace(HEAD, name="a\x1b[2J"), "cannot be shown"),
        (HEAD, "segment 1"),
    ],
)
def test_hostile_heads_are_refused_at_once(coder, sample, head, message):
    stack = FileHead.read(container.read(sample).segments[0].levels[0])[1]
    data = with_chain(sample, head.write() + stack)
    with pytest.raises(InputError, match=message):
        decompress_images(data, coder)
    if message != "segment 1":
        with pytest.raises(InputError, match=message):
            describe_images(data)


def test_grids_that_are_none_are_refused(coder, sample):
    chain = container.read(sample).segments[0].levels[0]
    for place, value in ((0, 31), (1, 17), (2, 17), (2, 0)):
        data = bytearray(chain)
        data[place] = value
        with pytest.raises(InputError, match="must lie in"):
            decompress_images(with_chain(sample, bytes(data)), coder)


def test_another_model_or_kind_is_refused(tmp_path, coder, sample, file):
    other = load_image_coder(model_folder(tmp_path / "other", dequantizer="normal"))
    with pytest.raises(InputError, match="was made by the model"):
        decompress_images(sample, other)
    settings = {"num_levels": 1, "num_flows": 1, "hidden_size": 8, "num_hidden_layers": 1}
    config = hf.DflowImageConfig("integer", shape=[1, 4, 4], levels=[256], **settings)
    hf.save(hf.DflowImageModel(config), tmp_path / "integer")
    integer = load_image_coder(tmp_path / "integer")
    with pytest.raises(InputError, match="holds images, by bits back"):
        decompress_images(sample, integer)
    data, _ = compress_images([file], integer)
    with pytest.raises(InputError, match="holds images, and"):
        decompress_images(data, coder)
    with pytest.raises(InputError, match="more than 100"):
        decompress_images(sample, coder, limit=100)
    with pytest.raises(InputError, match="cannot take mode fixed"):
        load_image_coder(model_folder(tmp_path / "again"), "fixed")


def test_what_has_no_local_code_is_refused(tmp_path):
    config = hf.DflowImageConfig(
        "dequantized", shape=[1, 4, 4], levels=[2], partition="orthant", dequantizer="normal", **SMALL
    )
    hf.save(hf.DflowImageModel(config), tmp_path / "model")
    with pytest.raises(InputError, match="Orthant"):
        load_image_coder(tmp_path / "model")


# -- commands --------------------------------------------------------------------------------------------


def test_commands(tmp_path, folder, capsys):
    np.save(tmp_path / "a.npy", values())
    (tmp_path / "lent.bin").write_bytes(LENT[:100])
    arguments = [str(tmp_path / "a.npy"), "-o", str(tmp_path / "a.dfl"), "--model", str(folder)]
    assert main(["compress", *arguments, "--auxiliary", str(tmp_path / "lent.bin"), "--noise", "9"]) == 0
    out = capsys.readouterr().out
    assert "100 that come back" in out
    assert "net" in out
    back = tmp_path / "back"
    assert main(["decompress", str(tmp_path / "a.dfl"), "-o", str(back), "--model", str(folder)]) == 0
    assert np.array_equal(np.load(back / "a.npy"), values())
    assert (back / "lent.bin").read_bytes() == LENT[:100]
    assert main(["info", str(tmp_path / "a.dfl")]) == 0
    assert "by bits back" in capsys.readouterr().out
    np.save(tmp_path / "one.npy", values(1)[0])
    single = [str(tmp_path / "one.npy"), "-o", str(tmp_path / "one.dfl"), "--model", str(folder)]
    assert main(["compress", *single]) == 2
    assert "--allow-larger" in capsys.readouterr().err
    assert not (tmp_path / "one.dfl").exists()
    assert main(["compress", *single, "--allow-larger"]) == 0
    assert main(["compress", *arguments[:2], str(tmp_path / "b.dfl"), *arguments[3:], "--sigma", "17"]) == 2
    assert "must lie in" in capsys.readouterr().err


def test_codecs_are_compared_with_net_and_auxiliary_bits(folder):
    model = image_model(str(folder), "float64")
    items = list(values(6))
    found = compare_codecs(pictures("p", items), [model], codecs=picture_codecs()[:1], rounds=1, each=False)
    [row] = [row for row in found.rows if row.size]
    assert row.auxiliary is not None
    assert 0 < row.auxiliary < row.bytes
    assert row.seconds is not None
    assert "bits a dimension (auxiliary bits are random here" in markdown(found)
