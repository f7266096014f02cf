"""``dflow decompress``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dflow.cli.drafts import find_drafter
from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.folders import Jobs, begins_archive, below, decoder, opened, piped, put, shown_name
from dflow.cli.shared import Results, Threads, complain, make_folder
from dflow.config import InputError


@dataclass(kw_only=True)
class Decompress(Threads, Jobs, Results):
    """Decompress .dfl files, or files of the .dfl file of a folder.

    With --levels the beginning of a file gives coarse pictures. The exit code is 0 where all is written, 1
    where groups of a folder are damaged and their files missing, 2 where nothing can be done.
    """

    files: list[str] = argument(
        ".dfl files, or one of a folder, and behind it names of files or folders in it (default: all), which "
        "may follow the flags; - is standard input",
        stdin=True,
    )
    output: str = flag(
        "folder to write into; nothing in it is replaced; or -, for one file to standard output",
        short="-o",
        stdout=True,
    )
    model: str = flag("folder of the model that compressed them")
    levels: int | None = flag(
        "number of levels to use, the coarsest first; the file may be cut off behind them", None
    )
    limit: int = flag(
        "largest number of values, or of bytes of text, that a file may declare; of a folder, that each of "
        "its groups may",
        1 << 28,
    )
    draft: str = flag(
        "what proposes symbols of a text that was compressed with --draft, whatever did then: counts, those "
        "of the model itself, the folder of a faster model of the same alphabet, as one of family ngram, "
        "auto, counts where the model has any, or none; it decides the time, and never the text",
        "auto",
    )
    batch_size: int = flag("number of tiles that the networks see at a time", 64)


class _Writer:
    """Writes files into a folder, or one to standard output, and says which."""

    def __init__(self, flags: Decompress, stream: BinaryIO | None) -> None:
        self.written = list[str]()
        self._folder, self._stream, self._quiet = Path(flags.output), stream, flags.json
        if stream is None:
            make_folder(self._folder)

    def check(self, names: Sequence[str]) -> None:
        """`InputError` where any of the files is there already."""
        from dflow.generate import check_output

        if self._stream is not None:
            if len(names) + len(self.written) != 1:
                raise InputError(f"--output -: one file, not {len(names):,}; name it, or give a folder")
            return
        for name in names:
            path = below(self._folder, name)
            if path.parent.is_dir():
                check_output(path)

    def put(self, name: str, content: bytes, mtime: int | None = None) -> None:
        """Write a file."""
        if self._stream is not None:
            self._stream.write(content)
            self.written.append("-")
            return
        path = put(self._folder, name, content, mtime)
        self.written.append(str(path))
        if not self._quiet:
            print(path)


def decompress(flags: Decompress) -> int:
    """`dflow decompress`; exit code 1 where a group of a folder is damaged."""
    flags.set_threads()
    first, *others = flags.files
    damaged = list[str]()
    with piped(flags.output) as stream:
        writer = _Writer(flags, stream)
        with opened(first) as file:
            is_archive = begins_archive(file)
            if is_archive:
                damaged = decompress_tree(flags, file, others, writer)
            else:
                decompress_file(flags, first, file.read(), writer)
        for name in () if is_archive else others:
            with opened(name) as file:
                if begins_archive(file):
                    raise InputError(f"{name}: holds a folder; decompress it by a command of its own")
                decompress_file(flags, name, file.read(), writer)
        flags.end({"files": writer.written, "damaged": damaged})
    return int(bool(damaged))


def decompress_tree(flags: Decompress, file: BinaryIO, names: list[str], writer: _Writer) -> list[str]:
    """Files of an archive; what is damaged is named, and the rest written."""
    from dflow.compress.archive import Archive
    from dflow.compress.dfl import named
    from dflow.compress.unpacking import Unpacker, chosen, unpack

    title = shown_name(flags.files[0])
    if flags.levels is not None:
        raise InputError(f"--levels is for pictures alone; {title} holds a folder")
    crew, damaged = flags.crew(flags.threads), list[str]()
    with named(title):
        archive = Archive.read(file)
        groups = chosen(archive, names)
        writer.check([group.files[i].name for group, places in groups for i in places])
        model = decoder(flags.model, archive, flags.limit, flags.batch_size, flags.draft)
    for group, files, wrong in unpack(archive, Unpacker(model, flags.limit), groups, crew, progress=True):
        for archived, content in files:
            writer.put(archived.name, content, archived.mtime)
        if wrong:
            complain(f"{title}: {wrong}; files not written: {len(group.files):,}")
            damaged.append(wrong)
    return damaged


def decompress_file(flags: Decompress, name: str, data: bytes, writer: _Writer) -> None:
    """All that is in a ``.dfl`` that is no archive."""
    from dflow.coding.container import TEXT, kind_of
    from dflow.compress import decompress_images
    from dflow.compress.pixels import write

    title = shown_name(name)
    if kind_of(data) == TEXT:
        if flags.levels is not None:
            raise InputError(f"--levels is for pictures; {title} holds text")
        files = text_of(data, title, flags)
        writer.check(list(files))
        for file, content in files.items():
            writer.put(file, content)
        return
    restored = decompress_images(
        data,
        flags.model,
        name=title,
        levels=flags.levels,
        limit=flags.limit,
        batch=flags.batch_size,
        progress=True,
    )
    writer.check([*(picture.form.file for picture in restored.pictures), *restored.lent])
    for file, content in restored.lent.items():
        writer.put(file, content)
    for picture in restored.pictures:
        writer.put(picture.form.file, write(picture))


def text_of(data: bytes, name: str, flags: Decompress) -> dict[str, bytes]:
    """The files in a ``.dfl`` of text."""
    import torch

    from dflow.compress import Drafts, TextCoder, decompress_text
    from dflow.compress.dfl import named
    from dflow.compress.text_coder import parse

    with named(name):
        calls = parse(data)[1].calls
    coder = TextCoder.load(flags.model, calls)
    drafter = find_drafter(flags.draft, coder.law, coder.tokenizer, torch.device("cpu"))
    return decompress_text(data, coder, name=name, limit=flags.limit, progress=True, drafts=Drafts(drafter))


VERBS: Verbs = (
    ("decompress", Decompress, decompress, "dflow decompress pictures.dfl -o back --model runs/images/idf"),
)
