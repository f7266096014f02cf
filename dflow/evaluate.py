"""Exact bits a character of a model on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from dflow.config import InputError
from dflow.data import Text
from dflow.hf import DflowModel


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
        characters_per_symbol: 1 where the symbols are characters.
        round_trip: whether what is scored is what is drawn, on `num_checked` chunks.
        num_checked: chunks that went through the round trip.
    """

    bpc: float
    standard_error: float | None
    kind: str
    protocol: str
    num_symbols: int
    num_chunks: int
    characters_per_symbol: float
    round_trip: bool
    num_checked: int


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

    .. math:: \mathrm{bpc} = \frac{-\sum_c \log_2 p(x_c)}{\sum_c n_c \cdot \text{characters a symbol}}

    with n_c the symbols of chunk c; in the sentence protocol a chunk is a sentence, log p(x_c) includes its
    length, and n_c counts its end. The sum is in float64. The standard error is that of a ratio of means
    (Cochran 1977, Sampling Techniques, section 2.11).

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
    ids, lengths = text.chunks(length)
    if limit is not None:
        ids, lengths = ids[:limit], None if lengths is None else lengths[:limit]
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    shown = progress and rank == 0
    mode = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            moments = _score(model, ids, lengths, batch_size, rank, world, shown)
            mine = slice(rank, min(len(ids), checks * world), world)
            checked = len(ids[mine])
            intact = checked == 0 or model.round_trip(
                ids[mine].to(model.device), None if lengths is None else lengths[mine].to(model.device)
            )
    finally:
        model.train(mode)
    totals = torch.tensor([*moments, checked, not intact], dtype=torch.float64)
    if accelerator is not None and world > 1:
        totals = accelerator.reduce(totals.to(accelerator.device), "sum")
    chunks, nats, symbols, squares, products, sizes, checked_all, failed = totals.tolist()
    if not math.isfinite(nats):
        raise InputError(
            f"the model's likelihood of the {text.name} text is not finite; its training diverged or its "
            "checkpoint is damaged"
        )
    rate = nats / symbols
    residuals = max(0.0, squares - 2 * rate * products + rate**2 * sizes)
    error = math.sqrt(residuals * chunks / (chunks - 1)) / symbols if chunks > 1 else None
    unit = math.log(2) * text.characters_per_symbol
    return Evaluation(
        bpc=rate / unit,
        standard_error=None if error is None else error / unit,
        kind="exact",
        protocol=_protocol(text, length, limit),
        num_symbols=int(symbols),
        num_chunks=int(chunks),
        characters_per_symbol=text.characters_per_symbol,
        round_trip=failed == 0,
        num_checked=int(checked_all),
    )


def _score(
    model: DflowModel,
    ids: Tensor,
    lengths: Tensor | None,
    batch_size: int,
    rank: int,
    world: int,
    shown: bool,
) -> list[float]:
    """Of this process's chunks: number, nats, symbols, and their squares and product summed."""
    sums = torch.zeros(6, dtype=torch.float64)
    mine = torch.arange(rank, len(ids), world)
    with tqdm(total=len(mine), unit="chunk", desc="score", delay=1, mininterval=1, disable=not shown) as bar:
        for rows in mine.split(batch_size):
            batch = None if lengths is None else lengths[rows].to(model.device)
            nats = -model.log_prob(ids[rows].to(model.device), batch).cpu().double()
            sizes = torch.full_like(nats, ids.shape[1]) if lengths is None else lengths[rows].double() + 1
            ones = torch.ones_like(nats)
            sums += torch.stack([ones, nats, sizes, nats**2, nats * sizes, sizes**2]).sum(1)
            bar.update(len(rows))
    return sums.tolist()


def _protocol(text: Text, length: int, limit: int | None) -> str:
    first = "" if limit is None else f"the first {limit:,} "
    if text.lengths is None:
        return f"{first}chunks of {length:,} symbols, each on its own, tail of {text.tail(length):,} dropped"
    return f"{first}sentences, each on its own with its length, {text.dropped:,} too long ones dropped"
