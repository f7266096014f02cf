"""What the documentation site makes of docstrings, for griffe, which reads them without importing dflow."""

from __future__ import annotations

import linecache
import re
from typing import Any

from griffe import Docstring, Extension, Object

#: An example at the margin of a docstring, up to the next empty line. In Markdown ``>>>`` is a quotation.
EXAMPLE = re.compile(r"^>>> .*(?:\n(?!$).*)*", re.M)
FENCE = "```pycon\n\\g<0>\n```"


class Docstrings(Extension):
    """Examples become code, comments ``#: text`` docstrings; members without either are left out."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for each object that has been read."""
        if obj.docstring is None and obj.is_attribute and (comment := _comment_above(obj)):
            obj.docstring = Docstring(comment, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(FENCE, obj.docstring.value)
        elif obj.parent is not None and obj.parent.is_class:
            obj.public = False


def _comment_above(obj: Object) -> str:
    """The text of the lines ``#: text`` before an assignment."""
    lines: list[str] = []
    line = (obj.lineno or 1) - 1
    while (text := linecache.getline(str(obj.filepath), line).strip()).startswith("#:"):
        lines.insert(0, text.removeprefix("#:").strip())
        line -= 1
    return "\n".join(lines)
