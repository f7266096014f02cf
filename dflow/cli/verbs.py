"""The registry of verbs: one line each."""

from __future__ import annotations

from importlib import import_module

from dflow.cli.flags import Verbs

#: Files of the verbs, in the order of ``dflow --help``. A new verb is a file and a line here.
FILES = (
    "train",
    "evaluate",
    "export",
    "generate",
    "compare",
    "codecs",
    "compress",
    "decompress",
    "check",
    "info",
    "settings",
    "plot",
    "data",
)

_MODULES = {file: import_module(f"dflow.cli.{file}") for file in FILES}

#: Verb, flags, function, example.
VERBS: Verbs = tuple(row for module in _MODULES.values() for row in module.VERBS)

#: What the verbs of two words are about; the first of the words is the name of their file.
GROUPS: dict[str, str] = {file: module.GROUP for file, module in _MODULES.items() if hasattr(module, "GROUP")}
