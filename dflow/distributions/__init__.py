"""Laws with exact likelihood and exact sampling."""

from dflow.distributions.categorical import Categorical, ConditionalCategorical, Mixture
from dflow.distributions.sequence import SequenceCategorical
from dflow.distributions.spectra import Spectra

__all__ = ["Categorical", "ConditionalCategorical", "Mixture", "SequenceCategorical", "Spectra"]
