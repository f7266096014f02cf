"""Several models, one table: exact bits, network calls, speed, and ratios to a baseline."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflow.bijectors import Autoregressive
from dflow.compare import results
from dflow.compare.peers import Codec
from dflow.compare.runner import CodecRow, Runner
from dflow.compare.texts import LongTexts, check_texts, compare_texts, texts_markdown
from dflow.compare.timing import Contestant, Speed, thread_count, timed
from dflow.config import InputError
from dflow.distributions import SequenceCategorical, Walk
from dflow.evaluate import Evaluation, Protocol, evaluate
from dflow.flows import Flow, Split
from dflow.models import TextModel
from dflow.models.counts import count_bytes
from dflow.plot import Curve, frontier, short_names

#: Laws that draw symbols themselves, and no more than are asked for.
_Symbols = (SequenceCategorical, Walk)

FILES = ("compare.json", "compare.md", "compare.png")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: of the model.
        family: of the model.
        num_parameters: trained numbers.
        count_bytes: bytes of the counts of its training text; 0 where it reads none.
        evaluation: exact bits, with protocol.
        num_calls: sequential network calls to draw one sample; where they depend on the sample, measured: the
            mean over as many draws as rounds, rounded.
        accepted: drafted symbols that were right, a call, where another model drafts; else None.
        latency_ms: from the call of `generate` for one sample to its symbols on the CPU; median.
        latency_threads: the number of threads at which that is least.
        characters_per_second: drawn in batches of `Comparison.batch_size`; median.
        throughput_threads: the number of threads at which that is largest.
        latency_ratio: how many times less the latency is than the reference's.
        throughput_ratio: how many times more characters a second than the reference.
    """

    name: str
    family: str
    num_parameters: int
    count_bytes: int
    evaluation: Evaluation
    num_calls: int
    latency_ms: float
    latency_threads: int
    characters_per_second: float
    throughput_threads: int
    latency_ratio: float
    throughput_ratio: float
    accepted: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The table, with what is needed to read it; all models are scored by one protocol."""

    environment: dict[str, str | int]
    text: str
    protocol: Protocol
    length: int
    batch_size: int
    rounds: int
    reference: str
    rows: tuple[Row, ...]
    #: Texts longer than all models draw together, where such a length is asked for.
    texts: LongTexts | None = None
    #: Compressors that have read the training text, on the same characters as the model that scored most.
    compressors: tuple[CodecRow, ...] = ()


def compare(
    contestants: Sequence[Contestant],
    *,
    length: int | None = None,
    batch_size: int = 100,
    rounds: int = 10,
    limit: int | None = None,
    text: str | None = None,
    score_batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
    protocol: Protocol = "chunks",
) -> Comparison:
    """Score every model on the text, then time them all by turns.

    A round times each model once at each number of threads (one, and all that torch has), so whatever drifts
    hits all alike; of the medians over the rounds the better counts. The reference of the ratios is the first
    baseline (an LSTM), or the first model where there is no baseline.

    Args:
        contestants: the models.
        length: symbols a sample; default the longest that all can draw together. A larger one is that of a
            text, which is measured beside samples of the default length: see `compare_texts`.
        batch_size: samples drawn together where characters a second are measured.
        rounds: for the latency; half as many (at least 3) for characters a second.
        limit: score the first ``limit`` chunks only.
        text: what the text is called in the table and the plot; default the name of the split.
        score_batch_size: chunks a pass.
        seed: of the draws.
        progress: show bars on stderr.
        protocol: of `dflow.evaluate.evaluate`, for all models; "rolling" with its default context.

    Raises:
        InputError: no model, two of one name, an argument outside its range, or a length or protocol that
            one of them cannot be drawn or scored by.
    """
    length, text_length = _check(contestants, length, batch_size, rounds)
    options: dict[str, Any] = {"limit": limit, "progress": progress, "protocol": protocol}
    scores = _scores(contestants, batch_size=score_batch_size, **options)
    latencies = measure(contestants, 1, length, rounds, seed, progress)
    batches = latencies
    if batch_size > 1:
        batches = measure(contestants, batch_size, length, max(3, rounds // 2), seed, progress)
    reference = next((i for i, c in enumerate(contestants) if c.model.config.record.baseline), 0)
    calls = [drawing(c.model, length, rounds, seed) for c in contestants]
    texts = text_length and compare_texts(contestants, text_length, reference, rounds, seed, progress)
    return Comparison(
        environment(contestants[0].model.device),
        contestants[0].text.name if text is None else text,
        protocol,
        length,
        batch_size,
        rounds,
        contestants[reference].name,
        _rows(contestants, scores, calls, latencies, batches, reference),
        texts or None,
    )


def with_compressors(comparison: Comparison, text: str, primed: Sequence[Codec[bytes]]) -> Comparison:
    """The comparison with rows of bits for compressors that have read the training text.

    Each compresses all characters that the models have scored as one file, which is opened and compared.

    Args:
        comparison: of models that score one stream of characters.
        text: what they scored, or a text that begins so.
        primed: see `dflow.compare.primed`.
    """
    text = text[: round(max(map(_characters, comparison.rows)))]
    data, rows = text.encode(), []
    for codec in primed:
        runner = Runner.of(codec, "together", [data])
        runner.attempt()
        rows.append(runner.finish(len(data), len(text)))
    return replace(comparison, compressors=tuple(rows))


def _scores(contestants: Sequence[Contestant], **options: Any) -> list[Evaluation]:
    """The evaluation of each model; one that is drawn in two ways is scored once."""
    scores: dict[int, Evaluation] = {}
    for c in contestants:
        if id(c.model.law) not in scores:
            scores[id(c.model.law)] = evaluate(c.model, c.text, **options)
    return [scores[id(c.model.law)] for c in contestants]


def _rows(
    contestants: Sequence[Contestant],
    scores: Sequence[Evaluation],
    calls: Sequence[tuple[int, float | None]],
    latencies: Sequence[Speed],
    batches: Sequence[Speed],
    reference: int,
) -> tuple[Row, ...]:
    """The table, from what was measured of each model."""
    rates = [speed.characters / speed.seconds for speed in batches]
    return tuple(
        Row(
            name=c.name,
            family=c.model.config.family,
            num_parameters=sum(p.numel() for p in c.model.parameters()),
            count_bytes=count_bytes(c.model),
            evaluation=scores[i],
            num_calls=calls[i][0],
            accepted=calls[i][1],
            latency_ms=1e3 * latencies[i].seconds,
            latency_threads=latencies[i].threads,
            characters_per_second=rates[i],
            throughput_threads=batches[i].threads,
            latency_ratio=latencies[reference].seconds / latencies[i].seconds,
            throughput_ratio=rates[i] / rates[reference],
        )
        for i, c in enumerate(contestants)
    )


def _check(
    contestants: Sequence[Contestant], length: int | None, batch_size: int, rounds: int
) -> tuple[int, int | None]:
    """The length of samples, and that of texts; `InputError` as of `compare`."""
    if not contestants:
        raise InputError("name at least one model to compare")
    names = [c.name for c in contestants]
    if len(set(names)) < len(names):
        raise InputError(f"two models have one name among {', '.join(names)}; give different folders")
    for what, value in (("batch size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{what} {value} must be at least 1")
    shortest = min(contestants, key=lambda c: c.model.config.length)
    longest: int = shortest.model.config.length
    if length is not None and length > longest:
        check_texts(contestants, length)
        return longest, length
    length = longest if length is None else length
    if length < 1:
        raise InputError(f"length {length}: {shortest.name} draws sequences of 1 to {longest} symbols")
    return length, None


def drawing(model: TextModel, length: int, rounds: int = 1, seed: int = 0) -> tuple[int, float | None]:
    """`num_calls`, and where another model drafts its symbols that are accepted a call, as of `Row`."""
    if model.tally is None:
        return num_calls(model, length, rounds, seed), None
    calls = accepted = 0
    for r in range(rounds):
        model.tally.clear()
        model.generate(1, length=length, generator=torch.Generator(model.device).manual_seed(seed + r))
        calls, accepted = calls + sum(model.tally.calls.values()), accepted + model.tally.accepted
    return round(calls / rounds), accepted / calls


def num_calls(model: TextModel, length: int, rounds: int = 1, seed: int = 0) -> int:
    """Network calls for a sample of ``length`` symbols: a law that draws symbols stops where it has them.

    An inversion takes as many as the sample needs: they are counted, over ``rounds`` draws of one.
    """
    layers = [m for m in model.modules() if isinstance(m, Autoregressive)]
    counted = 0.0
    if layers:
        before = sum(layer.calls for layer in layers)
        for r in range(rounds):
            model.generate(1, length=length, generator=torch.Generator(model.device).manual_seed(seed + r))
        counted = (sum(layer.calls for layer in layers) - before) / rounds
    base = model.law
    if isinstance(base, _Symbols):
        return base.needed(length)
    if model.config.record.left_to_right and not isinstance(base, (Flow, Split)):
        return min(model.num_calls, length)
    while isinstance(base, (Flow, Split)):
        base = base.base
    calls = model.num_calls - sum(layer.num_calls for layer in layers)
    if isinstance(base, _Symbols) and model.config.explicit_length:
        # Under a flow all entries are drawn, but those that are absent.
        calls += base.needed(length) - base.num_calls
    return round(calls + counted)


def measure(
    contestants: Sequence[Contestant], batch_size: int, length: int, rounds: int, seed: int, progress: bool
) -> list[Speed]:
    """Time draws of ``batch_size`` samples; see `dflow.compare.timing.timed`."""

    def draw(contestant: Contestant, generator: torch.Generator) -> Tensor:
        return contestant.model.generate(batch_size, length=length, generator=generator)

    return timed(contestants, draw, rounds, seed, f"time, batch {batch_size}" if progress else None)


def environment(device: torch.device) -> dict[str, str | int]:
    """What the speeds depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:  # not Linux
            lines = []
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": f"{device.type} ({name})",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def markdown(comparison: Comparison) -> str:
    """The table in Markdown, with a line on the environment and one on how to read it."""
    drafts = any(row.accepted is not None for row in comparison.rows)
    head = [
        "model",
        "parameters",
        f"bits/char (exact, {comparison.protocol})",
        "network calls",
        *(["accepted a call"] if drafts else []),
        "latency, batch 1 (ms)",
        f"chars/s, batch {comparison.batch_size}",
        "latency ratio",
        "chars/s ratio",
    ]
    rows = []
    for row in comparison.rows:
        e = row.evaluation
        error = "" if e.standard_error is None else f" ± {e.standard_error:.4f}"
        rows.append(
            [
                row.name,
                _size(row),
                f"{e.bpc:.4f}{error}",
                f"{row.num_calls:,}",
                *(["" if row.accepted is None else f"{row.accepted:.2f}"] if drafts else []),
                f"{row.latency_ms:.2f} ({thread_count(row.latency_threads)})",
                f"{row.characters_per_second:,.0f} ({thread_count(row.throughput_threads)})",
                f"{row.latency_ratio:.2f}x",
                f"{row.throughput_ratio:.2f}x",
            ]
        )
    for codec in comparison.compressors:
        bits = codec.error if codec.bits is None else f"{codec.bits:.4f}"
        rows.append([f"{codec.name} {codec.settings}", "", str(bits), *[""] * (len(head) - 3)])
    protocols: dict[str, list[str]] = {}
    for row in comparison.rows:
        e = row.evaluation
        protocols.setdefault(f"{e.protocol}; {e.num_symbols:,} symbols scored", []).append(row.name)
    notes = [
        results.environment_note(comparison.environment),
        f"Bits: {comparison.text}. "
        + " ".join(f"{', '.join(names)}: {protocol}." for protocol, names in protocols.items()),
        f"Speed: samples of {comparison.length:,} symbols, median of {comparison.rounds} rounds at batch 1, "
        "models by turns, each at its better number of threads. "
        f"Ratios: to {comparison.reference}; above 1 is faster.",
    ]
    if comparison.compressors:
        notes.append(
            "Compressors have read the training text, and all of the scored text before a character: bits of "
            "one file, decoded and compared."
        )
    failed = [row.name for row in comparison.rows if row.evaluation.round_trip is False]
    if failed:
        notes.append(f"ROUND TRIP FAILED, do not trust: {', '.join(failed)}.")
    unchecked = [row.name for row in comparison.rows if row.evaluation.round_trip is None]
    if unchecked:
        notes.append(f"Round trip not checked: {', '.join(unchecked)}.")
    table = results.document(head, 1, rows, notes)
    return table if comparison.texts is None else f"{table}\n{texts_markdown(comparison.texts)}"


def _size(row: Row) -> str:
    """The parameters of a model, and its counts where it has any."""
    counts = f" + {row.count_bytes / 1000**2:,.1f} MB of counts" if row.count_bytes else ""
    return f"{row.num_parameters:,}{counts}"


def record(comparison: Comparison) -> str:
    """The comparison as one line of JSON."""
    return results.record(comparison)


def plot(comparison: Comparison) -> bytes:
    """Bits against network calls and against latency, as a PNG; a line joins the budgets of one model.

    Hollow points are of models that were scored on a smaller part of the text than others.
    """
    models: dict[str, list[Row]] = {}
    for row in sorted(comparison.rows, key=lambda row: row.num_calls):
        name, _, calls = row.name.rpartition("@")
        models.setdefault(name if name and calls.isdigit() else row.name, []).append(row)
    # The tails that models of other lengths drop differ by less than a part that was left out on purpose.
    most = max(_characters(row) for row in comparison.rows)
    names = short_names(list(models))
    curves = [
        Curve(
            names[name],
            [row.num_calls for row in rows],
            [row.evaluation.bpc for row in rows],
            [row.evaluation.standard_error or 0.0 for row in rows],
            [row.latency_ms for row in rows],
            [_characters(row) < 0.95 * most for row in rows],
        )
        for name, rows in models.items()
    ]
    best = min((codec for codec in comparison.compressors if codec.bits), key=_bits, default=None)
    line = None if best is None else (f"{best.name}, primed", _bits(best))
    return frontier(curves, f"{comparison.text}, {comparison.protocol}", comparison.length, line)


def _bits(codec: CodecRow) -> float:
    return codec.bits or math.inf


def _characters(row: Row) -> float:
    return row.evaluation.num_symbols * row.evaluation.characters_per_symbol


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds results already: see `dflow.compare.results.check`."""
    results.check(folder, FILES)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write table, figures and plot into a folder; each file whole or not at all."""
    contents = [(record(comparison) + "\n").encode(), markdown(comparison).encode(), plot(comparison)]
    return results.write(folder, dict(zip(FILES, contents, strict=True)))
