"""What a vocabulary does not hold: capitals, line breaks and other characters, coded beside a text.

A text is a stream of characters of the vocabulary, and planes that say how it differs from it:

- breaks: a line break or tab that the vocabulary lacks is a space in the stream; here, which spaces are so.
- escapes: characters that the vocabulary lacks are left out of the stream; here, how many stand where (under
  a law for each kind of neighbours), and which.
- capitals that the vocabulary lacks are small letters in the stream; here, of each word whether it has none,
  the first, all or others, under a law for each length of word and for beginnings of sentences.

Each law is that of the counts in the text, which the file holds. The planes are decoded one after another, so
that the law of each may depend on all before it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflow.coding.codes import Bits, Code, Golomb, Intervals, Shared, Stack, join
from dflow.coding.container import Damaged, Reader, varint
from dflow.coding.tables import Tables, integer_counts

Array = NDArray[Any]

#: Codes, each for values that are sent back; the text comes out at the end.
Steps = Generator[Code, Tensor, Array]

_BREAKS = (" ", "\n", "\t")
#: Lengths of runs of escapes that have a count of their own; longer ones are this and a Golomb code.
_RUN = 7
_ORDER = 3
#: Words: no capital, the first letter, all letters, others; lengths 1, 2 or 3, more.
_NONE, _FIRST, _ALL, _OTHERS = range(4)
_KINDS, _LENGTHS = 4, 3
#: Sentences begin behind these, where nothing but `_QUIET` stands between.
_ENDS = "\n.!?"
_QUIET = " \t\"'()[]{}*_“”‘’«»"


@dataclass(frozen=True)
class Counts:
    """The counts that the laws of the planes are made from; empty where a plane is.

    Attributes:
        breaks: of space, line break, tab.
        runs: of escapes: kinds of neighbours times lengths, row by row.
        points: code points of escapes, ascending.
        escapes: how often each is there.
        words: lengths and beginnings times kinds, row by row.
    """

    breaks: tuple[int, ...] = ()
    runs: tuple[int, ...] = ()
    points: tuple[int, ...] = ()
    escapes: tuple[int, ...] = ()
    words: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        """As a file holds them."""
        steps = np.diff(self.points, prepend=0).tolist() if self.points else []
        chunks = [varint((len(self.points) << 2) | (bool(self.words) << 1) | bool(self.breaks))]
        for numbers in (self.words, self.runs):
            # Most are 0: one bit each says which are not, then come those.
            bits = sum(1 << i for i, number in enumerate(numbers) if number)
            chunks.append(bits.to_bytes(len(numbers) // 8, "little"))
            chunks += [varint(number) for number in numbers if number]
        for dense in (self.breaks, steps, self.escapes):
            chunks += map(varint, dense)
        return b"".join(chunks)

    @staticmethod
    def read(reader: Reader, limit: int) -> Counts:
        """The inverse of `to_bytes`; `Damaged` for counts beyond ``limit``, or what are no code points."""
        begin = reader.varint(4 * reader.left + 3)

        def take(n: int) -> tuple[int, ...]:
            return tuple(reader.varint(limit) for _ in range(n))

        def take_sparse(n: int) -> tuple[int, ...]:
            bits = int.from_bytes(reader.take(n // 8), "little")
            numbers = tuple(reader.varint(limit) if bits >> i & 1 else 0 for i in range(n))
            if sum(map(bool, numbers)) != bits.bit_count():
                raise Damaged("its counts of words or of runs are damaged")
            return numbers

        n = begin >> 2
        words = take_sparse(2 * _LENGTHS * _KINDS if begin & 2 else 0)
        runs = take_sparse(4 * (_RUN + 1) if n else 0)
        breaks = take(len(_BREAKS) if begin & 1 else 0)
        points, escapes = tuple(reader.varint(0x10FFFF) for _ in range(n)), take(n)
        code_points = np.cumsum(points)
        if n and (min(points[1:], default=1) < 1 or code_points[-1] > 0x10FFFF or n > MOST):
            raise Damaged("its list of characters outside the vocabulary is damaged")
        if n and (min(escapes) < 1 or sum(escapes) > limit):
            raise Damaged("it counts more characters outside the vocabulary than it has bytes")
        return Counts(breaks, runs, tuple(code_points.tolist()), escapes, words)


#: Latin, Greek and Cyrillic letters are below this. Their cases are the same in every version of Unicode;
#: what else a version knows must not matter to a file.
_CASED = 0x530


def _is_letter(point: int) -> bool:
    """Whether a character is part of a word: a letter, or above Latin-1 and no punctuation."""
    if point < 0xC0:
        return 65 <= point & ~32 <= 90
    return point not in (0xD7, 0xF7) and not 0x2000 <= point < 0x2070 and not 0x3000 <= point < 0x3040


#: Different characters outside the vocabulary that the counts of the coder have room for.
MOST = 1 << 18


class Alphabet:
    """What the characters of a vocabulary stand for.

    Args:
        symbols: the vocabulary, in the order of its numbers.
        lines: whether line breaks are no characters of the text but cut it.
    """

    def __init__(self, symbols: Sequence[str], lines: bool = False) -> None:
        self.points = np.array([ord(s) for s in symbols], np.uint32)
        self.lines = lines
        numbers = {s: i for i, s in enumerate(symbols)}
        if lines:
            numbers.pop("\n", None)
        #: The symbol of every character that has one, breaks and capitals included.
        self.symbol = {ord(s): i for s, i in numbers.items()}
        #: Characters that stand for breaks or capitals, and which.
        self.upper: dict[int, int] = {}
        for s, i in numbers.items():
            capital = s.upper()
            if (
                ord(s) < _CASED
                and len(capital) == 1
                and capital != s
                and capital.lower() == s
                and capital not in numbers
            ):
                self.upper[ord(s)] = ord(capital)
                self.symbol[ord(capital)] = i
        self.breaks = tuple(s for s in _BREAKS[1:] if s not in numbers and not (lines and s == "\n"))
        if " " not in numbers:
            self.breaks = ()
        for s in self.breaks:
            self.symbol[ord(s)] = numbers[" "]

    def split(self, text: Array) -> tuple[Array, Array, list[Tensor], Counts]:
        """A text of code points, uint32 ``(n,)``, as stream and planes.

        Returns:
            The symbols of the stream, int64; where it is cut (ends of lines, in symbols; nothing without
            ``lines``); the values that `planes` asks for, in its order; the counts.
        """
        characters, inverse = _distinct(text)
        symbols = np.array([self.symbol.get(c, -1) for c in characters.tolist()], np.int64)[inverse]
        line = (text == 10) & self.lines
        escaped = (symbols < 0) & ~line
        stream = symbols[symbols >= 0]
        cuts = np.cumsum(symbols >= 0)[line]
        # Each plane is read off the text as `planes` will know it when it comes to it.
        counts: dict[str, tuple[int, ...]] = {}
        values: list[Tensor] = []
        space = self.symbol.get(32, -1)
        in_vocabulary = text[~escaped]
        if self.breaks and np.isin(text, [ord(s) for s in self.breaks]).any():
            at = in_vocabulary[(symbols[~escaped] == space)]
            kinds = np.select([at == ord(s) for s in _BREAKS], range(3))
            counts["breaks"] = _count(kinds, 3)
            values.append(_tensor(kinds))
        if escaped.any():
            runs = _runs(escaped)
            short = np.minimum(runs, _RUN)
            context = _neighbours(in_vocabulary)
            counts["runs"] = _count(context * (_RUN + 1) + short, 4 * (_RUN + 1))
            values += [_tensor(short), _tensor(runs[runs >= _RUN] - _RUN)]
            points, which = _distinct(text[escaped])
            counts["points"] = tuple(points.tolist())
            counts["escapes"] = _count(which, len(points))
            if len(points) > 1:
                values.append(_tensor(which))
        capital = np.isin(text, list(self.upper.values()))
        if capital.any():
            words = self._words(self._small(text))
            kinds = words.kinds(capital)
            counts["words"] = _count(words.context * _KINDS + kinds, 2 * _LENGTHS * _KINDS)
            values.append(_tensor(kinds))
            others = words.letters[kinds[words.owner] == _OTHERS]
            values.append(_tensor(capital[others]))
        return stream, cuts, values, Counts(**counts)

    def planes(self, stream: Array, cuts: Array, counts: Counts) -> Steps:
        """The codes of the planes, and at the end the text, uint32.

        Raises:
            Damaged: values that fit no text, or counts of planes that this alphabet does not have.
        """
        text = self.points[stream]
        if self.lines:
            text = np.insert(text, cuts, 10)
        if counts.breaks:
            spaces = np.flatnonzero(text == 32)
            if not self.breaks or sum(counts.breaks) != len(spaces):
                raise Damaged("has more or fewer breaks than spaces")
            kinds = yield _shared(counts.breaks, 1, np.zeros(len(spaces), np.int64))
            text[spaces] = np.array([ord(s) for s in _BREAKS], np.uint32)[kinds.numpy()]
        if counts.points:
            context = _neighbours(text)
            runs = (yield _shared(counts.runs, 4, context)).numpy()
            long = runs >= _RUN
            runs[long] += (yield Golomb(torch.full((int(long.sum()),), _ORDER))).numpy()
            total = sum(counts.escapes)
            if int(runs.clip(max=total + 1).sum()) != total:
                raise Damaged("has more or fewer characters outside the vocabulary than it counts")
            which: Array = np.zeros(total, np.int64)
            if len(counts.points) > 1:
                which = (yield _shared(counts.escapes, 1, which)).numpy()
            text = np.insert(
                text, np.repeat(np.arange(len(runs)), runs), np.array(counts.points, np.uint32)[which]
            )
        if counts.words:
            words = self._words(text)
            sorts = (yield _shared(counts.words, 2 * _LENGTHS, words.context)).numpy()
            others = words.letters[sorts[words.owner] == _OTHERS]
            bits = yield Bits(torch.ones(len(others), dtype=torch.int64))
            capital = words.capitals(sorts)
            capital[others] = bits.numpy() > 0
            text[capital] = self._large(text[capital])
        return text

    def _small(self, text: Array) -> Array:
        """Capitals that stand beside the stream as small letters."""
        text = text.copy()
        for small, large in self.upper.items():
            text[text == large] = small
        return text

    def _large(self, text: Array) -> Array:
        characters, inverse = _distinct(text)
        return np.array([self.upper[c] for c in characters.tolist()], np.uint32)[inverse]

    def _words(self, text: Array) -> Words:
        characters, inverse = _distinct(text)
        names = [chr(c) for c in characters.tolist()]
        letter = np.array([_is_letter(c) for c in characters.tolist()], bool)[inverse]
        able = np.array([c in self.upper for c in characters.tolist()], bool)[inverse]
        start = letter & ~np.concatenate([[False], letter[:-1]])
        word = np.cumsum(start) - 1
        letters = np.flatnonzero(able & letter)
        # Words without a letter that has a capital are left out.
        used, owner = np.unique(word[letters], return_inverse=True)
        firsts = np.flatnonzero(start)[used]
        sizes = np.bincount(word[letter], minlength=int(start.sum()))[used]
        loud = np.array([s not in _QUIET for s in names], bool)[inverse]
        before = np.maximum.accumulate(np.where(loud, np.arange(len(text)), -1))
        last = np.where(firsts > 0, before[np.maximum(firsts - 1, 0)], -1)
        end = np.array([s in _ENDS for s in names], bool)[inverse]
        begins = np.where(last >= 0, end[last], True)
        context = np.digitize(sizes, [2, 4]) + _LENGTHS * begins
        return Words(letters, owner, firsts, context, len(text))


@dataclass(frozen=True, eq=False)
class Words:
    """Words of a text in small letters.

    Attributes:
        letters: places of the letters that have a capital.
        owner: the word of each.
        firsts: place of the first letter of each word.
        context: row of the law of each word.
        length: of the text.
    """

    letters: Array
    owner: Array
    firsts: Array
    context: Array
    length: int

    def kinds(self, capital: Array) -> Array:
        """The kind of each word, by what is a capital."""
        n = len(self.firsts)
        able = np.bincount(self.owner, minlength=n)
        large = np.bincount(self.owner, weights=capital[self.letters], minlength=n).astype(np.int64)
        only_first = capital[self.firsts] & (large == 1)
        return np.select([large == 0, only_first, large == able], [_NONE, _FIRST, _ALL], _OTHERS)

    def capitals(self, kinds: Array) -> Array:
        """What is a capital, bool, by the kinds of words; of others nothing.

        Raises:
            Damaged: a capital where the first letter has no capital.
        """
        capital = np.zeros(self.length, bool)
        capital[self.letters[kinds[self.owner] == _ALL]] = True
        firsts = self.firsts[kinds == _FIRST]
        if not np.isin(firsts, self.letters).all():
            raise Damaged("has capitals of letters that have no capital")
        capital[firsts] = True
        return capital


def intervals(steps: Steps, values: Sequence[Tensor]) -> Intervals:
    """Intervals of ``values`` under the codes of ``steps``, in the order of popping."""
    pushed: list[Intervals] = []
    code = next(steps, None)
    for value in values:
        if code is None:
            raise ValueError("more values than planes")
        pushed.append(code.intervals(value))
        try:
            code = steps.send(value)
        except StopIteration:
            code = None
    return join(pushed)


def pop(steps: Steps, stack: Stack) -> Array:
    """The text, its planes popped."""
    try:
        code = next(steps)
        while True:
            code = steps.send(code.pop(stack))
    except StopIteration as end:
        text: Array = end.value
        return text


def _distinct(text: Array) -> tuple[Array, Array]:
    """As `numpy.unique` with the inverse, without sorting the text."""
    seen = np.zeros(int(text.max(initial=0)) + 1, bool)
    seen[text] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[text]


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _count(values: Array, n: int) -> tuple[int, ...]:
    return tuple(np.bincount(values, minlength=n).tolist())


def _shared(counts: Sequence[int], laws: int, index: Array) -> Shared:
    """Code under the laws of counts, row by row; each row gets a hair of every symbol."""
    rows = torch.tensor(counts, dtype=torch.float64).view(laws, -1)
    total = rows.sum(1, keepdim=True)
    law = torch.where(total > 0, rows / total, 1 / rows.shape[1])
    return Shared(Tables(integer_counts(law)), _tensor(index))


def _runs(escaped: Array) -> Array:
    """How many escapes stand before each kept character and at the end."""
    places = np.flatnonzero(~escaped)
    return np.diff(np.concatenate([[-1], places, [len(escaped)]])) - 1


def _neighbours(text: Array) -> Array:
    """Of each place between characters, and of both ends: what of its sides is white space, or nothing."""
    white: Array = np.concatenate([[True], np.isin(text, [32, 10, 9]), [True]])
    return 2 * white[:-1] + white[1:]
