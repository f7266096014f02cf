"""Pictures as the segments of a ``.dfl``, each some tiles that are coded together, and back."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.coding import container
from dflow.coding.container import KINDS, Container, Damaged, Segment, crc32
from dflow.coding.numeric import MODES
from dflow.compress import dfl, image_plan
from dflow.compress.beside import extra, extra_size, finished, pack, read_extra, to_bytes, unpack
from dflow.compress.clock import Clock, clock, progress_bar
from dflow.compress.coders import ImageCoder
from dflow.compress.image_plan import ImagePlan
from dflow.compress.pixels import Form, Picture
from dflow.compress.tiles import Grid, depth_of, from_model, grid, to_model
from dflow.config import InputError

Array = NDArray[Any]

#: Some tiles of a file: its place in the list of files, the first tile and the one after the last.
Span = tuple[int, int, int]


def encode(
    coder: ImageCoder, pictures: Sequence[Picture], tiles: int | None, analytic: bool, progress: bool
) -> tuple[bytes, Clock, float | None]:
    """A ``.dfl``, the seconds that coding took, and bits of the coded tiles by the likelihood.

    Raises:
        InputError: a number of ``tiles`` that is out of range.
    """
    grids = [grid(picture.form, coder.shape) for picture in pictures]
    total = sum(g.size for g in grids)
    if tiles is None:
        tiles = coder.tiles(total)
    if not 1 <= tiles <= coder.most:
        raise InputError(
            f"{tiles} tiles of a segment are not in 1..{coder.most}; more would take too much memory"
        )
    tiles_of = _tiling(coder, pictures, grids)
    segments: list[Segment] = []
    with clock(coder.law) as seconds, progress_bar(total, "tile", "encode", progress) as bar:
        for spans in _spans(grids, tiles):
            x = tiles_of(spans)
            segments.append(_coded(coder, x, x[_real(grids, spans)], not segments))
            bar.update(len(x))
    bits = None
    if analytic:
        pairs = zip(_spans(grids, tiles), segments, strict=True)
        bits = sum(coder.ideal(_rows(tiles_of(spans))) for spans, segment in pairs if not segment.raw)
    beside = b"".join(extra(picture, coder.bits) for picture in pictures)
    if beside:
        levels = (*[b""] * (coder.num_levels - 1), zlib.compress(beside, 9))
        segments.append(Segment(crc32(beside), True, levels))
    plan = ImagePlan(
        0 if total <= tiles else tiles,
        image_plan.machine() if coder.mode == "float32" else None,
        tuple(picture.form for picture in pictures),
    )
    mode = MODES.index(coder.mode)
    file = Container(coder.kind, mode, coder.fingerprint, plan.to_bytes(), tuple(segments))
    return container.write(file), seconds, bits


def _tiling(
    coder: ImageCoder, pictures: Sequence[Picture], grids: Sequence[Grid]
) -> Callable[[Sequence[Span]], Array]:
    """What gives the tiles of spans, uint8 or uint16 ``(n, dim)``; the last two pictures stay cut."""

    @functools.lru_cache(2)
    def cut(i: int) -> Array:
        depth = depth_of(pictures[i].form, coder.bits)
        return grids[i].cut(to_model(pictures[i].values, depth, coder.bits))

    return lambda spans: np.concatenate([cut(i)[start:stop] for i, start, stop in spans])


def _rows(tiles: Array) -> Tensor:
    return torch.from_numpy(tiles.astype(np.int64))


def _coded(coder: ImageCoder, tiles: Array, content: Array, is_first: bool) -> Segment:
    """The segment of some tiles, of which ``content`` are the values of files."""
    levels = coder.push(_rows(tiles), is_first)
    # The highest effort may take ten times as long, and matters for what is kept.
    if coder.pays(levels, pack(content, coder.bits, 6), content.size):
        return Segment(crc32(to_bytes(content)), False, tuple(levels))
    return Segment(crc32(to_bytes(content)), True, (pack(content, coder.bits, 9),))


def _spans(grids: Sequence[Grid], tiles: int) -> Iterator[list[Span]]:
    """Of each segment the files and which tiles of them."""
    spans, room = list[Span](), tiles
    for i, g in enumerate(grids):
        start = 0
        while start < g.size:
            stop = min(g.size, start + room)
            spans.append((i, start, stop))
            room, start = room - (stop - start), stop
            if not room:
                yield spans
                spans, room = [], tiles
    if spans:
        yield spans


def _real(grids: Sequence[Grid], spans: Sequence[Span]) -> Array:
    """Which values of the tiles are of files, bool ``(n, dim)``."""
    return np.concatenate([grids[i].real(start, stop) for i, start, stop in spans])


# -- decoding --------------------------------------------------------------------------------------------


class Restored(NamedTuple):
    """What decompressing gives: pictures, by name the files that bits were borrowed of, and seconds."""

    pictures: list[Picture]
    lent: dict[str, bytes]
    clock: Clock


def decode(
    parsed: Container, plan: ImagePlan, coder: ImageCoder, levels: int | None, limit: int, progress: bool
) -> Restored:
    """The pictures of a file, of its first ``levels`` where that is not None.

    Raises:
        Damaged: a file of another model, one that declares more than ``limit`` values, or any damage.
    """
    _check_coder(parsed, plan, coder, levels)
    grids, tiles = _grids(parsed, plan, coder, limit)
    is_exact = levels is None or levels == parsed.num_levels
    values, lent = list[Array](), dict[str, bytes]()
    total = sum(g.size for g in grids)
    with clock(coder.law) as seconds, progress_bar(total, "tile", "decode", progress) as bar:
        joined = _Joined(coder, plan.forms, grids)
        for n, (spans, segment) in enumerate(zip(_spans(grids, tiles), parsed.segments, strict=False)):
            try:
                x, files = _popped(coder, segment, _real(grids, spans), levels, is_exact)
            except Damaged as error:
                raise Damaged(f"segment {n + 1}: {error}") from None
            lent |= files
            values += joined.add(spans, x)
            bar.update(len(x))
    sizes = [extra_size(form, coder.bits) for form in plan.forms]
    beside = read_extra(parsed, sum(sizes), levels) if any(sizes) else None
    pictures, start = [], 0
    for form, value, size in zip(plan.forms, values, sizes, strict=True):
        data = None if beside is None else beside[start : start + size]
        pictures.append(finished(form, value, data, coder.bits, is_exact))
        start += size
    return Restored(pictures, lent, seconds)


def _check_coder(parsed: Container, plan: ImagePlan, coder: ImageCoder, levels: int | None) -> None:
    """`Damaged` where ``coder`` does not decode the file, or there are not so many levels of it."""
    if parsed.kind != coder.kind:
        raise Damaged(
            f"holds {KINDS[parsed.kind]}, and {coder.where} is a model for {KINDS[coder.kind]}: give the "
            "model that it was made by"
        )
    dfl.check_model(parsed, coder)
    if plan.machine is not None and plan.machine != image_plan.machine():
        raise Damaged(
            "was made in mode float32 on another machine, by another build of torch or with other "
            "threads (--threads), and decodes there only; use mode float64 or fixed for files to keep"
        )
    if levels is not None and not 1 <= levels <= parsed.present:
        raise Damaged(f"has {parsed.present} whole levels of {parsed.num_levels}; {levels} were asked for")


def _grids(parsed: Container, plan: ImagePlan, coder: ImageCoder, limit: int) -> tuple[list[Grid], int]:
    """How the files lie in tiles, and the tiles of a segment; `Damaged` where that does not fit the file."""
    try:
        grids = [grid(form, coder.shape) for form in plan.forms]
    except ValueError as error:
        raise Damaged(f"does not fit its model ({error})") from None
    total = sum(g.size for g in grids)
    dfl.check_limit(total * coder.dim, limit, "values")
    tiles = plan.tiles or total
    if tiles > coder.most:
        raise Damaged(f"declares segments of {tiles} tiles, which would take too much memory")
    has_extra = any(extra_size(form, coder.bits) for form in plan.forms)
    if len(parsed.segments) != ceil(total / tiles) + has_extra:
        raise Damaged(f"has {len(parsed.segments)} segments, which its pictures do not need")
    return grids, tiles


class _Joined:
    """Tiles come in, values of whole files go out; one file at a time is held in tiles."""

    def __init__(self, coder: ImageCoder, forms: Sequence[Form], grids: Sequence[Grid]) -> None:
        self.coder, self.forms, self.grids = coder, forms, grids
        self.tiles: Array = np.empty(0)

    def add(self, spans: Sequence[Span], x: Array) -> Iterator[Array]:
        """Values of the files that are complete with these tiles."""
        bits, begin = self.coder.bits, 0
        for i, start, stop in spans:
            size = self.grids[i].size
            if not start:
                self.tiles = np.empty((size, self.coder.dim), np.uint8 if bits <= 8 else np.uint16)
            self.tiles[start:stop] = x[begin : begin + stop - start]
            begin += stop - start
            if stop == size:
                yield from_model(self.grids[i].join(self.tiles), depth_of(self.forms[i], bits), bits)


def _popped(
    coder: ImageCoder, segment: Segment, real: Array, levels: int | None, is_exact: bool
) -> tuple[Array, dict[str, bytes]]:
    """The tiles of a segment, and the files whose bits it borrowed."""
    kind = np.uint8 if coder.bits <= 8 else np.uint16
    lent: dict[str, bytes] = {}
    if segment.raw:
        if len(segment.lengths) != 1:
            raise Damaged("raw, and has levels")
        x = np.zeros(real.shape, kind)
        x[real] = unpack(segment.levels[0], int(real.sum()), coder.bits)
    else:
        if len(segment.lengths) != coder.num_levels:
            raise Damaged(f"{len(segment.lengths)} levels, its model has {coder.num_levels}")
        try:
            rows, lent = coder.pop(len(real), segment.levels[:levels])
        except (ValueError, OverflowError) as error:
            raise Damaged(f"does not decode ({error})") from None
        top = (1 << coder.bits) - 1
        if not is_exact:
            rows = rows.clamp(0, top)
        elif int(rows.min()) < 0 or int(rows.max()) > top:
            raise Damaged("decodes to values that no picture has")
        x = rows.numpy().astype(kind)
    if (is_exact or segment.raw) and crc32(to_bytes(x[real])) != segment.crc:
        raise Damaged(
            "decodes to other pixels than it was made from (checksum): the file is damaged, or this machine "
            "rounds otherwise than the one it was made on"
        )
    return x, lent
