"""Couplings on Z/K over images: a law of all images, bijections, streams, training, wrong settings."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
import yaml
from folders import write_pictures

from dflow import cli, hf, objectives, zoo
from dflow.bijectors import Chain
from dflow.coding import Coder, pop, push
from dflow.config import InputError
from dflow.core import Distribution
from dflow.flows import Flow
from dflow.train import load_recipe, train

SMALL = {"num_flows": 2, "hidden_size": 6, "num_hidden_layers": 1}
KINDS = ["float", "binary", "probabilistic"]


def build(steps: int = 40, **settings: Any) -> Flow:
    """In evaluation mode, with normalisations that have seen data, and a base that is not uniform."""
    torch.manual_seed(0)
    config = zoo.settings("modular", SMALL | {"shape": [1, 2, 3], "levels": [2]} | settings)
    law = zoo.build_image("modular", config)
    assert isinstance(law, Flow)
    x = torch.randint(config.levels[0], (30, config.dim)).cummax(1).values
    optimizer = torch.optim.Adam(law.parameters(), 0.05)
    objective = objectives.Objective(law, "layerwise")
    for _ in range(steps):
        optimizer.zero_grad()
        objective(x)[0].backward()
        optimizer.step()
    law.eval()
    objectives.refit(law, [(x, None)])
    return law


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elementwise", ["rank", "shift"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"levels": [3]}, {"shape": [2, 2, 2], "num_flows": 1}, {"shape": [1, 2, 4], "num_flows": 3}],
    ids=str,
)
def test_probabilities_of_all_images_sum_to_one(
    kind: str, elementwise: str, settings: dict[str, Any]
) -> None:
    law = build(kind=kind, elementwise=elementwise, **settings)
    K = law.base.K
    every = torch.tensor(list(itertools.product(range(K), repeat=law.base.dim)))
    with torch.no_grad():
        log_p = law.log_prob(every)
        assert float(log_p.double().exp().sum()) == pytest.approx(1, abs=1e-5)
        z, _ = law.transform(every)
        assert len(z.unique(dim=0)) == len(every)
        assert torch.equal(law.bijector.inverse(z)[0], every)
        assert not torch.equal(z, every)
        coder = Coder()
        push(law, every[:9], coder)
        assert torch.equal(pop(law, 9, Coder(coder.to_bytes())), every[:9])


def test_couplings_halve_what_nothing_is_known_of() -> None:
    law = build(steps=0, shape=[2, 4, 4], num_flows=4)
    assert isinstance(law.bijector, Chain)
    hidden, rest = [], torch.arange(32)
    for layer in law.bijector.bijectors:
        found = layer.hidden_index
        assert set(found.tolist()) | set(layer.known_index.tolist()) == set(rest.tolist())
        # Both channels of a pixel together.
        assert torch.equal(found[: len(found) // 2] + 16, found[len(found) // 2 :])
        rest, hidden = layer.known_index, [*hidden, len(found)]
    assert hidden == [16, 8, 4, 2]
    checkerboard = law.bijector.bijectors[0].hidden_index[:8]
    assert ((checkerboard // 4 + checkerboard % 4) % 2 == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_every_command_takes_it(
    kind: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = write_pictures(tmp_path / "pictures", 60, 1, 1)
    recipe = {
        "data": {"name": str(pictures), "valid": 0.2, "test": 0.2},
        "model": {"family": "modular", "kind": kind, **SMALL, "hidden_size": 32},
        "train": {"steps": 150, "eval_every": 50, "batch_size": 16, "learning_rate": 0.02, "trackers": []},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    out = train(load_recipe(path))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = min(row["valid_bits"] for row in rows)
    assert best < 0.93 * alone(load_recipe(path))
    assert cli.main(["evaluate", "--model", str(out), "--split", "valid"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["nll"] == pytest.approx(best, abs=1e-3)
    assert told["round_trip"]
    assert cli.main(["generate", "--model", str(out), "--n", "4", "--output", str(tmp_path / "s.png")]) == 0
    found = hf.load(out, kind=hf.DflowImageModel)
    assert found.generate(3).shape == (3, *found.config.shape)
    one = sorted(pictures.rglob("*.png"))[0]
    assert cli.main(["compress", str(one), "--model", str(out), "-o", str(tmp_path / "x.dfl")]) == 0
    assert (
        cli.main(["decompress", str(tmp_path / "x.dfl"), "--model", str(out), "-o", str(tmp_path / "x")]) == 0
    )


def alone(recipe: Any) -> float:
    """Bits a dimension of the validation data, each pixel by its own marginal."""
    from dflow.data import load_images

    images = load_images(recipe.data)
    law: Distribution = zoo.build_image(
        "modular", zoo.settings("modular", SMALL | {"shape": list(images.shape), "levels": [images.levels]})
    )
    assert isinstance(law, Flow)
    base = law.base
    base.assign(base.statistics(images.train.rows(slice(None))))
    rows = images.valid.rows(slice(None))
    return -float(base.log_prob(rows).mean()) / (images.dim * math.log(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": [2, 2, 2, 2, 2, 3]}, "values 0..K-1 of every entry"),
        ({"lowest": [1]}, "values 0..K-1 of every entry"),
        ({"levels": [None]}, "values 0..K-1 of every entry"),
        ({"num_flows": 3}, "6 pixels can be halved 2 times"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"shape": [3, 64, 64], "levels": [256]}, "use fewer bits"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**{"hidden_size": 512} | settings)


def test_rules_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    path = tmp_path / "recipe.yaml"
    values = {"data": {"name": "binarized_mnist"}, "model": {"family": "modular"}, "output": "out"}
    path.write_text(yaml.safe_dump(values | {"train": {"rule": "elbo", "steps": 1}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"rule 'elbo' trains no model of family 'modular'; use layerwise"):
        load_recipe(path)
