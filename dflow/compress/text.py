"""Texts and any other bytes as ``.dfl`` files, under a model of text.

A text is cut into chunks of the model's length, each coded by itself, many at a time: a grouped model takes
as many network calls for all of them as for one. What its vocabulary lacks is coded beside it
(`dflow.compress.planes`). Where all that does not pay, the bytes are stored as they are.

Networks run on one thread, since attention adds up in the order of threads, and see chunks in batches of one
size: they give the same bits in both directions.

Models of sentences code each line under their law of lengths. Texts are UTF-8; other bytes are taken for
Latin-1, in which every byte is a character. Pieces (sentencepiece) have to give the very bytes back, else
they are stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, log
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dflow import hf
from dflow.coding import codec, container
from dflow.coding.coder import Coder
from dflow.coding.codes import Code, Shared
from dflow.coding.container import Container, Damaged, Reader, Segment, crc32, varint
from dflow.coding.numeric import MODES, fingerprint, frozen_tables, one_thread, prepare
from dflow.coding.tables import Tables, integer_counts
from dflow.compress import planes
from dflow.compress.clock import Clock, clock
from dflow.compress.pixels import check_name
from dflow.compress.planes import Alphabet, Counts
from dflow.config import InputError
from dflow.core import Context, Distribution
from dflow.data import Bytes, Characters, Tokenizer

Array = NDArray[Any]

#: Bytes that a file may declare, unless the caller allows more.
LIMIT = 1 << 28
#: Chunks that are coded together, at most: they and their attention take memory together.
BATCH = 64
_MOST_BATCH = 1 << 8
_MODE = "float64"
#: Probability of an empty line: models of sentences know none.
_EMPTY = 2.0**-10


@dataclass(frozen=True, eq=False)
class TextCoder:
    """A model of text, ready to code.

    Attributes:
        law: prepared in mode float64.
        tokenizer: its vocabulary.
        length: of a chunk.
        lengths: probabilities of the lengths of sentences, from 0 to ``length``; None for a model of streams.
        calls: network calls that were chosen, 0 for those that the model has of itself.
        fingerprint: 8 bytes.
        where: what to call the model.
    """

    law: Distribution
    tokenizer: Tokenizer
    length: int
    lengths: Tensor | None
    calls: int
    fingerprint: bytes
    where: str = "the model"

    @classmethod
    def load(cls, folder: str | os.PathLike[str], calls: int = 0) -> TextCoder:
        """The model in ``folder``, or as ``FOLDER@CALLS``; ``calls`` are those of a file, if it says.

        Raises:
            InputError: no model of text, or a vocabulary of another.
        """
        path, chosen = hf.split_calls(folder)
        if chosen is not None and calls and chosen != calls:
            raise InputError(f"{folder}: the file was made in {calls} network calls; leave out @{chosen}")
        calls = chosen or calls
        name = f"{path}@{calls}" if calls else str(path)
        model, tokenizer = hf.load(name, "cpu"), Tokenizer.load(path)
        if tokenizer.size != model.config.vocab_size:
            raise InputError(
                f"{folder}: the vocabulary has {tokenizer.size} symbols and the model "
                f"{model.config.vocab_size}; restore both files from one run"
            )
        return cls.of(model, tokenizer, calls, str(folder))

    @classmethod
    def of(
        cls, model: hf.DflowModel, tokenizer: Tokenizer, calls: int = 0, where: str = "the model"
    ) -> TextCoder:
        """A model and its vocabulary; ``calls`` if they were chosen.

        Raises:
            InputError: a model whose likelihood is not exact.
        """
        lengths = None
        if model.config.explicit_length:
            # Halves and integers add up exactly, in any order.
            counts = model.length_counts.double().cpu()[1:] + 0.5
            lengths = torch.cat([torch.tensor([_EMPTY]).double(), (1 - _EMPTY) * counts / counts.sum()])
        law = model.law
        try:
            tables = frozen_tables(law)
            prepared = prepare(law, _MODE, tables)
            codec.check_code(prepared)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        # What else decodes depends on: the vocabulary, the law of lengths.
        extra = json.dumps(
            [tokenizer.describe(), model.config.length, None if lengths is None else lengths.tolist()]
        )
        found = fingerprint(law, tables, _MODE, extra.encode())[: container.FINGERPRINT]
        return cls(prepared, tokenizer, model.config.length, lengths, calls, found, where)

    @property
    def alphabet(self) -> Alphabet | None:
        """Of characters; None where symbols are bytes, pieces or numbers."""
        if not isinstance(self.tokenizer, Characters):
            return None
        return Alphabet(self.tokenizer.symbols, self.lengths is not None)


@dataclass(frozen=True)
class TextReport:
    """What compressing gave.

    Attributes:
        files: how many.
        raw: bytes that they have.
        symbols: that the model coded.
        bytes: of the result.
        header: of these, before the coded data.
        side: bits of what the vocabulary lacks, beside the counts in the header.
        analytic: bits of the symbols by the likelihood, if asked for.
        stored: whether the bytes are stored as they are.
        encode: seconds; of the networks and of the coder.
        decode: the same, of verifying.
        notes: why bytes are stored, and the like.
    """

    files: int
    raw: int
    symbols: int
    bytes: int
    header: int
    side: float
    analytic: float | None
    stored: bool
    encode: Clock
    decode: Clock | None
    notes: tuple[str, ...] = ()


def compress_text(
    files: Mapping[str, bytes],
    model: str | os.PathLike[str] | TextCoder,
    *,
    batch: int = BATCH,
    verify: bool = True,
    analytic: bool = False,
    progress: bool = False,
) -> tuple[bytes, TextReport]:
    """All ``files`` in one ``.dfl``, one after another as one text.

    Args:
        files: names, without folders, and bytes of any kind.
        model: folder of a model of text (``FOLDER@CALLS`` of a grouped one), or what `TextCoder` made of it.
        batch: chunks that are coded together, at most; more are faster and take more memory in both
            directions.
        verify: decode the result and compare.
        analytic: compute the bits by the likelihood too.
        progress: show a bar on stderr.

    Raises:
        InputError: no files, a name that is none, a model that is none of text; a result that does not
            decode to what it was made from.
    """
    if not files:
        raise InputError("no files to compress")
    for name in files:
        if wrong := check_name(name):
            raise InputError(f"{name!r}: its name {wrong}; rename the file")
    if not 1 <= batch <= _MOST_BATCH:
        raise InputError(f"batch size {batch} is not in 1..{_MOST_BATCH}")
    coder = model if isinstance(model, TextCoder) else TextCoder.load(model)
    whole, notes = b"".join(files.values()), []
    stack, side, bits, plan = Coder(), 0.0, None, _Plan(tuple((n, len(d)) for n, d in files.items()))
    with one_thread(), clock(coder.law) as encode:
        split = _split(whole, coder) if whole else None
        if split is not None:
            chunks, given = _chunks(split.stream, split.cuts, coder)
            count = ceil(len(chunks) / ceil(len(chunks) / batch)) if len(chunks) else 0
            last = int(given[-1:].sum()) if coder.lengths is None else 0
            plan = _Plan(
                plan.files, True, split.latin, coder.calls, len(chunks), last, count, split.counts
            )  # fmt: skip
            side = _push(stack, coder, plan, split, chunks, given, progress)
            if analytic:
                bits = _ideal(coder, plan, chunks, given)
    payload = stack.to_bytes()
    if split is None and whole:
        notes.append(f"the vocabulary of {coder.where} cannot spell it: stored as it is")
    elif split is not None and len(payload) + len(plan.to_bytes()) >= len(whole):
        notes.append(f"{coder.where} makes it no smaller: stored as it is")
    if notes or not whole:
        plan, payload = _Plan(plan.files), whole
    segment = Segment(crc32(whole), not plan.coded, (payload,))
    data = container.write(
        Container(container.TEXT, MODES.index(_MODE), coder.fingerprint, plan.to_bytes(), (segment,))
    )
    decode = _verify(data, coder, files, progress) if verify else None
    report = TextReport(
        files=len(files),
        raw=len(whole),
        symbols=0 if split is None else len(split.stream),
        bytes=len(data),
        header=len(data) - len(payload),
        side=side,
        analytic=bits,
        stored=not plan.coded,
        encode=encode,
        decode=decode,
        notes=tuple(notes),
    )
    return data, report


def decompress_text(
    data: bytes,
    model: str | os.PathLike[str] | TextCoder,
    *,
    name: str = "the file",
    limit: int = LIMIT,
    progress: bool = False,
) -> dict[str, bytes]:
    """The files in a ``.dfl``, by name.

    Args:
        data: the ``.dfl``.
        model: as it was compressed by; the number of calls is the file's.
        name: of the ``.dfl``, for errors.
        limit: bytes that it may declare.
        progress: show a bar on stderr.

    Raises:
        InputError: a file that is damaged, none, or of another model; more bytes than ``limit``.
    """
    try:
        found, plan = _open(data)
        coder = model if isinstance(model, TextCoder) else TextCoder.load(model, plan.calls)
        return _decode(found, plan, coder, limit, progress)[0]
    except Damaged as error:
        raise InputError(f"{name}: {error}") from None


def describe_text(data: bytes, name: str = "the file") -> list[tuple[str, str]]:
    """What is in a ``.dfl`` of text, in words: name and value. No model is needed.

    Raises:
        InputError: a file that is damaged or none.
    """
    try:
        found, plan = _open(data)
    except Damaged as error:
        raise InputError(f"{name}: {error}") from None
    rows = [
        ("kind", container.KINDS[found.kind]),
        ("model", found.fingerprint.hex()),
        ("mode", MODES[found.mode]),
        ("files", f"{len(plan.files):,}"),
        ("bytes", f"{len(data):,}"),
        ("header", f"{found.header:,} bytes"),
    ]
    if plan.coded:
        calls = f", {plan.calls} network calls each" if plan.calls else ""
        rows.append(("chunks", f"{plan.chunks:,}, {plan.batch:,} at a time{calls}"))
        rows.append(("outside the vocabulary", f"{sum(plan.counts.escapes):,} characters"))
    else:
        rows.append(("chunks", "none: stored as it is"))
    if plan.raw:
        rows.append(("in all", f"{8 * len(data) / plan.raw:.4f} bits a byte of {plan.raw:,}"))
    rows += [(file, f"{size:,} bytes") for file, size in plan.files[:_SHOWN]]
    if len(plan.files) > _SHOWN:
        rows.append(("...", f"and {len(plan.files) - _SHOWN:,} more"))
    return rows


#: Files that are listed.
_SHOWN = 20


# -- meta ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What the meta of a file of text tells.

    Attributes:
        files: names and bytes.
        coded: whether it is; all below is nothing where it is not.
        latin: whether characters are bytes, else the text is UTF-8.
        calls: of the network for each chunk, 0 for those that the model has of itself.
        chunks: how many.
        last: symbols of the last; models of sentences tell the lengths of all in the stream.
        batch: chunks that are coded together.
        counts: of the planes.
    """

    files: tuple[tuple[str, int], ...]
    coded: bool = False
    latin: bool = False
    calls: int = 0
    chunks: int = 0
    last: int = 0
    batch: int = 0
    counts: Counts = field(default_factory=Counts)

    @property
    def raw(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.files)

    def to_bytes(self) -> bytes:
        """As the container holds it."""
        parts = [varint(len(self.files) << 2 | self.latin << 1 | self.coded)]
        for name, size in self.files:
            known = name.encode()
            parts += [varint(len(known)), known, varint(size)]
        if self.coded:
            parts += map(varint, (self.calls, self.chunks, self.last, self.batch))
            parts.append(self.counts.to_bytes())
        return b"".join(parts)

    @staticmethod
    def read(data: bytes) -> _Plan:
        """The inverse, checked."""
        reader = Reader(data)
        first = reader.varint(4 * reader.left + 3)
        files: dict[str, int] = {}
        for _ in range(first >> 2):
            try:
                name = reader.take(reader.varint(reader.left)).decode()
            except UnicodeDecodeError:
                raise Damaged("names a file in no text") from None
            if check_name(name) or name in files:
                raise Damaged(f"holds a file called {name!r}, which is no name or is there twice")
            files[name] = reader.varint()
        if not files:
            raise Damaged("holds no files")
        plan = _Plan(tuple(files.items()))
        if first & 1:
            calls, chunks, last, batch = reader.varint(1 << 20), reader.varint(), reader.varint(), 0
            batch = reader.varint(_MOST_BATCH)
            counts = Counts.read(reader, plan.raw + 1)
            plan = _Plan(plan.files, True, bool(first & 2), calls, chunks, last, batch, counts)
            # Each chunk but the last, and each line, has a byte at least.
            if chunks > plan.raw + 1 or (chunks > 0) != (batch > 0) or batch > chunks:
                raise Damaged("declares more chunks than it has bytes")
        elif first & 2:
            raise Damaged("is stored and is not")
        reader.finish()
        return plan


def _open(data: bytes) -> tuple[Container, _Plan]:
    found = container.read(data)
    if found.kind != container.TEXT:
        raise Damaged(f"holds {container.KINDS.get(found.kind, 'what this version does not know')}, no text")
    if found.mode != MODES.index(_MODE):
        raise Damaged(f"numeric mode {found.mode} is none for text")
    plan = _Plan.read(found.meta)
    if len(found.segments) != 1 or len(found.segments[0].levels) != 1:
        raise Damaged("has other segments than a text has")
    if found.segments[0].raw == plan.coded:
        raise Damaged("is stored and is not")
    return found, plan


# -- text and symbols ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Split:
    """A text as symbols of the model, and planes."""

    latin: bool
    stream: Array
    cuts: Array
    values: list[Tensor]
    counts: Counts


def _split(data: bytes, coder: TextCoder) -> _Split | None:
    """What the model codes of ``data``; None where its vocabulary cannot spell it."""
    nothing = np.zeros(0, np.int64)
    alphabet = coder.alphabet
    if alphabet is not None:
        points, latin = _points(data)
        stream, cuts, values, counts = alphabet.split(points)
        return None if len(counts.points) > planes.MOST else _Split(latin, stream, cuts, values, counts)
    if isinstance(coder.tokenizer, Bytes):
        stream = np.frombuffer(data, np.uint8).astype(np.int64)
    else:
        try:
            stream = coder.tokenizer.codes(data.decode()).astype(np.int64)
        except (UnicodeDecodeError, InputError):
            return None
        if _spelled(coder, stream) != data:
            return None
    return _Split(False, stream, nothing, [], Counts())


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
        raise Damaged("has characters that are none") from None


def _chunks(stream: Array, cuts: Array, coder: TextCoder) -> tuple[Tensor, Tensor]:
    """Symbols ``(n, length)``, absent ones 0, and lengths ``(n,)``.

    Sentences are lines, in pieces of ``length`` of which the last is shorter than that: a piece of full
    length goes on.
    """
    L = coder.length
    if coder.lengths is None:
        lengths = np.diff(np.append(np.arange(0, len(stream), L), len(stream)))
    else:
        lines = np.diff(np.concatenate([[0], cuts, [len(stream)]]))
        full = lines // L
        lengths = np.full(int(full.sum()) + len(lines), L)
        lengths[np.cumsum(full + 1) - 1] = lines % L
    x = np.zeros((len(lengths), L), np.int64)
    x[np.arange(L) < lengths[:, None]] = stream
    return torch.from_numpy(x), torch.from_numpy(lengths.astype(np.int64))


def _cuts(lengths: Array, coder: TextCoder) -> Array:
    """Ends of lines, in symbols: behind each piece that is shorter than a chunk, but the last."""
    ends = np.cumsum(lengths)[lengths < coder.length]
    if coder.lengths is None:
        return np.zeros(0, np.int64)
    if not len(lengths) or lengths[-1] == coder.length:
        raise Damaged("ends within a line")
    return ends[:-1]


# -- coding ----------------------------------------------------------------------------------------------


def _blocks(chunks: int, batch: int) -> list[tuple[int, int]]:
    return [(start, min(start + batch, chunks)) for start in range(0, chunks, max(1, batch))]


def _block(x: Tensor, start: int, stop: int, batch: int) -> Tensor:
    """Rows of a block, and absent ones: networks give the same bits for the same number of rows only."""
    missing = batch - (stop - start)
    return torch.cat([x[start:stop], x.new_zeros(missing, *x.shape[1:])]) if missing else x[start:stop]


def _context(lengths: Tensor, coder: TextCoder) -> Context | None:
    """Lengths where some entry is absent, or where the model knows of them."""
    short = coder.lengths is not None or bool((lengths < coder.length).any())
    return Context(lengths=lengths) if short else None


def _length_code(law: Tensor, n: int) -> Code:
    return Shared(Tables(integer_counts(law[None])), torch.zeros(n, dtype=torch.int64))


def _push(
    stack: Coder, coder: TextCoder, plan: _Plan, split: _Split, x: Tensor, lengths: Tensor, progress: bool
) -> float:
    """Push planes, then the text from its end, then lengths: popped in turn. Returns the bits of planes."""
    if coder.alphabet is not None:
        stack.push(
            *planes.intervals(coder.alphabet.planes(split.stream, split.cuts, split.counts), split.values)
        )
    side = float(stack.num_bits)
    with _bar(len(x), "encode", progress) as bar:
        for start, stop in reversed(_blocks(plan.chunks, plan.batch)):
            given = _block(lengths, start, stop, plan.batch)
            codec.push(coder.law, _block(x, start, stop, plan.batch), stack, _context(given, coder))
            bar.update(stop - start)
    if coder.lengths is not None:
        stack.push(*_length_code(coder.lengths, len(lengths)).intervals(lengths))
    return side


def _decode(
    found: Container, plan: _Plan, coder: TextCoder, limit: int, progress: bool
) -> tuple[dict[str, bytes], Clock]:
    # What is stored was made by no number of calls.
    if found.fingerprint != coder.fingerprint or (plan.coded and plan.calls != coder.calls):
        raise Damaged(
            f"was made by the model {found.fingerprint.hex()}; {coder.where} is {coder.fingerprint.hex()}: "
            "give the model that it was made by"
        )
    if plan.raw > limit:
        raise Damaged(f"declares {plan.raw:,} bytes, more than {limit:,}; if it is trusted, raise --limit")
    [segment] = found.segments
    with one_thread(), clock(coder.law) as timed:
        data = segment.levels[0]
        if plan.coded:
            data = _popped(_stack(data), plan, coder, progress)
    if len(data) != plan.raw or crc32(data) != segment.crc:
        raise Damaged(
            "does not decode to what it was made from: it is damaged, or this machine rounds otherwise"
        )
    files, at = {}, 0
    for name, size in plan.files:
        files[name], at = data[at : at + size], at + size
    return files, timed


def _stack(data: bytes) -> Coder:
    try:
        return Coder(data)
    except ValueError as error:
        raise Damaged(str(error)) from None


def _popped(stack: Coder, plan: _Plan, coder: TextCoder, progress: bool) -> bytes:
    if coder.lengths is None:
        if plan.chunks and not 1 <= plan.last <= coder.length:
            raise Damaged(f"has a chunk of {plan.last} symbols, of a model of {coder.length}")
        if plan.chunks and (plan.chunks - 1) * coder.length + plan.last > plan.raw:
            raise Damaged("declares more symbols than it has bytes")
        lengths = torch.full((plan.chunks,), coder.length)
        lengths[-1:] = plan.last
    else:
        lengths = _length_code(coder.lengths, plan.chunks).pop(stack)
    parts = []
    with _bar(plan.chunks, "decode", progress) as bar:
        for start, stop in _blocks(plan.chunks, plan.batch):
            given = _block(lengths, start, stop, plan.batch)
            x = codec.pop(coder.law, plan.batch, stack, _context(given, coder))[: stop - start]
            parts.append(x[torch.arange(coder.length) < given[: stop - start, None]])
            bar.update(stop - start)
    stream: Array = torch.cat(parts).numpy() if parts else np.zeros(0, np.int64)
    alphabet = coder.alphabet
    if alphabet is not None:
        points = planes.pop(alphabet.planes(stream, _cuts(lengths.numpy(), coder), plan.counts), stack)
        data = _joined(points, plan.latin)
    else:
        data = _spelled(coder, stream)
    try:
        stack.finish()
    except ValueError as error:
        raise Damaged(str(error)) from None
    return data


def _verify(data: bytes, coder: TextCoder, files: Mapping[str, bytes], progress: bool) -> Clock:
    """Decode what was written; `InputError` where it is not what it was made from."""
    try:
        back, timed = _decode(*_open(data), coder, 1 << 62, progress)
        if back == dict(files):
            return timed
        reason = "other bytes"
    except Damaged as error:
        reason = str(error)
    raise InputError(
        f"{next(iter(files))}: what was coded does not decode to it on this machine ({reason}); nothing is "
        "written: use another model, or report it"
    )


@torch.no_grad()
def _ideal(coder: TextCoder, plan: _Plan, x: Tensor, lengths: Tensor) -> float:
    nats = 0.0
    for start, stop in _blocks(plan.chunks, plan.batch):
        given = _block(lengths, start, stop, plan.batch)
        nats -= float(coder.law.log_prob(_block(x, start, stop, plan.batch), _context(given, coder)).sum())
    if coder.lengths is not None:
        nats -= float(coder.lengths.log()[lengths].sum())
    return nats / log(2)


def _bar(total: int, what: str, progress: bool) -> Any:
    return tqdm(total=total, unit="chunk", desc=what, delay=1, mininterval=1, disable=not progress)
