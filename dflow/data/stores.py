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
from dflow.data.known import from_hub, repository_of
from dflow.data.pieces import SentencePiece
from dflow.data.settings import DataConfig
from dflow.data.splits import SPLITS, Arranged
from dflow.data.tokenizers import Bytes, Characters, Tokenizer, compact

ABOUT = "about.json"

#: Characters that are read and spelled at a time, and from which pieces of sentencepiece are learned.
_PIECE, _LEARN = 1 << 22, 1 << 26
#: Seconds without a sign of the process that makes a store.
_PATIENCE = 120.0


@dataclass(frozen=True)
class About:
    """What a store holds, as its ``about.json`` says.

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

    def write(self, folder: Path) -> None:
        """Write ``about.json`` into the folder of the store."""
        files.write(folder / ABOUT, json.dumps(self.__dict__, indent=1).encode())


@dataclass(frozen=True)
class Stored:
    """A text in a store: symbols of each split, compact, mapped from the disk."""

    tokenizer: Tokenizer
    about: About
    ids: dict[str, Tensor]


@dataclass(frozen=True)
class StoreSource:
    """A text that is read more than once, in pieces of a few million characters.

    Attributes:
        config: names a file, a folder or ``hub:OWNER/NAME``, the tokenizer, and the shares for validation and
            test, which are the end of the text.
        arranged: the files by split; None for the hub's.
    """

    config: DataConfig
    arranged: Arranged | None

    @property
    def named(self) -> bool:
        """Whether the names of files tell the splits."""
        return self.arranged is not None and self.arranged.named

    def stamp(self) -> dict[str, Any]:
        """The properties, as JSON holds them, by which one text and spelling differs from another."""
        config = self.config
        stamp: dict[str, Any] = {"name": config.name, "lowercase": config.lowercase}
        if self.arranged is not None:
            stats = [(p, p.stat()) for paths in self.arranged.paths.values() for p in paths]
            stamp["files"] = [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]
            if self.named:
                stamp["splits"] = {split: len(paths) for split, paths in self.arranged.paths.items()}
        stamp |= {"tokenizer": config.tokenizer, "shares": list(config.shares.values())}
        return stamp | ({"vocab_size": config.vocab_size} if config.tokenizer == "sentencepiece" else {})

    def pieces(self, crlf: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
        """The text, in pieces with the split that each is of: of a pool ``train``.

        Line ends CRLF become LF, and are counted in ``crlf``.
        """
        for split, piece in self._as_stored():
            if crlf is not None:
                crlf["line ends"] += piece.count("\r\n")
            piece = piece.replace("\r\n", "\n")
            yield split, piece.lower() if self.config.lowercase else piece

    def checksum(self, characters: dict[str, int]) -> str:
        """Of the whole text, which is read for it, cut into splits of so many characters."""
        digest = hashlib.sha256()
        for _, piece in _with_progress(self.pieces(), "check"):
            digest.update(piece.encode("utf-8"))
        return self.sealed(digest, characters)

    def sealed(self, digest: Any, characters: dict[str, int]) -> str:
        """The checksum of a text, from the SHA-256 of its pieces and the characters of each split."""
        if self.named:
            digest.update(own_text.seal(characters).encode("utf-8"))
        return f"sha256:{digest.hexdigest()}"

    def _as_stored(self) -> Iterator[tuple[str, str]]:
        if self.arranged is None:
            yield from (("train", text) for text in _documents(self.config.name))
            return
        for split, paths in self.arranged.paths.items():
            for number, path in enumerate(paths):
                if number:
                    yield split, "\n"
                yield from ((split, piece) for piece in _decoded(path))


def _decoded(path: Path) -> Iterator[str]:
    r"""A file in pieces that cut no ``\r\n`` in two; a byte-order mark is dropped."""
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    decoder, start, break_begun = codecs.getincrementaldecoder("utf-8-sig")(), 0, ""
    try:
        file: IO[bytes]
        with opened(path, "rb") as file:  # type: ignore[operator]
            while data := file.read(_PIECE):
                text = break_begun + decoder.decode(data)
                start += len(data)
                break_begun = "\r" if text.endswith("\r") else ""
                yield text.removesuffix("\r")
            yield break_begun + decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 near byte offset {start + error.start} ({error.reason}); convert the file to "
            "UTF-8, for example with iconv"
        ) from None
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated ({error}); fetch the file again") from error


def _documents(name: str) -> Iterator[str]:
    """Documents of the training split of a set on the hub, streamed, each ended by a line break."""
    rows: Iterator[dict[str, Any]] = from_hub(
        name, "the text as a file", repository_of(name), iter, split="train", streaming=True
    )
    documents: list[str] = []
    size = 0
    while True:
        try:
            row = next(rows, None)
        # Errors of a dozen families; each means that the stream broke.
        except Exception as error:
            raise InputError(
                f"{name}: the stream broke off ({type(error).__name__}: {error}); run again"
            ) from error
        if row is None:
            break
        text = row.get("text")
        if not isinstance(text, str):
            raise InputError(f"{name}: has no column 'text' of strings, only {', '.join(row)}")
        documents.append(text + "\n")
        size += len(text)
        if size >= _PIECE:
            yield "".join(documents)
            documents, size = [], 0
    yield "".join(documents)


def open_store(folder: Path, source: StoreSource, tokenizer: Tokenizer | None) -> Stored:
    """The text in the store ``folder``; a store that does not exist is made, whole or not at all.

    Characters are ordered by their frequency in the whole text; pieces are learned from its first 67 million
    characters.

    Args:
        folder: of the store.
        source: of the text.
        tokenizer: of a trained model; the store has to be spelled in it.

    Raises:
        InputError: another text, a damaged store, a text that cannot be read or spelled.
    """
    path = folder / ABOUT
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: holds something else; name an empty or a new folder as data.store")
        if int(os.environ.get("LOCAL_RANK", "0")):
            _wait(folder)
        else:
            _make(folder, source, tokenizer)
    try:
        about = parse(About, json.loads(path.read_bytes()), str(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: truncated or damaged ({error}); remove the folder to make it anew"
        ) from None
    _check_source(folder, about, source)
    stored_in = Tokenizer.load(folder)
    if tokenizer is not None and stored_in != tokenizer:
        raise InputError(
            f"{folder}: spelled in other symbols than the model's; name another folder as data.store"
        )
    ids = {split: _mapped(folder / f"{split}.bin", about.symbols[split], stored_in.size) for split in SPLITS}
    return Stored(stored_in, about, ids)


def _mapped(path: Path, num_symbols: int, vocab_size: int) -> Tensor:
    """The symbols in a file, read as they are needed."""
    dtype = np.dtype(compact(vocab_size))
    size, expected = path.stat().st_size if path.is_file() else 0, num_symbols * dtype.itemsize
    if size != expected:
        raise InputError(f"{path}: {size:,} bytes, expected {expected:,}; remove the folder to make it anew")
    # Copy on write: what is read is shared, and nothing written to the disk.
    return torch.from_numpy(np.memmap(path, dtype, "c"))


def _check_source(folder: Path, about: About, source: StoreSource) -> None:
    """Raise `InputError` unless the store is one of this text.

    A text that was copied, moved or touched is read once to compare its checksum; the store then notes the
    new place and time, where it can be written to.
    """
    stamp = source.stamp()
    if about.source == stamp:
        return
    # Name and files say where and when the text was written, which does not change it.
    settings, expected = (
        {k: v for k, v in s.items() if k not in ("name", "files")} for s in (stamp, about.source)
    )
    local = source.arranged is not None and "files" in about.source
    if settings != expected or not local or source.checksum(about.characters) != about.checksum:
        raise InputError(
            f"{folder}: a store of another text, or of one that has changed since; name another folder as "
            "data.store, or remove this one"
        )
    with suppress(OSError):
        replace(about, source=stamp).write(folder)


def _wait(folder: Path) -> None:
    """Until the first process of this machine has made the store."""
    seen = time.monotonic()
    while not (folder / ABOUT).is_file():
        if any(folder.parent.glob(f".{folder.name}-*")):
            seen = time.monotonic()
        elif time.monotonic() - seen > _PATIENCE:
            raise InputError(f"{folder}: no store, and the process that should make it does not")
        time.sleep(0.2)


def _make(folder: Path, source: StoreSource, tokenizer: Tokenizer | None) -> None:
    stamp = source.stamp()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    # Nobody else may read the temporary folder: the store is a folder with the usual rights inside it.
    store = temporary / "store"
    try:
        store.mkdir()
        crlf = Counter[str]()
        sizes, trained = _survey(source, crlf)
        used = tokenizer or trained
        characters = _sizes_of_splits(source, sizes)
        symbols, checksum = _spell(store, source, used, characters)
        notes = [own_text.crlf_note(crlf.total())] if crlf.total() else []
        used.save(store)
        About(stamp, characters, symbols, checksum, notes=notes).write(store)
        with suppress(OSError):
            folder.rmdir()
        store.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sizes_of_splits(source: StoreSource, sizes: Counter[str]) -> dict[str, int]:
    """Characters of each split, in the order in which they are read."""
    missing = {split: share for split, share in source.config.shares.items() if split not in sizes}
    cut = {split: int(sizes["train"] * share) for split, share in missing.items()}
    characters = dict(sizes) | cut | {"train": sizes["train"] - sum(cut.values())}
    if not all(characters.values()):
        shares = " and ".join(f"{split}={share}" for split, share in missing.items())
        raise InputError(
            f"{source.config.name}: {sizes['train']} characters are too few for {shares}; give more text"
        )
    return {split: characters[split] for split in own_text.order(missing)}


def _survey(source: StoreSource, crlf: Counter[str]) -> tuple[Counter[str], Tokenizer]:
    """Characters of each split that there is, and a tokenizer for the text."""
    sizes, counts, sample = Counter[str](), dict[int, int](), list[str]()
    for split, piece in _with_progress(source.pieces(crlf), "read"):
        sizes[split] += len(piece)
        if source.config.tokenizer == "characters":
            Characters.count(piece, counts)
        elif (
            source.config.tokenizer == "sentencepiece" and split == "train" and sum(map(len, sample)) < _LEARN
        ):
            sample.append(piece)
    expected = ["train"] if source.arranged is None else list(source.arranged.paths)
    if not all(sizes[split] for split in expected):
        raise InputError(f"{source.config.name}: no text in it; name a file that has some")
    if source.config.tokenizer == "bytes":
        return sizes, Bytes()
    if source.config.tokenizer == "sentencepiece":
        return sizes, SentencePiece.train("".join(sample)[:_LEARN], source.config.vocab_size)
    try:
        return sizes, Characters.of(counts)
    except InputError as error:
        raise InputError(f"{source.config.name}: {error}") from None


def _spell(
    folder: Path, source: StoreSource, tokenizer: Tokenizer, characters: dict[str, int]
) -> tuple[dict[str, int], str]:
    """Write the symbols of each split; how many they are, and the checksum of the text."""
    symbols, digest = dict.fromkeys(SPLITS, 0), hashlib.sha256()
    pieces = (piece for _, piece in _with_progress(source.pieces(), "spell"))
    ahead = ""
    for split, room in characters.items():
        with (folder / f"{split}.bin").open("wb") as file:
            while room:
                if not ahead:
                    ahead = next(pieces, "")
                    if not ahead:
                        raise InputError(f"{source.config.name}: became shorter while it was read; run again")
                    digest.update(ahead.encode("utf-8"))
                text, ahead = ahead[:room], ahead[room:]
                room -= len(text)
                try:
                    codes = tokenizer.codes(text)
                except InputError as error:
                    raise InputError(f"{source.config.name} ({split}): {error}") from None
                file.write(np.ascontiguousarray(codes).tobytes())
                symbols[split] += len(codes)
            file.flush()
            os.fsync(file.fileno())
    if ahead or next(pieces, ""):
        raise InputError(f"{source.config.name}: became longer while it was read; run again")
    return symbols, source.sealed(digest, characters)


def _with_progress(pieces: Iterator[tuple[str, str]], action: str) -> Iterator[tuple[str, str]]:
    """Pieces that are not empty, under a bar that counts characters."""
    with tqdm(unit="char", unit_scale=True, desc=action, delay=1, mininterval=1) as bar:
        for split, piece in pieces:
            bar.update(len(piece))
            if piece:
                yield split, piece
