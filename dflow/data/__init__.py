"""Text for flows: known sets and the user's own files, tokenizers, crops and chunks."""

from dflow.data.sets import FileRow, SetRow, check, list_sets, prepare
from dflow.data.text import MAX_SENTENCE, Corpus, DataConfig, Text, load
from dflow.data.tokenizers import Bytes, Characters, SentencePiece, Tokenizer

__all__ = [
    "MAX_SENTENCE",
    "Bytes",
    "Characters",
    "Corpus",
    "DataConfig",
    "FileRow",
    "SentencePiece",
    "SetRow",
    "Text",
    "Tokenizer",
    "check",
    "list_sets",
    "load",
    "prepare",
]
