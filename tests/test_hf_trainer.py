"""Models under transformers' own Trainer: they learn, and what `evaluate` tells is the exact cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LENGTH, SETTINGS, TEXT, corpus_of, make_model, write_text
from test_hf_forward import FLOW, IMAGES, classifier, image, values
from transformers import Trainer, TrainingArguments

from dflow import hf, objectives

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def trainer(model: Any, rows: list[dict[str, Any]], folder: Path, steps: int = 3, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        learning_rate=0.01, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **more,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:16])


def chunks(tmp_path: Path) -> tuple[torch.Tensor, int]:
    corpus = corpus_of(write_text(tmp_path, TEXT))
    ids, _ = corpus.train.chunks(LENGTH, 64)
    return ids, corpus.tokenizer.size


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_evaluation_tells_the_exact_nats_a_symbol(family: str, labelled: bool, tmp_path: Path) -> None:
    ids, size = chunks(tmp_path)
    model = make_model(family, size).train()
    rows = [{"input_ids": row} | ({"labels": row} if labelled else {}) for row in ids]
    run = trainer(model, rows, tmp_path / "out", gradient_accumulation_steps=2)
    before = [p.clone() for p in model.parameters()]
    run.train()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    found = run.evaluate()
    with torch.no_grad():
        exact = -model.eval().log_prob(ids[:16]).double().sum() / ids[:16].numel()
    assert found["eval_loss"] == pytest.approx(float(exact), rel=1e-5)


def test_padding_is_neither_trained_nor_scored(tmp_path: Path) -> None:
    ids, size = chunks(tmp_path)
    model = make_model("grouped", size, explicit_length=True).train()
    mask = (torch.arange(LENGTH) < 5).long()
    rows = [{"input_ids": r * mask, "attention_mask": mask, "labels": r.where(mask == 1, -100)} for r in ids]
    run = trainer(model, rows, tmp_path / "out")
    run.train()
    with torch.no_grad():
        exact = -model.eval().log_prob(ids[:16, :5]).sum() / (16 * 6)
    assert run.evaluate()["eval_loss"] == pytest.approx(float(exact), rel=1e-5)
    assert model.length_counts.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("family", ["bipartite", "autoregressive", "multiscale"])
def test_flows_learn(family: str, tmp_path: Path) -> None:
    ids, size = chunks(tmp_path)
    torch.manual_seed(0)
    settings = hf.DflowConfig(family=family, vocab_size=size, length=LENGTH, **SETTINGS[family])
    model = hf.DflowModel(settings)
    run = trainer(model, [{"input_ids": row} for row in ids], tmp_path / "out", 1)
    run.train()
    first = run.evaluate()["eval_loss"]
    # The base alone, whatever the maps do.
    base = objectives.closed_form(model.distribution)
    assert base is not None
    run = trainer(model, [{"input_ids": row} for row in ids], tmp_path / "out", 80)
    run.train()
    assert run.evaluate()["eval_loss"] < first - 0.25


def test_models_of_images_and_classifiers(tmp_path: Path) -> None:
    for family, settings in (
        IMAGES[0],
        IMAGES[2],
        ("dequantized", FLOW | {"levels": [2], "density": "covariance", "dequantizer": "normal"}),
    ):
        model = image(family, settings)
        x = values(model)
        model.initialize(x)
        run = trainer(model, [{"pixel_values": row} for row in x], tmp_path / family)
        before = [p.clone() for p in model.parameters()]
        run.train()
        assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert "eval_loss" in run.evaluate()
    labeller = classifier({})
    rows = [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(torch.randint(256, (24, 1, 8, 8)))]
    run = trainer(labeller, rows, tmp_path / "labels")
    run.train()
    assert "eval_loss" in run.evaluate()


def test_trainer_saves_what_loads_with_its_vocabulary(tmp_path: Path) -> None:
    from folders import write_model

    from dflow.data import Tokenizer

    source = write_model(tmp_path / "source", "grouped", write_text(tmp_path))
    model = hf.load(source).train()
    ids, _ = chunks(tmp_path)
    run = trainer(model, [{"input_ids": row} for row in ids], tmp_path / "out")
    run.train()
    run.save_model(str(tmp_path / "out"))
    again = hf.load(tmp_path / "out")
    assert torch.equal(again.log_prob(ids), model.eval().log_prob(ids))
    assert Tokenizer.load(tmp_path / "out") == Tokenizer.load(source)
