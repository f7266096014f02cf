"""``dflow page``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflow.cli.drafts import drafted
from dflow.cli.evaluate import FAILED
from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Machine, Results, complain, finite, load_model, read_text, remark, show_file
from dflow.cli.source import Source
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.data import Corpus, Tokenizer
    from dflow.models import TextModel

#: Symbols of a text that the page shows one by one.
_SHOWN = 2000


@dataclass(kw_only=True)
class Page(Source, Machine, Results):
    """Write a web page that shows how texts are drawn.

    It is one file, which needs no server and loads nothing. It shows samples of the first model that is drawn
    group by group, call by call, for each number of network calls that the model knows; beside it the first
    model that is drawn from left to right, with its drafts; the bits of each symbol; learning curves; bits
    against network calls and against measured times.
    """

    models: list[str] = argument("folders of the models")
    output: str = flag("file to write, whole or not at all", "page.html", short="-o")
    limit: int | None = flag("number of chunks of the data to score, the first ones", 64)
    samples: int = flag("number of samples to choose from", 3)
    seed: int = flag("seed of the samples", 0)
    text: str | None = flag("file of text in UTF-8 that is scored and shown, or - for standard input", None)
    draft: str = flag(
        "what proposes symbols to models that are drawn from left to right: auto, the counts of a model that "
        "has some; counts; the folder of a faster model of the same alphabet; or none",
        "auto",
    )
    rounds: int = flag("number of rounds of measuring times", 10)


@dataclass(frozen=True)
class Exhibit:
    """A model of the page, under its name; `drafted` is the same one drawn with drafts, or None."""

    name: str
    folder: str
    model: TextModel
    tokenizer: Tokenizer
    drafted: TextModel | None


def page(flags: Page) -> int:
    """`dflow page`."""
    from dflow.generate import check_output, write_whole
    from dflow.page import document

    output = Path(flags.output)
    check_output(output)
    for name, value in (("samples", flags.samples), ("rounds", flags.rounds), ("limit", flags.limit)):
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    shown = exhibits(flags)
    text = None if flags.text is None else read_text(flags.text)
    record, fault = contents(flags, shown, text)
    title = "How a text is drawn: " + ", ".join(each.name for each in shown)
    write_whole(output, document(title, {"title": title} | record))
    if fault:
        complain(fault)
    return int(bool(fault)) or show_file(flags, output)


def exhibits(flags: Page) -> list[Exhibit]:
    """The models that the words name.

    Raises:
        InputError: a model of another kind than text, or none of which samples can be shown.
    """
    from dflow.models import model_type
    from dflow.page import role_of
    from dflow.plot import short_names

    folders = [folder.rstrip("/") for folder in flags.models]
    if len(set(folders)) < len(folders):
        raise InputError("a model is named twice; name each once")
    for folder in folders:
        if model_type(folder) != "dflow":
            raise InputError(f"{folder}: is no model of text; the page shows how texts are drawn")
    device, names, result = flags.settle(), short_names(folders), []
    for folder in folders:
        model, tokenizer = load_model(folder, device)
        faster = None
        if model.config.record.left_to_right and role_of(model):
            faster = with_drafts(flags.draft, model, tokenizer)
        result.append(Exhibit(names[folder], folder, model, tokenizer, faster))
    if not any(role_of(each.model) for each in result):
        families = ", ".join(each.model.config.family for each in result)
        raise InputError(
            f"{', '.join(folders)}: of family {families}, whose samples appear as a whole; name a model "
            "that is drawn group by group (grouped, any_order) or left to right (transformer, lstm, ngram)"
        )
    return result


def with_drafts(word: str, model: TextModel, tokenizer: Tokenizer) -> TextModel | None:
    """The model with the drafts that ``word`` names, None for one that takes none of its own accord."""
    try:
        other = drafted(model, tokenizer, word)
    except InputError:
        if word != "auto":
            raise
        return None
    return None if other is model else other


def contents(flags: Page, shown: list[Exhibit], text: tuple[str, str] | None) -> tuple[dict[str, Any], str]:
    """What the page shows, as JSON has it; and what is wrong with it, "" for nothing."""
    from dflow.compare import environment
    from dflow.models import split_calls
    from dflow.page import curve_of, figures, role_of

    # First what may be refused.
    own_text = None if text is None else scored(shown, *text)
    corpora, split, note = data_of(flags, shown)
    models, faults, protocol = [], [], None
    for i, each in enumerate(shown):
        part = corpora[i].split(split) if corpora else None
        measured = figures(
            each.model,
            each.tokenizer,
            part,
            drafted=each.drafted,
            limit=flags.limit,
            rounds=flags.rounds,
            seed=flags.seed,
            progress=True,
        )
        protocol = protocol or measured.protocol
        faults += [f"{each.folder}: {FAILED}" for p in measured.points if p.round_trip is False][:1]
        curve = curve_of(split_calls(each.folder)[0])
        models.append(
            {
                "name": each.name,
                "family": each.model.config.family,
                "parameters": sum(p.numel() for p in each.model.parameters()),
                "role": role_of(each.model),
                "points": [dataclasses.asdict(point) for point in measured.points],
                "curve": None if curve is None else dataclasses.asdict(curve),
            }
        )
    record = {
        "seed": flags.seed,
        "rounds": flags.rounds,
        "environment": environment(shown[0].model.device),
        "data": {"name": corpora[0].name, "split": split, "protocol": protocol} if corpora else None,
        "note": note,
        "models": models,
        "groups": panel(flags, shown, "groups"),
        "causal": panel(flags, shown, "causal"),
        "text": own_text,
    }
    result = finite(record)
    assert isinstance(result, dict)
    return result, "; ".join(faults)


def data_of(flags: Page, shown: list[Exhibit]) -> tuple[list[Corpus], str, str]:
    """The data in the vocabulary of each model and their part to score; or no data, and the reason.

    Raises:
        InputError: data that the flags name, and that cannot be read.
    """
    from dflow.data import Draws, load

    try:
        config = flags.config(flags.models[0], shown[0].model)
        length = min(each.model.config.length for each in shown)
        corpora = [load(config, each.tokenizer, length) for each in shown]
        split = flags.part(corpora[0], *flags.models)
        if any(isinstance(corpus.split(split), Draws) for corpus in corpora):
            raise InputError(f"{config.name}: a law, whose distance `dflow evaluate` measures")
    except InputError as error:
        if flags.data is not None or flags.folder is not None:
            raise
        remark(f"note: no bits are measured, since the data are not at hand: {error}")
        return [], "", f"Bits on test data were not measured, since the data were not at hand: {error}."
    return corpora, split, ""


def panel(flags: Page, shown: list[Exhibit], role: str) -> dict[str, Any] | None:
    """The samples of the first model of a role, for each number of calls; None without such a model."""
    from dflow.data import dealt
    from dflow.models import split_calls
    from dflow.page import role_of, traces
    from dflow.page.figures import budgets_of

    each = next((each for each in shown if role_of(each.model) == role), None)
    if each is None:
        return None
    calls = budgets_of(each.model)
    samples = [
        [
            dataclasses.asdict(trace)
            for trace in traces(
                each.model.at(number), each.tokenizer, flags.samples, seed=flags.seed, drafted=each.drafted
            )
        ]
        for number in calls
    ]
    about = dealt.read(split_calls(each.folder)[0])
    default = calls.index(each.model.num_calls) if each.model.num_calls in calls else len(calls) - 1
    return {
        "model": each.name,
        # Of a file or folder the name alone: where it lies on this machine is nobody's business.
        "trained_on": None if about is None else Path(about["name"]).name,
        "length": each.model.config.length,
        "calls": calls,
        "default": default,
        "samples": samples,
    }


def scored(shown: list[Exhibit], name: str, text: str) -> dict[str, Any]:
    """A text under each model that scores it symbol by symbol."""
    from dflow.page import role_of, shade

    shades = []
    for each in shown:
        if role_of(each.model) is None:
            continue
        try:
            part = shade(each.model, each.tokenizer, text, _SHOWN)
        except InputError as error:
            raise InputError(f"--text {name}, model {each.folder}: {error}") from None
        shades.append({"model": each.name} | dataclasses.asdict(part))
    return {"name": Path(name).name, "shades": shades}


VERBS: Verbs = (("page", Page, page, "dflow page runs/grouped runs/transformer --text my.txt -o page.html"),)
