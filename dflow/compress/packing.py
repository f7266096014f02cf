"""Folders as archives: files are read, coded in pieces, in several processes where asked, and written."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import BinaryIO, Protocol

from dflow.coding.container import FINGERPRINT
from dflow.coding.numeric import MODES
from dflow.compress import chunks, dfl, pixels
from dflow.compress import folder as folders
from dflow.compress.archive import CODED, DEFLATED, STORED, ArchivedFile, ArchivedGroup, ArchiveWriter
from dflow.compress.clock import Clock, bytes_bar
from dflow.compress.coders import ImageCoder
from dflow.compress.crew import ALONE, Crew, Loaded
from dflow.compress.dfl import BATCH, LIMIT
from dflow.compress.folder import FolderFile, Item, Omissions, Opener
from dflow.compress.images import amount, check_fit, compress_pictures, in_words
from dflow.compress.text import compress_text
from dflow.compress.text_coder import TextCoder
from dflow.compress.tiles import grid
from dflow.config import InputError
from dflow.data import Bytes, Characters, formats
from dflow.distributions.drafted import Drafter

#: Values of pictures, and bytes of texts, of a piece. Chunks of a text that are each given the text before
#: them gain by longer pieces.
_VALUES, _BYTES, _ROLLING = 1 << 18, 1 << 18, 1 << 20


@dataclass(frozen=True)
class Packed:
    """A piece, coded: what the archive has of it, and what the report says.

    Attributes:
        kind: of the group.
        data: its bytes.
        amount: values or bytes in it.
        files: in order.
        encode: seconds.
        decode: the same, of verifying.
        notes: what is not kept, by file.
    """

    kind: int
    data: bytes
    amount: int
    files: tuple[ArchivedFile, ...]
    encode: Clock = field(default_factory=Clock)
    decode: Clock | None = None
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class FolderReport(dfl.BaseReport):
    """What compressing a folder gave.

    Attributes:
        raw: bytes that the files have that are in the archive.
        groups: of the archive.
        left_out: names of files that are not in it, and why.
        stored: names of files that are stored as they are, and why.
        notes: what is not kept, by file.
        seconds: from the first file to the last, on the clock.
    """

    raw: int
    groups: tuple[ArchivedGroup, ...]
    left_out: tuple[tuple[str, str], ...]
    stored: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]


class Packer(Opener, Protocol):
    """Reads and codes files for a kind of model."""

    @property
    def coder(self) -> ImageCoder | TextCoder:
        """The model."""
        ...

    def name_all(self, files: Sequence[FolderFile]) -> None:
        """Decide by which names files come back."""
        ...

    def __call__(self, piece: list[Item]) -> Packed:
        """A piece, coded and compared."""
        ...


@dataclass
class PicturePacker:
    """Pictures and arrays, by a model of images.

    Args:
        model: a coder.
        verify: decode each piece, and compare.
    """

    model: Loaded[ImageCoder]
    verify: bool = True
    _names: dict[str, str] = field(default_factory=dict)

    @property
    def coder(self) -> ImageCoder:
        """The model."""
        return self.model.value

    def name_all(self, files: Sequence[FolderFile]) -> None:
        """A picture comes back as PNG: ``x.jpg`` as ``x.png``, or as ``x.jpg.png`` where another ``x`` is."""
        paths = [PurePosixPath(file.name) for file in files]
        likely = [path for path in paths if path.suffix.lower() in formats.SUFFIXES]
        often, taken = Counter(path.with_suffix("") for path in likely), set(map(str, paths))
        # Files that are called as pictures are have the first choice.
        for path in (*likely, *paths):
            if str(path) in self._names or path.suffix.lower() in (".png", ".npy"):
                continue
            for back in (f"{path.with_suffix('')}.png", f"{path}.png"):
                if back not in taken and (often[path.with_suffix("")] < 2 or back == f"{path}.png"):
                    taken.add(back)
                    self._names[str(path)] = back
                    break

    def open(self, file: FolderFile) -> Item:
        """See `Opener`."""
        picture = pixels.read(file.path, name="")
        check_fit(self.coder, file.path, picture)
        form = picture.form
        name = file.name
        if not name.lower().endswith(form.file):
            if name not in self._names:
                raise InputError("another file comes back by its name with .png behind it; rename one")
            name = self._names[name]
        tiles = grid(form, self.coder.shape).size
        if tiles * self.coder.dim > LIMIT or amount(form) > LIMIT:
            raise InputError(f"{tiles * self.coder.dim:,} values in tiles, more than {LIMIT:,}; cut it")
        archived = ArchivedFile(name, file.size, in_words(form), file.mtime)
        if self.coder.borrows:
            # One chain of as many as there may be: each borrows anew.
            return Item(True, archived, file, picture, tiles / self.coder.most, picture.notes)
        # Pictures of a kind and of about one size are alike, so that what does not pay is stored alone.
        kind = form.full[3], form.depth, tiles.bit_length()
        room = max(BATCH, _VALUES // self.coder.dim)
        return Item(kind, archived, file, picture, tiles / room, picture.notes)

    def __call__(self, piece: list[Item]) -> Packed:
        """See `Packer`."""
        if piece[0].kind is None:
            return stored(piece)
        pictures = [
            replace(item.content, form=replace(item.content.form, name=str(i)))
            for i, item in enumerate(piece)
        ]
        data, report = compress_pictures(
            [item.source.path for item in piece], pictures, self.coder, verify=self.verify
        )
        notes = tuple((item.source.name, note) for item in piece for note in item.notes)
        files = tuple(item.file for item in piece)
        return Packed(CODED, data, report.values, files, report.encode, report.decode, notes)


@dataclass
class TextPacker:
    """Files of any kind, by a model of text.

    Args:
        model: a coder, and what proposes symbols when a piece is decoded again.
        batch: chunks that are coded together, at most.
        rolling: see `compress_text`.
        adapt: see `compress_text`.
        verify: decode each piece, and compare.
    """

    model: Loaded[tuple[TextCoder, Drafter | None]]
    batch: int = BATCH
    rolling: bool = False
    adapt: bool = False
    verify: bool = True

    @property
    def coder(self) -> TextCoder:
        """The model."""
        return self.model.value[0]

    def name_all(self, files: Sequence[FolderFile]) -> None:
        """Each comes back by its own."""

    def open(self, file: FolderFile) -> Item:
        """See `Opener`."""
        if file.size > LIMIT:
            raise InputError(f"larger than {LIMIT:,} bytes")
        content = file.path.read_bytes()
        try:
            content.decode()
            words, kind = "text, UTF-8", True
        except UnicodeDecodeError:
            words, kind = "bytes", False
        archived = ArchivedFile(file.name, len(content), words, file.mtime)
        share = len(content) / (_ROLLING if self.rolling else _BYTES)
        if (
            not isinstance(self.coder.tokenizer, (Bytes, Characters))
            and chunks.spell(content, self.coder) is None
        ):
            return Item(None, archived, file, content, share)
        return Item(kind, archived, file, content, share)

    def __call__(self, piece: list[Item]) -> Packed:
        """See `Packer`."""
        if piece[0].kind is None:
            return stored(piece)
        coder, drafter = self.model.value
        data, report = compress_text(
            {str(i): item.content for i, item in enumerate(piece)},
            coder,
            batch=self.batch,
            rolling=self.rolling,
            adapt=self.adapt,
            draft=drafter,
            verify=self.verify,
        )
        if report.stored:
            return replace(stored(piece), notes=tuple((piece[0].file.name, note) for note in report.notes))
        files = tuple(item.file for item in piece)
        return Packed(CODED, data, report.raw, files, report.encode, report.decode)


def stored(piece: list[Item]) -> Packed:
    """Bytes as they are, joined, or deflated where that is smaller."""
    whole = b"".join(item.content for item in piece)
    deflated, files = zlib.compress(whole, 9), tuple(item.file for item in piece)
    if len(deflated) < len(whole):
        return Packed(DEFLATED, deflated, len(whole), files)
    return Packed(STORED, whole, len(whole), files)


def compress_folder(
    walked: tuple[list[FolderFile], list[tuple[str, str]]],
    packer: Packer,
    stream: BinaryIO,
    *,
    store: bool = False,
    strict: bool = False,
    times: bool = False,
    crew: Crew = ALONE,
    progress: bool = False,
) -> FolderReport:
    """Write a folder as an archive.

    Args:
        walked: what `dflow.compress.folder.walk` gave.
        packer: reads and codes the files.
        stream: where the archive is written to.
        store: store what the model cannot code as it is, instead of leaving it out.
        strict: refuse the folder where anything is left out.
        times: keep when files were changed.
        crew: processes; the archive is the same for any number of them.
        progress: show a bar on stderr.

    Raises:
        InputError: nothing to compress; ``strict`` and something is left out; as of `compress_images`.
    """
    files, left_out = walked
    packer.name_all(files)
    # Loaded before processes are forked of this one.
    fingerprint, mode = packer.coder.fingerprint, MODES.index(packer.coder.mode)
    if strict:
        folders.check_all(files, packer, Omissions(list(left_out)), store)
    omissions, writer, packed, done = Omissions(list(left_out)), ArchiveWriter(stream), list[Packed](), 0
    with bytes_bar(sum(file.size for file in files), "compress", progress) as bar:
        for piece in crew.map(packer, folders.pieces(files, packer, omissions, store, bar.update)):
            entries = [file if times else replace(file, mtime=None) for file in piece.files]
            writer.add(piece.kind, piece.data, piece.amount, entries)
            packed.append(replace(piece, data=b""))
            bar.update(sum(file.size for file in piece.files))
            done += len(piece.files)
            bar.set_postfix_str(f"{done:,} of {len(files):,} files", refresh=False)
    if not packed:
        reasons = "; ".join(dfl.noted(omissions.left_out)[:3])
        raise InputError("no files to compress" + f": {reasons}" * bool(reasons))
    payload, is_coded = writer.bytes, any(piece.kind == CODED for piece in packed)
    writer.finish(fingerprint if is_coded else bytes(FINGERPRINT), mode)
    return FolderReport(
        files=sum(len(piece.files) for piece in packed),
        bytes=writer.bytes,
        header=writer.bytes - payload,
        analytic=None,
        encode=_sum([piece.encode for piece in packed]),
        decode=_sum([piece.decode for piece in packed if piece.decode]),
        raw=sum(file.size for piece in packed for file in piece.files),
        groups=tuple(writer.groups),
        left_out=tuple(omissions.left_out),
        stored=tuple(omissions.stored),
        notes=tuple(note for piece in packed for note in piece.notes),
    )


def _sum(clocks: Sequence[Clock]) -> Clock:
    return Clock(sum(clock.total for clock in clocks), sum(clock.network for clock in clocks))
