"""What the verbs of ``.dfl`` files share: archives of folders, standard input and output."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dflow.cli.drafts import find_drafter
from dflow.cli.flags import flag
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.compress import ImageCoder, TextCoder
    from dflow.compress.archive import Archive
    from dflow.compress.crew import Crew, Loaded
    from dflow.distributions.drafted import Drafter


@dataclass(kw_only=True)
class Jobs:
    """Flag of the verbs that code many files."""

    jobs: int = flag(
        "number of processes that share the groups of a folder, each with --threads threads (then 1 by "
        "default)",
        1,
    )

    def crew(self, threads: int | None) -> Crew:
        """The processes; this one keeps to one thread where there are several."""
        import torch

        from dflow.compress.crew import Crew

        if self.jobs < 1:
            raise InputError(f"--jobs {self.jobs} must be at least 1")
        if self.jobs > 1:
            torch.set_num_threads(1)
        return Crew(self.jobs, threads or 1)


@contextlib.contextmanager
def piped(output: str) -> Iterator[BinaryIO | None]:
    """Standard output as bytes where ``output`` is -, and what is printed meanwhile on standard error.

    Raises:
        InputError: standard output is a terminal.
    """
    if output != "-":
        yield None
        return
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None or sys.stdout.isatty():
        raise InputError("-: standard output is a terminal; send it to a file or another command")
    with contextlib.redirect_stdout(sys.stderr):
        yield stream
    stream.flush()


@contextlib.contextmanager
def read_stdin(names: Sequence[str]) -> Iterator[list[Path]]:
    """Paths of files, standard input, -, as a file of a temporary folder that is called stdin."""
    if "-" not in names:
        yield [Path(name) for name in names]
        return
    if len(names) > 1:
        raise InputError("-: standard input is one file; name it alone")
    data = sys.stdin.buffer.read()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("stdin.npy" if data.startswith(b"\x93NUMPY") else "stdin")
        path.write_bytes(data)
        yield [path]


@contextlib.contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """A file, or standard input, kept on the disk meanwhile, that can be sought in."""
    if name != "-":
        with open(name, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        while piece := sys.stdin.buffer.read(1 << 20):
            file.write(piece)
        file.seek(0)
        yield file


def shown_name(name: str) -> str:
    """What to call a file in messages."""
    return "standard input" if name == "-" else name


def begins_archive(stream: BinaryIO) -> bool:
    """Whether a stream is an archive, by its first bytes; it stands at its beginning afterwards."""
    from dflow.compress.archive import is_archive

    head = stream.read(5)
    stream.seek(0)
    return is_archive(head)


def decoder(
    model: str, archive: Archive, limit: int, batch: int = 64, draft: str = "auto"
) -> Loaded[tuple[ImageCoder | TextCoder, Drafter | None]]:
    """The model that decodes an archive, loaded and compared where anything of it is coded.

    Raises:
        InputError: another model.
        Damaged: the first group is damaged.
    """
    from dflow.coding.container import Damaged
    from dflow.coding.numeric import MODES
    from dflow.compress.archive import CODED
    from dflow.compress.crew import Loaded

    coded = next((group for group in archive.groups if group.kind == CODED), None)
    first = b"" if coded is None else archive.group(coded, limit)
    loaded = Loaded(partial(load_decoder, model, first, archive.mode, batch, draft))
    if coded is not None:
        coder, _ = loaded.value
        if coder.fingerprint != archive.fingerprint or coder.mode != MODES[archive.mode]:
            raise Damaged(
                f"was made by the model {archive.fingerprint.hex()} in mode {MODES[archive.mode]}; "
                f"{coder.where} is {coder.fingerprint.hex()} in mode {coder.mode}: give the model that it "
                "was made by"
            )
    return loaded


def load_decoder(
    model: str, first: bytes, mode: int, batch: int, draft: str
) -> tuple[ImageCoder | TextCoder, Drafter | None]:
    """The model in a folder, ready to decode groups like the ``first``."""
    import torch

    from dflow.coding.container import TEXT, Damaged, kind_of
    from dflow.coding.numeric import MODES
    from dflow.compress import TextCoder, load_image_coder
    from dflow.compress.text_coder import parse

    if kind_of(first) == TEXT:
        coder = TextCoder.load(model, parse(first)[1].calls)
        return coder, find_drafter(draft, coder.law, coder.tokenizer, torch.device("cpu"))
    if mode >= len(MODES):
        raise Damaged(f"numeric mode {mode} is not known to this version")
    return load_image_coder(model, MODES[mode], batch), None


def below(folder: Path, name: str) -> Path:
    """Where a file of an archive is written to; `InputError` where a link would lead out of the folder."""
    place = folder
    for part in name.split("/")[:-1]:
        place /= part
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise InputError(f"{place}: is a link or a file, and {name} belongs into a folder; remove it")
    return folder / name


def put(folder: Path, name: str, content: bytes, mtime: int | None) -> Path:
    """Write a file below a folder, whole or not at all; nothing is replaced."""
    from dflow.generate import check_output, write_whole

    path = below(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Once more: a folder may take two names for one.
    check_output(path)
    write_whole(path, content)
    if mtime is not None:
        os.utime(path, ns=(mtime, mtime))
    return path


def listing(file: Any) -> dict[str, Any]:
    """A file of an archive, and its group, as a record."""
    group, archived = file
    return {
        "name": archived.name,
        "bytes": archived.size,
        "kind": archived.words,
        "bits": None if not group.amount else round(group.bits, 4),
        "mtime": None if archived.mtime is None else archived.mtime / 1e9,
    }
