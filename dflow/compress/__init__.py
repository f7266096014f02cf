"""Files as ``.dfl`` files and back, without loss, by a model's likelihood."""

from dflow.compress.coders import BitsBackCoder, ImageCoder
from dflow.compress.images import (
    LIMIT,
    Report,
    Stage,
    compress_images,
    decompress_images,
    describe_images,
    stages,
)
from dflow.compress.pixels import Form, Picture
from dflow.compress.text import TextCoder, TextReport, compress_text, decompress_text, describe_text

__all__ = [
    "LIMIT",
    "BitsBackCoder",
    "Form",
    "ImageCoder",
    "Picture",
    "Report",
    "Stage",
    "TextCoder",
    "TextReport",
    "compress_images",
    "compress_text",
    "decompress_images",
    "decompress_text",
    "describe_images",
    "describe_text",
    "stages",
]
