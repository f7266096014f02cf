"""Models beside models, and models beside classical codecs."""

from dflow.compare import codecs, material
from dflow.compare.models import (
    FILES,
    Comparison,
    Row,
    check_folder,
    compare,
    environment,
    markdown,
    measure,
    num_calls,
    plot,
    record,
    with_compressors,
    write,
)
from dflow.compare.texts import LongTexts, TextRow, compare_texts
from dflow.compare.timing import Contestant, Speed

__all__ = [
    "FILES",
    "Comparison",
    "Contestant",
    "LongTexts",
    "Row",
    "Speed",
    "TextRow",
    "check_folder",
    "codecs",
    "compare",
    "compare_texts",
    "environment",
    "markdown",
    "material",
    "measure",
    "num_calls",
    "plot",
    "record",
    "with_compressors",
    "write",
]
