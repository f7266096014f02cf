"""``dflow check``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.folders import Jobs, begins_archive, decoder, load_decoder, opened, shown_name
from dflow.cli.shared import Results, Threads, complain, print_table, table_of
from dflow.config import InputError


@dataclass(kw_only=True)
class Check(Threads, Jobs, Results):
    """Check whether a model folder or a .dfl file is whole.

    In a whole folder every file is as it was saved, and the model loads. Of a .dfl file the checksums, the
    index and the headers are checked; with --model all of it is decoded and thrown away. The exit code is 0
    where all is whole, 1 where anything is damaged, 2 where it cannot be checked.
    """

    file: str = argument("folder of a model; or .dfl file, or - for standard input", stdin=True)
    model: str | None = flag("folder of the model that a .dfl file was made by, to decode it with", None)
    limit: int = flag("largest number of values, or of bytes of text, that a .dfl file may declare", 1 << 28)


def check(flags: Check) -> int:
    """`dflow check`; exit code 1 where something is damaged or missing."""
    if flags.file == "-" or Path(flags.file).is_file():
        return check_dfl(flags)
    if flags.model is not None:
        raise InputError(
            f"{flags.file}: not a .dfl file, and --model goes with .dfl files alone; leave --model out"
        )
    return check_folder(flags)


def check_dfl(flags: Check) -> int:
    """Check a ``.dfl`` file."""
    title = shown_name(flags.file)
    flags.set_threads()
    with opened(flags.file) as file:
        wrong = list((archive_faults if begins_archive(file) else file_faults)(flags, file, title))
    decoded = flags.model is not None
    flags.end({"file": flags.file, "whole": not wrong, "decoded": decoded, "wrong": wrong})
    for fault in wrong:
        complain(f"{title}: {fault.removeprefix(f'{title}: ')}")
    if not wrong and not flags.json:
        how = "decoded to its checksums" if decoded else "its checksums are right; --model decodes it too"
        print(f"{title}: whole; {how}")
    return int(bool(wrong))


def archive_faults(flags: Check, file: BinaryIO, title: str) -> Iterator[str]:
    """What is wrong with an archive."""
    from dflow.coding.container import Damaged
    from dflow.compress.archive import Archive
    from dflow.compress.dfl import named
    from dflow.compress.unpacking import Unpacker, check_groups, chosen, unpack

    try:
        archive = Archive.read(file)
    except Damaged as error:
        yield str(error)
        return
    faults = list(check_groups(archive, flags.limit))
    yield from faults
    if flags.model is None or faults:
        return
    crew = flags.crew(flags.threads)
    with named(title):
        model = decoder(flags.model, archive, flags.limit)
    opened_groups = unpack(archive, Unpacker(model, flags.limit), chosen(archive, ()), crew, progress=True)
    yield from (group.wrong for group in opened_groups if group.wrong)


def file_faults(flags: Check, file: BinaryIO, title: str) -> Iterator[str]:
    """What is wrong with a ``.dfl`` that is no archive."""
    from dflow.coding.container import TEXT, Container, Damaged, kind_of
    from dflow.compress import TextCoder, decompress_images, decompress_text, dfl, image_plan, text_coder

    data = file.read()
    is_text = kind_of(data) == TEXT
    try:
        parsed: Container = (text_coder if is_text else image_plan).parse(data)[0]
    except Damaged as error:
        yield str(error)
        return
    if flags.model is None:
        return
    with dfl.named(title):
        coder, _ = load_decoder(flags.model, data, parsed.mode, dfl.BATCH, "auto")
        dfl.check_model(parsed, coder)
    try:
        if isinstance(coder, TextCoder):
            decompress_text(data, coder, name=title, limit=flags.limit, progress=True)
        else:
            decompress_images(data, coder, name=title, limit=flags.limit, progress=True)
    except InputError as error:
        yield str(error)


def check_folder(flags: Check) -> int:
    """Check the folder of a model."""
    from dflow import hf
    from dflow.hf import kind_of

    kind = kind_of(flags.file)
    folder, _ = hf.split_calls(flags.file)
    findings = hf.check(folder)
    if not flags.json:
        print_table(table_of(findings))
    wrong = [f"{f.name} {f.status}" for f in findings if f.status in ("damaged", "missing")]
    try:
        needed = {"config.json", *(file.name for file in hf.weight_files(folder))}
        hf.load(flags.file, kind=kind)  # type: ignore[type-var]
    except InputError as error:
        wrong.append(str(error))
    files = [dataclasses.asdict(f) for f in findings]
    flags.end({"model": flags.file, "whole": not wrong, "wrong": wrong, "files": files})
    if wrong:
        complain(f"{flags.file}: not whole: " + "; ".join(wrong))
        return 1
    unlisted = sorted(needed & {f.name for f in findings if f.status == "unlisted"})
    if flags.json:
        return 0
    if unlisted:
        print(
            f"{flags.file}: the model loads; whether {', '.join(unlisted)} are as they were saved cannot be "
            f"checked, since no {hf.MANIFEST} lists them"
        )
    else:
        print(f"{flags.file}: whole; the model loads")
    return 0


VERBS: Verbs = (("check", Check, check, "dflow check runs/grouped"),)
