r"""What dflow knows by name: how each text is found, fetched, checked and split; what `dflow data` does.

- ``pydoc``: the English of Python's own help (`pydoc_data.topics`), always there; varies with the version of
  Python.
- ``ptb``: Penn Treebank in Mikolov's preprocessing, from the character files or from the word files.
- ``text8``: the first 10^8 bytes of a cleaned Wikipedia, 90M/5M/5M characters, ``a-z`` and space.
- ``synthetic/...``: laws to draw from, see `dflow.data.synthetic`.
- ``text8-prefix``: the first 6,538,912 bytes of text8, for quick trials; *not* comparable with published
  figures of text8.

Known files are checked for size and checksum, wherever they come from. Images: `dflow.data.image_sets`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflow.config import InputError, nearest
from dflow.data import files, image_sets
from dflow.data.known import KnownFile, KnownSet, find_all, from_hub
from dflow.data.synthetic import LAWS, PREFIX

#: Train, valid and test text.
Splits = tuple[str, str, str]


PTB_CHARACTERS = (
    KnownFile(
        "ptb.char.train.txt",
        10_034_964,
        "sha256:e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
    ),
    KnownFile(
        "ptb.char.valid.txt",
        786_084,
        "sha256:21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
    ),
    KnownFile(
        "ptb.char.test.txt",
        884_846,
        "sha256:1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe",
    ),
)
PTB_WORDS = (
    KnownFile(
        "ptb.train.txt",
        5_101_618,
        "sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    ),
    KnownFile(
        "ptb.valid.txt",
        399_782,
        "sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    ),
    KnownFile(
        "ptb.test.txt",
        449_945,
        "sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    ),
)
TEXT8 = KnownFile("text8", 100_000_000, "md5:3bea1919949baf155f99411df5fada7e")
TEXT8_PREFIX = KnownFile(
    "text8-prefix", 6_538_912, "sha256:c7542ba3b2287833f7e77f8579234a01faa53838453a9ef34768eb24f1db1cb8"
)
TEXT8_SPLIT = (90_000_000, 95_000_000)
TEXT8_PREFIX_SPLIT = (6_200_000, 6_369_456)


# -- Penn Treebank ---------------------------------------------------------------------------------------


def ptb_from_characters(data: bytes) -> str:
    r"""The text of a character file: one space between symbols is no data, ``_`` is the space.

    >>> ptb_from_characters(b"a _ < u n k >\n N _ b\n")
    'a <unk>\nN b\n'
    """
    return data.decode("ascii").replace(" ", "").replace("_", " ")


def ptb_from_words(data: bytes) -> str:
    r"""The text of a word file, equal to that of the character file: lines stripped, each ended.

    >>> ptb_from_words(b" a <unk> \n N b \n")
    'a <unk>\nN b\n'
    """
    return "".join(f"{line.strip()}\n" for line in data.decode("ascii").split("\n")[:-1])


def _ptb_local(folder: Path | None) -> dict[Path, KnownFile] | None:
    return find_all(PTB_CHARACTERS, folder, "ptb") or find_all(PTB_WORDS, folder, "ptb")


def _ptb_fetch(folder: Path | None) -> dict[str, bytes]:
    # The repository's own branch is a script, which `datasets` no longer runs; the hub's conversion is data.
    # The conversion names its one configuration "default".
    rows = _from_hub("ptb", "ptb-text-only/ptb_text_only", "sentence", revision="refs/convert/parquet")
    texts = ("".join(f" {row.strip()} \n" for row in split).encode() for split in rows)
    return {
        f"ptb/{file.name}": file.verify(data, f"the hub's {file.name}")
        for file, data in zip(PTB_WORDS, texts, strict=True)
    }


def _ptb_read(folder: Path | None) -> Splits:
    local = _ptb_local(folder)
    if local is None:
        return _three(ptb_from_words(data) for data in _ptb_fetch(folder).values())
    return _three(
        (ptb_from_characters if file in PTB_CHARACTERS else ptb_from_words)(file.read(path))
        for path, file in local.items()
    )


# -- text8 -----------------------------------------------------------------------------------------------


def _text8_local(folder: Path | None) -> dict[Path, KnownFile] | None:
    if found := find_all([TEXT8], folder, "text8"):
        return found
    archives = [] if folder is None else [folder / "text8.zip", folder / "text8" / "text8.zip"]
    return next(({path: TEXT8} for path in archives if path.is_file()), None)


def _text8_bytes(folder: Path | None) -> bytes:
    if local := _text8_local(folder):
        [(path, file)] = local.items()
        return file.read(path)
    text = "".join(row for split in _from_hub("text8", "afmck/text8", "text") for row in split)
    return TEXT8.verify(text.encode(), "the hub's afmck/text8")


def _text8_read(folder: Path | None) -> Splits:
    return _cut(_text8_bytes(folder), TEXT8_SPLIT)


def _prefix_local(folder: Path | None) -> dict[Path, KnownFile] | None:
    return find_all([TEXT8_PREFIX], folder, "text8")


def _prefix_bytes(folder: Path | None) -> bytes:
    if local := _prefix_local(folder):
        [(path, file)] = local.items()
        return file.read(path)
    return TEXT8_PREFIX.verify(_text8_bytes(folder)[: TEXT8_PREFIX.size], "the prefix of text8")


def _prefix_read(folder: Path | None) -> Splits:
    return _cut(_prefix_bytes(folder), TEXT8_PREFIX_SPLIT)


def _cut(data: bytes, places: tuple[int, int]) -> Splits:
    first, second = places
    return _three(part.decode("ascii") for part in (data[:first], data[first:second], data[second:]))


# -- the embedded text -----------------------------------------------------------------------------------

_ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "ß": "ss", "°": " degrees"}
)
_DRAWING = re.compile(r"[-=*+|~^\s]{3,}")


def pydoc_text(topics: dict[str, str]) -> str:
    r"""The topics in the order of their names, as plain ASCII.

    Typographic quotes, dashes and dots become ASCII (what has no such spelling is dropped); lines that only
    draw (rules, frames) go; the bars of tables become spaces, runs of them one; of empty lines in a row one
    remains.

    >>> pydoc_text({"b": "Two\n***\n\n\n| a  | b |", "a": "“One”"})
    '"One"\n\nTwo\n\na b\n'
    """
    lines: list[str] = []
    for name in sorted(topics):
        for raw in [*topics[name].translate(_ASCII).encode("ascii", "ignore").decode().split("\n"), ""]:
            line = raw.rstrip()
            if line and _DRAWING.fullmatch(line):
                continue
            if line.startswith("|") and line.endswith("|"):
                line = " ".join(line.replace("|", " ").split())
            if line or (lines and lines[-1]):
                lines.append(line)
    return "\n".join(lines).strip("\n") + "\n"


def read_pydoc() -> str:
    """The text of `pydoc_text` for this Python's help."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            f"pydoc: this Python comes without its help texts ({error}); install its standard library in "
            "full, or name a text file"
        ) from error
    return pydoc_text(topics)


# -- the table -------------------------------------------------------------------------------------------


def _three(parts: Iterable[str]) -> Splits:
    train, valid, test = parts
    return train, valid, test


def _from_hub(name: str, repository: str, column: str, **options: str) -> list[list[str]]:
    """The rows of train, validation and test, from the Hugging Face hub."""

    def read(splits: Any) -> list[list[str]]:
        return [list(splits[split][column]) for split in ("train", "validation", "test")]

    return from_hub(name, KNOWN[name].files, repository, read, **options)


#: Texts by name.
KNOWN: dict[str, KnownSet[Splits]] = {
    known.name: known
    for known in (
        KnownSet(
            name="ptb",
            read=_ptb_read,
            local=_ptb_local,
            fetch=_ptb_fetch,
            files="ptb.char.{train,valid,test}.txt or ptb.{train,valid,test}.txt (or .xz, .gz)",
            license="LDC; not to be passed on",
            note="Penn Treebank, Mikolov's preprocessing; <unk> is spelled as five characters",
        ),
        KnownSet(
            name="text8",
            read=_text8_read,
            local=_text8_local,
            fetch=lambda folder: {"text8/text8": _text8_bytes(folder)},
            files="text8 (or .xz, .gz) or text8.zip",
            license="CC BY-SA (Wikipedia)",
            note="90M/5M/5M characters, a-z and space",
            alphabet=" abcdefghijklmnopqrstuvwxyz",
        ),
        KnownSet(
            name="text8-prefix",
            read=_prefix_read,
            local=_prefix_local,
            fetch=lambda folder: {"text8/text8-prefix": _prefix_bytes(folder)},
            files="text8-prefix (or .xz, .gz), or the whole text8,",
            license="CC BY-SA (Wikipedia)",
            note="the first 6,538,912 bytes of text8; not comparable with published text8 figures",
            alphabet=" abcdefghijklmnopqrstuvwxyz",
        ),
    )
}
PYDOC = "pydoc"
PYDOC_LICENSE = "PSF"
PYDOC_NOTE = "the English of Python's help; varies with the version of Python"


# -- what `dflow data` does ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetRow:
    """A line of the table that `list_sets` gives."""

    name: str
    state: str
    where: str
    license: str
    note: str


@dataclass(frozen=True)
class FileRow:
    """A file that `check` or `prepare` has verified."""

    file: str
    size: int
    digest: str


def list_sets(folder: str | os.PathLike[str] | None = None) -> list[SetRow]:
    """The known sets and whether their files are in ``folder`` (default: ``DFLOW_DATA``); nothing is read."""
    place = files.data_folder(folder)
    rows = [SetRow(PYDOC, "built in", "", PYDOC_LICENSE, PYDOC_NOTE)]
    for known in _all().values():
        local = known.local(place)
        where = str(next(iter(local)).parent) if local else ""
        status = "missing" if local is None else "found" if local else "built in"
        rows.append(SetRow(known.name, status, where, known.license, known.note))
    rows.append(SetRow(image_sets.CHECKERBOARD, "drawn", "", "", image_sets.CHECKERBOARD_NOTE))
    rows += [SetRow(PREFIX + name, "drawn", "", "", law.note) for name, law in LAWS.items()]
    return rows


def check(name: str, folder: str | os.PathLike[str] | None = None) -> list[FileRow]:
    """Read and verify the files of a set.

    Raises:
        InputError: Unknown set, missing or damaged files.
    """
    place = files.data_folder(folder)
    if name == PYDOC:
        data = read_pydoc().encode()
        return [FileRow("pydoc_data.topics", len(data), files.digest(data))]
    known = _known(name)
    local = known.local(place)
    if local is None:
        fetched = f"with a network run `dflow data prepare {name}`, or " if known.published else ""
        raise InputError(
            f"{name}: no files in {place or 'any folder (none is named)'}; {fetched}put {known.files} there"
        )
    if not local:
        raise InputError(f"{name} is made when it is read: there is no file to check; name it in a recipe")
    rows = []
    for path, file in local.items():
        data = file.read(path)
        rows.append(FileRow(str(path), len(data), file.digest or files.digest(data)))
    if name in image_sets.KNOWN:
        known.read(place)  # what the files must be together
    return rows


def prepare(name: str, folder: str | os.PathLike[str] | None = None) -> list[FileRow]:
    """Fetch a set into ``folder`` (default: ``DFLOW_DATA``), unless it is there, and `check` it.

    Raises:
        InputError: Unknown set, no folder named, no network, or damaged files.
    """
    if name != PYDOC:
        known = _known(name)
        if folder is not None:
            Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        place = files.data_folder(folder)
        if place is None:
            raise InputError(
                f"{name}: no folder to put it in; name one with --folder or the environment variable "
                "DFLOW_DATA"
            )
        if known.local(place) is None:
            for path, data in known.fetch(place).items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                files.write(place / path, data)
    return check(name, folder)


def _known(name: str) -> KnownSet[Any]:
    if name == image_sets.CHECKERBOARD or (name.removeprefix(PREFIX) in LAWS and name.startswith(PREFIX)):
        raise InputError(
            f"{name} is drawn, not read: there is no file to fetch or to check; name it in a recipe"
        )
    known = _all()
    if name not in known:
        raise InputError(f"no data set {name!r}; {nearest(name, [PYDOC, *known])}")
    return known[name]


def _all() -> dict[str, KnownSet[Any]]:
    return {**KNOWN, **image_sets.KNOWN}
