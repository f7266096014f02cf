"""Families of one-dimensional bijections, without weights."""

from dflow.elementwise.continuous import Affine, Spline
from dflow.elementwise.discrete import ModAffine, ModRank, ModShift
from dflow.elementwise.integer import IntegerShift
from dflow.elementwise.mixture import MixtureLogistic

__all__ = ["Affine", "IntegerShift", "MixtureLogistic", "ModAffine", "ModRank", "ModShift", "Spline"]
