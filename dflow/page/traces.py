"""Samples, and how they were drawn: the network call of each symbol, what was drafted, what each costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dflow.core import Context, Known
from dflow.data import Tokenizer
from dflow.distributions import Ordered, SequenceCategorical
from dflow.distributions.drafting import VerifiedCall
from dflow.generate import generate
from dflow.models import TextModel
from dflow.score import score

#: How a model is drawn: several symbols a call, or one symbol a call from left to right.
Role = Literal["groups", "causal"]
#: Digits behind the point of the bits of a symbol; totals have all digits.
_DIGITS = 5


@dataclass(frozen=True)
class Draft:
    """A network call that verified drafts, in text.

    Attributes:
        begin: the first symbol of the call, from 0.
        drafted: the text of each symbol that was proposed.
        accepted: how many of these were right.
        settled: how many symbols the call drew: those, and the law's own behind them.
    """

    begin: int
    drafted: list[str]
    accepted: int
    settled: int


@dataclass(frozen=True)
class Trace:
    """A sample, and how it was drawn.

    Attributes:
        pieces: the text of each symbol; together they are the text of the sample.
        calls: the network call that drew each symbol, from 1.
        bits: -log2 of the probability of each symbol given the calls before it, exact, rounded for display.
        total_bits: -log2 of the probability of the sample, exact.
        num_calls: network calls that it took.
        num_characters: characters of the sample; an end that the model draws counts as one.
        drafts: the calls of a sample that was drafted; empty for any other.
        equal: whether a drafted sample is that of the plain loop, symbol by symbol, as both were drawn; None
            for a sample without drafts.
    """

    pieces: list[str]
    calls: list[int]
    bits: list[float]
    total_bits: float
    num_calls: int
    num_characters: int
    drafts: list[Draft]
    equal: bool | None


@dataclass(frozen=True)
class Shade:
    """The first symbols of a text with their bits, and the bits of the whole.

    Attributes:
        pieces: the text of each of the first symbols.
        bits: what each of them costs, rounded for display.
        total_bits: -log2 of the probability of the whole text, exact.
        num_characters: characters of the whole text.
        num_symbols: symbols of the whole text.
        protocol: how the text was taken, see `dflow.score.TextScore`.
    """

    pieces: list[str]
    bits: list[float]
    total_bits: float
    num_characters: int
    num_symbols: int
    protocol: str


def role_of(model: TextModel) -> Role | None:
    """How samples of a model can be shown; None where its law does not say which call draws which symbol."""
    law = model.law
    if not isinstance(law, (SequenceCategorical, Ordered)):
        return None
    return "causal" if model.config.record.left_to_right else "groups"


def pieces_of(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    """The text that each symbol adds to that of the symbols before it; together the text of all.

    Of a character that several symbols spell the last one has the text.

    >>> from dflow.data import Bytes
    >>> pieces_of(Bytes(), torch.tensor(list("aé".encode())))
    ['a', '', 'é']
    """
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")
        pieces.append(text[len(before) :])
        before = max(text, before, key=len)
    return pieces


@torch.inference_mode()
def traces(
    model: TextModel, tokenizer: Tokenizer, n: int, *, seed: int = 0, drafted: TextModel | None = None
) -> list[Trace]:
    """``n`` samples of `dflow.generate.generate`, each drawn by itself, with how they were drawn.

    Args:
        model: one that has a `role_of`.
        tokenizer: that of the model.
        n: number of samples.
        seed: of the draws.
        drafted: the same model with drafts, by which the samples are drawn again and compared.
    """
    plain = list(generate(model, n, seed=seed, batch_size=1))
    if drafted is None or drafted.tally is None:
        return [_trace(model, tokenizer, ids, None, []) for ids in plain]
    drafted.tally.clear()
    drafted.tally.log = []
    again = list(generate(drafted, n, seed=seed, batch_size=1))
    logs = [[call for call in drafted.tally.log if call.sample == number] for number in range(n)]
    drafted.tally.log = None
    return [
        _trace(model, tokenizer, ids, torch.equal(ids, other), log)
        for ids, other, log in zip(again, plain, logs, strict=True)
    ]


def _trace(
    model: TextModel, tokenizer: Tokenizer, ids: Tensor, equal: bool | None, log: Sequence[VerifiedCall]
) -> Trace:
    ids = ids[ids >= 0]
    n, x = len(ids), ids[None].to(model.device)
    lengths = torch.tensor([n], device=x.device) if model.config.explicit_length else None
    bits = -model.log_prob_each(x, lengths)[0].double().cpu() / math.log(2)
    calls = 1 + _calls(model, x).cpu()[:n]
    if not any(call.drafted for call in log):
        log = []
    if log:
        sizes = torch.tensor([len(call.drawn) for call in log])
        calls = torch.arange(1, len(log) + 1).repeat_interleave(sizes)
    drafts = [
        Draft(call.begin, [tokenizer.decode([i]) for i in call.drafted], call.accepted, len(call.drawn))
        for call in log
    ]
    pieces = pieces_of(tokenizer, ids)
    return Trace(
        pieces=pieces,
        calls=calls.tolist(),
        bits=_rounded(bits[:n]),
        total_bits=float(bits.sum()),
        num_calls=int(calls.max()),
        num_characters=_characters(tokenizer, ids) + (lengths is not None),
        drafts=drafts,
        equal=equal if log else None,
    )


def _calls(model: TextModel, x: Tensor) -> Tensor:
    """The call that draws each symbol, from 0, as `TextModel.generate` draws a sample of the length of x."""
    law = model.law
    assert isinstance(law, (SequenceCategorical, Ordered))
    if model.documents is None:
        return law.calls()
    nothing = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return law.calls(Context(known=Known(x, nothing)))


def _characters(tokenizer: Tokenizer, ids: Tensor) -> int:
    return len(ids) if tokenizer.starts is None else int(tokenizer.starts[ids].sum())


def _rounded(bits: Tensor) -> list[float]:
    return [round(value, _DIGITS) for value in bits.tolist()]


def shade(model: TextModel, tokenizer: Tokenizer, text: str, most: int) -> Shade:
    """A text with the bits of its first ``most`` symbols, by `dflow.score.score`.

    Raises:
        InputError: a text that the model does not score symbol by symbol.
    """
    scored = score(model, tokenizer, text, each="symbol")
    first = scored.parts[:most]
    if scored.protocol == "lines":
        pieces = [part.text if part.text else "\n" for part in first]
    else:
        pieces = pieces_of(tokenizer, tokenizer.encode(text)[:most])
    return Shade(
        pieces=pieces,
        bits=[round(part.bits, _DIGITS) for part in first],
        total_bits=scored.bits,
        num_characters=scored.num_characters,
        num_symbols=scored.num_symbols,
        protocol=scored.protocol,
    )
