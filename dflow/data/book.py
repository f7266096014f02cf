"""War and Peace, from a local copy of Project Gutenberg's file: the text alone, in plain ASCII."""

from __future__ import annotations

import re
import unicodedata

from dflow.config import InputError

#: Share of each part of the book that is for validation, and share that is for the test.
SHARE = 0.025

_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "œ": "oe", "æ": "ae"})
_PART = re.compile(r"^(?:BOOK [A-Z]+:|FIRST EPILOGUE|SECOND EPILOGUE)", re.MULTILINE)
_END = "End of the Project Gutenberg EBook"


def prepared(raw: str) -> str:
    r"""The text of the book: without what Project Gutenberg put around it, and without the table of contents.

    A paragraph is one line, with an empty line behind it. Quotes, dashes and letters with accents become
    ASCII, so that whatever a keyboard types can be a prompt.

    >>> contents = "START OF THIS PROJECT\n\nBOOK ONE: 1805\n\n"
    >>> prepared(contents + "BOOK ONE: 1805\n\n“Natásha\nlaughed—”\n\n\nEnd of the Project Gutenberg EBook")
    'BOOK ONE: 1805\n\n"Natasha laughed--"\n'

    Raises:
        InputError: the text has no beginning or no end of this kind.
    """
    begin, end = raw.rfind("BOOK ONE: 1805"), raw.find(_END)
    if not 0 <= begin < end:
        raise InputError(f"no text between 'BOOK ONE: 1805' and {_END!r}")
    text = unicodedata.normalize("NFKD", raw[begin:end].translate(_ASCII)).encode("ascii", "ignore").decode()
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def split(text: str) -> tuple[str, ...]:
    r"""Training, validation and test text: the ends of all parts of the book are held out, `SHARE` for each.

    The end of the whole book would be no fair sample of it: the second epilogue is an essay on history.

    >>> [len(text) for text in split("BOOK ONE: " + 90 * "x" + "\nBOOK TWO: " + 90 * "y")]
    [193, 4, 4]
    """
    begins = [match.start() for match in _PART.finditer(text)]
    parts = ["", "", ""]
    for begin, end in zip(begins, [*begins[1:], len(text)], strict=True):
        size = int((end - begin) * SHARE)
        borders = [begin, end - 2 * size, end - size, end]
        for i in range(3):
            parts[i] += text[borders[i] : borders[i + 1]]
    return tuple(parts)
