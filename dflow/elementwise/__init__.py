"""Families of one-dimensional bijections, without weights."""

from dflow.elementwise.discrete import ModAffine, ModRank, ModShift

__all__ = ["ModAffine", "ModRank", "ModShift"]
