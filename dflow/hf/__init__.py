"""dflow models as transformers models: config, save, load, generate, score. Thin: the models are in `zoo`."""

from dflow.hf.binary import DflowClassifier
from dflow.hf.card import Figure, card, write_card
from dflow.hf.causal import DflowCausalOutput, DflowForCausalLM
from dflow.hf.config import DflowClassifierConfig, DflowConfig, DflowImageConfig, FamilyConfig
from dflow.hf.folder import coding_tables, kind_of, load, save
from dflow.hf.images import DflowImageModel, DflowImageOutput
from dflow.hf.packed import PackedNetwork, agrees, pack
from dflow.hf.text import DflowModel, DflowOutput
from dflow.hf.tokenizer import DflowTokenizer
from dflow.models.files import split_calls, weight_files
from dflow.models.manifest import MANIFEST, Finding, check, clean, remove, replacing, verify

__all__ = [
    "MANIFEST",
    "DflowCausalOutput",
    "DflowClassifier",
    "DflowClassifierConfig",
    "DflowConfig",
    "DflowForCausalLM",
    "DflowImageConfig",
    "DflowImageModel",
    "DflowImageOutput",
    "DflowModel",
    "DflowOutput",
    "DflowTokenizer",
    "FamilyConfig",
    "Figure",
    "Finding",
    "PackedNetwork",
    "agrees",
    "card",
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
    "write_card",
]
