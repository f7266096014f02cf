"""Folders as .dfl files: every file that is kept comes back, alone too, and nothing is written elsewhere."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from folders import image_recipe, write_model, write_pictures, write_text
from forks import FORKS
from PIL import Image
from stand_ins import ROOT
from test_train import recipe_file

from dflow.cli import main
from dflow.cli.command import parse_words
from dflow.coding import container
from dflow.coding.container import Damaged
from dflow.compress.archive import (
    DEFLATED,
    STORED,
    Archive,
    ArchivedFile,
    ArchiveWriter,
    check_path,
    check_paths,
)
from dflow.data import formats
from dflow.data.files import writing
from dflow.data.formats import png
from dflow.data.image_sets import idx
from dflow.train import load_recipe, train

INTEGER = {
    "family": "integer", "num_levels": 2, "num_flows": 1, "prior_groups": 3, "kept": "quarter", "groups": 2,
    "hidden_size": 8, "num_hidden_layers": 2,
}  # fmt: skip
#: Names as people have them, the longest of 200 characters.
LONG = "n" * 196 + ".png"
NAMES = (
    "with space.png",
    "Bild über 写真.png",
    "a\N{NO-BREAK SPACE}b\N{ZERO WIDTH JOINER}.png",
    LONG,
    "-dash.PNG",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of grey pictures, and two of text."""
    folder = tmp_path_factory.mktemp("models")
    values = {
        "data": {"name": str(write_pictures(folder / "pictures"))},
        "model": INTEGER,
        "train": {"steps": 1, "batch_size": 8, "trackers": [], "samples": 0},
        "output": str(folder / "images"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    text = write_text(folder)
    return {
        "images": str(train(load_recipe(folder / "recipe.yaml"))),
        "text": str(write_model(folder / "text", "grouped", text)),
        "other": str(write_model(folder / "other", "grouped", text, seed=1)),
    }


def write_mixed(folder: Path) -> Path:
    """Pictures of every kind, in sub-folders, and what is none."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (9, 13, 4), dtype=np.uint8)
    grey, colour = values[..., 0], values[..., :3]
    deep = folder / "sub folder" / "tief"
    deep.mkdir(parents=True)
    for name in NAMES:
        Image.fromarray(grey).save(deep / name)
    Image.fromarray(colour).save(folder / "x.png")
    Image.fromarray(colour).save(folder / "x.jpg")
    Image.fromarray(colour).save(folder / "y.jpg")
    Image.fromarray(values).save(folder / "rgba.png")
    Image.fromarray(values[..., :2]).save(folder / "grey-alpha.png")
    Image.fromarray(grey > 100).save(folder / "bits.png")
    Image.fromarray(colour).quantize(9).save(folder / "palette.png")
    (folder / "sixteen.png").write_bytes(png.write(colour.astype(np.uint16) * 250, 16))
    np.save(folder / "stack.npy", grey[None].repeat(3, 0))
    Image.fromarray(colour).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(grey).save(
        folder / "moves.gif", save_all=True, append_images=[Image.fromarray(255 - grey)]
    )
    (folder / "cut.png").write_bytes((folder / "rgba.png").read_bytes()[:-60])
    (folder / "notes.txt").write_text("no picture\n" * 9)
    (folder / "empty").write_bytes(b"")
    os.utime(folder / "bits.png", ns=(1_234_567_891_234_567_891, -5_000_000_001))
    return folder


LEFT_OUT = {"cmyk.jpg", "moves.gif", "cut.png", "notes.txt", "empty"}


def picture(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The values of a file."""
    if path.suffix == ".npy":
        return np.load(path), None
    stored = formats.read(path.read_bytes(), str(path))
    return stored.values, stored.alpha


def same(path: Path, back: Path) -> bool:
    return all(
        np.array_equal(a, b) if a is not None and b is not None else a is b
        for a, b in zip(picture(path), picture(back), strict=True)
    )


def files_below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    """The exit code, and the record of --json."""
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_folder_of_pictures_comes_back(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, by = write_mixed(tmp_path / "in"), ["--model", models["images"]]
    (folder / "link.png").symlink_to(folder / "x.png")
    code, record = run(capsys, "compress", str(folder), "-o", str(tmp_path / "a.dfl"), *by, "--times")
    assert code == 1
    assert set(record["left_out"]) == {*LEFT_OUT, "link.png"}
    assert "animat" in record["left_out"]["moves.gif"]
    assert "CMYK" in record["left_out"]["cmyk.jpg"]
    assert "damaged, truncated" in record["left_out"]["cut.png"]
    assert any("y.jpg: a JPEG file" in line for line in record["notes"])

    _, listed = run(capsys, "info", str(tmp_path / "a.dfl"), "--list")
    by_name = {file["name"]: file for file in listed["files"]}
    names = {f"sub folder/tief/{name}" for name in NAMES} | {"x.png", "x.jpg.png", "y.png", "stack.npy"}
    assert names | {"rgba.png", "grey-alpha.png", "bits.png", "palette.png", "sixteen.png"} == set(by_name)
    assert by_name["rgba.png"]["kind"] == "9 x 13, colour, 8 bits, alpha"
    assert by_name["bits.png"]["bytes"] == (folder / "bits.png").stat().st_size
    assert by_name["bits.png"]["bits"] > 0
    assert dict(run(capsys, "info", str(tmp_path / "a.dfl"))[1]["rows"])["kind"] == "folder"
    assert main(["check", str(tmp_path / "a.dfl")]) == 0
    assert main(["check", str(tmp_path / "a.dfl"), *by]) == 0

    one = ["sub folder/tief/with space.png", "y.png"]
    assert main(["decompress", str(tmp_path / "a.dfl"), "-o", str(tmp_path / "one"), *by, *one]) == 0
    assert set(files_below(tmp_path / "one")) == set(one)
    assert main(["decompress", str(tmp_path / "a.dfl"), "sub folder", "-o", str(tmp_path / "sub"), *by]) == 0
    assert set(files_below(tmp_path / "sub")) == {f"sub folder/tief/{name}" for name in NAMES}
    assert main(["decompress", str(tmp_path / "a.dfl"), "-o", str(tmp_path / "all"), *by]) == 0
    capsys.readouterr()
    back = files_below(tmp_path / "all")
    assert set(back) == set(by_name)
    origin = {"x.jpg.png": "x.jpg", "y.png": "y.jpg"}
    for name, path in back.items():
        original = folder / origin.get(name, name)
        assert same(original, path), name
        assert path.stat().st_mtime_ns == original.stat().st_mtime_ns
    # Nothing is replaced, and what is not in it is named.
    assert main(["decompress", str(tmp_path / "a.dfl"), "-o", str(tmp_path / "all"), *by]) == 2
    assert main(["decompress", str(tmp_path / "a.dfl"), "-o", str(tmp_path / "no"), *by, "z.png"]) == 2
    assert "'z.png' is not in the archive" in capsys.readouterr().err


def test_what_is_no_picture_is_stored_or_refused(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, by = write_mixed(tmp_path / "in"), ["--model", models["images"]]
    argv = ["compress", str(folder), *by, "-o"]
    assert main([*argv, str(tmp_path / "strict.dfl"), "--strict"]) == 2
    assert "--strict leaves out nothing" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in"]
    code, record = run(capsys, *argv, str(tmp_path / "a.dfl"), "--store", "--strict")
    assert code == 0
    assert set(record["stored"]) == LEFT_OUT
    # The archive is the same by any number of processes.
    assert main([*argv, str(tmp_path / "two.dfl"), "--store", "--jobs", "2"]) == 0
    assert (tmp_path / "two.dfl").read_bytes() == (tmp_path / "a.dfl").read_bytes()
    back = tmp_path / "back"
    assert main(["decompress", str(tmp_path / "a.dfl"), "-o", str(back), *by, "--jobs", "2"]) == 0
    for name in LEFT_OUT:
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert (back / "bits.png").stat().st_mtime > 1e9  # times are not kept unless asked for


def test_texts_and_pipes(
    models: dict[str, str],
    tmp_path: Path,
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, by = tmp_path / "in", ["--model", models["text"]]
    (folder / "sub").mkdir(parents=True)
    contents = {
        "a.txt": b"line 3 of a text: abc.\n" * 40,
        "sub/ü 写.log": "Zwölf line Boxkämpfer\r\n".encode() * 5,
        "sub/noise": np.random.default_rng(0).bytes(500),
        "empty": b"",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    assert main(["compress", str(folder), "-o", "-", *by]) == 0
    data = capsysbinary.readouterr().out

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    for argv in (
        ["info", "-", "--list"],
        ["check", "-"],
        ["decompress", "-", "-o", str(tmp_path / "b"), *by],
    ):
        give(data)
        assert main(argv) == 0
    assert {name: path.read_bytes() for name, path in files_below(tmp_path / "b").items()} == contents
    capsysbinary.readouterr()
    give(data)
    assert main(["decompress", "-", "a.txt", "-o", "-", *by]) == 0
    assert capsysbinary.readouterr().out == contents["a.txt"]
    give(data)
    assert main(["decompress", "-", "-o", "-", *by]) == 2
    # Files by pipes: one in, one out.
    give(contents["a.txt"])
    assert main(["compress", "-", "-o", "-", *by]) == 0
    give(capsysbinary.readouterr().out)
    assert main(["decompress", "-", "-o", "-", *by]) == 0
    assert capsysbinary.readouterr().out == contents["a.txt"]
    # Another model is named before anything is written.
    give(data)
    assert main(["decompress", "-", "-o", str(tmp_path / "c"), "--model", models["other"]]) == 2
    assert b"give the model that it was made by" in capsysbinary.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "flags"), [("ngram", ["--adapt"]), ("transformer", ["--draft", "counts"])]
)
def test_texts_are_coded_given_those_before_them(family: str, flags: list[str], tmp_path: Path) -> None:
    path = recipe_file(tmp_path, write_text(tmp_path), family, {"context": 8, "counts": 3}, samples=0)
    by, folder = ["--model", str(train(load_recipe(path)))], tmp_path / "in"
    folder.mkdir()
    contents = {f"{i}.txt": f"line {i} of a text: abcde.\n".encode() * 20 for i in range(3)}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    argv = ["compress", str(folder), *by, "-o"]
    assert main([*argv, str(tmp_path / "a.dfl"), "--protocol", "rolling", *flags]) == 0
    assert main([*argv, str(tmp_path / "b.dfl")]) == 0
    if family == "ngram":
        assert (tmp_path / "a.dfl").stat().st_size < (tmp_path / "b.dfl").stat().st_size
    assert main(["decompress", str(tmp_path / "a.dfl"), "-o", str(tmp_path / "back"), *by, "1.txt"]) == 0
    assert {n: p.read_bytes() for n, p in files_below(tmp_path / "back").items()} == {
        "1.txt": contents["1.txt"]
    }


@pytest.mark.slow
def test_a_dequantized_flow_codes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one chain, which borrows bits once."""
    pictures = write_pictures(tmp_path / "in")
    by = ["--model", str(train(load_recipe(image_recipe(tmp_path, str(pictures), steps=1))))]
    argv = ["compress", str(pictures), "-o", str(tmp_path / "a.dfl"), *by]
    assert main(argv) == 2
    assert "--allow-larger" in capsys.readouterr().err
    assert main([*argv, "--allow-larger"]) == 0
    assert main(["decompress", str(tmp_path / "a.dfl"), "-o", str(tmp_path / "back"), *by]) == 0
    for name, path in files_below(tmp_path / "back").items():
        assert same(pictures / name, path)


def test_a_picture_comes_back_by_a_name_of_its_own(models: dict[str, str], tmp_path: Path) -> None:
    """Beside a caption as ``x.png``; beside other pictures called so by its whole name."""
    folder, by = tmp_path / "in", ["--model", models["images"]]
    folder.mkdir()
    for name in ("a.jpg", "b.bmp", "b.gif", "c.jpg", "c.jpg.png", "c.png", "d"):
        kind = {"": "png"}.get(Path(name).suffix, Path(name).suffix[1:])
        data = io.BytesIO()
        Image.new("L", (3, 3), 5).save(data, "jpeg" if kind == "jpg" else kind)
        (folder / name).write_bytes(data.getvalue())
    (folder / "a.csv").write_text("a caption")
    assert main(["compress", str(folder), "-o", str(tmp_path / "a.dfl"), *by]) == 1
    with (tmp_path / "a.dfl").open("rb") as stream:
        names = {file.name for _, file in Archive.read(stream).files}
    assert names == {"a.png", "b.bmp.png", "b.gif.png", "c.jpg.png", "c.png", "d.png"}


def test_damage_to_a_group_leaves_the_others_whole(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, by = write_mixed(tmp_path / "in"), ["--model", models["images"]]
    main(["compress", str(folder), "-o", str(tmp_path / "a.dfl"), *by, "--store"])
    data = bytearray((tmp_path / "a.dfl").read_bytes())
    archive = Archive.read(io.BytesIO(data))
    group = archive.groups[1]
    data[group.start + group.bytes // 2] ^= 1
    (tmp_path / "b.dfl").write_bytes(data)
    assert main(["check", str(tmp_path / "b.dfl")]) == 1
    capsys.readouterr()
    code, record = run(capsys, "decompress", str(tmp_path / "b.dfl"), "-o", str(tmp_path / "back"), *by)
    assert code == 1
    assert len(record["damaged"]) == 1
    back = files_below(tmp_path / "back")
    assert set(back) == {f.name for g in archive.groups if g != group for f in g.files}


def archive_of(names: list[str], kind: int = STORED) -> bytes:
    stream = io.BytesIO()
    writer = ArchiveWriter(stream)
    for name in names:
        writer.add(kind, b"x", 1, [ArchivedFile(name, 1, "stored")])
    writer.finish(bytes(8), 0)
    return stream.getvalue()


OUTSIDE = (
    "/etc/x", "../x", "a/../../x", "a//x", "./x", "", "a/", "C:x", "a\\x", "\\\\host\\x", "a\nb", "a\0b",
    "\x9b", "n" * 256, "d/" * 2100 + "x",
)  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_elsewhere_are_refused(
    name: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_path(name)
    (tmp_path / "a.dfl").write_bytes(archive_of(["fine", name]))
    argv = ["decompress", str(tmp_path / "a.dfl"), "-o", str(tmp_path / "out"), "--model", models["text"]]
    assert main(argv) == 2
    assert "a.dfl" in capsys.readouterr().err
    assert not files_below(tmp_path / "out")


def test_files_may_follow_flags_and_unknown_flags_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["decompress", "a.dfl", "-o", "out", "b", "--model", "m", "c"]
    assert parse_words(words).files == ["a.dfl", "b", "c"]
    for unknown in ("-y", "--yes"):
        with pytest.raises(SystemExit):
            parse_words([*words, unknown])
    assert "unknown: b c --yes" in capsys.readouterr().err


def test_links_in_the_output_are_not_followed(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a.dfl").write_bytes(archive_of(["sub/x"]))
    argv = ["decompress", str(tmp_path / "a.dfl"), "-o", str(tmp_path / "out"), "--model", models["text"]]
    assert main(argv) == 2
    assert "is a link" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "elsewhere")


def test_archives_of_wrong_sizes_are_refused() -> None:
    with pytest.raises(Damaged, match="'a' twice"):
        Archive.read(io.BytesIO(archive_of(["a", "a"])))
    with pytest.raises(Damaged, match="as a file and as a folder"):
        check_paths(["a/b", "a"])
    whole = archive_of(["a", "b/c"])
    assert [file.name for _, file in Archive.read(io.BytesIO(whole)).files] == ["a", "b/c"]
    for n in range(len(whole)):
        with pytest.raises(Damaged):
            Archive.read(io.BytesIO(whole[:n]))
    # Versions without archives say which they read.
    with pytest.raises(Damaged, match=r"version 3 of the .dfl format \(or damaged\); this reads version 2"):
        container.read(whole)


def test_a_small_file_that_promises_much_is_refused(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.BytesIO()
    writer = ArchiveWriter(stream)
    writer.add(DEFLATED, b"x", 1 << 40, [ArchivedFile("bomb", 1 << 40, "stored")])
    writer.finish(bytes(8), 0)
    (tmp_path / "a.dfl").write_bytes(stream.getvalue())
    assert main(["check", str(tmp_path / "a.dfl"), "--limit", "1000"]) == 1
    assert "more than 1,000" in capsys.readouterr().err


def hold(path: Path, folder: Path) -> None:
    """Write half of a file, and wait for ever."""
    with writing(path) as file:
        file.write(bytes(1 << 20))
        file.flush()
        (folder / "begun").touch()
        time.sleep(60)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has files without names")
def test_a_process_that_is_killed_leaves_nothing(forks: None, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    process = FORKS.Process(target=hold, args=(tmp_path / "out" / "a.dfl", tmp_path))
    process.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not os.listdir(tmp_path / "out")


# -- a folder as people have them ------------------------------------------------------------------------


def write_data(folder: Path) -> Path:
    """Stand-ins of the real data that the script cuts its pictures of."""
    rng = np.random.default_rng(3)
    for name in ("kodak", "histology", "cifar10", "mnist"):
        (folder / name).mkdir(parents=True)
    smooth = np.add.outer(np.arange(150), np.arange(150))[..., None] + rng.integers(0, 9, (150, 150, 3))
    for name in ("kodak", "histology"):
        Image.fromarray((smooth % 256).astype(np.uint8)).save(folder / name / "a.png")
    np.savez(folder / "cifar10" / "cifar10-subset.npz", x_valid=smooth[None, :32, :32].astype(np.uint8))
    digits = idx(smooth[None, :28, :28, 0].astype(np.uint8))
    (folder / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(digits, mtime=0))
    return folder


@pytest.mark.slow
def test_the_mixed_folder_of_the_script(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small version of the acceptance: compressed, killed, listed, checked, one and all decompressed."""
    spec = importlib.util.spec_from_file_location("mixed", ROOT / "scripts" / "make_mixed_folder.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    others = script.make(tmp_path / "in", write_data(tmp_path / "data"), 120)
    data, by = str(tmp_path / "out" / "a.dfl"), ["--model", models["images"]]
    argv = ["compress", str(tmp_path / "in"), "-o", data, *by]
    (tmp_path / "out").mkdir()
    words = [sys.executable, "-m", "dflow", *argv, "--jobs", "2"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(8)
        process.send_signal(signal.SIGKILL)
    # It may have been done by then: what it leaves is the whole archive, or nothing.
    for path in (tmp_path / "out").iterdir():
        assert str(path) == data
        assert main(["check", data]) == 0
        path.unlink()
    capsys.readouterr()
    code, record = run(capsys, *argv, "--times")
    assert code == 1
    assert sorted(record["left_out"]) == others
    assert record["files"] == 115
    _, listed = run(capsys, "info", data, "--list")
    assert len(listed["files"]) == 115
    assert main(["check", data, *by, "--jobs", "2"]) == 0
    name = next(file["name"] for file in listed["files"] if "写真" in file["name"])
    assert main(["decompress", data, "-o", str(tmp_path / "one"), *by, name]) == 0
    assert list(files_below(tmp_path / "one")) == [name]
    assert main(["decompress", data, "-o", str(tmp_path / "all"), *by]) == 0
    back, originals = files_below(tmp_path / "all"), files_below(tmp_path / "in")
    for original in set(originals) - set(others):
        stem = original.rpartition(".")[0]
        name = original if original in back else f"{stem}.png"
        assert same(originals[original], back[name]), original
