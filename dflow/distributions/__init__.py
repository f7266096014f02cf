"""Laws with exact likelihood and exact sampling."""

from dflow.distributions.any_order import AnyOrder, Confident, Ordered, Walk
from dflow.distributions.categorical import Categorical, ConditionalCategorical, Mixture
from dflow.distributions.sequence import SequenceCategorical

__all__ = [
    "AnyOrder",
    "Categorical",
    "ConditionalCategorical",
    "Confident",
    "Mixture",
    "Ordered",
    "SequenceCategorical",
    "Walk",
]
