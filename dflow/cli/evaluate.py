"""``dflow evaluate``."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dflow.cli.flags import Verbs, flag
from dflow.cli.shared import Machine, Results, complain, load_model
from dflow.cli.source import Source
from dflow.config import InputError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from dflow.data import Corpus, ImageSet
    from dflow.evaluate import Evaluation, ExactEvaluation, ImageEvaluation, LawEvaluation


@dataclass(kw_only=True)
class Evaluate(Source, Machine, Results):
    """Exact bits of a model on a text or images, or bounds of them.

    Of a synthetic law the distance from it. Of a classifier accuracy, nll and calibration: of the propagated
    law, of the network of its most probable signs, and of ensembles of networks drawn from it.

    A failed round trip ends with exit code 1.
    """

    model: str = flag("folder of the model")
    batch_size: int | None = flag("chunks scored at a time (default: 32; of a law 1024, images 100)", None)
    draws: int | None = flag("draws of the dequantizer for each image or row (default: 256)", None)
    precision: Literal["float64", "float32"] | None = flag(
        "in which models of images are computed: float64 (default), float32", None
    )
    seed: int | None = flag("seed of the draws of the dequantizer, or of networks (default: 0)", None)


def evaluate(flags: Evaluate) -> int:
    """`dflow evaluate`; under ``accelerate launch`` the chunks are spread over the processes."""
    from dflow.data import Draws, load
    from dflow.evaluate import evaluate as run
    from dflow.evaluate import evaluate_law
    from dflow.hf import DflowClassifier, DflowImageModel, kind_of

    if kind_of(flags.model) is DflowClassifier:
        return evaluate_classifier(flags)
    device, accelerator = flags.processes()
    if kind_of(flags.model) is DflowImageModel:
        return evaluate_pictures(flags, device, accelerator)
    for name in ("draws", "precision", "seed"):
        if getattr(flags, name) is not None:
            raise InputError(f"--{name} is for models of images or tables; {flags.model} is one of text")
    model, tokenizer = load_model(flags.model, device)
    corpus = load(flags.config(flags.model, model), tokenizer)
    split = flags.part(corpus, flags.model)
    text = corpus.split(split)
    options: dict[str, Any] = {"progress": True, "limit": flags.limit, "accelerator": accelerator}
    if flags.batch_size is not None:
        options["batch_size"] = flags.batch_size
    result: Evaluation | LawEvaluation
    if isinstance(text, Draws):
        result = evaluate_law(model, text, **options)
        rows = law_rows(result, corpus)
    else:
        result = run(model, text, **options)
        rows = [
            ("text", f"{corpus.name}, {split}"),
            ("protocol", result.protocol),
            ("characters scored", f"{result.num_characters:,}{left_out(result, flags.limit)}"),
            ("symbols scored", f"{result.num_symbols:,} in {result.num_chunks:,} chunks"),
            ("bits a character", f"{result.bpc:.4f}"),
            ("standard error", told(result.standard_error)),
            ("kind", result.kind),
        ]
    checked = "draws" if isinstance(text, Draws) else "chunks"
    rows = [("model", flags.model), *rows, ("round trip", verdict(result, checked))]
    rows += data_rows(flags, corpus, split)
    if accelerator is None or accelerator.is_main_process:
        about = {"model": flags.model, "data": corpus.name, "split": split, "checksum": corpus.checksum}
        flags.show(about | dataclasses.asdict(result), rows, last_line=True)
    if accelerator is not None:
        accelerator.end_training()
    if result.round_trip is False:
        complain(f"{flags.model}: the round trip failed; the figures above do not describe what it draws")
        return 1
    return 0


def left_out(result: Evaluation, limit: int | None) -> str:
    """How many characters of a text are not scored, and why."""
    if not result.num_left:
        return ", all of them"
    reason = (
        "behind the last whole chunk" if "chunks" in result.protocol else "in sentences that are too long"
    )
    return f"; {result.num_left:,} left out, {reason if limit is None else 'beyond the limit'}"


def data_rows(flags: Evaluate, data: Corpus | ImageSet, split: str) -> list[tuple[str, str]]:
    """Lines of the table on what the model was trained on, and on how the data were read."""
    from dflow.data import dealt
    from dflow.hf import split_calls

    kept = dealt.read(split_calls(flags.model)[0])
    rows = []
    if kept is not None:
        [train, *_] = dealt.lines(kept)
        rows.append(("trained on", f"{kept['name']}, {train.strip()}"))
    if split == "all" and flags.trained_on(data, flags.model):
        rows.append(("note", "all splits are scored, also what the model was trained on"))
    return rows + [("note", note) for note in data.notes]


def evaluate_classifier(flags: Evaluate) -> int:
    """`dflow evaluate` of a classifier, on one process."""
    from dflow.data import load_images
    from dflow.evaluate import evaluate_labels
    from dflow.hf import DflowClassifier, load

    for name in ("draws", "precision"):
        if getattr(flags, name) is not None:
            raise InputError(f"--{name} is for models of images or tables; {flags.model} is a classifier")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a classifier is evaluated by one process; run dflow without a launcher")
    model = load(flags.model, flags.settle(), DflowClassifier)
    images = load_images(flags.images(flags.model))
    split = flags.part(images, flags.model)
    options: dict[str, Any] = {
        n: getattr(flags, n) for n in ("batch_size", "seed") if getattr(flags, n) is not None
    }
    result = evaluate_labels(
        model, images.split(split), images.train, limit=flags.limit, progress=True, **options
    )
    about = {"model": flags.model, "data": images.name, "split": split, "checksum": images.checksum}
    flags.show(
        about | dataclasses.asdict(result),
        [
            ("model", flags.model),
            ("data", f"{images.name}, {split}: {result.num_rows:,} images"),
            ("estimated on", f"{result.num_estimated:,} training images"),
        ],
        [
            ("network", "accuracy %", "standard error", "nll (nats)", "ece %"),
            *(
                (
                    s.name,
                    f"{100 * s.accuracy:.2f}",
                    f"{100 * s.accuracy_error:.2f}",
                    f"{s.nll:.4f}",
                    f"{100 * s.ece:.2f}",
                )
                for s in result.scores
            ),
        ],
        last_line=True,
    )
    return 0


def evaluate_pictures(flags: Evaluate, device: torch.device, accelerator: Accelerator | None) -> int:
    """`dflow evaluate` of a model of images or a table."""
    import torch

    from dflow.data import load_images
    from dflow.evaluate import check_data, evaluate_exact, evaluate_images
    from dflow.hf import DflowImageModel, load

    model = load(flags.model, device, DflowImageModel)
    names = ["batch_size"]
    if not model.exact:
        names += ["draws", "seed"]
    elif flags.draws is not None or flags.seed is not None:
        raise InputError(f"--draws and --seed are for bounds; {flags.model} has an exact likelihood")
    images = load_images(flags.images(flags.model), partial=True)
    check_data(model, images)
    split = flags.part(images, flags.model)
    options: dict[str, Any] = {n: getattr(flags, n) for n in names if getattr(flags, n) is not None}
    if flags.precision is not None:
        options["precision"] = getattr(torch, flags.precision)
    options |= {"unit": images.unit, "limit": flags.limit, "progress": True, "accelerator": accelerator}
    result: ExactEvaluation | ImageEvaluation
    if model.exact:
        result = evaluate_exact(model, images.split(split), **options)
        rows, sound = exact_rows(result, images.name, split), result.round_trip is not False
        wrong = "the round trip failed; the figures above do not describe what it draws"
    else:
        result = evaluate_images(model, images.split(split), **options)
        rows, sound = image_rows(result, images.name, split), result.intact
        wrong = "a draw left the cell of its datum; the figures above do not hold"
    if accelerator is None or accelerator.is_main_process:
        about = {"model": flags.model, "data": images.name, "split": split, "checksum": images.checksum}
        flags.show(
            about | dataclasses.asdict(result),
            [("model", flags.model), *rows, *data_rows(flags, images, split)],
            last_line=True,
        )
    if accelerator is not None:
        accelerator.end_training()
    if not sound:
        complain(f"{flags.model}: {wrong}")
        return 1
    return 0


def verdict(result: Evaluation | LawEvaluation | ExactEvaluation, checked: str) -> str:
    """What the round trip came to, in words."""
    if result.round_trip is None:
        return "not checked: the law has no steps (see dflow.distributions.Stepwise)"
    return f"{'intact' if result.round_trip else 'FAILED'} on {result.num_checked} {checked}"


def exact_rows(result: ExactEvaluation, name: str, split: str) -> list[tuple[str, str]]:
    """Lines of the table for images under an exact likelihood."""
    return [
        ("data", f"{name}, {split}: {result.num_rows:,} rows"),
        ("unit", result.unit),
        ("nll", f"{told(result.nll)} (standard error {told(result.nll_error)})"),
        ("kind", f"{result.kind}, {result.precision}"),
        ("round trip", verdict(result, "rows")),
    ]


def image_rows(result: ImageEvaluation, name: str, split: str) -> list[tuple[str, str]]:
    """Lines of the table for images."""
    few = result.ess < _FEW_DRAWS < result.draws
    rows = [
        ("data", f"{name}, {split}: {result.num_rows:,} rows"),
        ("unit", result.unit),
        ("vi", f"{told(result.vi)} (standard error {told(result.vi_error)})"),
        ("nll", f"{told(result.nll)} (standard error {told(result.nll_error)})"),
        ("KL(q, p)", told(result.kl)),
        ("effective draws", f"{result.ess:.1f} of {result.draws:,}" + ", few: nll may lie too low" * few),
        ("kind", f"{result.kind}, {result.precision}"),
    ]
    if result.exact is not None:
        rows.insert(5, ("exact", told(result.exact)))
    return [*rows, ("cells", "intact" if result.intact else "FAILED")]


#: Effective draws under which an importance-weighted bound hangs on the luck of a few.
_FEW_DRAWS = 10


def told(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def law_rows(result: LawEvaluation, corpus: Corpus) -> list[tuple[str, str]]:
    """Lines of the table for a law."""
    exact = result.kind == "exact"
    scored = "all {:,} outcomes, weighted" if exact else "{:,} draws that no training has seen"
    return [
        ("law", f"{corpus.name}: {corpus.law!r}"),
        ("scored", scored.format(result.num_sequences)),
        ("nats a sequence", told(result.nats)),
        ("bits an entry", told(result.bits)),
        ("standard error", "0 (exact)" if exact else f"{told(result.standard_error)} nats"),
        ("entropy", f"{told(result.entropy)} nats"),
        ("gap (KL)", f"{told(result.gap)} nats"),
        ("independent entries", f"{told(result.factorized)} nats"),
        ("uniform", f"{told(result.uniform)} nats"),
        ("kind", result.kind),
    ]


VERBS: Verbs = (
    ("evaluate", Evaluate, evaluate, "dflow evaluate --model runs/grouped --data text8 --split test"),
)
