"""``dflow compress``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dflow.cli.drafts import find_drafter
from dflow.cli.flags import Verbs, argument, flag, provided, refuse
from dflow.cli.shared import Results, Threads, make_folder, print_lines
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.compress import ImageCoder, Report, TextReport

#: Files to write, each with the files that it is made of.
Jobs = Sequence[tuple[Path, Sequence[Path]]]

#: Flags of dequantized flows.
BITS_BACK = ("auxiliary", "allow_larger", "grid", "sigma", "noise")


@dataclass(kw_only=True)
class Compress(Threads, Results):
    """Compress pictures, or files of any kind, without loss.

    A flow, integer or dequantized, compresses pictures; a model of text compresses files of any kind.

    Every value of a picture or an array (.npy of uint8 or uint16) comes back; ICC profiles, EXIF data and the
    bytes of the original file do not. A picture comes back as PNG. A model of text gives every byte back.

    With a dequantized flow (local bits-back) the first pictures need auxiliary bits: those of a file that
    comes back with the pictures, or else random ones, which make a file of few pictures larger than they are.
    """

    files: list[str] = argument("pictures or .npy arrays; for a model of text, files of any kind")
    output: str = flag("file to write, whole or not at all; with --separate a folder", short="-o")
    model: str = flag("folder of the model")
    mode: Literal["float64", "fixed", "float32"] = flag(
        "kind of numbers that the networks compute in: float64; fixed, integers, the same on every machine; "
        "float32, fastest, decodes on this machine only",
        "float64",
    )
    separate: bool = flag("compress each file into one of its own", False)
    tiles: int | None = flag(
        "number of tiles of a segment, which is coded by itself (default: those of 2^19 values)", None
    )
    no_verify: bool = flag("write the file without decoding and comparing it first", False)
    auxiliary: str | None = flag(
        "file that lends bits to a dequantized flow; it is stored too and comes back (default: random bits)",
        None,
    )
    allow_larger: bool = flag(
        "write a file of a dequantized flow even where it is larger than the values", False
    )
    grid: int | None = flag(
        "exponent of the grid of latents, multiples of 2^-GRID, of a dequantized flow (default: 18)", None
    )
    sigma: int | None = flag(
        "exponent of the local deviations, 2^-SIGMA, of a dequantized flow (default: 14)", None
    )
    noise: int | None = flag("bits of noise a dimension of a dequantized flow (default: 12)", None)
    protocol: Literal["chunks", "rolling"] = flag(
        "how a text is coded: chunks, each by itself and many at a time, or rolling, each given the text "
        "before it, by models with a context: fewer bits, and slower",
        "chunks",
    )
    adapt: bool = flag(
        "under --protocol rolling, let the counts of the model go on with the text before a chunk", False
    )
    draft: str = flag(
        "under --protocol rolling, code a text so that a transformer decompresses it in fewer network calls; "
        "what proposes symbols then is counts, those of the model itself, or the folder of a faster model of "
        "the same alphabet, as one of family ngram; auto is counts where the model has any; or none",
        "none",
    )
    batch_size: int = flag("number of tiles, or chunks of a text, that the networks see at a time", 64)


def compress(flags: Compress) -> int:
    """`dflow compress`."""
    from dflow.generate import check_output
    from dflow.hf import DflowClassifier, DflowImageModel, kind_of

    flags.set_threads()
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


def compress_pictures(flags: Compress, jobs: Jobs) -> int:
    """`dflow compress` by a model of images."""
    from dflow.compress import LIMIT, compress_images, load_image_coder
    from dflow.generate import write_whole

    if flags.protocol != "chunks" or flags.adapt or flags.draft != "none":
        what = f"--draft {flags.draft}" if flags.draft != "none" else f"--protocol {flags.protocol}"
        what = "--adapt" if flags.adapt else what
        raise InputError(f"{what} is for models of text; {flags.model} is of another kind")
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
    num_bytes, values = sum(r.bytes for r in reports), sum(r.values for r in reports)
    lent, random = sum(r.given for r in reports), sum(r.random for r in reports)
    segments, raw = sum(r.segments for r in reports), sum(r.raw for r in reports)
    net = num_bytes - lent - random
    figures = {
        "values": values,
        "bits_a_dimension": 8 * num_bytes / values,
        "random_bytes": random,
        "given_bytes": lent,
        "segments": segments,
        "raw_segments": raw,
    }
    rows = [("bits a dimension", f"{8 * num_bytes / values:.4f} of {values:,}")]
    if coder.borrows:
        rows += [
            ("auxiliary", f"{random:,} random bytes, {lent:,} that come back"),
            ("net", f"{net:,} bytes, {8 * net / values:.4f} bits a dimension"),
        ]
    rows.append(("segments", f"{segments:,}, {raw:,} of them raw"))
    return show_reports(flags, jobs, reports, notes, figures, rows)


def compress_files(flags: Compress, jobs: Jobs) -> int:
    """`dflow compress` by a model of text."""
    import torch

    from dflow.compress import TextCoder, compress_text
    from dflow.generate import write_whole

    if flags.mode != "float64" or flags.tiles is not None:
        what = "--tiles" if flags.tiles is not None else f"--mode {flags.mode}"
        raise InputError(f"{what} is for models of images; {flags.model} is one of text")
    refuse(flags, BITS_BACK, f"is for dequantized flows; {flags.model} is one of text")
    for _, group in jobs:
        check_distinct(group, [file.name for file in group], "come back as")
    coder, reports, notes = TextCoder.load(flags.model), [], list[str]()
    drafter = find_drafter(flags.draft, coder.law, coder.tokenizer, torch.device("cpu"))
    for target, group in jobs:
        data, report = compress_text(
            {file.name: file.read_bytes() for file in group},
            coder,
            batch=flags.batch_size,
            rolling=flags.protocol == "rolling",
            adapt=flags.adapt,
            draft=drafter,
            verify=not flags.no_verify,
            progress=True,
        )
        write_whole(target, data)
        reports.append(report)
        notes += [f"{target}: {note}" for note in report.notes]
    raw, symbols = sum(r.raw for r in reports), sum(r.symbols for r in reports)
    bits = 8 * sum(r.bytes for r in reports) / raw if raw else None
    figures: dict[str, Any] = {"raw_bytes": raw, "bits_a_byte": bits, "symbols": symbols}
    rows = [
        ("bits a byte", "none: the files are empty" if bits is None else f"{bits:.4f} of {raw:,}"),
        ("symbols", f"{symbols:,}"),
    ]
    if calls := sum(r.drafts.calls for r in reports):
        accepted = sum(r.drafts.tally.accepted for r in reports)
        drafts = sum(r.drafts.tally.drafted for r in reports)
        seconds = sum(r.decode.total for r in reports if r.decode)
        figures |= {"calls": calls, "drafted": drafts, "accepted": accepted, "decode_seconds": seconds}
        share = f"{calls:,} network calls; {accepted:,} of {drafts:,} drafted symbols accepted"
        rows.append(("decoded in", f"{seconds:.2f} s, {share}"))
    return show_reports(flags, jobs, reports, notes, figures, rows)


def show_reports(
    flags: Compress,
    jobs: Jobs,
    reports: Sequence[Report | TextReport],
    notes: list[str],
    figures: dict[str, Any],
    rows: list[tuple[str, str]],
) -> int:
    """Print sums over all files, with the ``figures`` and ``rows`` of one kind of model among them."""
    if not flags.json:
        print_lines(notes)
    files, num_bytes = sum(len(group) for _, group in jobs), sum(r.bytes for r in reports)
    headers, network = sum(r.header for r in reports), sum(r.encode.network for r in reports)
    encode = sum(r.encode.total for r in reports)
    record = {
        "outputs": [str(target) for target, _ in jobs],
        "files": files,
        "bytes": num_bytes,
        "header_bytes": headers,
        **figures,
        "seconds": encode,
        "network_seconds": network,
        "verified": not flags.no_verify,
        "notes": notes,
    }
    table = [
        ("files", f"{files:,} in {len(jobs):,}"),
        ("bytes", f"{num_bytes:,}, of these {headers:,} of headers"),
        *rows,
        ("encoded in", f"{encode:.2f} s, networks {network:.2f}, coder {encode - network:.2f}"),
        ("verified", "no (--no-verify)" if flags.no_verify else "decoded and compared"),
    ]
    flags.show(record, table)
    return 0


def check_distinct(files: Sequence[Path], names: Sequence[object], would: str) -> None:
    """`InputError` for two of the files that ``would`` (be written to, come back as) one of the names."""
    file_of: dict[object, Path] = {}
    for file, name in zip(files, names, strict=True):
        if name in file_of:
            raise InputError(
                f"{file_of[name]} and {file} would both {would} {name}; rename one, or compress them by two "
                "commands, each with an --output of its own"
            )
        file_of[name] = file


def tuned(coder: ImageCoder, flags: Compress) -> ImageCoder:
    """``coder`` with the settings of bits-back that the flags give."""
    from dflow.compress.pixels import check_name

    if not coder.borrows:
        refuse(flags, BITS_BACK, f"is for dequantized flows; {flags.model} is an integer flow")
        return coder
    try:
        settings = dataclasses.replace(coder.settings, **provided(flags, "grid", "sigma", "noise"))
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


VERBS: Verbs = (
    ("compress", Compress, compress, "dflow compress *.png -o pictures.dfl --model runs/images/idf"),
)
