"""Files of pictures: what each format's own header says, and the one place where they are read exactly."""

from dflow.data.formats.layout import Layout, Refused, turned
from dflow.data.formats.read import SUFFIXES, WAY, Stored, is_picture_name, read, read_again

__all__ = [
    "SUFFIXES",
    "WAY",
    "Layout",
    "Refused",
    "Stored",
    "is_picture_name",
    "read",
    "read_again",
    "turned",
]
