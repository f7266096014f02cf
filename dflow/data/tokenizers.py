"""Text to symbols and back, without loss: characters, bytes, numbers; `dflow.data.pieces` adds SentencePiece.

A tokenizer maps text to integers ``0 .. size - 1`` and back: ``decode(encode(text)) == text``. It is saved
beside the model that was trained with it, as ``vocabulary.json``.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dflow.config import InputError, parse
from dflow.data import files
from dflow.data.arrays import Array
from dflow.models.files import split_calls

VOCABULARY = "vocabulary.json"
#: Characters that are encoded at a time.
_BLOCK = 1 << 22


class UnknownSymbol(InputError):
    """A symbol in a text that a tokenizer cannot spell."""

    def __init__(self, text: str, position: int, what: str, reason: str) -> None:
        """Make the message from the place ``position`` in ``text``."""
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        super().__init__(f"{what} at character {position + 1} (line {line}, column {column}) {reason}")
        self.position, self.what, self.reason = position, what, reason


class Tokenizer(ABC):
    """Text to integers ``0 .. size - 1`` and back, without loss."""

    kind: ClassVar[Kind]
    _kinds: ClassVar[dict[str, type[Tokenizer]]] = {}

    def __init_subclass__(cls) -> None:
        """Let `load` find the tokenizer by its kind."""
        Tokenizer._kinds[cls.kind] = cls

    #: Whether the text of a sequence never holds a line break.
    one_line: ClassVar[bool] = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of symbols, K."""

    @property
    def starts(self) -> Tensor | None:
        """How many characters begin in each symbol, int64 ``(size,)``; None where it is one in each.

        A character that several symbols spell begins in the first of them.
        """
        return None

    @abstractmethod
    def codes(self, text: str) -> Array:
        """The symbols of ``text`` in the smallest of uint8, int16, int32 that holds ``size``.

        Raises:
            InputError: A character that the vocabulary cannot spell.
        """

    @abstractmethod
    def _spell(self, ids: Array) -> str:
        """The text of valid symbols."""

    def encode(self, text: str, start: int = 0, end: int | None = None) -> Tensor:
        """The symbols of ``text``, or of a part of it: int64 ``(n,)``.

        Raises:
            InputError: A character that the vocabulary cannot spell; the message names its place in the text.
        """
        try:
            codes = self.codes(text[start:end])
        except UnknownSymbol as error:
            raise UnknownSymbol(text, start + error.position, error.what, error.reason) from None
        return torch.from_numpy(codes.astype(np.int64))

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
        text = json.dumps(self._vocabulary().__dict__, ensure_ascii=True, indent=1)
        files.write(Path(folder) / VOCABULARY, (text + "\n").encode())

    def describe(self) -> str:
        """All that it depends on, as JSON."""
        return json.dumps(self._vocabulary().__dict__, sort_keys=True)

    def _vocabulary(self) -> Vocabulary:
        """The content of ``vocabulary.json``."""
        return Vocabulary(self.kind, self.size)

    @classmethod
    def _of_vocabulary(cls, vocabulary: Vocabulary, folder: Path) -> Tokenizer:
        """The tokenizer of a ``vocabulary.json`` in ``folder``."""
        return cls()

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer that `save` wrote into ``folder``, or that of a model that comes with dflow.

        Raises:
            InputError: Missing, truncated or foreign files.
        """
        path = split_calls(folder)[0] / VOCABULARY
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; the folder of a trained model holds it") from None
        except ValueError as error:
            raise InputError(f"{path}: truncated or not JSON ({error}); restore the file") from None
        vocabulary = parse(Vocabulary, values, str(path))
        kind = vocabulary.tokenizer
        try:
            for key, owner in (("symbols", "characters"), ("model", "sentencepiece")):
                if (getattr(vocabulary, key) is not None) != (kind == owner):
                    raise InputError(f"key {key!r} does not go with tokenizer {kind!r}")
            tokenizer = Tokenizer._kinds[kind]._of_vocabulary(vocabulary, path.parent)
            if tokenizer.size != vocabulary.size:
                raise InputError(f"size {vocabulary.size} does not match the {tokenizer.size} symbols")
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._vocabulary() == other._vocabulary()

    def __hash__(self) -> int:
        return hash((self.kind, self.size))


Kind = Literal["characters", "bytes", "sentencepiece", "numbers"]


@dataclass
class Vocabulary:
    """The content of ``vocabulary.json``.

    Attributes:
        tokenizer: its kind.
        size: number of symbols.
        symbols: of characters, in the order of their numbers.
        model: of sentencepiece, the digest of the model's file.
        version: of the format.
    """

    tokenizer: Kind
    size: int
    symbols: list[str] | None = None
    model: str | None = None
    version: Literal[1] = 1


def compact(size: int) -> type[np.generic]:
    """The smallest integer type, of those that torch indexes with, for symbols below ``size``."""
    return np.uint8 if size <= 1 << 8 else np.int16 if size <= 1 << 15 else np.int32


def _code_points(text: str) -> Iterator[Array]:
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

    def codes(self, text: str) -> Array:
        """The symbols of ``text``, compact."""
        result = np.empty(len(text), dtype=compact(self.size))
        start = 0
        for block in _code_points(text):
            inside = block if block.dtype == np.uint8 else np.minimum(block, np.uint32(len(self._table) - 1))
            symbols = self._table[inside]
            if symbols.min(initial=0) < 0:
                position = start + int((symbols < 0).argmax())
                symbol = text[position]
                raise UnknownSymbol(
                    text,
                    position,
                    f"symbol {symbol!r} (U+{ord(symbol):04X})",
                    f"is not in the vocabulary of {self.size} symbols; remove it, or train on text with it",
                )
            result[start : start + len(block)] = symbols
            start += len(block)
        return result

    def _spell(self, ids: Array) -> str:
        return self._points[ids].tobytes().decode("utf-32-le", "surrogatepass")

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.kind, self.size, symbols=list(self.symbols))

    @classmethod
    def _of_vocabulary(cls, vocabulary: Vocabulary, folder: Path) -> Characters:
        return cls(vocabulary.symbols or [])


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
    def starts(self) -> Tensor:
        """0 for the bytes that continue a character, 1 for all others."""
        return starts_of([bytes([value]) for value in range(256)])

    def codes(self, text: str) -> Array:
        """The bytes of ``text``."""
        return np.frombuffer(utf8(text), dtype=np.uint8).copy()  # torch wants memory that can be written

    def _spell(self, ids: Array) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")


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

    def codes(self, text: str) -> Array:
        """The numbers in ``text``."""
        words = text.split()
        for match in re.finditer(r"\S+", text):
            word = match.group()
            if not (word.isascii() and word.isdigit() and int(word) < self.size):
                reason = f"is no number in 0..{self.size - 1}, which is what this model knows"
                raise UnknownSymbol(text, match.start(), repr(word), reason)
        return np.array([int(word) for word in words], dtype=compact(self.size))

    def _spell(self, ids: Array) -> str:
        return " ".join(map(str, ids.tolist()))

    @classmethod
    def _of_vocabulary(cls, vocabulary: Vocabulary, folder: Path) -> Numbers:
        return cls(vocabulary.size)


def utf8(text: str) -> bytes:
    """The bytes of a text, or an `InputError` for what is no Unicode text."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start + 1} ({text[error.start]!r}) is no Unicode text; give the text as UTF-8"
        ) from None


def starts_of(symbols: Sequence[bytes]) -> Tensor:
    """How many characters of UTF-8 begin in each symbol: int64 ``(n,)``."""
    return torch.tensor([sum(byte & 0xC0 != 0x80 for byte in symbol) for symbol in symbols])
