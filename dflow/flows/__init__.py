"""Flow (a bijector with a base), Split (a part factored out), Infilled (the hidden part of a sequence).

All are distributions, so they nest.
"""

from dflow.flows.flow import Flow
from dflow.flows.infilled import Infilled
from dflow.flows.split import Split

__all__ = ["Flow", "Infilled", "Split"]
