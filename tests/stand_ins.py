"""Small stand-ins, under the names that the documentation uses: recipes, data sets, models and files."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from folders import TEXT, write_text
from PIL import Image

from dflow import cli, zoo
from dflow.data import IMAGES, TEXTS
from dflow.data.files import digest
from dflow.data.image_sets import SplitPixels
from dflow.data.known import KnownFile, KnownSet

ROOT = Path(__file__).parent.parent

#: Largest values of settings that make a model large.
CAPS: dict[str, Any] = {
    "length": 64, "context": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "intermediate_size": 8, "window": 2, "ngram_rows": 16, "num_flows": 2, "block": 1, "embedding_size": 4,
    "num_spectra": 2, "counts": 3,
    "dequantizer_hidden_size": 8, "dequantizer_hidden_layers": 1, "dequantizer_flows": 2, "context_size": 2,
    "spline_bins": 3, "mixture_components": 2, "components": 2, "prior_components": 1, "num_levels": 2,
    "groups": 2, "prior_groups": 3,
}  # fmt: skip
#: Those that are lists, and how a training is short.
LISTS = {"channels": [4, 4], "hidden": [8]}
TRAIN = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_chunks": 4, "samples": 0, "trackers": []}

#: Recipes of models that a page uses without training them, where these are not called as their recipe.
MODELS = {
    "out": "recipes/grouped.yaml",
    "runs/images/checkerboard": "recipes/images/checkerboard_diagonal.yaml",
    "runs/images/idf": "recipes/images/idf_mnist.yaml",
}


def write_recipes(folder: Path) -> None:
    """Every recipe of the project under its own path, with a small model and a short training."""
    for path in ROOT.glob("recipes/**/*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "model" in values:
            model = values["model"]
            defaults = {f.name: f.default for f in dataclasses.fields(zoo.find(model["family"]).settings)}
            if values["data"]["name"].startswith("synthetic"):
                del defaults["length"]  # that of the law
            sizes = {name: model.get(name, defaults[name]) for name in CAPS if name in defaults}
            model |= {name: min(size, CAPS[name]) for name, size in sizes.items() if size is not None}
            model |= {name: value for name, value in LISTS.items() if name in defaults}
            values["train"] = {k: v for k, v in values["train"].items() if "minutes" not in k} | TRAIN
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(values), encoding="utf-8")


def replace_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and images known by name are small, and fetching them needs no network."""
    text = (TEXT + "The end.\n") * 3
    for known, stand_in in ((TEXTS, (text, text[:800], text[:800])), (IMAGES, None)):
        for name in known:
            monkeypatch.setitem(known, name, _set(name, stand_in or _pixels(name)))
    monkeypatch.setattr("dflow.data.sets.read_pydoc", lambda: text)


def _set(name: str, splits: Any) -> KnownSet[Any]:
    content = name.encode()
    file = KnownFile(name, len(content), digest(content))

    def local(folder: Path | None) -> dict[Path, KnownFile] | None:
        return {folder / name: file} if folder and (folder / name).is_file() else None

    return KnownSet(name, lambda folder: splits, local, lambda folder: {name: content})


def _pixels(name: str) -> SplitPixels:
    """Images of 8 x 8, labels from 0 to 9."""
    rng = np.random.default_rng(0)
    channels, depth = (3, 8) if "cifar" in name else (1, 1 if "binarized" in name else 8)
    ramp = np.arange(64).reshape(8, 8) * (2**depth - 1) // 63
    arrays = [(ramp + rng.integers(0, 2, (n, channels, 8, 8))).clip(0, 2**depth - 1) for n in (64, 32, 32)]
    labels = tuple((np.arange(len(a)) % 10).astype(np.uint8) for a in arrays)
    train, valid, test = (a.astype(np.uint8) for a in arrays)
    return SplitPixels(train, valid, test, depth, labels)  # type: ignore[arg-type]


def write_files(folder: Path) -> None:
    """Texts, pictures and arrays that commands name."""
    for name in ("my.txt", "notes.txt", "other.txt", "training.txt", "README.md"):
        write_text(folder).rename(folder / name)
    (folder / "letter.txt").write_text("line 1 ____ a text: ____\nline 2 of a text.", encoding="utf-8")
    (folder / "story.txt").write_text("line 1 of a text: ____", encoding="utf-8")
    (folder / "notes").mkdir()
    for name in ("a.txt", "b.txt"):
        write_text(folder).rename(folder / "notes" / name)
    (folder / "texts").mkdir()
    (folder / "texts" / "ptb").write_text("ptb", encoding="utf-8")
    (folder / "pictures").mkdir()
    for i, tile in enumerate(_pixels("mnist").train[:12, 0]):  # as what the models are trained on
        Image.fromarray(np.tile(tile, (4, 4))).save(folder / "pictures" / f"{i}.png")
    shutil.copy(folder / "pictures" / "0.png", folder)
    (folder / "other.zip").write_bytes(np.random.default_rng(0).bytes(400))
    np.save(folder / "test.npy", _pixels("mnist").test[:, 0])


class Workshop:
    """A folder with all of these, in which models are made when a command first uses them."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        write_recipes(folder)
        write_files(folder)

    def provide(self, words: list[str]) -> None:
        """Make the models that ``words`` use and that are not there."""
        output = words.index("--output") + 1 if "--output" in words else None
        for i, word in enumerate(words):
            name = word.partition("@")[0].rstrip("/")
            recipe = MODELS.get(name, f"recipes/{name.removeprefix('runs/')}.yaml")
            wanted = name in MODELS or name.startswith("runs/")
            if wanted and i != output and Path(recipe).is_file() and not Path(name).exists():
                self.make(name, recipe)

    def make(self, name: str, recipe: str) -> None:
        """One model, trained by the first page that needs it."""
        cached = self.cache / name
        if not cached.exists():
            words = ["train", recipe, "--output", str(cached), "--threads", "1"]
            if recipe.startswith("recipes/binary"):
                words += ["--set", "model.init=uniform"]
            assert cli.main(words) == 0
        shutil.copytree(cached, self.folder / name)
