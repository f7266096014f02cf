"""Text, images and tables for flows: known sets, the user's own, synthetic laws; tokenizers, pictures."""

from dflow.data.corpus import Corpus, Draws, Text
from dflow.data.counting import GrowingCounts, count
from dflow.data.image_sets import KNOWN as IMAGES
from dflow.data.images import load_images
from dflow.data.known import KnownFile, KnownSet
from dflow.data.laws import Law
from dflow.data.pictures import grid
from dflow.data.pieces import SentencePiece
from dflow.data.samples import ImageSet, Samples
from dflow.data.sets import KNOWN as TEXTS
from dflow.data.sets import FileRow, SetRow, check, list_sets, prepare
from dflow.data.settings import DataConfig, ImageConfig
from dflow.data.text import MAX_SENTENCE, load
from dflow.data.tokenizers import Bytes, Characters, Numbers, Tokenizer

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
    "GrowingCounts",
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
    "count",
    "grid",
    "list_sets",
    "load",
    "load_images",
    "prepare",
]
