"""Text, images and tables for flows: known sets, the user's own, synthetic laws; tokenizers, pictures."""

from dflow.data.image_sets import KNOWN as IMAGES
from dflow.data.images import ImageConfig, ImageSet, Samples, load_images
from dflow.data.known import KnownFile, KnownSet
from dflow.data.pictures import grid
from dflow.data.sets import KNOWN as TEXTS
from dflow.data.sets import FileRow, SetRow, check, list_sets, prepare
from dflow.data.synthetic import Law
from dflow.data.text import MAX_SENTENCE, Corpus, DataConfig, Draws, Text, load
from dflow.data.tokenizers import Bytes, Characters, Numbers, SentencePiece, Tokenizer

__all__ = [
    "IMAGES",
    "MAX_SENTENCE",
    "TEXTS",
    "Bytes",
    "Characters",
    "Corpus",
    "DataConfig",
    "Draws",
    "FileRow",
    "ImageConfig",
    "ImageSet",
    "KnownFile",
    "KnownSet",
    "Law",
    "Numbers",
    "Samples",
    "SentencePiece",
    "SetRow",
    "Text",
    "Tokenizer",
    "check",
    "grid",
    "list_sets",
    "load",
    "load_images",
    "prepare",
]
