"""Files changed at random, and what reads them: run in a process that may take so much memory and no more."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import struct
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dflow import hf
from dflow.cli import main
from dflow.coding import container
from dflow.coding.container import Segment
from dflow.compress import (
    ImageCoder,
    TextCoder,
    decompress_images,
    decompress_text,
    load_image_coder,
    pixels,
)
from dflow.compress.archive import CODED, Archive, ArchiveWriter
from dflow.config import InputError
from dflow.data import DataConfig, ImageConfig, Tokenizer, formats, image_sets, load, load_images
from dflow.data.arrays import from_npz
from dflow.train import load_recipe

#: Memory on top of what a process has that only imported, and seconds that reading a file may take.
MEMORY, SECONDS = 1 << 30, 10.0

VALUES: list[Any] = [
    None, True, 0, -1, 1, 3, 2**31, 2**62, 10**30, -(2**63), 0.5, -0.0, 1e308, float("inf"), float("nan"), "",
    "x", "grouped", "a" * 5000, [], [1], [1] * 3000, [[[]]], {}, {"a": 1}, {"start": 1, "end": 0}, "1e9",
    "../x",
]  # fmt: skip


def tree_changed(values: Any, draw: random.Random) -> Any:
    """A tree with one to three leaves or keys replaced, removed or added."""
    root = {"root": copy.deepcopy(values)}
    for _ in range(draw.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        stack: list[Any] = [root]
        while stack:
            node = stack.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
        node, key = draw.choice(places)
        what = draw.random()
        if what < 0.7:
            node[key] = copy.deepcopy(draw.choice(VALUES))
        elif what < 0.85 and node is not root:
            del node[key]
        elif isinstance(node[key], dict):
            node[key][draw.choice(["extra", "__class__", "auto_map", "torch_dtype", "family"])] = draw.choice(
                VALUES
            )
    return root["root"]


def bytes_changed(data: bytes, draw: random.Random, near: int | None = None) -> bytes:
    """Bytes flipped, cut, put in or repeated, among the first ``near``."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, min(near or len(changed), len(changed))))
        what = draw.randrange(5)
        if what == 0 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << draw.randrange(8)
        elif what == 1:
            del changed[place:]
        elif what == 2:
            del changed[place : place + draw.randrange(1, 40)]
        elif what == 3:
            changed[place:place] = draw.randbytes(draw.randrange(1, 40))
        else:
            changed[place:place] = changed[place : place + draw.randrange(1, 200)] * draw.choice(
                [1, 1, 1, 500]
            )
    return bytes(changed)


def json_changed(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return bytes_changed(data, draw)
    return json.dumps(tree_changed(json.loads(data), draw)).encode()


def yaml_changed(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return bytes_changed(data, draw)
    return yaml.safe_dump(tree_changed(yaml.safe_load(data), draw)).encode()


def tensors_changed(data: bytes, draw: random.Random) -> bytes:
    """A file of safetensors: its header as a tree, or bytes of it, or of all."""
    (length,) = struct.unpack("<Q", data[:8])
    what = draw.random()
    if what < 0.5:
        header = json.dumps(tree_changed(json.loads(data[8 : 8 + length]), draw)).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return bytes_changed(data, draw, 8 + length if what < 0.8 else None)


def read_model(folder: Path) -> None:
    hf.load(folder, kind=hf.kind_of(folder))  # type: ignore[type-var]


def read_checked(folder: Path) -> None:
    hf.check(folder)


def dfl_changed(data: bytes, draw: random.Random) -> bytes:
    """A ``.dfl``: its bytes, or what it holds, behind checksums that are right."""
    if draw.random() < 0.5:
        return bytes_changed(data, draw)
    found = container.read(data)
    segments = [(s.crc, s.raw, list(s.levels)) for s in found.segments]
    meta = found.meta
    match draw.randrange(4):
        case 0 | 1:
            meta = bytes_changed(meta, draw)
        case 2:
            levels = draw.choice(segments)[2]
            place = draw.randrange(len(levels))
            levels[place] = bytes_changed(levels[place], draw)
        case _:
            segments = draw.choices(segments, k=draw.randint(0, 3))
    changed = [Segment(crc, raw, tuple(levels)) for crc, raw, levels in segments]
    return container.write(replace(found, meta=meta, segments=tuple(changed)))


@cache
def coder_of(folder: Path) -> ImageCoder | TextCoder:
    image = hf.kind_of(folder) is hf.DflowImageModel
    return load_image_coder(folder, batch=8) if image else TextCoder.load(folder)


def contents(folder: Path, name: str) -> list[bytes]:
    """What a ``.dfl`` decodes to, in order."""
    data, coder = (folder / name).read_bytes(), coder_of(folder)
    if isinstance(coder, TextCoder):
        return list(decompress_text(data, coder, name=name, limit=1 << 20).values())
    pictures, lent, _ = decompress_images(data, coder, name=name, limit=1 << 20)
    return [p.values.tobytes() for p in pictures] + list(lent.values())


@cache
def coded(folder: Path) -> list[bytes]:
    return contents(folder, "whole.dfl")


def told(path: Path) -> object:
    """What a ``.dfl`` says that it holds: its plan, and the checksums of what its segments decode to."""
    found = container.read(path.read_bytes())
    return found.meta, [segment.crc for segment in found.segments]


def read_dfl(folder: Path) -> None:
    """Nothing, or all that was coded; who writes other checksums writes another file."""
    if contents(folder, "a.dfl") != coded(folder) and told(folder / "a.dfl") == told(folder / "whole.dfl"):
        raise AssertionError("other bytes came back")


def archive_changed(data: bytes, draw: random.Random) -> bytes:
    """An archive: its bytes, or its index or a group behind checksums that are right."""
    if draw.random() < 0.3:
        return bytes_changed(data, draw)
    found = Archive.read(io.BytesIO(data))
    stream = io.BytesIO()
    writer = ArchiveWriter(stream)
    place = draw.randrange(len(found.groups))
    for i, group in enumerate(found.groups):
        content = found.group(group, 1 << 20)
        kind, amount, files = group.kind, group.amount, list(group.files)
        if i == place:
            what, one = draw.randrange(5), draw.randrange(len(files))
            name = draw.choice([*VALUES[15:19], "../x", "/x", "a/b/c", files[-1].name, "a\\b", "x\0y"])
            if what == 0:
                content = (dfl_changed if kind == CODED else bytes_changed)(content, draw)
            elif what == 1:
                files[one] = replace(files[one], name=name)
            elif what == 2:
                amount = draw.choice([0, 1, 1 << 19, 1 << 61])
                files[one] = replace(files[one], size=draw.choice([0, amount]))
            elif what == 3:
                kind = draw.randrange(4)
            else:
                files = draw.choices(files, k=draw.randint(1, 3))
        writer.add(kind, content, amount, files)
    writer.finish(found.fingerprint, found.mode)
    changed = stream.getvalue()
    if draw.random() < 0.3:  # the index, behind a checksum that is right
        start = Archive.read(io.BytesIO(data)).groups[-1]
        end = start.start + start.bytes
        plain = zlib.compress(bytes_changed(zlib.decompress(data[end:-16]), draw))
        length = struct.pack("<Q", len(plain))
        changed = data[:end] + plain + length + struct.pack("<I", zlib.crc32(plain + length)) + b"\0dfl"
    return changed


def read_archive(folder: Path) -> None:
    """Nothing, or all that was coded, and no file outside of the folder that it is written to."""
    words = ["decompress", str(folder / "folder.dfl"), "-o", str(folder / "out"), "--model", str(folder)]
    outside = {path for path in folder.parent.rglob("*") if folder / "out" not in path.parents}
    errors = io.StringIO()
    shutil.rmtree(folder / "out", ignore_errors=True)
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main([*words, "--limit", str(1 << 20), "--threads", "1"])
    after = {path for path in folder.parent.rglob("*") if folder / "out" not in path.parents}
    if after - {folder / "out"} != outside - {folder / "out"}:
        raise AssertionError(f"written elsewhere: {after - outside}")
    if code:
        raise InputError(errors.getvalue())


SHAPES = [
    "()", "(8,)", "(-8, 8)", "(8, 8, 8)", "(1 << 62, 2)", "(4611686018427387904, 4)", "(8, 8.0)", "'8'",
    "[8, 8]", "(True, 64)", "(" * 300 + ")" * 300,
]  # fmt: skip
DTYPES = [
    "'|u1'", "'<u2'", "'>u8'", "'|O'", "'<M8[s]'", "'|S3'", "[('a', '|u1')]", "'<c8'", "'|V0'", "'|S0'",
    "'nothing'", "[[]]", "8",
]  # fmt: skip
CELLS = [
    "", "nan", "inf", "-1e999", "1e300", "-0.0", "9" * 400, "1;2", "a\tb", '"', '""', '"1"', "\0",
    "\U0001f600", "x" * 200_000, "0x1", "1_0", "\u0661", " 1 ", "1,5", "5e-324",
]  # fmt: skip


def npy_changed(data: bytes, draw: random.Random) -> bytes:
    """An array: its header as text, bytes of it, or of all."""
    (length,) = struct.unpack("<H", data[8:10])
    what = draw.random()
    if what < 0.5:
        shape, descr = draw.choice(SHAPES), draw.choice(DTYPES)
        order = draw.choice(["False", "True", "None", "1"])
        header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
        return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]
    return bytes_changed(data, draw, 10 + length if what < 0.8 else None)


def cells_changed(data: bytes, draw: random.Random) -> bytes:
    """A table: cells, or bytes."""
    if draw.random() < 0.4:
        return bytes_changed(data, draw)
    lines = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(draw.randint(1, 3)):
        cells = draw.choice(lines)
        cells[draw.randrange(len(cells))] = draw.choice(CELLS)
    if draw.random() < 0.3:
        del lines[draw.randrange(len(lines)) :]
    return "\n".join(",".join(cells) for cells in lines).encode()


def read_text(path: Path) -> None:
    for kind in ("characters", "bytes"):
        load(DataConfig(name=str(path), tokenizer=kind)).train.crops(1, 8)  # type: ignore[arg-type]


KINDS: dict[str, tuple[str, Callable[[bytes, random.Random], bytes], Callable[[Path], object]]] = {
    "config": ("config.json", json_changed, read_model),
    "weights": ("model.safetensors", tensors_changed, read_model),
    "manifest": ("manifest.json", json_changed, read_checked),
    "vocabulary": ("vocabulary.json", json_changed, Tokenizer.load),
    "dfl": ("a.dfl", dfl_changed, read_dfl),
    "archive": ("folder.dfl", archive_changed, read_archive),
    "npy": ("a.npy", npy_changed, lambda folder: pixels.read(folder / "a.npy")),
    "npz": ("a.npz", bytes_changed, lambda folder: from_npz(folder / "a.npz", ("x", "y"), 1 << 16)),
    "csv": ("a.csv", cells_changed, lambda folder: load_images(ImageConfig(str(folder / "a.csv")))),
    "csv.gz": ("a.csv.gz", bytes_changed, lambda folder: load_images(ImageConfig(str(folder / "a.csv.gz")))),
    "text": ("a.txt", bytes_changed, lambda folder: read_text(folder / "a.txt")),
    "text.xz": ("a.txt.xz", bytes_changed, lambda folder: read_text(folder / "a.txt.xz")),
    "idx": (
        "t10k-labels-idx1-ubyte.gz",
        bytes_changed,
        lambda folder: image_sets.MNIST[3].read(folder / "t10k-labels-idx1-ubyte.gz"),
    ),
    "recipe": ("recipe.yaml", yaml_changed, lambda folder: load_recipe(folder / "recipe.yaml")),
}


def work(folder: Path, kind: str, n: int, seed: int, report: Path) -> None:
    """Change a file ``n`` times and read it; what came of it goes to ``report``, a JSON file."""
    name, change, read = KINDS[kind]
    draw, whole = random.Random(seed), (folder / name).read_bytes()
    if name != "manifest.json":
        # With one, whatever is changed is refused for that.
        (folder / "manifest.json").unlink(missing_ok=True)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    found: dict[str, Any] = {"read": 0, "refused": 0, "slow": [], "wrong": [], "bare": []}
    for _ in range(n):
        data = change(whole, draw)
        (folder / name).write_bytes(data)
        start = time.monotonic()
        try:
            read(folder)
            found["read"] += 1
        except InputError as error:
            found["refused"] += 1
            if name not in str(error) and str(folder) not in str(error):
                found["bare"].append(str(error)[:300])
        except BaseException:
            found["wrong"].append([traceback.format_exc()[-1500:], repr(data[:400])])
        if time.monotonic() - start > SECONDS:
            found["slow"].append([time.monotonic() - start, repr(data[:400])])
    report.write_text(json.dumps(found))


def numbers_changed(data: bytes, draw: random.Random) -> bytes:
    """One to three numbers among the first 200 bytes replaced by the smallest, the largest or others."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        size = draw.choice([1, 2, 4])
        place = draw.randrange(max(1, min(200, len(changed)) - size))
        value = draw.choice([0, 1, 2, 3, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, draw.getrandbits(32)])
        changed[place : place + size] = (value & (1 << 8 * size) - 1).to_bytes(
            size, draw.choice(["little", "big"])
        )
    return bytes(changed)


def checksums_mended(data: bytes) -> bytes:
    """A PNG file whose chunks have the right checksums, as far as they are whole."""
    at, changed = 8, bytearray(data)
    while at + 12 <= len(changed):
        (length,) = struct.unpack_from(">I", changed, at)
        end = at + 8 + length
        if end + 4 > len(changed):
            break
        changed[end : end + 4] = struct.pack(">I", zlib.crc32(changed[at + 4 : end]))
        at = end + 4
    return bytes(changed)


def read_picture(data: bytes, name: str) -> None:
    """Both ways: the same picture, or both refuse; where decoders repair damage, one of them may refuse."""
    found = formats.read(data, name)
    other = formats.read_again(data, name)
    if found.values.shape != other.values.shape:
        raise AssertionError("other pictures")
    if not name.endswith((".gif", ".tif")) and not np.array_equal(found.values, other.values):
        raise AssertionError("other values")


def work_pictures(folder: Path, names: list[str], n: int, report: Path) -> None:
    """Change each file of pictures ``n`` times and read it; what came of it goes to ``report``."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    found: dict[str, Any] = {"read": 0, "refused": 0, "slow": [], "wrong": [], "bare": [], "noise": []}
    # What libraries of C write, too.
    errors = os.open(folder / "errors", os.O_CREAT | os.O_RDWR)
    os.dup2(errors, 2)
    for name in names:
        draw, whole = random.Random(name), (folder / name).read_bytes()
        for _ in range(n):
            change = numbers_changed if draw.random() < 0.5 else bytes_changed
            data = change(whole, draw)
            data = checksums_mended(data) if name.endswith(".png") and draw.random() < 0.8 else data
            start = time.monotonic()
            try:
                with warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always")
                    read_picture(data, name)
                found["read"] += 1
                found["noise"] += [str(warning.message) for warning in heard]
            except InputError as error:
                found["refused"] += 1
                if not str(error).startswith(f"{name}: ") or "\n" in str(error):
                    found["bare"].append(str(error)[:300])
            except BaseException:
                found["wrong"].append([name, traceback.format_exc()[-1500:], repr(data[:400])])
            if time.monotonic() - start > SECONDS:
                found["slow"].append([name, time.monotonic() - start, repr(data[:400])])
    found["noise"] += (folder / "errors").read_text().splitlines()[:5]
    report.write_text(json.dumps(found))
