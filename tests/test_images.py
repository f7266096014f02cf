"""Models of images and tables from the recipe to the picture: training, folders, figures, draws, commands."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from folders import image_recipe, write_model, write_pictures, write_table, write_text
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import environment, metrics, same, state, stop_after
from transformers import AutoConfig, AutoModel

from dflow import cli, hf
from dflow.config import InputError
from dflow.data import DataConfig, ImageConfig, load, load_images, tables
from dflow.dequantize import Hypercube
from dflow.evaluate import ImageEvaluation, evaluate_images
from dflow.generate import encode_images, generate_images
from dflow.train import load_recipe, recipe_of, train

#: No draw of it changes a weight: every figure of a diagonal law under its own posterior is exact.
EXACT = {"density": "diagonal", "fit": "gradient", "dequantizer": "truncated"}


def run(path: Path, *overrides: str, resume: bool = False) -> Path:
    return train(load_recipe(path, list(overrides)), resume=resume)


def load_image(folder: Path) -> hf.DflowImageModel:
    return hf.load(folder, kind=hf.DflowImageModel)


def score(folder: Path, split: str = "valid", **settings: Any) -> ImageEvaluation:
    images = load_images(recipe_of(folder).data)
    return evaluate_images(load_image(folder), images.split(split), unit=images.unit, **settings)


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert cli.main(argv) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# Trained once for all tests that only read them.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow of pictures of one bit, on orthants."""
    folder = tmp_path_factory.mktemp("pictures")
    data = {"name": str(write_pictures(folder / "png", 40, depth=1, size=4)), "valid": 0.2, "test": 0.2}
    model = {"partition": "orthant", "dequantizer": "normal", "num_levels": 2}
    return run(image_recipe(folder, data, model))


@pytest.fixture(scope="module")
def checkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diagonal law of the checkerboard in closed form."""
    folder = tmp_path_factory.mktemp("checkers")
    return run(image_recipe(folder, "checkerboard", {"density": "diagonal"}))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow of a table with a real column."""
    folder = tmp_path_factory.mktemp("table")
    model = {"conditioner": "perceptron", "dequantizer": "bipartite"}
    return run(image_recipe(folder, str(write_table(folder, "i,real,i2")), model))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diagonal law of a table of integers under its exact posterior."""
    folder = tmp_path_factory.mktemp("exact")
    return run(image_recipe(folder, str(write_table(folder, "i,i2,i3")), EXACT, steps=30, learning_rate=0.05))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return write_model(folder / "lstm", "lstm", write_text(folder))


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "model", "settings"),
    [
        ("checkerboard", {"density": "covariance", "dequantizer": "normal"}, {"clip": 5.0}),
        ("checkerboard", {"dequantizer": "bipartite"}, {"rule": "iwbo", "draws": 4, "ema": 0.5}),
        ("checkerboard", {"dequantizer": "autoregressive"}, {"rule": "renyi", "draws": 3, "accumulation": 2}),
        ("checkerboard", {"dequantizer": "normal"}, {"rule": "renyi", "draws": 3, "alpha": 0.5}),
        ("bits", {"partition": "orthant", "dequantizer": "covariance", "num_levels": 2}, {}),
        (
            "colours",
            {"dequantizer": "autoregressive", "num_flows": 1, "dequantizer_flows": 1},
            {"mixed_precision": "bf16", "ema": 0.9},
        ),
        ("table", {"conditioner": "perceptron", "dequantizer": "autoregressive"}, {}),
    ],
    ids=str,
)
def test_training_lowers_the_bound_and_the_folder_holds_the_best_model(
    data: str, model: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    name = data
    if data == "table":
        name = str(write_table(tmp_path, "i,real,b", 600))
    elif data != "checkerboard":
        channels, depth = (1, 1) if data == "bits" else (3, 8)
        name = str(write_pictures(tmp_path / data, 200, channels, depth, 4))
    usual = {"steps": 30, "eval_every": 10, "learning_rate": 0.01, "batch_size": 64, "eval_chunks": None}
    out = run(image_recipe(tmp_path, name, model, **usual | settings))
    rows = metrics(out)
    assert [r["step"] for r in rows] == [10, 20, 30]
    assert rows[-1]["valid_bits"] < rows[0]["valid_bits"]
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "data.json", "manifest.json", "metrics.jsonl", "model.safetensors",
        "modeling_dflow.py", "recipe.yaml", "state.safetensors",
    }  # fmt: skip
    images, trained = load_images(recipe_of(out).data), load_image(out)
    x = images.valid.rows(slice(None)).repeat(1 + 4096 // images.valid.num_rows, 1)
    judged = trained.iwbo(x, 16) if "rule" in settings else trained.elbo(x)
    found = judged.bits_per_dim(1 if images.unit == "bits" else images.dim).detach().mean().item()
    assert min(r["valid_bits"] for r in rows) == pytest.approx(found, abs=0.05)
    assert score(out, draws=2).intact


@pytest.mark.parametrize(
    ("model", "settings", "optimum"),
    [
        # Section 3.1 of the paper: moments of uniform noise, log2(2 pi e) + log2(1/9 - 1/16) / 2.
        ({"density": "covariance", "fit": "gradient"}, {}, 1.9129),
        ({"density": "covariance"}, {"rule": "elbo", "draws": 3, "accumulation": 2}, 1.9129),
        ({"density": "diagonal", "fit": "gradient"}, {"mixed_precision": "bf16"}, 2.5092),
    ],
    ids=str,
)
def test_gaussians_start_at_their_optimum(
    model: dict[str, Any], settings: dict[str, Any], optimum: float, tmp_path: Path
) -> None:
    usual = {"learning_rate": 1e-5, "batch_size": 512, "base_momentum": 0.999, "eval_chunks": None}
    out = run(image_recipe(tmp_path, "checkerboard", model, **usual | settings))
    assert metrics(out)[0]["train_loss_bits"] == pytest.approx(optimum, abs=0.15)
    assert score(out, draws=20_000).vi == pytest.approx(optimum, abs=0.03)


def test_a_model_without_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uniform noise under a diagonal law in closed form: log2(2 pi e / 3) bits, and exactly 2.2508."""
    path = image_recipe(
        tmp_path, "checkerboard", {"density": "diagonal"},
        ema=0.9, batch_size=256, base_momentum=0.99, eval_chunks=None, samples=1,
    )  # fmt: skip
    out = run(path)
    assert "0 parameters" in capsys.readouterr().out
    optimum = math.log2(2 * math.pi * math.e / 3)
    assert metrics(out)[-1]["valid_bits"] == pytest.approx(optimum, abs=0.05)
    found = score(out, "test", draws=20_000)
    assert found.vi == pytest.approx(optimum, abs=0.03)
    assert found.exact == pytest.approx(2.2508, abs=0.01)
    assert found.unit == "bits"
    model = load_image(out)
    assert not list(model.parameters())
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.law.density.moments.dtype == torch.float64
    assert same(load_file(out / "model.safetensors"), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"density": "diagonal"}, {}),
        pytest.param(
            {"density": "covariance", "dequantizer": "normal"}, {"ema": 0.9}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"dequantizer": "bipartite"}, {"rule": "renyi", "draws": 3, "ema": 0.5}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(
    model: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    path = image_recipe(tmp_path, "checkerboard", model, steps=12, eval_every=4, **settings)
    whole = run(path, f"output={tmp_path / 'whole'}")
    out = tmp_path / "parts"
    stop_after(load_recipe(path, [f"output={out}"]), 5)
    # The user's recipe says nothing of shape and levels; that of the folder does. Either resumes.
    assert "shape" not in path.read_text()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"]["shape"] == [2, 1, 1]
    with pytest.raises(InputError, match="was trained with other settings"):
        run(path, f"output={out}", "model.context_size=3", resume=True)
    kept = {p.name: p.read_bytes() for p in out.iterdir()}
    for recipe in (path, out / "recipe.yaml"):
        for name, content in kept.items():
            (out / name).write_bytes(content)
        run(recipe, f"output={out}", resume=True)
        assert same(state(whole)[0], state(out)[0])
        assert same(load_file(whole / "model.safetensors"), load_file(out / "model.safetensors"))
        assert [r["valid_bits"] for r in metrics(out)] == [r["valid_bits"] for r in metrics(whole)]


def test_the_recipe_of_the_folder_tells_the_whole(tmp_path: Path) -> None:
    path = image_recipe(
        tmp_path, {"name": str(write_table(tmp_path, "i,real,b")), "valid": 0.1},
        {"conditioner": "perceptron"}, rule="renyi", draws=2,
    )  # fmt: skip
    values = yaml.safe_load(path.read_text())
    values["paper"] = [
        {"value": v, "unit": "bpd", "source": "x", "measure": "vi", "set": ["model.num_flows=3"]}
        for v in (1, 2)
    ]
    path.write_text(yaml.safe_dump(values))
    out = run(path)
    given, found = load_recipe(path), recipe_of(out)
    assert found.train.alpha == given.train.alpha == -math.inf
    assert found.paper == given.paper
    assert len(found.paper) == 2
    assert isinstance(given.data, ImageConfig)
    assert found.data == replace(given.data, checksum=load_images(given.data).checksum)
    expected = {
        "shape": [3, 1, 1], "levels": [6, None, 2], "lowest": [-2, None, 0], "columns": ["i", "real", "b"]
    }  # fmt: skip
    train = load_images(given.data).train.values[:, 1]
    for name, value in (("loc", train.mean()), ("scale", train.std(correction=0))):
        expected[name] = [None, pytest.approx(float(value), rel=1e-12), None]
    for name, value in expected.items():
        assert getattr(found.model, name) == value
    of_data = {name: getattr(found.model, name) for name in expected}
    assert found.model == replace(given.model, **of_data)
    assert load_image(out).config.levels == expected["levels"]
    for wrong in ("model.levels=[6, null, 3]", "model.shape=[1, 1, 3]", "model.lowest=[0, null, 0]"):
        name = wrong.partition("=")[0]
        with pytest.raises(InputError, match=f"{name} is .* and the data's is .*; leave it out"):
            run(out / "recipe.yaml", wrong, f"output={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


#: Runs each command that it reads on two processes, forks of one that has imported everything once.
TWO = """
import os, socket, sys
import dflow.evaluate, dflow.train
from dflow import cli

for line in sys.stdin:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            found = places | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update((name, str(value)) for name, value in found.items())
            os._exit(cli.main(line.split()))
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(line)
"""


@pytest.mark.slow
def test_two_processes_see_what_one_sees(exact: Path, tmp_path: Path) -> None:
    settings = {"steps": 6, "eval_every": 1, "learning_rate": 0.05}
    closed = {"density": "diagonal", "dequantizer": "truncated"}
    pairs, commands = [], []
    # Noise decides on the moments of a closed form, and differs by process; nothing else hangs on it here.
    for name, model, slack in (("learned", EXACT, 1e-4), ("closed", closed, 0.1)):
        (tmp_path / name).mkdir()
        path = image_recipe(tmp_path / name, "checkerboard", model, **settings)
        pairs.append((run(path), tmp_path / name / "two", slack))
        commands.append(f"train {path} --output {pairs[-1][1]}")
    commands.append(f"evaluate --model {exact} --draws 2 --batch-size 4 --device cpu")
    done = subprocess.run(
        [sys.executable, "-c", TWO], input="\n".join(commands), env=environment(), capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes on cpu") == 2
    for one, two, slack in pairs:
        assert len(metrics(one)) == len(metrics(two)) == 6
        for a, b in zip(metrics(one), metrics(two), strict=True):
            assert a["train_loss_bits"] == pytest.approx(b["train_loss_bits"], abs=slack)
            assert a["valid_bits"] == pytest.approx(b["valid_bits"], abs=slack)
    [found] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    expected = score(exact, "test", draws=2)
    for name in ("vi", "nll", "exact", "vi_error", "num_rows", "intact"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-9)


def test_validation_takes_fresh_noise_for_each_batch_and_the_same_for_each_evaluation(tmp_path: Path) -> None:
    """Two rows are gone through as often as 2,048: the error of the elbo is that of so many draws."""
    model = {"density": "diagonal", "dequantizer": "normal"}
    path = image_recipe(
        tmp_path, "checkerboard", model,
        steps=2, eval_every=1, learning_rate=1e-9, eval_chunks=None, batch_size=16, base_momentum=0.9999,
    )  # fmt: skip
    out = run(path)
    first, second = (r["valid_bits"] for r in metrics(out))
    assert first == pytest.approx(second, abs=1e-3)
    # A draw of one row has a deviation of about 1.2 bits.
    assert first == pytest.approx(score(out, draws=20_000).vi, abs=5 * 1.2 / 2048**0.5)


def test_pictures_of_samples_are_written_while_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_pictures(tmp_path / "png", 40, channels=3, size=4))
    out = run(image_recipe(tmp_path, data, {"density": "diagonal"}, samples=1))
    files = sorted((out / "samples").iterdir())
    assert [f.name for f in files] == ["0000002.png", "0000004.png"]
    said = capsys.readouterr().out
    for file in files:
        assert str(file) in said
        with Image.open(file) as image:
            assert image.mode == "RGB"
            # 36 images of 4 x 4 pixels, six a row, magnified to 400 pixels or more.
            assert 400 <= image.width == image.height < 500


def test_rows_of_samples_are_shown_while_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(image_recipe(tmp_path, "checkerboard", {"density": "diagonal"}, samples=3))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  | ")]
    assert len(shown) == 2 * 3
    assert all(len(json.loads(line.removeprefix("  | "))) == 2 for line in shown)
    assert not (out / "samples").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.rule=likelihood", "trains no model of family 'dequantized'; use elbo, iwbo, renyi"),
        ("train.rule=iwbo", "set train.draws to 2 or more"),
        ("train.draws=0", "draws must be at least 1"),
        ("train.eval_chunks=-1", "eval_chunks must not be negative"),
        ("train.samples=-1", "samples must not be negative"),
        ("train.alpha=nan", "expected float"),
        ("data.name=text8", "text8: a text, and this is a model of images"),
        ("data.name=pydoc", "pydoc: a text"),
        ("data.name=synthetic/factorized", "synthetic/factorized: a text"),
        ("data.name=mnisst", "did you mean 'mnist'"),
        ("data.protocol=stream", "unknown key 'protocol'"),
        ("model.family=grouped", "model: unknown key"),
        ("model.family=dequantised", "did you mean 'dequantized'"),
        ("model.family=null", "dequantized"),
        ("model.length=16", "unknown key 'length'"),
        ("model.partition=orthant", "orthants have no uniform law"),
        ("model.levels=[3]", "model.levels is [3] and the data's is [2]"),
        ("model.num_levels=3", "less than two of 2"),
        ("model.hidden_size=1", "hidden_size"),
    ],
)
def test_wrong_settings_end_with_one_clear_error_and_2(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = image_recipe(tmp_path, "checkerboard")
    assert message in fails(capsys, "train", str(path), "--set", change)
    assert not (tmp_path / "out").exists()


def test_data_that_are_all_real_or_of_the_other_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = image_recipe(tmp_path, str(write_table(tmp_path, "real,other")))
    assert "nothing to dequantize" in fails(capsys, "train", str(path))
    for name in ("mnist", "checkerboard", "hub:any/thing"):
        with pytest.raises(InputError, match=f"{name}: images, and this is a model of text"):
            load(DataConfig(name))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the moments of a closed form are told of it."""
    from dflow.dequantize import Dequantized

    objective = Dequantized.objective

    def spoiled(*args: Any) -> Any:
        values, statistics = objective(*args)
        return values * math.nan, statistics * math.nan

    monkeypatch.setattr(Dequantized, "objective", spoiled)
    with pytest.raises(InputError, match="learning_rate"):
        run(image_recipe(tmp_path, "checkerboard", {"density": "diagonal", "dequantizer": "normal"}))
    assert not (tmp_path / "out").exists()


# -- model folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pictures", "checkers", "table", "exact"])
def test_saved_models_come_back_the_same(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    trained = request.getfixturevalue(name)
    model = load_image(trained)
    x = load_images(recipe_of(trained).data).test.rows(slice(0, 5))

    def answers(model: hf.DflowImageModel) -> list[torch.Tensor]:
        seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
        return [
            model.elbo(x, 2, seeded()).values,
            model.iwbo(x, 3, seeded()).values,
            model.generate(4, seeded()),
            model.law.dequantize(x, seeded()),
        ]

    expected = answers(model)
    assert expected[2].shape == (4, *model.config.shape)
    hf.save(model, tmp_path)
    files = {"README.md", "config.json", "manifest.json", "model.safetensors", "modeling_dflow.py"}
    assert {p.name for p in tmp_path.iterdir()} == files
    for found in (load_image(tmp_path), AutoModel.from_pretrained(tmp_path).eval()):
        assert isinstance(found, hf.DflowImageModel)
        assert same(dict(model.state_dict()), dict(found.state_dict()))
        for a, b in zip(expected, answers(found), strict=True):
            assert torch.equal(a, b)
    settings = AutoConfig.from_pretrained(tmp_path).settings()
    assert settings == model.config.settings()
    assert hf.kind_of(tmp_path) is hf.DflowImageModel


def test_forward_is_minus_the_elbo_in_bits_a_dimension(pictures: Path) -> None:
    model = load_image(pictures)
    x = load_images(recipe_of(pictures).data).test.rows(slice(None))
    out = model(pixel_values=x.view(-1, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    expected = model.elbo(x, 1, torch.Generator().manual_seed(0))
    assert torch.equal(out.elbo, expected.values)
    assert out.loss.item() == pytest.approx(-out.elbo.mean().item() / 16 / math.log(2))
    with pytest.raises(InputError, match="up to 2"):
        model.exact_log_prob(x)


def test_unfit_data_are_refused(pictures: Path, table: Path) -> None:
    model = load_image(pictures)
    for x, message in [
        (torch.zeros(2, 15), r"\(15,\); this model takes \(1, 4, 4\)"),
        (torch.zeros(2, 4, 4), r"\(4, 4\); this model takes"),
        (torch.full((2, 16), 2), r"value 2 of entry 0 is no integer in 0\.\.1"),
        (torch.full((2, 1, 4, 4), -1), r"value -1 of entry 0 is no integer in 0\.\.1"),
        (torch.full((2, 16), 0.5), r"value 0.5 of entry 0 is no integer in 0\.\.1"),
        (torch.full((2, 16), math.nan), "value nan"),
    ]:
        with pytest.raises(InputError, match=message):
            model.elbo(x)
    mixed = load_image(table)
    low, levels = mixed.config.lowest, mixed.config.levels
    good = torch.tensor([[low[0], -1e6, low[2] + levels[2] - 1]], dtype=torch.float64)
    assert mixed.elbo(good).values.shape == (1,)
    # A draw may lie outside the range of the data: all integers have a cell.
    good[0, 0], good[0, 2] = low[0] - 3, low[2] + levels[2]
    assert mixed.elbo(good).values.isfinite().all()
    for column, value, message in [
        (0, -(1 << 22) - 1, r"entry 0 is no integer in -4194304\.\.4194304"),
        (2, (1 << 22) + 1, "entry 2 is no integer in"),
        (2, 0.5, "entry 2 is no integer in"),
        (1, math.inf, "value inf of entry 1 is not finite"),
    ]:
        bad = good.clone()
        bad[0, column] = value
        with pytest.raises(InputError, match=message):
            mixed.elbo(bad)
    with pytest.raises(InputError, match="cannot draw 0"):
        model.generate(0)


def test_families_are_those_of_the_kind() -> None:
    with pytest.raises(InputError, match="'grouped' is one of models of text, and this takes one of images"):
        hf.DflowImageModel(hf.DflowImageConfig(family="grouped"))
    with pytest.raises(
        InputError, match="'dequantized' is one of models of images or tables, and this takes one of text"
    ):
        hf.DflowModel(hf.DflowConfig(family="dequantized"))
    with pytest.raises(InputError, match="missing: shape, levels"):
        hf.DflowImageModel(hf.DflowImageConfig())


def spoil(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    changes: dict[str, dict[str, Any]] = {
        "no shape": {"shape": []},
        "no levels": {"levels": []},
        "another shape": {"shape": [1, 8, 4]},
        "another size": {"hidden_size": 16},
        "another dequantizer": {"dequantizer": "bipartite"},
        "a forbidden dequantizer": {"dequantizer": "uniform"},
        "unknown family": {"family": "dequantised"},
        "a family of text": {"family": "grouped"},
        "a setting of the wrong type": {"levels": "two"},
    }
    if what in changes:
        config.write_text(json.dumps(values | changes[what]))
    elif what == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "missing weights":
        weights.unlink()
    elif what == "a tensor too few":
        tensors = load_file(weights)
        tensors.popitem()
        save_file(tensors, weights, {"format": "pt"})
    elif what == "truncated config":
        config.write_text(config.read_text()[:40])


@pytest.mark.parametrize(
    "what",
    [
        "no shape", "no levels", "another shape", "another size", "another dequantizer",
        "a forbidden dequantizer", "unknown family", "a family of text", "a setting of the wrong type",
        "truncated weights", "missing weights", "a tensor too few", "truncated config",
    ],
)  # fmt: skip
def test_spoilt_folders_give_one_clear_error(what: str, pictures: Path, tmp_path: Path) -> None:
    hf.save(load_image(pictures), tmp_path)
    spoil(tmp_path, what)
    with pytest.raises(InputError) as caught:
        load_image(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_models_of_another_kind_are_refused(
    pictures: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, words = str(pictures), str(text)
    with pytest.raises(InputError, match="a model of images or tables; this takes a model of text"):
        hf.load(image)
    with pytest.raises(InputError, match="a model of text; this takes a model of images or tables"):
        load_image(text)
    with pytest.raises(InputError, match="leave out @8"):
        load_image(Path(f"{pictures}@8"))
    assert "this takes a model of text" in fails(capsys, "compare", image)
    assert "this takes a model of text" in fails(capsys, "compare", words, image)
    assert "this takes a model of images" in fails(capsys, "plot", "density", "--model", words)
    new = ["--output", str(tmp_path / "new")]
    for flags, said in [
        (["--prompt", "line"], "--prompt is for models of text"),
        (["--length", "3"], "--length is for models of text"),
        (["--format", "jsonl"], "use png, npy or csv"),
        (["--format", "text"], "use png, npy or csv"),
    ]:
        assert said in fails(capsys, "generate", "--model", image, *flags, *new)
    assert "use text or jsonl" in fails(capsys, "generate", "--model", words, "--format", "png", *new)
    for flags in (["--draws", "8"], ["--precision", "float32"], ["--seed", "1"]):
        assert f"{flags[0]} is for models of images" in fails(capsys, "evaluate", "--model", words, *flags)
    assert not (tmp_path / "new").exists()
    # Files of two runs, thrown together.
    for folder, other in ((pictures, text), (text, pictures)):
        mixed = tmp_path / folder.name
        mixed.mkdir()
        for file in folder.iterdir():
            if file.is_file():
                (mixed / file.name).write_bytes(file.read_bytes())
        (mixed / "recipe.yaml").write_bytes((other / "recipe.yaml").read_bytes())
        assert "restore both files from one run" in fails(capsys, "evaluate", "--model", str(mixed))


# -- figures -------------------------------------------------------------------------------------------------


def test_figures_of_an_exact_posterior_are_exact(exact: Path) -> None:
    model, images = load_image(exact), load_images(recipe_of(exact).data)
    found = score(exact, "test", draws=3, batch_size=4)
    x = images.test.rows(slice(None))
    law, lower = model.law.double(), x.double()
    nats = -law.density.log_mass(lower, lower + 1).detach()
    each = nats / math.log(2) / 3
    for value in (found.vi, found.nll, found.exact):
        assert value == pytest.approx(float(each.mean()), rel=1e-9)
    assert found.kl == pytest.approx(0, abs=1e-9)
    for error in (found.vi_error, found.nll_error):
        assert error == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-6)
    assert found.ess == pytest.approx(3)
    assert (found.unit, found.draws, found.num_rows, found.intact) == ("bits a dimension", 3, len(x), True)
    # Neither batches, nor seeds, nor the precision change what does not hang on draws.
    for settings in ({"batch_size": 100}, {"seed": 5}, {"draws": 1}):
        other = score(exact, "test", **{"draws": 3} | settings)
        assert (other.vi, other.nll) == pytest.approx((found.vi, found.nll), rel=1e-9)
    single = score(exact, "test", draws=3, precision=torch.float32)
    assert single.precision == "float32"
    assert single.vi == pytest.approx(found.vi, rel=1e-5)
    assert next(model.parameters()).dtype == torch.float64  # of the law above; scoring works on a copy
    whole = evaluate_images(model, images.test, unit="bits", draws=2)
    assert whole.vi == pytest.approx(3 * found.vi, rel=1e-9)
    assert whole.unit == "bits"
    assert score(exact).vi == pytest.approx(min(r["valid_bits"] for r in metrics(exact)), abs=1e-4)


def test_bounds_lie_in_order(checkers: Path) -> None:
    found = score(checkers, "test", draws=4000)
    assert found.exact is not None
    assert found.vi > found.nll
    assert found.kl == pytest.approx(found.vi - found.nll)
    # Two rows of one law each: what is left are the draws, 8,000 of a deviation below two bits.
    assert found.nll == pytest.approx(found.exact, abs=0.08)
    assert 1 < found.ess < 4000
    again = score(checkers, "test", draws=4000)
    assert again == found
    assert score(checkers, "test", draws=4000, seed=1).vi != found.vi
    one = score(checkers, "test", draws=1)
    assert one.kl == pytest.approx(0, abs=1e-12)
    assert one.ess == 1
    assert found.kind == "upper bounds in expectation, from 4,000 draws"


def test_limit_takes_random_rows(exact: Path) -> None:
    images = load_images(recipe_of(exact).data)
    model = load_image(exact)
    found = evaluate_images(model, images.train, draws=1, limit=3, batch_size=2)
    x = images.train.subset(3).rows(slice(None))
    expected = -model.law.double().exact_log_prob(x).mean() / 3 / math.log(2)
    assert found.num_rows == 3
    assert found.vi == pytest.approx(float(expected), rel=1e-9)
    lone = evaluate_images(model, images.train, draws=1, limit=1)
    assert (lone.vi_error, lone.nll_error) == (None, None)
    assert evaluate_images(model, images.test, draws=1, limit=10**9).num_rows == images.test.num_rows


def test_real_columns_keep_their_value_in_single_precision(table: Path) -> None:
    found = score(table, "test", draws=4, precision=torch.float32)
    assert found.intact
    assert found.exact == pytest.approx(score(table, "test", draws=4).exact, abs=1e-3)


def test_what_cannot_be_scored(checkers: Path, pictures: Path) -> None:
    model, both = load_image(checkers), load_images(ImageConfig())
    for settings, message in [
        ({"draws": 0}, "draws 0"), ({"batch_size": 0}, "batch size 0"), ({"limit": 0}, "limit 0"),
        ({"seed": -1}, "seed -1"), ({"seed": 2**64}, "seed 18446744073709551616"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            evaluate_images(model, both.test, **settings)
    with pytest.raises(InputError, match=r"\(2,\); this model takes \(1, 4, 4\)"):
        evaluate_images(load_image(pictures), both.test)
    values = torch.tensor([[0, 1], [1, 1 << 23]])
    with pytest.raises(InputError, match="value 8388608 of entry 1"):
        evaluate_images(model, replace(both.test, values=values))
    model.law.density.loc.fill_(math.nan)
    with pytest.raises(InputError, match="not finite; its training diverged"):
        evaluate_images(model, both.test, draws=2)


# -- commands ------------------------------------------------------------------------------------------------


def test_evaluate_by_the_recipe(exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--model", str(exact), "--draws", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    found, expected = json.loads(out[-1]), score(exact, "test", draws=2)
    assert found["vi"] == expected.vi
    assert (found["model"], found["split"], found["draws"]) == (str(exact), "test", 2)
    assert found["checksum"].startswith("sha256:")
    shown = "\n".join(out[:-1])
    for part in (f"{expected.vi:.4f}", f"{expected.exact:.4f}", "2.0 of 2", "intact", expected.kind):
        assert part in shown
    argv = ["evaluate", "--model", str(exact), "--limit", "2", "--split", "train", "--batch-size", "1"]
    assert cli.main([*argv, "--precision", "float32", "--seed", "3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["num_rows"], found["precision"], found["draws"]) == (2, "float32", 256)


def test_evaluate_on_other_data(
    exact: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What belongs to the data of the training alone, the shares of its splits, is not asked of others."""
    base = ["evaluate", "--draws", "2", "--model"]
    other = write_table(tmp_path, "i,i2,i3", 60)
    assert cli.main([*base, str(exact), "--data", str(other)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == str(other)
    assert recipe_of(pictures).data.valid == 0.2
    grey = write_pictures(tmp_path / "grey", 30, depth=1, size=4)
    assert cli.main([*base, str(pictures), "--data", str(grey)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_rows"] == 30
    for name, said in [
        ("checkerboard", "(2,); this model takes (1, 4, 4)"),
        (str(write_pictures(tmp_path / "deep", 30, size=4)), "is not one of 0..1"),
        ("mnist", "mnist: not in a local folder"),
        ("text8", "text8: a text"),
        ("nowhere", "nowhere: neither"),
    ]:
        assert said in fails(capsys, *base, str(pictures), "--data", name), name
    copy = tmp_path / "copy"
    hf.save(load_image(pictures), copy)
    assert "recipe.yaml" in fails(capsys, *base, str(copy))
    assert cli.main([*base, str(copy), "--data", str(grey)]) == 0


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--draws", "0"], "draws 0"),
        (["--draws", "many"], "--draws"),
        (["--seed", "-1"], "seed -1"),
        (["--precision", "half"], "--precision"),
        (["--split", "tset"], "test"),
        (["--limit", "0"], "limit 0"),
        (["--batch-size", "0"], "batch size 0"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_evaluate_refuses(
    argv: list[str], named: str, exact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in fails(capsys, "evaluate", "--model", str(exact), *argv)


def test_a_draw_outside_its_cell_is_exit_code_1(
    exact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hypercube, "quantize", lambda self, v: v.ceil().long() + 1)
    assert cli.main(["evaluate", "--model", str(exact), "--draws", "2"]) == 1
    streams = capsys.readouterr()
    assert json.loads(streams.out.splitlines()[-1])["intact"] is False
    assert "FAILED" in streams.out
    assert "left the cell" in streams.err


def test_generate(pictures: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = ["generate", "--n", "5", "--seed", "3", "--model"]
    assert cli.main([*draw, str(pictures)]) == 0
    with Image.open("samples.png") as image:
        assert image.mode == "L"
        assert set(np.unique(np.asarray(image))) <= {0, 128, 255}
    for kind in ("npy", "csv"):
        assert cli.main([*draw, str(pictures), "--output", f"out.{kind}"]) == 0
    array = np.load("out.npy")
    expected = generate_images(load_image(pictures), 5, seed=3)
    assert array.dtype == np.int64
    assert np.array_equal(array, expected.numpy())
    assert np.array_equal(np.loadtxt("out.csv", delimiter=",", dtype=int, skiprows=1), array.reshape(5, 16))
    assert encode_images(expected, "png", 2) == Path("samples.png").read_bytes()
    # A table has no picture: its draws are lines of numbers.
    assert cli.main([*draw, str(table)]) == 0
    rows = np.loadtxt("samples.csv", delimiter=",", skiprows=1)
    assert rows.shape == (5, 3)
    assert (rows[:, [0, 2]] == np.floor(rows[:, [0, 2]])).all()
    assert (rows[:, 1] != np.floor(rows[:, 1])).all()
    assert np.array_equal(rows, generate_images(load_image(table), 5, seed=3).flatten(1))
    # Which dflow reads itself.
    assert tables.read(Path("samples.csv")).columns == ("i", "real", "i2")
    assert all(
        cell.lstrip("-").isdigit()
        for line in Path("samples.csv").read_text().splitlines()[1:]
        for cell in line.split(",")[::2]
    )


def test_draws_hang_on_seed_and_batch_size(pictures: Path) -> None:
    model = load_image(pictures)
    x = generate_images(model, 7, seed=1, batch_size=3)
    assert x.shape == (7, 1, 4, 4)
    assert torch.equal(generate_images(model, 7, seed=1, batch_size=3), x)
    assert torch.equal(generate_images(model, 9, seed=1, batch_size=3)[:6], x[:6])
    assert not torch.equal(generate_images(model, 7, seed=2, batch_size=3), x)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--n", "0"], "number of samples 0"),
        (["--batch-size", "0"], "batch size 0"),
        (["--seed", "-1"], "seed -1"),
        (["--format", "xml"], "--format: 'xml'"),
        (["--output", "no/such/folder/out.png"], "no/such/folder"),
        (["--output", "out.jpg"], "--output out.jpg: no name of a file of format png, npy or csv"),
        (["--output", "out.png", "--format", "csv"], "--output out.png: no name of a file of format csv"),
    ],
)
def test_generate_refuses(
    argv: list[str], named: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert named in fails(capsys, "generate", "--model", str(pictures), *argv)
    assert not list(tmp_path.iterdir())


def test_outputs_that_exist_are_kept(
    pictures: Path, table: Path, checkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "there.png"
    output.write_text("mine")
    argv = ["--output", str(output)]
    assert "exists already" in fails(capsys, "generate", "--model", str(pictures), *argv)
    assert "exists already" in fails(capsys, "plot", "density", "--model", str(checkers), *argv)
    assert output.read_text() == "mine"
    with pytest.raises(InputError, match="exists already"):
        run(pictures / "recipe.yaml")
    new = ["--output", str(tmp_path / "new.png"), "--format", "png"]
    assert "use csv or npy" in fails(capsys, "generate", "--model", str(table), *new)
    with pytest.raises(InputError, match="no pictures"):
        encode_images(torch.zeros(2, 3, 1, 1), "png", None)
    assert [p.name for p in tmp_path.iterdir()] == ["there.png"]


def test_plot_density(
    checkers: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plot", "density", "--cells", "40", "--model"]
    real = run(image_recipe(tmp_path, str(write_table(tmp_path, "i,real")), {"conditioner": "perceptron"}))
    for number, folder in enumerate((checkers, real)):
        output = tmp_path / f"{number}.png"
        assert cli.main([*argv, str(folder), "--output", str(output)]) == 0
        assert str(output) in capsys.readouterr().out
        with Image.open(io.BytesIO(output.read_bytes())) as image:
            assert image.size == (1350, 660)
    new = ["--output", str(tmp_path / "new.png")]
    assert "two dimensions; this model has 16" in fails(capsys, *argv, str(pictures), *new)
    assert "cells 1" in fails(capsys, "plot", "density", "--cells", "1", "--model", str(checkers), *new)
    assert not (tmp_path / "new.png").exists()


def test_edges_are_those_of_the_discrete_columns(table: Path) -> None:
    from dflow.plot import _edges

    images = load_images(recipe_of(table).data)
    partition, x = load_image(table).law.partition, images.train.rows(slice(None))
    assert _edges(partition, x, 0) == [-2, -1, 0, 1, 2, 3, 4]
    assert _edges(partition, x, 1) == []
