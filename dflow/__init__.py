"""Discrete normalizing flows for text, dequantization for images: likelihoods that say what they are.

Names are imported when they are first used, so that ``import dflow`` costs next to nothing and loads
neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dflow.bijectors import ActNorm, Autoregressive, Chain, Conv1x1, Coupling, Inverse, Permute, Reverse
    from dflow.config import InputError
    from dflow.core import Bijector, Distribution, Elementwise
    from dflow.dequantize import (
        Columns,
        Dequantized,
        Elbo,
        FlowDequantizer,
        Hypercube,
        Iwbo,
        NormalDequantizer,
        Orthant,
        Renyi,
        TruncatedNormal,
        Uniform,
    )
    from dflow.distributions import (
        Categorical,
        ConditionalCategorical,
        ConditionalLogistic,
        ConditionalNormal,
        ConditionalWindow,
        CovarianceNormal,
        Logistic,
        LogisticMixture,
        Mixture,
        Normal,
        SequenceCategorical,
        Spectra,
        Stepwise,
    )
    from dflow.elementwise import (
        Affine,
        IntegerShift,
        MixtureLogistic,
        ModAffine,
        ModRank,
        ModShift,
        Spline,
    )
    from dflow.flows import Flow, Split
    from dflow.hf import (
        DflowClassifier,
        DflowClassifierConfig,
        DflowConfig,
        DflowImageConfig,
        DflowImageModel,
        DflowModel,
        PackedNetwork,
    )
    from dflow.models import TextModel, load

__version__ = "0.2.0"

__all__ = [
    "ActNorm",
    "Affine",
    "Autoregressive",
    "Bijector",
    "Categorical",
    "Chain",
    "Columns",
    "ConditionalCategorical",
    "ConditionalLogistic",
    "ConditionalNormal",
    "ConditionalWindow",
    "Conv1x1",
    "Coupling",
    "CovarianceNormal",
    "Dequantized",
    "DflowClassifier",
    "DflowClassifierConfig",
    "DflowConfig",
    "DflowImageConfig",
    "DflowImageModel",
    "DflowModel",
    "Distribution",
    "Elbo",
    "Elementwise",
    "Flow",
    "FlowDequantizer",
    "Hypercube",
    "InputError",
    "IntegerShift",
    "Inverse",
    "Iwbo",
    "Logistic",
    "LogisticMixture",
    "Mixture",
    "MixtureLogistic",
    "ModAffine",
    "ModRank",
    "ModShift",
    "Normal",
    "NormalDequantizer",
    "Orthant",
    "PackedNetwork",
    "Permute",
    "Renyi",
    "Reverse",
    "SequenceCategorical",
    "Spectra",
    "Spline",
    "Split",
    "Stepwise",
    "TextModel",
    "TruncatedNormal",
    "Uniform",
    "__version__",
    "load",
]

_HOMES = {
    "core": (
        "Bijector",
        "Distribution",
        "Elementwise",
    ),
    "elementwise": (
        "Affine",
        "IntegerShift",
        "MixtureLogistic",
        "ModAffine",
        "ModRank",
        "ModShift",
        "Spline",
    ),
    "bijectors": (
        "ActNorm",
        "Autoregressive",
        "Chain",
        "Conv1x1",
        "Coupling",
        "Inverse",
        "Permute",
        "Reverse",
    ),
    "distributions": (
        "Categorical",
        "ConditionalCategorical",
        "ConditionalLogistic",
        "ConditionalNormal",
        "ConditionalWindow",
        "CovarianceNormal",
        "Logistic",
        "LogisticMixture",
        "Mixture",
        "Normal",
        "SequenceCategorical",
        "Spectra",
        "Stepwise",
    ),
    "flows": (
        "Flow",
        "Split",
    ),
    "dequantize": (
        "Columns",
        "Dequantized",
        "Elbo",
        "FlowDequantizer",
        "Hypercube",
        "Iwbo",
        "NormalDequantizer",
        "Orthant",
        "Renyi",
        "TruncatedNormal",
        "Uniform",
    ),
    "hf": (
        "DflowClassifier",
        "DflowClassifierConfig",
        "DflowConfig",
        "DflowImageConfig",
        "DflowImageModel",
        "DflowModel",
        "PackedNetwork",
    ),
    "models": (
        "TextModel",
        "load",
    ),
    "config": ("InputError",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(f"dflow.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'dflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
