"""Images and tables: every known set, folders, the hub, CSV files, and every way they can be wrong."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dflow.config import InputError, parse
from dflow.data import ImageConfig, Samples, check, image_sets, list_sets, load_images, prepare
from dflow.data.files import digest
from dflow.data.formats import png
from dflow.data.known import KnownFile
from dflow.data.own_images import grey
from dflow.data.splits import SPLITS

RANDOM = np.random.default_rng(0)
#: MNIST made small: 5 images to train on and 3 to test.
DIGITS = [RANDOM.integers(256, size=(n, 28, 28), dtype=np.uint8) for n in (5, 3)]
LABELS = [RANDOM.integers(10, size=n, dtype=np.uint8) for n in (5, 3)]
BITS = [RANDOM.integers(2, size=(n, 784), dtype=np.uint8) for n in (4, 2, 3)]
#: CIFAR-10 made small: 5 files of 2 records and one of 10, each class equally often.
CLASSES = np.array([*range(10), *range(10)], dtype=np.uint8)
COLOURS = RANDOM.integers(256, size=(20, 3, 32, 32), dtype=np.uint8)
BATCHES = [
    b"".join(bytes([CLASSES[i]]) + COLOURS[i].tobytes() for i in part)
    for part in [*np.arange(10).reshape(5, 2), range(10, 20)]
]


def known(file: KnownFile, data: bytes) -> KnownFile:
    algorithm = file.digest.partition(":")[0]
    return replace(file, size=len(data), digest=file.digest and digest(data, algorithm))


@pytest.fixture(autouse=True)
def small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known sets, made small."""
    idx = [image_sets.idx(a) for pair in zip(DIGITS, LABELS, strict=True) for a in pair]
    small = (
        image_sets.mnist(tuple(map(known, image_sets.MNIST, idx)), 2),
        image_sets.binarized_mnist(
            known(image_sets.BINARIZED_BITS, b"".join(a.tobytes() for a in BITS)),
            tuple(map(known, image_sets.BINARIZED_TEXT, [a.tobytes() for a in BITS])),
        ),
        image_sets.cifar10(
            known(image_sets.CIFAR10, archive()),
            tuple(map(known, image_sets.CIFAR10_BATCHES, BATCHES)),
            tuple(COLOURS[:10].sum((0, 2, 3), dtype=int).tolist()),
            2,
        ),
        image_sets.cifar10_subset(known(image_sets.SUBSET, subset()), 2),
    )
    for known_set in small:
        monkeypatch.setitem(image_sets.KNOWN, known_set.name, known_set)


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hub's client, which reaches nothing until a test fills the answers."""
    answers: dict[str, Any] = {}

    def load_dataset(repository: str) -> Any:
        if repository not in answers:
            raise ConnectionError("no network\nhere")
        return answers[repository]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return answers


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for known_file, data in zip(image_sets.CIFAR10_BATCHES, BATCHES, strict=True):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{known_file.name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    # The time of packing is part of a gz file: take it out.
    return gzip.compress(gzip.decompress(file.getvalue()), mtime=0)


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def subset() -> bytes:
    images = COLOURS.transpose(0, 2, 3, 1)
    return npz(x_train=images[:7], y_train=CLASSES[:7], x_valid=images[7:], y_valid=CLASSES[7:])


def packbits() -> bytes:
    return npz(**{name: np.packbits(a, axis=1) for name, a in zip(SPLITS, BITS, strict=True)})


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def put_mnist(folder: Path, pack: Callable[[bytes], bytes] = bytes, suffix: str = "") -> None:
    for file, array in zip(image_sets.MNIST, [DIGITS[0], LABELS[0], DIGITS[1], LABELS[1]], strict=True):
        put(folder / (file.name + suffix), pack(image_sets.idx(array)))


def put_text(folder: Path) -> None:
    for file, array in zip(image_sets.BINARIZED_TEXT, BITS, strict=True):
        put(folder / file.name, "".join(f"{' '.join(map(str, row))} \n" for row in array).encode())


def save(path: Path, array: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def splits(config: ImageConfig) -> list[np.ndarray]:
    images = load_images(config)
    for samples in (images.train, images.valid, images.test):
        assert samples.values.shape[1] == np.prod(images.shape) == images.dim
    return [s.values.numpy().reshape(-1, *images.shape) for s in (images.train, images.valid, images.test)]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# -- samples ---------------------------------------------------------------------------------------------

SAMPLES = Samples("train", torch.tensor([[0, 1, 255], [7, 8, 9]], dtype=torch.uint8))


def test_crops_are_rows_and_depend_on_the_generator_alone() -> None:
    x, lengths = SAMPLES.crops(500, 3, torch.Generator().manual_seed(1))
    assert lengths is None
    assert x.dtype == torch.int64
    assert set(map(tuple, x.tolist())) == {(0, 1, 255), (7, 8, 9)}
    torch.manual_seed(5)
    assert SAMPLES.crops(500, 3, torch.Generator().manual_seed(1))[0].equal(x)
    assert not SAMPLES.crops(500, 3, torch.Generator().manual_seed(2))[0].equal(x)


def test_chunks_are_all_rows_as_they_are_stored() -> None:
    x, lengths = SAMPLES.chunks(3)
    assert x is SAMPLES.values
    assert lengths is None
    assert SAMPLES.rows(slice(1, 9)).tolist() == [[7, 8, 9]]
    assert SAMPLES.rows(slice(1, 9)).dtype == torch.int64
    real = Samples("train", torch.tensor([[0.5, 1]], dtype=torch.float64))
    assert real.crops(2, 2)[0].dtype == real.rows(slice(1)).dtype == torch.float64
    assert SAMPLES.amount == "2 images of 3 entries to train on"


def test_a_row_is_not_cut() -> None:
    for call in (lambda: SAMPLES.chunks(2), lambda: SAMPLES.crops(1, 4)):
        with pytest.raises(InputError, match="train data have 3 entries a row and the model's length is"):
            call()
    with pytest.raises(ValueError, match="batch=0"):
        SAMPLES.crops(0, 3)


# -- the checkerboard ------------------------------------------------------------------------------------


def test_the_checkerboard_is_its_law() -> None:
    board = load_images(ImageConfig())
    assert (board.shape, board.levels, board.unit) == ((2, 1, 1), 2, "bits")
    for name in ("train", "valid", "test"):
        assert sorted(board.split(name).chunks(2)[0].tolist()) == [[0, 1], [1, 0]]
    x, _ = board.train.crops(10_000, 2, torch.Generator().manual_seed(0))
    assert (x.sum(1) == 1).all()
    assert abs(float(x[:, 0].double().mean()) - 0.5) < 0.02
    with pytest.raises(InputError, match="checkerboard is drawn and takes no bits"):
        load_images(ImageConfig(bits=1))
    with pytest.raises(InputError, match="drawn, not read"):
        check("checkerboard")
    with pytest.raises(InputError, match="did you mean 'valid'"):
        board.split("vald")


# -- MNIST -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "pack", "suffix"),
    [("", bytes, ""), ("mnist", gzip.compress, ".gz"), ("mnist", lzma.compress, ".xz")],
    ids=["plain", "gz", "xz"],
)
def test_mnist(tmp_path: Path, place: str, pack: Any, suffix: str) -> None:
    put_mnist(tmp_path / place, pack, suffix)
    expected = [DIGITS[0][:3, None], DIGITS[0][3:, None], DIGITS[1][:, None]]
    same(splits(ImageConfig("mnist", folder=str(tmp_path))), expected)
    images = load_images(ImageConfig("mnist", folder=str(tmp_path)))
    assert (images.shape, images.levels, images.lowest) == ((1, 28, 28), 256, 0)
    assert images.unit == "bits a dimension"
    assert images.train.values.dtype == torch.uint8


def test_bits_and_patches(tmp_path: Path) -> None:
    put_mnist(tmp_path)
    config = ImageConfig("mnist", folder=str(tmp_path), patch=[2, 4])
    patch = DIGITS[1][:, None, 13:15, 12:16]
    same(splits(config)[2:], [patch])
    for bits in range(1, 9):
        images = load_images(replace(config, bits=bits))
        assert images.levels == 2**bits
        expected = torch.from_numpy(patch.copy()).flatten(1).long()
        assert images.test.rows(slice(None)).equal(expected.div(2 ** (8 - bits), rounding_mode="floor"))
    checksums = {load_images(replace(config, bits=bits)).checksum for bits in (None, 8, 7)}
    assert len(checksums) == 2
    with pytest.raises(InputError, match=r"patch=\[29, 2\] is larger than mnist, which has 28 x 28"):
        load_images(replace(config, patch=[29, 2]))


@pytest.mark.parametrize("data", ["short", "changed", "empty"])
def test_another_content_is_refused(tmp_path: Path, data: str) -> None:
    put_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes({"short": whole[:-1], "changed": whole[:-1] + b"x", "empty": b""}[data])
    config = ImageConfig("mnist", folder=str(tmp_path))
    for call in (lambda: load_images(config), lambda: check("mnist", tmp_path)):
        with pytest.raises(InputError, match=re.escape(str(path)) + ": expected .* bytes with md5:"):
            call()
    path.unlink()
    put(path.with_name(path.name + ".gz"), gzip.compress(whole)[:-9])
    with pytest.raises(InputError, match=r"\.gz: damaged or truncated"):
        load_images(ImageConfig("mnist", folder=str(tmp_path)))


def test_idx_files_of_any_shape() -> None:
    for array in (DIGITS[0], LABELS[0], DIGITS[0][:0]):
        data = image_sets.idx(array)
        assert struct.unpack(">I", data[:4]) == (0x800 + array.ndim,)
        np.testing.assert_array_equal(image_sets.from_idx(data), array)


# -- binarized MNIST -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bits", "text"])
def test_binarized_mnist(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "binarized_mnist"
    if form == "bits":
        put(folder / "binarized_mnist_packbits.npz", packbits())
    else:
        put_text(folder)
    config = ImageConfig("binarized_mnist", folder=str(tmp_path))
    same(splits(config), [a.reshape(-1, 1, 28, 28) for a in BITS])
    images = load_images(config)
    assert images.levels == 2
    assert "sorted by class" in images.note
    assert [row.size for row in check("binarized_mnist", tmp_path)] == (
        [9 * 784] if form == "bits" else [4 * 784, 2 * 784, 3 * 784]
    )
    with pytest.raises(InputError, match="bits=2: binarized_mnist has 1 bits a value"):
        load_images(replace(config, bits=2))


def test_binarized_mnist_that_is_none(tmp_path: Path) -> None:
    config = ImageConfig("binarized_mnist", folder=str(tmp_path))
    with pytest.raises(InputError, match=r"no hub; put .*\.amat of http.*DFLOW_DATA"):
        load_images(config)
    with pytest.raises(InputError, match=r"no hub"):
        prepare("binarized_mnist", tmp_path)
    with pytest.raises(InputError, match=r"no files in .*; put .*\.amat"):
        check("binarized_mnist", tmp_path)
    put_text(tmp_path)
    path = tmp_path / "binarized_mnist_test.amat"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(InputError, match=r"test\.amat: holds b'2'"):
        load_images(config)
    path.write_bytes(path.read_bytes().replace(b"2", b"0"))
    with pytest.raises(InputError, match=r"test\.amat: expected 2,352 bytes"):
        load_images(config)
    packed = tmp_path / "binarized_mnist_packbits.npz"
    good = packbits()
    objects = io.BytesIO()
    np.savez(objects, train=np.array([{}]), valid=np.array([{}]), test=np.array([{}]))
    for data in (good[:-30], good[: len(good) // 2], b"", npz(train=BITS[0]), objects.getvalue()):
        packed.write_bytes(data)
        with pytest.raises(InputError, match=r"packbits\.npz: damaged or truncated"):
            load_images(config)
    packed.write_bytes(npz(train=BITS[0][0], valid=BITS[1], test=BITS[2]))
    with pytest.raises(InputError, match=r"packbits\.npz: the arrays must be uint8"):
        load_images(config)
    packed.write_bytes(npz(train=BITS[0], valid=BITS[1], test=BITS[2]))
    with pytest.raises(InputError, match=r"packbits\.npz: expected 7,056 bytes"):
        load_images(config)


# -- CIFAR-10 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["archive", "files", "unpacked"])
def test_cifar10(tmp_path: Path, form: str) -> None:
    if form == "archive":
        put(tmp_path / "cifar10" / "cifar-10-binary.tar.gz", archive())
    else:
        place = tmp_path / ("cifar10" if form == "files" else "cifar-10-batches-bin")
        for file, data in zip(image_sets.CIFAR10_BATCHES, BATCHES, strict=True):
            put(place / file.name, data)
    config = ImageConfig("cifar10", folder=str(tmp_path))
    same(splits(config), [COLOURS[:8], COLOURS[8:10], COLOURS[10:]])
    assert load_images(replace(config, bits=5)).levels == 32
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    shades = (torch.from_numpy(COLOURS[10:].copy()) * weights).sum(1, keepdim=True)
    assert (torch.from_numpy(splits(replace(config, grey=True))[2]) - shades).abs().max() <= 0.5 + 1e-9
    assert len(check("cifar10", tmp_path)) == (1 if form == "archive" else 6)


def test_grey_in_pieces() -> None:
    colours = RANDOM.integers(256, size=(2500, 3, 1, 2), dtype=np.uint8)
    np.testing.assert_array_equal(grey(colours), np.stack([grey(image) for image in colours]))
    assert grey(np.full((3, 1, 1), 255, dtype=np.uint8)).item() == 255
    np.testing.assert_array_equal(grey(colours[:, :1]), colours[:, :1])


def test_cifar10_that_is_none(tmp_path: Path) -> None:
    config = ImageConfig("cifar10", folder=str(tmp_path))
    path = put(tmp_path / "cifar-10-binary.tar.gz", archive()[:-1])
    with pytest.raises(InputError, match=r"tar\.gz: expected"):
        load_images(config)
    path.unlink()
    for file, data in zip(image_sets.CIFAR10_BATCHES, BATCHES, strict=True):
        put(tmp_path / file.name, data)
    path = tmp_path / "data_batch_2.bin"
    for data, message in (
        (BATCHES[1][:-1], "data_batch_2.bin: expected"),
        (BATCHES[1][:-1] + bytes([BATCHES[1][-1] ^ 1]), "not the images of CIFAR-10"),
        (bytes([BATCHES[1][0] ^ 1]) + BATCHES[1][1:], "each class must be there equally often"),
    ):
        path.write_bytes(data)
        for call in (lambda: load_images(config), lambda: check("cifar10", tmp_path)):
            with pytest.raises(InputError, match=message):
                call()


def test_the_subset_of_cifar10(tmp_path: Path) -> None:
    path = put(tmp_path / "cifar10" / "cifar10-subset.npz", subset())
    config = ImageConfig("cifar10-subset", folder=str(tmp_path))
    same(splits(config), [COLOURS[:5], COLOURS[5:7], COLOURS[7:]])
    assert "not comparable" in load_images(config).note
    path.write_bytes(subset()[:-1])
    with pytest.raises(InputError, match=r"subset\.npz: expected"):
        load_images(config)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "binarized_mnist", "cifar10-subset"])
def test_without_files_and_network(tmp_path: Path, name: str) -> None:
    for folder in (None, str(tmp_path)):
        with pytest.raises(InputError, match=r"not in a local folder.*put .* into a folder.*DFLOW_DATA"):
            load_images(ImageConfig(name, folder=folder))


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"valid": 0.1}, "valid"), ({"crop": [2, 2]}, "crop"), ({"continuous": []}, "continuous")],
)
def test_settings_that_a_known_set_has_itself(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"mnist is a known set and takes no {name}"):
        load_images(ImageConfig("mnist", **settings))


# -- the hub ---------------------------------------------------------------------------------------------


def hub_set(column: str, **parts: Any) -> Any:
    """A data set as the hub's client gives it, with images that are files in memory."""
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {column: [Image.fromarray(a) for a in arrays], "label": labels}, features=features
            )
            for name, (arrays, labels) in parts.items()
        }
    )


def fill(hub: dict[str, Any]) -> None:
    pairs = [(d, [int(i) for i in labels]) for d, labels in zip(DIGITS, LABELS, strict=True)]
    hub["ylecun/mnist"] = hub_set("image", train=pairs[0], test=pairs[1])
    images, classes = COLOURS.transpose(0, 2, 3, 1), CLASSES.tolist()
    hub["uoft-cs/cifar10"] = hub_set(
        "img", train=(images[:10], classes[:10]), test=(images[10:], classes[10:])
    )


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_prepare(hub: dict[str, Any], tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="ConnectionError: no network here"):
        prepare(name, tmp_path)
    assert not list(tmp_path.iterdir())
    fill(hub)
    direct = load_images(ImageConfig(name)).checksum
    done = prepare(name, tmp_path)
    hub.clear()
    assert prepare(name, tmp_path) == done == check(name, tmp_path)
    assert {row.name for row in list_sets(tmp_path) if row.state == "found"} == {name}
    assert load_images(ImageConfig(name, folder=str(tmp_path))).checksum == direct
    assert {row.name: row.state for row in list_sets(tmp_path)}["checkerboard"] == "drawn"


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_hub_is_checked_too(hub: dict[str, Any], name: str) -> None:
    fill(hub)
    repository = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}[name]
    train = hub[repository]["train"]
    hub[repository]["train"] = train.select([1, *range(1, len(train))])
    with pytest.raises(InputError, match=r"the hub('s .*)?: (expected|not the images)"):
        load_images(ImageConfig(name))


def test_any_images_of_the_hub(hub: dict[str, Any]) -> None:
    images = RANDOM.integers(256, size=(30, 4, 5, 3), dtype=np.uint8)
    labels = [0] * 30
    chw = images.transpose(0, 3, 1, 2)
    config = ImageConfig("hub:some/one")
    hub["some/one"] = hub_set(
        "photo", test=(images[:5], labels[:5]), val=(images[5:9], labels[5:9]), train=(images[9:], labels[9:])
    )
    same(splits(config), [chw[9:], chw[5:9], chw[:5]])
    with pytest.raises(InputError, match="has a split of its own for valid"):
        load_images(replace(config, valid=0.2))
    hub["some/one"] = hub_set("photo", test=(images[:5], labels[:5]), train=(images[5:], labels[5:]))
    parts = splits(replace(config, valid=0.2))
    assert [len(part) for part in parts] == [20, 5, 5]
    same(parts[2:], [chw[:5]])
    assert "valid dealt" in load_images(config).note
    assert sorted(a.tobytes() for part in parts[:2] for a in part) == sorted(a.tobytes() for a in chw[5:])


def test_a_hub_without_images(hub: dict[str, Any]) -> None:
    images, labels = np.zeros((2, 2, 2), dtype=np.uint8), [0, 0]
    config = ImageConfig("hub:some/one")
    with pytest.raises(InputError, match=r"hub's some/one cannot be had \(ConnectionError"):
        load_images(config)
    hub["some/one"] = hub_set("photo", test=(images, labels))
    with pytest.raises(InputError, match="no split to train on, only test"):
        load_images(config)
    hub["some/one"] = hub_set("photo", train=(images, labels)).remove_columns("photo")
    with pytest.raises(InputError, match="needs one column of images, found none among label"):
        load_images(config)
    features = datasets.Features({"photo": datasets.Image()})
    gap = datasets.Dataset.from_dict({"photo": [None]}, features=features)
    hub["some/one"] = datasets.DatasetDict(train=gap)
    with pytest.raises(InputError, match="train row 0: has no image"):
        load_images(config)
    hub["some/one"] = hub_set("photo", train=(images, labels), test=([], []))
    with pytest.raises(InputError, match="the test split is empty"):
        load_images(config)
    with pytest.raises(InputError, match="hub:OWNER/NAME"):
        load_images(ImageConfig("hub:one"))


# -- folders of images -----------------------------------------------------------------------------------


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = RANDOM.integers(256, size=(20, 3, 4, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        save(tmp_path / "own" / f"{i % 3}" / f"{i:02}.{('png', 'bmp', 'TIFF')[i % 3]}", image)
    put(tmp_path / "own" / "notes.txt", b"no image")
    config = ImageConfig("own", folder=str(tmp_path), valid=0.2, test=0.1)
    parts = splits(config)
    assert [len(part) for part in parts] == [14, 4, 2]
    # The order of the names, within each split; the shuffle is pinned: results depend on it.
    by_name = np.concatenate([images[k::3] for k in range(3)]).transpose(0, 3, 1, 2)
    places = [[int((by_name == image).all((1, 2, 3)).argmax()) for image in part] for part in parts]
    assert places[1:] == [[8, 9, 13, 17], [4, 10]]
    assert places[0] == sorted(set(range(20)) - {*places[1], *places[2]})
    assert "fixed shuffle" in load_images(config).note
    monkeypatch.setenv("DFLOW_DATA", str(tmp_path))
    assert load_images(replace(config, folder=None)).checksum == load_images(config).checksum
    assert load_images(replace(config, name=str(tmp_path / "own"))).shape == (3, 3, 4)


def only(tmp_path: Path, image: Any, name: str = "a.png", **options: Any) -> np.ndarray:
    """The one image of a folder as it is read: three copies, one for each split."""
    folder = tmp_path / "only"
    for i in range(3):
        save(folder / f"{i}{name}", image, **options)
    return splits(ImageConfig(str(folder), valid=0.34, test=0.34))[0][0]


def test_kinds_of_images(tmp_path: Path) -> None:
    colours = RANDOM.integers(256, size=(3, 4, 3), dtype=np.uint8)
    shades = colours[..., 0]
    alpha = np.full((3, 4, 1), 200, dtype=np.uint8)
    chw = colours.transpose(2, 0, 1)
    rgb = Image.fromarray(colours)
    kinds = {
        "L": (shades, shades[None]),
        "RGB": (rgb, chw),
        "RGBA": (np.concatenate([colours, alpha], 2), chw),
        "LA": (Image.merge("LA", [Image.fromarray(shades), Image.fromarray(alpha[..., 0])]), shades[None]),
        "P": (rgb.quantize(12), np.asarray(rgb.quantize(12).convert("RGB")).transpose(2, 0, 1)),
        "1": (Image.fromarray(shades > 99), (shades > 99)[None]),
    }
    for name, (image, expected) in kinds.items():
        np.testing.assert_array_equal(only(tmp_path / name, image), expected)
    assert load_images(ImageConfig(str(tmp_path / "1"), valid=0.34, test=0.34)).levels == 2
    assert only(tmp_path / "jpeg", shades, "a.JPG", quality=100).shape == (1, 3, 4)
    # One bit among eight is black and white.
    save(tmp_path / "L" / "b.png", kinds["1"][0])
    mixed = load_images(ImageConfig(str(tmp_path / "L"), valid=0.26, test=0.26))
    values = torch.cat([part.values for part in (mixed.train, mixed.valid, mixed.test)])
    assert mixed.levels == 256
    assert (values == torch.from_numpy((shades > 99).astype(np.uint8) * 255).flatten()).all(1).any()


def test_tiles_of_images_of_any_size_lie_in_the_split_of_their_image(tmp_path: Path) -> None:
    for i, (h, w) in enumerate([(4, 6), (5, 4), (9, 4), (4, 4)]):
        save(tmp_path / f"{i}.png", (50 * i + np.arange(h)[:, None] * 5 + np.arange(w)).astype(np.uint8))
    config = ImageConfig(str(tmp_path), tiles=[4, 2], valid=0.25, test=0.25)
    data = load_images(config)
    assert data.shape == (1, 4, 2)
    of = [set((part.values // 50).flatten().tolist()) for part in (data.train, data.valid, data.test)]
    assert set.union(*of) == {0, 1, 2, 3}
    assert sum(map(len, of)) == 4
    one = next(part for part, which in zip((data.valid, data.test), of[1:], strict=True))
    (image,) = of[1]
    # Side by side, all that are whole.
    assert one.num_rows == {0: 3, 1: 2, 2: 4, 3: 2}[image]
    first = torch.tensor([5 * i + j for i in range(4) for j in range(2)]) + 50 * image
    assert torch.equal(one.rows(slice(1))[0], first)
    assert torch.equal(one.rows(slice(1, 2))[0], first + 2)
    # By half overlapping where there is to train on them: rows 0, 2, ... and columns 0, 1, 2, ...
    places = {0: 5, 1: 3, 2: 9, 3: 3}
    assert data.train.num_rows == sum(places[i] for i in of[0])
    with pytest.raises(InputError, match=r"tiles=\[5, 4\] are larger than .*0\.png, which has 4 x 6"):
        load_images(replace(config, tiles=[5, 4]))
    with pytest.raises(InputError, match="leave one out"):
        replace(config, crop=[2, 2])


def test_folders_called_train_valid_and_test_are_the_splits(tmp_path: Path) -> None:
    for i, name in enumerate(["train/a", "train/b", "train/deep/c", "test/a"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / f"{name}.png", np.full((2, 2), i, dtype=np.uint8))
    data = load_images(ImageConfig(str(tmp_path), valid=0.4))
    assert (data.train.num_rows, data.valid.num_rows, data.test.num_rows) == (2, 1, 1)
    assert data.test.values.unique().tolist() == [3]
    with pytest.raises(InputError, match="has a split of its own for test"):
        load_images(ImageConfig(str(tmp_path), valid=0.4, test=0.4))
    save(tmp_path / "stray.png", np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(InputError, match=r"stray\.png, beside train, test, may be .* rename it"):
        load_images(ImageConfig(str(tmp_path), valid=0.4))


def test_images_of_unequal_sizes(tmp_path: Path) -> None:
    for i, (h, w) in enumerate([(5, 4), (4, 6), (5, 4), (5, 5)]):
        save(tmp_path / f"{i}.png", (np.arange(h)[:, None] * 10 + np.arange(w)).astype(np.uint8))
    config = ImageConfig(str(tmp_path), valid=0.25, test=0.25)
    with pytest.raises(InputError, match=r"0\.png has 5 x 4 .*1\.png 4 x 6 .*data\.crop"):
        load_images(config)
    with pytest.raises(InputError, match=r"crop=\[5, 4\] is larger than .*1\.png, which has 4 x 6 pixels"):
        load_images(replace(config, crop=[5, 4]))
    parts = np.concatenate(splits(replace(config, crop=[2, 3])))
    assert parts.shape == (4, 1, 2, 3)
    assert sorted(parts[:, 0, 0, 0].tolist()) == [10, 10, 11, 11]
    assert load_images(replace(config, crop=[4, 4], patch=[2, 2])).shape == (1, 2, 2)
    save(tmp_path / "4.png", np.zeros((5, 4, 3), dtype=np.uint8))
    (tmp_path / "1.png").unlink()
    (tmp_path / "3.png").unlink()
    with pytest.raises(InputError, match=r"1 channels, .*4\.png 5 x 4 in 3; set data\.grey to true"):
        load_images(config)
    assert load_images(replace(config, grey=True, valid=0.34, test=0.34)).shape == (1, 5, 4)


def test_the_remedy_is_that_of_what_differs(tmp_path: Path) -> None:
    save(tmp_path / "0.png", np.zeros((5, 4), dtype=np.uint8))
    save(tmp_path / "1.png", np.zeros((6, 4, 3), dtype=np.uint8))
    save(tmp_path / "2.png", np.zeros((6, 4, 3), dtype=np.uint8))
    config = ImageConfig(str(tmp_path), valid=0.34, test=0.34)
    both = r"in 1 channels, .* in 3; set data\.grey to true, .*, and set data\.crop to"
    with pytest.raises(InputError, match=both):
        load_images(config)
    for settings in ({"tiles": [4, 4]}, {"crop": [4, 4]}):
        with pytest.raises(InputError, match=r"; set data\.grey to true, or turn all into colours$"):
            load_images(replace(config, **settings))
        assert load_images(replace(config, grey=True, **settings)).shape == (1, 4, 4)


def test_images_are_turned_as_viewers_show_them(tmp_path: Path) -> None:
    shades = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, kind in enumerate(("png", "webp", "tif")):
        save(tmp_path / f"{i}.{kind}", shades, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    config = ImageConfig(str(tmp_path), valid=0.34, test=0.34, grey=True)
    data = load_images(config)
    assert data.shape == (1, 4, 3)
    for part in splits(config):
        np.testing.assert_array_equal(part[0, 0], np.rot90(shades, -1))
    assert "3 images turned as their EXIF orientation says" in data.note


def test_formats_beside_png(tmp_path: Path) -> None:
    shades = (np.arange(12, dtype=np.uint8) * 9).reshape(3, 4)
    for i, (name, options) in enumerate(
        {"gif": {}, "webp": {"lossless": True}, "pgm": {}, "bmp": {}}.items()
    ):
        save(tmp_path / f"{i}.{name}", shades, **options)
    config = ImageConfig(str(tmp_path), valid=0.25, test=0.25, grey=True)
    for image in np.concatenate(splits(config)):
        np.testing.assert_array_equal(image[0], shades)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    shades = np.arange(12, dtype=np.uint8).reshape(3, 4)
    clear = np.zeros((3, 4, 4), dtype=np.uint8)
    clear[0, 0, 3] = 1
    path = tmp_path / "a.png"
    config = ImageConfig(str(tmp_path))

    def refused(message: str, where: Path = path) -> None:
        with pytest.raises(InputError, match=re.escape(str(where)) + ".*" + message):
            load_images(config)
        where.unlink()

    with pytest.raises(InputError, match=r"holds no image \(\.bmp"):
        load_images(config)
    save(path, shades)
    with pytest.raises(InputError, match=r"1 rows are too few for valid=0\.05 and test=0\.05"):
        load_images(config)
    put(path, path.read_bytes()[:-30])
    refused("damaged, truncated or no picture")
    put(path, b"P")
    refused("damaged, truncated or no picture")
    save(path, clear)
    refused("partly transparent")
    save(path, Image.fromarray(shades), transparency=0)
    refused("partly transparent")
    save(path, shades.astype(np.uint16))
    refused("more than 8 bits a value")
    put(path, deep_png(shades))
    with Image.open(path) as image:
        assert image.mode == "RGB"  # as if it had 8 bits
    refused("more than 8 bits a value")
    save(tmp_path / "b.tif", Image.fromarray(shades), save_all=True, append_images=[Image.fromarray(shades)])
    refused("several pictures", tmp_path / "b.tif")
    save(tmp_path / "b.jpg", Image.new("CMYK", (4, 3)))
    refused("4 channels", tmp_path / "b.jpg")
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    put(path, png.SIGNATURE + png._chunk(b"IHDR", header) + png._chunk(b"IEND", b""))
    refused(r"20,000 x 20,000 pixels, more than 134,217,728")
    put(tmp_path / "a.tif", b"II*\0\x08\0\0\0\xff\xff\0\0")
    refused("a directory beyond the end", tmp_path / "a.tif")
    put(tmp_path / "table.txt", b"x")
    with pytest.raises(InputError, match=r"neither a folder of images nor a \.csv table"):
        load_images(ImageConfig(str(tmp_path / "table.txt")))
    with pytest.raises(InputError, match=r"mnits: neither .* did you mean 'mnist'"):
        load_images(ImageConfig("mnits"))
    with pytest.raises(InputError, match="is a folder of images and takes no continuous"):
        load_images(replace(config, continuous=["a"]))


def deep_png(shades: np.ndarray) -> bytes:
    """16-bit colours as PNG, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    h, w = shades.shape
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in shades)
    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# -- tables ----------------------------------------------------------------------------------------------

TABLE = "age,count, height\n" + "".join(f"{20 + i % 7},{-i},{1.5 + i / 64}\n" for i in range(40))


def table(tmp_path: Path, text: str | bytes, **settings: Any) -> Any:
    path = put(tmp_path / "people.csv", text.encode() if isinstance(text, str) else text)
    return load_images(ImageConfig(str(path), **settings))


def rows(data: Any) -> list[list[float]]:
    return [row for s in (data.train, data.valid, data.test) for row in s.rows(slice(None)).tolist()]


def test_a_mixed_table(tmp_path: Path) -> None:
    data = table(tmp_path, TABLE)
    assert (data.shape, data.columns) == ((3, 1, 1), ("age", "count", "height"))
    assert (data.levels, data.lowest) == ((7, 40, None), (20, -39, None))
    assert data.train.crops(2, 3)[0].dtype == torch.float64
    assert sorted(rows(data)) == sorted([20 + i % 7, -i, 1.5 + i / 64] for i in range(40))
    assert [s.num_rows for s in (data.train, data.valid, data.test)] == [36, 2, 2]
    # A column of integers that is measured, not counted.
    assert table(tmp_path, TABLE, continuous=["count", "height"]).levels == (7, None, None)
    with pytest.raises(InputError, match=r"line 2: 1\.5 in the discrete column 'height' is no integer"):
        table(tmp_path, TABLE, continuous=[])
    with pytest.raises(InputError, match="did you mean 'height'"):
        table(tmp_path, TABLE, continuous=["heigth"])


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 255, torch.uint8), (-1, 255, torch.int16), (-9, 40_000, torch.int32)]
)
def test_a_discrete_table(tmp_path: Path, low: int, high: int, dtype: torch.dtype) -> None:
    text = "a,b\r\n" + "".join(f"{low},{high}.0\r\n{high}, {low}\r\n\r\n" for _ in range(20))
    plain = table(tmp_path, text)
    assert (plain.levels, plain.lowest) == ((high - low + 1,) * 2, (low, low))
    assert plain.train.values.dtype == dtype
    assert sorted(rows(plain)) == [[low, high]] * 20 + [[high, low]] * 20
    path = put(tmp_path / "people.csv.gz", gzip.compress(text.encode()))
    assert load_images(ImageConfig(str(path))).checksum == plain.checksum


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must name the columns"),
        ("1,2\n3,4\n", "first line must name the columns, found '1,2'"),
        ("a,\n3,4\n", "first line must name"),
        ("a,a\n3,4\n", "two columns are called 'a'"),
        ("a,b\n", "no rows"),
        ("a,b\n1,2\n3\n", "line 3: 1 values, and the header names 2 columns"),
        ("a,b\n1,2\n3,\n", "line 3, column 'b': the value is missing"),
        ("a,b\n1,2\n\nnan,1\n", "line 4, column 'a': 'nan' is no finite number"),
        ("a,b\n1,2\n1,inf\n", "line 3, column 'b': 'inf' is no finite"),
        ("a,b\n1,2\n1,two\n", "line 3, column 'b': 'two' is no finite number"),
        ("a,b\n1,2\n1,2000000\n", "line 3: 2000000 in the discrete column 'b' is above 1,048,576"),
        ("a,b\n1,2\n1,2\n", "2 rows are too few"),
        (b"a,b\n1,\xff\n", "not UTF-8 at byte offset 6"),
        ('a,b\n1,"2\n3,4\n', "line 3, column 'b': '2.*' is no finite number"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        table(tmp_path, text)


def test_a_table_has_no_pixels(tmp_path: Path) -> None:
    for settings in ({"bits": 5}, {"patch": [1, 1]}, {"grey": True}):
        with pytest.raises(InputError, match="is a table and takes no"):
            table(tmp_path, TABLE, **settings)


# -- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 0}, "bits=0 must lie in 1..8"),
        ({"bits": 9}, "bits=9 must lie in 1..8"),
        ({"patch": [2]}, r"patch=\[2\] must be"),
        ({"crop": [0, 2]}, r"crop=\[0, 2\] must be"),
        ({"valid": 0}, "valid=0"),
        ({"valid": 0.5, "test": 0.5}, "leave something to train on"),
        ({"pach": [2, 2]}, "did you mean 'patch'"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(ImageConfig, values, "data")


# -- the real files --------------------------------------------------------------------------------------


@pytest.fixture
def real(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.undo()
    return real_data


@pytest.mark.parametrize(
    ("name", "counts", "mean"),
    [
        ("mnist", [50_000, 10_000, 10_000], 33.79),
        ("binarized_mnist", [50_000, 10_000, 10_000], 0.1325),
        ("cifar10", [40_000, 10_000, 10_000], 121.5),
        ("cifar10-subset", [2_800, 200, 500], 121),
    ],
)
def test_real_sets(real: Path, name: str, counts: list[int], mean: float) -> None:
    if image_sets.KNOWN[name].local(real) is None:
        pytest.skip(f"no {name} in {real}")
    images = load_images(ImageConfig(name, folder=str(real)))
    assert [s.num_rows for s in (images.train, images.valid, images.test)] == counts
    assert float(images.test.values.double().mean()) == pytest.approx(mean, rel=0.02)
    assert check(name, real)


def test_real_patches_have_the_known_entropy(real: Path) -> None:
    if image_sets.KNOWN["binarized_mnist"].local(real) is None:
        pytest.skip(f"no binarized_mnist in {real}")
    images = load_images(ImageConfig("binarized_mnist", folder=str(real), patch=[2, 2]))
    entropies = []
    for samples in (images.train, images.valid, images.test):
        p = np.unique(samples.values.numpy(), axis=0, return_counts=True)[1] / samples.num_rows
        entropies.append(-(p * np.log2(p)).sum() / 4)
    assert entropies == pytest.approx([0.7227, 0.7241, 0.7128], abs=1e-4)
