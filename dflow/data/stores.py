"""Texts larger than memory: spelled once, piece by piece, into a folder, and read from there as needed."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dflow.config import InputError, parse
from dflow.data import files, own_text
from dflow.data.known import from_hub
from dflow.data.splits import SPLITS, Arranged
from dflow.data.tokenizers import Bytes, Characters, SentencePiece, Tokenizer, compact

HUB = "hub:"
ABOUT = "about.json"

#: Characters that are read and spelled at a time, and from which pieces of sentencepiece are learned.
_PIECE, _LEARN = 1 << 22, 1 << 26


@dataclass(frozen=True)
class About:
    """What a store holds, as its ``about.json`` tells it.

    Attributes:
        source: what the text was made of: name, sizes and times of files, settings that change it.
        characters: of each split.
        symbols: of each split.
        checksum: of the whole text.
        notes: sentences on what was read.
    """

    source: dict[str, Any]
    characters: dict[str, int]
    symbols: dict[str, int]
    checksum: str
    version: int = 1
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stored:
    """A text in a store: symbols of each split, compact, mapped from the disk."""

    tokenizer: Tokenizer
    about: About
    ids: dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A text that is read more than once, in pieces of a few million characters.

    Attributes:
        name: of a file, a folder or ``hub:OWNER/NAME``.
        found: its files by split; None for the hub's.
        lowercase: whether it is lowered.
    """

    name: str
    found: Arranged | None
    lowercase: bool

    def stamp(self) -> dict[str, Any]:
        """What tells one text from another without reading it."""
        stamp: dict[str, Any] = {"name": self.name, "lowercase": self.lowercase}
        if self.found is not None:
            stats = [(p, p.stat()) for paths in self.found.parts.values() for p in paths]
            stamp["files"] = [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]
            if self.found.named:
                stamp["splits"] = {split: len(paths) for split, paths in self.found.parts.items()}
        return stamp

    def pieces(self, crlf: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
        """The text, in pieces with the split that each is of: of a pool ``train``.

        Line ends CRLF become LF, and are counted in ``crlf``.
        """
        for split, piece in self._raw(Counter() if crlf is None else crlf):
            yield split, piece.lower() if self.lowercase else piece

    def checksum(self, characters: dict[str, int]) -> str:
        """Of the whole text, which is read for it, cut into splits of so many characters."""
        digest = hashlib.sha256()
        for _, piece in _shown(self.pieces(), "check"):
            digest.update(piece.encode("utf-8"))
        if self.found is not None and self.found.named:
            digest.update(own_text.seal(characters).encode("utf-8"))
        return f"sha256:{digest.hexdigest()}"

    def _raw(self, crlf: Counter[str]) -> Iterator[tuple[str, str]]:
        if self.found is None:
            for text in _documents(self.name):
                crlf["line ends"] += text.count("\r\n")
                yield "train", text.replace("\r\n", "\n")
            return
        for split, paths in self.found.parts.items():
            for number, path in enumerate(paths):
                if number:
                    yield split, "\n"
                for piece in _decoded(path):
                    crlf["line ends"] += piece.count("\r\n")
                    yield split, piece.replace("\r\n", "\n")


def _decoded(path: Path) -> Iterator[str]:
    r"""A file in pieces that cut no ``\r\n`` in two; a byte-order mark is dropped."""
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    decoder, start, kept = codecs.getincrementaldecoder("utf-8-sig")(), 0, ""
    try:
        file: IO[bytes]
        with opened(path, "rb") as file:  # type: ignore[operator]
            while data := file.read(_PIECE):
                text = kept + decoder.decode(data)
                start += len(data)
                # A line break may be cut in two.
                kept = "\r" if text.endswith("\r") else ""
                yield text.removesuffix("\r")
            yield kept + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 near byte offset {start + error.start} ({error.reason}); convert the file to "
            "UTF-8, for example with iconv"
        ) from None
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated ({error}); fetch the file again") from error


def _documents(name: str) -> Iterator[str]:
    """Documents of the training split of a set on the hub, streamed, each ended by a line break."""
    repository = name.removeprefix(HUB)
    if repository.count("/") != 1:
        raise InputError(f"{name}: name a data set of the hub as {HUB}OWNER/NAME")

    def read(rows: Any) -> Iterator[dict[str, Any]]:
        return iter(rows)

    rows = from_hub(name, "the text as a file", repository, read, split="train", streaming=True)
    collected: list[str] = []
    size = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            # Errors of a dozen families; each means that the stream broke.
            raise InputError(
                f"{name}: the stream broke off ({type(error).__name__}: {error}); run again"
            ) from error
        if row is None:
            break
        text = row.get("text")
        if not isinstance(text, str):
            raise InputError(f"{name}: has no column 'text' of strings, only {', '.join(row)}")
        collected.append(text + "\n")
        size += len(text)
        if size >= _PIECE:
            yield "".join(collected)
            collected, size = [], 0
    yield "".join(collected)


def open_store(
    folder: Path,
    source: Source,
    kind: str,
    vocab_size: int,
    shares: tuple[float, float],
    tokenizer: Tokenizer | None,
) -> Stored:
    """The text in the store ``folder``, which is made, whole or not at all, where there is none.

    Characters are ordered by their frequency in the whole text; pieces are learned from its first 67 million
    characters.

    Args:
        folder: of the store.
        source: of the text.
        kind: of the tokenizer: characters, bytes, sentencepiece.
        vocab_size: of sentencepiece.
        shares: for validation and test, which are the end of the text.
        tokenizer: of a trained model; the store has to be spelled in it.

    Raises:
        InputError: another text, a damaged store, a text that cannot be read or spelled.
    """
    stamp = source.stamp() | {"tokenizer": kind, "shares": list(shares)}
    if kind == "sentencepiece":
        stamp["vocab_size"] = vocab_size
    if not (folder / ABOUT).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: holds something else; name an empty or a new folder as data.store")
        if int(os.environ.get("LOCAL_RANK", "0")):
            _wait(folder)
        else:
            _make(folder, source, stamp, kind, vocab_size, shares, tokenizer)
    path = folder / ABOUT
    try:
        about = parse(About, json.loads(path.read_bytes()), str(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: truncated or damaged ({error}); remove the folder to make it anew"
        ) from None
    _check_source(folder, about, json.loads(json.dumps(stamp)), source)
    found = Tokenizer.load(folder)
    if tokenizer is not None and found != tokenizer:
        raise InputError(
            f"{folder}: spelled in other symbols than the model's; name another folder as data.store"
        )
    dtype = np.dtype(compact(found.size))
    ids = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        size, expected = file.stat().st_size if file.is_file() else 0, about.symbols[split] * dtype.itemsize
        if size != expected:
            raise InputError(
                f"{file}: {size:,} bytes, expected {expected:,}; remove the folder to make it anew"
            )
        # Copy on write: what is read is shared, and nothing written to the disk.
        ids[split] = torch.from_numpy(np.memmap(file, dtype, "c"))
    return Stored(found, about, ids)


#: What a stamp says of where and when the text was written, which does not change it.
_PLACE = ("name", "files")


def _check_source(folder: Path, about: About, stamp: dict[str, Any], source: Source) -> None:
    """Raise `InputError` unless the store is one of this text.

    A text that was copied, moved or touched is read once to compare its checksum; the store then notes the
    new place and time, where it can be written to.
    """
    if about.source == stamp:
        return
    settings, expected = ({k: v for k, v in s.items() if k not in _PLACE} for s in (stamp, about.source))
    local = source.found is not None and "files" in about.source
    if settings != expected or not local or source.checksum(about.characters) != about.checksum:
        raise InputError(
            f"{folder}: a store of another text, or of one that has changed since; name another folder as "
            "data.store, or remove this one"
        )
    with suppress(OSError):
        content = json.dumps(replace(about, source=stamp).__dict__, indent=1).encode()
        files.write(folder / ABOUT, content)


def _wait(folder: Path) -> None:
    """Until the first process of this machine has made the store."""
    seen = time.monotonic()
    while not (folder / ABOUT).is_file():
        if any(folder.parent.glob(f".{folder.name}-*")):
            seen = time.monotonic()
        elif time.monotonic() - seen > _PATIENCE:
            raise InputError(f"{folder}: no store, and the process that should make it does not")
        time.sleep(0.2)


#: Seconds without a sign of the process that makes a store.
_PATIENCE = 120.0


def _make(
    folder: Path,
    source: Source,
    stamp: dict[str, Any],
    kind: str,
    vocab_size: int,
    shares: tuple[float, float],
    tokenizer: Tokenizer | None,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    # One made in the usual way: the temporary one is its owner's alone.
    made_in = temporary / "store"
    try:
        made_in.mkdir()
        crlf = Counter[str]()
        sizes, made = _survey(source, kind, vocab_size, crlf)
        used = tokenizer or made
        characters = _dealt(source, sizes, dict(zip(SPLITS[1:], shares, strict=True)))
        symbols, checksum = _spell(made_in, source, used, characters)
        notes = [own_text.crlf_note(crlf.total())] if crlf.total() else []
        used.save(made_in)
        about = About(stamp, characters, symbols, checksum, notes=notes)
        files.write(made_in / ABOUT, json.dumps(about.__dict__, indent=1).encode())
        with suppress(OSError):
            folder.rmdir()
        made_in.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _dealt(source: Source, sizes: Counter[str], shares: dict[str, float]) -> dict[str, int]:
    """Characters of each split, in the order in which they are read."""
    missing = {split: share for split, share in shares.items() if split not in sizes}
    cut = {split: int(sizes["train"] * share) for split, share in missing.items()}
    characters = dict(sizes) | cut | {"train": sizes["train"] - sum(cut.values())}
    if not all(characters.values()):
        told = " and ".join(f"{split}={share}" for split, share in missing.items())
        raise InputError(f"{source.name}: {sizes['train']} characters are too few for {told}; give more text")
    return {split: characters[split] for split in own_text.order(missing)}


def _survey(source: Source, kind: str, vocab_size: int, crlf: Counter[str]) -> tuple[Counter[str], Tokenizer]:
    """Characters of each split that there is, and a tokenizer for the text."""
    sizes, counts, learned = Counter[str](), dict[int, int](), list[str]()
    for split, piece in _shown(source.pieces(crlf), "read"):
        sizes[split] += len(piece)
        if kind == "characters":
            Characters.count(piece, counts)
        elif kind == "sentencepiece" and split == "train" and sum(map(len, learned)) < _LEARN:
            learned.append(piece)
    expected = ["train"] if source.found is None else list(source.found.parts)
    if not all(sizes[split] for split in expected):
        raise InputError(f"{source.name}: no text in it; name a file that has some")
    if kind == "bytes":
        return sizes, Bytes()
    if kind == "sentencepiece":
        return sizes, SentencePiece.train("".join(learned)[:_LEARN], vocab_size)
    try:
        return sizes, Characters.of(counts)
    except InputError as error:
        raise InputError(f"{source.name}: {error}") from None


def _spell(
    folder: Path, source: Source, tokenizer: Tokenizer, characters: dict[str, int]
) -> tuple[dict[str, int], str]:
    """Write the symbols of each split; how many they are, and the checksum of the text."""
    symbols, digest = dict.fromkeys(SPLITS, 0), hashlib.sha256()
    pieces = (piece for _, piece in _shown(source.pieces(), "spell"))
    left, rest = dict(characters), ""
    for split in characters:
        with (folder / f"{split}.bin").open("wb") as file:
            while left[split]:
                if not rest:
                    rest = next(pieces, "")
                    if not rest:
                        raise InputError(f"{source.name}: became shorter while it was read; run again")
                    digest.update(rest.encode("utf-8"))
                part, rest = rest[: left[split]], rest[left[split] :]
                left[split] -= len(part)
                try:
                    codes = tokenizer.codes(part)
                except InputError as error:
                    raise InputError(f"{source.name} ({split}): {error}") from None
                file.write(np.ascontiguousarray(codes).tobytes())
                symbols[split] += len(codes)
            file.flush()
            os.fsync(file.fileno())
    if rest or next(pieces, ""):
        raise InputError(f"{source.name}: became longer while it was read; run again")
    if source.found is not None and source.found.named:
        digest.update(own_text.seal(characters).encode("utf-8"))
    return symbols, f"sha256:{digest.hexdigest()}"


def _shown(pieces: Iterator[tuple[str, str]], what: str) -> Iterator[tuple[str, str]]:
    """Pieces that are not empty, under a bar that counts characters."""
    with tqdm(unit="char", unit_scale=True, desc=what, delay=1, mininterval=1) as bar:
        for split, piece in pieces:
            bar.update(len(piece))
            if piece:
                yield split, piece
