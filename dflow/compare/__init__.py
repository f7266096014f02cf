"""Models beside models, and models beside classical codecs."""

from dflow.compare import codecs, material
from dflow.compare.models import (
    FILES,
    Comparison,
    Contestant,
    Row,
    Speed,
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

__all__ = [
    "FILES",
    "Comparison",
    "Contestant",
    "Row",
    "Speed",
    "check_folder",
    "codecs",
    "compare",
    "environment",
    "markdown",
    "material",
    "measure",
    "num_calls",
    "plot",
    "record",
    "write",
]
