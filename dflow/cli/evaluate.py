"""``dflow evaluate``."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dflow.cli.flags import Verbs, flag, provided, refuse
from dflow.cli.shared import Machine, Results, complain, load_model, say_once, suit_threads
from dflow.cli.source import Source
from dflow.config import InputError

if TYPE_CHECKING:
    import torch

    from dflow.data import Corpus, ImageSet
    from dflow.evaluate import Evaluation, ExactEvaluation, ImageEvaluation, LabelScore, LawEvaluation

    #: Data, split, result, rows of the table, and why the result is not valid ("" where it is).
    Scored = tuple[Corpus | ImageSet, str, Any, list[tuple[str, str]], str]

FAILED = "the round trip failed; the figures above do not describe what it draws"


@dataclass(kw_only=True)
class Evaluate(Source, Machine, Results):
    """Measure bits of texts or images, exactly or by bounds.

    For a synthetic law it measures the distance from the law. For a classifier it measures accuracy, nll and
    calibration: those of the propagated law, of the network of its most probable signs, and of ensembles of
    networks drawn from it.

    A failed round trip ends with exit code 1.
    """

    model: str = flag("folder of the model")
    batch_size: int | None = flag(
        "number of chunks scored at a time (default: 32; of a law 1024, of images 100)", None
    )
    draws: int | None = flag("number of draws of the dequantizer for each image or row (default: 256)", None)
    precision: Literal["float64", "float32"] | None = flag(
        "precision in which models of images are computed: float64 (default), float32", None
    )
    seed: int | None = flag("seed of the draws of the dequantizer, or of networks (default: 0)", None)
    protocol: Literal["chunks", "rolling"] | None = flag(
        "how a text is scored: in chunks, each without the text before it (default), or rolling, each symbol "
        "given the text before it (transformer and lstm models)",
        None,
    )
    context: int | None = flag(
        "least number of symbols before each scored one under --protocol rolling, where there are as many "
        "(default: half of the model's length)",
        None,
    )
    adapt: bool | None = flag(
        "under --protocol rolling, let the counts of the model go on counting the text that has been scored",
        None,
    )


def evaluate(flags: Evaluate) -> int:
    """`dflow evaluate`; under ``accelerate launch`` the chunks are spread over the processes."""
    from dflow.hf import DflowClassifier, DflowImageModel, DflowModel, kind_of

    kind = kind_of(flags.model)
    if kind is not DflowModel:
        refuse(
            flags,
            ("protocol", "context", "adapt"),
            f"is for models of text; {flags.model} is of another kind",
        )
    if kind is DflowClassifier:
        return evaluate_classifier(flags)
    device, accelerator = flags.processes()
    options: dict[str, Any] = {"limit": flags.limit, "progress": True, "accelerator": accelerator}
    score = score_pictures if kind is DflowImageModel else score_text
    data, split, result, rows, fault = score(flags, device, options)
    if accelerator is None or accelerator.is_main_process:
        rows = [("model", flags.model), *rows, *data_rows(flags, data, split)]
        flags.show(record(flags, data, split, result), rows, last_line=True)
    if accelerator is not None:
        accelerator.end_training()
    if fault:
        complain(f"{flags.model}: {fault}")
    return int(bool(fault))


def score_text(flags: Evaluate, device: torch.device, options: dict[str, Any]) -> Scored:
    """A model of text: its bits on a text, or its distance from a synthetic law."""
    from dflow.data import Draws, load
    from dflow.evaluate import evaluate as run
    from dflow.evaluate import evaluate_law

    refuse(
        flags,
        ("draws", "precision", "seed"),
        f"is for models of images or tables; {flags.model} is one of text",
    )
    model, tokenizer = load_model(flags.model, device)
    corpus = load(flags.config(flags.model, model), tokenizer, model.config.length)
    split = flags.part(corpus, flags.model)
    text = corpus.split(split)
    options |= provided(flags, "batch_size")
    suit_threads(model, options.get("batch_size", 32))
    result: Evaluation | LawEvaluation
    if isinstance(text, Draws):
        refuse(
            flags,
            ("protocol", "context", "adapt"),
            f"is for texts; {corpus.name} is a law of whole sequences, with nothing before them",
        )
        result = evaluate_law(model, text, **options)
        rows = [*law_rows(result, corpus), ("round trip", verdict(result, "draws"))]
    else:
        result = run(model, text, **options, **provided(flags, "protocol", "context", "adapt"))
        chunks = "pieces" if flags.protocol == "rolling" else "chunks"
        rows = [
            ("text", f"{corpus.name}, {split}"),
            ("protocol", result.protocol),
            ("characters scored", f"{result.num_characters:,}{left_out(result, flags.limit)}"),
            ("symbols scored", f"{result.num_symbols:,} in {result.num_chunks:,} {chunks}"),
            ("bits a character", f"{result.bpc:.4f}"),
            ("standard error", figure(result.standard_error)),
            ("kind", result.kind),
            ("round trip", verdict(result, chunks)),
        ]
    return corpus, split, result, rows, FAILED if result.round_trip is False else ""


def score_pictures(flags: Evaluate, device: torch.device, options: dict[str, Any]) -> Scored:
    """A model of images or a table: its bits, or bounds of them."""
    import torch

    from dflow.data import load_images
    from dflow.evaluate import check_data, evaluate_exact, evaluate_images
    from dflow.hf import DflowImageModel, load
    from dflow.ops.devices import WITHOUT_FLOAT64

    model = load(flags.model, device, DflowImageModel)
    if model.exact:
        refuse(flags, ("draws", "seed"), f"is for bounds; {flags.model} has an exact likelihood")
    images = load_images(flags.images(flags.model), partial=True)
    check_data(model, images)
    split = flags.part(images, flags.model)
    options |= provided(flags, "batch_size", "draws", "seed") | {"unit": images.unit}
    suit_threads(model, options.get("batch_size", 100))
    if flags.precision is not None:
        options["precision"] = getattr(torch, flags.precision)
    elif device.type in WITHOUT_FLOAT64:
        say_once(f"note: scored on the CPU, in float64; --precision float32 scores on {device.type}")
    name = f"{images.name}, {split}"
    if model.exact:
        exact = evaluate_exact(model, images.split(split), **options)
        return images, split, exact, exact_rows(exact, name), FAILED if exact.round_trip is False else ""
    bounds = evaluate_images(model, images.split(split), **options)
    fault = "" if bounds.intact else "a draw left the cell of its datum; the figures above do not hold"
    return images, split, bounds, image_rows(bounds, name), fault


def evaluate_classifier(flags: Evaluate) -> int:
    """`dflow evaluate` of a classifier, on one process."""
    from dflow.data import load_images
    from dflow.evaluate import evaluate_labels
    from dflow.hf import DflowClassifier, load

    refuse(flags, ("draws", "precision"), f"is for models of images or tables; {flags.model} is a classifier")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a classifier is evaluated by one process; run dflow without a launcher")
    model = load(flags.model, flags.settle(), DflowClassifier)
    images = load_images(flags.images(flags.model))
    split = flags.part(images, flags.model)
    options = provided(flags, "batch_size", "seed") | {"limit": flags.limit}
    result = evaluate_labels(model, images.split(split), images.train, progress=True, **options)
    flags.show(
        record(flags, images, split, result),
        [
            ("model", flags.model),
            ("data", f"{images.name}, {split}: {result.num_rows:,} images"),
            ("estimated on", f"{result.num_estimated:,} training images"),
        ],
        [("network", "accuracy %", "standard error", "nll (nats)", "ece %"), *map(label_row, result.scores)],
        last_line=True,
    )
    return 0


def record(flags: Evaluate, data: Corpus | ImageSet, split: str, result: Any) -> dict[str, Any]:
    """The JSON document of an evaluation."""
    about = {"model": flags.model, "data": data.name, "split": split, "checksum": data.checksum}
    return about | dataclasses.asdict(result)


def left_out(result: Evaluation, limit: int | None) -> str:
    """How many characters of a text are not scored, and why."""
    if not result.num_left:
        return ", all of them"
    what = next(word for word in ("chunks", "sentences", "lines") if word in result.protocol)
    reason = "behind the last whole chunk" if what == "chunks" else f"in {what} that are too long"
    return f"; {result.num_left:,} left out, {reason if limit is None else 'beyond the limit'}"


def data_rows(flags: Evaluate, data: Corpus | ImageSet, split: str) -> list[tuple[str, str]]:
    """Lines of the table on what the model was trained on, and on how the data were read."""
    from dflow.data import dealt
    from dflow.hf import split_calls

    about = dealt.read(split_calls(flags.model)[0])
    rows = []
    if about is not None:
        [train, *_] = dealt.lines(about)
        rows.append(("trained on", f"{about['name']}, {train.strip()}"))
    if split == "all" and flags.trained_on(data, flags.model):
        rows.append(("note", "all splits are scored, also what the model was trained on"))
    return rows + [("note", note) for note in data.notes]


def verdict(result: Evaluation | LawEvaluation | ExactEvaluation, checked: str) -> str:
    """What the round trip came to, in words."""
    if result.round_trip is None:
        return "not checked: the law has no steps (see dflow.distributions.Stepwise)"
    return f"{'intact' if result.round_trip else 'FAILED'} on {result.num_checked} {checked}"


def exact_rows(result: ExactEvaluation, name: str) -> list[tuple[str, str]]:
    """Lines of the table for images under an exact likelihood."""
    return [
        ("data", f"{name}: {result.num_rows:,} rows"),
        ("unit", result.unit),
        ("nll", f"{figure(result.nll)} (standard error {figure(result.nll_error)})"),
        ("kind", f"{result.kind}, {result.precision}"),
        ("round trip", verdict(result, "rows")),
    ]


def image_rows(result: ImageEvaluation, name: str) -> list[tuple[str, str]]:
    """Lines of the table for images."""
    few = result.ess < _FEW_DRAWS < result.draws
    rows = [
        ("data", f"{name}: {result.num_rows:,} rows"),
        ("unit", result.unit),
        ("vi", f"{figure(result.vi)} (standard error {figure(result.vi_error)})"),
        ("nll", f"{figure(result.nll)} (standard error {figure(result.nll_error)})"),
        ("KL(q, p)", figure(result.kl)),
        ("effective draws", f"{result.ess:.1f} of {result.draws:,}" + ", few: nll may lie too low" * few),
        ("kind", f"{result.kind}, {result.precision}"),
    ]
    if result.exact is not None:
        rows.insert(5, ("exact", figure(result.exact)))
    return [*rows, ("cells", "intact" if result.intact else "FAILED")]


def label_row(score: LabelScore) -> tuple[str, ...]:
    """The line of the table for a network that gives labels."""
    percentages = [f"{100 * share:.2f}" for share in (score.accuracy, score.accuracy_error, score.ece)]
    return score.name, percentages[0], percentages[1], f"{score.nll:.4f}", percentages[2]


#: Effective draws under which an importance-weighted bound depends on the luck of a few.
_FEW_DRAWS = 10


def figure(value: float | None) -> str:
    """A number with four digits; a dash for None."""
    return "-" if value is None else f"{value:.4f}"


def law_rows(result: LawEvaluation, corpus: Corpus) -> list[tuple[str, str]]:
    """Lines of the table for a law."""
    exact = result.kind == "exact"
    scored = "all {:,} outcomes, weighted" if exact else "{:,} draws that no training has seen"
    return [
        ("law", f"{corpus.name}: {corpus.law!r}"),
        ("scored", scored.format(result.num_sequences)),
        ("nats a sequence", figure(result.nats)),
        ("bits an entry", figure(result.bits)),
        ("standard error", "0 (exact)" if exact else f"{figure(result.standard_error)} nats"),
        ("entropy", f"{figure(result.entropy)} nats"),
        ("gap (KL)", f"{figure(result.gap)} nats"),
        ("independent entries", f"{figure(result.factorized)} nats"),
        ("uniform", f"{figure(result.uniform)} nats"),
        ("kind", result.kind),
    ]


VERBS: Verbs = (
    ("evaluate", Evaluate, evaluate, "dflow evaluate --model runs/grouped --data text8 --split test"),
)
