"""The page as one file: HTML, CSS and JavaScript of this package, filled with what was measured."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

#: Files of the page, in the order in which their text goes into it.
_STYLE, _SCRIPTS = "page.css", ("plots.js", "page.js")


def document(title: str, record: dict[str, Any]) -> bytes:
    """The page, in UTF-8. It loads nothing: its own policy forbids requests to any address.

    Args:
        title: of the page.
        record: what the page shows, as JSON has it; the scripts of the page read it.
    """
    files = resources.files("dflow.page")
    # Inside a script only "<" can end it; in JSON text it stands in strings alone.
    data = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "{{title}}": html.escape(title),
        "{{style}}": files.joinpath(_STYLE).read_text("utf-8"),
        "{{data}}": data.replace("<", "\\u003c"),
        "{{script}}": "\n".join(files.joinpath(name).read_text("utf-8") for name in _SCRIPTS),
    }
    head, *rest = _split(files.joinpath("page.html").read_text("utf-8"), list(parts))
    return "".join([head, *(parts[mark] + text for mark, text in zip(parts, rest, strict=True))]).encode()


def _split(template: str, marks: list[str]) -> list[str]:
    """The text between marks, each of which stands in the template once, in this order."""
    texts = []
    for mark in marks:
        before, _, template = template.partition(mark)
        texts.append(before)
    return [*texts, template]
