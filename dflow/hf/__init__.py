"""dflow models as transformers models: config, save, load, generate, score. Thin: the models are in `zoo`."""

from dflow.hf.binary import DflowClassifier, DflowClassifierConfig
from dflow.hf.folder import coding_tables, kind_of, load, save, split_calls, weight_files
from dflow.hf.images import DflowImageConfig, DflowImageModel, DflowImageOutput
from dflow.hf.manifest import MANIFEST, Finding, check, clean, remove, replacing, verify
from dflow.hf.packed import PackedNetwork, agrees, pack
from dflow.hf.symbols import DflowConfig, DflowModel, DflowOutput

__all__ = [
    "MANIFEST",
    "DflowClassifier",
    "DflowClassifierConfig",
    "DflowConfig",
    "DflowImageConfig",
    "DflowImageModel",
    "DflowImageOutput",
    "DflowModel",
    "DflowOutput",
    "Finding",
    "PackedNetwork",
    "agrees",
    "check",
    "clean",
    "coding_tables",
    "kind_of",
    "load",
    "pack",
    "remove",
    "replacing",
    "save",
    "split_calls",
    "verify",
    "weight_files",
]
