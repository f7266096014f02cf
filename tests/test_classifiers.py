"""Classifiers from the recipe to the exported file: labels, training, folders, figures, commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import stop_after
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from dflow import cli, hf, zoo
from dflow.config import InputError
from dflow.data import ImageConfig, image_sets, load_images
from dflow.data.image_sets import SplitPixels
from dflow.evaluate import evaluate_labels
from dflow.evaluate.labels import coverage, score
from dflow.hf import DflowClassifier, DflowClassifierConfig, PackedNetwork
from dflow.train import load_recipe, recipe_of, train

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes" / "binary").glob("*.yaml"))
SMALL = ["model.channels=[3,4]", "model.hidden=[12]", "train.minutes=null", "train.trackers=[]"]
SMALL += ["train.batch_size=40", "train.warmup=1", "train.eval_minutes=null"]


def fake(folder: Path | None = None) -> SplitPixels:
    """Three labels: which third of the image is bright."""
    rng = np.random.default_rng(0)
    sizes = (400, 80, 60)
    labels = [rng.integers(3, size=n, dtype=np.uint8) for n in sizes]
    images = []
    for part in labels:
        x = rng.integers(120, size=(len(part), 1, 28, 28), dtype=np.uint8)
        for image, label in zip(x, part, strict=True):
            image[0, 9 * label : 9 * label + 9] += 90
        images.append(x)
    return SplitPixels(*images, labels=(labels[0], labels[1], labels[2]))


@pytest.fixture(autouse=True)
def _mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image_sets.KNOWN, "mnist", replace(image_sets.KNOWN["mnist"], read=fake))


def run(name: str, output: Path, *overrides: str, resume: bool = False) -> Path:
    settings = [*SMALL, *overrides]
    recipe = load_recipe(ROOT / "recipes" / "binary" / f"{name}.yaml", settings)
    return train(replace(recipe, output=output), resume=resume)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image_sets.KNOWN, "mnist", replace(image_sets.KNOWN["mnist"], read=fake))
        out = tmp_path_factory.mktemp("trained") / "pbnet"
        return run("mnist_pbnet_s", out, "model.init=uniform", "train.steps=120", "train.learning_rate=0.02")


def load(folder: Path) -> DflowClassifier:
    return hf.load(folder, kind=DflowClassifier)


# -- data ------------------------------------------------------------------------------------------------


def test_labels_go_with_their_images() -> None:
    images, made = load_images(ImageConfig("mnist")), fake()
    assert images.classes == 3
    assert made.labels is not None
    for split, labels in zip(("train", "valid", "test"), made.labels, strict=True):
        part = images.split(split)
        assert part.labels is not None
        assert part.labels.tolist() == labels.tolist()
        for some in (part.subset(20), part.subset(10_000)):
            bright = some.rows(slice(None)).view(-1, 28, 28)[:, :27].unflatten(1, (3, 9)).float().mean((2, 3))
            assert torch.equal(bright.argmax(1), some.labels)
    x, labels = images.train.labelled(30, torch.Generator().manual_seed(1))
    assert torch.equal(x, images.train.crops(30, 784, torch.Generator().manual_seed(1))[0])
    assert torch.equal(x.view(-1, 28, 28)[:, :27].unflatten(1, (3, 9)).float().mean((2, 3)).argmax(1), labels)


def test_data_without_labels_are_refused() -> None:
    images = load_images(ImageConfig())
    assert images.classes == 0
    with pytest.raises(InputError, match="no labels"):
        images.train.labelled(1)
    recipe = load_recipe(RECIPES[0], ["data.name=checkerboard"])
    with pytest.raises(InputError, match="checkerboard: has no labels"):
        train(recipe)


# -- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_every_recipe_trains_for_two_steps(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.output == Path("runs/binary") / path.stem
    assert recipe.paper
    overrides = ["train.steps=2"]
    if recipe.model.init != zoo.UNIFORM:
        assert recipe.model.init == "runs/binary/mnist_float"
        floats = run("mnist_float", tmp_path / "float", "train.steps=2")
        overrides.append(f"model.init={floats}")
    out = run(path.stem, tmp_path / "out", *overrides)
    model = load(out)
    assert model.config.classes == 3
    assert model.config.shape == [1, 28, 28]
    named = {"network"} if recipe.model.kind != "probabilistic" else {"propagated"}
    if recipe.model.kind != "float":
        named.add("binarized")
    if recipe.model.kind == "probabilistic":
        named |= {"ensemble of 1", "ensemble of 4", "ensemble of 16"}
    assert {paper.measure for paper in recipe.paper} <= named
    # A setup of the paper is one of this recipe.
    for paper in recipe.paper:
        load_recipe(path, paper.set)


def test_training_learns_and_shows_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = load_images(recipe_of(trained).data)
    found = {s.name: s for s in evaluate_labels(load(trained), images.test, images.train).scores}
    assert list(found) == ["propagated", "binarized", "ensemble of 1", "ensemble of 4", "ensemble of 16"]
    assert found["propagated"].accuracy > 0.9
    assert found["binarized"].accuracy > 0.9
    assert found["ensemble of 16"].accuracy > 0.9
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["valid_bits"] < metrics[0]["valid_bits"]


def test_the_folder_holds_the_model_of_fewest_errors_once_binarized(trained: Path) -> None:
    images, model = load_images(recipe_of(trained).data), load(trained)
    rows = images.train.subset(2560).rows(slice(None))
    labels = images.valid.labels
    wrong = (model.binarized(rows)(images.valid.rows(slice(None))).argmax(1) != labels).double().mean()
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    errors = [row["valid_error binarized"] for row in metrics]
    assert len(errors) > 2
    assert max(errors) > min(errors)
    assert float(wrong) == pytest.approx(min(errors))
    assert {"valid_error as trained", "valid_error binarized"} < set(metrics[0])


def test_a_resumed_run_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    floats = run("mnist_float", tmp_path / "float", "train.steps=1")
    settings = [f"model.init={floats}", "train.steps=5", "train.eval_every=2"]
    whole = run("mnist_pbnet_s", tmp_path / "whole", *settings)
    recipe = load_recipe(ROOT / "recipes" / "binary" / "mnist_pbnet_s.yaml", [*SMALL, *settings])
    stop_after(replace(recipe, output=tmp_path / "parts"), 3)
    # What it started from is needed no more.
    shutil.rmtree(floats)
    parts = run("mnist_pbnet_s", tmp_path / "parts", *settings, resume=True)
    for a, b in zip(load(whole).state_dict().values(), load(parts).state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_start_from_floats(tmp_path: Path) -> None:
    floats = run("mnist_float", tmp_path / "float", "train.steps=1")
    out = run(
        "mnist_pbnet_s", tmp_path / "out", "train.steps=1", f"model.init={floats}", "train.learning_rate=1e-9"
    )
    for layer, source in zip(*(zoo.binary.layers(load(f).net) for f in (out, floats)), strict=True):
        expected = (source.weight / source.weight.std()).clamp(-0.9, 0.9)
        assert torch.allclose(layer.theta, expected, atol=1e-4)
    with pytest.raises(InputError, match="no such folder"):
        run("mnist_pbnet_s", tmp_path / "none", "train.steps=1", "model.init=nowhere")
    with pytest.raises(InputError, match="kind probabilistic, whose weights are no measure"):
        run("mnist_pbnet_s", tmp_path / "none", "train.steps=1", f"model.init={tmp_path / 'out'}")


def test_rules_and_families() -> None:
    with pytest.raises(InputError, match="trains no model of family 'pbnet'; use auto"):
        load_recipe(RECIPES[0], ["train.rule=elbo"])
    with pytest.raises(InputError, match="did you mean 'pbnet'"):
        load_recipe(RECIPES[0], ["model.family=pbnett"])


# -- folders ---------------------------------------------------------------------------------------------


def test_folder_comes_back(trained: Path, tmp_path: Path) -> None:
    model = load(trained)
    hf.save(model, tmp_path / "again")
    x = torch.randint(120, (5, 1, 28, 28))
    for other in (
        load(tmp_path / "again"),
        AutoModel.from_pretrained(trained).eval(),
        AutoModelForImageClassification.from_pretrained(trained).eval(),
    ):
        outs = []
        for each in (model, other):
            torch.manual_seed(0)
            outs.append(each(x).logits)
        assert torch.equal(*outs)
    config = AutoConfig.from_pretrained(trained)
    assert isinstance(config, DflowClassifierConfig)
    assert config.num_labels == 3
    out = model(x.flatten(1), labels=torch.zeros(5, dtype=torch.long))
    assert out.loss > 0
    assert torch.allclose(model.log_prob(x).exp().sum(1), torch.ones(5))


def test_folders_of_other_kinds(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model of labels of images; this takes a model of text"):
        hf.load(trained)
    with pytest.raises(InputError, match="unknown family 'other'; known: pbnet"):
        DflowClassifier(DflowClassifierConfig(family="other"))
    with pytest.raises(InputError, match="missing"):
        DflowClassifier(DflowClassifierConfig())
    with pytest.raises(InputError, match=r"no integer in 0\.\.255"):
        load(trained)(torch.full((1, 784), 256))


# -- figures ---------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.98, 0.02]], dtype=torch.float64)
    found = score("x", p, torch.tensor([0, 1, 1, 0]))
    assert found.accuracy == 0.75
    assert found.nll == pytest.approx(-np.log([0.9, 0.4, 0.7, 0.98]).mean())
    # Bins of 1/15: 0.9 is in the 14th, 0.6 in the 10th, 0.7 in the 11th, 0.98 in the 15th.
    assert found.ece == pytest.approx((0.1 + 0.6 + 0.3 + 0.02) / 4)
    assert found.accuracy_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_coverage_by_hand() -> None:
    first = torch.tensor([0.9, 0.8, 0.6, 0.7], dtype=torch.float64)
    second = torch.tensor([0.9, 0.7, 0.9, 0.2], dtype=torch.float64)
    members = torch.stack([torch.stack([p, 1 - p], 1) for p in (first, second)])
    shares, errors = coverage(members, torch.tensor([0, 0, 0, 0]))
    # The spread of row 3 is largest, and its ensemble says 1.
    assert shares.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert errors.tolist() == [0, 0, 0, 0.25]


def test_coverage_goes_by_agreement_and_not_by_confidence() -> None:
    # Both members are moderately sure of the first and agree; of the second they are surer, and do not.
    first = torch.tensor([0.60, 0.80, 0.55, 0.70], dtype=torch.float64)
    second = torch.tensor([0.61, 0.98, 0.55, 0.64], dtype=torch.float64)
    members = torch.stack([torch.stack([p, 1 - p], 1) for p in (first, second)])
    # By agreement: rows 2, 0, 3, 1; by confidence it would be 1, 3, 0, 2.
    shares, errors = coverage(members, torch.tensor([1, 0, 0, 0]))
    assert shares.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert errors.tolist() == [0, 1 / 2, 1 / 3, 1 / 4]
    _, errors = coverage(members, torch.tensor([0, 1, 0, 0]))
    assert errors.tolist() == [0, 0, 0, 1 / 4]
    # Of those that agree alike, the more confident come first.
    alike = torch.tensor([0.55, 0.9, 0.7], dtype=torch.float64)
    members = torch.stack([torch.stack([alike, 1 - alike], 1)] * 2)
    _, errors = coverage(members, torch.tensor([0, 0, 1]))
    assert errors.tolist() == [0, 1 / 2, 1 / 3]


def test_coverage_of_three_members_is_by_their_variance() -> None:
    """Not by their range, nor by how far one of them is off the others' label."""
    rows = torch.tensor([[0.5, 0.9, 0.9], [0.6, 0.6, 0.96], [0.55, 0.75, 0.95]], dtype=torch.float64)
    members = torch.stack([rows, 1 - rows], 2).transpose(0, 1)
    order = torch.argsort(rows.var(1))
    for wrong in range(3):
        labels = torch.zeros(3, dtype=torch.int64)
        labels[wrong] = 1
        _, errors = coverage(members, labels)
        place = int((order == wrong).nonzero())
        assert errors.tolist() == [float(i >= place) / (i + 1) for i in range(3)]


def test_figures_are_those_of_a_seed(trained: Path) -> None:
    images, model = load_images(recipe_of(trained).data), load(trained)
    options: dict[str, Any] = {"ensembles": (1, 2), "limit": 30}
    one, same, other = (
        evaluate_labels(model, images.test, images.train, seed=s, **options) for s in (0, 0, 1)
    )
    assert one == same
    assert one.scores != other.scores
    assert one.num_rows == 30
    assert one.num_estimated == 400
    with pytest.raises(InputError, match="batch size 0"):
        evaluate_labels(model, images.test, images.train, batch_size=0)


# -- commands --------------------------------------------------------------------------------------------


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--model", str(trained), "--split", "valid"]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert any(line.startswith("ensemble of 16") for line in table)
    about = json.loads(last)
    assert about["num_rows"] == 80
    assert len(about["scores"]) == 5
    assert about["coverage"][-1][0] == 1
    assert cli.main(["evaluate", "--model", str(trained), "--draws", "3"]) == 2
    assert "is a classifier" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["map", "ternary", "sample"])
def test_export(trained: Path, tmp_path: Path, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.safetensors"
    argv = ["export", "--model", str(trained), "-o", str(path), "--rule", rule]
    assert cli.main(argv) == 0
    assert "every sum of 256 images" in capsys.readouterr().out
    program, images = PackedNetwork.load(path), load_images(ImageConfig("mnist"))
    assert program.header.rule == rule
    model = load(trained)
    net = model.binarized(
        images.train.rows(slice(None)),
        rule,
        torch.Generator().manual_seed(0),  # type: ignore[arg-type]
    )
    x = images.test.rows(slice(None))
    with torch.no_grad():
        assert net(x).argmax(1).tolist() == program(x.numpy()).argmax(1).tolist()


def test_export_refuses(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    floats = run("mnist_float", tmp_path / "float", "train.steps=1")
    for argv, said in (
        (["--model", str(floats), "-o", str(tmp_path / "a")], "no signs to export"),
        (["--model", str(trained), "-o", str(tmp_path / "a"), "--images", "1"], "--images 1"),
        (["--model", str(trained), "-o", str(tmp_path / "no" / "a")], "does not exist"),
    ):
        assert cli.main(["export", *argv]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_plot_coverage(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "coverage.png"
    argv = ["plot", "coverage", "--model", str(trained), "-o", str(path), "--members", "3"]
    assert cli.main(argv) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_come_in_the_precision_of_the_weights(dtype: torch.dtype, trained: Path) -> None:
    model = load(trained).eval()
    x = torch.from_numpy(fake().test[:5]).long().flatten(1)

    def labels(pixels: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # of pooling, which draws
        return model.log_prob(pixels)

    expected = labels(x)
    assert torch.equal(labels(x.double()), expected)
    model.to(dtype)
    assert labels(x).dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(labels(x).argmax(1), expected.argmax(1))
