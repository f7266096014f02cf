"""Pictures and arrays as ``.dfl`` files, under integer flows of images and dequantized ones.

A picture of any size is cut into tiles of the model's, those at its edges filled up by reflection; a grey one
shows a model of three channels the same in each, one in colours shows a model of one channel each plane by
itself. Values of fewer bits than the model's are spread over its range; of more bits the highest go through
the model, the lowest are packed beside it. All tiles of all files are coded together, in segments that bound
the memory and what damage can reach. Values come back exactly; what else a file held (profiles, EXIF data,
the bytes themselves) does not.
"""

from __future__ import annotations

import functools
import os
import platform
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log10, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dflow.coding import container
from dflow.coding.container import Container, Damaged, Reader, Segment, crc32, varint
from dflow.coding.numeric import MODES
from dflow.compress import pixels
from dflow.compress.clock import Clock, clock
from dflow.compress.coders import BATCH, BitsBackCoder, Head, ImageCoder
from dflow.compress.pixels import Form, Picture
from dflow.compress.tiles import Grid, depth_of, grid, meant, shown
from dflow.config import InputError

Array = NDArray[Any]

#: Values that a file may declare, unless the caller allows more: 2^28 of 16 bits are half a gigabyte.
LIMIT = 1 << 28
#: Bytes of the list of files.
_META = 1 << 22


@dataclass(frozen=True)
class Report:
    """What compressing gave.

    Attributes:
        files: how many.
        values: that they hold, alpha planes included.
        declared: values of all tiles, which the limit of decoding counts.
        bytes: of the result.
        header: of these, before the coded data: names, sizes, checksums.
        levels: of these, of each level, the coarsest first.
        segments: how many, and how many of them are stored raw.
        raw: see ``segments``.
        analytic: bits of the tiles by the likelihood, if asked for.
        encode: seconds; of the networks and of the coder.
        decode: the same, of verifying.
        notes: what is not kept, by file.
        given: auxiliary bytes of a file that was lent, which comes back.
        random: auxiliary bytes that were made up.
    """

    files: int
    values: int
    declared: int
    bytes: int
    header: int
    levels: tuple[int, ...]
    segments: int
    raw: int
    analytic: float | None
    encode: Clock
    decode: Clock | None
    notes: tuple[tuple[str, str], ...]
    given: int = 0
    random: int = 0

    @property
    def lines(self) -> list[str]:
        """``notes``, one line a kind: the first three files that it is of, and how many more."""
        files: dict[str, list[str]] = {}
        for file, note in self.notes:
            files.setdefault(note, []).append(file)
        return [
            ", ".join(names[:3]) + f" and {len(names) - 3:,} more" * (len(names) > 3) + f": {note}"
            for note, names in files.items()
        ]

    @property
    def bits_per_value(self) -> float:
        """Bits of the file a value."""
        return 8 * self.bytes / self.values

    @property
    def auxiliary(self) -> int:
        """Bytes that were lent, whatever they were."""
        return self.given + self.random

    @property
    def net(self) -> int:
        """Bytes without these."""
        return self.bytes - self.auxiliary


def compress_images(
    files: Sequence[Path],
    model: str | os.PathLike[str] | ImageCoder,
    *,
    mode: str = "float64",
    tiles: int | None = None,
    batch: int = BATCH,
    verify: bool = True,
    analytic: bool = False,
    progress: bool = False,
) -> tuple[bytes, Report]:
    """All ``files`` in one ``.dfl``.

    Args:
        files: pictures, and arrays (``.npy``) of uint8 or uint16.
        model: folder of an integer flow of images, or what `ImageCoder.load` gave.
        mode: numeric mode, see `dflow.coding.numeric`.
        tiles: of a segment at most (default: those of 2^19 values, at least 64).
        batch: tiles that the networks see at a time.
        verify: decode the result and compare.
        analytic: compute the bits by the likelihood too, which takes as long as encoding.
        progress: show a bar on stderr.

    Raises:
        InputError: files that cannot be read exactly or do not fit the model, two of one name, a model that
            compresses no pictures; a result that does not decode to what it was made from.
    """
    coder = model if isinstance(model, ImageCoder) else ImageCoder.load(model, mode, batch)
    if not files:
        raise InputError("no files to compress")
    pictures = _named(files, [pixels.read(file) for file in files])
    for file, picture in zip(files, pictures, strict=True):
        back = picture.form.file
        if isinstance(coder, BitsBackCoder) and coder.lend and coder.lend[0] == back:
            raise InputError(f"{file} and the auxiliary file would both come back as {back}; rename one")
        try:
            grid(picture.form, coder.shape)
        except ValueError as error:
            raise InputError(f"{file}: {error}") from None
    try:
        data, encode, bits = _encode(coder, pictures, tiles, analytic, progress)
    except ValueError as error:
        # Of a model that gives no numbers, or such as nothing can hold.
        raise error if isinstance(error, InputError) else InputError(f"{coder.where}: {error}") from None
    decode = _verify(data, coder, files, pictures, progress) if verify else None
    found = container.read(data)
    lent = _heads(found)
    return data, Report(
        files=len(pictures),
        values=sum(_amount(picture.form) for picture in pictures),
        declared=coder.dim * sum(grid(picture.form, coder.shape).size for picture in pictures),
        bytes=len(data),
        header=found.header,
        levels=tuple(found.level_bytes),
        segments=len(found.segments),
        raw=sum(segment.raw for segment in found.segments),
        analytic=bits,
        encode=encode,
        decode=decode,
        notes=tuple((str(file), note) for file, p in zip(files, pictures, strict=True) for note in p.notes),
        given=sum(head.given for head in lent),
        random=sum(4 * head.random for head in lent),
    )


def _named(files: Sequence[Path], pictures: Sequence[Picture]) -> list[Picture]:
    """Pictures with names of their own: beside ``x.png`` a file ``x.jpg`` comes back as ``x.jpg.png``."""
    often = Counter(picture.form.file for picture in pictures)
    renamed, names = [], dict[str, Path]()
    for file, picture in zip(files, pictures, strict=True):
        back = picture.form.file
        if often[back] > 1 and file.suffix.lower() != Path(back).suffix:
            form = replace(picture.form, name=file.name)
            note = f"comes back as {form.file}, since another file comes back as {back}"
            picture, back = replace(picture, form=form, notes=(*picture.notes, note)), form.file
        if wrong := pixels.check_name(picture.form.name):
            raise InputError(f"{str(file)!r}: its name {wrong}; rename the file")
        if back in names:
            raise InputError(
                f"{names[back]} and {file} would both come back as {back}; rename one, or compress each into "
                "a .dfl file of its own"
            )
        names[back] = file
        renamed.append(picture)
    return renamed


def _verify(
    data: bytes, coder: ImageCoder, files: Sequence[Path], pictures: Sequence[Picture], progress: bool
) -> Clock:
    """Decode the result, and read the files by another way: `InputError` where they are not the same."""
    reason = ""
    try:
        back, timed = _decode(container.read(data), coder, None, 1 << 62, progress)
        wrong = [str(f) for f, p, q in zip(files, pictures, back, strict=True) if not p.same(q)]
    except Damaged as error:
        wrong, reason = [str(files[0])], f" ({error})"
    if wrong:
        raise InputError(
            f"{wrong[0]}: what was coded in mode {coder.mode} does not decode to it on this machine{reason}; "
            "nothing is written: use --mode fixed, which does not hang on how floats are rounded"
        )
    for file, picture in zip(files, pictures, strict=True):
        again = pixels.read(file, again=True)
        if not picture.same(replace(again, form=replace(again.form, name=picture.form.name))):
            raise InputError(
                f"{file}: two readers of its format find different values in it, or it has changed "
                "meanwhile; nothing is written: try again, or compress the array of its values as .npy"
            )
    return timed


def decompress_images(
    data: bytes,
    model: str | os.PathLike[str] | ImageCoder,
    *,
    name: str = "the file",
    levels: int | None = None,
    limit: int = LIMIT,
    batch: int = BATCH,
    progress: bool = False,
    lent: dict[str, bytes] | None = None,
) -> list[Picture]:
    """The pictures in a ``.dfl``, or coarse ones like them.

    Args:
        data: the file; with ``levels`` it may be cut off behind them.
        model: as it was compressed by.
        name: of the file, for errors.
        levels: how many to use, the coarsest first (default: all).
        limit: values that the file may declare.
        batch: tiles that the networks see at a time.
        progress: show a bar on stderr.
        lent: takes the files that were lent, by their names.

    Raises:
        InputError: a file that is damaged, none, or of another model; more values than ``limit``.
    """
    try:
        found = container.read(data, prefix=levels is not None)
        coder = model
        _plan(found)
        if not isinstance(coder, ImageCoder):
            coder = ImageCoder.load(coder, MODES[found.mode], batch)
        pictures = _decode(found, coder, levels, limit, progress)[0]
        if lent is not None and isinstance(coder, BitsBackCoder):
            lent.update(coder.back)
        return pictures
    except Damaged as error:
        raise InputError(f"{name}: {error}{_hint(data) if levels is None else ''}") from None


def _hint(data: bytes) -> str:
    """What there is to do about a file that is cut off."""
    try:
        found = container.read(data, prefix=True)
    except Damaged:
        return ""
    if found.present == found.num_levels:
        return ""
    return f"; {found.present} of {found.num_levels} levels are whole: --levels {found.present} shows them"


def describe_images(data: bytes, name: str = "the file") -> list[tuple[str, str]]:
    """What is in a ``.dfl`` of images, in words: name and value. No model is needed.

    Raises:
        InputError: a file that is damaged or none.
    """
    try:
        found = container.read(data, prefix=True)
        plan = _plan(found)
    except Damaged as error:
        raise InputError(f"{name}: {error}") from None
    values, total = sum(map(_amount, plan.forms)), found.header + sum(found.level_bytes)
    rows = [
        ("kind", container.KINDS[found.kind]),
        ("model", found.fingerprint.hex()),
        ("mode", MODES[found.mode]),
        ("files", f"{len(plan.forms):,}"),
        ("bytes", f"{total:,}" + f", {len(data):,} of them there" * (len(data) < total)),
        ("header", f"{found.header:,} bytes"),
        ("segments", f"{len(found.segments):,}, {sum(s.raw for s in found.segments):,} of them raw"),
    ]
    for i, size in enumerate(found.level_bytes):
        there = "" if i < found.present else ", not there"
        rows.append((f"level {i + 1}", f"{size:,} bytes, {8 * size / values:.4f} bits a dimension{there}"))
    try:
        heads = _heads(found)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    if found.kind == container.BITS_BACK:
        given, random = sum(head.given for head in heads), sum(4 * head.random for head in heads)
        net = 8 * (total - given - random) / values
        names = "".join(f", {head.name}" for head in heads if head.given)
        rows += [
            ("auxiliary", f"{random:,} random bytes, {given:,} that come back{names}"),
            ("net", f"{total - given - random:,} bytes, {net:.4f} bits a dimension"),
        ]
    rows.append(("in all", f"{8 * total / values:.4f} bits a dimension of {values:,}"))
    for form in plan.forms[:_SHOWN]:
        dims = " x ".join(map(str, form.dims))
        kind = f"array of {pixels.SOURCES[form.source]}" if form.is_array else pixels.SOURCES[form.source]
        alpha = "" if form.alpha is None else ", alpha" if form.alpha < 0 else f", alpha {form.alpha}"
        rows.append((form.file, f"{dims}, {kind}, {form.depth} bits{alpha}"))
    if len(plan.forms) > _SHOWN:
        rows.append(("...", f"and {len(plan.forms) - _SHOWN:,} more"))
    return rows


def _heads(found: Container) -> list[Head]:
    """Of the chains of a file coded by bits back, as far as they are there."""
    if found.kind != container.BITS_BACK:
        return []
    chains = (segment.levels[0] for segment in found.segments if segment.levels and not segment.raw)
    return [Head.read(chain)[0] for chain in chains]


#: Files that are listed.
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class Stage:
    """What the first levels of a file show.

    Attributes:
        share: of the bytes of the file.
        pictures: what is seen of each file.
        psnr: of each, ``10 log10(peak^2 / mean squared error)``, in decibels; infinite where it is exact.
    """

    share: float
    pictures: list[Picture]
    psnr: list[float]


def stages(
    data: bytes,
    model: str | os.PathLike[str] | ImageCoder,
    *,
    name: str = "the file",
    limit: int = LIMIT,
    progress: bool = False,
) -> list[Stage]:
    """A ``.dfl`` after each of its levels, as a file that arrives part by part.

    Arguments are those of `decompress_images`.

    Raises:
        InputError: as of `decompress_images`.
    """
    given = {"name": name, "limit": limit, "progress": progress}
    exact = decompress_images(data, model, **given)  # type: ignore[arg-type]
    found = container.read(data)
    if not isinstance(model, ImageCoder):
        model = ImageCoder.load(model, MODES[found.mode])
    stages, sizes = [], found.level_bytes
    for level in range(1, found.num_levels + 1):
        coarse = exact
        if level < found.num_levels:
            coarse = decompress_images(data, model, levels=level, **given)  # type: ignore[arg-type]
        psnr = [_psnr(a, b, model.bits) for a, b in zip(coarse, exact, strict=True)]
        share = (found.header + sum(sizes[:level])) / len(data)
        stages.append(Stage(share, coarse, psnr))
    return stages


def _psnr(coarse: Picture, exact: Picture, bits: int) -> float:
    error = float(np.square(coarse.values.astype(np.float64) - exact.values).mean())
    peak = (1 << depth_of(exact.form, bits)) - 1
    return 10 * log10(peak**2 / error) if error else inf


# -- meta ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What the meta of a file of images tells.

    Attributes:
        tiles: of a segment; 0 for all in one.
        machine: checksum of the machine and software, in mode float32, else 0.
        forms: of the files.
    """

    tiles: int
    machine: int
    forms: tuple[Form, ...]


def _machine() -> int:
    """What results in float32 hang on."""
    about = (
        platform.machine(), torch.__version__, torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(), torch.backends.mkldnn.enabled,
    )  # fmt: skip
    return crc32(repr(about).encode())


def _meta(plan: Plan, single: bool) -> bytes:
    parts = [plan.machine.to_bytes(4, "little")] if single else []
    parts.append(varint(len(plan.forms)))
    for form in plan.forms:
        other = 0 if form.alpha is None else 1 if form.alpha >= 0 else 2
        if form.is_array:
            other = len(form.dims) - 2
        parts.append(bytes([form.source << 6 | other << 4 | form.depth - 1]))
        parts += map(varint, form.dims)
        if form.alpha is not None and form.alpha >= 0:
            parts.append(varint(form.alpha))
        name = form.name.encode()
        parts.append(varint(len(name)) + name)
    data = b"".join(parts)
    if len(data) > _META:
        raise InputError(f"{len(plan.forms):,} files are too many for one; compress fewer, or use --separate")
    packed = zlib.compress(data, 9)
    short = len(packed) < len(data)
    return varint(plan.tiles * 2 + short) + (packed if short else data)


def _plan(found: Container) -> Plan:
    """The meta of a file; `Damaged` if it is none of images."""
    if found.kind not in (container.IMAGES, container.BITS_BACK):
        raise Damaged(
            f"holds {container.KINDS.get(found.kind, 'what this version does not know')}, no images"
        )
    if found.mode >= len(MODES):
        raise Damaged(f"numeric mode {found.mode} is not known to this version")
    if len(found.meta) > _META:
        raise Damaged("its list of files is too long")
    reader = Reader(found.meta)
    tiles, packed = divmod(reader.varint(1 << 41), 2)
    if packed:
        unpacking = zlib.decompressobj()
        try:
            data = unpacking.decompress(reader.take(reader.left), _META)
        except zlib.error:
            raise Damaged("its list of files is damaged") from None
        if not unpacking.eof or unpacking.unused_data:
            raise Damaged("its list of files is damaged, or too long")
        reader = Reader(data)
    machine = int.from_bytes(reader.take(4), "little") if MODES[found.mode] == "float32" else 0
    forms, names = [], set()
    for _ in range(reader.varint(reader.left // 4)):
        byte = reader.byte()
        source, other, depth = byte >> 6, byte >> 4 & 3, (byte & 15) + 1
        array = source >= pixels.UINT8
        if other == 3 or (source == pixels.UINT8 and depth > 8):
            raise Damaged("a form of file that this version does not know")
        dims = tuple(reader.varint(1 << 40) for _ in range(2 + other if array else 2))
        alpha = None if array or not other else reader.varint((1 << 16) - 1) if other == 1 else -1
        name = reader.take(reader.varint(reader.left)).decode("utf-8", "replace")
        form = Form(name, source, depth, dims, alpha)
        if wrong := pixels.check_name(name):
            raise Damaged(f"holds a file whose name {name!r} {wrong}; it is not written")
        if 0 in dims or form.file in names or (alpha or 0) >> form.file_depth > 0:
            raise Damaged(f"holds {form.file} twice, empty or with an alpha that is none")
        names.add(form.file)
        forms.append(form)
    reader.finish()
    if not forms:
        raise Damaged("holds no files")
    return Plan(tiles, machine, tuple(forms))


def _amount(form: Form) -> int:
    """Values of a file, those of an alpha plane included."""
    return prod(form.full) + (form.dims[0] * form.dims[1] if form.alpha == -1 else 0)


# -- encoding --------------------------------------------------------------------------------------------


def _encode(
    coder: ImageCoder, pictures: Sequence[Picture], tiles: int | None, analytic: bool, progress: bool
) -> tuple[bytes, Clock, float | None]:
    grids = [grid(picture.form, coder.shape) for picture in pictures]
    total = sum(g.size for g in grids)
    if tiles is None:
        tiles = coder.tiles(total)
    if not 1 <= tiles <= coder.most:
        raise InputError(
            f"{tiles} tiles of a segment are not in 1..{coder.most}; more would take too much memory"
        )
    cuts = functools.lru_cache(2)(
        lambda i: grids[i].cut(shown(pictures[i].values, depth_of(pictures[i].form, coder.bits), coder.bits))
    )

    def tiles_of(spans: list[tuple[int, int, int]]) -> tuple[Array, Tensor]:
        x = np.concatenate([cuts(i)[start:stop] for i, start, stop in spans])
        return x, torch.from_numpy(x.astype(np.int64))

    segments: list[Segment] = []
    with clock(coder.law) as timed, _bar(total, "encode", progress) as bar:
        for spans in _spans(grids, tiles):
            x, rows = tiles_of(spans)
            content = x[np.concatenate([grids[i].real(start, stop) for i, start, stop in spans])]
            coded, raw = coder.push(rows, not segments), False
            # The highest effort may take ten times as long, and matters for what is kept.
            if not coder.pays(coded, _pack(content, coder.bits, 6), content.size):
                coded, raw = [_pack(content, coder.bits, 9)], True
            segments.append(Segment(crc32(_bytes(content)), raw, tuple(coded)))
            bar.update(len(x))
    bits = None
    if analytic:
        pairs = zip(_spans(grids, tiles), segments, strict=True)
        bits = sum(coder.ideal(tiles_of(spans)[1]) for spans, segment in pairs if not segment.raw)
    extra = b"".join(_extra(picture, coder.bits) for picture in pictures)
    if extra:
        last = zlib.compress(extra, 9)
        segments.append(Segment(crc32(extra), True, (*[b""] * (coder.num_levels - 1), last)))
    single = coder.mode == "float32"
    plan = Plan(
        0 if total <= tiles else tiles,
        _machine() if single else 0,
        tuple(picture.form for picture in pictures),
    )
    file = Container(
        coder.kind, MODES.index(coder.mode), coder.fingerprint, _meta(plan, single), tuple(segments)
    )
    return container.write(file), timed, bits


def _spans(grids: Sequence[Grid], tiles: int) -> Iterator[list[tuple[int, int, int]]]:
    """Of each segment the files and which tiles of them: index, start, stop."""
    spans, room = [], tiles
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


def _bar(total: int, what: str, progress: bool) -> Any:
    return tqdm(total=total, unit="tile", desc=what, delay=1, mininterval=1, disable=not progress)


def _bytes(values: Array) -> bytes:
    return values.astype("<u2" if values.dtype.itemsize > 1 else np.uint8).tobytes()


def _pack(values: Array, bits: int, effort: int) -> bytes:
    """Values below ``2^bits``, packed; deflated where that is shorter."""
    wide = values.astype(">u2").view(np.uint8).reshape(-1, 2)
    packed = np.packbits(np.unpackbits(wide, axis=1)[:, 16 - bits :]).tobytes()
    return min(packed, zlib.compress(packed, effort), key=len)


def _unpack(data: bytes, n: int, bits: int) -> Array:
    """The inverse, of ``n`` values; `Damaged` if it holds others."""
    size = ceil(n * bits / 8)
    if len(data) != size:
        data = _inflate(data, size)
    wide = np.zeros((n, 16), np.uint8)
    wide[:, 16 - bits :] = np.unpackbits(np.frombuffer(data, np.uint8), count=n * bits).reshape(n, bits)
    return np.packbits(wide, axis=1).view(">u2").ravel().astype(np.uint16)


def _inflate(data: bytes, size: int) -> bytes:
    """Deflated data of a known size, and not a byte more."""
    unpacking = zlib.decompressobj()
    try:
        found = unpacking.decompress(data, size + 1)
    except zlib.error:
        found = b""
    if len(found) != size or not unpacking.eof or unpacking.unused_data:
        raise Damaged("what is stored beside the model is not as long as it should be")
    return found


def _extra(picture: Picture, bits: int) -> bytes:
    """What goes beside the model: low bits and the plane of alpha."""
    low, parts = depth_of(picture.form, bits) - bits, []
    if low > 0:
        rest = picture.values & np.uint16((1 << low) - 1)
        parts.append(rest.astype(np.uint8 if low <= 8 else "<u2").tobytes())
    if picture.alpha is not None:
        parts.append(_bytes(picture.alpha.astype(np.uint8 if picture.form.file_depth <= 8 else "<u2")))
    return b"".join(parts)


# -- decoding --------------------------------------------------------------------------------------------


def _decode(
    found: Container, coder: ImageCoder, wanted: int | None, limit: int, progress: bool
) -> tuple[list[Picture], Clock]:
    plan = _plan(found)
    if isinstance(coder, BitsBackCoder):
        coder.back.clear()
    if found.kind != coder.kind:
        raise Damaged(
            f"holds {container.KINDS[found.kind]}, and {coder.where} is a model for "
            f"{container.KINDS[coder.kind]}: give the model that it was made by"
        )
    if MODES[found.mode] != coder.mode or found.fingerprint != coder.fingerprint:
        raise Damaged(
            f"was made by the model {found.fingerprint.hex()} in mode {MODES[found.mode]}; {coder.where} is "
            f"{coder.fingerprint.hex()} in mode {coder.mode}: give the model that it was made by"
        )
    if coder.mode == "float32" and plan.machine != _machine():
        raise Damaged(
            "was made in mode float32 on another machine, by another build of torch or with other "
            "threads (--threads), and decodes there only; use mode float64 or fixed for files to keep"
        )
    if wanted is not None and not 1 <= wanted <= found.present:
        raise Damaged(f"has {found.present} whole levels of {found.num_levels}; {wanted} were asked for")
    try:
        grids = [grid(form, coder.shape) for form in plan.forms]
    except ValueError as error:
        raise Damaged(f"does not fit its model ({error})") from None
    declared = sum(g.size for g in grids) * coder.dim
    if declared > limit:
        raise Damaged(f"declares {declared:,} values, more than {limit:,}; if it is trusted, raise --limit")
    total = declared // coder.dim
    tiles = plan.tiles or total
    if tiles > coder.most:
        raise Damaged(f"declares segments of {tiles} tiles, which would take too much memory")
    extras = [_extra_bytes(form, coder.bits) for form in plan.forms]
    if len(found.segments) != ceil(total / tiles) + any(extras):
        raise Damaged(f"has {len(found.segments)} segments, which its pictures do not need")
    kind = np.uint8 if coder.bits <= 8 else np.uint16
    exact = wanted is None or wanted == found.num_levels
    values: list[Array] = []
    mine = np.empty(0)
    with clock(coder.law) as timed, _bar(total, "decode", progress) as bar:
        for n, (spans, segment) in enumerate(zip(_spans(grids, tiles), found.segments, strict=False)):
            real = np.concatenate([grids[i].real(start, stop) for i, start, stop in spans])
            x = _segment(coder, segment, real, n + 1, wanted, exact).astype(kind)
            at = 0
            for i, start, stop in spans:
                if not start:
                    mine = np.empty((grids[i].size, coder.dim), kind)
                mine[start:stop] = x[at : at + stop - start]
                at += stop - start
                if stop == grids[i].size:
                    depth = depth_of(plan.forms[i], coder.bits)
                    values.append(meant(grids[i].join(mine), depth, coder.bits))
            bar.update(at)
    extra = _read_extra(found, sum(extras), wanted) if any(extras) else None
    pictures, at = [], 0
    for form, value, size in zip(plan.forms, values, extras, strict=True):
        part = None if extra is None else extra[at : at + size]
        pictures.append(_finished(form, value, part, coder.bits, exact))
        at += size
    return pictures, timed


def _segment(
    coder: ImageCoder, segment: Segment, real: Array, number: int, wanted: int | None, exact: bool
) -> Array:
    """The tiles of a segment."""
    n = int(real.sum())
    if segment.raw:
        if len(segment.lengths) != 1:
            raise Damaged(f"segment {number} is raw, and has levels")
        x = np.zeros(real.shape, np.uint16)
        x[real] = _unpack(segment.levels[0], n, coder.bits)
    else:
        if len(segment.lengths) != coder.num_levels:
            raise Damaged(f"segment {number} has {len(segment.lengths)} levels, its model {coder.num_levels}")
        try:
            found = coder.pop(len(real), segment.levels[:wanted])
        except (ValueError, OverflowError) as error:
            raise Damaged(f"segment {number} does not decode ({error})") from None
        top = (1 << coder.bits) - 1
        if not exact:
            found = found.clamp(0, top)
        elif int(found.min()) < 0 or int(found.max()) > top:
            raise Damaged(f"segment {number} decodes to what is no picture")
        x = found.numpy()
    if exact or segment.raw:
        content = x[real].astype(np.uint8 if coder.bits <= 8 else np.uint16)
        if crc32(_bytes(content)) != segment.crc:
            raise Damaged(
                f"segment {number} decodes to other pixels than it was made from (checksum): the file is "
                "damaged, or this machine rounds otherwise than the one it was made on"
            )
    return x


def _extra_bytes(form: Form, bits: int) -> int:
    low = depth_of(form, bits) - bits
    size = prod(form.full) * (0 if low <= 0 else 1 if low <= 8 else 2)
    return size + (form.dims[0] * form.dims[1] * ceil(form.file_depth / 8) if form.alpha == -1 else 0)


def _read_extra(found: Container, size: int, wanted: int | None) -> bytes | None:
    """The bytes of `_extra`, or None where the last level is not there or not wanted."""
    segment = found.segments[-1]
    if not segment.raw or any(segment.lengths[:-1]) or not segment.lengths[-1]:
        raise Damaged("what is stored beside the model is not in the last level")
    if len(segment.levels) < len(segment.lengths) or (wanted or found.num_levels) < found.num_levels:
        return None
    data = _inflate(segment.levels[-1], size)
    if crc32(data) != segment.crc:
        raise Damaged("what is stored beside the model is damaged (checksum)")
    return data


def _finished(form: Form, values: Array, extra: bytes | None, bits: int, exact: bool) -> Picture:
    """A picture of its high bits and what lay beside the model; without that of middle values, opaque."""
    low = max(0, depth_of(form, bits) - bits)
    alpha = None
    if low and extra is not None:
        rest = np.frombuffer(extra, np.uint8 if low <= 8 else "<u2", values.size)
        extra = extra[rest.nbytes :]
        if int(rest.max()) >> low:
            raise Damaged("what is stored beside the model does not fit it")
        values = values | rest.reshape(values.shape)
    elif low:
        values = values | np.uint16(1 << (low - 1))
    if form.alpha == -1:
        kind: Any = np.uint8 if form.file_depth <= 8 else np.dtype("<u2")
        if extra is not None:
            alpha = np.frombuffer(extra, kind).reshape(form.dims)
        else:
            alpha = np.full(form.dims, (1 << form.file_depth) - 1, kind)
    top = (1 << (form.file_depth if form.is_array else form.depth)) - 1
    if int(values.max()) > top:
        if exact:
            raise Damaged(f"{form.file} decodes to values that it cannot hold")
        values = values.clip(max=top)
    return Picture(form, values.astype(np.uint8 if form.file_depth <= 8 else np.uint16), alpha)
