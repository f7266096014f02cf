"""Laws with exact likelihood and exact sampling."""

from dflow.distributions.categorical import Categorical, ConditionalCategorical, Mixture
from dflow.distributions.sequence import SequenceCategorical

__all__ = ["Categorical", "ConditionalCategorical", "Mixture", "SequenceCategorical"]
