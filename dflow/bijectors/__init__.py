"""Invertible layers: coupling, autoregressive, linear, permutations, and their composition."""

from dflow.bijectors.autoregressive import Autoregressive
from dflow.bijectors.chain import Chain, Inverse
from dflow.bijectors.coupling import Coupling
from dflow.bijectors.linear import ActNorm, Conv1x1, fitting, initialize
from dflow.bijectors.permute import Permute, Reverse, squeeze

__all__ = [
    "ActNorm",
    "Autoregressive",
    "Chain",
    "Conv1x1",
    "Coupling",
    "Inverse",
    "Permute",
    "Reverse",
    "fitting",
    "initialize",
    "squeeze",
]
