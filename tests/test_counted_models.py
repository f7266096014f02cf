"""Models that read counts, from training to their folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import TEXT, write_text
from safetensors.torch import load_file, save_file
from test_train import metrics, recipe_file, run, same

from dflow import cli, hf
from dflow.config import InputError
from dflow.models.counts import COUNTS, counted
from dflow.train import load_recipe
from dflow.train.folds import Folds
from dflow.train.tasks import task_of

FAMILIES = (
    "transformer",
    "lstm",
    "grouped",
    "any_order",
    "autoregressive",
    "bipartite",
    "multiscale",
    "ngram",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family."""
    folders = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        path = recipe_file(folder, write_text(folder), family, {"counts": 3}, eval_every=3, samples=0)
        folders[family] = run(path)
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_counts_comes_back_from_its_folder(
    family: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    model = hf.load(trained[family])
    x = torch.randint(0, model.config.vocab_size, (3, 16))
    with torch.no_grad():
        expected = model.log_prob(x)
        hf.save(model, tmp_path / "copy")
        again = hf.load(tmp_path / "copy")
        assert torch.equal(again.log_prob(x), expected)
    assert len(metrics(trained[family])) == 2
    for module in counted(again):
        assert len(module.table.keys) > 50


def test_counts_help_at_once(trained: dict[str, Path]) -> None:
    """After six steps a network knows nothing, and counts do."""
    assert metrics(trained["transformer"])[-1]["valid_bits"] < 2.5
    assert metrics(trained["ngram"])[-1]["valid_bits"] < 2.5


def test_the_commands_take_them(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in ("grouped", "bipartite", "multiscale", "ngram"):
        folder = str(trained[family])
        file = tmp_path / "file.txt"
        file.write_text(TEXT[:640], encoding="utf-8")
        for words in (
            ["generate", "--model", folder, "--n", "2"],
            ["evaluate", "--model", folder, "--limit", "4"],
            ["compress", str(file), "--model", folder, "--output", str(tmp_path / "file.dfl")],
            [
                "decompress",
                str(tmp_path / "file.dfl"),
                "--model",
                folder,
                "--output",
                str(tmp_path / "back"),
            ],
            ["check", folder],
        ):
            assert cli.main(words) == 0, words
        assert (tmp_path / "back" / "file.txt").read_text(encoding="utf-8") == TEXT[:640]
        shutil.rmtree(tmp_path / "back")
        (tmp_path / "file.dfl").unlink()
    assert COUNTS in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file, other: file.unlink(), f"no {COUNTS}"),
        (lambda file, other: file.write_bytes(file.read_bytes()[:-3]), "truncated or damaged"),
        (lambda file, other: shutil.copy(other, file), "the counts of another model"),
        (lambda file, other: save_file({"keys": torch.zeros(2)}, file), "truncated or damaged"),
        (lambda file, other: reversed_keys(file), "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("listed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_damaged_counts_are_refused(
    change: Any, message: str, listed: bool, trained: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained["ngram"], folder)
    other = tmp_path / "other" / "out"
    other.parent.mkdir()
    text = write_text(other.parent, TEXT[::-1])
    run(recipe_file(other.parent, text, "ngram", samples=0))
    change(folder / COUNTS, other / COUNTS)
    if not listed:
        (folder / "manifest.json").unlink()
    elif message != f"no {COUNTS}":
        message = "damaged or changed since it was saved"
    with pytest.raises(InputError, match=message):
        hf.load(folder)


def reversed_keys(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {"keys": tensors["keys"].flip(0)}, file)


def test_a_resumed_training_counts_again_and_ends_alike(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    for name, steps in (("whole", (6,)), ("parts", (3, 6))):
        folder = tmp_path / name
        folder.mkdir()
        path = recipe_file(folder, text, "transformer", {"counts": 3}, samples=0)
        for number in steps:
            run(path, f"train.steps={number}", "train.eval_every=3", resume=number > steps[0])
    one, two = (hf.load(tmp_path / name / "out").state_dict() for name in ("whole", "parts"))
    # The schedule of the learning rate knows the budget.
    assert one.keys() == two.keys()
    assert same(
        {"digest": one["distribution.net.counted.digest"]}, {"digest": two["distribution.net.counted.digest"]}
    )


def test_each_batch_comes_from_one_fold_whose_counts_are_left_out(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, write_text(tmp_path), "transformer", {"counts": 3})
    task = task_of(load_recipe(path), False)
    (module,) = counted(task.model)
    folds = task.data.folds
    assert isinstance(folds, Folds)
    seen = set()
    for seed in range(40):
        x, _ = task.data.batch(seed)
        assert module.left_out is not None
        fold = next(i for i, table in enumerate(folds.tables) if table is module.left_out)
        seen.add(fold)
        windows = folds.texts[fold].ids.unfold(0, x.shape[1], 1)
        assert all((windows == row).all(1).any() for row in x)
    assert len(seen) == len(folds.tables) == 8
    assert sum(int(table.counts.sum()) for table in folds.tables) == int(module.table.counts.sum())


def test_sentences_are_counted_each_by_itself(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, write_text(tmp_path), "transformer", {"counts": 3, "length": 64})
    task = task_of(load_recipe(path, ["data.protocol=sentence"]), False)
    (module,) = counted(task.model)
    text = task.data.corpus.train
    assert text.lengths is not None
    # Of each pattern there is a count for each symbol with so many before it in its sentence.
    expected = sum(int((text.lengths - n).clamp(min=0).sum()) for n in range(4))
    assert int(module.table.counts.sum()) == expected


def test_what_cannot_be_counted_is_refused_before_any_work(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    path = recipe_file(tmp_path, text, "autoregressive", {"counts": 3, "length": 3})
    with pytest.raises(InputError, match=r"model.counts 3: an? autoregressive model reads no counts; set it"):
        run(path, "model.conditioner=table")
    path = recipe_file(tmp_path, text, "bipartite", {"counts": 3})
    with pytest.raises(InputError, match=r"conditioner 'table' reads no counts: .* conditioner 'attention'"):
        run(path, "model.conditioner=table")
    for family in ("bipartite", "multiscale", "autoregressive"):
        path = recipe_file(tmp_path, text, family, {"counts": 3})
        with pytest.raises(InputError, match=r"model.counts 3: .* elementwise 'affine' .* use rank or shift"):
            run(path, "model.elementwise=affine")
    path = recipe_file(tmp_path, text, "ngram")
    with pytest.raises(InputError, match=r"the training text has [0-9,]* symbols, and counts take two folds"):
        run(path, "model.context=2500")
    with pytest.raises(InputError, match="drawn afresh for each batch, so that nothing can be counted"):
        run(path, "data={name: synthetic/set_summation}")
    with pytest.raises(InputError, match="counts must be at least 1, found 0"):
        run(path, "model.counts=0")
    model = hf.DflowModel(hf.DflowConfig(family="ngram", vocab_size=5, length=8))
    with pytest.raises(InputError, match="has none yet; train it by `dflow train`"):
        model.log_prob(torch.zeros(1, 8, dtype=torch.int64))
