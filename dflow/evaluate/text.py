"""Exact bits a character of a model on a text, and its distance from a law that is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor

from dflow.config import InputError, nearest
from dflow.data import Draws, Text
from dflow.evaluate.driver import Rows, Scorer, check_positive, share, total
from dflow.evaluate.rolling import Rolling, rolling
from dflow.models import TextModel

#: Whether each chunk is scored by itself, or each symbol given the text before it; see `evaluate`.
Protocol = Literal["chunks", "rolling"]


@dataclass(frozen=True)
class Evaluation:
    """The cost of a text under a model, and how that was measured.

    Attributes:
        bpc: bits a character.
        standard_error: the error of `bpc`, from the spread over chunks or pieces; None for a single one.
        kind: ``exact``: the likelihood itself, neither a bound nor an estimate.
        protocol: how the text was cut, in words that begin with "rolling" for that protocol.
        num_symbols: number of symbols scored; in the sentence protocol each end counts as one.
        num_chunks: number of chunks, sentences, or pieces of the rolling protocol that were scored.
        characters_per_symbol: a ratio over the scored text; 1 where the symbols are characters.
        round_trip: whether the law draws what it scores, on `num_checked` chunks; None where it offers no
            check.
        num_checked: number of chunks that went through the round trip.
        num_characters: number of characters scored; in the sentence protocol each end counts as one.
        num_left: number of characters that are not scored: behind the last whole chunk, of sentences that
            are too long, or beyond the limit.
    """

    bpc: float
    standard_error: float | None
    kind: str
    protocol: str
    num_symbols: int
    num_chunks: int
    characters_per_symbol: float
    round_trip: bool | None
    num_checked: int
    num_characters: int
    num_left: int


def evaluate(
    model: TextModel,
    text: Text,
    *,
    batch_size: int = 32,
    progress: bool = False,
    limit: int | None = None,
    checks: int = 16,
    accelerator: Accelerator | None = None,
    protocol: Protocol = "chunks",
    context: int | None = None,
    adapt: bool = False,
) -> Evaluation:
    r"""Score ``text`` in chunks of the model's length, each without the ones before it, or rolling.

    .. math:: \mathrm{bpc} = \frac{-\sum_c \log_2 p(x_c)}{\sum_c n_c}

    with n_c the characters that begin in chunk c; in the sentence protocol a chunk is a sentence, log p(x_c)
    includes its length, and n_c counts its end. The sum is in float64, see `Totals` for the standard error.
    The protocol "rolling" scores every symbol of a stream once, given the text before it; see `rolling`.

    Args:
        model: scores and draws; its mode is restored.
        text: a split of a corpus, spelled in the model's vocabulary.
        batch_size: number of chunks a pass, on each process.
        progress: show a bar on stderr.
        limit: score the first ``limit`` chunks only.
        checks: number of chunks that go through the round trip, on each process.
        accelerator: spread the chunks over its processes.
        protocol: "chunks" or "rolling".
        context: of the protocol "rolling", below the model's length; default half of it.
        adapt: of the protocol "rolling": the model's counts go on counting the text that has been scored.

    Raises:
        InputError: no chunk to score, a text, protocol or context that does not fit the model, or a
            likelihood that is not finite.
    """
    check_positive(batch_size=batch_size, limit=limit)
    scorer = _scorer(model, text, limit, checks, share(accelerator)[1], protocol, context, adapt)
    totals = total(scorer, batch_size, progress, accelerator)
    if not totals.size:
        raise InputError(
            f"no character begins in the scored chunks of the {text.name} text; raise the limit, or give "
            "more text"
        )
    bpc, error = totals.bits("nats")
    scored, ends = int(totals.size), 0 if text.lengths is None else len(text.lengths)
    return Evaluation(
        bpc=bpc,
        standard_error=error,
        kind="exact",
        protocol=scorer.protocol,
        num_symbols=scorer.num_symbols,
        num_chunks=int(totals.count),
        characters_per_symbol=scored / scorer.num_symbols,
        round_trip=totals.round_trip,
        num_checked=totals.num_checked,
        num_characters=scored,
        num_left=text.num_characters + ends - scored + text.dropped_characters,
    )


def _scorer(
    model: TextModel,
    text: Text,
    limit: int | None,
    checks: int,
    processes: int,
    protocol: Protocol,
    context: int | None,
    adapt: bool,
) -> _ChunkScorer | Rolling:
    """The scorer of a protocol; ``checks`` are for each of the processes."""
    if protocol not in get_args(Protocol):
        raise InputError(f"protocol {protocol!r}; {nearest(str(protocol), list(get_args(Protocol)))}")
    if protocol == "rolling":
        return rolling(model, text, limit, checks * processes, context, processes, adapt)
    if context is not None:
        raise InputError(
            f"context {context}: a chunk is scored without the text before it; use protocol 'rolling', or "
            "leave context out"
        )
    if adapt:
        raise InputError("adapt: each chunk is scored on its own; use protocol 'rolling', or leave adapt out")
    return _ChunkScorer(model, text, limit, checks * processes)


class _ChunkScorer(Scorer):
    """Chunks of a text, or sentences, each without the ones before it."""

    model: TextModel
    row = "chunk"

    def __init__(self, model: TextModel, text: Text, limit: int | None, checks: int) -> None:
        explicit = model.config.explicit_length
        if explicit != (text.lengths is not None):
            modelled, cut = ("lines", "a stream") if explicit else ("a stream", text.what)
            protocol = "'sentence' or 'lines'" if explicit else "'stream'"
            raise InputError(
                f"the model is one of {modelled} and the {text.name} text is cut as {cut}; set the protocol "
                f"to {protocol}"
            )
        self.model, self.what = model, f"likelihood of the {text.name} text"
        self.ids, self.lengths = text.chunks(model.config.length, limit)
        # The end of a sentence counts as a character.
        self.characters = text.characters(self.ids, self.lengths) + (self.lengths is not None)
        self.num_rows = len(self.ids)
        self.num_checks = min(checks, self.num_rows)
        self.num_symbols = self.ids.numel()
        if self.lengths is not None:
            self.num_symbols = int(self.lengths.sum()) + len(self.lengths)
        self.protocol = _protocol(text, model.config.length, limit)

    def score(self, rows: slice) -> Rows:
        return Rows({"nats": -self.model.log_prob(*self._batch(rows))}, self.characters[rows])

    def check(self, rows: slice) -> bool | None:
        return self.model.round_trip(*self._batch(rows))

    def _batch(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        device = self.model.device
        return self.ids[rows].to(device), None if self.lengths is None else self.lengths[rows].to(device)


@dataclass(frozen=True)
class LawEvaluation:
    """The cost of a law under a model, beside that under the law itself.

    Attributes:
        nats: ``E[-log q(x)]`` of a sequence, x from the law and q the model.
        bits: the cost in bits an entry.
        entropy: the entropy of the law, in nats a sequence; None where it is not known.
        gap: ``nats - entropy``, the divergence KL(law || model) in nats; None without an entropy.
        factorized: the least cost under independent entries, in nats; None where it is not known.
        uniform: ``dim ln K``.
        kind: ``exact``: the expectation is a sum over all outcomes; ``estimate``: a mean over draws.
        standard_error: the error of `nats` and `gap`, 0 where they are exact; None for a single draw.
        num_sequences: number of outcomes or draws scored.
        round_trip: whether the model draws what it scores, on `num_checked` draws; None: not checked.
        num_checked: number of draws that went through the round trip.
    """

    nats: float
    bits: float
    entropy: float | None
    gap: float | None
    factorized: float | None
    uniform: float
    kind: str
    standard_error: float | None
    num_sequences: int
    round_trip: bool | None
    num_checked: int


def evaluate_law(
    model: TextModel,
    text: Draws,
    *,
    batch_size: int = 1024,
    progress: bool = False,
    limit: int | None = None,
    checks: int = 16,
    accelerator: Accelerator | None = None,
) -> LawEvaluation:
    r"""The cross-entropy of a law and a model, exactly where the law's outcomes can be listed.

    Elsewhere it is estimated from draws that no training has seen. Where the probabilities p of these are
    known the estimate is

    .. math:: H(p) + \frac 1 n \sum_i \log \frac{p(x_i)}{q(x_i)}

    whose error shrinks with the divergence itself; else it is the mean of -log q. Sums are in float64.

    Args:
        model: scores and draws; its mode is restored.
        text: a split of a corpus that is a law.
        batch_size: number of sequences a pass, on each process.
        progress: show a bar on stderr.
        limit: estimate from the first ``limit`` draws, even where the outcomes can be listed.
        checks: number of draws that go through the round trip, on each process.
        accelerator: spread the sequences over its processes.

    Raises:
        InputError: a model of another length, or a likelihood that is not finite.
    """
    check_positive(batch_size=batch_size, limit=limit)
    law = text.law
    scorer = _Outcomes(model, text, limit, checks * share(accelerator)[1])
    totals = total(scorer, batch_size, progress, accelerator)
    mean = totals.mean("nats")
    return LawEvaluation(
        nats=mean,
        bits=totals.bits("nats", law.dim)[0],
        entropy=law.entropy,
        gap=None if law.entropy is None else mean - law.entropy,
        factorized=law.factorized,
        uniform=law.dim * math.log(law.K),
        kind="exact" if scorer.listed else "estimate",
        standard_error=0.0 if scorer.listed else totals.error("nats"),
        num_sequences=scorer.num_rows,
        round_trip=totals.round_trip,
        num_checked=totals.num_checked,
    )


class _Outcomes(Scorer):
    """All outcomes of a law by their probabilities, or draws from it; what is checked are draws."""

    model: TextModel
    row, what = "sequence", "likelihood of the law"

    def __init__(self, model: TextModel, text: Draws, limit: int | None, checks: int) -> None:
        self.model, law = model, text.law
        self.draws, _ = text.chunks(model.config.length)
        support = law.support if limit is None else None
        self.listed = support is not None
        self.x, probabilities = support or (self.draws[:limit], None)
        self.num_rows = len(self.x)
        self.weights = None if probabilities is None else self.num_rows * probabilities
        log_p = None if self.listed else law.log_prob(self.x)
        self.offset = torch.zeros(1) if log_p is None else log_p + (law.entropy or 0.0)
        self.offset = self.offset.cpu().double().expand(self.num_rows)
        self.num_checks = min(checks, len(self.draws))

    def score(self, rows: slice) -> Rows:
        nats = -self.model.log_prob(self.x[rows].to(self.model.device)).cpu().double()
        weights = None if self.weights is None else self.weights[rows]
        return Rows({"nats": nats + self.offset[rows]}, weights=weights)

    def check(self, rows: slice) -> bool | None:
        return self.model.round_trip(self.draws[rows].to(self.model.device))


def _protocol(text: Text, length: int, limit: int | None) -> str:
    """How the text was cut, in words."""
    limited = "" if limit is None else f"the first {limit:,} "
    if text.lengths is None:
        return (
            f"{limited}chunks of {length:,} symbols, each on its own, tail of {text.tail(length):,} dropped"
        )
    if text.what == "sentences":
        return f"{limited}sentences, each on its own with its length, {text.dropped:,} too long ones dropped"
    return (
        f"{limited}lines, each on its own with its length, the end counted as a character, {text.dropped:,} "
        f"too long and {text.empty:,} empty ones left out"
    )
