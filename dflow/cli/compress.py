"""``dflow compress``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dflow.cli.flags import Verbs, flag
from dflow.cli.shared import Results, make_folder, set_threads
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.compress import ImageCoder, Report


@dataclass(kw_only=True)
class Compress(Results):
    """Compress pictures, or files of any kind, without loss.

    Pictures by a flow, integer or dequantized; files of any kind by a model of text.

    Every value of a picture or an array (.npy of uint8 or uint16) comes back; ICC profiles, EXIF data and the
    bytes of the original file do not. A picture comes back as PNG. By a model of text every byte comes back.

    By a dequantized flow (local bits-back) the first pictures need auxiliary bits: those of a file that comes
    back with the pictures, or else random ones, which make a file of few pictures larger than they are.
    """

    files: list[str] = field(
        metadata={
            "help": "pictures or .npy arrays; for a model of text files of any kind",
            "positional": True,
        }
    )
    output: str = flag("file to write, whole or not at all; with --separate a folder", short="-o")
    model: str = flag("folder of the model")
    mode: Literal["float64", "fixed", "float32"] = flag(
        "numbers that the networks compute in: float64; fixed, integers, the same on every machine; float32, "
        "fastest, decodes on this machine only",
        "float64",
    )
    separate: bool = flag("a file for each", False)
    tiles: int | None = flag(
        "tiles of a segment, which is coded by itself (default: those of 2^19 values)", None
    )
    no_verify: bool = flag("do not decode and compare before writing", False)
    auxiliary: str | None = flag(
        "of a dequantized flow: file whose bits to lend; it is stored too and comes back (default: random)",
        None,
    )
    allow_larger: bool = flag("of a dequantized flow: also where the result is larger than the values", False)
    grid: int | None = flag("of a dequantized flow: latents on multiples of 2^-GRID (default: 18)", None)
    sigma: int | None = flag("of a dequantized flow: local deviations of 2^-SIGMA (default: 14)", None)
    noise: int | None = flag("of a dequantized flow: bits of noise a dimension (default: 12)", None)
    batch_size: int = flag("tiles, or chunks of a text, that the networks see at a time", 64)
    threads: int | None = flag("threads of torch on the CPU (default: one a processor)", None)


def compress(flags: Compress) -> int:
    """`dflow compress`."""
    from dflow.generate import check_output
    from dflow.hf import DflowClassifier, DflowImageModel, kind_of

    set_threads(flags.threads)
    files, output = [Path(name) for name in flags.files], Path(flags.output)
    if folder := next((file for file in files if file.is_dir()), None):
        raise InputError(f"{folder}: a folder; name the files in it, for example {folder / '*'}")
    if kind_of(flags.model) is DflowClassifier:
        raise InputError(f"{flags.model}: a model of labels, which codes nothing; give one of text or images")
    is_text = kind_of(flags.model) is not DflowImageModel
    jobs = [(output, files)]
    if flags.separate:
        make_folder(output)
        stems = [file.stem for file in files]
        names = [file.name if is_text or stems.count(file.stem) > 1 else file.stem for file in files]
        jobs = [(output / f"{name}.dfl", [file]) for name, file in zip(names, files, strict=True)]
        check_distinct(files, [target for target, _ in jobs], "be written to")
    for target, _ in jobs:
        check_output(target)
    return compress_files(flags, jobs) if is_text else compress_pictures(flags, jobs)


def compress_pictures(flags: Compress, jobs: list[tuple[Path, list[Path]]]) -> int:
    """`dflow compress` by a model of images."""
    from dflow.compress import LIMIT, compress_images, load_image_coder
    from dflow.generate import write_whole

    coder = tuned(load_image_coder(flags.model, flags.mode, flags.batch_size), flags)
    reports, notes = [], list[str]()
    for target, group in jobs:
        data, report = compress_images(
            group, coder, tiles=flags.tiles, verify=not flags.no_verify, progress=True
        )
        write_whole(target, data)
        reports.append(report)
        notes += report.lines
        if report.declared > LIMIT:
            notes.append(f"{target}: to decompress it takes --limit {report.declared}")
    show_notes(flags, notes)
    return show_pictures(flags, jobs, reports, notes, coder.borrows)


def show_pictures(
    flags: Compress,
    jobs: list[tuple[Path, list[Path]]],
    reports: list[Report],
    notes: list[str],
    bits_back: bool,
) -> int:
    """Print what compressing pictures gave."""
    total, values = sum(r.bytes for r in reports), sum(r.values for r in reports)
    encode, network = sum(r.encode.total for r in reports), sum(r.encode.network for r in reports)
    given, random = sum(r.given for r in reports), sum(r.random for r in reports)
    net = total - given - random
    about: dict[str, Any] = {
        "outputs": [str(target) for target, _ in jobs],
        "files": sum(len(group) for _, group in jobs),
        "bytes": total,
        "header_bytes": sum(r.header for r in reports),
        "values": values,
        "bits_a_dimension": 8 * total / values,
        "random_bytes": random,
        "given_bytes": given,
        "segments": sum(r.segments for r in reports),
        "raw_segments": sum(r.raw for r in reports),
        "seconds": encode,
        "network_seconds": network,
        "verified": not flags.no_verify,
        "notes": notes,
    }
    flags.show(
        about,
        [
            ("files", f"{about['files']:,} in {len(jobs):,}"),
            ("bytes", f"{total:,}, of these {sum(r.header for r in reports):,} of headers"),
            ("bits a dimension", f"{8 * total / values:.4f} of {values:,}"),
            *[
                ("auxiliary", f"{random:,} random bytes, {given:,} that come back"),
                ("net", f"{net:,} bytes, {8 * net / values:.4f} bits a dimension"),
            ]
            * bits_back,
            (
                "segments",
                f"{sum(r.segments for r in reports):,}, {sum(r.raw for r in reports):,} of them raw",
            ),
            ("encoded in", f"{encode:.2f} s, networks {network:.2f}, coder {encode - network:.2f}"),
            ("verified", "no (--no-verify)" if flags.no_verify else "decoded and compared"),
        ],
    )
    return 0


def check_distinct(files: Sequence[Path], names: Sequence[object], would: str) -> None:
    """`InputError` for two of the files that ``would`` (be written to, come back as) one of the names."""
    first: dict[object, Path] = {}
    for file, name in zip(files, names, strict=True):
        if name in first:
            raise InputError(
                f"{first[name]} and {file} would both {would} {name}; rename one, or compress them by two "
                "commands, each with an --output of its own"
            )
        first[name] = file


def show_notes(flags: Results, notes: Sequence[str]) -> None:
    """A line each, where they are not part of a JSON document."""
    if not flags.json:
        for note in notes:
            print(note)


def tuned(coder: ImageCoder, flags: Compress) -> ImageCoder:
    """``coder`` as the flags of bits-back ask for it."""
    from dflow.compress.pixels import check_name

    asked = {name: getattr(flags, name) for name in ("grid", "sigma", "noise")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not coder.borrows:
        check_no_bits_back(flags, "an integer flow")
        return coder
    try:
        settings = dataclasses.replace(coder.settings, **asked)
    except ValueError as error:
        raise InputError(str(error)) from None
    lend = None
    if flags.auxiliary is not None:
        path = Path(flags.auxiliary)
        if wrong := check_name(path.name):
            raise InputError(f"{str(path)!r}: its name {wrong}; rename the file")
        lend = (path.name, path.read_bytes())
        if flags.separate:
            raise InputError("--auxiliary lends to one file; leave out --separate")
    return dataclasses.replace(coder, settings=settings, lend=lend, larger=flags.allow_larger)


def check_no_bits_back(flags: Compress, what: str) -> None:
    """`InputError` for a flag of dequantized flows."""
    for name in ("auxiliary", "allow_larger", "grid", "sigma", "noise"):
        if getattr(flags, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} is for dequantized flows; {flags.model} is {what}")


def compress_files(flags: Compress, jobs: list[tuple[Path, list[Path]]]) -> int:
    """`dflow compress` by a model of text."""
    from dflow.compress import TextCoder, compress_text
    from dflow.generate import write_whole

    if flags.mode != "float64" or flags.tiles is not None:
        what = "--tiles" if flags.tiles is not None else f"--mode {flags.mode}"
        raise InputError(f"{what} is for models of images; {flags.model} is one of text")
    check_no_bits_back(flags, "one of text")
    for _, group in jobs:
        check_distinct(group, [file.name for file in group], "come back as")
    coder, reports, notes = TextCoder.load(flags.model), [], list[str]()
    for target, group in jobs:
        data, report = compress_text(
            {file.name: file.read_bytes() for file in group},
            coder,
            batch=flags.batch_size,
            verify=not flags.no_verify,
            progress=True,
        )
        write_whole(target, data)
        reports.append(report)
        notes += [f"{target}: {note}" for note in report.notes]
    total, raw = sum(r.bytes for r in reports), sum(r.raw for r in reports)
    encode, network = sum(r.encode.total for r in reports), sum(r.encode.network for r in reports)
    show_notes(flags, notes)
    about = {
        "outputs": [str(target) for target, _ in jobs],
        "files": sum(r.files for r in reports),
        "bytes": total,
        "header_bytes": sum(r.header for r in reports),
        "raw_bytes": raw,
        "bits_a_byte": 8 * total / raw if raw else None,
        "symbols": sum(r.symbols for r in reports),
        "seconds": encode,
        "network_seconds": network,
        "verified": not flags.no_verify,
        "notes": notes,
    }
    flags.show(
        about,
        [
            ("files", f"{sum(r.files for r in reports):,} in {len(jobs):,}"),
            ("bytes", f"{total:,}, of these {sum(r.header for r in reports):,} of headers"),
            ("bits a byte", f"{8 * total / raw:.4f} of {raw:,}" if raw else "none: nothing in them"),
            ("symbols", f"{sum(r.symbols for r in reports):,}"),
            ("encoded in", f"{encode:.2f} s, networks {network:.2f}, coder {encode - network:.2f}"),
            ("verified", "no (--no-verify)" if flags.no_verify else "decoded and compared"),
        ],
    )
    return 0


VERBS: Verbs = (
    ("compress", Compress, compress, "dflow compress *.png -o pictures.dfl --model runs/images/idf"),
)
