"""Model folders and models of text without transformers: names, files, counts, loading, scores and draws."""

from dflow.models.files import KINDS, config_of, model_type, split_calls
from dflow.models.folder import load
from dflow.models.settings import TextConfig
from dflow.models.symbols import TextModel, prompted

__all__ = ["KINDS", "TextConfig", "TextModel", "config_of", "load", "model_type", "prompted", "split_calls"]
