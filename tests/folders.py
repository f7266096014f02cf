"""Small untrained models in folders, as `dflow train` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from dflow import hf
from dflow.data import Corpus, DataConfig, count, load
from dflow.models.counts import counted

LENGTH = 8
TEXT = "\n".join(f"line {i} of a text: {'abcde'[i % 5] * (i % 7)}." for i in range(200)) + "\n"
SETTINGS: dict[str, dict[str, Any]] = {
    "grouped": {"num_calls": 2, "num_attention_heads": 1, "hidden_size": 8, "num_hidden_layers": 1},
    "any_order": {"num_calls": 2, "num_attention_heads": 1, "hidden_size": 8, "num_hidden_layers": 1},
    "bipartite": {"num_flows": 2, "num_attention_heads": 1, "hidden_size": 8, "window": 2},
    "autoregressive": {"num_flows": 1, "num_attention_heads": 1, "hidden_size": 8, "num_hidden_layers": 1},
    "multiscale": {"num_attention_heads": 1, "hidden_size": 8, "window": 2, "num_spectra": 2},
    "transformer": {"num_attention_heads": 1, "hidden_size": 8, "num_hidden_layers": 1},
    "lstm": {"hidden_size": 8, "num_hidden_layers": 2, "embedding_size": 4},
    "ngram": {"counts": 3},
}


#: Settings of small models of images.
SMALL: dict[str, Any] = {
    "family": "dequantized", "num_flows": 2, "spline_bins": 3, "hidden_size": 8, "num_hidden_layers": 2,
    "context_size": 2, "dequantizer_flows": 2, "dequantizer_hidden_size": 12, "dequantizer_hidden_layers": 1,
}  # fmt: skip


def image_recipe(
    folder: Path, data: dict[str, Any] | str, model: dict[str, Any] | None = None, **train: Any
) -> Path:
    """A recipe of images or a table whose output is ``folder / "out"``."""
    values = {
        "data": {"name": data} if isinstance(data, str) else data,
        "model": SMALL | (model or {}),
        "train": {
            "steps": 4,
            "batch_size": 8,
            "eval_every": 2,
            "eval_chunks": 16,
            "trackers": [],
            "samples": 0,
        }
        | train,
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def write_text(folder: Path, text: str = TEXT) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def write_pictures(folder: Path, n: int = 24, channels: int = 1, depth: int = 8, size: int = 8) -> Path:
    """PNG files of ``depth`` 1 or 8, grey or in colours: a bright square somewhere on a dark ground."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        values = rng.integers(0, 60, (size, size, channels))
        top, left = rng.integers(0, size - 3, 2)
        values[top : top + 4, left : left + 4] += rng.integers(150, 190)
        array = values.astype(np.uint8) if channels == 3 else values[..., 0].astype(np.uint8)
        Image.fromarray(array if depth == 8 else array > 100).save(folder / f"{i:03}.png")
    return folder


def write_table(folder: Path, header: str, rows: int = 120) -> Path:
    """A CSV file: columns called ``i...`` hold small integers from -2 on, ``b...`` bits, all others reals."""
    rng = np.random.default_rng(1)
    columns = []
    for name in header.split(","):
        if name[0] in "ib":
            columns.append(rng.integers(*((0, 2) if name[0] == "b" else (-2, 4)), rows).astype(str))
        else:
            columns.append(np.char.mod("%.3f", rng.normal(0.5, 2, rows)))
    path = folder / f"{header.replace(',', '_')}.csv"
    lines = [",".join(row) for row in zip(*columns, strict=True)]
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def corpus_of(path: Path, protocol: str = "stream") -> Corpus:
    return load(DataConfig(name=str(path), protocol=protocol))  # type: ignore[arg-type]


def with_counts(model: hf.DflowModel, K: int) -> hf.DflowModel:
    """The model with counts of a random text, where it reads any."""
    for module in counted(model):
        module.use(count(torch.randint(0, K, (200,)), K, module.patterns))
    return model


def make_model(
    family: str,
    vocab_size: int,
    length: int = LENGTH,
    explicit_length: bool = False,
    seed: int = 0,
    context: int = 0,
    **changes: Any,
) -> hf.DflowModel:
    torch.manual_seed(seed)
    config = hf.DflowConfig(
        family=family,
        vocab_size=vocab_size,
        length=length,
        explicit_length=explicit_length,
        context=context,
        **SETTINGS[family] | changes,
    )
    model = hf.DflowModel(config)
    with_counts(model, vocab_size)
    with torch.no_grad():
        for p in model.parameters():  # flows start as the identity, which tests too little
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def write_model(
    folder: Path,
    family: str,
    text: Path,
    protocol: str = "stream",
    length: int = LENGTH,
    seed: int = 0,
    **changes: Any,
) -> Path:
    corpus = corpus_of(text, protocol)
    model = make_model(family, corpus.tokenizer.size, length, protocol == "sentence", seed, **changes)
    if protocol == "sentence":
        model.set_length_counts(corpus.train.length_counts(length).float())
    hf.save(model, folder)
    corpus.tokenizer.save(folder)
    recipe = {
        "data": {"name": str(text), "protocol": protocol},
        "model": {"family": family, "length": length, **SETTINGS[family], **changes},
        "train": {"steps": 1},
        "output": str(folder),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder
