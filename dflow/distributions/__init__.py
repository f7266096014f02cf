"""Laws with exact likelihood and exact sampling."""

from dflow.distributions.any_order import AnyOrder, Confident, Ordered, Walk
from dflow.distributions.categorical import Categorical, ConditionalCategorical, Mixture
from dflow.distributions.drafted import Drafted, Drafter, LawDrafter
from dflow.distributions.logistic import ConditionalLogistic, Logistic, LogisticMixture
from dflow.distributions.normal import ConditionalNormal, CovarianceNormal, Gaussian, Normal, StandardNormal
from dflow.distributions.ranked import RankedSequence
from dflow.distributions.sequence import SequenceCategorical
from dflow.distributions.spectra import Spectra
from dflow.distributions.stepwise import Stepwise
from dflow.distributions.window import ConditionalWindow

__all__ = [
    "AnyOrder",
    "Categorical",
    "ConditionalCategorical",
    "ConditionalLogistic",
    "ConditionalNormal",
    "ConditionalWindow",
    "Confident",
    "CovarianceNormal",
    "Drafted",
    "Drafter",
    "Gaussian",
    "LawDrafter",
    "Logistic",
    "LogisticMixture",
    "Mixture",
    "Normal",
    "Ordered",
    "RankedSequence",
    "SequenceCategorical",
    "Spectra",
    "StandardNormal",
    "Stepwise",
    "Walk",
]
