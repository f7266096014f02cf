"""``dflow compress``."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from dflow.cli.drafts import find_drafter
from dflow.cli.flags import Verbs, argument, flag, provided, refuse
from dflow.cli.folders import Jobs, piped, read_stdin
from dflow.cli.shared import Results, Threads, make_folder, print_lines
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.compress import ImageCoder, Report, TextCoder, TextReport
    from dflow.compress.packing import FolderReport, Packer
    from dflow.distributions.drafted import Drafter

#: Files to write, each with the files that it is made of.
Targets = Sequence[tuple[Path, Sequence[Path]]]

#: Flags of dequantized flows.
BITS_BACK = ("auxiliary", "allow_larger", "grid", "sigma", "noise")
#: Flags of folders.
FOLDER = ("store", "strict", "times")


@dataclass(kw_only=True)
class Compress(Threads, Jobs, Results):
    """Compress pictures, texts or a folder of them without loss.

    A flow, integer or dequantized, compresses pictures; a model of text compresses files of any kind.

    Every value of a picture or an array (.npy of uint8 or uint16) comes back; ICC profiles, EXIF data and the
    bytes of the original file do not. A picture comes back as PNG. A model of text gives every byte back.

    With a dequantized flow (local bits-back) the first pictures need auxiliary bits: those of a file that
    comes back with the pictures, or else random ones, which make a file of few pictures larger than they are.

    Of a folder all files in it and in its sub-folders are compressed, by names relative to it; what the model
    cannot code is left out and named, or stored. The exit code is 0 where every file is in the result, 1
    where some are left out, 2 where nothing is written.
    """

    files: list[str] = argument(
        "pictures or .npy arrays; for a model of text, files of any kind; or one folder; or - for standard "
        "input",
        stdin=True,
    )
    output: str = flag(
        "file to write, whole or not at all, or - for standard output; with --separate a folder",
        short="-o",
        stdout=True,
    )
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
    store: bool = flag(
        "store files of a folder that the model cannot code, instead of leaving them out", False
    )
    strict: bool = flag("refuse a folder of which any file would be left out", False)
    times: bool = flag("keep when the files of a folder were changed", False)
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
    """`dflow compress`; exit code 1 where files of a folder are left out."""
    from dflow.hf import DflowClassifier, DflowImageModel, kind_of

    flags.set_threads()
    if kind_of(flags.model) is DflowClassifier:
        raise InputError(f"{flags.model}: a model of labels, which codes nothing; give one of text or images")
    is_text = kind_of(flags.model) is not DflowImageModel
    check_kind(flags, is_text)
    with read_stdin(flags.files) as files, piped(flags.output) as stream:
        if folder := next((file for file in files if file.is_dir()), None):
            if len(files) > 1 or flags.separate:
                raise InputError(f"{folder}: a folder; name it alone, without --separate, or files")
            return compress_tree(flags, folder, is_text, stream)
        refuse(flags, FOLDER, "is for folders; these are files")
        targets = targets_of(flags, files, is_text)
        return (compress_files if is_text else compress_pictures)(flags, targets, stream)


def targets_of(flags: Compress, files: list[Path], is_text: bool) -> Targets:
    """The files to write; `InputError` where one is there already."""
    from dflow.generate import check_output

    output = Path(flags.output)
    targets: Targets = [(output, files)]
    if flags.separate:
        if flags.output == "-":
            raise InputError("--output -: standard output is one file; leave out --separate")
        make_folder(output)
        stems = [file.stem for file in files]
        names = [file.name if is_text or stems.count(file.stem) > 1 else file.stem for file in files]
        targets = [(output / f"{name}.dfl", [file]) for name, file in zip(names, files, strict=True)]
        check_distinct(files, [target for target, _ in targets], "be written to")
    if flags.output != "-":
        for target, _ in targets:
            check_output(target)
    return targets


def check_kind(flags: Compress, is_text: bool) -> None:
    """`InputError` for flags of the other kind of model."""
    if is_text:
        if flags.mode != "float64" or flags.tiles is not None:
            what = "--tiles" if flags.tiles is not None else f"--mode {flags.mode}"
            raise InputError(f"{what} is for models of images; {flags.model} is one of text")
        refuse(flags, BITS_BACK, f"is for dequantized flows; {flags.model} is one of text")
    elif flags.protocol != "chunks" or flags.adapt or flags.draft != "none":
        what = f"--draft {flags.draft}" if flags.draft != "none" else f"--protocol {flags.protocol}"
        what = "--adapt" if flags.adapt else what
        raise InputError(f"{what} is for models of text; {flags.model} is of another kind")


def write_to(target: Path, data: bytes, stream: BinaryIO | None) -> None:
    """Write a file whole or not at all, or to standard output."""
    from dflow.generate import write_whole

    if stream is None:
        write_whole(target, data)
    else:
        stream.write(data)


def compress_tree(flags: Compress, folder: Path, is_text: bool, stream: BinaryIO | None) -> int:
    """`dflow compress` of a folder."""
    from dflow.compress.folder import walk
    from dflow.compress.packing import compress_folder
    from dflow.data.files import writing
    from dflow.generate import check_output

    for name, reason in (
        ("tiles", "groups of a folder have as many as are fastest"),
        ("auxiliary", "lends to one file, and the groups of a folder are many"),
    ):
        if getattr(flags, name) is not None:
            raise InputError(f"--{name}: {reason}; leave it out for a folder")
    crew, output = flags.crew(flags.threads), Path(flags.output)
    if stream is None:
        check_output(output)
    walked, packer = walk(folder), packer_of(flags, is_text)
    start = time.perf_counter()
    with contextlib.nullcontext(stream) if stream is not None else writing(output) as file:
        report = compress_folder(
            walked,
            packer,
            file,
            store=flags.store,
            strict=flags.strict,
            times=flags.times,
            crew=crew,
            progress=True,
        )
    return show_folder(flags, report, time.perf_counter() - start)


def packer_of(flags: Compress, is_text: bool) -> Packer:
    """What reads and codes the files of a folder."""
    from dflow.compress.crew import Loaded
    from dflow.compress.packing import PicturePacker, TextPacker

    if not is_text:
        return PicturePacker(Loaded(partial(load_pictures, flags)), not flags.no_verify)
    rolling = flags.protocol == "rolling"
    texts = Loaded(partial(load_texts, flags))
    return TextPacker(texts, flags.batch_size, rolling, flags.adapt, not flags.no_verify)


def load_pictures(flags: Compress) -> ImageCoder:
    """The model of images, with the settings of the flags."""
    from dflow.compress import load_image_coder

    return tuned(load_image_coder(flags.model, flags.mode, flags.batch_size), flags)


def load_texts(flags: Compress) -> tuple[TextCoder, Drafter | None]:
    """The model of text, and what drafts."""
    import torch

    from dflow.compress import TextCoder

    coder = TextCoder.load(flags.model)
    return coder, find_drafter(flags.draft, coder.law, coder.tokenizer, torch.device("cpu"))


def show_folder(flags: Compress, report: FolderReport, seconds: float) -> int:
    """Print what came of a folder; 1 where files are left out."""
    from dflow.compress.dfl import noted

    if not flags.json:
        print_lines(noted(report.notes))
        print_lines([f"stored: {name}: {reason}" for name, reason in report.stored])
        print_lines([f"left out: {name}: {reason}" for name, reason in report.left_out])
    share = f"{report.bytes / report.raw:.4f} of them" if report.raw else "of none"
    network = report.encode.network + (report.decode.network if report.decode else 0)
    coder = report.encode.coder + (report.decode.coder if report.decode else 0)
    record = {
        "outputs": [flags.output],
        "files": report.files,
        "raw_bytes": report.raw,
        "bytes": report.bytes,
        "index_bytes": report.header,
        "groups": len(report.groups),
        "seconds": seconds,
        "network_seconds": network,
        "coder_seconds": coder,
        "verified": not flags.no_verify,
        "stored": dict(report.stored),
        "left_out": dict(report.left_out),
        "notes": noted(report.notes),
    }
    rows = [
        ("files", f"{report.files:,} in {len(report.groups):,} groups"),
        ("left out", f"{len(report.left_out):,}"),
        ("stored", f"{len(report.stored):,} that the model cannot code"),
        ("bytes of files", f"{report.raw:,}"),
        ("bytes", f"{report.bytes:,}, {share}, {report.header:,} of the index"),
        ("seconds", f"{seconds:.2f}, of all processes: networks {network:.2f}, coder {coder:.2f}"),
        ("rate", f"{report.raw / 1e6 / seconds:.3f} MB a second"),
        ("verified", "no (--no-verify)" if flags.no_verify else "decoded and compared"),
    ]
    flags.show(record, rows)
    return int(bool(report.left_out))


def compress_pictures(flags: Compress, targets: Targets, stream: BinaryIO | None) -> int:
    """`dflow compress` by a model of images."""
    from dflow.compress import LIMIT, compress_images

    coder = load_pictures(flags)
    reports, notes = [], list[str]()
    for target, group in targets:
        data, report = compress_images(
            group, coder, tiles=flags.tiles, verify=not flags.no_verify, progress=True
        )
        write_to(target, data, stream)
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
    return show_reports(flags, targets, reports, notes, figures, rows)


def compress_files(flags: Compress, targets: Targets, stream: BinaryIO | None) -> int:
    """`dflow compress` by a model of text."""
    from dflow.compress import compress_text

    for _, group in targets:
        check_distinct(group, [file.name for file in group], "come back as")
    (coder, drafter), reports, notes = load_texts(flags), [], list[str]()
    for target, group in targets:
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
        write_to(target, data, stream)
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
    return show_reports(flags, targets, reports, notes, figures, rows)


def show_reports(
    flags: Compress,
    targets: Targets,
    reports: Sequence[Report | TextReport],
    notes: list[str],
    figures: dict[str, Any],
    rows: list[tuple[str, str]],
) -> int:
    """Print sums over all files, with the ``figures`` and ``rows`` of one kind of model among them."""
    if not flags.json:
        print_lines(notes)
    files, num_bytes = sum(len(group) for _, group in targets), sum(r.bytes for r in reports)
    headers, network = sum(r.header for r in reports), sum(r.encode.network for r in reports)
    encode = sum(r.encode.total for r in reports)
    record = {
        "outputs": [str(target) for target, _ in targets],
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
        ("files", f"{files:,} in {len(targets):,}"),
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
