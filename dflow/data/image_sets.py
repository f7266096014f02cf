"""The images that dflow knows by name, and how each is found, fetched, checked and split.

Checksums are of the content, not of how it is packed, so that any packing of the same data passes.
"""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dflow.config import InputError
from dflow.data import files
from dflow.data.arrays import Array, from_npz
from dflow.data.known import KnownFile, KnownSet, from_hub, known_files, set_of_files

#: Bytes of the headers of a few arrays, and what more is read before a wrong file is refused.
_HEADERS = 1 << 20

CHECKERBOARD = "checkerboard"
CHECKERBOARD_NOTE = "(0, 1) or (1, 0), equally likely: exactly 1 bit"


@dataclass(frozen=True, eq=False)
class SplitPixels:
    """Images of three splits, uint8 ``(n, C, H, W)``, in ``depth`` bits; labels of each, uint8 ``(n,)``.

    Images from the user's files have more: ``sources``, the names of the files of each split; ``notes`` for
    the user; ``pooled``, whether the test split is a share of a pool; and ``whole``, all images side by side,
    where those to train on overlap.
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
MNIST = known_files("""
    train-images-idx3-ubyte 47_040_016 md5:6bbc9ace898e44ae57da46a324031adb
    train-labels-idx1-ubyte 60_008 md5:a25bea736e30d166cdddb491f175f624
    t10k-images-idx3-ubyte 7_840_016 md5:2646ac647ad5339dbf082846283269ea
    t10k-labels-idx1-ubyte 10_008 md5:27ae3e4e09519cfbb04c329615203637
""")
#: Images at the end of the training file that validate, of MNIST and of CIFAR-10.
NUM_VALID = 10_000


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


def mnist(idx_files: Sequence[KnownFile], num_valid: int) -> KnownSet[SplitPixels]:
    """MNIST from its four idx files, or from the hub: images of 28 x 28 pixels of 8 bits.

    The last ``num_valid`` images of the training file validate.
    """
    wanted = "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte (or .gz, .xz)"

    def decode(contents: Mapping[KnownFile, bytes]) -> SplitPixels:
        train, train_labels, test, test_labels = map(from_idx, contents.values())
        return _last_validate(train[:, None], test[:, None], train_labels, test_labels, num_valid)

    def read(splits: Any) -> list[bytes]:
        columns = [splits[split][column] for split in ("train", "test") for column in ("image", "label")]
        return [idx(np.array([np.asarray(item) for item in column], np.uint8)) for column in columns]

    def source(folder: Path | None) -> Iterator[tuple[KnownFile, bytes]]:
        return zip(idx_files, from_hub("mnist", wanted, "ylecun/mnist", read), strict=True)

    return set_of_files(
        "mnist",
        [idx_files],
        decode,
        source,
        files=wanted,
        license="CC BY-SA 3.0",
        note="50,000/10,000/10,000 images of digits, 28 x 28, 8 bits",
    )


def _last_validate(
    train: Array, test: Array, train_labels: Array, test_labels: Array, num_valid: int
) -> SplitPixels:
    """Images of which the last ``num_valid`` of the training images validate."""
    labels = train_labels[:-num_valid], train_labels[-num_valid:], test_labels
    return SplitPixels(train[:-num_valid], train[-num_valid:], test, labels=labels)


# -- binarized MNIST -------------------------------------------------------------------------------------


def _bits_of_npz(path: Path, size: int) -> bytes:
    # Packed the pixels take an eighth.
    arrays = from_npz(path, ("train", "valid", "test"), size // 8 + _HEADERS)
    if any(array.ndim != 2 or array.dtype != np.uint8 for array in arrays):
        raise InputError(f"{path}: the arrays must be uint8 (n, 98), eight pixels a byte; replace it")
    return b"".join(np.unpackbits(array, axis=1).tobytes() for array in arrays)


def _bits_of_text(path: Path, size: int) -> bytes:
    # Spaces between the digits, or more.
    digits = files.read(path, limit=4 * size).translate(None, b" \t\r\n")
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
#: As text, one file a split; sizes and digests are of the pixels, a byte each.
BINARIZED_TEXT = known_files(
    """
binarized_mnist_train.amat 39_200_000 sha256:43490d4d6ac9002727af4426d8748609fdb7e4094fa65ad8d681ea60082a7a5a
binarized_mnist_valid.amat 7_840_000 sha256:069b4f0beb389b776478c3e872b4df71c95ac4be64d7cbe6d32e24ebac8e6d5e
binarized_mnist_test.amat 7_840_000 sha256:ca0294c3b8d984c7a1dc891015a8eea6f37bae59a34e35ea0fc8c47110a8dd86
    """,
    _bits_of_text,
)
#: Eight pixels a byte, by `numpy.packbits`; the digest is of the pixels of all splits.
[BINARIZED_BITS] = known_files(
    """
binarized_mnist_packbits.npz 54880000 sha256:07ad6da6ba6894a550cb68ae290ff3deb006a01f6b6ce1b3123edec502f1fce8
    """,
    _bits_of_npz,
)


def binarized_mnist(bits: KnownFile, texts: Sequence[KnownFile]) -> KnownSet[SplitPixels]:
    """MNIST binarized once and for all (Larochelle and Murray 2011), 0 and 1, and split by its authors.

    It is read from one file of bits, or from a text file a split; the test rows are sorted by class.
    """
    valid, test, _ = np.cumsum([file.size // 784 for file in texts])

    def decode(contents: Mapping[KnownFile, bytes]) -> SplitPixels:
        images = np.frombuffer(b"".join(contents.values()), np.uint8).reshape(-1, 1, 28, 28)
        return SplitPixels(images[:valid], images[valid:test], images[test:], depth=1)

    return set_of_files(
        "binarized_mnist",
        ([bits], texts),
        decode,
        files=_BINARIZED,
        license="CC BY-SA 3.0",
        note="MNIST binarized by Larochelle, 50,000/10,000/10,000; test rows are sorted by class",
    )


# -- CIFAR-10 --------------------------------------------------------------------------------------------


def _as_it_lies(path: Path, size: int) -> bytes:
    return path.read_bytes()


#: The archive of the binary version; size and digest are of the archive as it lies.
[CIFAR10] = known_files(
    "cifar-10-binary.tar.gz 170_052_171 md5:c32a1d4ab5d03f1284b67883e8d87530", _as_it_lies
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
[SUBSET] = known_files("""
    cifar10-subset.npz 9_923_347 sha256:4f7109c02e9e0735c6078284a23c507abdf3ed803d6cdc61d6eaaf05df48e799
""")
#: Images at the end of the subset's training images that validate.
SUBSET_NUM_VALID = 200


def cifar10(
    archive: KnownFile, batches: Sequence[KnownFile], sums: tuple[int, ...], num_valid: int
) -> KnownSet[SplitPixels]:
    """CIFAR-10 from its archive, from the six files in it, or from the hub: 3 x 32 x 32 pixels of 8 bits.

    The last ``num_valid`` images of the training files validate, as in arXiv 2001.11235. The pickled version
    is not read: a pickle can run code.
    """
    wanted = f"{archive.name} of https://www.cs.toronto.edu/~kriz/cifar.html"

    def decode(contents: Mapping[KnownFile, bytes]) -> SplitPixels:
        if archive in contents:
            with tarfile.open(fileobj=io.BytesIO(contents[archive]), mode="r:gz") as tar:
                members = (tar.extractfile(f"cifar-10-batches-bin/{file.name}") for file in batches)
                data = [member.read() for member in members if member]
        else:
            data = list(contents.values())
        train, test = _records(b"".join(data[:-1])), _records(data[-1])
        _check_cifar10(train, test, sums)
        images, test_images = (records[:, 1:].reshape(-1, 3, 32, 32) for records in (train, test))
        return _last_validate(images, test_images, train[:, 0], test[:, 0], num_valid)

    def read(splits: Any) -> bytes:
        return b"".join(
            bytes([label]) + np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).tobytes()
            for split in ("train", "test")
            for image, label in zip(splits[split]["img"], splits[split]["label"], strict=True)
        )

    def source(folder: Path | None) -> Iterator[tuple[KnownFile, bytes]]:
        records = io.BytesIO(from_hub("cifar10", wanted, "uoft-cs/cifar10", read))
        return ((file, records.read(file.size)) for file in batches)

    return set_of_files(
        "cifar10",
        ([archive], batches),
        decode,
        source,
        ["cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"],
        files=wanted,
        license="none stated",
        note="40,000/10,000/10,000 colour images, 32 x 32, 8 bits",
    )


def _records(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8).reshape(-1, _RECORD)


def _check_cifar10(train: Array, test: Array, expected: tuple[int, ...]) -> None:
    """Raise `InputError` unless sums and classes are those of CIFAR-10."""
    sums = tuple(int(train[:, 1 + 1024 * c :][:, :1024].sum(dtype=np.int64)) for c in range(3))
    balanced = all(np.ptp(np.bincount(records[:, 0], minlength=10)) == 0 for records in (train, test))
    if sums != expected or not balanced:
        raise InputError(
            f"not the images of CIFAR-10: the training pixels add up to {sums}, expected {expected}, and "
            "each class must be there equally often; fetch the files again"
        )


def cifar10_subset(file: KnownFile, num_valid: int) -> KnownSet[SplitPixels]:
    """3,500 images of CIFAR-10 in one file: *not* comparable with published figures of CIFAR-10."""

    def decode(contents: Mapping[KnownFile, bytes]) -> SplitPixels:
        arrays = np.load(io.BytesIO(contents[file]))
        train, test = (arrays[name].transpose(0, 3, 1, 2) for name in ("x_train", "x_valid"))
        return SplitPixels(train[:-num_valid], train[-num_valid:], test)

    return set_of_files(
        "cifar10-subset",
        [[file]],
        decode,
        folders=["cifar10"],
        files="cifar10-subset.npz (uint8 x_train, x_valid)",
        license="none stated",
        note="2,800/200/500 images of CIFAR-10; not comparable with published figures of CIFAR-10",
    )


# -- the table -------------------------------------------------------------------------------------------

#: Images by name.
KNOWN: dict[str, KnownSet[SplitPixels]] = {
    data_set.name: data_set
    for data_set in (
        mnist(MNIST, NUM_VALID),
        binarized_mnist(BINARIZED_BITS, BINARIZED_TEXT),
        cifar10(CIFAR10, CIFAR10_BATCHES, CIFAR10_SUMS, NUM_VALID),
        cifar10_subset(SUBSET, SUBSET_NUM_VALID),
    )
}
