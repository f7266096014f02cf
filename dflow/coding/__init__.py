"""Lossless coding: laws on Z/K and on the integers as streams of bytes."""

from dflow.coding.codec import pop, push, steps
from dflow.coding.coder import Coder
from dflow.coding.numeric import (
    MODES,
    fingerprint,
    frozen_tables,
    in_pieces,
    one_thread,
    prepare,
)
from dflow.coding.tables import LogisticTables, Tables, integer_counts, logistic_tables, logit_counts

__all__ = [
    "MODES",
    "Coder",
    "LogisticTables",
    "Tables",
    "fingerprint",
    "frozen_tables",
    "in_pieces",
    "integer_counts",
    "logistic_tables",
    "logit_counts",
    "one_thread",
    "pop",
    "prepare",
    "push",
    "steps",
]
