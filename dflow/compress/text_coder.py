"""Models of text, ready to code, and what the header of a ``.dfl`` of text says."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dflow import models
from dflow.coding import codec, container
from dflow.coding.container import Container, Damaged, Reader, varint
from dflow.coding.numeric import fingerprint, frozen_tables, prepare
from dflow.compress import dfl
from dflow.compress.planes import Alphabet, Counts
from dflow.config import InputError
from dflow.core import Distribution
from dflow.data import Characters, Tokenizer
from dflow.models import TextModel

#: Chunks that are coded together, at most.
MOST_BATCH = 1 << 8
#: Most times that a symbol of the text before counts.
MOST_WEIGHT = 1 << 8
#: Most entries of a network call, where symbols can be drafted.
MOST_AHEAD = 1 << 6
#: Probability of an empty line, which models of sentences do not know.
_EMPTY = 2.0**-10


@dataclass(frozen=True, eq=False)
class TextCoder:
    """A model of text, ready to code.

    Attributes:
        law: prepared in mode float64.
        tokenizer: its vocabulary.
        length: of a chunk.
        context: symbols before a chunk that it can be given, 0 for none.
        lengths: probabilities of the lengths of sentences, from 0 to ``length``; None for a model of streams.
        calls: network calls that were chosen, 0 for those that the model has of itself.
        fingerprint: 8 bytes.
        where: what to call the model.
    """

    law: Distribution
    tokenizer: Tokenizer
    length: int
    lengths: Tensor | None
    calls: int
    fingerprint: bytes
    where: str = "the model"
    context: int = 0

    mode: ClassVar[str] = "float64"

    @classmethod
    def load(cls, folder: str | os.PathLike[str], calls: int = 0) -> TextCoder:
        """The model in ``folder``, or as ``FOLDER@CALLS``; ``calls`` are those of a file, if it says.

        Raises:
            InputError: no model of text, or a vocabulary of another.
        """
        path, chosen = models.split_calls(folder)
        if chosen is not None and calls and chosen != calls:
            raise InputError(f"{folder}: the file was made in {calls} network calls; leave out @{chosen}")
        calls = chosen or calls
        name = f"{path}@{calls}" if calls else str(path)
        model, tokenizer = models.load(name), Tokenizer.load(path)
        if tokenizer.size != model.config.vocab_size:
            raise InputError(
                f"{folder}: the vocabulary has {tokenizer.size} symbols and the model "
                f"{model.config.vocab_size}; restore both files from one run"
            )
        return cls.of(model, tokenizer, calls, str(folder))

    @classmethod
    def of(
        cls, model: TextModel, tokenizer: Tokenizer, calls: int = 0, where: str = "the model"
    ) -> TextCoder:
        """A model and its vocabulary; ``calls`` if they were chosen.

        Raises:
            InputError: a model whose likelihood is not exact.
        """
        lengths = None
        if model.config.explicit_length:
            # Halves and integers add up exactly, in any order.
            counts = model.length_counts.double().cpu()[1:] + 0.5
            lengths = torch.cat([torch.tensor([_EMPTY]).double(), (1 - _EMPTY) * counts / counts.sum()])
        try:
            tables = frozen_tables(model.distribution)
            prepared = prepare(model.law, cls.mode, tables)
            codec.check_code(prepared)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        # What else decoding depends on: the vocabulary, the law of lengths.
        extra = json.dumps(
            [tokenizer.describe(), model.config.length, None if lengths is None else lengths.tolist()]
        )
        # Of the model with all of its numbers of calls; a file names the number that it uses.
        digest = fingerprint(model.distribution, tables, cls.mode, extra.encode())[: container.FINGERPRINT]
        context = getattr(model.config, "context", 0)
        return cls(prepared, tokenizer, model.config.length, lengths, calls, digest, where, context)

    @property
    def alphabet(self) -> Alphabet | None:
        """Of characters; None where symbols are bytes, pieces or numbers."""
        if not isinstance(self.tokenizer, Characters):
            return None
        return Alphabet(self.tokenizer.symbols, self.lengths is not None)


@dataclass(frozen=True)
class TextPlan:
    """What the header of a file of text says.

    Attributes:
        files: names and bytes.
        coded: whether the text is coded; without that, all that follows is 0 or empty.
        latin: whether characters are bytes, else the text is UTF-8.
        calls: of the network for each chunk, 0 for those that the model has of itself.
        chunks: how many.
        last: symbols of the last; for models of sentences the stream holds the lengths of all chunks.
        batch: chunks that are coded together; 0 where they are coded one after another, each given the text
            before it.
        context: symbols before a chunk that it is given, at most, where chunks come one after another.
        weight: how often the model's counts count each symbol of the text before a chunk; 0 for not at all.
        ahead: entries of a network call, where chunks are coded so that symbols can be drafted, see
            `dflow.compress.ahead`; 0 where they are coded one symbol a call.
        counts: of the planes.
    """

    files: tuple[tuple[str, int], ...]
    coded: bool = False
    latin: bool = False
    calls: int = 0
    chunks: int = 0
    last: int = 0
    batch: int = 0
    context: int = 0
    weight: int = 0
    ahead: int = 0
    counts: Counts = field(default_factory=Counts)

    @property
    def rolling(self) -> bool:
        """Whether chunks are coded one after another."""
        return self.chunks > 0 and self.batch == 0

    @property
    def raw(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.files)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The first chunk of those that are coded together, and the one after the last."""
        starts = range(0, self.chunks, max(1, self.batch))
        return [(start, min(start + self.batch, self.chunks)) for start in starts]

    def to_bytes(self) -> bytes:
        """As the container holds it."""
        data = varint(len(self.files) << 2 | self.latin << 1 | self.coded)
        for name, size in self.files:
            data += dfl.name_bytes(name) + varint(size)
        if self.coded:
            data += b"".join(map(varint, (self.calls, self.chunks, self.last, self.batch)))
            if self.rolling:
                # Readers from before there were drafts refuse a weight so large.
                drafted = (MOST_WEIGHT + 1) * (self.ahead > 0)
                data += varint(self.context) + varint(self.weight + drafted)
                data += varint(self.ahead) if self.ahead else b""
            data += self.counts.to_bytes()
        return data

    @staticmethod
    def read(data: bytes) -> TextPlan:
        """The inverse; `Damaged` where the header is not one of text."""
        reader = Reader(data)
        begin = reader.varint(4 * reader.left + 3)
        is_coded, latin = bool(begin & 1), bool(begin & 2)
        files: dict[str, int] = {}
        for _ in range(begin >> 2):
            name = dfl.read_name(reader)
            if name in files:
                raise Damaged(f"holds {name} twice")
            files[name] = reader.varint()
        if not files:
            raise Damaged("holds no files")
        plan = TextPlan(tuple(files.items()))
        if is_coded:
            calls, chunks, last = reader.varint(1 << 20), reader.varint(), reader.varint()
            batch = reader.varint(MOST_BATCH)
            rolling = chunks > 0 and batch == 0
            context = reader.varint() if rolling else 0
            drafted, weight = divmod(reader.varint(2 * MOST_WEIGHT + 1) if rolling else 0, MOST_WEIGHT + 1)
            ahead = reader.varint(MOST_AHEAD) if drafted else 0
            if drafted and ahead < 2:
                raise Damaged(f"declares network calls of {ahead} symbols")
            counts = Counts.read(reader, plan.raw + 1)
            numbers = calls, chunks, last, batch, context, weight, ahead
            plan = TextPlan(plan.files, True, latin, *numbers, counts)
            # Each chunk but the last, and each line, has a byte at least.
            if chunks > plan.raw + 1 or batch > chunks:
                raise Damaged("declares more chunks than it has bytes")
        elif latin:
            raise Damaged("says both that its bytes are stored and that they are coded")
        reader.finish()
        return plan


def parse(data: bytes) -> tuple[Container, TextPlan]:
    """A ``.dfl`` of text; `Damaged` for any other file."""
    parsed = dfl.parse(data, "text", (container.TEXT,), (TextCoder.mode,))
    plan = TextPlan.read(parsed.meta)
    if len(parsed.segments) != 1 or len(parsed.segments[0].levels) != 1:
        raise Damaged("has other segments than a text has")
    if parsed.segments[0].raw == plan.coded:
        raise Damaged("says both that its bytes are stored and that they are coded")
    return parsed, plan
