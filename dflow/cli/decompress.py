"""``dflow decompress``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dflow.cli.drafts import find_drafter
from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Results, Threads, make_folder
from dflow.config import InputError


@dataclass(kw_only=True)
class Decompress(Threads, Results):
    """Decompress .dfl files.

    With --levels the beginning of a file gives coarse pictures.
    """

    files: list[str] = argument(".dfl files")
    output: str = flag("folder to write into; nothing in it is replaced", short="-o")
    model: str = flag("folder of the model that compressed them")
    levels: int | None = flag(
        "number of levels to use, the coarsest first; the file may be cut off behind them", None
    )
    limit: int = flag("largest number of values, or of bytes of text, that a file may declare", 1 << 28)
    draft: str = flag(
        "what proposes symbols of a text that was compressed with --draft, whatever did then: counts, those "
        "of the model itself, the folder of a faster model of the same alphabet, as one of family ngram, "
        "auto, counts where the model has any, or none; it decides the time, and never the text",
        "auto",
    )
    batch_size: int = flag("number of tiles that the networks see at a time", 64)


def decompress(flags: Decompress) -> int:
    """`dflow decompress`."""
    from dflow.coding.container import TEXT, kind_of
    from dflow.compress import decompress_images
    from dflow.compress.pixels import write
    from dflow.generate import check_output, write_whole

    flags.set_threads()
    folder = Path(flags.output)
    make_folder(folder)
    written: list[str] = []

    def keep(file: str, content: bytes) -> None:
        # Once more: a folder may take two names for one.
        check_output(folder / file)
        write_whole(folder / file, content)
        written.append(str(folder / file))
        if not flags.json:
            print(folder / file)

    for name in flags.files:
        data = Path(name).read_bytes()
        if kind_of(data) == TEXT:
            if flags.levels is not None:
                raise InputError(f"--levels is for pictures; {name} holds text")
            files = text_of(data, name, flags)
            for file in files:
                check_output(folder / file)
            for file, content in files.items():
                keep(file, content)
            continue
        restored = decompress_images(
            data,
            flags.model,
            name=name,
            levels=flags.levels,
            limit=flags.limit,
            batch=flags.batch_size,
            progress=True,
        )
        for file in (*(picture.form.file for picture in restored.pictures), *restored.lent):
            check_output(folder / file)
        for file, content in restored.lent.items():
            keep(file, content)
        for picture in restored.pictures:
            keep(picture.form.file, write(picture))
    flags.end({"files": written})
    return 0


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
