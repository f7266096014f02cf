"""Models and classical codecs on the same pictures or texts: bytes, bits, speed, and when a model pays."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from tqdm import tqdm

import dflow
from dflow.compare import memory as memories
from dflow.compare import results
from dflow.compare.models import environment
from dflow.compare.peers import (
    Array,
    Codec,
    Unavailable,
    every,
    find,
    picture_codecs,
    raw_codecs,
    text_codecs,
)
from dflow.compress import clock as clocks
from dflow.config import InputError

FILES = ("codecs.json", "codecs.md")

#: A codec that takes longer than this for a round is not asked again, seconds.
PATIENCE = 30.0

T = TypeVar("T", bytes, Array)


@dataclass
class Clock:
    """Seconds of a model's network and of its coder since the last look, and bytes that it was lent."""

    network: float = 0.0
    coder: float = 0.0
    auxiliary: int = 0

    def add(self, timed: clocks.Clock) -> None:
        """What compressing or decompressing took."""
        self.network += timed.network
        self.coder += timed.coder


@dataclass(frozen=True)
class ModelCodec(Generic[T]):
    """A model as a codec.

    Attributes:
        name: of the model.
        settings: such as the numeric mode.
        size: bytes of its weights.
        encode: pictures or texts to one file.
        decode: the file to what was in it.
        clock: to which both add.
        again: makes it in another process, so picklable; None where it cannot be.
    """

    name: str
    settings: str
    size: int
    encode: Callable[[Sequence[T]], bytes]
    decode: Callable[[bytes], Sequence[T]]
    clock: Clock = field(default_factory=Clock)
    again: Callable[[], ModelCodec[T]] | None = None


@dataclass(frozen=True)
class Material(Generic[T]):
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
class Row:
    """A line of the table.

    Attributes:
        name: of the codec or the model.
        settings: at which it ran.
        version: of its library.
        how: ``each``: a file for each item; else how they were put into one.
        bytes: of all files.
        bits: a unit of the material.
        ratio: raw bytes to these.
        encode: million raw bytes a second, from the median over rounds.
        decode: alike.
        rounds: that were timed.
        seconds: of a model: network and coder, encoding and decoding, in a round.
        size: of a model: bytes of its weights.
        auxiliary: of a model by bits back: bytes of all files that are random bits it was lent.
        memory: bytes by which a process that encodes, and one that decodes, raises the peak of its resident
            memory: libraries and weights are in it, what is compressed and dflow itself are not.
        break_even: of a model: raw bytes of such material from which on weights and file are smaller than
            what the best classical codec makes of it; None where they never are.
        error: why there are no figures.
    """

    name: str
    settings: str
    version: str
    how: str
    bytes: int | None = None
    bits: float | None = None
    ratio: float | None = None
    encode: float | None = None
    decode: float | None = None
    rounds: int = 0
    seconds: dict[str, float] | None = None
    size: int | None = None
    auxiliary: int | None = None
    memory: dict[str, int] | None = None
    break_even: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class CodecComparison:
    """The table, with what is needed to read it."""

    environment: dict[str, str | int]
    material: str
    items: int
    raw: float
    unit: str
    units: int
    rows: tuple[Row, ...]


def pictures(name: str, items: Sequence[Array], depth: int | None = None) -> Material[Array]:
    """Pictures to compress; ``depth`` is that of their values, default what the type holds.

    Raises:
        InputError: none.
    """
    if not items:
        raise InputError(f"{name}: no pictures to compress")
    found = tuple(np.ascontiguousarray(item) for item in items)
    units = sum(item.size for item in found)
    raw = sum(item.size * (depth or 8 * item.itemsize) for item in found) / 8
    return Material(name, found, units, "dimension", raw)


def texts(name: str, items: Sequence[bytes]) -> Material[bytes]:
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
    return Material(name, tuple(items), units, unit, raw)


@dataclass
class _Runner:
    """A codec at work on the files that it is to make.

    Attributes:
        jobs: of each file, how to make it, and whether bytes give back what is in it.
        source: what makes the codec in another process, and the items of the files.
    """

    row: Row
    jobs: list[tuple[Callable[[], bytes], Callable[[bytes], bool]]]
    source: tuple[Callable[[], Any] | None, list[Any]] = (None, [])
    clock: Clock | None = None
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    split: list[tuple[float, ...]] = field(default_factory=list)
    size: int = 0
    auxiliary: int = 0

    def round(self, first: int | None = None) -> None:
        """Every file made and opened, or the ``first`` ones to warm up.

        Raises:
            Unavailable: the codec is not here, or fails.
        """
        jobs = self.jobs[:first]
        before, lent = self._seconds(), self.clock.auxiliary if self.clock else 0
        begin = time.perf_counter()
        files = [make() for make, _ in jobs]
        middle = self._seconds()
        encode = time.perf_counter() - begin
        begin = time.perf_counter()
        intact = [check(data) for (_, check), data in zip(jobs, files, strict=True)]
        decode = time.perf_counter() - begin
        if not all(intact):
            raise Unavailable(f"ROUND TRIP FAILED on file {intact.index(False) + 1} of {len(jobs)}")
        if first is None:
            self.size = sum(map(len, files))
            self.auxiliary = self.clock.auxiliary - lent if self.clock else 0
            self.encode.append(encode)
            self.decode.append(decode)
            after = self._seconds()
            self.split.append(tuple(b - a for a, b in zip(before + middle, middle + after, strict=True)))

    def _seconds(self) -> tuple[float, ...]:
        return (self.clock.network, self.clock.coder) if self.clock else ()


def compare_codecs(
    material: Material[T],
    models: Sequence[ModelCodec[T]] = (),
    *,
    each: bool = True,
    together: bool = True,
    rounds: int = 3,
    codecs: Sequence[Codec[T]] | None = None,
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
        models: that compress such.
        each: a file for each item.
        together: all in one.
        rounds: of measuring.
        codecs: the classical ones; default all of `dflow.compare.peers`.
        memory: measure that too, by two more processes a row; other codecs than the default ones have none.
        progress: show a bar on stderr.

    Raises:
        InputError: neither each nor together, or rounds below 1.
        RuntimeError: a process whose memory is measured fails.
    """
    if rounds < 1:
        raise InputError(f"rounds {rounds} must be at least 1")
    if not (each or together):
        raise InputError("compress each item or all together, or both")
    is_text = isinstance(material.items[0], bytes)
    known: Sequence[Any] = codecs or (text_codecs() if is_text else picture_codecs())
    solid: Sequence[Any] = () if is_text else raw_codecs()
    makers: list[Callable[[], _Runner]] = []
    if each:
        makers += [partial(_each, material, codec) for codec in known]
        makers += [partial(_model, material, model, True) for model in models]
    if together and (len(material.items) > 1 or not each):
        makers += [partial(_together, material, codec) for codec in (*known, *solid)]
        makers += [partial(_model, material, model, False) for model in models]
    runners: list[_Runner] = []
    with tqdm(
        total=len(makers) * (rounds + 1 + memory),
        unit="round",
        desc="codecs",
        delay=1,
        mininterval=1,
        disable=not progress,
    ) as bar:
        for made in makers:
            runners.append(made())
            _attempt(runners[-1], 1)
            bar.update()
        for _ in range(rounds):
            for one in runners:
                if one.row.error is None and sum(one.encode + one.decode) <= PATIENCE:
                    _attempt(one)
                bar.update()
        for one in runners if memory else ():
            if one.row.error is None and one.source[0] is not None:
                taken = memories.measure(_opened, *one.source)
                one.row = replace(one.row, memory=taken)
            bar.update()
    rows = [_finish(runner, material) for runner in runners]
    return CodecComparison(
        environment(torch.device("cpu")),
        material.name,
        len(material.items),
        material.raw,
        material.unit,
        material.units,
        tuple(_break_even(row, rows, material.raw) for row in rows),
    )


def _attempt(runner: _Runner, first: int | None = None) -> None:
    try:
        runner.round(first)
    except Unavailable as error:
        runner.row = replace(runner.row, error=str(error))
    except Exception as error:  # every library has errors of its own; the row says which
        if runner.clock is not None:
            raise
        runner.row = replace(
            runner.row, error=f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        )


def _row(codec: Codec[T], how: str) -> Row:
    try:
        found = version(codec.library) if codec.library else "Python"
    except PackageNotFoundError:
        found = ""
    return Row(codec.name, codec.settings, found, how)


def _jobs(codec: Any, items: Sequence[Any]) -> list[tuple[Callable[[], bytes], Callable[[bytes], bool]]]:
    """A file each of items, of a model of tuples of items."""

    def job(item: Any) -> tuple[Callable[[], bytes], Callable[[bytes], bool]]:
        if not isinstance(codec, ModelCodec):
            return lambda: codec.encode(item), lambda data: _same(codec.decode(data, item[:0]), item)

        def check(data: bytes) -> bool:
            found = codec.decode(data)
            return len(found) == len(item) and all(map(_same, found, item))

        return lambda: codec.encode(item), check

    return [job(item) for item in items]


@dataclass(frozen=True)
class _Opened:
    """See `dflow.compare.memory.Opened`."""

    jobs: list[tuple[Callable[[], bytes], Callable[[bytes], bool]]]

    def encode(self) -> list[bytes]:
        return [make() for make, _ in self.jobs]

    def decode(self, files: Sequence[bytes]) -> None:
        if not all([check(data) for (_, check), data in zip(self.jobs, files, strict=True)]):
            raise Unavailable("ROUND TRIP FAILED")


def _opened(make: Callable[[], Any], items: list[Any]) -> _Opened:
    return _Opened(_jobs(make(), items))


def _at_work(codec: Codec[T], how: str, items: list[Any]) -> _Runner:
    name = codec.name, codec.settings
    known = any((c.name, c.settings) == name for c in every())
    again = partial(find, *name) if known else None
    return _Runner(_row(codec, how), _jobs(codec, items), (again, items))


def _same(found: Any, item: Any) -> bool:
    if isinstance(item, bytes):
        return bool(found == item)
    return bool(np.array_equal(found, item))


def _each(material: Material[T], codec: Codec[T]) -> _Runner:
    return _at_work(codec, "each", list(material.items))


def _together(material: Material[T], codec: Codec[T]) -> _Runner:
    """All in one file, for each shape of pictures, in the arrangement of which less is made."""
    if isinstance(material.items[0], bytes):
        whole: Any = b"".join(material.items)
        return _at_work(codec, "together", [whole])
    groups: dict[Any, list[Array]] = {}
    for item in material.items:
        groups.setdefault((item.shape, item.dtype.str), []).append(item)
    best: tuple[int, str, list[Any]] | None = None
    error = ""
    for how, arrange in _ARRANGEMENTS.items():
        sheets: list[Any] = [arrange(np.stack(group)) for group in groups.values()]
        try:
            size = sum(len(codec.encode(sheet)) for sheet in sheets)
        except Unavailable as missing:
            error = error or str(missing)
        except Exception as failed:  # such as a picture beyond the format's limits
            error = error or f"{type(failed).__name__}: {' '.join(str(failed).split())[:100]}"
        else:
            if best is None or size < best[0]:
                best = size, how, sheets
    if best is None:
        return _Runner(replace(_row(codec, "together"), error=error), [])
    return _at_work(codec, best[1], best[2])


def _sheet(stack: Array) -> Array:
    """Pictures ``(n, H, W, ...)`` in rows of as many; what is left of the last row is black."""
    n, H, W = stack.shape[:3]
    columns = min(n, math.ceil(math.sqrt(n * H / W)))
    rows = -(-n // columns)
    full = np.zeros((rows * columns, *stack.shape[1:]), stack.dtype)
    full[:n] = stack
    tiles = full.reshape(rows, columns, *stack.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(tiles.reshape(rows * H, columns * W, *stack.shape[3:]))


def _column(stack: Array) -> Array:
    return stack.reshape(-1, *stack.shape[2:])


_ARRANGEMENTS: dict[str, Callable[[Array], Array]] = {
    "together, contact sheet": _sheet,
    "together, column": _column,
}


def _model(material: Material[T], model: ModelCodec[T], each: bool) -> _Runner:
    groups: list[Any] = [(item,) for item in material.items] if each else [material.items]
    row = Row(model.name, model.settings, dflow.__version__, "each" if each else "together", size=model.size)
    return _Runner(row, _jobs(model, groups), (model.again, groups), model.clock)


def _finish(runner: _Runner, material: Material[T]) -> Row:
    if runner.row.error is not None:
        return runner.row
    encode, decode = statistics.median(runner.encode), statistics.median(runner.decode)
    split = None
    if runner.clock is not None:
        names = ("encode network", "encode coder", "decode network", "decode coder")
        split = dict(zip(names, map(statistics.median, zip(*runner.split, strict=True)), strict=True))
    return replace(
        runner.row,
        bytes=runner.size,
        bits=8 * runner.size / material.units,
        ratio=material.raw / runner.size,
        encode=material.raw / encode / 1e6,
        decode=material.raw / decode / 1e6,
        rounds=len(runner.encode),
        seconds=split,
        auxiliary=runner.auxiliary or None,
    )


def _break_even(row: Row, rows: Sequence[Row], raw: float) -> Row:
    """Of a model: weights + N b_model / raw < N b_best / raw from N = weights raw / (b_best - b_model) on."""
    peers = [r.bytes for r in rows if r.size is None and r.bytes and (r.how == "each") == (row.how == "each")]
    if row.size is None or row.bytes is None or not peers or min(peers) <= row.bytes:
        return row
    return replace(row, break_even=math.ceil(row.size * raw / (min(peers) - row.bytes)))


def markdown(comparison: CodecComparison) -> str:
    """The table in Markdown, with what is needed to read it."""
    c = comparison
    head = ["codec", "settings", "files", "bytes", f"bits/{c.unit}", "ratio", "encode MB/s", "decode MB/s"]
    measured = any(row.memory for row in c.rows)
    head += ["memory MiB"] * measured
    lines = [head, ["---"] * 3 + ["---:"] * (5 + measured)]
    for row in c.rows:
        start = [row.name, " ".join(filter(None, (row.settings, f"({row.version})"))), row.how]
        if row.error is not None:
            lines.append([*(s.replace("|", "\\|") for s in (*start, row.error)), *(4 + measured) * ["-"]])
            continue
        figures = (
            f"{row.bytes:,}",
            f"{row.bits:.4f}",
            f"{row.ratio:.3f}",
            _rate(row.encode),
            _rate(row.decode),
            *[" / ".join(f"{v / 2**20:,.0f}" for v in row.memory.values()) if row.memory else "-"] * measured,
        )
        lines.append([*(s.replace("|", "\\|") for s in start), *figures])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    most = max((row.rounds for row in c.rows), default=0)
    notes = [
        "Environment: " + ", ".join(f"{k} {v}" for k, v in c.environment.items()) + ".",
        f"Material: {c.material}; {c.items:,} items, {c.raw:,.0f} bytes raw, {c.units:,} {c.unit}s. "
        f"Speed: raw bytes, median of {most} rounds by turns (of one where a round takes {PATIENCE:.0f} s). "
        "Every file was decoded and compared.",
    ]
    if measured:
        notes.append(
            "Memory: what encoding / decoding adds to the peak of the resident memory of a process that has "
            "imported dflow and holds what is compressed. Libraries of the codec, weights and tables are in "
            "it."
        )
    for row in (row for row in c.rows if row.seconds is not None):
        shares = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in (row.seconds or {}).items())
        pays = "never" if row.break_even is None else f"from {row.break_even:,} raw bytes on"
        if row.auxiliary and row.bytes and row.bits:
            net = row.bits * (row.bytes - row.auxiliary) / row.bytes
            shares += (
                f"; net {net:.4f}, auxiliary {row.bits - net:.4f}, gross {row.bits:.4f} bits a {c.unit} "
                "(auxiliary bits are random here, and could be those of other data)"
            )
        notes.append(
            f"{row.name} ({row.how}): {shares}; weights {row.size:,} bytes, with which it is "
            f"smaller than the best classical codec {pays}."
        )
    return table + "\n\n" + "\n\n".join(notes) + "\n"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def record(comparison: CodecComparison) -> str:
    """The comparison as one line of JSON."""
    return json.dumps(asdict(comparison))


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds results already: see `dflow.compare.results.check`."""
    results.check(folder, FILES)


def write(comparison: CodecComparison, folder: Path) -> list[Path]:
    """Write figures and table into a folder; each file whole or not at all."""
    contents = ((record(comparison) + "\n").encode(), markdown(comparison).encode())
    return results.write(folder, dict(zip(FILES, contents, strict=True)))
