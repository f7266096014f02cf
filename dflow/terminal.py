"""Text for a terminal: control characters, which it would obey, are spelled out."""

from __future__ import annotations

import re
from typing import TextIO

#: Control characters but for tab and line break, and those that turn the direction of writing.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""``text`` with each control character spelled as in Python; tab and line break stay.

    >>> print(visible("a\x1b[2Jb\r\n"), end="")
    a\x1b[2Jb\r
    """
    return _OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def shown(text: str, stream: TextIO) -> str:
    """``text`` to be written to ``stream``: `visible` on a terminal, unchanged into files and pipes."""
    return visible(text) if stream.isatty() else text
