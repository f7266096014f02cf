"""Files as ``.dfl`` files and back, without loss, by a model's likelihood."""

from dflow.compress.images import (
    ImageCoder,
    Report,
    compress_images,
    decompress_images,
    describe_images,
)
from dflow.compress.pixels import Form, Picture

__all__ = [
    "Form",
    "ImageCoder",
    "Picture",
    "Report",
    "compress_images",
    "decompress_images",
    "describe_images",
]
