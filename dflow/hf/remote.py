"""What lets a folder load by ``trust_remote_code=True``, and its upload to the hub of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from dflow.hf.card import CARD, changed, renamed

#: The file of a folder that says where its classes are.
MODELING = "modeling_dflow.py"

_SOURCE = '''\
"""For trust_remote_code=True: the classes of this model are those of the package dflow."""

try:
    from dflow.hf import {classes}
except ImportError as error:
    raise ImportError(
        "this model is one of dflow (text generation with discrete normalizing flows), which is not "
        "installed here; install it: git clone REPOSITORY dflow && python -m pip install ./dflow"
    ) from error
'''


def auto_map(config: Any, classes: dict[str, str]) -> dict[str, str]:
    """The entry ``auto_map`` of a config: which class of `MODELING` each auto class of transformers takes."""
    names = {"AutoConfig": config.__name__} | classes
    return {auto: f"{MODELING.removesuffix('.py')}.{name}" for auto, name in names.items()}


def source(config: Any, classes: dict[str, str]) -> str:
    """The text of `MODELING`."""
    return _SOURCE.format(classes=", ".join(sorted({config.__name__, *classes.values()})))


def push(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    tags: Sequence[str] = (),
    token: bool | str | None = None,
    max_shard_size: int | str | None = None,
    **commit: Any,
) -> str:
    """Upload a model with all that is saved beside its weights; a card on the hub that others wrote stays.

    Args:
        model: a `dflow.hf.Pretrained`.
        repo_id: the repository; it is created if it does not exist.
        private: of a new repository.
        tags: further tags of the card.
        token: of the hub.
        max_shard_size: as of `save_pretrained`.
        commit: commit_message, commit_description, revision, create_pr.

    Returns:
        The address of the commit, or of the pull request.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit.setdefault("commit_message", f"Upload {type(model).__name__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(
            folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size})
        )
        path, not_uploaded = folder / CARD, None
        if changed(path.read_text(encoding="utf-8")) and tags:
            card = ModelCard.load(path)
            card.data.tags = [*dict.fromkeys([*(card.data.tags or []), *tags])]
            card.save(path)
        else:
            path.write_text(renamed(path.read_text(encoding="utf-8"), repo_id, tags), encoding="utf-8")
        try:
            old = Path(hf_hub_download(repo_id, CARD, token=token, revision=commit.get("revision")))
            not_uploaded = [CARD] if changed(old.read_text(encoding="utf-8")) else None
        except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError):
            pass
        # What the manifest says of the files holds wherever they are.
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=not_uploaded, **commit)
        )
