"""Invertible layers: coupling, autoregressive, permutations, and their composition."""

from dflow.bijectors.autoregressive import Autoregressive
from dflow.bijectors.chain import Chain, Inverse
from dflow.bijectors.coupling import Coupling
from dflow.bijectors.permute import Permute, Reverse

__all__ = ["Autoregressive", "Chain", "Coupling", "Inverse", "Permute", "Reverse"]
