"""Base class of all models as transformers models: complete saves, with vocabulary and coding tables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from dflow.hf import counts
from dflow.hf.manifest import remove, replacing

#: File of the coding tables.
TABLES = "coding.safetensors"

#: Files beside the weights that belong to a model: its vocabulary, and its coding tables.
COMPANIONS = ("vocabulary.json", "tokenizer.model", TABLES)

WEIGHTS = "model.safetensors"
#: Where weights are in several files: the list of the weights in each.
INDEX = WEIGHTS + ".index.json"

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

#: Arguments of `save_pretrained` for an upload.
_OF_THE_HUB = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")

#: Arguments of `from_pretrained` that select the source of the files.
_OF_A_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class Pretrained(PreTrainedModel):
    """A model of dflow in a folder.

    Attributes:
        companions: contents of files that are saved beside the weights, by name: those of `COMPANIONS` in the
            folder that the model was loaded from.
    """

    companions: Mapping[str, bytes] = {}

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves; the default would undo it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """See transformers; the model carries the files of its vocabulary, and its counts."""
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            place = {name: kwargs[name] for name in _OF_A_PLACE if name in kwargs}
            source = os.fspath(pretrained_model_name_or_path)
            paths = _beside(source, place)
            counts.load(model, paths.pop(counts.COUNTS, None), source)
            model.companions = {file: path.read_bytes() for file, path in paths.items()}
        return loaded

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """See transformers; each file is replaced completely or not at all, and listed in the manifest.

        Files of the vocabulary are saved too, where the model was loaded from a folder that has them.
        """
        of_the_hub = {name: kwargs.pop(name) for name in _OF_THE_HUB if name in kwargs}
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        folder = Path(save_directory)
        with replacing(folder) as temporary:
            super().save_pretrained(temporary, state_dict=state_dict, **kwargs)
            for name, data in self.companions.items():
                (temporary / name).write_bytes(data)
            counts.save(self, temporary)
            new = {path.name for path in temporary.iterdir()}
        old = {path.name for path in folder.iterdir() if _WEIGHT_FILE.fullmatch(path.name)}
        if any(_WEIGHT_FILE.fullmatch(name) for name in new):
            # Older weights in another number of files would be loaded in place of these.
            remove(folder, old - new)
        if push_to_hub:
            for name in ("token", "max_shard_size"):
                if name in kwargs:
                    of_the_hub[name] = kwargs[name]
            self.push_to_hub(of_the_hub.pop("repo_id", folder.name), **of_the_hub)


def _beside(name: str, place: Mapping[str, Any]) -> dict[str, Path]:
    """The files beside the weights in a folder or in a repository of the hub, by name, those that exist."""
    files = (*COMPANIONS, counts.COUNTS)
    if os.path.isdir(name):
        folder = Path(name) / (place.get("subfolder") or "")
        paths = {file: folder / file for file in files}
    else:
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        cached = {file: cached_file(name, file, **place, **quiet) for file in files}
        paths = {file: Path(path) for file, path in cached.items() if path is not None}
    return {file: path for file, path in paths.items() if path.is_file()}
