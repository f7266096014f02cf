"""dflow models as transformers models: config, save, load, generate, score. Thin: the models are in `zoo`."""

from dflow.hf.binary import DflowClassifier
from dflow.hf.config import DflowClassifierConfig, DflowConfig, DflowImageConfig, FamilyConfig
from dflow.hf.folder import coding_tables, kind_of, load, save
from dflow.hf.images import DflowImageModel, DflowImageOutput
from dflow.hf.packed import PackedNetwork, agrees, pack
from dflow.hf.text import DflowModel, DflowOutput
from dflow.models.files import split_calls, weight_files
from dflow.models.manifest import MANIFEST, Finding, check, clean, remove, replacing, verify

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
    "FamilyConfig",
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
