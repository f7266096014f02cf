"""``dflow compare``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dflow.cli.drafts import drafted
from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Machine, Results, load_model, show_comparison
from dflow.cli.source import Source
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.compare import Contestant
    from dflow.compare.peers import Codec
    from dflow.data import Corpus, Tokenizer


@dataclass(kw_only=True)
class Compare(Source, Machine, Results):
    """Compare bits, network calls and speed of several models.

    Where an LSTM is among them, the table has ratios to it. With a --length beyond that of the models, a
    second table has time and memory of one text of that length, drawn after a prompt by models with a
    context, as ratios to the first causal Transformer among them.
    """

    models: list[str] = argument("folders of the models")
    length: int | None = flag(
        "number of symbols of a drawn sample, or of a longer text that models with a context draw after the "
        "beginning of the scored text (default: the longest that all models draw at once)",
        None,
    )
    batch_size: int = flag("number of samples drawn together where characters a second are measured", 100)
    rounds: int = flag("number of rounds of measuring", 10)
    protocol: Literal["chunks", "rolling"] = flag(
        "how the text is scored by all models; see dflow evaluate", "chunks"
    )
    draft: str | None = flag(
        "folder of a faster model of the same alphabet, as one of family ngram, or counts, those of each "
        "model: each model that can take the drafts (transformer, lstm) has a second row, drawn with them",
        None,
    )
    prime: str | None = flag(
        "text that PPMd and zstd have read before, as a model has read its training text: a file, or train "
        "for the training part of the data; they get rows of bits",
        None,
    )
    output: str | None = flag("folder for compare.md, compare.json and compare.png", None, short="-o")


def compare(flags: Compare) -> int:
    """`dflow compare`."""
    from dflow import compare as comparing
    from dflow.compare.primed import primed_codecs
    from dflow.data import load

    folder = None if flags.output is None else Path(flags.output)
    if folder is not None:
        comparing.check_folder(folder)
    device = flags.settle()
    loaded = [load_model(name, device) for name in flags.models]
    config = flags.config(flags.models[0], loaded[0][0])
    # Lines that one of the models cannot score are scored by none of them.
    length = min(model.config.length for model, _ in loaded)
    corpora = [load(config, tokenizer, length) for _, tokenizer in loaded]
    split = flags.part(corpora[0], *flags.models)
    contestants = [
        comparing.Contestant(name.rstrip("/"), model, corpus.split(split))
        for name, (model, _), corpus in zip(flags.models, loaded, corpora, strict=True)
    ]
    if flags.draft is not None:
        contestants = with_drafts(contestants, [tokenizer for _, tokenizer in loaded], flags.draft)
    for note in corpora[0].notes:
        print(f"note: {note}", file=sys.stderr)
    primed: tuple[Codec[bytes], ...] = ()
    if flags.prime is not None:
        if contestants[0].text.lengths is not None:
            raise InputError(f"--prime {flags.prime}: compressors read one stream, and this text is in lines")
        primed = primed_codecs(_priming(flags.prime, corpora[0]))
    result = comparing.compare(
        contestants,
        length=flags.length,
        batch_size=flags.batch_size,
        rounds=flags.rounds,
        limit=flags.limit,
        text=f"{config.name}, {split}",
        protocol=flags.protocol,
        progress=True,
    )
    if primed:
        text = corpora[0].tokenizer.decode(contestants[0].text.ids)
        result = comparing.with_compressors(result, text, primed)
    show_comparison(flags, comparing, result, folder)
    return 0


def _priming(prime: str, corpus: Corpus) -> bytes:
    """The text that compressors are primed with.

    Raises:
        InputError: an empty text.
        OSError: no such file.
    """
    if prime == "train":
        text = corpus.tokenizer.decode(corpus.train.ids).encode()
    else:
        text = Path(prime).expanduser().read_bytes()
    if not text:
        raise InputError(f"--prime {prime}: an empty text")
    return text


def with_drafts(
    contestants: Sequence[Contestant], tokenizers: Sequence[Tokenizer], folder: str
) -> list[Contestant]:
    """The contestants, and behind each that can be drawn with drafts by the model in ``folder`` that one.

    Raises:
        InputError: no contestant can be drawn with these drafts.
    """
    rows: list[Contestant] = []
    refusals: list[InputError] = []
    for contestant, tokenizer in zip(contestants, tokenizers, strict=True):
        rows.append(contestant)
        try:
            model = drafted(contestant.model, tokenizer, folder)
        except InputError as error:
            refusals.append(error)
        else:
            rows.append(replace(contestant, name=f"{contestant.name} + {Path(folder).name}", model=model))
    if len(refusals) == len(contestants):
        raise refusals[0]
    return rows


VERBS: Verbs = (("compare", Compare, compare, "dflow compare runs/grouped runs/lstm --output comparison"),)
