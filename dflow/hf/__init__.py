"""dflow models as transformers models: config, save, load, generate, score. Thin: the models are in `zoo`."""

from dflow.hf.binary import DflowClassifier, DflowClassifierConfig
from dflow.hf.folder import coding_tables, kind_of, load, save, split_calls
from dflow.hf.images import DflowImageConfig, DflowImageModel, DflowImageOutput
from dflow.hf.packed import PackedNetwork, agrees, pack
from dflow.hf.symbols import DflowConfig, DflowModel, DflowOutput

__all__ = [
    "DflowClassifier",
    "DflowClassifierConfig",
    "DflowConfig",
    "DflowImageConfig",
    "DflowImageModel",
    "DflowImageOutput",
    "DflowModel",
    "DflowOutput",
    "PackedNetwork",
    "agrees",
    "coding_tables",
    "kind_of",
    "load",
    "pack",
    "save",
    "split_calls",
]
