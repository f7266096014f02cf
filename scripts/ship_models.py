"""Make the models that come with dflow from the folders of their trainings: small copies with model cards.

    dflow train tolstoy_grouped
    dflow train tolstoy_causal
    python scripts/ship_models.py runs/tolstoy_grouped runs/tolstoy_causal

The data is War and Peace (`dflow data check war-and-peace`), in the folder that DFLOW_DATA names. What lies
in `dflow/models` under the names of these models is replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import tempfile
from pathlib import Path

import torch

from dflow import models, shipped
from dflow.config import InputError
from dflow.data import Corpus, DataConfig, Tokenizer, load
from dflow.evaluate import evaluate
from dflow.hf.remote import MODELING
from dflow.models.manifest import remove, replacing
from dflow.train import Size, compact, history, recipe_of

#: Binary digits of weights in matrices: with 4 both models take 8 MB in a wheel; the cards say what it costs.
DIGITS = 4

CARD = Path(__file__).parent / "model_card.md"

WHAT = {
    "tolstoy": "It draws many characters a call: 256 of them in 1, 2, 4, 8, 16 or 32 (the default)\n"
    "network calls, as `tolstoy@8`.",
    "tolstoy-causal": "It draws one character a network call, and with `--draft counts` the same in fewer.",
}
RECIPES = {"tolstoy": "tolstoy_grouped", "tolstoy-causal": "tolstoy_causal"}


def scored(folder: Path, name: str, corpus: Corpus, protocol: str) -> tuple[float, float, str]:
    """Bits a character of the test text, their standard error, and the protocol in words."""
    model = models.load(f"{folder}{name}")
    result = evaluate(model, corpus.test, protocol=protocol)  # type: ignore[arg-type]
    return result.bpc, result.standard_error, result.protocol


def card(name: str, source: Path, small: Path, size: Size, corpus: Corpus) -> str:
    """The model card, with figures that are measured now."""
    model = models.load(small)
    budgets = list(model.distribution.budgets) if name == "tolstoy" else []
    runs = [(f"@{calls}", "chunks") for calls in budgets] or [("", "chunks")]
    rows, main = [], 0.0
    for suffix, protocol in [*runs, ("", "rolling")]:
        bits, error, words = scored(small, suffix, corpus, protocol)
        before = scored(source, suffix, corpus, protocol)[0]
        calls = suffix[1:] or str(model.num_calls)
        rows.append(f"| {calls} | {words} | {bits:.4f} | {error:.4f} | {before:.4f} |")
        print(name, rows[-1], flush=True)
        if calls == str(model.num_calls) and protocol == "chunks":
            main = bits
    counted = next(m for m in model.modules() if hasattr(m, "has_table"))
    last = history(source).rows[-1]
    return CARD.read_text(encoding="utf-8").format(
        name=name,
        what=WHAT[name],
        checksum="sha256 bf5b273d9246",
        train=len(corpus.train.ids),
        valid=len(corpus.valid.ids),
        test=len(corpus.test.ids),
        parameters=sum(p.numel() for p in model.parameters()),
        contexts=len(counted.table.keys),
        steps=int(last["step"]),
        minutes=last["seconds"] / 60,
        machine=platform.machine(),
        recipe=RECIPES[name],
        digits=DIGITS,
        megabytes=size.whole / 1e6,
        zipped=size.zipped / 1e6,
        rows="\n".join(rows),
        main=main,
    )


def without_code(folder: Path) -> None:
    """Leave out the file for trust_remote_code=True: who has this model has the package."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["auto_map"]
    with replacing(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    remove(folder, {MODELING})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "folders", nargs=len(RECIPES), type=Path, metavar="FOLDER", help="of " + ", ".join(RECIPES)
    )
    folders = parser.parse_args().folders
    torch.set_num_threads(1)
    for name, source in zip(RECIPES, folders, strict=True):
        data = recipe_of(source).data
        if not isinstance(data, DataConfig) or data.name != "war-and-peace":
            raise InputError(f"{source}: trained on {data.name}, not on war-and-peace")
        corpus = load(dataclasses.replace(data, folder=None), Tokenizer.load(source))
        with tempfile.TemporaryDirectory() as scratch:
            small = Path(scratch) / name
            size = compact(source, small, DIGITS)
            without_code(small)
            text = card(name, source, small, size, corpus)
            (small / shipped.CARD).write_text(text, encoding="utf-8")
            shutil.rmtree(shipped.folder_of(name), ignore_errors=True)
            shutil.copytree(small, shipped.folder_of(name))
        print(json.dumps({"name": name} | dataclasses.asdict(size)))


if __name__ == "__main__":
    main()
