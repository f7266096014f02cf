"""The list of files in the header of a ``.dfl`` of images."""

from __future__ import annotations

import platform
import zlib
from dataclasses import dataclass

import torch

from dflow.coding import container
from dflow.coding.container import Container, Damaged, Reader, crc32, varint
from dflow.coding.numeric import MODES
from dflow.compress import dfl, pixels
from dflow.compress.pixels import Form
from dflow.config import InputError

#: Bytes of the list of files.
_META = 1 << 22


def machine() -> int:
    """Checksum of the machine and software, on which results in float32 depend."""
    about = (
        platform.machine(), torch.__version__, torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(), torch.backends.mkldnn.enabled,
    )  # fmt: skip
    return crc32(repr(about).encode())


@dataclass(frozen=True)
class ImagePlan:
    """What the header says of the files.

    Attributes:
        tiles: of a segment; 0 for all in one.
        machine: what `machine` gave, in mode float32; else None.
        forms: of the files.
    """

    tiles: int
    machine: int | None
    forms: tuple[Form, ...]

    def to_bytes(self) -> bytes:
        """As the container holds it.

        Raises:
            InputError: more files than there is room for.
        """
        chunks = [] if self.machine is None else [self.machine.to_bytes(4, "little")]
        data = b"".join([*chunks, varint(len(self.forms)), *map(_form_bytes, self.forms)])
        if len(data) > _META:
            raise InputError(
                f"{len(self.forms):,} files are too many for one; compress fewer, or use --separate"
            )
        packed = zlib.compress(data, 9)
        is_packed = len(packed) < len(data)
        return varint(self.tiles * 2 + is_packed) + (packed if is_packed else data)

    @staticmethod
    def read(parsed: Container) -> ImagePlan:
        """The inverse; `Damaged` where the header is not one of images."""
        if len(parsed.meta) > _META:
            raise Damaged("its list of files is too long")
        reader = Reader(parsed.meta)
        tiles, is_packed = divmod(reader.varint(1 << 41), 2)
        if is_packed:
            reader = Reader(dfl.inflate(reader.take(reader.left), _META, "its list of files is"))
        single = MODES[parsed.mode] == "float32"
        stamp = int.from_bytes(reader.take(4), "little") if single else None
        forms: dict[str, Form] = {}
        for _ in range(reader.varint(reader.left // 4)):
            form = _read_form(reader)
            if form.file in forms:
                raise Damaged(f"holds {form.file} twice")
            forms[form.file] = form
        reader.finish()
        if not forms:
            raise Damaged("holds no files")
        return ImagePlan(tiles, stamp, tuple(forms.values()))


def parse(data: bytes, prefix: bool = False) -> tuple[Container, ImagePlan]:
    """A ``.dfl`` of images; `Damaged` for any other file."""
    parsed = dfl.parse(data, "images", (container.IMAGES, container.BITS_BACK), prefix=prefix)
    return parsed, ImagePlan.read(parsed)


def _form_bytes(form: Form) -> bytes:
    detail = 0 if form.alpha is None else 1 if form.alpha >= 0 else 2
    if form.is_array:
        detail = len(form.dims) - 2
    alpha = varint(form.alpha) if form.alpha is not None and form.alpha >= 0 else b""
    numbers = b"".join(map(varint, form.dims)) + alpha
    return bytes([form.source << 6 | detail << 4 | form.depth - 1]) + numbers + dfl.name_bytes(form.name)


def _read_form(reader: Reader) -> Form:
    byte = reader.byte()
    source, detail, depth = byte >> 6, byte >> 4 & 3, (byte & 15) + 1
    is_array = source >= pixels.UINT8
    if detail == 3 or (source == pixels.UINT8 and depth > 8):
        raise Damaged("a form of file that this version does not know")
    dims = tuple(reader.varint(1 << 40) for _ in range(2 + detail if is_array else 2))
    alpha = None
    if not is_array and detail:
        alpha = reader.varint((1 << 16) - 1) if detail == 1 else -1
    form = Form(dfl.read_name(reader), source, depth, dims, alpha)
    if 0 in dims or (alpha or 0) >> form.file_depth > 0:
        raise Damaged(f"holds {form.file} empty or with an alpha that its values cannot have")
    return form
