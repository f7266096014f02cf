"""Lossless coding: laws on Z/K and on the integers as streams of bytes."""

from dflow.coding.codec import pop, push, steps
from dflow.coding.coder import Coder
from dflow.coding.tables import LogisticTables, Tables, integer_counts, logistic_tables

__all__ = [
    "Coder",
    "LogisticTables",
    "Tables",
    "integer_counts",
    "logistic_tables",
    "pop",
    "push",
    "steps",
]
