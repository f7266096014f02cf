"""Dequantization: continuous densities as laws of discrete data."""

from dflow.dequantize.bounds import Bound, Elbo, Estimate, Iwbo, Renyi
from dflow.dequantize.dequantizer import Dequantizer, FlowDequantizer, NormalDequantizer, Uniform
from dflow.dequantize.model import Assessment, Dequantized, Units
from dflow.dequantize.partition import Columns, Hypercube, Orthant, Partition
from dflow.dequantize.truncated import TruncatedNormal

__all__ = [
    "Assessment",
    "Bound",
    "Columns",
    "Dequantized",
    "Dequantizer",
    "Elbo",
    "Estimate",
    "FlowDequantizer",
    "Hypercube",
    "Iwbo",
    "NormalDequantizer",
    "Orthant",
    "Partition",
    "Renyi",
    "TruncatedNormal",
    "Uniform",
    "Units",
]
