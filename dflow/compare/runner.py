"""A codec at work: files made and opened again, with their sizes and times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic

import numpy as np

import dflow
from dflow.compare.peers import Array, Codec, T, Unavailable, every, find
from dflow.compress import clock as clocks


@dataclass
class CodecClock:
    """Seconds of a model's network and of its coder so far, and bytes that it borrowed."""

    network: float = 0.0
    coder: float = 0.0
    auxiliary: int = 0

    def add(self, seconds: clocks.Clock) -> None:
        """What compressing or decompressing took."""
        self.network += seconds.network
        self.coder += seconds.coder


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
    clock: CodecClock = field(default_factory=CodecClock)
    again: Callable[[], ModelCodec[T]] | None = None


@dataclass(frozen=True)
class CodecRow:
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
        decode: the same of decoding.
        rounds: that were timed.
        seconds: of a model: network and coder, encoding and decoding, in a round.
        size: of a model: bytes of its weights; of a primed codec: bytes of the text that it is primed with.
        auxiliary: of a model by bits back: bytes of all files that are random bits it borrowed.
        memory: bytes by which a process that encodes, and one that decodes, raises the peak of its resident
            memory: libraries and weights are in it, what is compressed and dflow itself are not.
        break_even: of a model or a primed codec: raw bytes of such material from which on that and the file
            are smaller than what the best classical codec makes of it; None where they never are.
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


#: Makes a file; says whether bytes give back what is in it.
Job = tuple[Callable[[], bytes], Callable[[bytes], bool]]


def jobs(codec: Any, items: Sequence[Any]) -> list[Job]:
    """A file each of items, of a model of tuples of items."""

    def job(item: Any) -> Job:
        def check(data: bytes) -> bool:
            if not isinstance(codec, ModelCodec):
                return _same(codec.decode(data, item[:0]), item)
            back = codec.decode(data)
            return len(back) == len(item) and all(map(_same, back, item))

        return lambda: codec.encode(item), check

    return [job(item) for item in items]


def _same(back: Any, item: Any) -> bool:
    return bool(back == item) if isinstance(item, bytes) else bool(np.array_equal(back, item))


@dataclass(frozen=True)
class _OpenedCodec:
    """See `dflow.compare.memory.Opened`."""

    jobs: list[Job]

    def encode(self) -> list[bytes]:
        return [make() for make, _ in self.jobs]

    def decode(self, files: Sequence[bytes]) -> None:
        if not all([check(data) for (_, check), data in zip(self.jobs, files, strict=True)]):
            raise Unavailable("ROUND TRIP FAILED")


def opened(make: Callable[[], Any], items: list[Any]) -> _OpenedCodec:
    """The codec that ``make`` makes, at work on items: what `dflow.compare.memory.measure` takes."""
    return _OpenedCodec(jobs(make(), items))


@dataclass
class Runner:
    """A codec at work on the files that it is to make.

    Attributes:
        row: of the table, without figures.
        jobs: of each file.
        source: what makes the codec in another process, and the items of the files.
        clock: of a model.
    """

    row: CodecRow
    jobs: list[Job]
    source: tuple[Callable[[], Any] | None, list[Any]] = (None, [])
    clock: CodecClock | None = None
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    shares: list[tuple[float, ...]] = field(default_factory=list)
    size: int = 0
    auxiliary: int = 0

    @staticmethod
    def of(codec: Codec[Any], how: str, items: list[Any]) -> Runner:
        """A classical codec."""
        try:
            release = version(codec.library) if codec.library else "Python"
        except PackageNotFoundError:
            release = ""
        name = codec.name, codec.settings
        is_known = any((c.name, c.settings) == name for c in every())
        again = partial(find, *name) if is_known else None
        size = codec.beside() if codec.beside and release else None
        return Runner(CodecRow(*name, release, how, size=size), jobs(codec, items), (again, items))

    @staticmethod
    def of_model(model: ModelCodec[Any], each: bool, items: tuple[Any, ...]) -> Runner:
        """A model that makes a file of ``each`` item, or one of all."""
        groups: list[Any] = [(item,) for item in items] if each else [items]
        how = "each" if each else "together"
        row = CodecRow(model.name, model.settings, dflow.__version__, how, size=model.size)
        return Runner(row, jobs(model, groups), (model.again, groups), model.clock)

    def attempt(self, warm_up: bool = False) -> None:
        """A `round`, after which the row holds the error where the codec failed; a model may not."""
        try:
            self.round(warm_up)
        except Exception as error:  # every library has errors of its own; the row says which
            if self.clock is not None and not isinstance(error, Unavailable):
                raise
            self.row = replace(self.row, error=in_short(error))

    def round(self, warm_up: bool = False) -> None:
        """Every file made and opened, or the first one to warm up.

        Raises:
            Unavailable: the codec is not here, or fails.
        """
        todo = self.jobs[:1] if warm_up else self.jobs
        before, auxiliary = self._seconds(), self.clock.auxiliary if self.clock else 0
        begin = time.perf_counter()
        files = [make() for make, _ in todo]
        middle, encode = self._seconds(), time.perf_counter() - begin
        begin = time.perf_counter()
        intact = [check(data) for (_, check), data in zip(todo, files, strict=True)]
        decode = time.perf_counter() - begin
        if not all(intact):
            raise Unavailable(f"ROUND TRIP FAILED on file {intact.index(False) + 1} of {len(todo)}")
        if not warm_up:
            self.size = sum(map(len, files))
            self.auxiliary = self.clock.auxiliary - auxiliary if self.clock else 0
            self.encode.append(encode)
            self.decode.append(decode)
            after = self._seconds()
            self.shares.append(tuple(b - a for a, b in zip(before + middle, middle + after, strict=True)))

    def _seconds(self) -> tuple[float, ...]:
        return (self.clock.network, self.clock.coder) if self.clock else ()

    def finish(self, raw: float, units: int) -> CodecRow:
        """The row with figures, of ``raw`` bytes and as many units of material."""
        if self.row.error is not None:
            return self.row
        encode, decode = statistics.median(self.encode), statistics.median(self.decode)
        seconds = None
        if self.clock is not None:
            names = ("encode network", "encode coder", "decode network", "decode coder")
            medians = map(statistics.median, zip(*self.shares, strict=True))
            seconds = dict(zip(names, medians, strict=True))
        return replace(
            self.row,
            bytes=self.size,
            bits=8 * self.size / units,
            ratio=raw / self.size,
            encode=raw / encode / 1e6,
            decode=raw / decode / 1e6,
            rounds=len(self.encode),
            seconds=seconds,
            auxiliary=self.auxiliary or None,
        )


def in_short(error: Exception) -> str:
    """What a row says of an error."""
    if isinstance(error, Unavailable):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


# -- all items in one file -------------------------------------------------------------------------------


def together(codec: Codec[Any], items: Sequence[Any]) -> Runner:
    """Texts one after another; pictures in a file for each shape, in the arrangement that is smaller."""
    if isinstance(items[0], bytes):
        return Runner.of(codec, "together", [b"".join(items)])
    groups: dict[Any, list[Array]] = {}
    for item in items:
        groups.setdefault((item.shape, item.dtype.str), []).append(item)
    best: tuple[int, str, list[Any]] | None = None
    error = ""
    for how, arrange in _ARRANGEMENTS.items():
        sheets: list[Any] = [arrange(np.stack(group)) for group in groups.values()]
        try:
            size = sum(len(codec.encode(sheet)) for sheet in sheets)
        except Exception as failed:  # such as a picture beyond the format's limits
            error = error or in_short(failed)
        else:
            if best is None or size < best[0]:
                best = size, how, sheets
    if best is None:
        runner = Runner.of(codec, "together", [])
        return replace(runner, row=replace(runner.row, error=error))
    return Runner.of(codec, best[1], best[2])


def sheet(stack: Array) -> Array:
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
    "together, contact sheet": sheet,
    "together, column": _column,
}
