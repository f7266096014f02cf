"""Codecs beside each other: every file is decoded, what is missing is said, figures are right."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import write_model, write_text
from PIL import Image
from tiny import SETTINGS

from dflow import cli, hf
from dflow.compare import codecs, peers
from dflow.compare.codecs import CodecComparison, compare_codecs, pictures, texts
from dflow.compare.peers import Codec, Unavailable, picture_codecs, raw_codecs, text_codecs
from dflow.compare.runner import CodecClock, CodecRow, ModelCodec, sheet
from dflow.config import InputError
from dflow.data import image_sets

RNG = np.random.default_rng(0)


def slope(*shape: int, dtype: Any = np.uint8, top: int = 256) -> Any:
    """A smooth picture with some noise."""
    base = sum(
        np.arange(n).reshape([-1 if i == k else 1 for k in range(len(shape))]) for i, n in enumerate(shape)
    )
    return ((3 * base + RNG.integers(0, 5, shape)) % top).astype(dtype)


PICTURES = {
    "grey": slope(17, 12),
    "colour": slope(9, 14, 3),
    "grey colours": np.repeat(slope(8, 8, 1), 3, -1),
    "one pixel": np.full((1, 1), 7, np.uint8),
    "one colour": np.full((5, 4, 3), 200, np.uint8),
    "black and white": slope(16, 16) // 128 * np.uint8(255),
    "bits": slope(16, 16) % np.uint8(2),
    "few colours": np.eye(3, dtype=np.uint8)[RNG.integers(0, 3, (12, 12))] * np.uint8(255),
    "clear": slope(6, 7, 4),
    "16 bits": slope(10, 11, dtype=np.uint16, top=60000),
    "16 bits alike": slope(10, 11).astype(np.uint16) * np.uint16(257),
    "16 bit colours": slope(6, 5, 3, dtype=np.uint16, top=60000),
}


def ids(codec: Codec[Any]) -> str:
    return f"{codec.name} {codec.settings}"


def available(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Unavailable as error:
        if "takes no" in str(error):
            return None
        pytest.skip(str(error))


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("codec", [*picture_codecs(), *raw_codecs()], ids=ids)
def test_pictures_come_back(codec: Codec[Any], name: str) -> None:
    picture = PICTURES[name]
    data = available(lambda: codec.encode(picture))
    if data is None:
        assert picture.dtype == np.uint16
        assert codec.name in ("WebP", "PNG", "PNG optimised")
        return
    back = codec.decode(data, picture[:0])
    assert back.dtype == picture.dtype
    assert np.array_equal(back, picture)


@pytest.mark.parametrize("text", [b"", b"a", b"a text " * 500, bytes(range(256)) * 8], ids=len)
@pytest.mark.parametrize("codec", text_codecs(), ids=ids)
def test_texts_come_back(codec: Codec[bytes], text: bytes) -> None:
    data = available(lambda: codec.encode(text))
    assert codec.decode(data, b"") == text


def test_codecs_are_at_their_best_settings() -> None:
    """Bytes of the command-line tools' best levels, which are known for Python's own."""
    text = bytes(RNG.choice([*b"etaoin shrdlu"], 20_000).astype(np.uint8))
    found = {codec.name: len(codec.encode(text)) for codec in text_codecs() if not codec.library}
    assert found["gzip"] == len(gzip.compress(text, 9))
    assert found["bzip2"] == len(bz2.compress(text, 9))
    assert found["xz"] == len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    names = {(codec.name, codec.settings) for codec in (*text_codecs(), *picture_codecs())}
    assert {("JPEG XL", f"lossless, effort {e}") for e in (7, 9, 10)} <= names
    assert {"zstd", "brotli", "PPMd", "WebP", "JPEG 2000", "JPEG-LS", "PNG optimised"} <= {
        n for n, _ in names
    }


# Figures


def stored(name: str = "stored", library: str = "", size: int = 0) -> Codec[Any]:
    """Bytes as they are, and so many more."""

    def encode(item: Any) -> bytes:
        return (item if isinstance(item, bytes) else item.tobytes()) + bytes(size)

    def decode(data: bytes, like: Any) -> Any:
        data = data[: len(data) - size]
        if isinstance(like, bytes):
            return data
        return np.frombuffer(data, like.dtype).reshape(-1, *like.shape[1:])

    return Codec(name, "as it is", library, encode, decode)


def rows_of(found: CodecComparison, how: str) -> list[CodecRow]:
    return [row for row in found.rows if (row.how == "each") == (how == "each")]


def test_figures_are_those_of_the_bytes() -> None:
    stack = [slope(4, 6) for _ in range(5)]
    found = compare_codecs(pictures("p", stack), codecs=[stored(), stored("more", size=3)], rounds=2)
    plain, more = rows_of(found, "each")
    assert (plain.bytes, plain.bits, plain.ratio, plain.rounds) == (120, 8, 1, 2)
    assert (more.bytes, more.bits, more.ratio) == (135, 9, 120 / 135)
    assert (found.raw, found.units, found.unit, found.items) == (120, 120, "dimension", 5)
    together = {row.name: row for row in rows_of(found, "together")}
    assert together["stored"].bytes == 120
    assert together["stored"].how == "together, column"  # a sheet has an empty place
    assert together["more"].bytes == 123
    assert together["xz"].settings.endswith("of the raw values")
    assert all(row.encode > 0 and row.decode > 0 for row in found.rows if row.error is None)


def test_raw_bytes_are_those_of_the_depth() -> None:
    bits = pictures("b", [np.eye(8, dtype=np.uint8)], depth=1)
    [row] = compare_codecs(bits, codecs=[stored()], rounds=1).rows
    assert (bits.raw, row.bits, row.ratio) == (8, 8, 1 / 8)


def test_units_of_texts() -> None:
    assert (texts("t", ["é".encode(), b"ab"]).units, texts("t", [b"ab"]).unit) == (3, "character")
    other = texts("t", [b"\xff\xfe", b"ab"])
    assert (other.units, other.unit) == (4, "byte")
    found = compare_codecs(texts("t", [b"ab", b"cde"]), codecs=[stored(size=1)], rounds=1)
    assert [(row.how, row.bytes) for row in found.rows] == [("each", 7), ("together", 6)]
    [row] = compare_codecs(texts("t", [b"ab"]), codecs=[stored()], rounds=1).rows
    assert row.how == "each"  # one file is all of them
    [row] = compare_codecs(texts("t", [b"ab"]), codecs=[stored()], rounds=1, each=False).rows
    assert row.how == "together"


def test_shapes_are_put_together_each_by_itself() -> None:
    seen = []
    codec = stored()

    def encode(item: Any) -> bytes:
        seen.append(item.shape)
        return codec.encode(item)

    items = [slope(4, 4), slope(4, 4), slope(2, 6, 3), slope(4, 4), slope(4, 4)]
    found = compare_codecs(pictures("p", items), codecs=[replace(codec, encode=encode)], rounds=1, each=False)
    assert set(seen) == {(8, 8), (2, 6, 3), (16, 4)}
    assert rows_of(found, "together")[0].bytes == sum(item.size for item in items)


def test_a_sheet_holds_every_picture() -> None:
    for n in (1, 2, 5, 9):
        stack = np.stack([slope(3, 5, 3) for _ in range(n)])
        page = sheet(stack)
        rows, columns = page.shape[0] // 3, page.shape[1] // 5
        tiles = [page[3 * (i // columns) :][:3, 5 * (i % columns) :][:, :5] for i in range(n)]
        assert np.array_equal(np.stack(tiles), stack)
        assert (rows - 1) * columns < n <= rows * columns


def test_what_does_not_come_back_is_an_error_row() -> None:
    broken = replace(stored("broken"), decode=lambda data, like: np.zeros((4, 6), np.uint8))
    failing = replace(stored("failing"), encode=lambda item: 1 // 0)
    found = compare_codecs(pictures("p", [slope(4, 6)]), codecs=[broken, stored(), failing], rounds=1)
    errors = [row.error for row in found.rows]
    failure = "ZeroDivisionError: integer division or modulo by zero"
    assert errors == ["ROUND TRIP FAILED on file 1 of 1", None, failure]
    assert found.rows[0].bytes is None
    assert "ROUND TRIP FAILED" in codecs.markdown(found)


def test_what_fails_later_is_an_error_row_too() -> None:
    items = [slope(4, 6) for _ in range(3)]
    codec = stored()

    def decode(data: bytes, like: Any) -> Any:
        back = codec.decode(data, like)
        return back if np.array_equal(back, items[0]) else 0 * back

    found = compare_codecs(
        pictures("p", items), codecs=[replace(codec, decode=decode)], rounds=1, together=False
    )
    assert found.rows[0].error == "ROUND TRIP FAILED on file 2 of 3"


@pytest.mark.parametrize("library", ["imagecodecs", "pyppmd", "zstandard", "brotli", "oxipng"])
def test_a_missing_library_is_a_row(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = importlib.import_module

    def without(name: str) -> Any:
        if name == library:
            raise ImportError(name)
        return whole(name)

    monkeypatch.setattr(importlib, "import_module", without)
    known: Any = text_codecs() if library in ("pyppmd", "zstandard", "brotli") else picture_codecs()
    distribution = "pyoxipng" if library == "oxipng" else library
    mine = [codec for codec in known if codec.library == distribution]
    item: Any = b"text" if known[0].name == "gzip" else slope(4, 6)
    stuff: Any = texts("t", [item]) if isinstance(item, bytes) else pictures("p", [item])
    found = compare_codecs(stuff, codecs=mine, rounds=1)
    assert mine
    assert {row.error for row in found.rows} == {"not installed (pip install dflow[codecs])"}
    assert "pip install" in codecs.markdown(found)


def test_a_build_without_a_codec_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.features, "check", lambda name: False)
    webp = [codec for codec in picture_codecs() if codec.name == "WebP"]
    [row] = compare_codecs(pictures("p", [slope(4, 6)]), codecs=webp, rounds=1).rows
    assert "without WebP" in str(row.error)


# Time


def test_codecs_take_turns_and_the_median_counts() -> None:
    log: list[str] = []
    naps = {"a": iter([0.0, 0.03, 0.01, 0.02]), "b": iter([0.0, 0.0, 0.0, 0.0])}

    def sleeping(name: str) -> Codec[Any]:
        def encode(item: Any) -> bytes:
            log.append(name)
            time.sleep(next(naps[name]))
            return bytes(item)

        return replace(stored(name), encode=encode)

    found = compare_codecs(texts("t", [bytes(2000)]), codecs=[sleeping("a"), sleeping("b")], rounds=3)
    assert "".join(log) == "abababab"
    assert 0.02 <= 2000 / found.rows[0].encode / 1e6 < 0.03


def test_a_slow_codec_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "PATIENCE", 0.0)
    [row] = compare_codecs(texts("t", [b"text"]), codecs=[stored()], rounds=3).rows
    assert row.rounds == 1


# Models


def model(size: int, made: int, items: int = 1) -> ModelCodec[bytes]:
    clock = CodecClock()

    def encode(given: Any) -> bytes:
        clock.network += 2.0
        clock.coder += 0.5
        return b"".join(given)[:made] + bytes([len(given)])

    def decode(data: bytes) -> Any:
        clock.network += 3.0
        return [b"x" * 100] * data[-1]

    return ModelCodec("m", "float64", size, encode, decode, clock)


def test_break_even() -> None:
    """At N raw bytes weights and file take 1000 + N (19 + 1) / 100, the best codec N 50 / 100."""
    codec = replace(stored("half"), encode=lambda d: d[::2], decode=lambda d, _: (d + d)[:100])
    found = compare_codecs(texts("t", [b"x" * 100]), [model(1000, 19)], codecs=[codec, stored()], rounds=1)
    row = found.rows[-1]
    assert (row.bytes, row.size) == (20, 1000)
    assert row.break_even == math.ceil(1000 / 0.3)
    assert row.seconds == {
        "encode network": 2.0, "encode coder": 0.5, "decode network": 3.0, "decode coder": 0.0,
    }  # fmt: skip
    text = codecs.markdown(found)
    assert "3,334 raw bytes" in text
    assert "network 2.000 s" in text
    worse = compare_codecs(texts("t", [b"x" * 100]), [model(1000, 60)], codecs=[codec], rounds=1)
    assert worse.rows[-1].break_even is None
    assert "never" in codecs.markdown(worse)


def test_a_model_is_compared_with_what_makes_as_many_files() -> None:
    codec = replace(stored("half"), encode=lambda d: d[::2], decode=lambda d, _: d + d)
    found = compare_codecs(texts("t", [b"x" * 100] * 4), [model(10, 19)], codecs=[codec], rounds=1)
    each, together = (row for row in found.rows if row.name == "m")
    assert each.break_even == math.ceil(10 * 400 / (200 - 4 * 20))
    assert together.break_even == math.ceil(10 * 400 / (200 - 20))


def test_a_model_that_fails_is_no_row() -> None:
    codec = replace(model(1, 1), decode=lambda data: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        compare_codecs(texts("t", [b"x"]), [codec], codecs=[stored()], rounds=1)


def test_refuses() -> None:
    with pytest.raises(InputError, match="rounds 0"):
        compare_codecs(texts("t", [b"x"]), rounds=0)
    with pytest.raises(InputError, match="both"):
        compare_codecs(texts("t", [b"x"]), each=False, together=False)
    with pytest.raises(InputError, match="no pictures"):
        pictures("p", [])
    with pytest.raises(InputError, match="no bytes"):
        texts("t", [b"", b""])


# Command line


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["codecs", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs that are always there, and quick."""
    monkeypatch.setattr(codecs, "text_codecs", lambda: tuple(c for c in text_codecs() if not c.library))
    monkeypatch.setattr(codecs, "picture_codecs", lambda: (picture_codecs()[0],))
    monkeypatch.setattr(codecs, "raw_codecs", lambda: raw_codecs()[:1])


@pytest.mark.usefixtures("few")
def test_texts_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path)
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(range(256)))
    folder = write_model(tmp_path / "m", "grouped", text)
    # Where a model was trained there is a state too, which no decoder needs.
    (folder / "state.safetensors").write_bytes(bytes(5000))
    output = tmp_path / "out"
    code, out, _ = run(
        capsys, str(text), str(other), "--model", str(folder), "--rounds", "1", "--output", str(output)
    )
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads((output / "codecs.json").read_text())
    assert (output / "codecs.md").read_text(encoding="utf-8") in out
    assert [row["how"] for row in found["rows"]] == ["each"] * 4 + ["together"] * 4
    assert all(row["error"] is None for row in found["rows"])
    mine = found["rows"][3]
    assert mine["name"] == str(folder)
    assert mine["size"] == (folder / "model.safetensors").stat().st_size
    assert set(mine["seconds"]) == {"encode network", "encode coder", "decode network", "decode coder"}
    assert mine["seconds"]["encode network"] > 0
    assert "codecs.json" in run(capsys, str(text), "--output", str(output))[2]
    one = json.loads(run(capsys, str(text), "--rounds", "1", "--limit", "100")[1].splitlines()[-1])
    assert (one["raw"], len(one["rows"])) == (100, 3)


@pytest.mark.usefixtures("few")
def test_pictures_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.fromarray(slope(8, 8)).save(tmp_path / f"{i}.png")
    np.save(tmp_path / "stack.npy", np.stack([slope(8, 8) for _ in range(4)]))
    files = [str(tmp_path / name) for name in ("0.png", "1.png", "2.png", "stack.npy")]
    for flags, hows in ((["--each"], {"each"}), (["--together"], {"together"}), ([], {"each", "together"})):
        code, out, _ = run(capsys, *files, *flags, "--rounds", "1")
        found = json.loads(out.splitlines()[-1])
        assert code == 0
        assert (found["items"], found["raw"]) == (7, 7 * 64)
        assert {row["how"].split(",")[0] for row in found["rows"]} == hows


@pytest.mark.usefixtures("few")
def test_data_sets_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path)
    code, out, _ = run(capsys, "--data", str(text), "--rounds", "1", "--limit", "300")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["material"] == f"{text}, test"
    pixels = image_sets.SplitPixels(*(np.stack([slope(1, 8, 8) % 2 for _ in range(6)]),) * 3, depth=1)
    known = replace(image_sets.KNOWN["mnist"], read=lambda folder: pixels)
    monkeypatch.setitem(image_sets.KNOWN, "mnist", known)
    found = json.loads(run(capsys, "--data", "mnist", "--rounds", "1", "--limit", "4")[1].splitlines()[-1])
    assert (found["items"], found["units"], found["raw"]) == (4, 256, 32)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "name files"),
        (["{text}", "--data", "ptb"], "--data ptb"),
        (["{text}", "{picture}"], "pictures and texts"),
        (["{text}", "--limit", "0"], "limit 0"),
        (["{text}", "--mode", "fixed"], "--mode fixed"),
        (["{picture}", "--model", "{model}"], "a model of text"),
        (["{text}", "--model", "{text}"], "a file, not the folder of a model"),
        (["--data", "checkerboard", "--split", "tset"], "tset"),
        (["--data", "synthetic/potts"], "law"),
        (["{text}x"], "No such file"),
        (["{bad}"], "bad.png"),
    ],
)
def test_the_command_refuses(
    argv: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path)
    Image.fromarray(slope(8, 8)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"none")
    places = {"text": text, "picture": tmp_path / "a.png", "bad": tmp_path / "bad.png"}
    if "{model}" in argv:
        places["model"] = write_model(tmp_path / "m", "grouped", text)
    try:
        code, _, err = run(capsys, *(word.format(**places) for word in argv))
    except SystemExit as error:
        code, err = int(str(error)), capsys.readouterr().err
    assert code == 2
    assert named in err


def test_flags_of_codecs_go_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, named in (
        (["m", "--each"], "unknown: --each"),
        (["m", "--memory"], "unknown: --memory"),
        (["m", "--model", "n"], "unknown: --model"),
        ([], "required: MODELS"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *argv])
        assert ended.value.code == 2
        assert named in capsys.readouterr().err


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_of_pictures(channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: Any = SETTINGS | {"shape": [channels, 8, 8]}
    torch.manual_seed(0)
    hf.save(hf.DflowImageModel(hf.DflowImageConfig(family="integer", **settings)), tmp_path / "m")
    shape = (8, 8) if channels == 1 else (8, 8, 3)
    for i, dark in enumerate((0, 200, 10)):
        Image.fromarray(slope(*shape) // np.uint8(1 + dark)).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for mode in ("float64", "fixed"):
        argv = [*files, "--model", str(tmp_path / "m"), "--mode", mode, "--rounds", "1"]
        code, out, _ = run(capsys, *argv)
        assert code == 0
        each, together = (row for row in json.loads(out.splitlines()[-1])["rows"] if row["size"] is not None)
        assert (each["error"], together["error"], each["settings"]) == (None, None, mode)
        assert each["bytes"] > together["bytes"] > 0
        assert each["seconds"]["encode network"] > 0
        assert each["seconds"]["decode coder"] > 0
    # Pictures of other shapes are tiles of the model's, each file with its own size.
    other = tmp_path / "other.npy"
    np.save(other, slope(2, *(n + 3 for n in shape[:2]), *shape[2:]))
    code, out, _ = run(
        capsys, *files, str(other), "--model", str(tmp_path / "m"), "--rounds", "1", "--together"
    )
    assert code == 0
    assert json.loads(out.splitlines()[-1])["items"] == 5
