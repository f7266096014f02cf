"""SentencePiece: byte-pair pieces of text as symbols, saved in ``tokenizer.model`` beside the vocabulary."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from dflow.config import InputError
from dflow.data import files
from dflow.data.arrays import Array
from dflow.data.tokenizers import Tokenizer, Vocabulary, compact, starts_of, utf8

MODEL = "tokenizer.model"


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
        for num_characters in (None, room // 2, room):
            try:
                return cls(_learn(lines, size, num_characters))
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[-1].rpartition("] ")[2]
            if "required_chars" not in reason and num_characters is None:
                break
        largest = re.search(r"a value <= (\d+)", reason)
        if largest and int(largest[1]) >= cls._LEAST:
            way = f"set vocab_size to at most {largest[1]}, or give more text"
        else:
            way = f"give more text, or set tokenizer to characters or bytes ({reason.strip()[:200]})"
        raise InputError(f"sentencepiece cannot learn {size} pieces from {len(text):,} characters; {way}")

    @property
    def size(self) -> int:
        """Number of pieces, K."""
        return len(self._pieces)

    @property
    def starts(self) -> Tensor:
        """Characters that begin in each piece."""
        return starts_of(self._pieces)

    def codes(self, text: str) -> Array:
        """The pieces of ``text``, compact."""
        utf8(text)
        numbers: list[list[int]] = [[]]
        start = 0
        for match in self._RESERVED.finditer(text):
            numbers += self._encode(text[start : match.start()])
            numbers.append(self._bytes[list(match.group().encode())].tolist())
            start = match.end()
        numbers += self._encode(text[start:])
        return np.concatenate([np.asarray(run, dtype=compact(self.size)) for run in numbers])

    def _encode(self, text: str) -> list[list[int]]:
        # The library's work grows faster than the text; pieces begin at spaces, so text is cut before them.
        pieces = re.findall(r"\s?(?:.{1,4096}(?=\s|\Z)|.{1,4096})", text, re.DOTALL)
        return self._processor.encode(pieces) if pieces else []

    def _spell(self, ids: Array) -> str:
        return b"".join(self._pieces[i] for i in ids.tolist()).decode("utf-8", "replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.model`` and ``vocabulary.json`` into an existing folder."""
        files.write(Path(folder) / MODEL, self.model)
        super().save(folder)

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.kind, self.size, model=files.digest(self.model))

    @classmethod
    def _of_vocabulary(cls, vocabulary: Vocabulary, folder: Path) -> SentencePiece:
        path = folder / MODEL
        if not path.is_file():
            raise InputError(f"the tokenizer needs the file {path}, which is missing")
        model = path.read_bytes()
        if files.digest(model) != vocabulary.model:
            raise InputError(
                f"{path} is not the model that was saved: {files.digest(model)}, not {vocabulary.model}"
            )
        return cls(model)


def _learn(lines: Sequence[str], size: int, num_characters: int | None) -> bytes:
    """A model of ``size`` pieces: of the most frequent characters, or of all but the rarest 0.05 %."""
    import sentencepiece

    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines if num_characters is None else _frequent(lines, num_characters)),
        model_writer=output,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=0.9995 if num_characters is None else 1.0,
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
    return output.getvalue()


def _frequent(lines: Sequence[str], num_characters: int) -> list[str]:
    """The lines, cut at all but the most frequent characters (of equals the smaller)."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    # The library counts a space as a character of its own.
    order = sorted(counts, key=lambda c: (c != " ", -counts[c], c))
    rare = str.maketrans(dict.fromkeys(order[num_characters:], "\n"))
    return [words for line in lines for words in line.translate(rare).split("\n") if words]
