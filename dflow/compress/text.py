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

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from dflow.coding import container
from dflow.coding.container import Container, Damaged, Segment, crc32
from dflow.coding.numeric import MODES, one_thread
from dflow.compress import ahead, dfl, text_coder
from dflow.compress import chunks as chunking
from dflow.compress.ahead import Drafts
from dflow.compress.chunks import Chunks
from dflow.compress.clock import Clock, clock
from dflow.compress.dfl import BATCH, LIMIT, BaseReport, Description
from dflow.compress.pixels import check_name
from dflow.compress.text_coder import MOST_BATCH, TextCoder, TextPlan
from dflow.config import InputError
from dflow.data.counting import WEIGHT
from dflow.distributions import SequenceCategorical
from dflow.distributions.drafted import Drafter
from dflow.flows import Infilled
from dflow.models.counts import counted


@dataclass(frozen=True, kw_only=True)
class TextReport(BaseReport):
    """What compressing text gave.

    Attributes:
        raw: bytes that the files have.
        symbols: that the model coded.
        side: bits of what the vocabulary lacks, beside the counts in the header.
        stored: whether the bytes are stored as they are.
        drafts: what drafted symbols when the result was decoded, and in how many network calls.
        notes: why bytes are stored, and the like.
    """

    raw: int
    symbols: int
    side: float
    stored: bool
    drafts: Drafts = field(default_factory=Drafts)
    notes: tuple[str, ...] = ()


def compress_text(
    files: Mapping[str, bytes],
    model: str | os.PathLike[str] | TextCoder,
    *,
    batch: int = BATCH,
    rolling: bool = False,
    adapt: bool = False,
    draft: Drafter | None = None,
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
        rolling: code chunks one after another, each given the text before it: fewer bits, and slower.
        adapt: with ``rolling``, let the counts of the model go on with the text before a chunk.
        draft: with ``rolling``, code the text for decoders that draft (`dflow.compress.ahead`); this one
            drafts for ``verify``, and any other may for `decompress_text`.
        verify: decode the result and compare.
        analytic: compute the bits by the likelihood too.
        progress: show a bar on stderr.

    Raises:
        InputError: no files, a name that no file can have, a model that is not one of text; a result that
            does not decode to these bytes; ``rolling``, ``adapt`` or ``draft`` by a model that cannot.
    """
    _check(files, batch)
    coder = model if isinstance(model, TextCoder) else TextCoder.load(model)
    weight = _weight(coder, rolling, adapt)
    whole = b"".join(files.values())
    stored = TextPlan(tuple((name, len(data)) for name, data in files.items()))
    way = batch, weight, _width(coder, weight, draft)
    with one_thread(), clock(coder.law) as encode:
        coded = _encode(whole, coder, stored, way, analytic, progress) if whole else _Coded(stored)
    note = _why_stored(whole, coded, coder.where)
    plan, payload = (coded.plan, coded.stack) if whole and not note else (stored, whole)
    segment = Segment(crc32(whole), not plan.coded, (payload,))
    mode = MODES.index(coder.mode)
    data = container.write(Container(container.TEXT, mode, coder.fingerprint, plan.to_bytes(), (segment,)))
    drafts = Drafts(draft)
    decode = _verify(data, coder, files, progress, drafts) if verify else None
    return data, TextReport(
        files=len(files),
        raw=len(whole),
        symbols=coded.symbols,
        bytes=len(data),
        header=len(data) - len(payload),
        side=coded.side,
        analytic=coded.analytic,
        stored=not plan.coded,
        drafts=drafts,
        encode=encode,
        decode=decode,
        notes=(note,) if note else (),
    )


def _why_stored(whole: bytes, coded: _Coded, where: str) -> str:
    """Why bytes are stored as they are; empty where they are coded, or none."""
    if whole and not coded.plan.coded:
        return f"the vocabulary of {where} cannot spell it: stored as it is"
    if len(coded.stack) + len(coded.plan.to_bytes()) >= len(whole) > 0:
        return f"{where} makes it no smaller: stored as it is"
    return ""


def _width(coder: TextCoder, weight: int | None, draft: Drafter | None) -> int:
    """Symbols of a network call where they can be drafted, else 0."""
    if draft is None:
        return 0
    if weight is None:
        raise InputError(
            "draft: each chunk is coded by itself, many of them in a network call; code them rolling, or "
            "leave draft out"
        )
    ahead.check(coder)
    return ahead.WIDTH


def _check(files: Mapping[str, bytes], batch: int) -> None:
    """`InputError` for files that cannot come back by their names, or a batch out of range."""
    if not files:
        raise InputError("no files to compress")
    for name in files:
        if wrong := check_name(name):
            raise InputError(f"{name!r}: its name {wrong}; rename the file")
    if not 1 <= batch <= MOST_BATCH:
        raise InputError(f"batch size {batch} is not in 1..{MOST_BATCH}")


def _weight(coder: TextCoder, rolling: bool, adapt: bool) -> int | None:
    """How often a symbol of the text before a chunk counts; None where each chunk is coded by itself."""
    if not rolling:
        if adapt:
            raise InputError("adapt: each chunk is coded by itself; code them rolling, or leave adapt out")
        return None
    if not coder.context or coder.lengths is not None:
        raise InputError(
            f"{coder.where}: cannot read the text before a chunk (model.context is 0), so that each chunk is "
            "coded by itself; leave rolling out, or train it with a model.context"
        )
    if not isinstance(coder.law, (SequenceCategorical, Infilled)):
        raise InputError(f"{coder.where}: models of its family code each chunk by itself; leave rolling out")
    if adapt and not any(True for _ in counted(coder.law)):
        raise InputError(f"{coder.where}: has no counts that could adapt; leave adapt out")
    return WEIGHT if adapt else 0


class _Coded(NamedTuple):
    """A text on a stack, and of the report what only the encoder knows."""

    plan: TextPlan
    stack: bytes = b""
    symbols: int = 0
    side: float = 0.0
    analytic: float | None = None


def _encode(
    whole: bytes,
    coder: TextCoder,
    stored: TextPlan,
    way: tuple[int, int | None, int],
    analytic: bool,
    progress: bool,
) -> _Coded:
    """The text coded; the plan is still the one of stored bytes where the vocabulary cannot spell it."""
    symbols = chunking.spell(whole, coder)
    if symbols is None:
        return _Coded(stored)
    chunks = Chunks.of(symbols, coder)
    plan = chunks.plan(stored.files, symbols, coder, *way)
    payload, side = chunking.push(coder, plan, symbols, chunks, progress)
    bits = chunking.ideal(coder, plan, chunks) if analytic else None
    return _Coded(plan, payload, len(symbols.stream), side, bits)


def decompress_text(
    data: bytes,
    model: str | os.PathLike[str] | TextCoder,
    *,
    name: str = "the file",
    limit: int = LIMIT,
    progress: bool = False,
    drafts: Drafts | None = None,
) -> dict[str, bytes]:
    """The files in a ``.dfl``, by name.

    Args:
        data: the ``.dfl``.
        model: as it was compressed by; the number of calls is the file's.
        name: of the ``.dfl``, for errors.
        limit: bytes that it may declare.
        progress: show a bar on stderr.
        drafts: what proposes symbols of a file that was coded for it; other files are decoded as ever.

    Raises:
        InputError: a file that is damaged, not a ``.dfl``, or of another model; more bytes than ``limit``.
    """
    with dfl.named(name):
        parsed, plan = text_coder.parse(data)
        coder = model if isinstance(model, TextCoder) else TextCoder.load(model, plan.calls)
        return _decode(parsed, plan, coder, limit, progress, drafts or Drafts())


def describe_text(data: bytes, name: str = "the file", every: bool = False) -> Description:
    """What is in a ``.dfl`` of text, in words: name and value. No model is needed.

    The files come last: the first of them, or ``every`` one.

    Raises:
        InputError: a file that is damaged or not a ``.dfl``.
    """
    with dfl.named(name):
        parsed, plan = text_coder.parse(data)
    rows = dfl.describe(parsed, len(plan.files), f"{len(data):,}")
    if plan.coded:
        calls = f", {plan.calls} network calls each" if plan.calls else ""
        how = f"{plan.batch:,} at a time"
        if plan.rolling:
            how = f"one after another, each given the {plan.context:,} symbols before it"
            how += f" and counts of all before it, {plan.weight} times" if plan.weight else ""
            how += f", {plan.ahead} symbols a network call" if plan.ahead else ""
        rows.append(("chunks", f"{plan.chunks:,}, {how}{calls}"))
        rows.append(("outside the vocabulary", f"{sum(plan.counts.escapes):,} characters"))
    else:
        rows.append(("chunks", "none: stored as it is"))
    if plan.raw:
        rows.append(("in all", f"{8 * len(data) / plan.raw:.4f} bits a byte of {plan.raw:,}"))
    return rows + dfl.listed([(file, f"{size:,} bytes") for file, size in plan.files], every)


def _decode(
    parsed: Container, plan: TextPlan, coder: TextCoder, limit: int, progress: bool, drafts: Drafts
) -> dict[str, bytes]:
    # What is stored was made by no number of calls.
    dfl.check_model(parsed, coder, not plan.coded or plan.calls == coder.calls)
    dfl.check_limit(plan.raw, limit, "bytes")
    [segment] = parsed.segments
    [data] = segment.levels
    if plan.coded:
        with one_thread():
            data = chunking.pop(data, coder, plan, progress, drafts)
    if len(data) != plan.raw or crc32(data) != segment.crc:
        raise Damaged("does not decode to its checksum: it is damaged, or this machine rounds otherwise")
    files, start = {}, 0
    for name, size in plan.files:
        files[name], start = data[start : start + size], start + size
    return files


def _verify(
    data: bytes, coder: TextCoder, files: Mapping[str, bytes], progress: bool, drafts: Drafts
) -> Clock:
    """Decode what was written; `InputError` where that gives other bytes."""
    try:
        with clock(coder.law) as seconds:
            back = _decode(*text_coder.parse(data), coder, 1 << 62, progress, drafts)
        if back == dict(files):
            return seconds
        reason = "other bytes"
    except Damaged as error:
        reason = str(error)
    raise InputError(
        f"{next(iter(files))}: what was coded does not decode to it on this machine ({reason}); nothing is "
        "written: use another model, or report it"
    )
