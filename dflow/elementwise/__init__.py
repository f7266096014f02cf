"""Families of one-dimensional bijections, without weights."""

from dflow.elementwise.continuous import Affine, Spline
from dflow.elementwise.discrete import ModAffine, ModRank, ModShift
from dflow.elementwise.integer import IntegerShift

__all__ = ["Affine", "IntegerShift", "ModAffine", "ModRank", "ModShift", "Spline"]
