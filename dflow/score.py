"""Exact bits of a text under a model: of the whole, of each line, of each symbol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dflow.config import InputError
from dflow.data import Tokenizer
from dflow.distributions.documents import Documents
from dflow.models import TextModel

Each = Literal["line", "symbol", "document"]


@dataclass(frozen=True)
class Part:
    """A line or a symbol of a text, and what it costs.

    Attributes:
        number: which line or symbol, from 1.
        text: its text, a line with its line break.
        num_symbols: number of symbols that begin in it; of a sequence with an end, the end is one.
        num_characters: number of its characters; of a sequence with an end, the end is one.
        bits: ``-log2`` of its probability, given what the law knows before it.
    """

    number: int
    text: str
    num_symbols: int
    num_characters: int
    bits: float

    @property
    def bits_per_character(self) -> float | None:
        """None where no character begins in the part."""
        return self.bits / self.num_characters if self.num_characters else None


@dataclass(frozen=True)
class TextScore:
    """What a text costs under a model.

    Attributes:
        bits: ``-log2`` of the probability of the whole text; the sum of the bits of its parts.
        num_symbols: number of symbols scored.
        num_characters: number of characters scored; of sequences with an end, each end is one.
        num_given: number of symbols that are given, and not scored.
        num_left: number of empty lines that are left out, where each line is a sequence.
        kind: ``exact``: the likelihood itself, neither a bound nor an estimate.
        protocol: ``document``: the text has one law; ``chunks``: it is longer than the model, and cut into
            chunks, each on its own; ``lines``: each line is a sequence of its own.
        parts: its lines or symbols; none where these are not wanted.
    """

    bits: float
    num_symbols: int
    num_characters: int
    num_given: int
    num_left: int
    kind: Literal["exact"]
    protocol: Literal["document", "chunks", "lines"]
    parts: Sequence[Part]

    @property
    def bits_per_character(self) -> float:
        """Bits a character."""
        return self.bits / self.num_characters


def score(
    model: TextModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    each: Each = "document",
    given: str = "",
    batch_size: int = 32,
    progress: bool = False,
) -> TextScore:
    r"""The exact bits of a text, ``-log2 p(text | given)``.

    A model with a context scores a text of any length as one document, chunk after chunk, each given the
    symbols before it (`dflow.distributions.documents.Documents`). One without scores a text up to its length;
    a longer one is cut into chunks, each on its own. The bits of a line of a document are the sum of those of
    its symbols, each given what stands before; a line ends with its line break. Where sequences have an end
    (``explicit_length``), or are written a line each (numbers), each line is a sequence of its own.

    Args:
        model: scores; its mode is restored.
        tokenizer: that of the model.
        text: what is scored.
        each: also give the bits of each line or symbol.
        given: what stands before the text; for models with a context, or that are drawn from left to right.
        batch_size: number of lines or chunks a pass.
        progress: show a bar on stderr.

    Raises:
        InputError: an empty text, a symbol outside the vocabulary, a text that the model cannot score: too
            short, too long behind what is given, or given what stands before; ``each`` symbol or line for a
            model that has no probabilities of single symbols; or bits that are not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} must be at least 1")
    if not text:
        raise InputError("the text is empty, so that there is nothing to score")
    mode = model.training
    model.train(False)
    by_line = model.config.explicit_length or tokenizer.one_line
    bar = tqdm(unit="symbol", desc="score", delay=1, mininterval=1, disable=not progress)
    try:
        with torch.inference_mode(), bar:
            result = (_lines if by_line else _document)(model, tokenizer, text, each, given, batch_size, bar)
    finally:
        model.train(mode)
    if not math.isfinite(result.bits):
        raise InputError(
            "the bits of the text are not finite; the model's training diverged, or its checkpoint is damaged"
        )
    return result


def _document(
    model: TextModel,
    tokenizer: Tokenizer,
    text: str,
    each: Each,
    given: str,
    batch_size: int,
    bar: tqdm[Any],
) -> TextScore:
    """A text of a model of a stream."""
    ids = tokenizer.encode(text)
    try:
        before = tokenizer.encode(given)
    except InputError as error:
        raise InputError(f"given: {error}") from None
    whole = _whole(model, len(ids), len(before))
    rows = [ids] if whole else list(ids.split(model.config.length))
    parts: list[Part] = []
    if model.law.by_entry:
        if model.documents is None:
            terms = torch.cat(_terms(model, rows, before, batch_size, bar))
        else:
            terms = _document_terms(model, model.documents, ids, before, batch_size, bar)
        parts = _parts(tokenizer, text, ids, -terms / math.log(2), each)
        nats = -float(terms.sum())
    elif each == "document":
        nats = -float(torch.cat(_totals(model, rows, before, batch_size, bar)).sum())
    else:
        raise InputError(
            f"each {each}: a {model.config.family} model gives whole sequences a probability, and single "
            "symbols no share in it; score the document"
        )
    return TextScore(
        bits=nats / math.log(2),
        num_symbols=len(ids),
        num_characters=len(text),
        num_given=len(before),
        num_left=0,
        kind="exact",
        protocol="document" if whole else "chunks",
        parts=parts,
    )


def _whole(model: TextModel, number: int, num_given: int) -> bool:
    """Whether so many symbols, given so many, are one document to a model, and not chunks."""
    family, longest = model.config.family, model.config.length
    if model.documents is not None:
        return True
    if num_given and not model.config.record.left_to_right:
        raise InputError(
            f"given: this {family} model was trained without a context, and scores no text given what stands "
            "before; use one that was trained with a model.context, or a transformer or lstm"
        )
    if num_given and num_given + number > longest:
        raise InputError(
            f"{num_given} symbols that are given and {number} of the text are more than the {longest} that "
            "this model takes; give less text, or use a model that was trained with a model.context"
        )
    if number % longest and not model.config.record.left_to_right:
        raise InputError(
            f"the text has {number} symbols, and a {family} model without a context scores {longest}, or a "
            "multiple of that; give such a text, or use a model that was trained with a model.context"
        )
    return bool(number <= longest)


def _lines(
    model: TextModel,
    tokenizer: Tokenizer,
    text: str,
    each: Each,
    given: str,
    batch_size: int,
    bar: tqdm[Any],
) -> TextScore:
    """Lines, each of which is a sequence of its own."""
    if given:
        raise InputError(
            "given: this model takes each line as a sequence of its own, and nothing stands before it; use a "
            "model of a stream"
        )
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))]).tolist()
    spans = [(start, end - 1) for start, end in pairwise(starts)]
    # What follows the last line break is no line.
    spans = spans[:-1] if text.endswith("\n") else spans
    numbers = [i for i, (start, end) in enumerate(spans) if text[start:end].strip()]
    if not numbers:
        raise InputError("all lines are empty, so that there is nothing to score")
    rows = [tokenizer.encode(text, *spans[i]) for i in numbers]
    ends = int(model.config.explicit_length)
    bits: list[Tensor]
    if each == "symbol":
        bits = [-terms / math.log(2) for terms in _terms(model, rows, rows[0][:0], batch_size, bar)]
    else:
        bits = [-total / math.log(2) for total in _totals(model, rows, rows[0][:0], batch_size, bar)]
    parts: list[Part] = []
    characters = [
        (len(row) if tokenizer.one_line else end - start) + ends
        for row, (start, end) in zip(rows, (spans[i] for i in numbers), strict=True)
    ]
    for i, row, cost, count in zip(numbers, rows, bits, characters, strict=True):
        if each == "line":
            parts.append(Part(i + 1, text[slice(*spans[i])], len(row) + ends, count, float(cost)))
        elif each == "symbol":
            parts += _symbols(tokenizer, row, cost, len(parts))
    return TextScore(
        bits=float(torch.cat([cost.flatten() for cost in bits]).sum()),
        num_symbols=sum(map(len, rows)) + ends * len(rows),
        num_characters=sum(characters),
        num_given=0,
        num_left=len(spans) - len(numbers),
        kind="exact",
        protocol="lines",
        parts=parts,
    )


def _document_terms(
    model: TextModel, law: Documents, ids: Tensor, before: Tensor, batch_size: int, bar: tqdm[Any]
) -> Tensor:
    """The log-probability of each symbol of a document, in nats, float64; as many chunks at a time."""
    whole, start, terms = torch.cat([before, ids]).to(model.device), len(before), []
    bar.reset(len(ids))
    for piece in ids.split(batch_size * law.length):
        # What a chunk is given ends with the last symbols before it; no more are read.
        given = whole[max(0, start - law.context) : start]
        terms.append(model.log_prob_each(piece[None].to(model.device), given=given)[0].cpu().double())
        start += len(piece)
        bar.update(len(piece))
    return torch.cat(terms)


def _terms(
    model: TextModel, rows: Sequence[Tensor], before: Tensor, batch_size: int, bar: tqdm[Any]
) -> list[Tensor]:
    """The log-probability of each symbol of each row, and of its end where it has one, in nats, float64."""
    before = before.to(model.device)
    return _batched(lambda x: model.log_prob_each(x.to(model.device), given=before), rows, batch_size, bar)


def _totals(
    model: TextModel, rows: Sequence[Tensor], before: Tensor, batch_size: int, bar: tqdm[Any]
) -> list[Tensor]:
    """The log-probability of each row, in nats, float64 ``(1,)``."""
    before = before.to(model.device)
    return _batched(
        lambda x: model.log_prob(x.to(model.device), given=before)[:, None], rows, batch_size, bar
    )


def _batched(
    log_prob: Callable[[Tensor], Tensor], rows: Sequence[Tensor], batch_size: int, bar: tqdm[Any]
) -> list[Tensor]:
    """A result for each row, float64, of ``log_prob`` of as many rows of one length at a time."""
    bar.reset(sum(map(len, rows)))
    results: dict[int, Tensor] = {}
    for _, group in groupby(sorted(range(len(rows)), key=lambda i: len(rows[i])), lambda i: len(rows[i])):
        numbers = list(group)
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            scored = log_prob(torch.stack([rows[i] for i in batch])).cpu().double()
            results |= dict(zip(batch, scored, strict=True))
            bar.update(sum(len(rows[i]) for i in batch))
    return [results[i] for i in range(len(rows))]


def _parts(tokenizer: Tokenizer, text: str, ids: Tensor, bits: Tensor, each: Each) -> list[Part]:
    """The lines or symbols of a document."""
    if each == "document":
        return []
    if each == "symbol":
        return _symbols(tokenizer, ids, bits, 0)
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    lines = lines if lines[-1] else lines[:-1]
    starts = tokenizer.starts
    counts = torch.ones_like(ids) if starts is None else starts[ids]
    # A symbol belongs to the line in which its first character lies; one that goes on with a character, to
    # the line of that.
    place = counts.cumsum(0) - counts.clamp(min=1)
    ends = torch.tensor([len(line) for line in lines]).cumsum(0)
    line_of = torch.searchsorted(ends, place, right=True).clamp(max=len(lines) - 1)
    cost = torch.zeros(len(lines), dtype=torch.float64).index_add(0, line_of, bits)
    number = torch.bincount(line_of, minlength=len(lines))
    return [Part(i + 1, line, int(number[i]), len(line), float(cost[i])) for i, line in enumerate(lines)]


def _symbols(tokenizer: Tokenizer, ids: Tensor, bits: Tensor, start: int) -> list[Part]:
    """Each symbol, numbered from behind ``start``; a last one of the bits without symbol is an end."""
    starts = tokenizer.starts
    parts = []
    for i, cost in enumerate(bits.tolist()):
        piece = ids[i : i + 1]
        characters = 1 if starts is None or not len(piece) else int(starts[piece])
        parts.append(Part(start + i + 1, tokenizer.decode(piece), 1, characters, cost))
    return parts
