"""Integer flows from the recipe to the picture: training, folders, exact figures, draws, commands."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import image_recipe, write_pictures, write_table
from PIL import Image
from safetensors.torch import load_file
from test_images import fails, load_image, run
from test_train import metrics, same, state, stop_after

from dflow import cli, hf
from dflow.config import InputError
from dflow.data import load_images
from dflow.elementwise import IntegerShift
from dflow.evaluate import ExactEvaluation, evaluate_exact, evaluate_images
from dflow.train import load_recipe, recipe_of
from dflow.train.tasks import task_of

MODEL = {"family": "integer", "num_levels": 2, "num_flows": 2, "hidden_size": 8, "num_hidden_layers": 2}


def recipe(
    folder: Path, data: dict[str, Any] | str, model: dict[str, Any] | None = None, **train: Any
) -> Path:
    path = image_recipe(folder, data, **train)
    values = json.dumps(MODEL | (model or {}))
    lines = path.read_text().split("\nmodel:\n")
    rest = lines[1].split("\noutput:")[1]
    path.write_text(f"{lines[0]}\nmodel: {values}\noutput:{rest}")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("integer")
    data = {"name": str(write_pictures(folder / "png", 60, size=8)), "valid": 0.2, "test": 0.2}
    return run(recipe(folder, data, steps=30, eval_every=10, learning_rate=0.01, batch_size=16))


def score(folder: Path, split: str = "test", **settings: Any) -> ExactEvaluation:
    images = load_images(recipe_of(folder).data)
    return evaluate_exact(load_image(folder), images.split(split), unit=images.unit, **settings)


# -- training ------------------------------------------------------------------------------------------------


def test_training_lowers_the_exact_cost_and_the_folder_holds_the_best_model(pictures: Path) -> None:
    rows = metrics(pictures)
    assert [r["step"] for r in rows] == [10, 20, 30]
    assert rows[-1]["valid_bits"] < rows[0]["valid_bits"] < 9
    found = score(pictures, "valid", precision=torch.float32)
    assert min(r["valid_bits"] for r in rows) == pytest.approx(found.nll, abs=2e-5)
    assert recipe_of(pictures).model == replace(
        load_recipe(pictures.parent / "recipe.yaml").model, shape=[1, 8, 8], levels=[256], lowest=[0]
    )


def test_flip_mirrors_about_half_of_a_batch_and_nothing_else(tmp_path: Path) -> None:
    data = {"name": str(write_pictures(tmp_path / "png", 30, size=8)), "valid": 0.2, "test": 0.2}
    path = recipe(tmp_path, data, batch_size=64)
    plain, flipped = (
        task_of(load_recipe(path, [f"data.flip={on}"]), False).data.batch(7)[0].view(64, 8, 8)
        for on in ("false", "true")
    )
    same_rows = (flipped == plain).flatten(1).all(1)
    assert 16 < int(same_rows.sum()) < 48
    assert torch.equal(flipped[~same_rows], plain[~same_rows].flip(2))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"permute": "inverted", "rezero": True, "activation": "silu", "norm": "group"}, {"ema": 0.5}),
        ({"split": "half"}, {"rule": "likelihood", "accumulation": 2, "mixed_precision": "bf16"}),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(
    model: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    name = str(write_pictures(tmp_path / "png", 24, channels=3, size=4))
    path = recipe(
        tmp_path, {"name": name, "valid": 0.2, "test": 0.2}, model, steps=6, eval_every=2, **settings
    )
    whole = run(path, f"output={tmp_path / 'whole'}")
    out = tmp_path / "parts"
    stop_after(load_recipe(path, [f"output={out}"]), 3)
    run(path, f"output={out}", resume=True)
    assert same(state(whole)[0], state(out)[0])
    assert same(load_file(whole / "model.safetensors"), load_file(out / "model.safetensors"))
    assert [r["valid_bits"] for r in metrics(out)] == [r["valid_bits"] for r in metrics(whole)]


def test_a_table_of_columns_of_several_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, str(write_table(tmp_path, "i,b,i2,b2")), samples=3)
    out = run(path)
    said = capsys.readouterr().out
    assert "integer flow of 2 levels of 2 couplings: " in said
    assert "rule likelihood" in said
    assert "bits a dimension (exact, best)" in said
    shown = [json.loads(line.removeprefix("  | ")) for line in said.splitlines() if line.startswith("  | ")]
    assert len(shown) == 6
    assert all(isinstance(v, int) for row in shown for v in row)
    assert load_image(out).config.lowest == [-2, 0, -2, 0]
    assert (
        cli.main(["generate", "--model", str(out), "--n", "4", "--output", str(tmp_path / "rows.csv")]) == 0
    )
    assert np.loadtxt(tmp_path / "rows.csv", delimiter=",", dtype=int, skiprows=1).shape == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.rule=elbo", "train.rule 'elbo' trains no model of family 'integer'; use likelihood"),
        ("train.rule=iwbo", "use likelihood"),
        ("train.rule=renyi", "use likelihood"),
        ("train.rule=layerwise", "use likelihood"),
        ("model.dequantizer=uniform", "unknown key 'dequantizer'"),
        ("model.family=integr", "did you mean 'integer'"),
        ("model.levels=[9]", "model.levels is [9] and the data's is [2]"),
        ("model.num_levels=3", "fewer num_levels"),
    ],
)
def test_wrong_settings_end_with_one_clear_error_and_2(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "checkerboard", {"num_levels": 1})
    assert message in fails(capsys, "train", str(path), "--set", change)
    assert not (tmp_path / "out").exists()


def test_a_real_column_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, str(write_table(tmp_path, "i,real,b")))
    assert "column 1 is real, and an integer flow models integers" in fails(capsys, "train", str(path))


# -- folders and figures -------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_the_same(pictures: Path, tmp_path: Path) -> None:
    model = load_image(pictures)
    x = load_images(recipe_of(pictures).data).test.rows(slice(None))
    hf.save(model, tmp_path)
    found = load_image(tmp_path)
    assert same(dict(model.state_dict()), dict(found.state_dict()))
    assert torch.equal(found.log_prob(x), model.log_prob(x))
    draw = [m.generate(3, torch.Generator().manual_seed(1)) for m in (model, found)]
    assert torch.equal(*draw)
    # Permutations, and where the logistic laws lie, are part of what is saved.
    names = set(load_file(tmp_path / "model.safetensors"))
    assert any(name.endswith(".permutation") for name in names)
    assert any(name.endswith("conditional.unit") for name in names)


def test_figures_are_the_mean_of_the_exact_likelihood(pictures: Path) -> None:
    images, model = load_images(recipe_of(pictures).data), load_image(pictures).double()
    x = images.test.rows(slice(None))
    each = -model.log_prob(x).detach() / math.log(2) / 64
    found = score(pictures, batch_size=5)
    assert found.nll == pytest.approx(float(each.mean()), rel=1e-12)
    assert found.nll_error == pytest.approx(float(each.std() / len(x) ** 0.5), rel=1e-9)
    assert (found.kind, found.unit, found.precision) == ("exact", "bits a dimension", "float64")
    assert (found.num_rows, found.round_trip, found.num_checked) == (len(x), True, len(x))
    assert score(pictures, batch_size=100) == replace(
        found, nll=pytest.approx(found.nll), nll_error=pytest.approx(found.nll_error)
    )
    assert score(pictures, batch_size=2, checks=3).num_checked == 3
    some = score(pictures, limit=1)
    assert (some.num_rows, some.nll_error) == (1, None)
    whole = evaluate_exact(model, images.test, unit="bits")
    assert whole.nll == pytest.approx(64 * found.nll)


def test_what_cannot_be_scored(pictures: Path, tmp_path: Path) -> None:
    model, data = load_image(pictures), load_images(recipe_of(pictures).data).test
    for settings, message in [({"batch_size": 0}, "batch size 0"), ({"limit": 0}, "limit 0")]:
        with pytest.raises(InputError, match=message):
            evaluate_exact(model, data, **settings)
    with pytest.raises(InputError, match="exact likelihood and no bounds"):
        evaluate_images(model, data)
    checkers = load_image(run(image_recipe(tmp_path, "checkerboard", {"density": "diagonal"})))
    with pytest.raises(InputError, match="has bounds of its likelihood"):
        evaluate_exact(checkers, load_images(recipe_of(tmp_path / "out").data).test)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, message in [
            ("raw", "likelihood of the test data is not finite"),
            ("0.weight", "a translation"),
        ]:
            found = next(p for n, p in parameters.items() if n.endswith(name))
            kept = found.clone()
            found.fill_(math.nan)
            with pytest.raises(InputError, match=f"{message}.*training diverged"):
                evaluate_exact(model, data)
            found.copy_(kept)


def test_commands(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(pictures)
    assert cli.main(["evaluate", "--model", name, "--batch-size", "4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    found, expected = json.loads(out[-1]), score(pictures)
    assert found["nll"] == pytest.approx(expected.nll)
    assert (found["kind"], found["round_trip"], found["split"]) == ("exact", True, "test")
    for part in (f"{expected.nll:.4f}", "exact, float64", "intact on 12 rows"):
        assert part in "\n".join(out[:-1])
    assert cli.main(["evaluate", "--model", name, "--precision", "float32", "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["precision"] == "float32"
    for flags in (["--draws", "8"], ["--seed", "1"]):
        assert "is for bounds" in fails(capsys, "evaluate", "--model", name, *flags)
    assert "exact likelihood and no bounds" in fails(
        capsys, "plot", "density", "--model", str(_two(tmp_path)), "--output", str(tmp_path / "p.png")
    )
    output = tmp_path / "grid.png"
    assert cli.main(["generate", "--model", name, "--n", "4", "--output", str(output)]) == 0
    with Image.open(output) as image:
        assert image.mode == "L"


def _two(folder: Path) -> Path:
    return run(recipe(folder, "checkerboard", {"num_levels": 1}))


def test_a_failed_round_trip_is_exit_code_1(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IntegerShift, "inverse", IntegerShift.forward)
    assert cli.main(["evaluate", "--model", str(pictures)]) == 1
    streams = capsys.readouterr()
    assert json.loads(streams.out.splitlines()[-1])["round_trip"] is False
    assert "FAILED" in streams.out
    assert "round trip failed" in streams.err
