"""Files as ``.dfl`` files and back, without loss, by a model's likelihood."""

from dflow.compress.images import (
    LIMIT,
    ImageCoder,
    Report,
    Stage,
    compress_images,
    decompress_images,
    describe_images,
    stages,
)
from dflow.compress.pixels import Form, Picture

__all__ = [
    "LIMIT",
    "Form",
    "ImageCoder",
    "Picture",
    "Report",
    "Stage",
    "compress_images",
    "decompress_images",
    "describe_images",
    "stages",
]
