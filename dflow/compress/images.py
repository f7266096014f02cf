"""Pictures and arrays as ``.dfl`` files, under integer flows of images and dequantized ones.

A picture of any size is cut into tiles of the model's size, those at its edges filled up by reflection. To a
model of three channels a grey picture shows the same values in each; to a model of one channel a picture in
colours shows each of its planes by itself. Values of fewer bits than the model's are spread over its range;
of more bits the highest go through the model, the lowest are packed beside it. All tiles of all files are
coded together, in segments that bound the memory and what damage can reach. Values come back exactly; what
else a file held (profiles, EXIF data, the bytes themselves) does not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, log10, prod
from pathlib import Path

import numpy as np

from dflow.coding import container
from dflow.coding.container import Container, Damaged
from dflow.coding.numeric import MODES
from dflow.compress import dfl, image_plan, pixels, segments
from dflow.compress.clock import Clock
from dflow.compress.coders import FileHead, ImageCoder, load_image_coder
from dflow.compress.dfl import BATCH, LIMIT, BaseReport, Description
from dflow.compress.image_plan import ImagePlan
from dflow.compress.pixels import Form, Picture
from dflow.compress.segments import Restored
from dflow.compress.tiles import depth_of, grid
from dflow.config import InputError


@dataclass(frozen=True, kw_only=True)
class Report(BaseReport):
    """What compressing pictures gave.

    Attributes:
        values: that the files hold, alpha planes included.
        declared: values of all tiles, which the limit of decoding counts.
        levels: bytes of each level, the coarsest first.
        segments: how many.
        raw: how many of them are stored raw.
        notes: what is not kept, by file.
        given: auxiliary bytes borrowed from a file that comes back.
        random: auxiliary bytes that were made up.
    """

    values: int
    declared: int
    levels: tuple[int, ...]
    segments: int
    raw: int
    notes: tuple[tuple[str, str], ...]
    given: int = 0
    random: int = 0

    @property
    def lines(self) -> list[str]:
        """``notes``, one line a kind: the first three files that it is of, and how many more."""
        return dfl.noted(self.notes)

    @property
    def auxiliary(self) -> int:
        """Bytes that were borrowed, whatever they were."""
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
        model: folder of a flow of images, or what `load_image_coder` made of it.
        mode: numeric mode, see `dflow.coding.numeric`.
        tiles: of a segment at most (default: those of 2^19 values, at least 64).
        batch: tiles that the networks see at a time.
        verify: decode the result and compare.
        analytic: compute the bits by the likelihood too, which takes as long as encoding.
        progress: show a bar on stderr.

    Raises:
        InputError: files that cannot be read exactly or do not fit the model, two of one name, a model that
            compresses no pictures; a result that does not decode to the values of the files.
    """
    coder = model if isinstance(model, ImageCoder) else load_image_coder(model, mode, batch)
    if not files:
        raise InputError("no files to compress")
    pictures = _renamed(files, [pixels.read(file) for file in files])
    for file, picture in zip(files, pictures, strict=True):
        check_fit(coder, file, picture)
    return compress_pictures(
        files, pictures, coder, tiles=tiles, verify=verify, analytic=analytic, progress=progress
    )


def compress_pictures(
    files: Sequence[Path],
    pictures: Sequence[Picture],
    coder: ImageCoder,
    *,
    tiles: int | None = None,
    verify: bool = True,
    analytic: bool = False,
    progress: bool = False,
) -> tuple[bytes, Report]:
    """`compress_images` of pictures that were read from ``files``, which fit the model and have names."""
    try:
        data, encode, bits = segments.encode(coder, pictures, tiles, analytic, progress)
    except InputError:
        raise
    except ValueError as error:
        # The model gives values that are not finite, or too large to code.
        raise InputError(f"{coder.where}: {error}") from None
    parsed = container.read(data)
    decode = _verify(parsed, coder, files, pictures, progress) if verify else None
    given, random, _ = _borrowed(parsed)
    return data, Report(
        files=len(pictures),
        values=sum(amount(picture.form) for picture in pictures),
        declared=coder.dim * sum(grid(picture.form, coder.shape).size for picture in pictures),
        bytes=len(data),
        header=parsed.header,
        levels=tuple(parsed.level_bytes),
        segments=len(parsed.segments),
        raw=sum(segment.raw for segment in parsed.segments),
        analytic=bits,
        encode=encode,
        decode=decode,
        notes=tuple((str(file), note) for file, p in zip(files, pictures, strict=True) for note in p.notes),
        given=given,
        random=random,
    )


def _renamed(files: Sequence[Path], pictures: Sequence[Picture]) -> list[Picture]:
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


def check_fit(coder: ImageCoder, file: Path, picture: Picture) -> None:
    """`InputError` for a file that the model cannot code, or that has the name of the auxiliary file."""
    back = picture.form.file
    if coder.lend and coder.lend[0] == back:
        raise InputError(f"{file} and the auxiliary file would both come back as {back}; rename one")
    try:
        grid(picture.form, coder.shape)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def _verify(
    parsed: Container, coder: ImageCoder, files: Sequence[Path], pictures: Sequence[Picture], progress: bool
) -> Clock:
    """Decode the result, and read the files by another way: `InputError` where they are not the same."""
    reason = ""
    try:
        restored = segments.decode(parsed, ImagePlan.read(parsed), coder, None, 1 << 62, progress)
        pairs = zip(files, pictures, restored.pictures, strict=True)
        wrong = [file for file, picture, back in pairs if not picture.same(back)]
    except Damaged as error:
        wrong, reason = [files[0]], f" ({error})"
    if wrong:
        raise InputError(
            f"{wrong[0]}: what was coded in mode {coder.mode} does not decode to it on this machine{reason}; "
            "nothing is written: use --mode fixed, which does not depend on how floats are rounded"
        )
    for file, picture in zip(files, pictures, strict=True):
        if not picture.same(pixels.read(file, again=True, name=picture.form.name)):
            raise InputError(
                f"{file}: two readers of its format find different values in it, or it has changed "
                "meanwhile; nothing is written: try again, or compress the array of its values as .npy"
            )
    return restored.clock


def decompress_images(
    data: bytes,
    model: str | os.PathLike[str] | ImageCoder,
    *,
    name: str = "the file",
    levels: int | None = None,
    limit: int = LIMIT,
    batch: int = BATCH,
    progress: bool = False,
) -> Restored:
    """All that comes back of a ``.dfl``: the pictures, and the files whose bits they borrowed.

    Args:
        data: the file; with ``levels`` it may be cut off behind them.
        model: as it was compressed by.
        name: of the file, for errors.
        levels: how many to use, the coarsest first (default: all).
        limit: values that the file may declare.
        batch: tiles that the networks see at a time.
        progress: show a bar on stderr.

    Raises:
        InputError: a file that is damaged, not a ``.dfl``, or of another model; more values than ``limit``.
    """
    with dfl.named(name, lambda: _hint(data) if levels is None else ""):
        parsed, plan = image_plan.parse(data, prefix=levels is not None)
        if not isinstance(model, ImageCoder):
            model = load_image_coder(model, MODES[parsed.mode], batch)
        return segments.decode(parsed, plan, model, levels, limit, progress)


def _hint(data: bytes) -> str:
    """What there is to do about a file that is cut off."""
    try:
        parsed = container.read(data, prefix=True)
    except Damaged:
        return ""
    if parsed.present == parsed.num_levels:
        return ""
    return f"; {parsed.present} of {parsed.num_levels} levels are whole: --levels {parsed.present} shows them"


def describe_images(data: bytes, name: str = "the file", every: bool = False) -> Description:
    """What is in a ``.dfl`` of images, in words: name and value. No model is needed.

    The files come last: the first of them, or ``every`` one.

    Raises:
        InputError: a file that is damaged or not a ``.dfl``.
    """
    with dfl.named(name):
        parsed, plan = image_plan.parse(data, prefix=True)
        given, random, names = _borrowed(parsed)
    values, total = sum(map(amount, plan.forms)), parsed.header + sum(parsed.level_bytes)
    size = f"{total:,}" + f", {len(data):,} of them there" * (len(data) < total)
    raw = sum(segment.raw for segment in parsed.segments)
    rows = [
        *dfl.describe(parsed, len(plan.forms), size),
        ("segments", f"{len(parsed.segments):,}, {raw:,} of them raw"),
    ]
    for i, num_bytes in enumerate(parsed.level_bytes):
        missing = "" if i < parsed.present else ", not there"
        bits = 8 * num_bytes / values
        rows.append((f"level {i + 1}", f"{num_bytes:,} bytes, {bits:.4f} bits a dimension{missing}"))
    if parsed.kind == container.BITS_BACK:
        net = total - given - random
        come_back = "".join(f", {file}" for file in names)
        rows += [
            ("auxiliary", f"{random:,} random bytes, {given:,} that come back{come_back}"),
            ("net", f"{net:,} bytes, {8 * net / values:.4f} bits a dimension"),
        ]
    rows.append(("in all", f"{8 * total / values:.4f} bits a dimension of {values:,}"))
    return rows + dfl.listed([(form.file, in_words(form)) for form in plan.forms], every)


def in_words(form: Form) -> str:
    """Size, kind and depth of a file."""
    kind = f"array of {pixels.SOURCES[form.source]}" if form.is_array else pixels.SOURCES[form.source]
    alpha = "" if form.alpha is None else ", alpha" if form.alpha < 0 else f", alpha {form.alpha}"
    return f"{' x '.join(map(str, form.dims))}, {kind}, {form.depth} bits{alpha}"


def amount(form: Form) -> int:
    """Values of a file, those of an alpha plane included."""
    return prod(form.full) + (prod(form.dims) if form.alpha == -1 else 0)


def _borrowed(parsed: Container) -> tuple[int, int, list[str]]:
    """Auxiliary bytes of files that come back, random ones, and the names of these files.

    Of the chains that are there of a file coded by bits back; of all others nothing.

    Raises:
        Damaged: a chain that does not begin with a head.
    """
    if parsed.kind != container.BITS_BACK:
        return 0, 0, []
    chains = (segment.levels[0] for segment in parsed.segments if segment.levels and not segment.raw)
    try:
        heads = [FileHead.read(chain)[0] for chain in chains]
    except ValueError as error:
        raise Damaged(str(error)) from None
    given, random = sum(head.given for head in heads), sum(4 * head.random for head in heads)
    return given, random, [head.name for head in heads if head.given]


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
    """A ``.dfl`` after each of its levels, as a file that arrives level by level.

    Arguments are those of `decompress_images`.

    Raises:
        InputError: as of `decompress_images`.
    """
    with dfl.named(name, lambda: _hint(data)):
        parsed, plan = image_plan.parse(data)
        coder = model if isinstance(model, ImageCoder) else load_image_coder(model, MODES[parsed.mode])
        steps = [
            segments.decode(parsed, plan, coder, level, limit, progress).pictures
            for level in range(1, parsed.num_levels + 1)
        ]
    sizes = parsed.level_bytes
    return [
        Stage(
            (parsed.header + sum(sizes[: level + 1])) / len(data),
            pictures,
            [_psnr(a, b, coder.bits) for a, b in zip(pictures, steps[-1], strict=True)],
        )
        for level, pictures in enumerate(steps)
    ]


def _psnr(coarse: Picture, exact: Picture, bits: int) -> float:
    error = float(np.square(coarse.values.astype(np.float64) - exact.values).mean())
    peak = (1 << depth_of(exact.form, bits)) - 1
    return 10 * log10(peak**2 / error) if error else inf
