"""Base class of all models as transformers models: complete saves, with vocabulary and coding tables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from dflow.config import InputError
from dflow.hf import remote
from dflow.hf.card import CARD, is_of, write_card
from dflow.models import counts
from dflow.models.buffers import KeepsBuffers
from dflow.models.files import COMPANIONS, check_keys
from dflow.models.manifest import remove, replacing
from dflow.nn.counted import leave_uncompiled
from dflow.ops.precision import HALF

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

#: Arguments of `save_pretrained` for an upload.
_OF_THE_HUB = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")

#: Arguments of `from_pretrained` that select the source of the files.
_OF_A_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


#: The largest card, in bytes, that goes with a model from folder to folder.
_LONGEST_CARD = 1 << 20

#: Why weights in float16 are not trained, and what is done instead.
NOT_TRAINED = (
    "weights in float16 cannot be trained: squares of gradients fall below its smallest number, and Adam "
    "divides by them; load the model with dtype=torch.float32 and train it in mixed precision "
    "(train.mixed_precision=fp16, or fp16=True of TrainingArguments), or with dtype=torch.bfloat16"
)


# transformers has imported the compiler of torch already.
leave_uncompiled()


class Pretrained(KeepsBuffers, PreTrainedModel):
    """A model of dflow in a folder.

    Attributes:
        companions: contents of files that are saved beside the weights, by name: those of `COMPANIONS` in the
            folder that the model was loaded from, and its card.
    """

    companions: Mapping[str, bytes] = {}
    supports_gradient_checkpointing = True

    #: The class for each auto class of transformers, for folders that load by ``trust_remote_code=True``.
    auto_classes: ClassVar[dict[str, str]] = {}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: its code is in this package, and is not copied into the folder of a model."""

    def check_trains(self) -> None:
        """Refuse to train weights in a precision in which that fails; for `forward`.

        Raises:
            InputError: weights in float16, in training mode and while gradients are recorded.
        """
        if self.training and torch.is_grad_enabled() and self.dtype == torch.float16:
            raise InputError(NOT_TRAINED)

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves; the default would undo it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """See transformers; the model carries the files of its vocabulary, its counts and its card.

        Weights in half precision are those of the model in float32, rounded: `KeepsBuffers` says what is not.

        Raises:
            InputError: a ``dtype`` in which no model is; weights that are missing, or that are no weights of
                this model, which would be no law that anyone has trained.
        """
        dtype = cls._dtype_of(pretrained_model_name_or_path, kwargs)
        first = torch.float32 if dtype in HALF else dtype
        informed = kwargs.pop("output_loading_info", False)
        pair: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, dtype=first, output_loading_info=True, **kwargs
        )
        model, info = pair
        check_keys(pretrained_model_name_or_path, info)
        loaded: Any = pair if informed else model
        if dtype in HALF:
            model.to(dtype)
            model.config.dtype = dtype
        if pretrained_model_name_or_path is not None:
            place = {name: kwargs[name] for name in _OF_A_PLACE if name in kwargs}
            source = os.fspath(pretrained_model_name_or_path)
            paths = _beside(source, place)
            counts.load(model, paths.pop(counts.COUNTS, None), source)
            if CARD in paths and paths[CARD].stat().st_size > _LONGEST_CARD:
                del paths[CARD]
            model.companions = {file: path.read_bytes() for file, path in paths.items()}
        return loaded

    @classmethod
    def _dtype_of(cls, name: Any, kwargs: dict[str, Any]) -> torch.dtype | None:
        """The dtype that the arguments of `from_pretrained` ask for, which is taken out; or its model's."""
        old = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", old)
        if dtype in (None, "auto"):
            place = {key: kwargs[key] for key in _OF_A_PLACE if key in kwargs}
            kind: Any = cls.config_class
            dtype = (kwargs.get("config") or kind.from_pretrained(name, **place)).dtype
        value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
            value = None
        if value is None and dtype is not None:
            raise InputError(
                f"dtype {dtype!r}: models are in float64, float32, bfloat16 or float16; give one of these, "
                "for example dtype=torch.bfloat16"
            )
        return value

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
        self.config.auto_map = remote.auto_map(self.config_class, self.auto_classes)
        with replacing(folder) as temporary:
            super().save_pretrained(temporary, state_dict=state_dict, **kwargs)
            for name, data in self.companions.items():
                if name != CARD:
                    (temporary / name).write_bytes(data)
            self._save_beside(temporary, folder)
            counts.save(self, temporary)
            new = {path.name for path in temporary.iterdir()}
        old = {path.name for path in folder.iterdir() if _WEIGHT_FILE.fullmatch(path.name)}
        if any(_WEIGHT_FILE.fullmatch(name) for name in new):
            # Older weights in another number of files would be loaded in place of these.
            remove(folder, old - new)
        if not (folder / CARD).exists():
            # A card speaks of its weights: trained further, they get another one.
            carried = self.companions.get(CARD, b"").decode("utf-8", "replace")
            write_card(folder, carried if is_of(carried, folder) else None, calls=self.calls_to_draw)
        if push_to_hub:
            for name in ("token", "max_shard_size"):
                if name in kwargs:
                    of_the_hub[name] = kwargs[name]
            self.push_to_hub(of_the_hub.pop("repo_id", folder.name), **of_the_hub)

    @property
    def calls_to_draw(self) -> int | None:
        """Network calls to draw a sequence; None for what is no model of text."""
        return None

    def _save_beside(self, temporary: Path, folder: Path) -> None:
        """Write what a model is loaded with by the auto classes of transformers; see `dflow.hf.remote`."""
        (temporary / remote.MODELING).write_text(
            remote.source(self.config_class, self.auto_classes), encoding="utf-8"
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload the model with its vocabulary, counts and card; see `dflow.hf.remote.push`."""
        return remote.push(self, repo_id, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError(
            "the number of symbols is part of the law, whose probabilities sum to one over them; train a "
            "model on a text with the symbols that you need (the padding token of the tokenizer needs none)"
        )


def _beside(name: str, place: Mapping[str, Any]) -> dict[str, Path]:
    """The files beside the weights in a folder or in a repository of the hub, by name, those that exist."""
    files = (*COMPANIONS, counts.COUNTS, CARD)
    if os.path.isdir(name):
        folder = Path(name) / (place.get("subfolder") or "")
        paths = {file: folder / file for file in files}
    else:
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        cached = {file: cached_file(name, file, **place, **quiet) for file in files}
        paths = {file: Path(path) for file, path in cached.items() if path is not None}
    return {file: path for file, path in paths.items() if path.is_file()}
