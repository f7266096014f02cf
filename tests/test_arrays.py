"""Arrays in files: every number of every layout, and one error that names the file for all else."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflow import cli, hf
from dflow.compress import pixels
from dflow.config import InputError
from dflow.data import files
from dflow.data.arrays import from_npy, from_npz


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def with_header(header: str, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header) + 1)
    return b"\x93NUMPY" + version + size + header.encode() + b"\n" + body


GRID = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("dtype", ["|u1", "|i1", ">u2", "<u2", ">i4", "<i8", ">f4", "<f8", "<f2", "|b1"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (24,), (6, 4), ()])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_of_every_layout(dtype: str, shape: tuple[int, ...], order: str) -> None:
    array = GRID.reshape(shape) if shape else np.array(7)
    array = np.asarray(array, dtype=dtype, order=order)  # type: ignore[call-overload]
    found = from_npy(npy(array), "a.npy")
    assert (found.shape, found.dtype) == (shape, np.dtype(dtype).newbyteorder("="))
    assert np.array_equal(found, array)
    assert found.flags.c_contiguous


def test_headers_of_older_and_longer_forms() -> None:
    body = bytes(range(4))
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2), }"
    assert from_npy(with_header(header, body, b"\2\0"), "a").tolist() == [[0, 1], [2, 3]]
    # Python 2 wrote long integers.
    assert from_npy(with_header(header.replace("(2, 2)", "(2L, 2L)"), body), "a").shape == (2, 2)
    assert from_npy(npy(np.empty((0, 3), np.uint8)), "a").shape == (0, 3)


SHORT = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged, truncated or no array"),
        (b"\x89PNG\r\n\x1a\n", "damaged, truncated or no array"),
        (npy(GRID)[:60], "damaged, truncated or no array"),
        (with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2),}}", bytes(4)), "no array"),
        (with_header(SHORT % ("4," * 9000)), "no array"),
        (with_header("(" * 9000), "no array"),
        (with_header(SHORT % "1 << 40, 2", bytes(4)), "no array"),
        (with_header(SHORT % "4, 4", bytes(8)), r"8 bytes follow its header, which says 16 .*truncated"),
        (with_header(SHORT % "1099511627776, 4", b"abc"), "3 bytes follow.*truncated or damaged"),
        (with_header(SHORT % "4611686018427387904, 4, 4", b""), "0 bytes follow"),
        (
            with_header(SHORT % "2, 2", bytes(8)),
            "8 bytes follow its header, which says 4.*each array to its own",
        ),
        (with_header(SHORT % "True, 4", bytes(4)), "damaged, its header says that it is of shape"),
        (with_header(SHORT % "-2, -2", bytes(4)), "damaged, its header says that it is of shape"),
        (npy(np.array([{}, 1]), allow_pickle=True), "no array of numbers but one of object"),
        (npy(np.zeros(2, [("a", "u1"), ("b", "<f4")])), "no array of numbers"),
        (npy(np.array(["a", "bc"])), "but one of <U2"),
        (npy(np.array([1j])), "but one of complex128"),
        (npy(np.array(["2020-01-01"], "M8[D]")), "no array of numbers"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_what_is_no_array_of_numbers_is_refused(data: bytes, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"^x/a.npy: .*{message}"):
            from_npy(data, "x/a.npy")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_archives_are_read_up_to_their_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=GRID.astype(">u2"), y=GRID)
    x, y = from_npz(path, ("x", "y"), 1 << 12)
    assert np.array_equal(x, GRID)
    assert np.array_equal(y, GRID)
    with pytest.raises(InputError, match=r"a\.npz: .*without the arrays x, z"):
        from_npz(path, ("x", "z"), 1 << 12)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(np.zeros(1 << 24, np.uint8)))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.npz: .*more than the 4,096 bytes"):
        from_npz(path, ("x",), 1 << 12)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()
    with pytest.raises(InputError, match="an archive of arrays"):
        from_npy(path.read_bytes(), "named.npy")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_packed_files_are_unpacked_up_to_a_limit(suffix: str, tmp_path: Path) -> None:
    import lzma

    path = tmp_path / f"a{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    path.write_bytes(pack(bytes(1 << 25)))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"expected 1,000 bytes, found more"):
        files.read(path, limit=1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    assert files.read(path, limit=1 << 25) == files.read(path) == bytes(1 << 25)


# -- pictures in arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16, 3), (16, 9, 4), (5, 5, 1), (640, 480, 2)])
def test_an_array_that_may_be_one_picture_or_many_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    array = np.zeros(shape, np.uint8)
    np.save(path, array)
    a, b, c = shape
    with pytest.raises(
        InputError, match=rf"a\.npy: .*one picture of {c} channels or {a} grey pictures of {b} x"
    ):
        pixels.read(path)
    # Both ways out are taken as they say.
    np.save(path, array[None])
    assert pixels.read(path).form.full == (1, a, b, c)
    np.save(path, array[..., None])
    assert pixels.read(path).form.full == (a, b, c, 1)


@pytest.mark.parametrize("shape", [(3, 16, 16), (100, 4, 4), (2, 3, 4), (7, 8, 5), (12, 3)])
def test_other_arrays_are_grey_pictures(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(shape, np.uint8))
    assert pixels.read(tmp_path / "a.npy").form.dims == shape


@pytest.mark.parametrize("dtype", ["|u1", ">u2", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_value_of_an_array_comes_back(dtype: str, order: str, tmp_path: Path) -> None:
    array = np.asarray(np.arange(240).reshape(5, 6, 8), dtype=dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", array)
    found = np.load(io.BytesIO(pixels.write(pixels.read(tmp_path / "a.npy"))))
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("dtype", ["|i1", "<i2", ">i2", "<i4", "<f4", "<f2", ">f8"])
def test_an_array_of_another_type_is_saved_by_its_bits(dtype: str, tmp_path: Path) -> None:
    array, path = np.arange(-40, 40).reshape(8, 10).astype(dtype), tmp_path / "a.npy"
    np.save(path, array)
    with pytest.raises(
        InputError, match=r"a\.npy: .*only uint8 and uint16.*array\.view\(numpy\.uint(8|16)\)"
    ) as told:
        pixels.read(path)
    view = np.uint8 if "numpy.uint8" in str(told.value) else np.uint16
    # The way out is taken as it says, and gives every value back.
    np.save(path, array.view(view))
    back = np.load(io.BytesIO(pixels.write(pixels.read(path))))
    assert np.array_equal(back.view(array.dtype), array)


@pytest.mark.parametrize(
    ("dtype", "top", "name"), [("?", 1, "uint8"), ("<i8", 255, "uint8"), ("<i4", 256, "uint16")]
)
def test_whole_numbers_that_fit_are_saved_as_such(dtype: str, top: int, name: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, top]], dtype))
    with pytest.raises(InputError, match=rf"array\.astype\(numpy\.{name}\)"):
        pixels.read(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"a\.npz: an archive of arrays"):
        pixels.read(tmp_path / "a.npz")


# -- weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    settings = {"shape": [1, 4, 4], "levels": [4], "num_levels": 1, "num_flows": 1, "hidden_size": 8}
    model = hf.DflowImageModel(hf.DflowImageConfig(family="integer", **settings))
    hf.save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "model" / "manifest.json").unlink()
    np.save(tmp_path / "a.npy", np.ones((4, 4), np.uint8))
    place, output = str(tmp_path / "model"), str(tmp_path / "out")
    for argv in (
        ["generate", "--model", place, "--output", f"{output}.csv"],
        ["evaluate", "--model", place, "--data", "checkerboard"],
        ["compress", str(tmp_path / "a.npy"), "--model", place, "-o", f"{output}.dfl"],
        ["compare", "--codec", str(tmp_path / "a.npy"), "--model", place],
    ):
        assert cli.main(argv) == 2, argv
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {file}: {name} holds values that are not finite"), argv
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("size", [0, 5, 8, 200, -1])
def test_truncated_weights_are_refused(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"shape": [1, 4, 4], "levels": [4], "num_levels": 1, "num_flows": 1, "hidden_size": 8}
    hf.save(hf.DflowImageModel(hf.DflowImageConfig(family="integer", **settings)), tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert cli.main(["generate", "--model", str(tmp_path / "model")]) == 2
    assert "model.safetensors: truncated or damaged" in capsys.readouterr().err
