"""Families of one-dimensional bijections, without weights."""

from dflow.elementwise.continuous import Affine, Spline
from dflow.elementwise.discrete import DISCRETE, ModAffine, ModRank, ModShift
from dflow.elementwise.integer import IntegerShift
from dflow.elementwise.mixture import MixtureLogistic

__all__ = [
    "DISCRETE",
    "Affine",
    "IntegerShift",
    "MixtureLogistic",
    "ModAffine",
    "ModRank",
    "ModShift",
    "Spline",
]
