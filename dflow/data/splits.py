"""Which files of a folder are training, validation and test data: by their names, or dealt as whole files."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from dflow.config import InputError

SPLITS = ("train", "valid", "test")
#: All splits, one after another.
ALL = "all"
#: What `role` answers for a name that has to be made clear before anything is trained on.
UNCLEAR = "unclear"

_WORDS = {
    "train": ("train", "training", "trn"),
    "valid": ("valid", "val", "validation", "validate", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "tests", "testing", "tst"),
    # Data that are held out either to choose by or to tell results on: the name does not say which.
    UNCLEAR: ("holdout", "heldout"),
}
_ROLES = {
    word + end: split
    for split, words in _WORDS.items()
    for word in words
    for end in ("", "set", "data", "ing")
} | {"trainings": "train"}
_TEXTS = (".txt", ".text", ".tokens")
_PACKED = (".xz", ".gz")
#: Names that programs leave behind; those that begin with a dot are hidden too.
_LEFT_BEHIND = {"__macosx", "thumbs.db", "desktop.ini", "__pycache__"}
_SHOWN = 3


@dataclass(frozen=True)
class Arranged:
    """The files of a folder by split.

    Attributes:
        root: the folder, or the one file.
        parts: the files of each split that there is, each list in the order of the names.
        named: whether names (or a deal of whole files) say which split a file belongs to; else all of the
            files are one pool, under ``train``.
        notes: sentences for the user on what was left out, and on how the files were understood.
    """

    root: Path
    parts: Mapping[str, Sequence[Path]]
    named: bool = False
    notes: tuple[str, ...] = ()

    def name(self, path: Path) -> str:
        """A file as it is called in messages: relative to the folder."""
        return path.name if path == self.root else path.relative_to(self.root).as_posix()


def role(name: str) -> str | None:
    """The split that the name of one file or folder tells, `UNCLEAR`, or None where it tells none.

    Words count in any letter case, wherever they stand in the name.

    >>> [role(n) for n in ("Train", "wiki.VALID.tokens", "test-00000-of-00003", "val2017", "contest.txt")]
    ['train', 'valid', 'test', 'valid', None]
    >>> role("train_and_test"), role("holdout")
    ('unclear', 'unclear')
    """
    roles = _roles(name)
    return UNCLEAR if len(roles) > 1 else next(iter(roles), None)


def _roles(name: str) -> set[str]:
    words = re.findall(r"[a-z]+", name.lower())
    # Also the two words of held-out, and those of camel case, as in trainA.
    words += ["".join(pair) for pair in pairwise(words)] + re.findall(r"[A-Z]?[a-z]+", name)
    return {_ROLES[word.lower()] for word in words if word.lower() in _ROLES}


def place(inside: Path) -> str | None:
    """The split of a file by its path inside a folder: the outermost name that tells one decides.

    A name further inside that is nothing but the name of another split makes the file `UNCLEAR`; a class of
    pictures called ``test_tube`` does not. A folder whose name tells several splits leaves it to what is
    inside.

    >>> [place(Path(p)) for p in ("Train/cats/1.png", "en/test/a.txt", "train/test_tube/1.png", "a/b.txt")]
    ['train', 'test', 'train', None]
    >>> place(Path("train/valid.txt"))
    'unclear'
    """
    decided, several = None, False
    for name in inside.parts:
        found = role(name)
        if decided is None or several:
            decided = found or decided
            several = several if found is None else len(_roles(name)) > 1
        elif found not in (None, decided) and re.fullmatch(r"[\W_\d]*[a-z]+[\W_\d]*", _stem(name)):
            return UNCLEAR
    return decided


def _stem(name: str) -> str:
    return name.lower().split(".")[0]


def hidden(inside: Path) -> bool:
    """Whether a path inside a folder is hidden, or was left behind by a program."""
    return any(name.startswith(".") or name.lower() in _LEFT_BEHIND for name in inside.parts)


def is_text(path: Path, split: str | None = None) -> bool:
    """Whether a file of a folder is read as text: by its suffix, or for want of one by the name of a split.

    >>> is_text(Path("a.TXT")), is_text(Path("a.txt.gz")), is_text(Path("a.md")), is_text(Path("README"))
    (True, True, False, False)
    >>> is_text(Path("train-00000-of-00003"), "train"), is_text(Path("corpus.valid"), "valid")
    (True, True)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if split is None or last in _TEXTS:
        return last in _TEXTS
    return last in ("", ".raw") or last[1:].isdigit() or role(last) is not None


def holds_text(root: Path) -> bool:
    """Whether a file of the folder is read as text."""
    inside = ((p, p.relative_to(root)) for p in below(root) if p.is_file())
    return any(is_text(p, place(i)) and not hidden(i) for p, i in inside)


def below(folder: Path, above: frozenset[str] = frozenset()) -> list[Path]:
    """The files in a folder and in those inside it, and links that lead nowhere, in the order of their names.

    Links to folders are followed, but for those that lead back to a folder in which they lie, one of which
    ``above`` names.
    """
    place = os.path.realpath(folder)
    if place in above:
        return []
    listed = list[Path]()
    for path in folder.iterdir():
        if path.is_dir():
            listed += below(path, above | {place})
        elif path.is_file() or path.is_symlink():
            listed.append(path)
    return sorted(listed)


def texts(root: Path) -> Arranged:
    """The text files of a folder, or one file, by split.

    Raises:
        InputError: as of `arrange`, or no text file.
    """
    if not root.is_dir():
        return Arranged(root, {"train": [root]})
    found = arrange(root, is_text)
    if not found.parts:
        raise InputError(
            f"{root}: the folder holds no *.txt file; put the text there or name a file. "
            + " ".join(found.notes)
        )
    return found


def texts_before(root: Path) -> Arranged:
    """The text files of a folder as version 0.1.0 took them: all ``*.txt``, whatever they are called."""
    paths = sorted(p for p in root.rglob("*.txt") if p.is_file()) if root.is_dir() else [root]
    return Arranged(root, {"train": paths}, notes=(BEFORE,))


#: What is said of data that are read as version 0.1.0 read them.
BEFORE = (
    "The checksum that the model keeps is that of these data as version 0.1.0 read them: all files of the "
    "folder were one pool, also those that are named as validation or test data. They are read in the same "
    "way here; a model that is trained anew gets the splits that the names tell."
)


def arrange(root: Path, is_read: Callable[[Path, str | None], bool]) -> Arranged:
    """The files of a folder that are read, by the split that their names tell.

    Without a name that tells a split all are one pool. Hidden files are left out, files of other kinds are
    counted in a note.

    Args:
        root: the folder.
        is_read: whether a file of this name, in this split, is of a kind that is read.

    Raises:
        InputError: a file of which it is not clear what it is, beside others whose names tell it;
            validation or test data without training data; or a link to such data that leads nowhere.
    """
    parts: dict[str | None, list[Path]] = {}
    unread, passed = list[Path](), 0
    for path in below(root):
        inside = path.relative_to(root)
        split = place(inside)
        if hidden(inside):
            passed += is_read(path, split)
        elif not path.exists() and (split is not None or is_read(path, split)):
            raise InputError(f"{path}: a link to what is not there; correct the link or remove it")
        elif is_read(path, split):
            parts.setdefault(split, []).append(path)
        else:
            unread.append(inside)
    notes = _left_out(unread, passed)
    if set(parts) <= {None}:
        pool = parts.get(None, [])
        if len(pool) > 1:
            notes.append(f"No name in {root} tells a split: its {len(pool):,} files are one pool.")
        return Arranged(root, {"train": pool} if pool else {}, notes=tuple(notes))
    _refuse_unclear(root, parts)
    return Arranged(root, {s: parts[s] for s in SPLITS if s in parts}, named=True, notes=tuple(notes))


def _left_out(unread: Sequence[Path], passed: int) -> list[str]:
    notes = []
    if unread:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in unread)
        counts = ", ".join(f"{n:,} with {kind}" for kind, n in kinds.most_common(6))
        notes.append(
            f"Files that were not read, since they are of other kinds: {len(unread):,} ({counts}; "
            f"{shown(map(str, unread))})."
        )
    if passed:
        notes.append(f"Files that were left out, since they or their folders are hidden: {passed:,}.")
    return notes


def _refuse_unclear(root: Path, parts: Mapping[str | None, Sequence[Path]]) -> None:
    known = [split for split in SPLITS if split in parts]
    doubtful = [*parts.get(UNCLEAR, ()), *parts.get(None, ())]
    if doubtful:
        first = doubtful[0].relative_to(root)
        top = first if place(first) == UNCLEAR else Path(first.parts[0])
        beside = [_top(root, parts[split][0]) for split in known]
        told = f", beside {', '.join(beside)}," if beside else ""
        raise InputError(
            f"{root / top}{told} may be training, validation or test data: rename it so that its name has "
            "one of the words train, valid and test, or move it away"
        )
    if "train" not in known:
        others = " and ".join(f"{_top(root, parts[s][0])} ({s})" for s in known)
        raise InputError(
            f"{root}: holds {others}, and nothing that is named as training data; rename the training data "
            "so that the name has the word train, or name one of these files or folders itself to score it"
        )


def _top(root: Path, path: Path) -> str:
    """The part of a path inside a folder down to the name that tells the split."""
    inside = path.relative_to(root)
    depth = next(i for i, name in enumerate(inside.parts) if role(name) is not None)
    return "/".join(inside.parts[: depth + 1])


def by_files(found: Arranged, shares: Mapping[str, float]) -> Arranged:
    """Whole files of a pool dealt to validation and test, until these have their shares of the bytes.

    The order in which files are taken is that of a hash of their names, which no version of a library
    changes. Each split gets one file at least.

    Raises:
        InputError: names tell the splits already, or there are fewer than three files.
    """
    pool = list(found.parts["train"])
    if found.named:
        raise InputError(
            f"{found.root}: the names of its files tell the splits; leave out data.split_by: files"
        )
    if len(pool) < 3:
        raise InputError(
            f"{found.root}: data.split_by: files needs three files at least, found {len(pool)}; "
            "choose blocks or tail"
        )
    pool.sort(key=lambda path: hashlib.sha256(found.name(path).encode("utf-8", "surrogateescape")).digest())
    sizes = {path: path.stat().st_size for path in pool}
    total = sum(sizes.values())
    parts: dict[str, list[Path]] = {}
    for split, share in shares.items():
        wanted = share * total
        taken = list[Path]()
        for path in pool:
            if sum(sizes[p] for p in taken) + sizes[path] <= wanted:
                taken.append(path)
        taken = taken or [min(pool, key=lambda p: sizes[p])]
        pool = [path for path in pool if path not in taken]
        parts[split] = sorted(taken)
    parts = {"train": sorted(pool)} | parts
    note = f"Whole files were dealt: {', '.join(f'{len(p):,} {s}' for s, p in parts.items())}."
    return replace(found, parts=parts, named=True, notes=(*found.notes, note))


def repeated(parts: Mapping[str, Iterable[tuple[str, Path | bytes]]]) -> list[str]:
    """Sentences on files of one split that are in another one too, byte for byte.

    Args:
        parts: of each split the files: their names, and a path or the content.
    """
    sizes: dict[int, list[tuple[str, str, Path | bytes]]] = {}
    for split, pairs in parts.items():
        for name, source in pairs:
            size = len(source) if isinstance(source, bytes) else source.stat().st_size
            sizes.setdefault(size, []).append((split, name, source))
    alike: dict[tuple[str, str], list[str]] = {}
    for group in sizes.values():
        if len({split for split, _, _ in group}) < 2:
            continue
        first: dict[str, dict[bytes, str]] = {split: {} for split in SPLITS}
        for split, name, source in sorted(group, key=lambda item: SPLITS.index(item[0])):
            data = source if isinstance(source, bytes) else source.read_bytes()
            key = hashlib.sha256(data).digest()
            for other in SPLITS[: SPLITS.index(split)]:
                if data and first[other].get(key, name) != name:
                    alike.setdefault((split, other), []).append(f"{name} = {first[other][key]}")
            first[split].setdefault(key, name)
    return [
        f"Files of the {split} data that are byte for byte files of the {other} data too: {len(pairs):,} "
        f"({shown(pairs)})."
        for (split, other), pairs in alike.items()
    ]


def shown(names: Iterable[str]) -> str:
    """The first few of many names, and how many more there are.

    >>> shown("abcde")
    'a, b, c and 2 more'
    """
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
