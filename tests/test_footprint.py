"""The memory of a training is estimated before it starts, and checkpointing makes it smaller."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import write_text

from dflow.ops.live import TensorMemory
from dflow.train import load_recipe, train
from dflow.train.footprint import Footprint, footprint
from dflow.train.loop import Run
from dflow.train.tasks import task_of


def recipe(folder: Path, model: dict[str, Any], **settings: Any) -> Path:
    values = {
        "data": {"name": str(write_text(folder))},
        "model": {"family": "transformer", "length": 32, "num_attention_heads": 1} | model,
        "train": {"steps": 2, "batch_size": 8, "samples": 0, "trackers": []} | settings,
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


LARGE = {"hidden_size": 96, "num_hidden_layers": 3, "counts": 0}


def test_the_estimate_is_what_a_step_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = task_of(load_recipe(recipe(tmp_path, LARGE, ema=0.9)), False)
    run = Run(task, None)
    try:
        estimate = run.footprint
        assert estimate is not None
        assert estimate.weights == estimate.moments == 8 * sum(p.numel() for p in task.model.parameters())
        run.begin(False)
        assert str(estimate) in capsys.readouterr().out
        run.progress.next_eval = math.inf
        run._one_step(time.monotonic())
        with TensorMemory() as memory:
            run._one_step(time.monotonic())
        assert estimate.step == pytest.approx(memory.peak, rel=0.15)
    finally:
        run.close()
    pieces = footprint(task, world=2)
    assert pieces is not None
    assert pieces.step < estimate.step


def test_checkpointing_takes_less(tmp_path: Path) -> None:
    path = recipe(tmp_path, LARGE)
    steps = []
    for value in ("false", "true"):
        task = task_of(load_recipe(path, [f"train.checkpointing={value}"]), False)
        estimate = footprint(task, 1)
        assert isinstance(estimate, Footprint)
        steps.append(estimate.step)
    assert steps[1] < 0.7 * steps[0]


@pytest.mark.slow
def test_checkpointing_trains_alike(tmp_path: Path) -> None:
    small = recipe(tmp_path, {"hidden_size": 8, "num_hidden_layers": 2, "counts": 2, "dropout": 0.2})
    lines = []
    for value in ("false", "true"):
        out = train(load_recipe(small, [f"train.checkpointing={value}", f"output={tmp_path / value}"]))
        lines.append(yaml.safe_load((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]))
    assert lines[0]["valid_bits"] == pytest.approx(lines[1]["valid_bits"], abs=1e-4)


def test_of_small_models_nothing_is_said(tmp_path: Path) -> None:
    assert footprint(task_of(load_recipe(recipe(tmp_path, {"hidden_size": 8})), False), 1) is None
