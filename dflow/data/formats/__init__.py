"""Files of pictures: what each format's own header says, and the one place where they are read exactly."""

from dflow.data.formats.layout import Layout, Refused, turned
from dflow.data.formats.read import SUFFIXES, WAY, StoredFormat, read, read_again

__all__ = ["SUFFIXES", "WAY", "Layout", "Refused", "StoredFormat", "read", "read_again", "turned"]
