"""Exact bits a character of a model on a text, and its distance from a law that is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from dflow.config import InputError
from dflow.data import Draws, Text
from dflow.hf import DflowModel
from dflow.objectives import bits


@dataclass(frozen=True)
class Evaluation:
    """What a model costs on a text, and how that was measured.

    Attributes:
        bpc: bits a character.
        standard_error: of `bpc`, from the spread over chunks; None for a single chunk.
        kind: ``exact``: the likelihood itself, neither a bound nor an estimate.
        protocol: how the text was cut.
        num_symbols: symbols scored; in the sentence protocol each end counts as one.
        num_chunks: chunks, or sentences, scored.
        characters_per_symbol: of what is scored; 1 where the symbols are characters.
        round_trip: whether what is scored is what is drawn, on `num_checked` chunks; None: not checked, which
            a law of one's own may not offer.
        num_checked: chunks that went through the round trip.
        num_characters: characters scored; in the sentence protocol each end counts as one.
        num_left: characters of the text that are not scored: behind the last whole chunk, of sentences that
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
    model: DflowModel,
    text: Text,
    *,
    batch_size: int = 32,
    progress: bool = False,
    limit: int | None = None,
    checks: int = 16,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    r"""Score ``text`` in chunks of the model's length, each without the ones before it.

    .. math:: \mathrm{bpc} = \frac{-\sum_c \log_2 p(x_c)}{\sum_c n_c}

    with n_c the characters that begin in chunk c; in the sentence protocol a chunk is a sentence, log p(x_c)
    includes its length, and n_c counts its end. The sum is in float64. The standard error is that of a ratio
    of means (Cochran 1977, Sampling Techniques, section 2.11).

    Args:
        model: scores and draws; its mode is restored.
        text: a split of a corpus, spelled in the model's vocabulary.
        batch_size: chunks a pass, on each process.
        progress: show a bar on stderr.
        limit: score the first ``limit`` chunks only.
        checks: chunks that go through the round trip, on each process.
        accelerator: spread the chunks over its processes.

    Raises:
        InputError: no chunk to score, a text cut by another protocol than the model's, or a likelihood that
            is not finite.
    """
    for name, value in (("batch size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    length, explicit = model.config.length, model.config.explicit_length
    if explicit != (text.lengths is not None):
        modelled, found = ("sentences", "a stream") if explicit else ("a stream", "sentences")
        raise InputError(
            f"the model is one of {modelled} and the {text.name} text is cut as {found}; set the protocol to "
            f"{'sentence' if explicit else 'stream'!r}"
        )
    ids, lengths = text.chunks(length, limit)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    shown = progress and rank == 0
    mode = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            characters = text.characters(ids, lengths) + (lengths is not None)
            moments = _score(model, ids, lengths, characters, batch_size, rank, world, shown)
            mine = slice(rank, min(len(ids), checks * world), world)
            checked, failed_here = _round_trip(model, ids[mine], None if lengths is None else lengths[mine])
    finally:
        model.train(mode)
    totals = torch.tensor([*moments, checked, failed_here], dtype=torch.float64)
    if accelerator is not None and world > 1:
        totals = accelerator.reduce(totals.to(accelerator.device), "sum")
    chunks, nats, scored, squares, products, sizes, checked_all, failed = totals.tolist()
    if not math.isfinite(nats):
        raise InputError(
            f"the model's likelihood of the {text.name} text is not finite; its training diverged or its "
            "checkpoint is damaged"
        )
    if not scored:
        raise InputError(
            f"no character begins in what is scored of the {text.name} text; raise the limit, or give more "
            "text"
        )
    rate = nats / scored
    residuals = max(0.0, squares - 2 * rate * products + rate**2 * sizes)
    error = math.sqrt(residuals * chunks / (chunks - 1)) / scored if chunks > 1 else None
    unit = math.log(2)
    ends = 0 if text.lengths is None else len(text.lengths)
    symbols = ids.numel() if lengths is None else int(lengths.sum()) + len(lengths)
    return Evaluation(
        bpc=rate / unit,
        standard_error=None if error is None else error / unit,
        kind="exact",
        protocol=_protocol(text, length, limit),
        num_symbols=symbols,
        num_chunks=int(chunks),
        characters_per_symbol=scored / symbols,
        round_trip=failed == 0 if checked_all else None,
        num_checked=int(checked_all),
        num_characters=int(scored),
        num_left=text.num_characters + ends - int(scored) + text.dropped_characters,
    )


@dataclass(frozen=True)
class LawEvaluation:
    """What a model costs on a law, beside what the best of all costs.

    Attributes:
        nats: ``E[-log q(x)]`` of a sequence, x from the law and q the model.
        bits: the same in bits an entry.
        entropy: of the law, in nats a sequence; None where it is not known.
        gap: ``nats - entropy``, the divergence KL(law || model) in nats; None where the entropy is.
        factorized: what independent entries cost at best, in nats; None where it is not known.
        uniform: ``dim ln K``.
        kind: ``exact``: the expectation is a sum over all outcomes; ``estimate``: a mean over draws.
        standard_error: of `nats` and `gap`, 0 where they are exact; None for a single draw.
        num_sequences: outcomes or draws scored.
        round_trip: whether what is scored is what is drawn, on `num_checked` draws; None: not checked.
        num_checked: draws that went through the round trip.
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
    model: DflowModel,
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
        batch_size: sequences a pass, on each process.
        progress: show a bar on stderr.
        limit: estimate from the first ``limit`` draws, even where the outcomes can be listed.
        checks: draws that go through the round trip, on each process.
        accelerator: spread the sequences over its processes.

    Raises:
        InputError: a model of another length, or a likelihood that is not finite.
    """
    for name, value in (("batch size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    law = text.law
    draws, _ = text.chunks(model.config.length)
    support = law.support if limit is None else None
    if support is not None:
        x, weights = support
        offset = torch.zeros(len(x), dtype=torch.float64)
    else:
        x = draws[:limit]
        weights = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
        known = law.log_prob(x)
        offset = torch.zeros(len(x), dtype=torch.float64) if known is None else known + (law.entropy or 0.0)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = torch.arange(rank, len(x), world)
    mode = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            nats = _nats(model, x[mine], None, batch_size, progress and rank == 0, "sequence")
            terms = nats + offset[mine]
            checked, failed_here = _round_trip(model, draws[rank : checks * world : world], None)
    finally:
        model.train(mode)
    mass = weights[mine]
    sums = [float((mass * terms).sum()), float((mass * terms**2).sum())]
    totals = torch.tensor([*sums, checked, failed_here], dtype=torch.float64)
    if accelerator is not None and world > 1:
        totals = accelerator.reduce(totals.to(accelerator.device), "sum")
    mean, square, checked_all, failed = totals.tolist()
    if not math.isfinite(mean):
        raise InputError(
            "the model's likelihood of the law is not finite; its training diverged or its checkpoint is "
            "damaged"
        )
    n = len(x)
    error = math.sqrt(max(0.0, square - mean**2) / (n - 1)) if n > 1 else None
    return LawEvaluation(
        nats=mean,
        bits=bits(mean, law.dim),
        entropy=law.entropy,
        gap=None if law.entropy is None else mean - law.entropy,
        factorized=law.factorized,
        uniform=law.dim * math.log(law.K),
        kind="estimate" if support is None else "exact",
        standard_error=error if support is None else 0.0,
        num_sequences=n,
        round_trip=failed == 0 if checked_all else None,
        num_checked=int(checked_all),
    )


def _round_trip(model: DflowModel, ids: Tensor, lengths: Tensor | None) -> tuple[int, bool]:
    """Rows of which the round trip was checked, and whether it failed."""
    if not len(ids):
        return 0, False
    verdict = model.round_trip(ids.to(model.device), None if lengths is None else lengths.to(model.device))
    return 0 if verdict is None else len(ids), verdict is False


def _nats(
    model: DflowModel,
    ids: Tensor,
    lengths: Tensor | None,
    batch_size: int,
    shown: bool,
    unit: str,
) -> Tensor:
    """Minus the log-likelihood of each row, float64 on the CPU."""
    parts = []
    with tqdm(total=len(ids), unit=unit, desc="score", delay=1, mininterval=1, disable=not shown) as bar:
        for start in range(0, len(ids), batch_size):
            rows = slice(start, start + batch_size)
            batch = None if lengths is None else lengths[rows].to(model.device)
            parts.append(-model.log_prob(ids[rows].to(model.device), batch).cpu().double())
            bar.update(len(parts[-1]))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _score(
    model: DflowModel,
    ids: Tensor,
    lengths: Tensor | None,
    characters: Tensor,
    batch_size: int,
    rank: int,
    world: int,
    shown: bool,
) -> list[float]:
    """Of this process's chunks: number, nats, characters, and their squares and product summed."""
    mine = slice(rank, None, world)
    own = None if lengths is None else lengths[mine]
    nats = _nats(model, ids[mine], own, batch_size, shown, "chunk")
    sizes = characters[mine].double()
    ones = torch.ones_like(nats)
    return torch.stack([ones, nats, sizes, nats**2, nats * sizes, sizes**2]).sum(1).tolist()


def _protocol(text: Text, length: int, limit: int | None) -> str:
    first = "" if limit is None else f"the first {limit:,} "
    if text.lengths is None:
        return f"{first}chunks of {length:,} symbols, each on its own, tail of {text.tail(length):,} dropped"
    return f"{first}sentences, each on its own with its length, {text.dropped:,} too long ones dropped"
