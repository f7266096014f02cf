"""The registry of verbs: one line each; and the verbs that modules of users add."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dflow.cli.flags import Verbs
from dflow.config import InputError

#: Files of the verbs, in the order of ``dflow --help``. A new verb is a file and a line here.
FILES = (
    "train",
    "evaluate",
    "export",
    "score",
    "generate",
    "fill",
    "compare",
    "codecs",
    "compress",
    "decompress",
    "check",
    "compact",
    "info",
    "models",
    "recipes",
    "settings",
    "page",
    "serve",
    "plot",
    "data",
    "completion",
)

_MODULES = {file: import_module(f"dflow.cli.{file}") for file in FILES}

#: Verb, flags, function, example.
VERBS: Verbs = tuple(row for module in _MODULES.values() for row in module.VERBS)

#: Verbs of modules of users, as rows like those of `VERBS`.
ADDED: list[tuple[str, type[Any], Callable[[Any], int], str]] = []


def register_verb(verb: str, flags: type[Any], function: Callable[[Any], int], example: str) -> None:
    """Add a command from a module of one's own, which is imported by ``--import`` or an entry point.

    Args:
        verb: one word.
        flags: a dataclass whose fields are made by `flag` and `argument`; the first sentence of its docstring
            is the line of ``dflow --help``.
        function: takes an instance of ``flags``, returns the exit code.
        example: a command line.

    Raises:
        InputError: the verb is not one word of letters, or there is one of this name.
    """
    if not verb.isidentifier():
        raise InputError(f"a verb is one word of letters, found {verb!r}")
    if verb in {row[0].split()[0] for row in (*VERBS, *ADDED)}:
        raise InputError(f"there is a verb {verb!r} already; choose another name")
    ADDED.append((verb, flags, function, example))


#: What the verbs of two words are about; the first of the words is the name of their file.
GROUPS: dict[str, str] = {file: module.GROUP for file, module in _MODULES.items() if hasattr(module, "GROUP")}
