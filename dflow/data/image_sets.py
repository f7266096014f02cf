"""The images that dflow knows by name, and how each is found, fetched, checked and split.

- ``mnist``: the four idx files; 50,000 / 10,000 / 10,000 images of 28 x 28 pixels of 8 bits; the last 10,000
  of the training file validate.
- ``binarized_mnist``: MNIST binarized once and for all (Larochelle and Murray 2011), 0 and 1, split
  50,000 / 10,000 / 10,000 by its authors; the test rows are sorted by class.
- ``cifar10``: the binary version, 40,000 / 10,000 / 10,000 images of 3 x 32 x 32 pixels of 8 bits as in
  arXiv 2001.11235; the last 10,000 of the training files validate. The pickled version is not read: a pickle
  can run code.
- ``cifar10-subset``: 3,000 and 500 images of CIFAR-10 in a ``.npz`` file; *not* comparable with published
  figures of CIFAR-10.

Checksums are of the content, not of how it is packed, so that any packing of the same data passes.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflow.config import InputError
from dflow.data import files
from dflow.data.arrays import from_npz
from dflow.data.known import KnownFile, KnownSet, find_all, from_hub

Array = NDArray[Any]
#: Bytes of the headers of a few arrays, and what more is read before a wrong file is refused.
_HEADERS = 1 << 20

CHECKERBOARD = "checkerboard"
CHECKERBOARD_NOTE = "(0, 1) or (1, 0), equally likely: exactly 1 bit"


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images of three splits, uint8 ``(n, C, H, W)``, in ``depth`` bits; labels of each, uint8 ``(n,)``.

    Of the user's own images also the names of their files, notes for the user, whether the test split is a
    share that was dealt, and where those to train on overlap all of them side by side.
    """

    train: Array
    valid: Array
    test: Array
    depth: int = 8
    labels: tuple[Array, Array, Array] | None = None
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pooled: bool = False
    whole: Array | None = None


# -- MNIST -----------------------------------------------------------------------------------------------

#: Images and labels to train on, images and labels to test.
MNIST = (
    KnownFile("train-images-idx3-ubyte", 47_040_016, "md5:6bbc9ace898e44ae57da46a324031adb"),
    KnownFile("train-labels-idx1-ubyte", 60_008, "md5:a25bea736e30d166cdddb491f175f624"),
    KnownFile("t10k-images-idx3-ubyte", 7_840_016, "md5:2646ac647ad5339dbf082846283269ea"),
    KnownFile("t10k-labels-idx1-ubyte", 10_008, "md5:27ae3e4e09519cfbb04c329615203637"),
)
#: Images at the end of the training file that validate, of MNIST and of CIFAR-10.
LAST = 10_000


def idx(array: Array) -> bytes:
    """An array of uint8 as an idx file: two zeros, 8, number of axes, their sizes, the values.

    >>> idx(np.array([[7, 8]], dtype=np.uint8)).hex(" ", -4)
    '00000802 00000001 00000002 0708'
    """
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def from_idx(data: bytes) -> Array:
    """The array of a verified idx file of uint8."""
    ndim = data[3]
    sizes = struct.unpack_from(f">{ndim}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(sizes)


def _mnist_local(folder: Path | None) -> dict[Path, KnownFile] | None:
    return find_all(MNIST, folder, "mnist")


def _mnist_bytes(folder: Path | None) -> list[bytes]:
    if local := _mnist_local(folder):
        return [file.read(path) for path, file in local.items()]

    def read(splits: Any) -> list[bytes]:
        return [
            idx(np.array([np.asarray(item) for item in splits[split][column]], dtype=np.uint8))
            for split in ("train", "test")
            for column in ("image", "label")
        ]

    found = from_hub("mnist", KNOWN["mnist"].files, "ylecun/mnist", read)
    return [file.verify(data, f"the hub's {file.name}") for file, data in zip(MNIST, found, strict=True)]


def _mnist_fetch(folder: Path | None) -> dict[str, bytes]:
    return {
        f"mnist/{file.name}.gz": gzip.compress(data, mtime=0)
        for file, data in zip(MNIST, _mnist_bytes(folder), strict=True)
    }


def _mnist_read(folder: Path | None) -> Pixels:
    train, train_labels, test, test_labels = map(from_idx, _mnist_bytes(folder))
    return _last_validate(train[:, None], test[:, None], train_labels, test_labels)


def _last_validate(train: Array, test: Array, train_labels: Array, test_labels: Array) -> Pixels:
    labels = train_labels[:-LAST], train_labels[-LAST:], test_labels
    return Pixels(train[:-LAST], train[-LAST:], test, labels=labels)


# -- binarized MNIST -------------------------------------------------------------------------------------


def _bits_of_npz(path: Path) -> bytes:
    # Packed the pixels take an eighth.
    arrays = from_npz(path, ("train", "valid", "test"), BINARIZED_BITS.size // 8 + _HEADERS)
    if any(array.ndim != 2 or array.dtype != np.uint8 for array in arrays):
        raise InputError(f"{path}: the arrays must be uint8 (n, 98), eight pixels a byte; replace it")
    return b"".join(np.unpackbits(array, axis=1).tobytes() for array in arrays)


def _bits_of_text(path: Path) -> bytes:
    # Spaces between the digits, or more.
    digits = files.read(path, limit=4 * BINARIZED_TEXT[0].size).translate(None, b" \t\r\n")
    if strange := digits.translate(None, b"01"):
        raise InputError(
            f"{path}: holds {strange[:1]!r}, and a file of binarized MNIST holds 0 and 1 with spaces "
            f"between; put {_BINARIZED} there"
        )
    return digits.translate(bytes.maketrans(b"01", b"\0\1"))


_BINARIZED = (
    "binarized_mnist_{train,valid,test}.amat of http://www.cs.toronto.edu/~larocheh/public/datasets/"
    "binarized_mnist (or .xz, .gz), or binarized_mnist_packbits.npz,"
)
#: As text, one file a split.
BINARIZED_TEXT = (
    KnownFile(
        "binarized_mnist_train.amat",
        39_200_000,
        "sha256:43490d4d6ac9002727af4426d8748609fdb7e4094fa65ad8d681ea60082a7a5a",
        _bits_of_text,
    ),
    KnownFile(
        "binarized_mnist_valid.amat",
        7_840_000,
        "sha256:069b4f0beb389b776478c3e872b4df71c95ac4be64d7cbe6d32e24ebac8e6d5e",
        _bits_of_text,
    ),
    KnownFile(
        "binarized_mnist_test.amat",
        7_840_000,
        "sha256:ca0294c3b8d984c7a1dc891015a8eea6f37bae59a34e35ea0fc8c47110a8dd86",
        _bits_of_text,
    ),
)
#: Eight pixels a byte, by `numpy.packbits`; the digest is of the pixels of all splits.
BINARIZED_BITS = KnownFile(
    "binarized_mnist_packbits.npz",
    54_880_000,
    "sha256:07ad6da6ba6894a550cb68ae290ff3deb006a01f6b6ce1b3123edec502f1fce8",
    _bits_of_npz,
)


def _binarized_local(folder: Path | None) -> dict[Path, KnownFile] | None:
    under = "binarized_mnist"
    return find_all([BINARIZED_BITS], folder, under) or find_all(BINARIZED_TEXT, folder, under)


def _binarized_read(folder: Path | None) -> Pixels:
    local = _binarized_local(folder)
    if local is None:
        raise _not_there("binarized_mnist")
    pixels = b"".join(file.read(path) for path, file in local.items())
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 1, 28, 28)
    first, second, _ = np.cumsum([file.size // 784 for file in BINARIZED_TEXT])
    return Pixels(images[:first], images[first:second], images[second:], depth=1)


# -- CIFAR-10 --------------------------------------------------------------------------------------------

#: The archive of the binary version; size and digest are of the archive as it lies.
CIFAR10 = KnownFile(
    "cifar-10-binary.tar.gz", 170_052_171, "md5:c32a1d4ab5d03f1284b67883e8d87530", Path.read_bytes
)
_RECORD = 1 + 3 * 32 * 32
#: The files in the archive: records of a label and an image.
CIFAR10_BATCHES = tuple(
    KnownFile(name, 10_000 * _RECORD, "")
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
)
#: Sums of the red, green and blue values of all training images: 50,000 * 1,024 times the published means
#: 125.306918046875, 122.950394140625 and 113.86538318359375.
CIFAR10_SUMS = (6_415_714_204, 6_295_060_180, 5_829_907_619)
SUBSET = KnownFile(
    "cifar10-subset.npz", 9_923_347, "sha256:4f7109c02e9e0735c6078284a23c507abdf3ed803d6cdc61d6eaaf05df48e799"
)
#: Images at the end of the subset's training images that validate.
SUBSET_LAST = 200


def _cifar_local(folder: Path | None) -> dict[Path, KnownFile] | None:
    return find_all([CIFAR10], folder, "cifar10") or find_all(
        CIFAR10_BATCHES, folder, "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"
    )


def _cifar_batches(folder: Path | None) -> list[bytes]:
    """The content of the six files; of files outside the archive, what is known of the images is checked."""
    local = _cifar_local(folder)
    if local and CIFAR10 in local.values():
        [path] = local
        with tarfile.open(fileobj=io.BytesIO(CIFAR10.read(path)), mode="r:gz") as archive:
            members = (archive.extractfile(f"cifar-10-batches-bin/{file.name}") for file in CIFAR10_BATCHES)
            return [member.read() for member in members if member]
    if local:
        return _genuine([file.read(path) for path, file in local.items()], str(next(iter(local)).parent))

    def read(splits: Any) -> list[bytes]:
        records = b"".join(
            bytes([label]) + np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).tobytes()
            for split in ("train", "test")
            for image, label in zip(splits[split]["img"], splits[split]["label"], strict=True)
        )
        sizes = [file.size for file in CIFAR10_BATCHES]
        starts = np.cumsum([0, *sizes])
        return [records[a : a + size] for a, size in zip(starts, sizes, strict=False)]

    found = from_hub("cifar10", KNOWN["cifar10"].files, "uoft-cs/cifar10", read)
    for file, data in zip(CIFAR10_BATCHES, found, strict=True):
        file.verify(data, f"the hub's {file.name}")
    return _genuine(found, "the hub's uoft-cs/cifar10")


def _genuine(batches: list[bytes], source: str) -> list[bytes]:
    """``batches``, unchanged, if sums and classes are those of CIFAR-10."""
    records = _records(b"".join(batches[:-1]))
    sums = tuple(int(records[:, 1 + 1024 * c :][:, :1024].sum(dtype=np.int64)) for c in range(3))
    balanced = all(
        np.ptp(np.bincount(part[:, 0], minlength=10)) == 0 for part in (records, _records(batches[-1]))
    )
    if sums != CIFAR10_SUMS or not balanced:
        raise InputError(
            f"{source}: not the images of CIFAR-10: the training pixels add up to {sums}, expected "
            f"{CIFAR10_SUMS}, and each class must be there equally often; fetch {CIFAR10.name} again"
        )
    return batches


def _records(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8).reshape(-1, _RECORD)


def _cifar_fetch(folder: Path | None) -> dict[str, bytes]:
    batches = _cifar_batches(folder)
    return {f"cifar10/{file.name}": data for file, data in zip(CIFAR10_BATCHES, batches, strict=True)}


def _cifar_read(folder: Path | None) -> Pixels:
    *batches, test = map(_records, _cifar_batches(folder))
    train = np.concatenate(batches)
    images, of_test = (records[:, 1:].reshape(-1, 3, 32, 32) for records in (train, test))
    return _last_validate(images, of_test, train[:, 0], test[:, 0])


def _subset_local(folder: Path | None) -> dict[Path, KnownFile] | None:
    return find_all([SUBSET], folder, "cifar10")


def _subset_read(folder: Path | None) -> Pixels:
    local = _subset_local(folder)
    if local is None:
        raise _not_there("cifar10-subset")
    [path] = local
    SUBSET.read(path)
    arrays = from_npz(path, ("x_train", "x_valid"), 3500 * 3 * 32 * 32 + _HEADERS)
    train, test = (array.transpose(0, 3, 1, 2) for array in arrays)
    return Pixels(train[:-SUBSET_LAST], train[-SUBSET_LAST:], test)


# -- the table -------------------------------------------------------------------------------------------


def _not_there(name: str) -> InputError:
    return InputError(
        f"{name}: not in a local folder, and it is on no hub; put {KNOWN[name].files} into a folder and name "
        "it with the setting 'folder' or the environment variable DFLOW_DATA"
    )


def _unpublished(name: str) -> dict[str, bytes]:
    raise _not_there(name)


#: Images by name.
KNOWN: dict[str, KnownSet[Pixels]] = {
    known.name: known
    for known in (
        KnownSet(
            name="mnist",
            read=_mnist_read,
            local=_mnist_local,
            fetch=_mnist_fetch,
            files="{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte (or .gz, .xz)",
            license="CC BY-SA 3.0",
            note="50,000/10,000/10,000 images of digits, 28 x 28, 8 bits",
        ),
        KnownSet(
            name="binarized_mnist",
            read=_binarized_read,
            local=_binarized_local,
            fetch=lambda folder: _unpublished("binarized_mnist"),
            files=_BINARIZED,
            license="CC BY-SA 3.0",
            note="MNIST binarized by Larochelle, 50,000/10,000/10,000; test rows are sorted by class",
            published=False,
        ),
        KnownSet(
            name="cifar10",
            read=_cifar_read,
            local=_cifar_local,
            fetch=_cifar_fetch,
            files="cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html",
            license="none stated",
            note="40,000/10,000/10,000 colour images, 32 x 32, 8 bits",
        ),
        KnownSet(
            name="cifar10-subset",
            read=_subset_read,
            local=_subset_local,
            fetch=lambda folder: _unpublished("cifar10-subset"),
            files="cifar10-subset.npz (uint8 x_train, x_valid)",
            license="none stated",
            note="2,800/200/500 images of CIFAR-10; not comparable with published figures of CIFAR-10",
            published=False,
        ),
    )
}
