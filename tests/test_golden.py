"""What version 0.1.0 wrote is read as before: model folders, recipes, drawn text and pictures, .dfl files.

``golden/v0.1.0.tar.xz`` holds small models of every family that version 0.1.0 trained, with the data,
the recipes, what ``dflow evaluate`` and ``dflow generate`` printed and what ``dflow compress`` wrote.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflow import cli, hf
from dflow.data import Tokenizer
from dflow.hf import DflowClassifier

ARCHIVE = Path(__file__).parent / "golden" / "v0.1.0.tar.xz"
#: Draws of the dequantizer for which the bounds were computed.
DRAWS = ["--draws", "8"]


def expectations() -> dict[str, dict[str, Any]]:
    with tarfile.open(ARCHIVE) as archive:
        file = archive.extractfile("./expected.json")
        assert file is not None
        values: dict[str, dict[str, Any]] = json.load(file)
    return values


EXPECTED = expectations()
#: Text of samples 0 to 2 of seed 1.
BY_ADDRESS = json.loads((ARCHIVE.parent / "draws_by_address.json").read_text(encoding="utf-8"))
FLOWS = [name for name in EXPECTED if name != "pbnet"]
#: Figures that are lower since laws of integers have a floor (version 0.2): a value that the net was too sure
#: of has a bound now.
FLOORED = {"multiscale_integer": {"nll": 7.382802943929338}}
FIGURES = ["bpc", "nats", "vi", "nll", "exact"]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that version 0.1.0 left, which is also the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> None:
    assert cli.main([*words, "--threads", "1"]) == 0


@pytest.mark.parametrize("name", FLOWS)
def test_figures_are_those_of_before(old: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = EXPECTED[name]["evaluate"]
    draws = DRAWS if "vi" in before else []
    run("evaluate", "--model", name, "--limit", "8", "--json", *draws)
    now = json.loads(capsys.readouterr().out)
    figures = [figure for figure in FIGURES if before.get(figure) is not None]
    assert figures
    for figure in figures:
        expected = FLOORED.get(name, before).get(figure, before[figure])
        assert now[figure] == pytest.approx(expected, rel=1e-5), figure
    assert now["kind"] == before["kind"]
    assert now["checksum"] == before["checksum"]


@pytest.mark.parametrize("name", FLOWS)
def test_draws_are_those_of_before(old: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = EXPECTED[name]["draws"]
    command = ["generate", "--model", name, "--n", "3", "--seed", "1"]
    if not before.startswith("draws."):
        # Text is drawn by the address of each symbol since version 0.2: by the same law, with other draws.
        for size in ("1", "2", "100"):
            run(*command, "--format", "jsonl", "--batch-size", size)
            rows = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
            assert rows == BY_ADDRESS[name]
        return
    run(*command, "-o", f"again{Path(before).suffix}")
    first, again = Path(name, before), Path(f"again{Path(before).suffix}")
    if first.suffix == ".csv":
        assert np.allclose(*(np.loadtxt(f, delimiter=",", skiprows=1) for f in (first, again)), atol=1e-5)
    else:
        assert np.array_equal(np.load(first), np.load(again))


@pytest.mark.parametrize("name", [name for name in FLOWS if "file" in EXPECTED[name]])
def test_files_decode_as_before(old: Path, name: str) -> None:
    run("decompress", f"{name}/{EXPECTED[name]['file']}", "-o", "back", "--model", name)
    if EXPECTED[name]["file"] == "note.dfl":
        assert Path("back/note.txt").read_bytes() == Path("note.txt").read_bytes()
        return
    for picture in ("000.png", "001.png"):
        assert np.array_equal(*(np.asarray(Image.open(Path(f, picture))) for f in ("back", "pictures")))


@pytest.mark.parametrize("name", [name for name in FLOWS if name in BY_ADDRESS])
def test_folders_of_before_open_by_the_doors_of_transformers(old: Path, name: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name).eval()
    texts = BY_ADDRESS[name]
    vocabulary = Tokenizer.load(name)
    assert [tokenizer(text).input_ids for text in texts] == [vocabulary.encode(t).tolist() for t in texts]
    drawn = model.generate(num_return_sequences=3)
    mask = (drawn != tokenizer.pad_token_id).long()
    with torch.no_grad():
        loss = model(drawn, attention_mask=mask, labels=drawn.masked_fill(mask == 0, -100)).loss
    assert bool(loss.isfinite())
    assert tokenizer.batch_decode(drawn, skip_special_tokens=True) == [
        vocabulary.decode(row[present == 1]) for row, present in zip(drawn, mask, strict=True)
    ]


def test_a_classifier_gives_what_it_gave(old: Path) -> None:
    model = hf.load("pbnet", kind=DflowClassifier)
    torch.manual_seed(0)  # its activations are drawn
    x = (torch.arange(4 * 64) * 37 % 256).view(4, 64)
    assert torch.allclose(model(x).logits, torch.tensor(EXPECTED["pbnet"]["logits"]), atol=1e-5)


def test_a_training_of_before_goes_on(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("train", "--resume", "grouped", "--set", "train.steps=44")
    steps = [json.loads(line)["step"] for line in Path("grouped/metrics.jsonl").read_text().splitlines()]
    assert steps == [40, 44]
