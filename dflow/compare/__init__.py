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
    write,
)
from dflow.compare.texts import TextRow, Texts, compare_texts
from dflow.compare.timing import Contestant, Speed

__all__ = [
    "FILES",
    "Comparison",
    "Contestant",
    "Row",
    "Speed",
    "TextRow",
    "Texts",
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
    "write",
]
