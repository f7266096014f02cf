"""Models of images, ready to code tiles: integer flows, and dequantized flows by local bits-back."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log, prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from dflow import hf
from dflow.coding import bits_back, codec, container, levels
from dflow.coding.bits_back import BitsBack
from dflow.coding.container import Damaged, Reader, crc32, varint
from dflow.coding.local import CodingSettings
from dflow.coding.normals import normal_tables
from dflow.coding.numeric import MODES, Fingerprint, fingerprint, in_pieces, prepare
from dflow.compress.dfl import BATCH, name_bytes, read_name
from dflow.config import InputError
from dflow.hf import DflowImageModel

#: Values of a segment by default (or 64 tiles), and at most: some 200 bytes of memory each.
_SEGMENT, _TILES, _LARGEST = 1 << 19, 64, 1 << 22


@dataclass(frozen=True, eq=False)
class ImageCoder:
    """A model of images, ready to code tiles: an integer flow, or a `BitsBackCoder`.

    Attributes:
        law: prepared in ``mode``.
        shape: ``(C, H, W)`` of a tile.
        bits: of a value; all values are from 0 to ``2^bits - 1``.
        mode: one of `MODES`.
        fingerprint: 8 bytes.
        where: what to call the model.
        batch: tiles that the networks see at a time.
        settings: where it `borrows`, of the grids that it compresses on.
        lend: where it borrows, name and content of a file to borrow bits of, which comes back with the
            pictures; without one random bits are borrowed.
        larger: where it borrows, whether files may come out larger than the values packed.
    """

    law: Any
    shape: tuple[int, int, int]
    bits: int
    mode: str
    fingerprint: bytes
    where: str = "the model"
    batch: int = BATCH
    settings: CodingSettings = field(default_factory=CodingSettings)
    lend: tuple[str, bytes] | None = None
    larger: bool = False

    #: What its files hold.
    kind: ClassVar[int] = container.IMAGES
    #: Whether it takes auxiliary bits.
    borrows: ClassVar[bool] = False

    @classmethod
    def of(cls, model: DflowImageModel, bits: int, mode: str, folder: str, batch: int) -> ImageCoder:
        """The coder of a model as it is stored.

        Raises:
            ValueError: a mode that the model cannot take; a part of it that has no code.
        """
        whole = Fingerprint(model.distribution, mode)
        digest = whole.of({}) if mode == "float64" else None
        tables = hf.coding_tables(folder, model.distribution, digest)
        law = in_pieces(prepare(model.distribution, mode, tables), batch)
        codec.check_code(law)
        C, H, W = model.config.shape
        return cls(law, (C, H, W), bits, mode, whole.of(tables)[: container.FINGERPRINT], folder, batch)

    @property
    def dim(self) -> int:
        """Values of a tile."""
        return prod(self.shape)

    @property
    def most(self) -> int:
        """Tiles of a segment, at most."""
        return max(1, _LARGEST // self.dim)

    @property
    def num_levels(self) -> int:
        """Levels of the law."""
        return levels.num_levels(self.law)

    def tiles(self, total: int) -> int:
        """Tiles of a segment, if nobody asks for others."""
        return min(self.most, max(_TILES, _SEGMENT // self.dim))

    def push(self, rows: Tensor, is_first: bool) -> list[bytes]:
        """A segment, level by level: ``rows`` int64 ``(n, dim)``, of the first segment or a later one."""
        return levels.push(self.law, rows)

    def pop(self, n: int, coded: Sequence[bytes]) -> tuple[Tensor, dict[str, bytes]]:
        """The inverse: the rows, and by name the files that bits were borrowed of.

        Levels that are missing are made up. ValueError for damage.
        """
        return levels.pop(self.law, n, coded), {}

    def pays(self, coded: Sequence[bytes], packed: bytes, values: int) -> bool:
        """Whether a segment that is coded is worth it, beside so many values, packed and deflated."""
        return sum(map(len, coded)) < len(packed)

    @torch.no_grad()
    def ideal(self, rows: Tensor) -> float:
        """Bits of tiles by the likelihood."""
        batches = rows.split(self.batch)
        return -sum(float(self.law.log_prob(batch).double().sum()) for batch in batches) / log(2)


@dataclass(frozen=True)
class FileHead:
    """What stands before the stack of a chain, see `dflow.coding.bits_back`.

    Attributes:
        settings: of the grids that latents lie on.
        batch: rows that were coded together, at most.
        random: pseudo-random words that were borrowed.
        given: borrowed bytes of a file, which come back.
        name: of that file.
        crc: CRC-32 of its name and these bytes.
    """

    settings: CodingSettings
    batch: int
    random: int
    given: int = 0
    name: str = ""
    crc: int = 0

    def write(self) -> bytes:
        """The bytes."""
        s = self.settings
        data = b"".join(map(varint, (s.grid, s.sigma, s.noise, self.batch, self.random, self.given)))
        if self.given:
            data += name_bytes(self.name) + self.crc.to_bytes(4, "little")
        return data

    @classmethod
    def read(cls, data: bytes) -> tuple[FileHead, bytes]:
        """The head and what follows it.

        Raises:
            Damaged: not a head.
            ValueError: settings that are out of range.
        """
        reader = Reader(data)
        settings = CodingSettings(*(reader.varint(64) for _ in range(3)))
        batch, random, given = reader.varint(1 << 32), reader.varint(1 << 40), reader.varint(1 << 60)
        name = read_name(reader) if given else ""
        crc = int.from_bytes(reader.take(4), "little") if given else 0
        stack = reader.take(reader.left)
        if not batch or given + 4 * random > len(stack):
            raise Damaged("declares more borrowed bytes than it contains")
        return cls(settings, batch, random, given, name, crc), stack


@dataclass(frozen=True, eq=False)
class BitsBackCoder(ImageCoder):
    """A dequantized flow, ready to code; ``law`` is what `dflow.coding.bits_back.ready` gave."""

    kind: ClassVar[int] = container.BITS_BACK
    borrows: ClassVar[bool] = True

    @classmethod
    def of(cls, model: DflowImageModel, bits: int, mode: str, folder: str, batch: int) -> BitsBackCoder:
        """The coder of a model as it is stored.

        Raises:
            ValueError: a mode other than float64; a model that has no local code.
        """
        if mode != "float64":
            raise ValueError(f"a dequantized flow is coded in float64; it cannot take mode {mode}")
        extra = b"bits back " + normal_tables().fingerprint().encode()
        digest = fingerprint(model.dequantized, {}, mode, extra)[: container.FINGERPRINT]
        C, H, W = model.config.shape
        coder = cls(bits_back.ready(model.dequantized), (C, H, W), bits, mode, digest, folder, batch)
        coder.code(coder.settings)
        return coder

    def code(self, settings: CodingSettings) -> BitsBack:
        """The code on some grids."""
        return self._code if settings == self.settings else BitsBack(self.law, self.dim, settings)

    @functools.cached_property
    def _code(self) -> BitsBack:
        return BitsBack(self.law, self.dim, self.settings)

    @property
    def most(self) -> int:
        """Tiles of a segment, at most: they are not all in memory at once."""
        return max(1, 4 * _LARGEST // self.dim)

    @property
    def num_levels(self) -> int:
        """One."""
        return 1

    def tiles(self, total: int) -> int:
        """All in a chain, or in as few as may be."""
        return ceil(total / ceil(total / self.most))

    def push(self, rows: Tensor, is_first: bool) -> list[bytes]:
        """See `ImageCoder`."""
        name, given = (self.lend if is_first else None) or ("", b"")
        stream = bits_back.push(self._code, rows, given, self.batch)
        if not given:
            name = ""
        crc = crc32(name.encode() + given)
        head = FileHead(self.settings, self.batch, stream.random // 32, len(given), name, crc)
        return [head.write() + stream.data]

    def pop(self, n: int, coded: Sequence[bytes]) -> tuple[Tensor, dict[str, bytes]]:
        """See `ImageCoder`."""
        head, data = FileHead.read(coded[0])
        code = self.code(head.settings)
        rows, given = bits_back.pop(code, n, data, head.given, head.batch, 32 * head.random)
        if not given:
            return rows, {}
        if crc32(head.name.encode() + given) != head.crc:
            raise Damaged(f"{head.name}, the auxiliary file, is damaged (checksum)")
        return rows, {head.name: given}

    def pays(self, coded: Sequence[bytes], packed: bytes, values: int) -> bool:
        """True: a dequantized flow is chosen for its chains, which are never replaced by packed values.

        Raises:
            InputError: it is larger than the values as they are, and nobody said that it may be.
        """
        head, _ = FileHead.read(coded[0])
        size, plain = len(coded[0]) - head.given, ceil(values * self.bits / 8)
        if size < plain or self.larger:
            return True
        random, way = 4 * head.random, "Compress more of them together"
        if not random:
            why = "the model codes these pictures worse than that"
        elif head.given:
            why = (
                f"{random:,} of them are random bits that the first pictures need beyond the {head.given:,} "
                f"bytes that {head.name} lends, and too few pictures share them"
            )
            way += ", lend the bits of a larger file (--auxiliary)"
        else:
            why = f"{random:,} of them are random bits that the first pictures need, and too few share them"
            way += ", lend the bits of a file (--auxiliary)"
        raise InputError(
            f"{size:,} bytes for values of {plain:,}: {why}. {way}, use an integer flow, or take it so "
            "(--allow-larger)"
        )

    @torch.no_grad()
    def ideal(self, rows: Tensor) -> float:
        """Bits of tiles by the bound, for noise of its own."""
        generator = torch.Generator().manual_seed(0)
        weights = (self.law.log_weights(batch, generator=generator) for batch in rows.split(self.batch))
        return -sum(float(batch.sum()) for batch in weights) / log(2)


def load_image_coder(folder: str | os.PathLike[str], mode: str = "float64", batch: int = BATCH) -> ImageCoder:
    """The model in ``folder``, ready to code.

    Args:
        folder: of an integer flow or a dequantized one.
        mode: numeric mode, see `dflow.coding.numeric`.
        batch: tiles that the networks see at a time.

    Raises:
        InputError: no model, or not one of pictures; a mode that it cannot take.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if batch < 1:
        raise InputError(f"batch size {batch} must be at least 1")
    model = hf.load(folder, "cpu", DflowImageModel)
    ranges = set(model.config.settings().ranges)
    low, high = next(iter(ranges)) or (0, 0)
    if len(ranges) > 1 or low or high + 1 not in [1 << b for b in range(1, 17)]:
        raise InputError(
            f"{folder}: a model of a table, or of values other than 0..2^b - 1; it compresses no pictures"
        )
    make = ImageCoder.of if model.exact else BitsBackCoder.of
    try:
        return make(model, high.bit_length(), mode, os.fspath(folder), batch)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
