"""Files changed at random: each is read, or refused by an error that names it; quickly, in bounded memory."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import yaml
from folders import SMALL, write_model, write_pictures, write_table, write_text
from forks import FORKS

from dflow import hf
from dflow.cli import main
from dflow.compress import BitsBackCoder, TextCoder, compress_images, compress_text, load_image_coder
from dflow.config import InputError
from dflow.train import load_recipe, train

INTEGER = {
    "family": "integer", "num_levels": 2, "num_flows": 1, "prior_groups": 3, "kept": "quarter", "groups": 2,
    "hidden_size": 8, "num_hidden_layers": 2,
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    found = {name: write_model(folder / name, name, text) for name in ("grouped", "bipartite", "lstm")}
    pictures = write_pictures(folder / "pictures")
    for name, model in {"integer": INTEGER, "dequantized": SMALL}.items():
        values = {
            "data": {"name": str(pictures)},
            "model": model,
            "train": {"steps": 1, "batch_size": 8, "trackers": [], "samples": 0},
            "output": str(folder / name),
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        found[name] = train(load_recipe(path))
    # What they make of files: text, pictures, and pictures by bits back.
    data = {"grouped": compress_text({"a.txt": text.read_bytes()[:200]}, TextCoder.load(found["grouped"]))[0]}
    files = sorted(pictures.iterdir())[:6]
    data["integer"] = compress_images(files, load_image_coder(found["integer"], batch=8), tiles=2)[0]
    coder = load_image_coder(found["dequantized"], batch=8)
    assert isinstance(coder, BitsBackCoder)
    lending = replace(coder, lend=("lent.bin", bytes(range(200))), larger=True)
    data["dequantized"] = compress_images(files, lending)[0]
    for name, written in data.items():
        for file in ("a.dfl", "whole.dfl"):
            (found[name] / file).write_bytes(written)
    # Folders, with files that no model codes.
    (pictures / "notes.txt").write_text("no picture\n" * 9)
    (pictures / "noise").write_bytes(bytes(range(256)))
    words = ["compress", str(pictures), "--store", "--times", "--threads", "1", "-o"]
    for name in ("grouped", "integer"):
        assert main([*words, str(found[name] / "folder.dfl"), "--model", str(found[name])]) == 0
    return found


@pytest.mark.parametrize(
    ("name", "kind", "n"),
    [
        ("grouped", "config", 200),
        ("bipartite", "config", 100),
        ("lstm", "config", 100),
        ("integer", "config", 150),
        ("dequantized", "config", 150),
        ("lstm", "weights", 200),
        ("grouped", "weights", 100),
        ("dequantized", "weights", 100),
        ("grouped", "recipe", 200),
        ("integer", "recipe", 200),
        ("grouped", "vocabulary", 100),
        ("integer", "manifest", 100),
        ("grouped", "dfl", 100),
        ("integer", "dfl", 100),
        ("dequantized", "dfl", 100),
        ("integer", "archive", 100),
        ("grouped", "archive", 100),
    ],
)
def test_changed_files_are_read_or_refused(
    name: str, kind: str, n: int, folders: dict[str, Path], forks: None, tmp_path: Path
) -> None:
    """2,000 of them; `test_compress.py` and its like have further ones of the project's own formats."""
    shutil.copytree(folders[name], tmp_path / "model")
    found = work(tmp_path, kind, n, len(name))
    assert found["refused"] > n // 4


def work(folder: Path, kind: str, n: int, seed: int) -> dict[str, Any]:
    """Change a file in ``folder / "model"`` and read it, ``n`` times; nothing may go wrong."""
    report = folder / "report.json"
    process = FORKS.Process(target=hostile.work, args=(folder / "model", kind, n, seed, report))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0
    found: dict[str, Any] = json.loads(report.read_text())
    assert not found["wrong"], "\n\n".join("\n".join(w) for w in found["wrong"][:3])
    assert not found["slow"]
    assert not found["bare"]
    assert found["read"] + found["refused"] == n
    return found


def write_data(folder: Path) -> None:
    """A whole file of each kind that data come in."""
    folder.mkdir()
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.save(folder / "a.npy", values)
    np.savez_compressed(folder / "a.npz", x=values, y=values.astype(">u2"))
    table = write_table(folder, "i,real,b", 60).read_bytes()
    (folder / "a.csv").write_bytes(table)
    (folder / "a.csv.gz").write_bytes(gzip.compress(table, mtime=0))
    text = ("Zwölf Boxkämpfer jagen Viktor. \U0001f600 漢字\r\n" * 40).encode()
    (folder / "a.txt").write_bytes(text)
    (folder / "a.txt.xz").write_bytes(lzma.compress(text))
    # More than the file may hold.
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(50_000_000), mtime=0))


@pytest.mark.parametrize(
    ("kind", "n", "refused"),
    [
        ("npy", 400, 200),
        ("npz", 200, 150),
        ("csv", 300, 100),
        ("csv.gz", 100, 50),
        ("text", 200, 10),
        ("text.xz", 100, 50),
        ("idx", 50, 50),
    ],
)
def test_changed_data_are_read_or_refused(
    kind: str, n: int, refused: int, forks: None, tmp_path: Path
) -> None:
    write_data(tmp_path / "model")
    assert work(tmp_path, kind, n, 0)["refused"] >= refused


def test_a_byte_of_the_weights_that_was_flipped_is_found(folders: dict[str, Path]) -> None:
    """The format has no checksum of its own: the manifest has."""
    folder = folders["lstm"]
    text = write_text(folder.parent)
    whole = write_model(folder.parent / "whole", "lstm", text)
    path = whole / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model.safetensors: damaged or changed since it was saved"):
        hf.load(whole)
    (whole / "manifest.json").unlink()
    hf.load(whole)


def test_aliases_are_refused(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]")
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"bomb.yaml: not a recipe .*alias"):
        load_recipe(path)
