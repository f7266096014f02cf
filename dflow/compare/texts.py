"""Texts longer than a model draws together: what drawing one takes, of time and of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dflow.compare import results
from dflow.compare.timing import Contestant, evaluating, thread_count, timed
from dflow.config import InputError
from dflow.core import Context
from dflow.distributions.documents import Documents
from dflow.models import prompted
from dflow.ops.live import TensorMemory


@dataclass(frozen=True)
class TextRow:
    """What drawing one text takes.

    Attributes:
        name: of the model.
        milliseconds: from the call of `generate` to the symbols on the CPU; median.
        threads: the number of threads at which that is least.
        characters_per_second: those drawn behind the prompt; median.
        num_calls: sequential network calls for the text; one reads the symbols before a chunk.
        ratio: how many times more characters a second than the reference.
        memory: bytes of the tensors that are made for the text, those that exist together at the peak.
        memory_growth: by how many bytes that exceeds the peak of a text of `LongTexts.shorter` symbols.
    """

    name: str
    milliseconds: float
    threads: int
    characters_per_second: float
    num_calls: int
    ratio: float
    memory: int
    memory_growth: int


@dataclass(frozen=True)
class LongTexts:
    """The table of texts.

    Attributes:
        length: symbols of a text, the prompt among them.
        prompt: symbols of the prompt.
        shorter: symbols of the text whose memory is subtracted.
        rounds: of measuring.
        reference: the model to which ratios refer.
        rows: of the models.
    """

    length: int
    prompt: int
    shorter: int
    rounds: int
    reference: str
    rows: tuple[TextRow, ...]


def compare_texts(
    contestants: Sequence[Contestant],
    length: int,
    baseline: int,
    rounds: int,
    seed: int = 0,
    progress: bool = False,
) -> LongTexts:
    """Time, by turns, what ``dflow generate --prompt ... --length`` does for one text.

    The prompt is the beginning of the text that the models are scored on, as many symbols as the smallest
    context of the models. The reference is the first model that draws symbol by symbol from a cache (a
    causal Transformer): the plain loop; without one, the model of number ``baseline``.

    Args:
        contestants: models with a context.
        length: symbols of a text, the prompt among them.
        baseline: see above.
        rounds: half as many are timed, but at least 3 of them where there are.
        seed: of the draws.
        progress: show bars on stderr.

    Raises:
        InputError: a model without a context, a length that leaves nothing to draw behind the prompt, or a
            text that is shorter than the prompt.
    """
    before, documents = check_texts(contestants, length)
    rounds = min(rounds, max(3, rounds // 2))
    draw = partial(_draw, before, length)
    speeds = timed(contestants, draw, rounds, seed, f"time, {length:,} symbols" if progress else None)
    longest = max(int(c.model.config.length) for c in contestants)
    # Whole chunks shorter, so that both texts end with a chunk of one size.
    shorter = length - longest * max(0, (length - max(length // 4, before + longest)) // longest)
    records = [c.model.config.record for c in contestants]
    loops = [i for i, record in enumerate(records) if record.left_to_right and not record.recurrent]
    reference = loops[0] if loops else baseline
    rates = [speed.characters / speed.seconds for speed in speeds]
    rows = []
    for i, (c, law, speed) in enumerate(zip(contestants, documents, speeds, strict=True)):
        # The first draw leaves behind what models keep between draws, as plans of orders.
        _, at_shorter = (_memory(c, before, n, seed) for n in (shorter, shorter))
        if c.model.tally is not None:
            c.model.tally.clear()
        memory = _memory(c, before, length, seed)
        known = prompted(_prompt(c, before).to(c.model.device), 1)
        tally = c.model.tally
        rows.append(
            TextRow(
                name=c.name,
                milliseconds=1e3 * speed.seconds,
                threads=speed.threads,
                characters_per_second=rates[i],
                num_calls=tally.calls[0] if tally else law.needed(length, Context(known=known)),
                ratio=rates[i] / rates[reference],
                memory=memory,
                memory_growth=memory - at_shorter,
            )
        )
    return LongTexts(length, before, shorter, rounds, contestants[reference].name, tuple(rows))


def _prompt(contestant: Contestant, before: int) -> Tensor:
    return contestant.text.ids[:before].long()


def _draw(before: int, length: int, contestant: Contestant, generator: torch.Generator) -> Tensor:
    """One text, without its prompt."""
    prompt = _prompt(contestant, before)
    return contestant.model.generate(1, length=length, generator=generator, prompt=prompt)[:, before:]


def _memory(contestant: Contestant, before: int, length: int, seed: int) -> int:
    """Bytes at the peak of tensors that a draw makes."""
    generator = torch.Generator(contestant.model.device).manual_seed(seed)
    with torch.inference_mode(), evaluating([contestant]), TensorMemory() as memory:
        _draw(before, length, contestant, generator)
    peak: int = memory.peak
    return peak


def check_texts(contestants: Sequence[Contestant], length: int) -> tuple[int, list[Documents]]:
    """The symbols of the prompt, and the laws of texts of any length; `InputError` as of `compare_texts`."""
    laws = [c.model.documents for c in contestants]
    for c, law in zip(contestants, laws, strict=True):
        if law is None:
            raise InputError(
                f"length {length}: {c.name} draws sequences of 1 to {c.model.config.length} symbols; take a "
                "smaller length, or leave out models that were trained without a model.context"
            )
    documents = [law for law in laws if law is not None]
    before = min(law.context for law in documents)
    if length <= before:
        raise InputError(f"length {length}: the prompt has {before} symbols; take a larger length")
    if missing := [c.name for c in contestants if len(c.text.ids) < before]:
        raise InputError(
            f"length {length}: the prompt takes the first {before} symbols of the scored text, which has "
            f"fewer for {missing[0]}; give a longer text"
        )
    return before, documents


def texts_markdown(texts: LongTexts) -> str:
    """The table in Markdown, with a line on how to read it."""
    head = [
        f"model, text of {texts.length:,} symbols",
        "time, batch 1 (ms)",
        "chars/s",
        "network calls",
        "chars/s ratio",
        "memory (MB)",
        f"more than for {texts.shorter:,} symbols (MB)",
    ]
    rows = [
        [
            row.name,
            f"{row.milliseconds:,.1f} ({thread_count(row.threads)})",
            f"{row.characters_per_second:,.0f}",
            f"{row.num_calls:,}",
            f"{row.ratio:.2f}x",
            f"{row.memory / 1e6:.3f}",
            f"{row.memory_growth / 1e6:.3f}",
        ]
        for row in texts.rows
    ]
    note = (
        f"Texts: one of {texts.length:,} symbols, the first {texts.prompt:,} of the scored text as its "
        f"prompt, median of {texts.rounds} rounds, models by turns, each at its better number of threads. "
        f"Ratios: to {texts.reference}; above 1 is faster. Memory: tensors made for the text, at their peak, "
        "without the weights."
    )
    return results.document(head, 1, rows, [note])
