"""Models and classical codecs on the same pictures or texts: bytes, bits, speed, and when a model pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch

from dflow.compare import memory as memories
from dflow.compare import results
from dflow.compare.models import environment
from dflow.compare.peers import Array, Codec, T, picture_codecs, raw_codecs, text_codecs
from dflow.compare.runner import CodecRow, ModelCodec, Runner, opened
from dflow.compare.runner import together as all_in_one
from dflow.compress.clock import progress_bar
from dflow.config import InputError

FILES = ("codecs.json", "codecs.md")

#: A codec that takes longer than this for a round is not timed again, seconds.
PATIENCE = 30.0


@dataclass(frozen=True)
class CodecMaterial(Generic[T]):
    """What is compressed.

    Attributes:
        name: of it.
        items: pictures ``(H, W)`` or ``(H, W, C)``, or texts.
        units: dimensions, characters or bytes in all.
        unit: their name.
        raw: bytes as they are, at the depth that the values have.
    """

    name: str
    items: tuple[T, ...]
    units: int
    unit: str
    raw: float


@dataclass(frozen=True)
class CodecComparison:
    """The table, with what is needed to read it."""

    environment: dict[str, str | int]
    material: str
    items: int
    raw: float
    unit: str
    units: int
    rows: tuple[CodecRow, ...]


def pictures(name: str, items: Sequence[Array], depth: int | None = None) -> CodecMaterial[Array]:
    """Pictures to compress; ``depth`` is that of their values, default what the type holds.

    Raises:
        InputError: no pictures.
    """
    if not items:
        raise InputError(f"{name}: no pictures to compress")
    arrays = tuple(np.ascontiguousarray(item) for item in items)
    units = sum(item.size for item in arrays)
    raw = sum(item.size * (depth or 8 * item.itemsize) for item in arrays) / 8
    return CodecMaterial(name, arrays, units, "dimension", raw)


def texts(name: str, items: Sequence[bytes]) -> CodecMaterial[bytes]:
    """Texts to compress; the unit is a character where all are UTF-8, else a byte.

    Raises:
        InputError: nothing in them.
    """
    raw = sum(map(len, items))
    if not raw:
        raise InputError(f"{name}: no bytes to compress")
    try:
        units, unit = sum(len(item.decode()) for item in items), "character"
    except UnicodeDecodeError:
        units, unit = raw, "byte"
    return CodecMaterial(name, tuple(items), units, unit, raw)


def compare_codecs(
    material: CodecMaterial[T],
    models: Sequence[ModelCodec[T]] = (),
    *,
    each: bool = True,
    together: bool = True,
    rounds: int = 3,
    codecs: Sequence[Codec[T]] | None = None,
    primed: Sequence[Codec[T]] = (),
    memory: bool = False,
    progress: bool = False,
) -> CodecComparison:
    """Compress and decompress by every codec, by turns, after one file of each to warm up.

    Whatever drifts hits all alike, and of the rounds the median counts. A codec that takes longer than
    `PATIENCE` for a round is timed once.

    Put into one file, pictures of one shape are a contact sheet (rows of pictures, as near to a square as
    may be) or a column, whichever the codec makes less of; texts follow one another.

    Args:
        material: pictures or texts.
        models: that compress them.
        each: a file for each item.
        together: all in one.
        rounds: of measuring.
        codecs: the classical ones; default all of `dflow.compare.peers`.
        primed: further ones that have read a training text, see `dflow.compare.primed`.
        memory: measure that too, by two more processes a row; other codecs than the default ones have no
            such figures.
        progress: show a bar on stderr.

    Raises:
        InputError: neither each nor together, or rounds below 1.
        RuntimeError: a process whose memory is measured fails.
    """
    if rounds < 1:
        raise InputError(f"rounds {rounds} must be at least 1")
    if not (each or together):
        raise InputError("compress each item or all together, or both")
    makers = _makers(
        material, models, each, together and (len(material.items) > 1 or not each), codecs, primed
    )
    runners = _run(makers, rounds, memory, progress)
    rows = [runner.finish(material.raw, material.units) for runner in runners]
    return CodecComparison(
        environment(torch.device("cpu")),
        material.name,
        len(material.items),
        material.raw,
        material.unit,
        material.units,
        tuple(_break_even(row, rows, material.raw) for row in rows),
    )


def _makers(
    material: CodecMaterial[T],
    models: Sequence[ModelCodec[T]],
    each: bool,
    together: bool,
    codecs: Sequence[Codec[T]] | None,
    primed: Sequence[Codec[T]],
) -> list[Callable[[], Runner]]:
    """What makes a runner for each row of the table."""
    items = material.items
    is_text: bool = isinstance(items[0], bytes)
    classical: Sequence[Any] = (*(codecs or (text_codecs() if is_text else picture_codecs())), *primed)
    solid: Sequence[Any] = () if is_text else raw_codecs()
    makers: list[Callable[[], Runner]] = []
    if each:
        makers += [partial(Runner.of, codec, "each", list(items)) for codec in classical]
        makers += [partial(Runner.of_model, model, True, items) for model in models]
    if together:
        makers += [partial(all_in_one, codec, items) for codec in (*classical, *solid)]
        makers += [partial(Runner.of_model, model, False, items) for model in models]
    return makers


def _run(makers: Sequence[Callable[[], Runner]], rounds: int, memory: bool, progress: bool) -> list[Runner]:
    """The runners, after all of their rounds; the runners take turns, one round each."""
    runners: list[Runner] = []
    with progress_bar(len(makers) * (rounds + 1 + memory), "round", "codecs", progress) as bar:
        for make in makers:
            runners.append(make())
            runners[-1].attempt(warm_up=True)
            bar.update()
        for _ in range(rounds):
            for runner in runners:
                if runner.row.error is None and sum(runner.encode + runner.decode) <= PATIENCE:
                    runner.attempt()
                bar.update()
        for runner in runners if memory else ():
            if runner.row.error is None and runner.source[0] is not None:
                runner.row = replace(runner.row, memory=memories.measure(opened, *runner.source))
            bar.update()
    return runners


def _break_even(row: CodecRow, rows: Sequence[CodecRow], raw: float) -> CodecRow:
    """Of a model: weights + N b_model / raw < N b_best / raw from N = weights raw / (b_best - b_model) on."""
    peers = [r.bytes for r in rows if r.size is None and r.bytes and (r.how == "each") == (row.how == "each")]
    if row.size is None or row.bytes is None or not peers or min(peers) <= row.bytes:
        return row
    return replace(row, break_even=math.ceil(row.size * raw / (min(peers) - row.bytes)))


def markdown(comparison: CodecComparison) -> str:
    """The table in Markdown, with what is needed to read it."""
    c = comparison
    head = ["codec", "settings", "files", "bytes", f"bits/{c.unit}", "ratio", "encode MB/s", "decode MB/s"]
    is_measured = any(row.memory for row in c.rows)
    head += ["memory MiB"] * is_measured
    most = max((row.rounds for row in c.rows), default=0)
    notes = [
        results.environment_note(c.environment),
        f"CodecMaterial: {c.material}; {c.items:,} items, {c.raw:,.0f} bytes raw, {c.units:,} {c.unit}s. "
        f"Speed: raw bytes, median of {most} rounds by turns (of one where a round takes {PATIENCE:.0f} s). "
        "Every file was decoded and compared.",
    ]
    if is_measured:
        notes.append(
            "Memory: what encoding / decoding adds to the peak of the resident memory of a process that has "
            "imported dflow and holds what is compressed. Libraries of the codec, weights and tables are in "
            "it."
        )
    notes += [_note(row, c.unit) for row in c.rows if row.size is not None and row.bytes]
    return results.document(head, 3, [_cells(row, len(head)) for row in c.rows], notes)


def _cells(row: CodecRow, columns: int) -> list[str]:
    words = [row.name, " ".join(filter(None, (row.settings, f"({row.version})"))), row.how]
    if row.error is not None:
        return [*words, row.error, *["-"] * (columns - 4)]
    memory = " / ".join(f"{v / 2**20:,.0f}" for v in row.memory.values()) if row.memory else "-"
    rates = ("-" if rate is None else f"{rate:.3g}" for rate in (row.encode, row.decode))
    return [*words, f"{row.bytes:,}", f"{row.bits:.4f}", f"{row.ratio:.3f}", *rates, memory][:columns]


def _note(row: CodecRow, unit: str) -> str:
    """What else there is to say of a model or a primed codec."""
    shares = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in (row.seconds or {}).items())
    pays = "never" if row.break_even is None else f"from {row.break_even:,} raw bytes on"
    if row.auxiliary and row.bytes and row.bits:
        net = row.bits * (row.bytes - row.auxiliary) / row.bytes
        shares += (
            f"; net {net:.4f}, auxiliary {row.bits - net:.4f}, gross {row.bits:.4f} bits a {unit} "
            "(auxiliary bits are random here, and could be those of other data)"
        )
    name, what = row.name, f"{shares}; weights"
    if row.seconds is None:
        name, what = f"{row.name}, {row.settings}", "its times include reading the training text, which takes"
    return (
        f"{name} ({row.how}): {what} {row.size:,} bytes, with which it is smaller than the best classical "
        f"codec {pays}."
    )


def record(comparison: CodecComparison) -> str:
    """The comparison as one line of JSON."""
    return results.record(comparison)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds results already: see `dflow.compare.results.check`."""
    results.check(folder, FILES)


def write(comparison: CodecComparison, folder: Path) -> list[Path]:
    """Write figures and table into a folder; each file whole or not at all."""
    contents = ((record(comparison) + "\n").encode(), markdown(comparison).encode())
    return results.write(folder, dict(zip(FILES, contents, strict=True)))
