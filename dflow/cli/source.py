"""What verbs that score data share: which data they are, and which part of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dflow.cli.flags import flag
from dflow.config import InputError

if TYPE_CHECKING:
    from dflow.data import Corpus, DataConfig, ImageConfig, ImageSet
    from dflow.models import TextModel

    C = TypeVar("C", DataConfig, ImageConfig)


@dataclass(kw_only=True)
class Source:
    """Flags of every verb that scores data."""

    data: str | None = flag(
        "data set by name (`dflow data list` shows them), or a path (default: what the model was trained on)",
        None,
    )
    folder: str | None = flag("folder of the data (default: as in training, or DFLOW_DATA)", None)
    split: Literal["train", "valid", "test", "all"] | None = flag(
        "part of the data to score: train, valid, test, or all of them (default: test; of a text, folder or "
        "table of your own that the model was not trained on and that has no test split, all)",
        None,
    )
    limit: int | None = flag(
        "number of chunks to score, the first ones; of images and tables, of random rows (default: all)", None
    )

    def config(self, folder: str, model: TextModel) -> DataConfig:
        """The data section of the recipe that the model in ``folder`` was trained by, changed by the flags.

        How a text is cut is no choice: a model is one of sentences, of lines or of a stream.
        """
        protocol: Literal["stream", "sentence", "lines"]
        from dflow.data import DataConfig, load

        trained = self.recorded(folder, DataConfig, "images")
        if not model.config.explicit_length:
            protocol = "stream"
        else:
            protocol = "lines" if trained and trained.protocol == "lines" else "sentence"
        folder_of_data = self.folder or (trained.folder if trained else None)
        fresh = DataConfig(name=str(self.data), folder=folder_of_data, protocol=protocol)
        config = self.changed(partial(load, length=model.config.length), trained, fresh)
        return dataclasses.replace(config, protocol=protocol)

    def images(self, folder: str) -> ImageConfig:
        """Images or the table on which the model in ``folder`` was trained, changed by the flags."""
        from dflow.data import ImageConfig, load_images

        trained = self.recorded(folder, ImageConfig, "text") or ImageConfig()
        return self.changed(load_images, trained, trained.of(str(self.data)))

    def recorded(self, folder: str, kind: type[C], other: str) -> C | None:
        """The data that the recipe beside a model names; None without a recipe, where --data names some."""
        from dflow.hf import split_calls
        from dflow.train import recipe_of

        path = split_calls(folder)[0]
        if self.data is not None and not (path / "recipe.yaml").is_file():
            return None
        data = recipe_of(path).data
        if not isinstance(data, kind):
            raise InputError(f"{path}: its recipe.yaml is one of {other}; restore both files from one run")
        return data

    def changed(self, load: Callable[[Any], Any], trained: C | None, fresh: C) -> C:
        """``trained`` where the flags name the same data, in this or another place; else ``fresh`` data."""
        config = fresh if trained is None else trained
        if trained is not None and not self.names(trained):
            fresh = dataclasses.replace(fresh, folder=self.folder or fresh.folder)
            same = is_same(load, trained, fresh)
            config = dataclasses.replace(trained, name=fresh.name) if same else fresh
        if self.data is not None:  # whatever the data are by now
            config = dataclasses.replace(config, checksum=None)
        return dataclasses.replace(config, folder=self.folder or config.folder)

    def part(self, data: Corpus | ImageSet, *folders: str) -> str:
        """The split to score: what --split says, or what is safe for the models in ``folders``.

        Data that were cut into splits by a share alone are scored as a whole, unless one of the models was
        trained on them.
        """
        if self.split is not None:
            return self.split
        if self.data is None or not data.pooled:
            return "test"
        return "test" if any(self.trained_on(data, folder) for folder in folders) else "all"

    def trained_on(self, data: Corpus | ImageSet, folder: str) -> bool:
        """Whether the model in ``folder`` was trained on these data, under this name or another one."""
        from dflow.data import files
        from dflow.hf import split_calls
        from dflow.train import recipe_of

        path = split_calls(folder)[0]
        if self.data is None:
            return True
        if not (path / "recipe.yaml").is_file():
            return False
        trained = recipe_of(path).data
        if self.data == trained.name or data.checksum == trained.checksum:
            return True
        places = [files.expanded(name) for name in (self.data, trained.name)]
        bases = [files.data_folder(f) for f in (self.folder or trained.folder, trained.folder)]
        resolved = [
            {p.resolve() for p in (place, base / place if base else place) if files.exists(p)}
            for place, base in zip(places, bases, strict=True)
        ]
        return bool(resolved[0] & resolved[1])

    def names(self, trained: DataConfig | ImageConfig) -> bool:
        """Whether the data are those that a model was trained on, by their name or path."""
        from dflow.data.files import absolute

        if self.data is None or self.data == trained.name:
            return True
        return trained.is_path and absolute(self.data) == absolute(trained.name)


def is_same(load: Callable[[Any], Any], trained: Any, fresh: Any) -> bool:
    """Whether ``fresh`` names what a model was trained on, moved to another place: by the checksum.

    Then its splits are those of the training, whatever their shares.
    """
    if trained.checksum is None or not (trained.is_path and fresh.is_path):
        return False
    try:
        load(dataclasses.replace(trained, name=fresh.name, folder=fresh.folder))
    except InputError:
        return False
    return True
