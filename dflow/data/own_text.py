"""The user's own text, from files to three splits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from dflow.config import InputError
from dflow.data import files, splits
from dflow.data.settings import DataConfig
from dflow.data.splits import SPLITS, Arranged

#: The places of each split in a text: starts and ends.
Spans = dict[str, list[tuple[int, int]]]
#: Stretches of a text of which each gives its end to validation and test, where blocks are dealt.
STRETCHES = 20
#: Characters of a line that a note shows.
_SHOWN = 40


@dataclass(frozen=True)
class TextReading:
    """A text by split.

    Attributes:
        texts: the text of each split, in the order in which they were read; those of a pool join to the pool.
        sources: names of the files that each split is taken from.
        pooled: whether the test split is a share that was cut off, and no text of its own.
        checksum: of the text, and of the borders where names tell the splits.
        notes: sentences for the user.
    """

    texts: dict[str, str]
    sources: dict[str, tuple[str, ...]]
    pooled: bool
    checksum: str
    notes: tuple[str, ...] = ()


def of_files(arranged: Arranged, config: DataConfig, partial: bool) -> TextReading:
    """Read and join the files of a text; a split that has no files is taken from the training text.

    Files of a split are joined by line breaks, in the order of their names.

    Args:
        arranged: the files.
        config: how they are read and dealt.
        partial: whether a split may be empty, as when a text is scored as a whole.

    Raises:
        InputError: damaged or undecodable files, no text, too little text, a share of a split with files.
    """
    for split in arranged.paths.keys() & config.shares.keys():
        if config.shares[split] != DataConfig().shares[split]:
            raise InputError(f"{config.name} has a split of its own for {split}: leave {split} out")
    if config.split_by == "files":
        arranged = splits.by_files(arranged, config.shares)
    contents, num_crlf, fasta = _read(arranged, config)
    end = "\n" if config.protocol == "lines" else ""
    joined = {split: "\n".join(texts) + end for split, texts in contents.items()}
    missing = {split: share for split, share in config.shares.items() if split not in joined}
    spans, dealt = cut(joined["train"], missing, config, partial)
    texts = {split: (joined | dealt)[split] for split in order(missing)}
    paths = _sources(arranged, contents["train"], spans)
    named = {split: [(arranged.name(path), path) for path in paths[split]] for split in SPLITS}
    sources = {split: tuple(name for name, _ in pairs) for split, pairs in named.items()}
    notes = [*arranged.notes, *_notes_on_deal(missing, config.split_by, sources, arranged)]
    if num_crlf:
        notes.append(crlf_note(num_crlf))
    if fasta:
        notes.append(
            f"Files read as FASTA, since their first line begins with '>': {len(fasta):,} "
            f"({splits.first_few(fasta)}), with {sum(fasta.values()):,} records. Each record is one line, "
            "joined without white space; headers were left out."
        )
    notes += splits.repeated(named)
    borders = seal({split: len(text) for split, text in texts.items()}) if arranged.named else ""
    return TextReading(
        texts,
        sources,
        pooled="test" in missing,
        checksum=files.digest("".join([*joined.values(), borders]).encode("utf-8")),
        notes=tuple(notes),
    )


def _read(arranged: Arranged, config: DataConfig) -> tuple[dict[str, list[str]], int, dict[str, int]]:
    """The text of each file, by split; the number of line ends changed; and records by FASTA file.

    By lines, a file has no line break behind its last line.
    """
    contents: dict[str, list[str]] = {}
    fasta: dict[str, int] = {}
    num_crlf = 0
    for split, paths in arranged.paths.items():
        contents[split] = []
        for path in paths:
            data = files.read(path)
            num_crlf += data.count(b"\r\n")
            text = files.decode(data, path)
            if config.protocol == "lines":
                if text.lstrip().startswith(">"):
                    sequences = records(text)
                    text, fasta[arranged.name(path)] = "\n".join(sequences), len(sequences)
                else:
                    text = text.removesuffix("\n")
            contents[split].append(text.lower() if config.lowercase else text)
        if not any(text.strip() for text in contents[split]):
            path = paths[0] if len(paths) == 1 else arranged.root
            suffix = f" ({split})" if arranged.named else ""
            raise InputError(f"{path}: no text in it{suffix}; put text there, or leave it out")
    return contents, num_crlf, fasta


def records(text: str) -> list[str]:
    r"""The sequences of a FASTA file, joined over their lines, without headers and white space.

    >>> records(">a human\nACGT\nAC\n\n>b\nTT\n")
    ['ACGTAC', 'TT']
    """
    bodies = ("\n" + text.strip()).split("\n>")[1:]
    return ["".join(body.partition("\n")[2].split()) for body in bodies]


def repeated_lines(texts: Mapping[str, str]) -> list[str]:
    """Sentences on lines of the validation and test data that are lines of the data before them too."""
    notes, lines = [], {split: texts.get(split, "").split("\n") for split in SPLITS}
    for number, split in enumerate(SPLITS):
        for other in SPLITS[:number]:
            before = set(lines[other])
            alike = [line for line in lines[split] if line and line in before]
            if alike:
                examples = splits.first_few(repr(line[:_SHOWN]) for line in dict.fromkeys(alike))
                notes.append(
                    f"Lines of the {split} data that are lines of the {other} data too: {len(alike):,} "
                    f"({examples})."
                )
    return notes


def _sources(arranged: Arranged, texts: Sequence[str], spans: Spans) -> dict[str, list[Path]]:
    """The files of each split: its own, or those of the training text in which its places lie."""
    ends = list(accumulate(len(text) + 1 for text in texts))
    paths = {split: list(listed) for split, listed in arranged.paths.items()}
    for split, places in spans.items():
        # The line break behind a file does not count as one of its characters.
        paths[split] = [
            path
            for path, start, end in zip(arranged.paths["train"], [0, *ends], ends, strict=False)
            if any(a < end - 1 and start < b for a, b in places)
        ]
    return paths


def order(missing: Mapping[str, float]) -> list[str]:
    """The splits in the order in which they are read: what is dealt from the training text stands in it."""
    return sorted(SPLITS, key=lambda split: (split not in missing and split != "train", SPLITS.index(split)))


def seal(characters: Mapping[str, int]) -> str:
    """What follows a text in its checksum, where names tell the splits."""
    return "\0" + json.dumps(dict(characters))


def crlf_note(count: int) -> str:
    """The note on line ends that are not kept."""
    return f"Line ends CRLF that were read as LF: {count:,}. Bits a character are those of the text with LF."


def _notes_on_deal(
    missing: Mapping[str, float],
    split_by: str | None,
    sources: Mapping[str, Sequence[str]],
    arranged: Arranged,
) -> list[str]:
    notes = []
    names = " and ".join({"valid": "validation", "test": "test"}[split] for split in missing)
    if missing and arranged.named:
        notes.append(f"No name tells the {names} data: they are cut off the training data.")
    if missing and split_by == "tail" and len(arranged.paths["train"]) > 1:
        ends = dict.fromkeys(name for split in missing for name in sources[split])
        notes.append(
            f"The {names} data are the end of the joined text, from {splits.first_few(ends)}, and may be "
            "unlike the rest; data.split_by: files deals whole files instead, blocks takes them from "
            f"{STRETCHES} places."
        )
    return notes


def cut(
    text: str, missing: Mapping[str, float], config: DataConfig, partial: bool
) -> tuple[Spans, dict[str, str]]:
    """Deal a text to training and the splits that are missing: the places of each split, and its text.

    A line that is a sequence is not cut in two. By lines, all are dealt by a fixed shuffle. By blocks, each
    of `STRETCHES` stretches of the text gives its end to the missing splits; else the whole text does.

    Raises:
        InputError: the text is so short that a split is empty.
    """
    lines = re.findall(r"[^\n]*\n|[^\n]+", text) if config.by_lines else []
    if config.split_by == "lines":
        pool = {"train": np.arange(len(lines))}
        numbers, _ = splits.by_rows(pool, missing, config.name, partial, "lines")
        # Every split has lines of every file.
        return (
            {split: [(0, len(text))] for split in numbers},
            {split: "".join(lines[i] for i in chosen) for split, chosen in numbers.items()},
        )
    ends = [0, *accumulate(map(len, lines))] if config.by_lines else None
    n = len(text) if ends is None else len(ends) - 1
    spans: Spans = {split: [] for split in ("train", *missing)}
    stretches = STRETCHES if config.split_by == "blocks" and missing else 1
    for low, high in pairwise(n * k // stretches for k in range(stretches + 1)):
        sizes = {split: int((high - low) * share) for split, share in missing.items()}
        stop = low
        for split, size in ({"train": high - low - sum(sizes.values())} | sizes).items():
            start, stop = stop, stop + size
            spans[split].append((start, stop) if ends is None else (ends[start], ends[stop]))
    texts = {split: "".join(text[a:b] for a, b in places) for split, places in spans.items()}
    if not all(texts.values()) and not partial:
        unit = "characters" if ends is None else "lines"
        shares = " and ".join(f"{split}={share}" for split, share in missing.items())
        raise InputError(f"{config.name}: {n} {unit} are too few for {shares}; give more text")
    return spans, texts
