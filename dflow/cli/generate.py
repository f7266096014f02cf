"""``dflow generate``."""

from __future__ import annotations

import collections
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dflow.cli.drafts import drafted
from dflow.cli.flags import Verbs, flag, refuse
from dflow.cli.shared import Drawing, load_model, say_once, suit_threads
from dflow.config import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dflow.data import Tokenizer
    from dflow.generate import ImageFormat
    from dflow.models import TextModel
    from dflow.ops.noise import Controls


@dataclass(kw_only=True)
class Generate(Drawing):
    """Draw text, images or rows from a model. The seed fixes each sample, whatever is drawn beside it."""

    model: str = flag("folder of the model")
    length: int | None = flag("number of symbols of each sample (default: the model's length)", None)
    prompt: str | None = flag("text that each sample begins with, for models that can continue one", None)
    prompt_file: str | None = flag("file whose text each sample begins with, in place of --prompt", None)
    stop: str | None = flag("text before which a sample ends, where it comes up behind the prompt", None)
    format: Literal["text", "jsonl", "png", "npy", "csv"] | None = flag(
        "format of text: text (default), or jsonl, a JSON object a line; of images: png (default), a grid, "
        "or npy, csv; of tables: csv (default) or npy",
        None,
    )
    draft: str | None = flag(
        "what proposes symbols ahead, so that models of family transformer draw the same samples in fewer "
        "network calls: counts, those of the model itself; the folder of a faster model of the same "
        "alphabet, as one of family ngram; auto, counts if they are measured to be faster; or none (default)",
        None,
    )
    verbose: bool = flag("say on stderr how many network calls each sample took", False)
    output: str | None = flag(
        "file to write, whole or not at all (default: standard output; for images samples.FORMAT)",
        None,
        short="-o",
    )


def generate(flags: Generate) -> int:
    """`dflow generate`; under ``accelerate launch`` the batches are spread over the processes."""
    from dflow.generate import Spelling, check_output, pieces, say, write
    from dflow.generate import generate as run
    from dflow.models import model_type

    kind = model_type(flags.model)
    if kind == "dflow-classifier":
        raise InputError(f"{flags.model}: a model of labels, which draws nothing; give one of text or images")
    if kind == "dflow-image":
        return generate_pictures(flags)
    if flags.format not in (None, "text", "jsonl"):
        raise InputError(f"--format {flags.format}: this is a model of text; use text or jsonl")
    output = None if flags.output is None else Path(flags.output)
    if output is not None:
        check_output(output)
    device, accelerator = flags.processes()
    model, tokenizer = load_model(flags.model, device)
    suit_threads(model, min(flags.n, flags.batch_size), model.num_calls)
    controls = flags.controls()
    model = quickest(flags, model, tokenizer, controls)
    prompt = prompt_of(flags, tokenizer)
    begin = 0 if prompt is None else len(tokenizer.decode(prompt))
    lines = model.config.explicit_length
    spell = Spelling(tokenizer, flags.format or "text", controls.exact, flags.stop, begin, lines)
    options: dict[str, Any] = {
        "length": flags.length,
        "seed": flags.seed,
        "prompt": prompt,
        "controls": controls,
    }
    samples = run(
        model,
        flags.n,
        **options,
        batch_size=flags.batch_size,
        progress=output is not None or not sys.stdout.isatty(),
        accelerator=accelerator,
    )
    on_terminal = output is None and sys.stdout.isatty() and accelerator is None and flags.format != "jsonl"
    if on_terminal and model.documents is not None:
        for number in range(flags.n):
            say(spell.title(number + 1))
            for piece in pieces(model, tokenizer, number, **options, stop=flags.stop):
                say(piece)
            say("\n")
    elif accelerator is None or accelerator.is_main_process:
        write(samples, spell, output)
    else:
        collections.deque(samples, 0)
    if flags.verbose:
        before = 0 if prompt is None else len(prompt)
        say_once(calls_taken(model, flags.length or before + model.config.length, prompt))
    if accelerator is not None:
        accelerator.end_training()
    return 0


def quickest(flags: Generate, model: TextModel, tokenizer: Tokenizer, controls: Controls) -> TextModel:
    """The model, with the drafts that --draft names, or without what takes longer to load than to draw."""
    from dflow.generate import faster
    from dflow.models.counts import counted

    if flags.draft == "auto":
        return faster(model, min(flags.n, flags.batch_size), controls)
    if flags.draft is not None:
        return drafted(model, tokenizer, flags.draft)
    if flags.n * (flags.length or model.config.length) < _WORTHWHILE:
        for module in counted(model):
            module.compiled = False
    return model


#: Symbols of a draw for which compiled loops are worth the half second that it takes to load them.
_WORTHWHILE = 8192


def calls_taken(model: TextModel, length: int, prompt: Tensor | None) -> str:
    """A line on the network calls of the samples that were drawn."""
    from dflow.core import Context
    from dflow.models import prompted

    if model.tally is None:
        if model.documents is None:
            most = model.law.needed(min(length, model.config.length))
        else:
            known = None if prompt is None else prompted(prompt.to(model.device), 1)
            most = model.documents.needed(length, Context(known=known))
        return f"network calls a sample: at most {most:,}"
    calls, tally = sorted(model.tally.calls.values()), model.tally
    low, middle, high = (calls[int(share * (len(calls) - 1))] for share in (0.1, 0.5, 0.9))
    return (
        f"network calls a sample: mean {sum(calls) / len(calls):.1f}, 10% {low:,}, median {middle:,}, 90% "
        f"{high:,}, most {calls[-1]:,}; {tally.accepted:,} of {tally.drafted:,} drafted symbols accepted"
    )


def prompt_of(flags: Generate, tokenizer: Tokenizer) -> Tensor | None:
    """The symbols of --prompt or --prompt-file."""
    if flags.prompt_file is None:
        if flags.prompt is None:
            return None
        name, text = "--prompt", flags.prompt
    else:
        if flags.prompt is not None:
            raise InputError("--prompt-file: --prompt is given too; leave one of them out")
        name = f"--prompt-file {flags.prompt_file}"
        try:
            text = Path(flags.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: is not UTF-8 ({error}); convert it") from None
    try:
        return tokenizer.encode(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _format_of(output: str | None, format: ImageFormat | None) -> ImageFormat | None:
    """The format of the flag --format, else the one that the name of a file ends with."""
    if output is None:
        return format
    formats: dict[str, ImageFormat] = {".png": "png", ".npy": "npy", ".csv": "csv"}
    by_name = formats.get(Path(output).suffix.lower())
    if (by_name is None and format is None) or (by_name and format and by_name != format):
        raise InputError(
            f"--output {output}: no name of a file of format {format or 'png, npy or csv'}; let it end with "
            f".{format or 'png, .npy or .csv, or give --format'}"
        )
    return format or by_name


def generate_pictures(flags: Generate) -> int:
    """`dflow generate` of a model of images or a table."""
    from dflow import generate as drawing
    from dflow.hf import DflowImageModel, load

    refuse(
        flags,
        (
            *("length", "prompt", "prompt_file", "stop", "temperature", "top_k", "top_p", "min_p"),
            *("draft", "verbose"),
        ),
        f"is for models of text; {flags.model} is one of images or tables",
    )
    if flags.format == "text" or flags.format == "jsonl":
        raise InputError(f"--format {flags.format}: this is a model of images or tables; use png, npy or csv")
    device, accelerator = flags.processes()
    model = load(flags.model, device, DflowImageModel)
    pictures = drawing.is_picture(model.config.shape)
    kind = _format_of(flags.output, flags.format) or ("png" if pictures else "csv")
    if kind == "png" and not pictures:
        raise InputError(f"--format png: {flags.model} draws no pictures; use csv or npy")
    output = Path(flags.output or f"samples.{kind}")
    drawing.check_output(output)
    x = drawing.generate_images(
        model,
        flags.n,
        seed=flags.seed,
        batch_size=flags.batch_size,
        progress=True,
        accelerator=accelerator,
    )
    if accelerator is None or accelerator.is_main_process:
        levels, real = set(model.config.levels), [r is None for r in model.config.settings().ranges]
        most = max(levels) if None not in levels else None
        data = drawing.encode_images(x, kind, most, model.config.columns, real)
        drawing.write_whole(output, data)
        print(output)
    if accelerator is not None:
        accelerator.end_training()
    return 0


VERBS: Verbs = (
    (
        "generate",
        Generate,
        generate,
        "dflow generate --model runs/grouped --samples 100 --seed 1 --output samples.txt",
    ),
)
