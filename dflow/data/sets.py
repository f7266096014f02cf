r"""What dflow knows by name: how each text is found, fetched, checked and split; what `dflow data` does.

Known files are checked for size and checksum, wherever they come from. Images by name are in
`dflow.data.image_sets`, laws to draw from in `dflow.data.synthetic`.
"""

from __future__ import annotations

import os
import re
import string
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflow.config import InputError, nearest
from dflow.data import book, files, image_sets
from dflow.data.known import KnownFile, KnownSet, from_hub, known_files, set_of_files
from dflow.data.synthetic import LAWS, PREFIX

#: Train, valid and test text.
Splits = tuple[str, ...]

PTB_CHARACTERS = known_files("""
    ptb.char.train.txt 10_034_964 sha256:e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9
    ptb.char.valid.txt 786_084 sha256:21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8
    ptb.char.test.txt 884_846 sha256:1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe
""")
PTB_WORDS = known_files("""
    ptb.train.txt 5_101_618 sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf
    ptb.valid.txt 399_782 sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2
    ptb.test.txt 449_945 sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0
""")
[TEXT8] = known_files("text8 100_000_000 md5:3bea1919949baf155f99411df5fada7e")
[TEXT8_PREFIX] = known_files("""
    text8-prefix 6_538_912 sha256:c7542ba3b2287833f7e77f8579234a01faa53838453a9ef34768eb24f1db1cb8
""")
[WAR_AND_PEACE] = known_files("""
    warandpeace.txt 3_293_492 sha256:bf5b273d9246268f96663c43c00a1055ae2e42c2262be32f7e43b48dd123451a
""")
#: Where the validation and the test text begin.
TEXT8_SPLIT = (90_000_000, 95_000_000)
TEXT8_PREFIX_SPLIT = (6_200_000, 6_369_456)


# -- Penn Treebank ---------------------------------------------------------------------------------------


def ptb_from_characters(data: bytes) -> str:
    r"""The text of a character file, in which one space between symbols is no data and ``_`` is the space.

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


def ptb(characters: Sequence[KnownFile], words: Sequence[KnownFile]) -> KnownSet[Splits]:
    """Penn Treebank in Mikolov's preprocessing, from its character or word files, or from the hub's words."""
    wanted = "ptb.char.{train,valid,test}.txt or ptb.{train,valid,test}.txt (or .xz, .gz)"

    def decode(contents: Mapping[KnownFile, bytes]) -> Splits:
        return tuple(
            ptb_from_characters(data) if file in characters else ptb_from_words(data)
            for file, data in contents.items()
        )

    def source(folder: Path | None) -> Iterator[tuple[KnownFile, bytes]]:
        # The repository's own branch is a script, which `datasets` no longer runs; the hub's conversion of
        # it is data, and names its one configuration "default".
        repository, revision = "ptb-text-only/ptb_text_only", "refs/convert/parquet"
        splits = from_hub("ptb", wanted, repository, _column("sentence"), revision=revision)
        texts = ("".join(f" {row.strip()} \n" for row in rows).encode() for rows in splits)
        return zip(words, texts, strict=True)

    return set_of_files(
        "ptb",
        (characters, words),
        decode,
        source,
        files=wanted,
        license="LDC; not to be passed on",
        note="Penn Treebank, Mikolov's preprocessing; <unk> is spelled as five characters",
    )


def _column(name: str) -> Callable[[Any], list[list[str]]]:
    """Reads a column of train, validation and test of a data set on the hub."""
    return lambda splits: [list(splits[split][name]) for split in ("train", "validation", "test")]


# -- text8 -----------------------------------------------------------------------------------------------


def text8(file: KnownFile, borders: tuple[int, int]) -> KnownSet[Splits]:
    """The first 10^8 bytes of a cleaned Wikipedia, ``a-z`` and space, cut at ``borders``."""
    wanted = "text8 (or .xz, .gz) or text8.zip"

    def source(folder: Path | None) -> list[tuple[KnownFile, bytes]]:
        splits = from_hub("text8", wanted, "afmck/text8", _column("text"))
        return [(file, "".join(row for rows in splits for row in rows).encode())]

    note = "90M/5M/5M characters, a-z and space"
    return _wikipedia(file, borders, source, wanted, note)


def text8_prefix(file: KnownFile, borders: tuple[int, int], whole: KnownSet[Splits]) -> KnownSet[Splits]:
    """The beginning of text8 for quick trials, from a file of its own or from ``whole``."""

    def source(folder: Path | None) -> list[tuple[KnownFile, bytes]]:
        return [(file, "".join(whole.read(folder)).encode()[: file.size])]

    note = "the first 6,538,912 bytes of text8; not comparable with published text8 figures"
    return _wikipedia(file, borders, source, "text8-prefix (or .xz, .gz), or the whole text8,", note)


def _wikipedia(
    file: KnownFile,
    borders: tuple[int, int],
    source: Callable[[Path | None], list[tuple[KnownFile, bytes]]],
    wanted: str,
    note: str,
) -> KnownSet[Splits]:
    def decode(contents: Mapping[KnownFile, bytes]) -> Splits:
        text, (valid, test) = contents[file].decode("ascii"), borders
        return text[:valid], text[valid:test], text[test:]

    return set_of_files(
        file.name,
        [[file]],
        decode,
        source,
        ["text8"],
        files=wanted,
        license="CC BY-SA (Wikipedia)",
        note=note,
        alphabet=" " + string.ascii_lowercase,
    )


# -- War and Peace ---------------------------------------------------------------------------------------


def war_and_peace(file: KnownFile) -> KnownSet[Splits]:
    """The novel in the translation of Louise and Aylmer Maude, see `dflow.data.book`."""
    return set_of_files(
        "war-and-peace",
        [[file]],
        lambda contents: book.split(book.prepared(files.decode(contents[file], file.name))),
        files=f"{file.name} (or .xz, .gz), Project Gutenberg's file 2600 of 2016,",
        license="public domain in the USA",
        note="Tolstoy, translated by Louise and Aylmer Maude; ASCII, a paragraph a line",
        alphabet="\n" + string.printable[:95],
    )


# -- texts of Python itself ---------------------------------------------------------------------------------

_ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "ß": "ss", "°": " degrees"}
)
_DRAWING = re.compile(r"[-=*+|~^\s]{3,}")


def pydoc_text(topics: dict[str, str]) -> str:
    r"""The topics in the order of their names, as plain ASCII.

    Typographic quotes, dashes and dots become ASCII (what has no such spelling is dropped); lines that only
    draw rules or frames are dropped; the bars of tables become single spaces, and several empty lines in a
    row become one.

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
    """The text of `pydoc_text` for the help of this Python, which varies with its version."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            f"pydoc: this Python comes without its help texts ({error}); install its standard library in "
            "full, or name a text file"
        ) from error
    return pydoc_text(topics)


#: Beginnings of names that follow from the number of the character, as in CJK UNIFIED IDEOGRAPH-4E00.
_NUMBERED = ("CJK UNIFIED ", "CJK COMPATIBILITY IDEOGRAPH", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH")


def read_unicode() -> str:
    """The names of the characters of Unicode, a line each, in the order of their numbers.

    They vary with the version of Python. Names of ideographs and syllables that only spell a number or a
    sound are left out.
    """
    names = (unicodedata.name(chr(point), "") for point in range(sys.maxunicode + 1))
    return "".join(f"{name}\n" for name in names if name and not name.startswith(_NUMBERED))


# -- the table -------------------------------------------------------------------------------------------

_TEXT8 = text8(TEXT8, TEXT8_SPLIT)
#: Texts by name.
KNOWN: dict[str, KnownSet[Splits]] = {
    data_set.name: data_set
    for data_set in (
        ptb(PTB_CHARACTERS, PTB_WORDS),
        _TEXT8,
        text8_prefix(TEXT8_PREFIX, TEXT8_PREFIX_SPLIT, _TEXT8),
        war_and_peace(WAR_AND_PEACE),
    )
}
PYDOC = "pydoc"
UNICODE = "unicode"


@dataclass(frozen=True)
class BuiltIn:
    """A text that comes with Python: its license, a note, the source, and what reads it."""

    license: str
    note: str
    source: str
    read: Callable[[], str]


#: Texts on every machine, without splits of their own. What reads them is looked up when it is called.
BUILT_IN = {
    PYDOC: BuiltIn(
        "PSF",
        "the English of Python's help; varies with the version of Python",
        "pydoc_data.topics",
        lambda: read_pydoc(),
    ),
    UNICODE: BuiltIn(
        "Unicode",
        "names of characters, a line each (protocol lines); varies with the version of Python",
        "unicodedata",
        lambda: read_unicode(),
    ),
}


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
    rows = [SetRow(name, "built in", "", text.license, text.note) for name, text in BUILT_IN.items()]
    for data_set in _known_sets().values():
        local = data_set.local(place)
        folder_of_files = str(next(iter(local)).parent) if local else ""
        state = "missing" if local is None else "found" if local else "built in"
        rows.append(SetRow(data_set.name, state, folder_of_files, data_set.license, data_set.note))
    rows.append(SetRow(image_sets.CHECKERBOARD, "drawn", "", "", image_sets.CHECKERBOARD_NOTE))
    rows += [SetRow(PREFIX + name, "drawn", "", "", law.note) for name, law in LAWS.items()]
    return rows


def check(name: str, folder: str | os.PathLike[str] | None = None) -> list[FileRow]:
    """Read and verify the files of a set.

    Raises:
        InputError: Unknown set, missing or damaged files.
    """
    place = files.data_folder(folder)
    if name in BUILT_IN:
        data = BUILT_IN[name].read().encode()
        return [FileRow(BUILT_IN[name].source, len(data), files.digest(data))]
    data_set = _known_set(name)
    local = data_set.local(place)
    if local is None:
        way = f"with a network run `dflow data prepare {name}`, or " if data_set.published else ""
        raise InputError(
            f"{name}: no files in {place or 'any folder (none is named)'}; {way}put {data_set.files} there"
        )
    if not local:
        raise InputError(f"{name} is made when it is read: there is no file to check; name it in a recipe")
    rows = []
    for path, file in local.items():
        data = file.read(path)
        rows.append(FileRow(str(path), len(data), file.digest or files.digest(data)))
    if not all(file.digest for file in local.values()):
        data_set.read(place)  # checks the files together
    return rows


def prepare(name: str, folder: str | os.PathLike[str] | None = None) -> list[FileRow]:
    """Fetch a set into ``folder`` (default: ``DFLOW_DATA``), unless it is there, and `check` it.

    Raises:
        InputError: Unknown set, no folder named, no network, or damaged files.
    """
    if name not in BUILT_IN:
        data_set = _known_set(name)
        if folder is not None:
            Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        place = files.data_folder(folder)
        if place is None:
            raise InputError(
                f"{name}: no folder to put it in; name one with --folder or the environment variable "
                "DFLOW_DATA"
            )
        if data_set.local(place) is None:
            for path, data in data_set.fetch(place).items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                files.write(place / path, data)
    return check(name, folder)


def _known_set(name: str) -> KnownSet[Any]:
    if name == image_sets.CHECKERBOARD or (name.removeprefix(PREFIX) in LAWS and name.startswith(PREFIX)):
        raise InputError(
            f"{name} is drawn, not read: there is no file to fetch or to check; name it in a recipe"
        )
    known_sets = _known_sets()
    if name not in known_sets:
        raise InputError(f"no data set {name!r}; {nearest(name, [*BUILT_IN, *known_sets])}")
    return known_sets[name]


def _known_sets() -> dict[str, KnownSet[Any]]:
    return {**KNOWN, **image_sets.KNOWN}
