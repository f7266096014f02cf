"""Which files of a folder are training, validation and test data: by their names, or dealt as whole files."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from dflow.config import InputError
from dflow.data.arrays import Array

SPLITS = ("train", "valid", "test")
#: All splits, one after another.
ALL = "all"
#: What `role` answers for a name that has to be made clear before anything is trained on.
UNCLEAR = "unclear"

_WORDS = {
    "train": ("train", "training", "trn"),
    "valid": ("valid", "val", "validation", "validate", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "tests", "testing", "tst"),
    # Data that are held out either to choose models by or to report results on: the name does not say which.
    UNCLEAR: ("holdout", "heldout"),
}
_ROLES = {
    word + end: split
    for split, words in _WORDS.items()
    for word in words
    for end in ("", "set", "data", "ing")
} | {"trainings": "train"}
_TEXTS = (".txt", ".text", ".tokens")
#: Files whose lines are read, beside texts.
_LINES = (".smi", ".smiles", ".fasta", ".fa", ".fna", ".faa", ".log")
_PACKED = (".xz", ".gz")
#: Names that programs leave behind; those that begin with a dot are hidden too.
_LEFT_BEHIND = {"__macosx", "thumbs.db", "desktop.ini", "__pycache__"}
_NUM_LISTED = 3


@dataclass(frozen=True)
class Arranged:
    """The files of a folder by split.

    Attributes:
        root: the folder, or the one file.
        paths: the files of each split that there is, each list in the order of the names.
        named: whether names (or a deal of whole files) say which split a file belongs to; else all of the
            files are one pool, under ``train``.
        notes: sentences for the user on what was left out, and on how the files were understood.
    """

    root: Path
    paths: Mapping[str, Sequence[Path]]
    named: bool = False
    notes: tuple[str, ...] = ()

    def name(self, path: Path) -> str:
        """A file as it is called in messages: relative to the folder."""
        return path.name if path == self.root else path.relative_to(self.root).as_posix()


def role(name: str) -> str | None:
    """The split that the name of one file or folder tells, `UNCLEAR`, or None for a name without such a word.

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
    split, several = None, False
    for name in inside.parts:
        of_name = role(name)
        if split is None or several:
            split = of_name or split
            several = several if of_name is None else len(_roles(name)) > 1
        elif of_name not in (None, split) and re.fullmatch(
            r"[\W_\d]*[a-z]+[\W_\d]*", name.lower().split(".")[0]
        ):
            return UNCLEAR
    return split


def hidden(inside: Path) -> bool:
    """Whether a path inside a folder is hidden, or was left behind by a program."""
    return any(name.startswith(".") or name.lower() in _LEFT_BEHIND for name in inside.parts)


def is_text(path: Path, split: str | None = None, of_texts: Sequence[str] = _TEXTS) -> bool:
    """Whether a file of a folder is read as text: by its suffix, or for want of one by the name of a split.

    >>> is_text(Path("a.TXT")), is_text(Path("a.txt.gz")), is_text(Path("a.md")), is_text(Path("README"))
    (True, True, False, False)
    >>> is_text(Path("train-00000-of-00003"), "train"), is_text(Path("corpus.valid"), "valid")
    (True, True)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if split is None or suffix in of_texts:
        return suffix in of_texts
    return suffix in ("", ".raw") or suffix[1:].isdigit() or role(suffix) is not None


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
        InputError: as of `arrange`.
    """
    if not root.is_dir():
        return Arranged(root, {"train": [root]})
    return arrange(root, is_text, "*.txt file", "put the text there or name a file")


def lines(root: Path) -> Arranged:
    """As `texts`; a folder's files of molecules, sequences and logs are read too.

    Raises:
        InputError: as of `arrange`.
    """
    if not root.is_dir():
        return texts(root)
    suffixes = (*_TEXTS, *_LINES)
    is_read = partial(is_text, of_texts=suffixes)
    return arrange(root, is_read, f"file of lines ({', '.join(suffixes)})", "put one there or name a file")


def texts_before(root: Path) -> Arranged:
    """The text files of a folder as version 0.1.0 took them: all ``*.txt``, whatever they are called."""
    paths = sorted(p for p in root.rglob("*.txt") if p.is_file()) if root.is_dir() else [root]
    return Arranged(root, {"train": paths}, notes=(BEFORE,))


#: The note on data that are read as version 0.1.0 read them.
BEFORE = (
    "The checksum that the model keeps is that of these data as version 0.1.0 read them: all files of the "
    "folder were one pool, also those that are named as validation or test data. They are read in the same "
    "way here; a model that is trained anew gets the splits that the names tell."
)


def arrange(root: Path, is_read: Callable[[Path, str | None], bool], kind: str, way: str) -> Arranged:
    """The files of a folder that are read, by the split that their names tell.

    Without a name that tells a split all are one pool. Hidden files are left out, files of other kinds are
    counted in a note.

    Args:
        root: the folder.
        is_read: whether a file of this name, in this split, is of a kind that is read.
        kind: what such a file is called, for errors.
        way: what to do about a folder without one, for errors.

    Raises:
        InputError: no file that is read; a file whose split is not clear, beside others whose names tell it;
            validation or test data without training data; or a link to such data that leads nowhere.
    """
    paths: dict[str | None, list[Path]] = {}
    unread, num_hidden = list[Path](), 0
    for path in below(root):
        inside = path.relative_to(root)
        split = place(inside)
        if hidden(inside):
            num_hidden += is_read(path, split)
        elif not path.exists() and (split is not None or is_read(path, split)):
            raise InputError(f"{path}: a link to what is not there; correct the link or remove it")
        elif is_read(path, split):
            paths.setdefault(split, []).append(path)
        else:
            unread.append(inside)
    notes = _left_out(unread, num_hidden)
    if set(paths) <= {None}:
        pool = paths.get(None, [])
        if not pool:
            raise InputError(f"{root}: the folder holds no {kind}; {way}. " + " ".join(notes))
        if len(pool) > 1:
            notes.append(f"No name in {root} tells a split: its {len(pool):,} files are one pool.")
        return Arranged(root, {"train": pool}, notes=tuple(notes))
    _refuse_unclear(root, paths)
    return Arranged(root, {s: paths[s] for s in SPLITS if s in paths}, named=True, notes=tuple(notes))


def _left_out(unread: Sequence[Path], num_hidden: int) -> list[str]:
    """Notes on the files that were not read."""
    notes = []
    if unread:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in unread)
        counts = ", ".join(f"{n:,} with {kind}" for kind, n in kinds.most_common(6))
        notes.append(
            f"Files that were not read, since they are of other kinds: {len(unread):,} ({counts}; "
            f"{first_few(map(str, unread))})."
        )
    if num_hidden:
        notes.append(f"Files that were left out, since they or their folders are hidden: {num_hidden:,}.")
    return notes


def _refuse_unclear(root: Path, paths: Mapping[str | None, Sequence[Path]]) -> None:
    tops = {split: _top(root, paths[split][0]) for split in SPLITS if split in paths}
    unclear = [*paths.get(UNCLEAR, ()), *paths.get(None, ())]
    if unclear:
        inside = unclear[0].relative_to(root)
        top = inside if place(inside) == UNCLEAR else Path(inside.parts[0])
        beside = f", beside {', '.join(tops.values())}," if tops else ""
        raise InputError(
            f"{root / top}{beside} may be training, validation or test data: rename it so that its name has "
            "one of the words train, valid and test, or move it away"
        )
    if "train" not in tops:
        others = " and ".join(f"{top} ({split})" for split, top in tops.items())
        raise InputError(
            f"{root}: holds {others}, and nothing that is named as training data; rename the training data "
            "so that the name has the word train, or name one of these files or folders itself to score it"
        )


def _top(root: Path, path: Path) -> str:
    """The part of a path inside a folder down to the name that tells the split."""
    inside = path.relative_to(root)
    depth = next(i for i, name in enumerate(inside.parts) if role(name) is not None)
    return "/".join(inside.parts[: depth + 1])


def by_files(arranged: Arranged, shares: Mapping[str, float]) -> Arranged:
    """Whole files of a pool dealt to validation and test, until these have their shares of the bytes.

    The order in which files are taken is that of a hash of their names, which no version of a library
    changes. Each split gets one file at least.

    Raises:
        InputError: names tell the splits already, or there are fewer than three files.
    """
    pool = list(arranged.paths["train"])
    if arranged.named:
        raise InputError(
            f"{arranged.root}: the names of its files tell the splits; leave out data.split_by: files"
        )
    if len(pool) < 3:
        raise InputError(
            f"{arranged.root}: data.split_by: files needs three files at least, found {len(pool)}; "
            "choose blocks or tail"
        )
    pool.sort(key=lambda p: hashlib.sha256(arranged.name(p).encode("utf-8", "surrogateescape")).digest())
    sizes = {path: path.stat().st_size for path in pool}
    total = sum(sizes.values())
    paths: dict[str, list[Path]] = {}
    for split, share in shares.items():
        taken, size = list[Path](), 0
        for path in pool:
            if size + sizes[path] <= share * total:
                taken.append(path)
                size += sizes[path]
        taken = taken or [min(pool, key=lambda p: sizes[p])]
        pool = [path for path in pool if path not in taken]
        paths[split] = sorted(taken)
    paths = {"train": sorted(pool)} | paths
    note = f"Whole files were dealt: {', '.join(f'{len(p):,} {s}' for s, p in paths.items())}."
    return replace(arranged, paths=paths, named=True, notes=(*arranged.notes, note))


def by_rows(
    rows: Mapping[str, Array], shares: Mapping[str, float], name: str, partial: bool, what: str = "rows"
) -> tuple[dict[str, Array], str]:
    """The three splits of rows: those missing are taken from the rows to train on, by a fixed shuffle.

    A file is often sorted, so that its last rows are unlike the others. The shuffle is that of a hash, which
    no version of a library changes; rows keep their order within a split.

    Args:
        rows: of each split that there is, ``train`` among them.
        shares: for validation and test.
        name: of the data, for messages.
        partial: whether a split may be empty.
        what: the rows are, for messages.

    Returns:
        The rows of each split, and a note, empty where no split is missing.

    Raises:
        InputError: there are so few rows that a split has no row.
    """
    missing = {split: share for split, share in shares.items() if split not in rows}
    if not missing:
        return dict(rows), ""
    pool = rows["train"]
    order = sorted(range(len(pool)), key=lambda i: hashlib.sha256(b"%d" % i).digest())
    dealt, start = dict(rows), 0
    for split, share in (missing | {"train": 1.0}).items():
        stop = len(pool) if split == "train" else start + int(len(pool) * share)
        dealt[split] = pool[sorted(order[start:stop])]
        start = stop
    if not partial and not all(map(len, dealt.values())):
        wanted = " and ".join(f"{split}={share}" for split, share in missing.items())
        raise InputError(
            f"{name}: {len(pool)} {what} are too few for {wanted}; give more data, or larger shares"
        )
    return dealt, f"{' and '.join(missing)} dealt from the {what} to train on by a fixed shuffle"


def repeated(sources: Mapping[str, Iterable[tuple[str, Path | bytes]]]) -> list[str]:
    """Sentences on files of one split that are in another one too, byte for byte.

    Args:
        sources: of each split the files: their names, and a path or the content.
    """
    by_size: dict[int, list[tuple[str, str, Path | bytes]]] = {}
    for split in SPLITS:
        for name, source in sources.get(split, ()):
            size = len(source) if isinstance(source, bytes) else source.stat().st_size
            by_size.setdefault(size, []).append((split, name, source))
    alike: dict[tuple[str, str], list[str]] = {}
    for size, group in by_size.items():
        if not size or len({split for split, _, _ in group}) < 2:
            continue
        names: dict[tuple[str, bytes], str] = {}
        for split, name, source in group:
            data = source if isinstance(source, bytes) else source.read_bytes()
            digest = hashlib.sha256(data).digest()
            for other in SPLITS[: SPLITS.index(split)]:
                if names.get((other, digest), name) != name:
                    alike.setdefault((split, other), []).append(f"{name} = {names[other, digest]}")
            names.setdefault((split, digest), name)
    return [
        f"Files of the {split} data that are byte for byte files of the {other} data too: {len(pairs):,} "
        f"({first_few(pairs)})."
        for (split, other), pairs in alike.items()
    ]


def first_few(names: Iterable[str]) -> str:
    """The first few of many names, and how many more there are.

    >>> first_few("abcde")
    'a, b, c and 2 more'
    """
    listed = list(names)
    more = len(listed) - _NUM_LISTED
    return ", ".join(listed[:_NUM_LISTED]) + (f" and {more:,} more" if more > 0 else "")
