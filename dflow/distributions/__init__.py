"""Laws with exact likelihood and exact sampling."""

from dflow.distributions.categorical import Categorical, ConditionalCategorical, Mixture

__all__ = ["Categorical", "ConditionalCategorical", "Mixture"]
