"""``dflow info``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.folders import begins_archive, listing, opened, shown_name
from dflow.cli.shared import Results

if TYPE_CHECKING:
    from dflow.compress.archive import Archive


@dataclass(kw_only=True)
class Info(Results):
    """Describe a .dfl file: model, mode, files, sizes of levels.

    No model is needed. With --list each file of a folder has a line: its name, the bytes that it had, its
    kind, and the bits a value (of a text, a byte) that the files coded together with it take.
    """

    file: str = argument(".dfl file, or - for standard input", stdin=True)
    list: bool = flag("list all files", False)


def info(flags: Info) -> int:
    """`dflow info`."""
    from dflow.coding.container import TEXT, kind_of
    from dflow.compress import describe_images, describe_text
    from dflow.compress.archive import Archive
    from dflow.compress.dfl import listed, named

    title = shown_name(flags.file)
    with opened(flags.file) as file:
        if not begins_archive(file):
            describe, data = describe_images, file.read()
            if kind_of(data) == TEXT:
                describe = describe_text
            rows = describe(data, title, flags.list)
            # Two files may be called as a line of the table is, so the lines are pairs.
            flags.show({"file": flags.file, "rows": rows}, rows)
            return 0
        with named(title):
            archive = Archive.read(file)
    records = [listing(pair) for pair in archive.files]
    if flags.list:
        cells = [
            [r["name"], f"{r['bytes']:,}", r["kind"], "" if r["bits"] is None else f"{r['bits']:.4f}"]
            for r in records
        ]
        flags.show({"file": flags.file, "files": records}, [["name", "bytes", "kind", "bits"], *cells])
        return 0
    rows = summary_rows(archive)
    rows += listed([(r["name"], f"{r['bytes']:,} bytes, {r['kind']}") for r in records])
    flags.show({"file": flags.file, "rows": rows}, rows)
    return 0


def summary_rows(archive: Archive) -> list[tuple[str, str]]:
    """What an archive holds in all."""
    from dflow.coding.numeric import MODES
    from dflow.compress.archive import CODED

    raw, files = sum(file.size for _, file in archive.files), sum(1 for _ in archive.files)
    coded = Counter(group.kind == CODED for group, _ in archive.files)
    mode = MODES[archive.mode] if archive.mode < len(MODES) else f"{archive.mode}, not known to this version"
    return [
        ("kind", "folder"),
        ("model", archive.fingerprint.hex() if archive.is_coded else "none"),
        ("mode", mode),
        ("files", f"{files:,}: {coded[True]:,} coded by the model, {coded[False]:,} stored"),
        ("groups", f"{len(archive.groups):,}"),
        ("bytes of files", f"{raw:,}"),
        ("bytes", f"{archive.size:,}" + f", {archive.size / raw:.4f} of them" * bool(raw)),
    ]


VERBS: Verbs = (("info", Info, info, "dflow info pictures.dfl"),)
