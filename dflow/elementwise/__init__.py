"""Families of one-dimensional bijections, without weights."""

from dflow.elementwise.continuous import Affine, Spline
from dflow.elementwise.discrete import ModAffine, ModRank, ModShift

__all__ = ["Affine", "ModAffine", "ModRank", "ModShift", "Spline"]
