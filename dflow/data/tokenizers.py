"""Text to symbols and back, without loss: characters, bytes, SentencePiece.

A tokenizer maps text to integers ``0 .. size - 1`` and back: ``decode(encode(text)) == text``. It is saved
beside the model that was trained with it, as ``vocabulary.json`` (and ``tokenizer.model``).
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.config import InputError, parse
from dflow.data import files

Codes = NDArray[Any]

VOCABULARY = "vocabulary.json"
MODEL = "tokenizer.model"
_BLOCK = 1 << 22


class Tokenizer(ABC):
    """Text to integers ``0 .. size - 1`` and back, without loss."""

    kind: ClassVar[str]

    #: Whether the text of a sequence never holds a line break.
    one_line: ClassVar[bool] = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of symbols, K."""

    @property
    def starts(self) -> Codes | None:
        """How many characters begin in each symbol, int64 ``(size,)``; None where it is one in each.

        A character that several symbols spell begins in the first of them.
        """
        return None

    @abstractmethod
    def codes(self, text: str) -> Codes:
        """The symbols of ``text`` in the smallest of uint8, int16, int32 that holds ``size``.

        Raises:
            InputError: A character that the vocabulary cannot spell.
        """

    @abstractmethod
    def _spell(self, ids: Codes) -> str:
        """The text of valid symbols."""

    def encode(self, text: str) -> Tensor:
        """The symbols of ``text``: int64 ``(n,)``.

        Raises:
            InputError: A character that the vocabulary cannot spell.
        """
        return torch.from_numpy(self.codes(text).astype(np.int64))

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of symbols ``(n,)``; negative ones mark absent entries and are passed over.

        Raises:
            ValueError: Not one-dimensional, or a symbol at or beyond ``size``.
        """
        array = torch.as_tensor(ids, dtype=torch.int64).cpu().numpy()
        if array.ndim != 1:
            raise ValueError(f"expected symbols of shape (n,), found {array.shape}")
        array = array[array >= 0]
        if array.size and int(array.max()) >= self.size:
            raise ValueError(f"symbol {int(array.max())} is outside the vocabulary of {self.size}")
        return self._spell(array)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``vocabulary.json`` into an existing folder, whole or not at all."""
        text = json.dumps(self._record().__dict__, ensure_ascii=True, indent=1)
        files.write(Path(folder) / VOCABULARY, (text + "\n").encode())

    def describe(self) -> str:
        """All that it depends on, as JSON."""
        return json.dumps(self._record().__dict__, sort_keys=True)

    @abstractmethod
    def _record(self) -> _Vocabulary: ...

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer that `save` wrote into ``folder``.

        Raises:
            InputError: Missing, truncated or foreign files.
        """
        path = Path(folder) / VOCABULARY
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; the folder of a trained model holds it") from None
        except ValueError as error:
            raise InputError(f"{path}: truncated or not JSON ({error}); restore the file") from None
        record = parse(_Vocabulary, values, str(path))
        try:
            return _read(record, Path(folder))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._record() == other._record()

    def __hash__(self) -> int:
        return hash((self.kind, self.size))


@dataclass
class _Vocabulary:
    """What ``vocabulary.json`` holds."""

    tokenizer: Literal["characters", "bytes", "sentencepiece", "numbers"]
    size: int
    symbols: list[str] | None = None
    model: str | None = None
    version: Literal[1] = 1


def _read(record: _Vocabulary, folder: Path) -> Tokenizer:
    tokenizer: Tokenizer
    if (record.symbols is not None) != (record.tokenizer == "characters"):
        raise InputError(f"key 'symbols' does not go with tokenizer {record.tokenizer!r}")
    if (record.model is not None) != (record.tokenizer == "sentencepiece"):
        raise InputError(f"key 'model' does not go with tokenizer {record.tokenizer!r}")
    if record.symbols is not None:
        tokenizer = Characters(record.symbols)
    elif record.model is not None:
        path = folder / MODEL
        if not path.is_file():
            raise InputError(f"the tokenizer needs the file {path}, which is missing")
        proto = path.read_bytes()
        if files.digest(proto) != record.model:
            raise InputError(
                f"{path} is not the model that was saved: {files.digest(proto)}, not {record.model}"
            )
        tokenizer = SentencePiece(proto)
    else:
        tokenizer = Numbers(record.size) if record.tokenizer == "numbers" else Bytes()
    if tokenizer.size != record.size:
        raise InputError(f"size {record.size} does not match the {tokenizer.size} symbols")
    return tokenizer


def compact(size: int) -> type[np.generic]:
    """The smallest integer type, of those that torch indexes with, for symbols below ``size``."""
    return np.uint8 if size <= 1 << 8 else np.int16 if size <= 1 << 15 else np.int32


def _code_points(text: str) -> Iterator[Codes]:
    """The code points of ``text`` in blocks: a 100 MB text never takes 400 MB."""
    for start in range(0, len(text), _BLOCK):
        block = text[start : start + _BLOCK]
        if block.isascii():
            yield np.frombuffer(block.encode("ascii"), dtype=np.uint8)
        else:
            yield np.frombuffer(block.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class Characters(Tokenizer):
    r"""One symbol a character (Unicode code point).

    >>> tokenizer = Characters.train("banana")
    >>> tokenizer.symbols
    ('a', 'n', 'b')
    >>> tokenizer.encode("nab").tolist(), tokenizer.decode([1, 0, 2, -1])
    ([1, 0, 2], 'nab')
    """

    kind = "characters"

    def __init__(self, symbols: Sequence[str]) -> None:
        """Take the characters in the order of their numbers.

        Raises:
            InputError: Fewer than two, a repeated one, or one that is not a single character.
        """
        for symbol in symbols:
            if len(symbol) != 1:
                raise InputError(f"symbol {symbol!r} is not a single character")
        if len(set(symbols)) != len(symbols):
            raise InputError("a symbol occurs twice in the vocabulary")
        if len(symbols) < 2:
            raise InputError(f"a vocabulary needs at least two symbols, found {list(symbols)!r}")
        self.symbols = tuple(symbols)
        self._points = np.array([ord(s) for s in symbols], dtype="<u4")
        # One entry past the largest code point stands for all that are larger; a byte is always inside.
        self._table = np.full(max(int(self._points.max()), 255) + 2, -1, dtype=np.int32)
        self._table[self._points] = np.arange(len(symbols))

    @classmethod
    def train(cls, text: str, alphabet: str = "") -> Characters:
        """The characters of ``text`` and ``alphabet``, the most frequent in ``text`` first.

        Ties go by code point. Symbol 0 being the most frequent is what lets a base that is peaked on 0
        start near the data.
        """
        counts: dict[int, int] = dict.fromkeys(map(ord, alphabet), 0)
        cls.count(text, counts)
        return cls.of(counts)

    @staticmethod
    def count(text: str, counts: dict[int, int]) -> None:
        """Add how often each code point occurs in ``text`` to ``counts``."""
        for block in _code_points(text):
            if block.dtype == np.uint8:
                numbers = np.bincount(block)
                points = np.flatnonzero(numbers)
                numbers = numbers[points]
            else:
                points, numbers = np.unique(block, return_counts=True)
            for point, number in zip(points.tolist(), numbers.tolist(), strict=True):
                counts[point] = counts.get(point, 0) + number

    @classmethod
    def of(cls, counts: dict[int, int]) -> Characters:
        """The code points that were counted, the most frequent first."""
        return cls([chr(p) for p in sorted(counts, key=lambda p: (-counts[p], p))])

    @property
    def size(self) -> int:
        """Number of symbols, K."""
        return len(self.symbols)

    def codes(self, text: str) -> Codes:
        """The symbols of ``text``, compact."""
        result = np.empty(len(text), dtype=compact(self.size))
        start = 0
        for block in _code_points(text):
            inside = block if block.dtype == np.uint8 else np.minimum(block, np.uint32(len(self._table) - 1))
            found = self._table[inside]
            if found.min(initial=0) < 0:
                self._refuse(text, start + int((found < 0).argmax()))
            result[start : start + len(block)] = found
            start += len(block)
        return result

    def _refuse(self, text: str, position: int) -> None:
        symbol, line = text[position], text.count("\n", 0, position) + 1
        raise InputError(
            f"symbol {symbol!r} (U+{ord(symbol):04X}) at character {position + 1} (line {line}) is not in "
            f"the vocabulary of {self.size} symbols; remove it, or train on text that contains it"
        )

    def _spell(self, ids: Codes) -> str:
        return self._points[ids].tobytes().decode("utf-32-le", "surrogatepass")

    def _record(self) -> _Vocabulary:
        return _Vocabulary("characters", self.size, symbols=list(self.symbols))


class Bytes(Tokenizer):
    """One symbol a byte of UTF-8: 256 symbols, any text.

    Sequences that are not UTF-8 (a model can draw them) are decoded with the replacement character.

    >>> Bytes().encode("é").tolist(), Bytes().decode([195, 169])
    ([195, 169], 'é')
    """

    kind = "bytes"

    @property
    def size(self) -> int:
        """256."""
        return 256

    @property
    def starts(self) -> Codes:
        """0 for the bytes that continue a character, 1 for all others."""
        return _starts([bytes([value]) for value in range(256)])

    def codes(self, text: str) -> Codes:
        """The bytes of ``text``."""
        return np.frombuffer(_utf8(text), dtype=np.uint8).copy()  # torch wants memory that can be written

    def _spell(self, ids: Codes) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def _record(self) -> _Vocabulary:
        return _Vocabulary("bytes", 256)


class Numbers(Tokenizer):
    """Symbols that are no text: their numbers, with spaces between.

    >>> Numbers(20).encode("3 0 17").tolist(), Numbers(20).decode([3, 0, 17])
    ([3, 0, 17], '3 0 17')
    """

    kind = "numbers"
    one_line = True

    def __init__(self, size: int) -> None:
        """Take the numbers 0 .. size - 1.

        Raises:
            InputError: Fewer than two.
        """
        if size < 2:
            raise InputError(f"an alphabet needs at least two symbols, found {size}")
        self._size = size

    @property
    def size(self) -> int:
        """How many numbers, K."""
        return self._size

    def codes(self, text: str) -> Codes:
        """The numbers in ``text``."""
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) < self.size):
                raise InputError(
                    f"{word!r} is no number in 0..{self.size - 1}, which is what this model knows"
                )
        return np.array([int(word) for word in words], dtype=compact(self.size))

    def _spell(self, ids: Codes) -> str:
        return " ".join(map(str, ids.tolist()))

    def _record(self) -> _Vocabulary:
        return _Vocabulary("numbers", self.size)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start + 1} ({text[error.start]!r}) is no Unicode text; give the text as UTF-8"
        ) from None


def _starts(spelled: Sequence[bytes]) -> Codes:
    """How many characters of UTF-8 begin in each string of bytes."""
    return np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in spelled], dtype=np.int64)


class SentencePiece(Tokenizer):
    """Byte-pair pieces from the sentencepiece library, set up to lose nothing.

    Text is not normalised, no space is added, and what no piece spells is spelled in bytes, so that
    ``decode(encode(text)) == text`` for every text (Kudo and Richardson 2018, arXiv 1808.06226).
    Pieces do not cross spaces or line ends.
    """

    kind = "sentencepiece"
    _SPACE = "\u2581"
    # The library takes NUL for the end of a string and U+2581 for a space: both are spelled in bytes here.
    _RESERVED = re.compile(f"[\0{_SPACE}]")
    _SAMPLE = 10_000_000
    #: Pieces: one for each byte, one for what is unknown, and some to learn.
    _LEAST = 260

    def __init__(self, model: bytes) -> None:
        """Take a serialised sentencepiece model.

        Raises:
            InputError: No such model, or one that would lose text.
        """
        import sentencepiece

        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise InputError(f"not a sentencepiece model ({error})") from None
        processor = self._processor
        self._bytes = np.full(256, -1)
        self._pieces: list[bytes] = []
        for i in range(processor.get_piece_size()):
            piece = processor.id_to_piece(i)
            if processor.is_byte(i):
                value = int(piece[1:-1], 16)
                self._bytes[value] = i
                self._pieces.append(bytes([value]))
            elif processor.is_unknown(i) or processor.is_control(i):
                self._pieces.append("\ufffd".encode() if processor.is_unknown(i) else b"")
            else:
                self._pieces.append(piece.replace(self._SPACE, " ").encode())
        if (self._bytes < 0).any():
            raise InputError("the sentencepiece model has no byte pieces and would lose text")

    @classmethod
    def train(cls, text: str, size: int) -> SentencePiece:
        """Learn ``size`` pieces from ``text`` (from an even sample of its lines where it is long).

        Where the text has more different characters than there is room for, as Chinese and Japanese have,
        the rarest of them are spelled in bytes.

        Raises:
            InputError: The text is too small for so many pieces, or the size too small for the bytes.
        """
        if size < cls._LEAST:
            raise InputError(
                f"sentencepiece cannot learn {size} pieces, of which 256 are those of bytes; set vocab_size "
                f"to at least {cls._LEAST}, or tokenizer to bytes or characters"
            )
        lines = [line[i : i + 1000] for line in text.split("\n") for i in range(0, len(line), 1000)]
        lines = lines[:: max(1, len(text) // cls._SAMPLE)]
        room = size - 257
        reason = ""
        # All characters but the rarest; what leaves room for longer pieces; as many as there is room for.
        for kept in (None, room // 2, room):
            try:
                return cls(_learn(lines if kept is None else _pieces_of(lines, kept), size, kept is None))
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[-1].rpartition("] ")[2]
            if "required_chars" not in reason and kept is None:
                break
        most = re.search(r"a value <= (\d+)", reason)
        if most and int(most[1]) >= cls._LEAST:
            way = f"set vocab_size to at most {most[1]}, or give more text"
        else:
            way = f"give more text, or set tokenizer to characters or bytes ({reason.strip()[:200]})"
        raise InputError(f"sentencepiece cannot learn {size} pieces from {len(text):,} characters; {way}")

    @property
    def size(self) -> int:
        """Number of pieces, K."""
        return len(self._pieces)

    @property
    def starts(self) -> Codes:
        """Characters that begin in each piece."""
        return _starts(self._pieces)

    def codes(self, text: str) -> Codes:
        """The pieces of ``text``, compact."""
        _utf8(text)
        parts: list[list[int]] = []
        start = 0
        for match in self._RESERVED.finditer(text):
            parts += self._encode(text[start : match.start()])
            parts.append(self._bytes[list(match.group().encode())].tolist())
            start = match.end()
        parts += self._encode(text[start:])
        dtype = compact(self.size)
        return np.concatenate([np.asarray(p, dtype=dtype) for p in parts]) if parts else np.empty(0, dtype)

    def _encode(self, text: str) -> list[list[int]]:
        # The library's work grows faster than the text; pieces begin at spaces, so text is cut before them.
        pieces = re.findall(r"\s?(?:.{1,4096}(?=\s|\Z)|.{1,4096})", text, re.DOTALL)
        return self._processor.encode(pieces) if pieces else []

    def _spell(self, ids: Codes) -> str:
        return b"".join(self._pieces[i] for i in ids.tolist()).decode("utf-8", "replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.model`` and ``vocabulary.json`` into an existing folder."""
        files.write(Path(folder) / MODEL, self.model)
        super().save(folder)

    def _record(self) -> _Vocabulary:
        return _Vocabulary("sentencepiece", self.size, model=files.digest(self.model))


def _learn(lines: Sequence[str], size: int, rare: bool) -> bytes:
    """A model of ``size`` pieces; with ``rare`` the rarest 0.05 % of the characters get no piece."""
    import sentencepiece

    output = _Sink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=output,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=0.9995 if rare else 1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return bytes(output.data)


def _pieces_of(lines: Sequence[str], kept: int) -> list[str]:
    """The lines, cut at all but the ``kept`` most frequent characters (of equals the smaller)."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    # The library counts a space as a character of its own.
    order = sorted(counts, key=lambda c: (c != " ", -counts[c], c))
    rare = str.maketrans(dict.fromkeys(order[kept:], "\n"))
    return [part for line in lines for part in line.translate(rare).split("\n") if part]


class _Sink:
    """The file object that the sentencepiece trainer writes its model to."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data
