"""Files as ``.dfl`` files and back, without loss, by a model's likelihood."""

from dflow.compress.ahead import Drafts
from dflow.compress.coders import BitsBackCoder, ImageCoder, load_image_coder
from dflow.compress.dfl import LIMIT
from dflow.compress.images import (
    Report,
    Stage,
    compress_images,
    decompress_images,
    describe_images,
    stages,
)
from dflow.compress.pixels import Form, Picture
from dflow.compress.segments import Restored
from dflow.compress.text import TextReport, compress_text, decompress_text, describe_text
from dflow.compress.text_coder import TextCoder

__all__ = [
    "LIMIT",
    "BitsBackCoder",
    "Drafts",
    "Form",
    "ImageCoder",
    "Picture",
    "Report",
    "Restored",
    "Stage",
    "TextCoder",
    "TextReport",
    "compress_images",
    "compress_text",
    "decompress_images",
    "decompress_text",
    "describe_images",
    "describe_text",
    "load_image_coder",
    "stages",
]
