"""The parser of all verbs, and what it says of words that it does not know."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import dflow
from dflow.cli.flags import add_flags, options_of
from dflow.cli.shared import remark
from dflow.cli.train import Train, as_set, hint_of_setting
from dflow.cli.verbs import ADDED, GROUPS, VERBS
from dflow.config import InputError, nearest
from dflow.terminal import shown


class _Help(argparse.HelpFormatter):
    """Leaves room for the indent of verbs, which argparse forgets, so that each has one line."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if action.nargs == argparse.PARSER:
            self._action_max_length += self._indent_increment


class _Parser(argparse.ArgumentParser):
    """Says which flags may have taken what is missing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        greedy = [a.option_strings[-1] for a in self._actions if a.option_strings and a.nargs == "+"]
        if "required" in message and greedy:
            message += f"; all words after {' or '.join(greedy)} belong to it, so give these before"
        super().error(shown(message, sys.stderr))

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Take ``--train.steps 100`` for ``--set train.steps=100`` where there is ``--set``.

        And ``compare --codec``, the older name, for ``codecs``.
        """
        words = list(sys.argv[1:] if args is None else args)
        if self.prog == "dflow" and words[:1] == ["compare"] and "--codec" in words:
            remark("note: `dflow codecs` is the new name of `dflow compare --codec`")
            words = ["codecs", *(word for word in words[1:] if word != "--codec")]
        if "--set" in self._option_string_actions:
            try:
                words = as_set(words)
            except InputError as error:
                self.error(str(error))
        return super().parse_known_args(words, namespace)


def summary(doc: str) -> str:
    r"""The first sentence of a docstring, on one line.

    >>> summary("Bits of version 0.1\n    and more.\n\n    Not these. ")
    'Bits of version 0.1 and more'
    """
    return " ".join(re.split(r"\.(?=\s|$)", doc, maxsplit=1)[0].split())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="dflow",
        description="Normalizing flows of discrete data: text in few network calls, dequantized images.",
        epilog="example: dflow train grouped",
    )
    parser.add_argument("--version", action="version", version=f"dflow {dflow.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    groups: dict[str, Any] = {}
    for verb, cls, function, example in (*VERBS, *ADDED):
        group, _, name = verb.rpartition(" ")
        if group and group not in groups:
            inner = verbs.add_parser(group, help=GROUPS[group], epilog=f"example: {example}")
            groups[group] = inner.add_subparsers(metavar="VERB", required=True)
        doc = str(cls.__doc__)
        sub = (groups[group] if group else verbs).add_parser(
            name, help=summary(doc), description=doc, epilog=f"example: {example}"
        )
        add_flags(sub, cls)
        sub.add_argument(
            "--import",
            dest="_modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="module of yours, a name or a .py file, that adds families and the like; once for each",
        )
        sub.set_defaults(_cls=cls, _function=function, _parser=sub)
    return parser


def hint(word: str, cls: type[Any]) -> str:
    """What may have been meant by a flag that a verb does not have."""
    if not word.startswith("-"):
        return ""
    if cls is Train and (about := hint_of_setting(word.partition("=")[0])):
        return f"; {about}"
    flags = [
        option for f in dataclasses.fields(cls) if "positional" not in f.metadata for option in options_of(f)
    ]
    option = word.partition("=")[0]
    others = [
        verb for verb, other, _, _ in VERBS for f in dataclasses.fields(other) if option in options_of(f)
    ]
    if 0 < len(others) < 3 and not difflib.get_close_matches(option, flags):
        return f"; {option} is a flag of {' and '.join(f'`dflow {verb}`' for verb in others)}"
    return f"; {nearest(option, flags)}"
