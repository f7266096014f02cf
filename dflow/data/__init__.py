"""Text for flows: known sets, the user's own files and synthetic laws; tokenizers, crops and chunks."""

from dflow.data.sets import FileRow, SetRow, check, list_sets, prepare
from dflow.data.synthetic import Law
from dflow.data.text import MAX_SENTENCE, Corpus, DataConfig, Draws, Text, load
from dflow.data.tokenizers import Bytes, Characters, Numbers, SentencePiece, Tokenizer

__all__ = [
    "MAX_SENTENCE",
    "Bytes",
    "Characters",
    "Corpus",
    "DataConfig",
    "Draws",
    "FileRow",
    "Law",
    "Numbers",
    "SentencePiece",
    "SetRow",
    "Text",
    "Tokenizer",
    "check",
    "list_sets",
    "load",
    "prepare",
]
