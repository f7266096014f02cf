"""The command: words in, an exit code out, and errors in place of tracebacks."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TextIO

from dflow import plugins
from dflow.cli.flags import read_flags, takes_many
from dflow.cli.parser import build_parser, hint
from dflow.cli.shared import complain, say_once
from dflow.cli.verbs import VERBS
from dflow.config import InputError
from dflow.memory import collect_rarely
from dflow.terminal import visible
from dflow.threads import wait_passively


class _Terminal(io.TextIOBase):
    """A terminal that gets control characters spelled out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        self._stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit code.

    0, 1 (a check or a run of a sweep failed, or files of a folder are left out or damaged), 2 (the input
    cannot be used), 130 (stopped by Ctrl-C).
    """
    # A character that a terminal or a log cannot show must not end a training of hours.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    wait_passively()
    collect_rarely()
    screen = _Terminal(sys.stdout) if sys.stdout.isatty() else sys.stdout
    with contextlib.redirect_stdout(screen):
        return guarded(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the verb that some words name; modules of users are imported first where they may add the verb."""
    if argv and argv[0] not in {verb.split()[0] for verb, *_ in VERBS} | {"--version"}:
        import_modules(imported(argv))
    values = vars(parse_words(argv))
    cls, function, modules = (values.pop(name) for name in ("_cls", "_function", "_modules"))
    import_modules(modules)
    return int(function(read_flags(cls, values)))


def imported(argv: Sequence[str]) -> list[str]:
    """The modules that ``--import`` names among words that are not parsed yet."""
    names = [word.partition("=")[2] for word in argv if word.startswith("--import=")]
    return names + [name for word, name in pairwise(argv) if word == "--import"]


def import_modules(modules: Sequence[str]) -> None:
    """Import the modules of installed plug-ins, and ``modules``."""
    plugins.load_installed()
    for module in modules:
        plugins.load(module)


def parse_words(argv: Sequence[str] | None) -> argparse.Namespace:
    """The verb and its flags; ends with exit code 2 where a word is unknown.

    Files may stand behind flags too, where a verb takes a list of them.
    """
    words, unknown = build_parser().parse_known_args(argv)
    parser = words._parser
    del words._parser
    lists = [f.name for f in dataclasses.fields(words._cls) if takes_many(words._cls, f)]
    are_files = all(word == "-" or not word.startswith("-") for word in unknown)
    if len(lists) == 1 and hasattr(words, lists[0]) and are_files:
        setattr(words, lists[0], [*getattr(words, lists[0]), *unknown])
        unknown = []
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}{hint(unknown[0], words._cls)}")
    return words


def guarded(action: Callable[[], int]) -> int:
    """What ``action`` returns; an error outside of dflow becomes a line on stderr and an exit code."""
    try:
        code = action()
        sys.stdout.flush()  # a closed pipe or a full disk shows here, not when nobody can say so any more
        return code
    except InputError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the interpreter must not fail on its last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            what += "; free some space and run again"
        complain(f"{error.filename}: {what}" if error.filename else what)
        return 2
    except KeyboardInterrupt as error:
        # Stopping is no error.
        say_once(str(error) or "interrupted")
        return 128 + signal.SIGINT
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        complain("out of memory; choose a smaller batch size")
        return 2


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; torch says so on the CPU in words only."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
    )
