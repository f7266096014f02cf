"""Pictures as .dfl files: every value comes back, or there is one clear error."""

from __future__ import annotations

import io
import random
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SETTINGS, tiny_flow

from dflow import hf
from dflow.cli import main
from dflow.coding import container
from dflow.coding.container import Segment
from dflow.coding.numeric import MODES, fingerprint, frozen_tables, in_pieces, prepare
from dflow.compress import (
    ImageCoder,
    coders,
    compress_images,
    decompress_images,
    describe_images,
    image_plan,
    load_image_coder,
    stages,
)
from dflow.compress import pixels as px
from dflow.compress.tiles import from_model, grid, to_model
from dflow.config import InputError
from dflow.core import Distribution
from dflow.data.formats import png
from dflow.distributions.logistic import Logistics
from dflow.flows import Flow, Split


def pattern(C: int, H: int, W: int) -> np.ndarray:
    """``(C, H, W)``, the same every 8 pixels, where neighbours tell nothing."""
    c, i, j = np.ogrid[:C, :H, :W]
    return 40 + (37 * (i % 8) + 53 * (j % 8) + 91 * c + 29 * (i % 8) * (j % 8)) % 176


def grain(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(-2, 3, shape)


GREYS = (pattern(1, 39, 46)[0] + grain(39, 46)).astype(np.uint8)
RGB = (pattern(3, 39, 46).transpose(1, 2, 0) + grain(39, 46, 3)).astype(np.uint8)
BIG = (pattern(3, 64, 80).transpose(1, 2, 0) + grain(64, 80, 3)).astype(np.uint8)


@torch.no_grad()
def fit(law: Distribution, x: torch.Tensor) -> Distribution:
    """A law of what is near to ``x``, ``(1, dim)``."""
    if isinstance(law, Flow):
        fit(law.base, law.transform(x)[0])
    elif isinstance(law, Split):
        (x_a, _), (x_b, _) = law.parts(x)
        fit(law.conditional, x_b)
        fit(law.base, x_a)
    else:
        assert isinstance(law, Logistics)
        law.centre.copy_(x[0, :, None] + torch.arange(law.components) - law.components // 2)
        law.unit.fill_(0.5)
    return law


def ready(shape: tuple[int, int, int], **settings: object) -> Distribution:
    law = tiny_flow(shape, **settings)
    with torch.no_grad():
        for p in law.parameters():
            p.mul_(0.25)
    top = settings.get("levels", [256])[0]  # type: ignore[index]
    return fit(law, torch.from_numpy(pattern(*shape).reshape(1, -1) * top // 256))


def coder(
    shape: tuple[int, int, int] = (1, 8, 8), mode: str = "float64", batch: int = 64, **settings: object
) -> ImageCoder:
    law = ready(shape, **settings)
    tables, [levels] = frozen_tables(law), settings.get("levels", [256])  # type: ignore[misc]
    prepared = in_pieces(prepare(law, mode, tables), batch)
    known = fingerprint(law, tables, mode)[: container.FINGERPRINT]
    return ImageCoder(prepared, shape, (levels - 1).bit_length(), mode, known, batch=batch)


GREY, COLOUR = coder(), coder((3, 8, 8), num_levels=3)


def save(folder: Path, name: str, values: np.ndarray, depth: int = 8) -> Path:
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, values)
    elif depth != 8 or values.ndim == 3:
        path.write_bytes(png.write(values if values.ndim == 3 else values[..., None], depth))
    else:
        Image.fromarray(values).save(path)
    return path


def noise(*shape: int, top: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, shape).astype(dtype)


def values_of(data: bytes) -> np.ndarray:
    """What Pillow or numpy read of a file that was written."""
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data))
    if png.depth_of(data) == 16 and data[25]:
        return png.read(data)
    return np.asarray(Image.open(io.BytesIO(data)))


# -- round trips -----------------------------------------------------------------------------------------

PICTURES: dict[str, tuple[np.ndarray, int]] = {
    "constant.png": (np.full((16, 24), 7, np.uint8), 8),
    "noise.png": (noise(17, 9), 8),
    "extremes.png": (np.array([[0, 255], [255, 0]], np.uint8).repeat(9, 0).repeat(7, 1), 8),
    "dot.png": (np.array([[200]], np.uint8), 8),
    "line.png": (np.arange(40, dtype=np.uint8)[None], 8),
    "column.png": (np.arange(3, dtype=np.uint8)[:, None], 8),
    "ramp.png": (GREYS, 8),
    "bits.png": (noise(11, 13, top=2), 1),
    "two.png": (noise(11, 13, top=4), 2),
    "four.png": (noise(11, 13, top=16), 4),
    "twelve.png": (GREYS.astype(np.uint16) * 16 + 5, 16),
    "sixteen.png": (noise(9, 9, top=1 << 16, dtype=np.uint16), 16),
    "dark.png": (np.full((4, 4), 3, np.uint16), 16),
    "colour.png": (RGB, 8),
    "deep.png": (RGB.astype(np.uint16) * 257, 16),
    "clear.png": (np.concatenate([RGB, RGB[..., :1] * 0 + 255], -1), 8),
    "alpha.png": (np.concatenate([RGB, noise(39, 46, 1)], -1), 8),
    "grey-alpha.png": (np.stack([GREYS, noise(39, 46)], -1), 8),
    "deep-alpha.png": (np.concatenate([RGB, noise(39, 46, 1)], -1).astype(np.uint16) * 257, 16),
    "stack.npy": (GREYS[None] + np.arange(3, dtype=np.uint8)[:, None, None], 8),
    "matrix.npy": (noise(5, 21, top=4096, dtype=np.uint16), 16),
    "many.npy": (noise(2, 9, 8, 3, top=9), 8),
}


@pytest.mark.parametrize("by", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("name", PICTURES)
def test_every_value_comes_back(tmp_path, name, by):
    values, depth = PICTURES[name]
    data, report = compress_images([save(tmp_path, name, values, depth)], by)
    [picture] = decompress_images(data, by).pictures
    assert picture.form.file == name
    again = values_of(px.write(picture))
    assert again.dtype == (bool if depth == 1 else values.dtype)
    expected = values * (255 // ((1 << depth) - 1)) if depth in (2, 4) else values
    assert np.array_equal(again.reshape(values.shape), expected)
    if depth <= 8 and name.endswith("png"):
        assert png.depth_of(px.write(picture)) == depth
    assert report.bytes == len(data) == report.header + sum(report.levels)
    assert report.bytes <= values.size * max(1, values.itemsize) + values.nbytes // 50 + 60


@pytest.mark.parametrize(
    ("mode", "tiles"), [("float64", 17), ("float64", None), ("fixed", None), ("float32", 50)]
)
def test_many_files_share_a_header_and_a_coder(tmp_path, mode, tiles):
    by = coder((3, 8, 8), mode, num_levels=3)
    files = [save(tmp_path, name, *PICTURES[name]) for name in PICTURES]
    data, report = compress_images(files, by, tiles=tiles)
    again = decompress_images(data, by).pictures
    assert [p.form.file for p in again] == list(PICTURES)
    assert all(p.same(px.read(file)) for p, file in zip(again, files, strict=True))
    if tiles is None:
        apart = sum(len(compress_images([file], by)[0]) for file in files)
        assert len(data) < apart
    else:
        assert report.segments == 1 + -(-sum(grid(p.form, by.shape).size for p in again) // tiles)


@pytest.mark.parametrize(("levels", "depth"), [(2, 1), (16, 4), (32, 5), (4096, 12)])
def test_models_of_other_depths(tmp_path, levels, depth):
    by = coder((1, 8, 8), levels=[levels])
    assert by.bits == depth
    names = ["bits.png", "four.png", "ramp.png", "twelve.png", "sixteen.png", "matrix.npy", "stack.npy"]
    own = save(tmp_path, "own.npy", noise(3, 8, 8, top=levels, dtype=np.uint16))
    files = [*(save(tmp_path, name, *PICTURES[name]) for name in names), own]
    data, _ = compress_images(files, by)
    for picture, file in zip(decompress_images(data, by).pictures, files, strict=True):
        assert picture.same(px.read(file))


def test_values_are_spread_and_come_back():
    for bits in range(1, 17):
        for depth in range(1, 17):
            x = np.arange(1 << depth, dtype=np.uint16)
            y = to_model(x, depth, bits)
            assert y.min() == 0
            assert y.max() == (1 << bits) - 1 or depth == bits == 1
            kept = x if depth <= bits else x >> (depth - bits) << (depth - bits)
            assert np.array_equal(from_model(y, depth, bits), kept)


@pytest.mark.parametrize("mode", MODES)
def test_coded_bits_are_those_of_the_likelihood(tmp_path, mode):
    by = coder((3, 8, 8), mode, num_levels=3)
    data, report = compress_images([save(tmp_path, "a.png", BIG)], by, analytic=True)
    assert not report.raw
    assert report.analytic is not None
    excess = 8 * len(data) - report.analytic
    assert abs(excess) <= 0.002 * BIG.size + 8 * 48
    assert 8 * report.bytes / report.values < 6
    assert report.encode.total > report.encode.network > 0


def test_the_header_of_a_picture_has_at_most_48_bytes(tmp_path):
    for size in (8, 64):
        data, report = compress_images([save(tmp_path, "img7.png", BIG[:size, :size])], COLOUR)
        assert len(report.levels) == 3
        assert container.read(data).header == report.header <= 48


def test_noise_is_stored_with_next_to_nothing_more(tmp_path):
    data, report = compress_images([save(tmp_path, "n.png", noise(100, 100))], GREY)
    assert report.raw == report.segments == 1
    assert len(data) <= 10_000 + 48


# -- the same everywhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["float64", "fixed"])
def test_batch_threads_and_library_do_not_matter(tmp_path, mode):
    files = [save(tmp_path, "a.png", BIG[:24, :31]), save(tmp_path, "ramp.npy", GREYS[:8])]
    data, _ = compress_images(files, coder((3, 8, 8), mode, num_levels=3, batch=64))
    before = torch.get_num_threads()
    for batch, threads, fast in ((1, 1, True), (7, 2, True), (64, 2, False), (1, 1, False)):
        torch.set_num_threads(threads)
        # `flags` sets TF32 too, and warns of it.
        known = torch.backends.mkldnn.set_flags(fast)[0]
        try:
            by = coder((3, 8, 8), mode, num_levels=3, batch=batch)
            assert compress_images(files, by, verify=False)[0] == data
            pictures = decompress_images(data, by).pictures
        finally:
            torch.backends.mkldnn.set_flags(known)
            torch.set_num_threads(before)
        assert all(p.same(px.read(f)) for p, f in zip(pictures, files, strict=True))


def test_float32_is_for_the_same_machine(tmp_path, monkeypatch):
    data, _ = compress_images([save(tmp_path, "ramp.png", GREYS)], coder(mode="float32"))
    by = coder(mode="float32", batch=5)
    assert np.array_equal(decompress_images(data, by).pictures[0].values[0, ..., 0], GREYS)
    monkeypatch.setattr(image_plan, "machine", lambda: 1)
    with pytest.raises(InputError, match="another machine"):
        decompress_images(data, by)


#: Headers, and the levels of both.
GOLDEN = {
    "float64": "64666c021092f4197fb453a9050a000147080704676f6c6401aff613170238b2c154a0bd7b3a267f",
    "fixed": "64666c02110c526e01bdf0b07b0a000147080704676f6c6401aff613170238b2c154a0bd7135387d",
}
LEVELS = (
    "3148020012e3edfeb54691081bba135e4ec0051465902aac494c351b5052fccf48f3f842eb166d4c56d775d1a9ea"
    "3e837874f0960c991f5b0976046bb84f344221195cfa76f3ada9236816badbd3765f96e1fc55071df4eba556a4ba"
    "99cf060085c1ac66eb7ee8af6aa8b34016f42568ce157b3967fa08c01c05b4fbe666509af427c2ed4a2cfe72c950"
    "2dd3"
)


@pytest.mark.parametrize("mode", ["float64", "fixed"])
def test_files_that_were_written_once_decode_for_ever(tmp_path, mode):
    by, data = coder((3, 8, 8), mode), bytes.fromhex(GOLDEN[mode] + LEVELS)
    [picture] = decompress_images(data, by).pictures
    assert np.array_equal(picture.values[0], BIG[8:16, :7])
    assert compress_images([save(tmp_path, "gold.png", BIG[8:16, :7])], by)[0] == data


# -- levels ----------------------------------------------------------------------------------------------


def test_a_beginning_of_the_file_shows_coarse_pictures(tmp_path):
    names = ["colour.png", "alpha.png", "twelve.png", "stack.npy", "noise.png"]
    files = [save(tmp_path, name, *PICTURES[name]) for name in names]
    data, report = compress_images(files, COLOUR, tiles=9)
    exact = decompress_images(data, COLOUR).pictures
    found = stages(data, COLOUR)
    assert len(found) == 3
    assert [round(s.share * len(data)) for s in found] == [
        report.header + sum(report.levels[: k + 1]) for k in range(3)
    ]
    for a, b in pairwise(found):
        assert all(p <= q for p, q in zip(a.psnr, b.psnr, strict=True))
    assert found[0].psnr[0] > 15
    assert found[2].psnr == [float("inf")] * 5
    for k in (1, 2):
        end = report.header + sum(report.levels[:k])
        for stop in (end, end + 1, len(data) - 1):
            again = decompress_images(data[:stop], COLOUR, levels=k).pictures
            assert all(p.same(q) for p, q in zip(again, found[k - 1].pictures, strict=True))
        with pytest.raises(InputError, match=rf"missing; {k} of 3 levels are whole: --levels {k} shows"):
            decompress_images(data[:end], COLOUR)
        with pytest.raises(InputError, match=f"{k} whole levels of 3"):
            decompress_images(data[:end], COLOUR, levels=k + 1)
        told = dict(describe_images(data[:end]))
        assert told["level 3"].startswith(f"{report.levels[2]:,} bytes, ")
        assert [told[f"level {n}"].endswith("not there") for n in (1, 2, 3)] == [False, k < 2, True]
    assert all(
        p.same(q) for p, q in zip(decompress_images(data, COLOUR, levels=3).pictures, exact, strict=True)
    )
    with pytest.raises(InputError, match="0 were asked"):
        decompress_images(data, COLOUR, levels=0)


# -- damage ----------------------------------------------------------------------------------------------


def sample(tmp_path: Path, by: ImageCoder = COLOUR) -> tuple[bytes, list[px.Picture]]:
    names = ["colour.png", "alpha.png", "twelve.png", "noise.png", "stack.npy"]
    files = [save(tmp_path, name, *PICTURES[name]) for name in names]
    return compress_images(files, by, tiles=8)[0], [px.read(file) for file in files]


def test_500_mutations_are_refused(tmp_path):
    data, _ = sample(tmp_path)
    rng = random.Random(0)
    refused = 0
    while refused < 500:
        wrong, place, size = bytearray(data), rng.randrange(len(data)), rng.randrange(1, 90)
        match rng.randrange(5):
            case 0:
                wrong[place] ^= 1 << rng.randrange(8)
            case 1:
                wrong[rng.randrange(200)] = rng.randrange(256)
            case 2:
                del wrong[place : place + (size if rng.random() < 0.5 else len(data))]
            case 3:
                wrong[place:place] = rng.randbytes(size)
            case _:
                other = rng.randrange(len(data))
                wrong[place : place + size] = data[other : other + size]
        if bytes(wrong) == data:
            continue
        with pytest.raises(InputError, match=r"^x\.dfl: .{9,400}$"):
            decompress_images(bytes(wrong), COLOUR, name="x.dfl")
        refused += 1


def test_streams_that_are_wrong_behind_right_checksums_give_no_picture(tmp_path):
    """As of a machine that rounds otherwise, or of a hand."""
    data, originals = sample(tmp_path)
    file, rng = container.read(data), random.Random(1)
    for _ in range(40):
        n = rng.randrange(len(file.segments))
        segment = file.segments[n]
        levels = [bytearray(level) for level in segment.levels]
        level = rng.choice([level for level in levels if level])
        place = rng.randrange(len(level))
        if rng.random() < 0.3:
            del level[place:]
        else:
            level[place] ^= 1 << rng.randrange(8)
        segments = list(file.segments)
        segments[n] = replace(segment, levels=tuple(map(bytes, levels)))
        again = container.write(replace(file, segments=tuple(segments)))
        try:
            pictures = decompress_images(again, COLOUR).pictures
            # There are several ways to deflate the same.
            assert segment.raw
            assert all(p.same(q) for p, q in zip(pictures, originals, strict=True))
        except InputError as error:
            assert "segment" in str(error) or "beside" in str(error)  # noqa: PT017
    assert all(p.same(q) for p, q in zip(decompress_images(data, COLOUR).pictures, originals, strict=True))


def test_another_model_or_mode_is_refused(tmp_path):
    data, _ = sample(tmp_path)
    other = coder((3, 8, 8), num_levels=3, num_flows=1)
    with pytest.raises(InputError, match=f"{COLOUR.fingerprint.hex()}.*{other.fingerprint.hex()}"):
        decompress_images(data, other)
    with pytest.raises(InputError, match=r"in mode float64; .* in mode fixed"):
        decompress_images(data, coder((3, 8, 8), "fixed", num_levels=3))


def hostile(**changes: object) -> bytes:
    """A file of one picture whose form is not true."""
    form = replace(px.Form("a", px.GREY, 8, (8, 8)), **changes)  # type: ignore[arg-type]
    meta = image_plan.ImagePlan(0, None, (form,)).to_bytes()
    segment = Segment(0, False, (b"abcd", b"efgh"))
    return container.write(container.Container(container.IMAGES, 0, GREY.fingerprint, meta, (segment,)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (hostile(dims=(1 << 30, 1 << 30)), "declares .* more than"),
        (hostile(dims=(1 << 40, 1)), "declares .* more than"),
        (hostile(dims=(1, 1 << 20)), "segments of 131072 tiles"),
        (hostile(dims=(0, 8)), "empty"),
        (hostile(name="../a"), "names a place"),
        (hostile(name="/etc/a"), "names a place"),
        (hostile(name="C:a"), "names a place"),
        (hostile(name="a\\b"), "names a place"),
        (hostile(name=".."), "is not a file name"),
        (hostile(name=""), "is not a file name"),
        (hostile(name="a\n"), "cannot be shown"),
        (hostile(name="a\x1b[2Jb"), "cannot be shown"),
        (hostile(name="x" * 201), "longer than"),
        (hostile(alpha=300), "alpha that its values cannot have"),
        (hostile(source=px.UINT8, depth=16), "does not know"),
        (hostile(source=px.COLOUR), "segment 1"),
        (hostile(source=px.UINT16, dims=(1, 8, 8, 2)), "segment 1"),
        (hostile(alpha=-1), "1 segments"),
        (hostile(depth=9), "1 segments"),
        (hostile(), "segment 1"),
    ],
)
def test_hostile_files_are_refused_at_once(data, message):
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(InputError, match=message):
        decompress_images(data, GREY)
    assert time.perf_counter() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def test_lists_that_unfold_without_end_are_refused():
    bomb = zlib.compress(bytes(1 << 26), 9)
    meta = container.varint(1) + bomb
    segment = Segment(0, False, (b"abcd",))
    data = container.write(container.Container(container.IMAGES, 0, GREY.fingerprint, meta, (segment,)))
    with pytest.raises(InputError, match="too long"):
        decompress_images(data, GREY)


def test_more_values_than_allowed_are_refused(tmp_path):
    data, _ = compress_images([save(tmp_path, "a.png", GREYS)], GREY)
    with pytest.raises(InputError, match=r"declares 1,920 values, more than 1,800.*--limit"):
        decompress_images(data, GREY, limit=1800)


def test_what_does_not_decode_is_not_written(tmp_path, monkeypatch):
    file = save(tmp_path, "a.png", GREYS)
    true = coders.levels.pop
    monkeypatch.setattr(coders.levels, "pop", lambda *args: true(*args) ^ 1)
    with pytest.raises(InputError, match=r"a\.png: .* mode float64 does not decode.*nothing is written"):
        compress_images([file], GREY)
    compress_images([file], GREY, verify=False)


# -- files -----------------------------------------------------------------------------------------------


def test_what_cannot_be_read_exactly_is_refused(tmp_path):
    def refuse(name: str, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            compress_images([tmp_path / name], GREY)
        assert name in str(caught.value)

    Image.new("CMYK", (4, 4)).save(tmp_path / "a.jpg")
    refuse("a.jpg", "4 channels")
    frames = [Image.new("L", (4, 4), v) for v in (1, 2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    refuse("a.gif", "several pictures")
    whole = save(tmp_path, "whole.png", RGB).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    refuse("cut.png", "damaged")
    (tmp_path / "text.png").write_text("no picture")
    refuse("text.png", "damaged, truncated or no picture")
    np.save(tmp_path / "f.npy", np.zeros((4, 4), np.float32))
    refuse("f.npy", "array of float32")
    np.save(tmp_path / "e.npy", np.zeros((0, 4, 4), np.uint8))
    refuse("e.npy", "not empty")
    np.save(tmp_path / "o.npy", np.array([None]), allow_pickle=True)
    refuse("o.npy", "no array")
    (tmp_path / "wide.ppm").write_bytes(b"P6 2 1 4095\n" + struct.pack(">6H", *range(0, 4096, 700)))
    refuse("wide.ppm", "largest value is 4095")
    np.save(tmp_path / "two.npy", np.zeros((1, 8, 8, 2), np.uint8))
    with pytest.raises(InputError, match="2 channels for a model of 3"):
        compress_images([tmp_path / "two.npy"], COLOUR)
    # The way out that is told.
    np.save(tmp_path / "two.npy", np.moveaxis(np.load(tmp_path / "two.npy"), -1, 1).reshape(-1, 8, 8, 1))
    assert compress_images([tmp_path / "two.npy"], COLOUR)[1].values == 128
    save(tmp_path, "same.png", GREYS)
    (tmp_path / "b").mkdir()
    save(tmp_path / "b", "same.png", GREYS)
    with pytest.raises(InputError, match=r"both come back as same\.png"):
        compress_images([tmp_path / "same.png", tmp_path / "b" / "same.png"], GREY)
    with pytest.raises(InputError, match="no files"):
        compress_images([], GREY)
    for tiles in (0, 1 << 20):
        with pytest.raises(InputError, match="tiles of a segment"):
            compress_images([tmp_path / "same.png"], GREY, tiles=tiles)


def test_what_is_converted_or_lost_is_told(tmp_path):
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(GREYS).save(tmp_path / "key.png", transparency=115)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "photo.jpg", icc_profile=b"profile", exif=exif)
    Image.fromarray(GREYS.astype(np.uint16) * 9).save(tmp_path / "deep.tif")
    files = [tmp_path / name for name in ("palette.png", "key.png", "photo.jpg", "deep.tif")]
    data, report = compress_images(files, COLOUR)
    notes = {Path(name).name: [n for f, n in report.notes if f == name] for name, _ in report.notes}
    assert "palette" in notes["palette.png"][0]
    assert "alpha channel" in notes["key.png"][0]
    assert notes["photo.jpg"] == [
        "not kept: its EXIF data",
        "not kept: its ICC profile (viewers may show other colours without it)",
        "not kept: its orientation 6 (viewers show it turned by 90 degrees; the pixels come back as stored)",
        "a JPEG file: its pixels are kept, not its bytes",
    ]
    assert f"{tmp_path / 'photo.jpg'}: not kept: its EXIF data" in report.lines
    back = [values_of(px.write(picture)) for picture in decompress_images(data, COLOUR).pictures]
    assert np.array_equal(back[0], np.asarray(palette.convert("RGB")))
    assert np.array_equal(back[1], np.stack([GREYS, (GREYS != 115) * np.uint8(255)], -1))
    assert np.array_equal(back[2], np.asarray(Image.open(files[2])))
    assert np.array_equal(back[3], GREYS.astype(np.uint16) * 9)


def test_a_loss_is_one_line_a_kind(tmp_path):
    files = [tmp_path / f"{i}.bmp" for i in range(5)]
    for file in files:
        Image.fromarray(RGB).save(file)
    _, report = compress_images(files, COLOUR, verify=False)
    names = ", ".join(map(str, files[:3]))
    assert report.lines == [
        f"{names} and 2 more: not kept: its resolution",
        f"{names} and 2 more: a BMP file: its pixels are kept, not its bytes",
    ]


def test_files_of_one_stem_come_back_by_names_of_their_own(tmp_path):
    values = {"x.png": GREYS, "x.bmp": GREYS // 2, "y.tif": GREYS // 3, "y.bmp": GREYS // 4, "x.npy": GREYS}
    files = [save(tmp_path, name, each) for name, each in values.items()]
    data, report = compress_images(files, GREY)
    pictures = {p.form.file: p for p in decompress_images(data, GREY).pictures}
    assert list(pictures) == ["x.png", "x.bmp.png", "y.tif.png", "y.bmp.png", "x.npy"]
    for picture, file in zip(pictures.values(), files, strict=True):
        assert np.array_equal(picture.values, px.read(file).values)
    assert any(
        "comes back as x.bmp.png, since another file comes back as x.png" in n for _, n in report.notes
    )


def test_what_two_readers_find_different_is_not_written(tmp_path, monkeypatch):
    file, wrong = save(tmp_path, "a.png", GREYS), GREYS.copy()
    wrong[0, 0] ^= 1
    monkeypatch.setattr(png, "read", lambda data: wrong[..., None])
    layout = png.layout
    monkeypatch.setattr(png, "layout", lambda data: replace(layout(data), decode=png.read))
    with pytest.raises(InputError, match=r"a\.png: two readers of its format find different values"):
        compress_images([file], GREY)
    compress_images([file], GREY, verify=False)


def interlaced(values: np.ndarray) -> bytes:
    """A PNG of 16 bits in seven passes, each row of another filter."""
    H, W, C = values.shape
    lines = b""
    for x, y, dx, dy in png._PASSES:
        part = values[y::dy, x::dx]
        if not part.size:
            continue
        rows = part.astype(">u2").reshape(len(part), -1).view(np.uint8)
        filtered = png._predictions(rows, np.zeros(rows.shape[1], np.uint8), 2 * C)
        for i, row in enumerate(rows):
            lines += bytes([i % 5]) + (row - filtered[i % 5][i]).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", W, H, 16, {1: 0, 3: 2, 4: 6}[C], 0, 0, 1)
    body = zlib.compress(lines)
    return png.SIGNATURE + png._chunk(b"IHDR", header) + png._chunk(b"IDAT", body) + png._chunk(b"IEND", b"")


def test_png_of_16_bits():
    for shape in ((1, 1, 3), (13, 9, 3), (300, 5, 4), (7, 8, 1), (6, 6, 2)):
        smooth = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape) * 7
        for values in (noise(*shape, top=1 << 16, dtype=np.uint16), smooth):
            assert np.array_equal(png.read(png.write(values, 16)), values)
            if shape[2] != 2:
                assert np.array_equal(png.read(interlaced(values)), values)
    data = png.write(noise(9, 9, 3, dtype=np.uint16), 16)
    for place in (20, 50, len(data) - 20):
        with pytest.raises(ValueError, match=r"damaged|cut off"):
            png.read(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert np.array_equal(png.read(png.write(RGB, 8)), RGB)
    with pytest.raises(ValueError, match="no PNG file has 4 bits"):
        png.write(RGB, 4)


# -- commands --------------------------------------------------------------------------------------------


def model_folder(folder: Path, shape: tuple[int, int, int] = (3, 8, 8), **settings: object) -> Path:
    config = hf.DflowImageConfig("integer", **(SETTINGS | {"shape": list(shape)} | settings))
    model = hf.DflowImageModel(config)
    model.law.load_state_dict(ready(shape, **settings).state_dict())
    hf.save(model, folder)
    return folder


def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(model_folder(tmp_path / "model", num_levels=3))
    names = ["colour.png", "alpha.png", "many.npy"]
    files = [str(save(tmp_path, name, *PICTURES[name])) for name in names]
    assert main(["compress", *files, "-o", "all.dfl", "--model", model]) == 0
    assert "bits a dimension" in capsys.readouterr().out
    assert main(["info", "all.dfl"]) == 0
    out = capsys.readouterr().out
    assert "alpha.png" in out
    assert "level 3" in out
    assert main(["decompress", "all.dfl", "-o", "back", "--model", model]) == 0
    for name in names:
        assert px.read(tmp_path / name).same(px.read(tmp_path / "back" / name))
    assert main(["decompress", "all.dfl", "-o", "back", "--model", model]) == 2
    assert "exists already" in capsys.readouterr().err
    whole = (tmp_path / "all.dfl").read_bytes()
    (tmp_path / "cut.dfl").write_bytes(whole[: len(whole) * 3 // 4])
    assert main(["decompress", "cut.dfl", "-o", "coarse", "--model", model, "--levels", "1"]) == 0
    assert len(list((tmp_path / "coarse").iterdir())) == 3
    assert main(["plot", "progressive", "all.dfl", "--model", model, "-o", "p.png"]) == 0
    with Image.open("p.png") as seen:
        assert seen.width > 400
    assert main(["compress", *files, "-o", "apart", "--model", model, "--mode", "fixed", "--separate"]) == 0
    apart = sorted(str(path) for path in Path("apart").iterdir())
    assert apart == ["apart/alpha.dfl", "apart/colour.dfl", "apart/many.dfl"]
    assert main(["decompress", *apart, "-o", "back2", "--model", model]) == 0
    assert px.read(tmp_path / "alpha.png").same(px.read(tmp_path / "back2" / "alpha.png"))
    other = str(model_folder(tmp_path / "other", num_levels=2))
    capsys.readouterr()
    for given, message in (
        (["decompress", "all.dfl", "-o", "x", "--model", other], "give the model that it was made by"),
        (["decompress", "cut.dfl", "-o", "x", "--model", model], "all.dfl"),
        (["compress", files[0], "-o", "all.dfl", "--model", model], "exists already"),
        (["compress", files[0], "-o", "y.dfl", "--model", str(tmp_path)], "not a model"),
        (["compress", "none.png", "-o", "y.dfl", "--model", model], "none.png: No such file"),
        (["info", files[0]], "not a .dfl file"),
    ):
        if given[1] == "cut.dfl":
            message = "cut.dfl: cut off"
        assert main(given) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not Path("y.dfl").exists()


def test_a_model_without_numbers_is_refused(tmp_path):
    by = coder((3, 8, 8))
    net = next(module for name, module in by.law.named_modules() if name.endswith("net"))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(torch.nan)
    with pytest.raises(InputError, match=r"the model: .*not finite"):
        compress_images([save(tmp_path, "a.png", RGB)], by)


def test_models_that_compress_no_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match="mode 'float16' is not one of"):
        load_image_coder(tmp_path, "float16")
    with pytest.raises(InputError, match="batch size 0"):
        load_image_coder(tmp_path, batch=0)
    odd = model_folder(tmp_path / "odd", levels=[200])
    with pytest.raises(InputError, match=r"values other than 0\.\.2\^b - 1"):
        load_image_coder(odd)
    silu = model_folder(tmp_path / "silu", activation="silu")
    with pytest.raises(InputError, match=r"silu.*float64"):
        load_image_coder(silu, "fixed")
