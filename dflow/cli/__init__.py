"""The command line: a verb a file, its flags the fields of a dataclass.

What a verb needs is imported when it runs, so that ``dflow --help`` is quick. A new verb is a file with its
flags, its function and a row of ``VERBS``, and a line in `dflow.cli.verbs`.
"""

from __future__ import annotations

from dflow.cli.command import main
from dflow.cli.flags import add_flags, argument, flag, options_of, read_flags
from dflow.cli.generate import Generate
from dflow.cli.parser import build_parser
from dflow.cli.shared import Machine, Results
from dflow.cli.source import Source
from dflow.cli.verbs import VERBS, register_verb

__all__ = [
    "VERBS",
    "Generate",
    "Machine",
    "Results",
    "Source",
    "add_flags",
    "argument",
    "build_parser",
    "flag",
    "main",
    "options_of",
    "read_flags",
    "register_verb",
]
