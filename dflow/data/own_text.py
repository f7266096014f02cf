"""The user's own text, from files to three splits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from dflow.config import InputError
from dflow.data import files, splits
from dflow.data.splits import SPLITS, Arranged

By = Literal["tail", "files", "blocks"]
Spans = dict[str, list[tuple[int, int]]]
#: Stretches of a text of which each gives its end to validation and test, where blocks are dealt.
STRETCHES = 20


@dataclass(frozen=True)
class Deal:
    """How what is no split of its own is taken from the training text.

    Attributes:
        name: of the data, for messages.
        shares: of validation and test.
        by: ``tail``: the end of the joined text; ``files``: whole files; ``blocks``: the end of each of
            `STRETCHES` stretches of the joined text.
        lines: cut between lines.
        partial: whether a share may come to nothing: whoever scores a text as a whole needs none.
    """

    name: str
    shares: Mapping[str, float]
    by: By = "tail"
    lines: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Reading:
    """A text by split.

    Attributes:
        parts: the text of each split; in the order in which they were read, of a pool that is the text.
        sources: names of the files that each split is taken from.
        pooled: whether the test split is a share that was cut off, and no text of its own.
        checksum: of the text, and of the borders where names tell the splits.
        notes: sentences for the user.
    """

    parts: dict[str, str]
    sources: dict[str, tuple[str, ...]]
    pooled: bool
    checksum: str
    notes: tuple[str, ...] = ()


def of_files(found: Arranged, deal: Deal, lowercase: bool) -> Reading:
    """Read, join and deal the files of a text.

    Files of a split are joined by line breaks, in the order of their names.

    Raises:
        InputError: damaged or undecodable files, no text, too little text.
    """
    if deal.by == "files":
        found = splits.by_files(found, deal.shares)
    texts, crlf = _read(found, lowercase)
    missing = {split: share for split, share in deal.shares.items() if split not in texts}
    train = "\n".join(texts["train"])
    dealt = cut(train, missing, deal)
    others = {split: "\n".join(pieces) for split, pieces in texts.items() if split != "train"}
    parts = dealt.parts | others
    paths = _sources(found, texts["train"], dealt.spans)
    sources = {split: tuple(map(found.name, paths[split])) for split in SPLITS}
    notes = [*found.notes, *_told(missing, deal, sources, found)]
    if crlf:
        notes.append(crlf_note(crlf))
    notes += splits.repeated({split: [(found.name(p), p) for p in paths[split]] for split in SPLITS})
    borders = seal({split: len(parts[split]) for split in order(missing)}) if found.named else ""
    return Reading(
        parts={split: parts[split] for split in order(missing)},
        sources=sources,
        pooled="test" in missing,
        checksum=files.digest("".join([train, *others.values(), borders]).encode("utf-8")),
        notes=tuple(notes),
    )


def _read(found: Arranged, lowercase: bool) -> tuple[dict[str, list[str]], int]:
    """The text of each file, by split; and the number of line ends that were changed."""
    texts: dict[str, list[str]] = {}
    crlf = 0
    for split, paths in found.parts.items():
        texts[split] = []
        for path in paths:
            data = files.read(path)
            crlf += data.count(b"\r\n")
            text = files.decode(data, path)
            texts[split].append(text.lower() if lowercase else text)
    for split, pieces in texts.items():
        if not any(piece.strip() for piece in pieces):
            which = f" ({split})" if found.named else ""
            [where] = found.parts[split] if len(pieces) == 1 else [found.root]
            raise InputError(f"{where}: no text in it{which}; put text there, or leave it out")
    return texts, crlf


def _sources(found: Arranged, texts: Sequence[str], spans: Spans) -> dict[str, list[Path]]:
    """The files of each split: its own, or those of the training text in which its places lie."""
    ends = list(accumulate(len(text) + 1 for text in texts))
    paths = {split: list(listed) for split, listed in found.parts.items()}
    for split, places in spans.items():
        inside = _inside(ends, places)
        paths[split] = [p for p, used in zip(found.parts["train"], inside, strict=True) if used]
    return paths


def order(missing: Mapping[str, float]) -> list[str]:
    """The splits in the order in which they are read: what is dealt from the training text stands in it."""
    return sorted(SPLITS, key=lambda split: (split not in missing and split != "train", SPLITS.index(split)))


def seal(characters: Mapping[str, int]) -> str:
    """What is put behind a text for its checksum, where names tell the splits."""
    return "\0" + json.dumps(dict(characters))


def crlf_note(count: int) -> str:
    """What is said of line ends that are not kept."""
    return f"Line ends CRLF that were read as LF: {count:,}. Bits a character are those of the text with LF."


def _told(
    missing: Mapping[str, float], deal: Deal, sources: Mapping[str, Sequence[str]], found: Arranged
) -> list[str]:
    notes = []
    which = " and ".join({"valid": "validation", "test": "test"}[split] for split in missing)
    if missing and found.named:
        notes.append(f"No name tells the {which} data: they are cut off the training data.")
    if missing and deal.by == "tail" and len(found.parts["train"]) > 1:
        ends = dict.fromkeys(name for split in missing for name in sources[split])
        notes.append(
            f"The {which} data are the end of the joined text, from {splits.shown(ends)}, and may be unlike "
            "the rest; data.split_by: files deals whole files instead, blocks takes them from "
            f"{STRETCHES} places."
        )
    return notes


def _inside(ends: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which of the files that end at ``ends`` have a character in one of the spans."""
    starts = [0, *ends[:-1]]
    # The line break behind a file is none of its characters.
    return [
        any(first < end - 1 and start < last for first, last in spans)
        for start, end in zip(starts, ends, strict=True)
    ]


@dataclass(frozen=True)
class Cut:
    """A text that was dealt: the places of each split in it, and its text."""

    spans: Spans
    parts: dict[str, str]


def cut(text: str, missing: Mapping[str, float], deal: Deal) -> Cut:
    """Deal a text: what is left of it, and the shares of the splits that are missing.

    Raises:
        InputError: so little text that one of them comes to nothing.
    """
    ends = [0, *accumulate(map(len, re.findall(r"[^\n]*\n|[^\n]+", text)))] if deal.lines else None
    n = len(text) if ends is None else len(ends) - 1
    spans: Spans = {split: [] for split in ("train", *missing)}
    stretches = STRETCHES if deal.by == "blocks" and missing else 1
    for first, last in pairwise(n * k // stretches for k in range(stretches + 1)):
        sizes = {split: int((last - first) * share) for split, share in missing.items()}
        stop = first
        for split, size in ({"train": last - first - sum(sizes.values())} | sizes).items():
            start, stop = stop, stop + size
            spans[split].append((start, stop) if ends is None else (ends[start], ends[stop]))
    parts = {split: "".join(text[a:b] for a, b in places) for split, places in spans.items()}
    if not all(parts.values()) and not deal.partial:
        unit = "lines" if deal.lines else "characters"
        shares = " and ".join(f"{split}={share}" for split, share in missing.items())
        raise InputError(f"{deal.name}: {n} {unit} are too few for {shares}; give more text")
    return Cut(spans, parts)
