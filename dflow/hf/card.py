"""The card of a model: a README.md with the head that the hub of transformers reads.

A card is written whole, and never over one that a user has changed: its last line has a digest of the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from dflow import zoo
from dflow.config import InputError
from dflow.models.manifest import digest_of

#: The file of the card, and that of the recipe by which a folder was trained.
CARD, RECIPE = "README.md", "recipe.yaml"

_MARK = re.compile(r"<!-- dflow card (\w+) of weights (\w+) -->\n*\Z")

#: Tasks of the hub.
_TASKS = {
    "text": "text-generation",
    "images": "unconditional-image-generation",
    "labels": "image-classification",
}

#: The longest recipe in characters.
_LONGEST = 1 << 20

#: Settings of a recipe that are places on the machine of the training.
_PLACES = ("folder", "store", "output")


@dataclass(frozen=True)
class Figure:
    """A measurement of a model, with all that it means.

    Attributes:
        data: name of the data.
        split: the part of them: "train", "valid" or "test".
        protocol: how they were cut and scored, in words.
        value: the figure.
        unit: its unit, "bits a character".
        kind: "exact", or the name of a bound or an estimate.
    """

    data: str
    split: str
    protocol: str
    value: float
    unit: str
    kind: str = "exact"


def card(
    folder: str | os.PathLike[str],
    licence: str = "unknown",
    figures: Sequence[Figure] = (),
    *,
    name: str | None = None,
    calls: int | None = None,
    speed: str | None = None,
) -> str:
    """The card of the model in ``folder``, from its config, its weights and its recipe.

    Args:
        folder: a model folder.
        licence: that of the weights, by its name on the hub ("apache-2.0"); "unknown" where nobody has said.
        figures: measurements; a card without any says how to measure.
        name: of the model; default that of the folder.
        calls: network calls to draw a sequence, if they are known.
        speed: how long drawing takes, in words with the machine, if it is known.

    Raises:
        InputError: no config in the folder, or one of another kind.
    """
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_bytes())
        record = zoo.find(config["family"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'config.json'}: missing or damaged ({error}); restore the file") from None
    recipe = _recipe(path)
    name = name or path.resolve().name
    head = yaml.safe_dump(
        _head(record.kind, config, recipe, name, licence, figures), sort_keys=False, width=100
    )
    parts = [
        f"---\n{head}---\n\n# {name}",
        _about(record, config, calls),
        _measured(path, figures, calls, speed, config),
        _use(record.kind, name, config),
        _training(_without_places(recipe)),
        _limits(record, config, licence),
    ]
    text = "\n\n".join(parts) + "\n\n"
    return f"{text}<!-- dflow card {_digest(text)} of weights {weights_id(path)} -->\n"


def write_card(folder: str | os.PathLike[str], text: str | None = None, **about: Any) -> bool:
    """Write the card of ``folder``, whole, unless a user has written or changed the one that is there.

    Args:
        folder: a model folder.
        text: the card; None for `card` with the arguments ``about``.
        about: arguments of `card`.

    Returns:
        Whether it was written.
    """
    path = Path(folder) / CARD
    if path.exists() and changed(path.read_text(encoding="utf-8", errors="replace")):
        return False
    temporary = path.with_name(f".{CARD}.tmp")
    temporary.write_text(card(folder, **about) if text is None else text, encoding="utf-8")
    temporary.replace(path)
    return True


def changed(text: str) -> bool:
    """Whether a card is one that a user has written, or changed."""
    mark = _MARK.search(text)
    return mark is None or _digest(text[: mark.start()]) != mark[1]


def renamed(text: str, name: str, tags: Sequence[str] = ()) -> str:
    """The card under another name of the model, with further tags; one that a user has changed as it is."""
    mark, title = _MARK.search(text), re.search(r"^# (.*)$", text, re.MULTILINE)
    if mark is None or title is None or changed(text):
        return text
    body = text[: mark.start()]
    for form in ("# {}\n", "model={!r}", "from_pretrained({!r}", "- name: {}\n"):
        body = body.replace(form.format(title[1]), form.format(name))
    if further := [tag for tag in tags if f"\n- {tag}\n" not in body]:
        body = re.sub(
            r"(?<=\ntags:\n)(?:- .*\n)+", lambda old: old[0] + yaml.safe_dump(further), body, count=1
        )
    return f"{body}<!-- dflow card {_digest(body)} of weights {mark[2]} -->\n"


def is_of(text: str, folder: Path) -> bool:
    """Whether a card was written for the weights that are in ``folder``."""
    mark = _MARK.search(text)
    return mark is not None and mark[2] == weights_id(folder)


def weights_id(folder: Path) -> str:
    """A short digest of the weights in ``folder``."""
    files = sorted(folder.glob("model*.safetensors"))
    return _digest("".join(digest_of(file) for file in files))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _recipe(folder: Path) -> dict[str, Any]:
    """The recipe in the folder; an empty one if the folder has no recipe."""
    try:
        with (folder / RECIPE).open(encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            return {}  # No training writes such a recipe.
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _without_places(value: Any) -> Any:
    """``value`` with nothing of the machine: of paths their last part."""
    if isinstance(value, dict):
        return {
            key: _without_places(each)
            for key, each in value.items()
            if key not in _PLACES and each not in (None, {}, [])
        }
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _head(
    kind: str,
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    name: str,
    licence: str,
    figures: Sequence[Figure],
) -> dict[str, Any]:
    """The head of the card, as the hub reads it."""
    task = _TASKS[kind]
    trained_on = str((recipe.get("data") or {}).get("name") or "")
    names = {trained_on, *(figure.data for figure in figures)} - {""}
    if os.path.isabs(trained_on):
        names -= {trained_on, Path(trained_on).name}  # a user's own, which is no data set of the hub
    datasets = sorted(name.removeprefix("hub:") for name in names)
    head: dict[str, Any] = {
        "license": licence,
        "library_name": "dflow",
        "pipeline_tag": task,
        "tags": ["dflow", config["family"], "exact-likelihood"][
            : 3 if zoo.find(config["family"]).exact else 2
        ],
    }
    if datasets:
        head["datasets"] = datasets
    if figures:
        head["metrics"] = sorted({figure.unit.replace(" ", "_") for figure in figures})
        results = [
            {
                "task": {"type": task},
                "dataset": {
                    "type": figure.data.removeprefix("hub:"),
                    "name": figure.data,
                    "split": figure.split,
                },
                "metrics": [
                    {
                        "type": figure.unit.replace(" ", "_"),
                        "value": round(figure.value, 4),
                        "name": f"{figure.unit} ({figure.kind}; {figure.protocol})",
                    }
                ],
            }
            for figure in figures
        ]
        head["model-index"] = [{"name": name, "results": results}]
    return head


def _about(record: zoo.Family, config: Mapping[str, Any], calls: int | None) -> str:
    """What the model is."""
    what = {
        "text": "A model of text",
        "images": "A model of images or tables",
        "labels": "A classifier of images",
    }[record.kind]
    text = f"{what} of family `{record.name}`, made with dflow."
    if record.kind == "text":
        symbols = f"sequences of up to {config['length']} symbols" if record.left_to_right else ""
        symbols = symbols or f"sequences of {config['length']} symbols"
        text += f" It is a law of {symbols} out of {config['vocab_size']}, with an exact likelihood"
        text += f", and is drawn in {calls} network calls." if calls is not None else "."
        if others := config.get("calls"):
            text += f" The same weights are also drawn in {', '.join(map(str, others))} calls."
        if context := config.get("context"):
            text += f" Longer texts are drawn chunk after chunk, each given the {context} symbols before it."
    return text


def _measured(
    folder: Path, figures: Sequence[Figure], calls: int | None, speed: str | None, config: Mapping[str, Any]
) -> str:
    """The figures as a table, and the sizes."""
    rows = ["## Measured", "", "| what | value |", "|---|---|"]
    for figure in figures:
        where = f"{figure.data}, {figure.split} part; {figure.protocol}"
        rows.append(f"| {figure.unit}, {figure.kind}: {where} | {figure.value:.4f} |")
    if not figures:
        rows.append(
            "| bits | not measured for these weights; `dflow evaluate --model FOLDER` measures them |"
        )
    if calls is not None:
        rows.append(f"| network calls to draw {config.get('length')} symbols | {calls} |")
    if speed is not None:
        rows.append(f"| speed | {speed} |")
    files = sorted(folder.glob("model*.safetensors"))
    number = sum(_numbers(file) for file in files)
    rows.append(f"| weights | {number:,} numbers, {_size(sum(f.stat().st_size for f in files))} |")
    counts = folder / "counts.safetensors"
    if counts.is_file():
        rows.append(f"| counts of the training text | {_size(counts.stat().st_size)} |")
    return "\n".join(rows)


def _numbers(file: Path) -> int:
    """How many numbers a file of weights holds."""
    total = 0
    with safe_open(file, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            size = 1
            for n in stored.get_slice(key).get_shape():
                size *= n
            total += size
    return total


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:.1f} kB"


def _use(kind: str, name: str, config: Mapping[str, Any]) -> str:
    """How to use the model, in a few lines of Python."""
    lines = {
        "text": [
            "from transformers import pipeline",
            "",
            f"draw = pipeline('text-generation', model={name!r}, trust_remote_code=True)",
            f"print(draw('', max_new_tokens={min(64, int(config.get('length', 64)))})[0]['generated_text'])",
        ],
        "images": [
            "from transformers import AutoModel",
            "",
            f"model = AutoModel.from_pretrained({name!r}, trust_remote_code=True)",
            "pictures = model.generate(16)",
        ],
        "labels": [
            "from transformers import AutoModelForImageClassification",
            "",
            f"model = AutoModelForImageClassification.from_pretrained({name!r}, trust_remote_code=True)",
        ],
    }[kind]
    commands = (
        "`dflow generate`, `dflow evaluate`, `dflow compress`" if kind == "text" else "`dflow evaluate`"
    )
    return "\n".join(
        [
            "## Use",
            "",
            "dflow has to be installed: `git clone REPOSITORY dflow && python -m pip install ./dflow`.",
            "",
            "```py",
            *lines,
            "```",
            "",
            f"From the command line: {commands}, each with `--model FOLDER`.",
        ]
    )


def _training(recipe: Mapping[str, Any]) -> str:
    """The recipe."""
    if not recipe:
        return "## Training\n\nNo recipe is kept with this model."
    text = yaml.safe_dump(dict(recipe), sort_keys=False, width=100)
    return f"## Training\n\nThe recipe, as `dflow train` takes it:\n\n```yaml\n{text}```"


def _limits(record: zoo.Family, config: Mapping[str, Any], licence: str) -> str:
    """What the model cannot do."""
    points = []
    if record.kind == "text":
        points.append(
            "It has learned its training text and nothing else: no instructions, no facts, nothing on safety."
        )
        if not config.get("context"):
            points.append(f"It draws {config['length']} symbols at most.")
        if record.prompt == "no" and not config.get("context"):
            points.append("It cannot continue a prompt.")
        elif record.prompt == "forced" and not config.get("context"):
            points.append("Symbols that are drawn before those of a prompt do not depend on them.")
        points.append("Its vocabulary is that of the training text; other characters are refused.")
    if not record.exact:
        points.append("Its likelihood is known by bounds only.")
    if licence == "unknown":
        points.append("Nobody has stated a licence; that of the training data may bind the weights.")
    return "\n".join(["## Limits", "", *(f"- {point}" for point in points)])
