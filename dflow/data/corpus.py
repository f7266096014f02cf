"""A text as symbols: its splits, and what training and evaluation take from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dflow.config import InputError, nearest
from dflow.data import splits
from dflow.data.arrays import Array
from dflow.data.laws import Law
from dflow.data.splits import SPLITS
from dflow.data.tokenizers import Tokenizer, compact

#: Symbols counted at a time.
_COUNTED = 1 << 24
#: Draws of each split of a law that is exact; an evaluation scores them where outcomes cannot be listed.
NUM_DRAWS = 1 << 14


@dataclass(frozen=True, eq=False)
class Text:
    """Symbols of one split, stored compactly: a stream ``(n,)``, or sentences ``(n, longest)`` with lengths.

    Sentences end at their ``lengths`` and are padded with 0. ``num_characters`` counts the characters
    that the symbols spell, ``dropped`` the sentences that the protocol left out for their length and
    ``dropped_characters`` the characters of these. ``starts``, int64 ``(K,)``, says how many characters begin
    in each symbol; None where each symbol is one. Sentences are called ``what``: of protocol lines they are
    lines, ``limit`` is then the most symbols that one may have, and ``empty`` says how many had no symbol.
    """

    name: str
    ids: Tensor
    lengths: Tensor | None
    num_characters: int
    dropped: int = 0
    dropped_characters: int = 0
    starts: Tensor | None = None
    what: str = "sentences"
    limit: int | None = None
    empty: int = 0

    @property
    def num_symbols(self) -> int:
        """Symbols present; the ends of sentences are not counted."""
        return self.ids.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def longest(self) -> int:
        """Length of the longest sentence, or of the stream."""
        return self.ids.shape[-1]

    @property
    def amount(self) -> str:
        """How much there is to train on, in words."""
        return f"{self.num_symbols:,} symbols to train on"

    @cached_property
    def characters_per_symbol(self) -> float:
        """Characters a symbol, so that bits a character compare over tokenizers; 1 for characters.

        In the sentence protocol the end of each sentence counts as a character and as a symbol.
        """
        ends = 0 if self.lengths is None else len(self.lengths)
        return (self.num_characters + ends) / (self.num_symbols + ends)

    def crops(
        self, batch: int, length: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Random pieces to train on: ids int64 ``(batch, length)``, and lengths ``(batch,)`` of sentences.

        A stream gives windows at uniform places, sentences come whole. The draw depends on nothing but the
        generator, which is on the CPU.

        Raises:
            InputError: ``length`` is above the stream's or below the longest sentence's.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be positive")
        self._fits(length)
        if self.lengths is None:
            windows = self.ids.unfold(0, length, 1)
            return windows[torch.randint(len(windows), (batch,), generator=generator)].long(), None
        rows = torch.randint(len(self.ids), (batch,), generator=generator)
        return self._padded(self.ids[rows], length), self.lengths[rows]

    def chunks(self, length: int, limit: int | None = None) -> tuple[Tensor, Tensor | None]:
        """All of the text to evaluate on: ids int64 ``(n, length)``, and lengths ``(n,)`` of sentences.

        A stream is cut into chunks that do not overlap; the last `tail` symbols, which do not fill a chunk,
        are left out.

        Args:
            length: of a chunk.
            limit: only so many, the first ones.

        Raises:
            InputError: ``length`` is above the stream's or below the longest sentence's.
        """
        self._fits(length)
        if self.lengths is None:
            whole = self.ids[: len(self.ids) - self.tail(length)].reshape(-1, length)
            return whole[:limit].long(), None
        return self._padded(self.ids[:limit], length), self.lengths[:limit]

    def tail(self, length: int) -> int:
        """Symbols at the end of a stream that `chunks` leaves out."""
        return len(self.ids) % length if self.lengths is None else 0

    def characters(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """How many characters begin in each row of symbols ``(n, length)``: int64 ``(n,)``, on the CPU.

        Symbols below 0, and those beyond ``lengths``, are absent. Ends of sentences are not counted.
        """
        counts = []
        rows = max(1, _COUNTED // max(1, ids.shape[1]))
        for start in range(0, len(ids), rows):
            block = ids[start : start + rows].cpu()
            present = block >= 0
            if lengths is not None:
                present &= torch.arange(ids.shape[1]) < lengths[start : start + rows, None].cpu()
            each = present.long() if self.starts is None else self.starts[block.clamp(min=0)] * present
            counts.append(each.sum(1))
        return torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)

    def marginals(self, K: int) -> Tensor:
        """Relative frequency of each symbol: float64 ``(K,)``, adding up to 1."""
        present = self.ids
        if self.lengths is not None:
            present = self.ids[torch.arange(self.longest) < self.lengths[:, None]]
        total: Array = np.zeros(K, np.int64)
        # Counting takes eight bytes a symbol.
        for block in present.split(_COUNTED):
            counts = np.bincount(block.numpy(), minlength=K)
            if len(counts) > K:
                raise ValueError(f"symbol {len(counts) - 1} is outside an alphabet of K={K}")
            total += counts
        return torch.from_numpy(total / total.sum())

    def length_counts(self, max_length: int) -> Tensor:
        """How many sentences have each length 0, 1, ..., ``max_length``: int64 ``(max_length + 1,)``.

        Raises:
            ValueError: A stream has no lengths.
            InputError: A sentence is longer.
        """
        if self.lengths is None:
            raise ValueError(f"the {self.name} text is a stream and has no lengths")
        self._fits(max_length)
        return torch.bincount(self.lengths, minlength=max_length + 1)

    def _padded(self, ids: Tensor, length: int) -> Tensor:
        return F.pad(ids[:, :length].long(), (0, max(0, length - ids.shape[1])))

    def _fits(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"length={length} must be positive")
        if self.lengths is None and length > len(self.ids):
            raise InputError(
                f"the {self.name} text has {len(self.ids):,} symbols, too few for pieces of {length:,}; "
                "give more text, a larger share for it, or a smaller length"
            )
        if self.lengths is not None and length < self.longest:
            raise InputError(
                f"the {self.name} text has {self.what} of {self.longest} symbols, above length={length}; "
                f"set the length to at least {self.longest}"
            )


@dataclass(frozen=True, eq=False)
class Draws(Text):
    """A law as a text: `crops` draws afresh, `chunks` gives draws that are always the same."""

    law: Law = field(kw_only=True)

    @staticmethod
    def of(law: Law, name: str) -> Draws:
        """The split ``name`` of a law: its own draws to evaluate on."""
        # The seeds of training are hashes of 56 bits.
        seed = SPLITS.index(name)
        # A law without an entropy is drawn by many sweeps.
        n = NUM_DRAWS if law.entropy is not None else NUM_DRAWS // 16
        x = law.sample(n, torch.Generator().manual_seed(seed))
        codes = x.flatten().numpy().astype(compact(law.K))
        return Draws(name, torch.from_numpy(codes), None, x.numel(), law=law)

    @property
    def amount(self) -> str:
        """The law's entropy, and what independent entries cost."""
        costs = {"entropy": self.law.entropy, "factorized": self.law.factorized}
        terms = ", ".join(f"{name} {nats:.4f} nats" for name, nats in costs.items() if nats is not None)
        return f"fresh draws of {self.law.dim} symbols ({terms})"

    def crops(
        self, batch: int, length: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``batch`` fresh draws, int64 ``(batch, length)``, and None.

        Raises:
            InputError: ``length`` is not the law's.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be positive")
        self._fits(length)
        return self.law.sample(batch, generator), None

    def _fits(self, length: int) -> None:
        if length != self.law.dim:
            raise InputError(
                f"the law is over sequences of {self.law.dim} symbols and the model's length is {length}; "
                f"set model.length to {self.law.dim} or leave it out, or change the law's parameters"
            )


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three splits, each spelled by the tokenizer when it is first read.

    ``checksum`` is that of the whole text (all splits, UTF-8) and ``num_characters`` its length, so that a
    result can say on what it was measured where the text has no fixed version. ``law`` is the synthetic law
    of which the text is drawn, and then the checksum is that of its name and parameters. ``sources`` names
    the files that each split is taken from, where they are the user's, ``notes`` are sentences on how they
    were read, and ``pooled`` says whether the test split is a share that was cut off, and no text of its own.
    ``texts`` gives each split, and all of them where there is a whole to score.
    """

    name: str
    protocol: Literal["stream", "sentence", "lines"]
    tokenizer: Tokenizer
    texts: Mapping[str, Callable[[], Text]]
    num_characters: int
    checksum: str
    note: str = ""
    law: Law | None = None
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pooled: bool = False

    def split(self, name: str) -> Text:
        """The split called ``name``: train, valid or test; or all of them, as they were read.

        Raises:
            InputError: no split of that name, or a character outside the vocabulary.
        """
        if name not in (*SPLITS, splits.ALL):
            raise InputError(f"no split {name!r}; {nearest(name, [*SPLITS, splits.ALL])}")
        if name not in self.texts:
            raise InputError(f"{self.name} is drawn and has no {name!r} to score; name train, valid or test")
        return self.texts[name]()

    def about(self) -> dict[str, Any]:
        """The splits as plain values: the characters, symbols and files of each; and the notes."""
        amounts, notes = {}, list(self.notes)
        for split in SPLITS:
            text = self.split(split)
            amounts[split] = {
                "characters": text.num_characters,
                "symbols": text.num_symbols,
                "files": list(self.sources.get(split, ())),
            }
            if text.lengths is not None:
                amounts[split][text.what] = len(text.ids)
            if text.what == "lines" and (text.dropped or text.empty):
                notes.append(
                    f"Lines of the {split} data that were left out: {text.dropped:,} longer than "
                    f"model.length={text.limit} ({text.dropped_characters:,} characters), {text.empty:,} "
                    "empty."
                )
        return {
            "name": self.name,
            "protocol": self.protocol,
            "checksum": self.checksum,
            "splits": amounts,
            "notes": notes,
        }

    @property
    def train(self) -> Text:
        """The split to train on."""
        return self.split("train")

    @property
    def valid(self) -> Text:
        """The split to choose models by."""
        return self.split("valid")

    @property
    def test(self) -> Text:
        """The split to report results on."""
        return self.split("test")


def joined(texts: Sequence[Text]) -> Text:
    """Splits one after another, as one."""
    lengths = [text.lengths for text in texts if text.lengths is not None]
    ids = [text.ids for text in texts]
    if lengths:
        longest = max(text.longest for text in texts)
        ids = [F.pad(sentences, (0, longest - sentences.shape[1])) for sentences in ids]
    return Text(
        splits.ALL,
        torch.cat(ids),
        torch.cat(lengths) if lengths else None,
        sum(text.num_characters for text in texts),
        sum(text.dropped for text in texts),
        sum(text.dropped_characters for text in texts),
        texts[0].starts,
        texts[0].what,
        texts[0].limit,
        sum(text.empty for text in texts),
    )
