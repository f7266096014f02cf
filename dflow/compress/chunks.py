"""A text as symbols of a model, these as chunks of the model's length, and chunks on a stack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from math import ceil, log
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.coding import codec
from dflow.coding.coder import Coder
from dflow.coding.codes import Shared, Stack
from dflow.coding.container import Damaged, Reader, varint
from dflow.coding.tables import Tables, integer_counts
from dflow.compress import ahead, planes
from dflow.compress.ahead import Drafts
from dflow.compress.clock import progress_bar
from dflow.compress.planes import Counts
from dflow.compress.text_coder import TextCoder, TextPlan
from dflow.compress.walker import Walker
from dflow.config import InputError
from dflow.core import Context
from dflow.data import Bytes

Array = NDArray[Any]


# -- text and symbols ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ChunkSymbols:
    """A text as symbols of the model, and planes: see `dflow.compress.planes`.

    Attributes:
        latin: whether characters are bytes.
        stream: the symbols.
        cuts: ends of lines, in symbols.
        values: of the planes.
        counts: of the planes.
    """

    latin: bool
    stream: Array
    cuts: Array
    values: list[Tensor]
    counts: Counts


def spell(data: bytes, coder: TextCoder) -> ChunkSymbols | None:
    """What the model codes of ``data``; None where its vocabulary cannot spell it."""
    alphabet = coder.alphabet
    if alphabet is not None:
        points, latin = _points(data)
        stream, cuts, values, counts = alphabet.split(points)
        return None if len(counts.points) > planes.MOST else ChunkSymbols(latin, stream, cuts, values, counts)
    if isinstance(coder.tokenizer, Bytes):
        stream = np.frombuffer(data, np.uint8).astype(np.int64)
    else:
        try:
            stream = coder.tokenizer.codes(data.decode()).astype(np.int64)
        except (UnicodeDecodeError, InputError):
            return None
        if _spelled(coder, stream) != data:
            return None
    return ChunkSymbols(False, stream, np.zeros(0, np.int64), [], Counts())


def _spelled(coder: TextCoder, stream: Array) -> bytes:
    if isinstance(coder.tokenizer, Bytes):
        return stream.astype(np.uint8).tobytes()
    return coder.tokenizer.decode(torch.from_numpy(stream)).encode()


def _points(data: bytes) -> tuple[Array, bool]:
    """Code points, and whether they are bytes."""
    try:
        return np.frombuffer(data.decode().encode("utf-32-le"), "<u4").astype(np.uint32), False
    except UnicodeDecodeError:
        return np.frombuffer(data, np.uint8).astype(np.uint32), True


def _joined(points: Array, latin: bool) -> bytes:
    if latin:
        if len(points) and int(points.max()) > 255:
            raise Damaged("has characters that are no bytes")
        return points.astype(np.uint8).tobytes()
    try:
        return points.astype("<u4").tobytes().decode("utf-32-le").encode()
    except UnicodeDecodeError:
        raise Damaged("has code points that are no characters") from None


# -- symbols and chunks ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of a text.

    Attributes:
        x: symbols ``(n, length)``, absent ones 0.
        lengths: ``(n,)``.
    """

    x: Tensor
    lengths: Tensor

    @staticmethod
    def of(symbols: ChunkSymbols, coder: TextCoder) -> Chunks:
        """The chunks of a stream.

        Sentences are lines, in pieces of ``length`` of which the last is shorter than that: a piece of full
        length goes on.
        """
        L, stream = coder.length, symbols.stream
        if coder.lengths is None:
            lengths = np.diff(np.append(np.arange(0, len(stream), L), len(stream)))
        else:
            lines = np.diff(np.concatenate([[0], symbols.cuts, [len(stream)]]))
            full = lines // L
            lengths = np.full(int(full.sum()) + len(lines), L)
            lengths[np.cumsum(full + 1) - 1] = lines % L
        x = np.zeros((len(lengths), L), np.int64)
        x[np.arange(L) < lengths[:, None]] = stream
        return Chunks(torch.from_numpy(x), torch.from_numpy(lengths.astype(np.int64)))

    def plan(
        self,
        files: tuple[tuple[str, int], ...],
        symbols: ChunkSymbols,
        coder: TextCoder,
        most: int,
        weight: int | None,
        width: int = 0,
    ) -> TextPlan:
        """What the header says of them, where up to ``most`` are coded together.

        With a ``weight``, of counts that adapt or 0, they are coded one after another; with a ``width`` by
        network calls of so many symbols.
        """
        n = len(self.x)
        batch = ceil(n / ceil(n / most)) if n and weight is None else 0
        context = coder.context if n and weight is not None else 0
        last = int(self.lengths[-1:].sum()) if coder.lengths is None else 0
        weight = (weight or 0) if n else 0
        numbers = coder.calls, n, last, batch, context, weight, width if n else 0
        return TextPlan(files, True, symbols.latin, *numbers, symbols.counts)

    def block(self, plan: TextPlan, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of a block and their lengths, filled up with absent ones to the size of all blocks."""
        return _filled(self.x[start:stop], plan.batch), _filled(self.lengths[start:stop], plan.batch)


def _filled(x: Tensor, size: int) -> Tensor:
    """``x`` with rows of 0: networks give the same bits for the same number of rows only."""
    missing = size - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _cuts(lengths: Array, coder: TextCoder) -> Array:
    """Ends of lines, in symbols: behind each piece that is shorter than a chunk, but the last."""
    ends = np.cumsum(lengths)[lengths < coder.length]
    if coder.lengths is None:
        return np.zeros(0, np.int64)
    if not len(lengths) or lengths[-1] == coder.length:
        raise Damaged("ends within a line")
    return ends[:-1]


# -- chunks on a stack -----------------------------------------------------------------------------------


class _Recorder:
    """A stack that remembers what is pushed: chunks are coded from the first on, and pushed from the last."""

    def __init__(self) -> None:
        self.pushed: list[tuple[Tensor, Tensor]] = []

    def push(self, start: Tensor, size: Tensor) -> None:
        self.pushed.append((start, size))

    def replay(self, stack: Coder) -> None:
        for start, size in self.pushed:
            stack.push(start, size)


def _push_rolling(stack: Coder, coder: TextCoder, plan: TextPlan, chunks: Chunks, bar: Any) -> None:
    """Push chunks that are coded one after another."""
    recorders = list[_Recorder]()
    with closing(Walker(coder, plan)) as walker:
        for x, length in zip(chunks.x, chunks.lengths.tolist(), strict=True):
            law, context, tail = walker.law(length)
            recorders.append(_Recorder())
            codec.push(law, torch.cat([tail, x[None, :length]], 1), cast(Stack, recorders[-1]), context)
            walker.advance(x[None, :length])
            bar.update()
    for recorder in reversed(recorders):
        recorder.replay(stack)


def _pop_rolling(
    stack: Coder, coder: TextCoder, plan: TextPlan, lengths: Tensor, bar: Any
) -> Iterator[Array]:
    """The chunks that `_push_rolling` pushed."""
    with closing(Walker(coder, plan)) as walker:
        for length in lengths.tolist():
            law, context, tail = walker.law(length)
            chunk = codec.pop(law, 1, stack, context)[:, tail.shape[1] :]
            walker.advance(chunk)
            yield chunk[0].numpy()
            bar.update()


def _context(lengths: Tensor, coder: TextCoder) -> Context | None:
    """Lengths where some entry is absent, or where the model knows of them."""
    is_short = coder.lengths is not None or bool((lengths < coder.length).any())
    return Context(lengths=lengths) if is_short else None


def _length_code(law: Tensor, n: int) -> Shared:
    return Shared(Tables(integer_counts(law[None])), torch.zeros(n, dtype=torch.int64))


def push(
    coder: TextCoder, plan: TextPlan, symbols: ChunkSymbols, chunks: Chunks, progress: bool
) -> tuple[bytes, float]:
    """Push planes, then the text from its end, then lengths: popped in turn. Also returns the bits of planes.

    Where symbols can be drafted, the text is on stacks of its own behind that.
    """
    stack = Coder()
    if coder.alphabet is not None:
        steps = coder.alphabet.planes(symbols.stream, symbols.cuts, symbols.counts)
        stack.push(*planes.intervals(steps, symbols.values))
    plane_bits = float(stack.num_bits)
    with progress_bar(plan.chunks, "chunk", "encode", progress) as bar:
        if plan.ahead:
            text = ahead.push(coder, plan, chunks.x, chunks.lengths, bar)
            beside = stack.to_bytes()
            return varint(len(beside)) + beside + text, plane_bits
        if plan.rolling:
            _push_rolling(stack, coder, plan, chunks, bar)
        for start, stop in () if plan.rolling else reversed(plan.blocks):
            x, lengths = chunks.block(plan, start, stop)
            codec.push(coder.law, x, stack, _context(lengths, coder))
            bar.update(stop - start)
    if coder.lengths is not None:
        stack.push(*_length_code(coder.lengths, plan.chunks).intervals(chunks.lengths))
    return stack.to_bytes(), plane_bits


def pop(data: bytes, coder: TextCoder, plan: TextPlan, progress: bool, drafts: Drafts) -> bytes:
    """The text; `Damaged` where the stack does not hold one."""
    text = b""
    if plan.ahead:
        reader = Reader(data)
        data = reader.take(reader.varint(reader.left))
        text = reader.take(reader.left)
    try:
        stack = Coder(data)
        lengths = _lengths(stack, coder, plan)
        with progress_bar(plan.chunks, "chunk", "decode", progress) as bar:
            if plan.ahead:
                streams = ahead.pop(text, coder, plan, lengths, drafts, bar)
            else:
                streams = _streams(stack, coder, plan, lengths, bar)
            stream: Array = np.concatenate([np.zeros(0, np.int64), *streams])
        back = _spelled(coder, stream) if coder.alphabet is None else b""
        if coder.alphabet is not None:
            steps = coder.alphabet.planes(stream, _cuts(lengths.numpy(), coder), plan.counts)
            back = _joined(planes.pop(steps, stack), plan.latin)
        stack.finish()
    except InputError:  # of a drafter
        raise
    except ValueError as error:
        raise Damaged(str(error)) from None
    return back


def _lengths(stack: Coder, coder: TextCoder, plan: TextPlan) -> Tensor:
    """Of all chunks, int64 ``(n,)``."""
    if coder.lengths is not None:
        return _length_code(coder.lengths, plan.chunks).pop(stack)
    if plan.chunks and not 1 <= plan.last <= coder.length:
        raise Damaged(f"has a chunk of {plan.last} symbols, of a model of {coder.length}")
    if plan.chunks and (plan.chunks - 1) * coder.length + plan.last > plan.raw:
        raise Damaged("declares more symbols than it has bytes")
    lengths = torch.full((plan.chunks,), coder.length)
    lengths[-1:] = plan.last
    return lengths


def _streams(stack: Coder, coder: TextCoder, plan: TextPlan, lengths: Tensor, bar: Any) -> Iterator[Array]:
    """The symbols that are present, block by block."""
    if plan.rolling:
        yield from _pop_rolling(stack, coder, plan, lengths, bar)
        return
    for start, stop in plan.blocks:
        filled = _filled(lengths[start:stop], plan.batch)
        x = codec.pop(coder.law, plan.batch, stack, _context(filled, coder))[: stop - start]
        yield x[torch.arange(coder.length) < lengths[start:stop, None]].numpy()
        bar.update(stop - start)


@torch.no_grad()
def ideal(coder: TextCoder, plan: TextPlan, chunks: Chunks) -> float:
    """Bits of the symbols by the likelihood."""
    nats = 0.0
    if plan.rolling:
        with closing(Walker(coder, plan)) as walker:
            for x, length in zip(chunks.x, chunks.lengths.tolist(), strict=True):
                law, context, tail = walker.law(length)
                nats -= float(law.log_prob(torch.cat([tail, x[None, :length]], 1), context))
                walker.advance(x[None, :length])
        return nats / log(2)
    for start, stop in plan.blocks:
        x, lengths = chunks.block(plan, start, stop)
        nats -= float(coder.law.log_prob(x, _context(lengths, coder)).sum())
    if coder.lengths is not None:
        nats -= float(coder.lengths.log()[chunks.lengths].sum())
    return nats / log(2)
