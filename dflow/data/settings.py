"""Which data, read how: the settings of texts and of images and tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from dflow.config import InputError, nearest
from dflow.data import files, image_sets, sets, synthetic
from dflow.data.known import HUB
from dflow.data.laws import Law
from dflow.zoo import setting

#: Share of the rows for validation, and that for the test, where the settings name none.
SHARE = 0.05
_FOLDER = "folder of the data (default: the environment variable DFLOW_DATA)"


class _WithChecksum(Protocol):
    @property
    def checksum(self) -> str: ...


T = TypeVar("T", bound=_WithChecksum)


class _Named(ABC):
    """What the settings of texts and of images share: a name, of known data or of a path."""

    name: str
    folder: str | None
    checksum: str | None
    #: Both are dataclasses, which is what `replace` takes.
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    #: What to say of a name that is neither known nor a path.
    _missing: ClassVar[str]
    #: Beginnings of names that are no paths.
    _prefixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _known(self) -> list[str]:
        """Names of data for this kind of model."""

    @abstractmethod
    def _of_other_kind(self) -> str:
        """What to say of the name of data for another kind of model; empty for other names."""

    @property
    def is_path(self) -> bool:
        """Whether `name` is the path of a file or folder, not the name of known data."""
        return not (self.name in self._known() or self.name.startswith(self._prefixes))

    def path(self) -> Path:
        """The path of the user's data: `name` as it stands, or inside the folder of the data.

        Raises:
            InputError: there is no such file or folder.
        """
        path = files.expanded(self.name)
        if not files.exists(path) and (folder := files.data_folder(self.folder)):
            path = folder / self.name
        if files.exists(path):
            return path
        if reason := self._of_other_kind():
            raise InputError(f"{self.name}: {reason}")
        if self.checksum is not None:
            raise InputError(
                f"{self.name}: no such file or folder; the model was trained on the data that were there, "
                f"whose checksum is {self.checksum}. If they were moved, name their place: --data PATH (in "
                "dflow train --set data.name=PATH)"
            )
        raise InputError(f"{self.name}: {self._missing}; {nearest(self.name, self._known())}")

    def located(self) -> Self:
        """The same data by absolute paths, so that they are found from any working directory.

        Raises:
            InputError: there is no such file or folder.
        """
        paths: dict[str, Any] = {"name": self.path()} if self.is_path else {}
        paths |= {key: getattr(self, key, None) for key in ("folder", "store")}
        return replace(self, **{key: files.absolute(path) for key, path in paths.items() if path is not None})


@dataclass
class DataConfig(_Named):
    """What text, read and split how, spelled in what symbols."""

    _missing = "neither a data set nor a file or folder"
    _prefixes = (HUB, synthetic.PREFIX)

    name: str = setting(
        sets.PYDOC,
        ", ".join((*sets.BUILT_IN, *sets.KNOWN)) + ", synthetic/LAW, or the path of a text file or folder",
    )
    protocol: Literal["stream", "sentence", "lines"] | None = setting(
        None,
        "stream (default): one long text; lines: each line, or record of FASTA, is a sequence with its own "
        "end, of at most model.length symbols; sentence: as lines, but stripped, of 1 to 288 characters",
    )
    tokenizer: Literal["characters", "bytes", "sentencepiece"] = setting("characters", "the symbols")
    vocab_size: int = setting(512, "number of symbols, for sentencepiece")
    folder: str | None = setting(None, _FOLDER)
    store: str | None = setting(
        None,
        "folder in which your own text, or hub:OWNER/NAME, is kept as symbols and read as "
        "needed: for texts larger than memory; made on first use",
    )
    lowercase: bool = setting(False, "lower the case of your own text or of one that is built in")
    valid: float = setting(SHARE, "share for validation, of your own text or of one that is built in")
    test: float = setting(SHARE, "share for the test, of your own text or of one that is built in")
    split_by: Literal["tail", "files", "blocks", "lines"] | None = setting(
        None,
        "what of your own text, where no names tell the splits, is for validation and test: "
        "tail, the end of the joined text; files, whole files; blocks, ends of 20 stretches of the text; "
        "lines, whole lines by a fixed shuffle (default: tail; lines for protocol lines)",
    )
    parameters: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "parameters of a synthetic law"}
    )
    checksum: str | None = setting(
        None, "of the whole text: another one is refused (a model's recipe has it)"
    )

    def __post_init__(self) -> None:
        """Check the shares and sizes; fill in how splits are dealt."""
        _check_shares(self.valid, self.test)
        if self.split_by is None:
            self.split_by = "lines" if self.protocol == "lines" else "tail"
        if self.split_by == "lines" and not self.by_lines:
            raise InputError(
                "split_by=lines deals whole lines: set protocol to lines, or split_by to tail, files or "
                "blocks"
            )
        if self.vocab_size < 2:
            raise InputError(f"vocab_size={self.vocab_size} must be at least 2")
        if self.parameters and not synthetic.is_law(self.name):
            raise InputError(
                f"parameters are for a synthetic law, which {self.name!r} is not; leave them out, or name "
                f"a law: {', '.join(synthetic.PREFIX + name for name in synthetic.LAWS)}"
            )

    @property
    def by_lines(self) -> bool:
        """Whether each line is a sequence with its own end."""
        return self.protocol in ("sentence", "lines")

    @property
    def shares(self) -> dict[str, float]:
        """For validation and for the test."""
        return {"valid": self.valid, "test": self.test}

    def _known(self) -> list[str]:
        return [*sets.BUILT_IN, *sets.KNOWN]

    def _of_other_kind(self) -> str:
        if self.name in (image_sets.CHECKERBOARD, *image_sets.KNOWN) or self.name.startswith(HUB):
            return (
                "images, and this is a model of text; use model.family dequantized (a text of the hub needs "
                "data.store)"
            )
        return ""

    def law(self, where: str = "data") -> Law | None:
        """The synthetic law that `name` and `parameters` say, or None when a text is named.

        Raises:
            InputError: no such law, or parameters that it does not take.
        """
        return synthetic.law(self.name, self.parameters, where) if synthetic.is_law(self.name) else None


@dataclass
class ImageConfig(_Named):
    """Which images or table, read how."""

    _missing = "neither a set of images nor a folder or table"
    _prefixes = (HUB,)

    name: str = setting(
        image_sets.CHECKERBOARD,
        ", ".join((image_sets.CHECKERBOARD, *image_sets.KNOWN)) + ", hub:OWNER/NAME (of the "
        "Hugging Face hub), or the path of a folder of images or of a .csv or .tsv table",
    )
    folder: str | None = setting(None, _FOLDER)
    bits: int | None = setting(None, "keep the BITS highest bits of each value (default: all)")
    patch: list[int] | None = setting(None, "keep the patch [height, width] at the centre")
    crop: list[int] | None = setting(
        None, "cut each image of your own to [height, width] at its centre, to make sizes equal"
    )
    tiles: list[int] | None = setting(
        None,
        "cut each image of your own into tiles [height, width]: side by side, to train on "
        "overlapping by half",
    )
    grey: bool = setting(False, "turn colours into shades of grey")
    flip: bool = setting(False, "mirror images to train on, left and right, at random")
    valid: float | None = setting(None, f"share for validation, of your own data (default {SHARE})")
    test: float | None = setting(None, f"share for the test, of your own data (default {SHARE})")
    continuous: list[str] | None = setting(
        None, "columns of a table that are real numbers (default: where any value is no integer)"
    )
    checksum: str | None = setting(None, "of all values: another one is refused (a model's recipe has it)")

    def __post_init__(self) -> None:
        """Check the shares and sizes."""
        _check_shares(*self.shares.values())
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise InputError(f"bits={self.bits} must lie in 1..8")
        if self.crop and self.tiles:
            raise InputError(f"crop={self.crop} and tiles={self.tiles} both cut the images: leave one out")
        for name, size in (("patch", self.patch), ("crop", self.crop), ("tiles", self.tiles)):
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise InputError(f"{name}={size} must be [height, width], each at least 1")

    @property
    def shares(self) -> dict[str, float]:
        """For validation and for the test."""
        named = {"valid": self.valid, "test": self.test}
        return {split: SHARE if share is None else share for split, share in named.items()}

    def of(self, name: str) -> ImageConfig:
        """The same kind of data under another name: how they are read is kept, the shares are not."""
        config = replace(self, name=name, valid=None, test=None, checksum=None)
        if name == image_sets.CHECKERBOARD:
            return ImageConfig(name)
        if name in image_sets.KNOWN:
            return replace(config, crop=None, tiles=None, continuous=None)
        return replace(config, folder=None) if name.startswith(HUB) else config

    def _known(self) -> list[str]:
        return [image_sets.CHECKERBOARD, *image_sets.KNOWN]

    def _of_other_kind(self) -> str:
        if self.name in (*sets.BUILT_IN, *sets.KNOWN) or synthetic.is_law(self.name):
            return "a text, and this is a model of images or tables; use a model.family of text"
        return ""

    def refuse(self, kind: str, *settings: str) -> None:
        """Raise `InputError` if one of the settings is changed: data of this ``kind`` have no use for it."""
        default = ImageConfig()
        for name in settings:
            if getattr(self, name) != getattr(default, name):
                raise InputError(f"{self.name} is {kind} and takes no {name}: leave it out")


def load_either(config: DataConfig | ImageConfig, read: Callable[[], T], read_before: Callable[[], T]) -> T:
    """The data that ``read`` gives, checked against the checksum of ``config``, if it has one.

    A model of version 0.1.0 keeps the checksum of a folder or table as that version read it: where the
    checksum is that of ``read_before``, this reading is given.

    Raises:
        InputError: of ``read``, or the data have another checksum.
    """
    try:
        data = read()
        files.check_same(config.name, data.checksum, config.checksum)
    except InputError:
        if config.checksum is not None and config.is_path:
            with suppress(InputError):
                data = read_before()
                if data.checksum == config.checksum:
                    return data
        raise
    return data


def _check_shares(valid: float, test: float) -> None:
    if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
        raise InputError(f"valid={valid} and test={test} must be above 0 and leave something to train on")
