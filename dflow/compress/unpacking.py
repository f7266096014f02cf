"""Archives back as files: all of them or some, and what can be checked with a model and without one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from dflow.coding import container
from dflow.coding.container import Damaged
from dflow.compress import dfl, image_plan, pixels, text_coder
from dflow.compress.ahead import Drafts
from dflow.compress.archive import CODED, DEFLATED, Archive, ArchivedFile, ArchivedGroup
from dflow.compress.clock import bytes_bar
from dflow.compress.coders import ImageCoder
from dflow.compress.crew import ALONE, Crew, Loaded
from dflow.compress.images import decompress_images
from dflow.compress.text import decompress_text
from dflow.compress.text_coder import TextCoder
from dflow.config import InputError
from dflow.distributions.drafted import Drafter

#: Makes the bytes of a file.
Content = Callable[[], bytes]


class Sealed(NamedTuple):
    """A group that is still coded, and the places of the files in it that are wanted."""

    group: ArchivedGroup
    data: bytes
    wanted: tuple[int, ...]


class Unpacked(NamedTuple):
    """A group, and the files of it that were wanted, or what is wrong with it."""

    group: ArchivedGroup
    files: list[tuple[ArchivedFile, bytes]]
    wrong: str = ""


@dataclass
class Unpacker:
    """Decodes groups.

    Args:
        model: a coder, and for texts what proposes symbols.
        limit: values or bytes that a group may declare.
    """

    model: Loaded[tuple[ImageCoder | TextCoder, Drafter | None]]
    limit: int

    def __call__(self, sealed: Sealed) -> Unpacked:
        """The files that are wanted."""
        group = sealed.group
        try:
            contents = self._contents(group, sealed.data)
        except (InputError, Damaged) as error:
            return Unpacked(group, [], f"{group.title}: {str(error).removeprefix('the file: ')}")
        return Unpacked(group, [(group.files[i], contents[i]()) for i in sealed.wanted])

    def _contents(self, group: ArchivedGroup, data: bytes) -> Sequence[Content]:
        if group.kind != CODED:
            return [partial(bytes, content) for content in _stored(group, data, self.limit)]
        coder, drafter = self.model.value
        if isinstance(coder, TextCoder):
            texts = decompress_text(data, coder, limit=self.limit, drafts=Drafts(drafter))
            _check_names(group, list(texts))
            return [partial(bytes, content) for content in texts.values()]
        pictures = decompress_images(data, coder, limit=self.limit).pictures
        _check_names(group, [picture.form.name for picture in pictures])
        return [partial(pixels.write, picture) for picture in pictures]


def _stored(group: ArchivedGroup, data: bytes, limit: int) -> list[bytes]:
    """The files of a group that no model has coded."""
    dfl.check_limit(group.amount, limit, "bytes")
    if group.kind == DEFLATED:
        data = dfl.inflate(data, group.amount, "its deflated bytes are")
    if len(data) != group.amount:
        raise Damaged(f"holds {len(data):,} bytes of {group.amount:,}")
    contents, start = [], 0
    for file in group.files:
        contents.append(data[start : start + file.size])
        start += file.size
    return contents


def _check_names(group: ArchivedGroup, names: Sequence[str]) -> None:
    if list(names) != [str(i) for i in range(len(group.files))]:
        raise Damaged("holds other files than the index says")


def chosen(archive: Archive, names: Collection[str]) -> list[tuple[ArchivedGroup, tuple[int, ...]]]:
    """The groups that hold the files of some names, or those in some folders, and their places there.

    Raises:
        InputError: a name that is neither in the archive.
    """
    wanted, used = {name.removesuffix("/") for name in names}, set[str]()
    groups = []
    for group in archive.groups:
        places = []
        for i, file in enumerate(group.files):
            ways = {file.name, *(file.name[:at] for at, c in enumerate(file.name) if c == "/")} & wanted
            used |= ways
            if ways or not names:
                places.append(i)
        if places:
            groups.append((group, tuple(places)))
    if missing := sorted(wanted - used):
        raise InputError(
            f"{missing[0]!r} is not in the archive"
            + f", nor are {len(missing) - 1:,} more" * (len(missing) > 1)
            + "; `dflow info --list` shows what is"
        )
    return groups


def unpack(
    archive: Archive,
    unpacker: Unpacker,
    groups: Sequence[tuple[ArchivedGroup, tuple[int, ...]]],
    crew: Crew = ALONE,
    progress: bool = False,
) -> Iterator[Unpacked]:
    """Decode groups, one after another; what is damaged has a reason and no files, and the others go on."""
    damaged = list[Unpacked]()

    def sealed() -> Iterator[Sealed]:
        for group, wanted in groups:
            try:
                data = archive.group(group, unpacker.limit)
            except Damaged as error:
                damaged.append(Unpacked(group, [], str(error)))
                continue
            yield Sealed(group, data, wanted)

    total, files = sum(group.bytes for group, _ in groups), sum(len(wanted) for _, wanted in groups)
    with bytes_bar(total, "decompress", progress) as bar:
        done = 0
        for opened in crew.map(unpacker, sealed()):
            yield opened
            done += len(opened.files)
            bar.set_postfix_str(f"{done:,} of {files:,} files", refresh=False)
            bar.update(opened.group.bytes)
    yield from damaged


def check_groups(archive: Archive, limit: int) -> Iterator[str]:
    """What is wrong with an archive, as far as that shows without a model: checksums and headers."""
    for group in archive.groups:
        try:
            data = archive.group(group, limit)
            if group.kind != CODED:
                _stored(group, data, limit)
                continue
            names = _coded_names(archive, data)
            _check_names(group, names)
        except Damaged as error:
            yield str(error) if str(error).startswith(group.title) else f"{group.title}: {error}"


def _coded_names(archive: Archive, data: bytes) -> list[str]:
    """Names of the files of a group that a model has coded, every byte of it checked but what is coded."""
    if container.kind_of(data) == container.TEXT:
        parsed, texts = text_coder.parse(data)
        names = [name for name, _ in texts.files]
    else:
        parsed, pictures = image_plan.parse(data)
        names = [form.name for form in pictures.forms]
    if parsed.fingerprint != archive.fingerprint or parsed.mode != archive.mode:
        raise Damaged("was made by another model than the index says")
    return names
