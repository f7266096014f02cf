"""``dflow models``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflow.cli.flags import Verbs, argument
from dflow.cli.shared import Results, table_of
from dflow.config import InputError


@dataclass(kw_only=True)
class Models(Results):
    """List the models that come with dflow, or those in a folder.

    The bits are those of the validation data, as the training measured them.
    """

    folder: str | None = argument("folder in which, at any depth, models lie (default: those of dflow)", None)


@dataclass(frozen=True)
class Row:
    """A line of the table: what a model is, and what is known of it without loading it."""

    name: str
    family: str
    symbols: str
    bits: str
    protocol: str
    calls: str
    size: str


def models(flags: Models) -> int:
    """`dflow models`."""
    from dflow import shipped

    if flags.folder is None:
        places = {name: shipped.folder_of(name) for name in shipped.names()}
    else:
        root = Path(flags.folder)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder")
        configs = sorted(file for file in root.rglob("config.json") if not _hidden(file.relative_to(root)))
        places = {str(config.parent): config.parent for config in configs}
    rows = [row for name, place in places.items() if (row := row_of(name, place)) is not None]
    records = [dataclasses.asdict(row) for row in rows]
    flags.show(records, *([table_of(rows)] if rows else []))
    return 0


def row_of(name: str, folder: Path) -> Row | None:
    """The line of the model in ``folder``; None for a model of another program."""
    from dflow.models import KINDS, TextConfig, config_of
    from dflow.models.files import Foreign
    from dflow.train import METRICS, history

    try:
        values = config_of(folder)
        family = str(values.get("family", ""))
        symbols = protocol = calls = ""
        if KINDS[values["model_type"]] == "text":
            config = TextConfig(**values)
            symbols = f"{config.vocab_size:,}"
            protocol = _protocol(config)
            calls = _calls(config)
        past = history(folder) if (folder / METRICS).is_file() else None
    except Foreign:
        return None
    except InputError as error:
        return Row(name, f"damaged: {error}", "", "", "", "", "")
    bits = "" if past is None else f"{min(row['valid_bits'] for row in past.rows):.4f} {past.unit}"
    # States of a training are no part of the model.
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith("state")]
    size = sum(file.stat().st_size for file in files) / 1e6
    return Row(name, family, symbols, bits, protocol, calls, f"{size:.1f} MB")


def _protocol(config: Any) -> str:
    """What a model of text scores at a time."""
    if config.explicit_length:
        return f"lines of at most {config.length} symbols"
    return f"{config.length} symbols" + (f" after {config.context}" if getattr(config, "context", 0) else "")


def _calls(config: Any) -> str:
    """The numbers of network calls in which a model of text draws its length, where its settings say so."""
    if config.record.left_to_right:
        return f"{config.length:,}"
    first = getattr(config, "num_calls", None)
    others = [] if first is None else sorted({first, *getattr(config, "calls", [])})
    return ", ".join(map(str, others))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


VERBS: Verbs = (("models", Models, models, "dflow models runs"),)
