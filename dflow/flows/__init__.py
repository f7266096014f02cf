"""Flow (a bijector with a base) and Split (a part factored out): both are distributions, so they nest."""

from dflow.flows.flow import Flow
from dflow.flows.split import Split

__all__ = ["Flow", "Split"]
