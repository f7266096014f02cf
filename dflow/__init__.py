"""Text generation with discrete normalizing flows: exact likelihood, few network calls.

Names are imported when they are first used, so that ``import dflow`` costs next to nothing and loads
neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dflow.bijectors import Autoregressive, Chain, Coupling, Inverse, Permute, Reverse
    from dflow.config import InputError
    from dflow.core import Bijector, Distribution, Elementwise
    from dflow.distributions import (
        Categorical,
        ConditionalCategorical,
        Mixture,
        SequenceCategorical,
        Spectra,
    )
    from dflow.elementwise import ModAffine, ModRank, ModShift
    from dflow.flows import Flow, Split
    from dflow.hf import DflowConfig, DflowModel

__version__ = "0.1.0"

__all__ = [
    "Autoregressive",
    "Bijector",
    "Categorical",
    "Chain",
    "ConditionalCategorical",
    "Coupling",
    "DflowConfig",
    "DflowModel",
    "Distribution",
    "Elementwise",
    "Flow",
    "InputError",
    "Inverse",
    "Mixture",
    "ModAffine",
    "ModRank",
    "ModShift",
    "Permute",
    "Reverse",
    "SequenceCategorical",
    "Spectra",
    "Split",
    "__version__",
]

_HOMES = {
    "core": ("Bijector", "Distribution", "Elementwise"),
    "elementwise": ("ModAffine", "ModRank", "ModShift"),
    "bijectors": ("Autoregressive", "Chain", "Coupling", "Inverse", "Permute", "Reverse"),
    "distributions": ("Categorical", "ConditionalCategorical", "Mixture", "SequenceCategorical", "Spectra"),
    "flows": ("Flow", "Split"),
    "hf": ("DflowConfig", "DflowModel"),
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
