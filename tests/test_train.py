from __future__ import annotations

import fcntl
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from folders import SETTINGS, write_pictures, write_text
from safetensors.torch import load_file, safe_open

from dflow import cli, hf, zoo
from dflow.config import InputError
from dflow.data import DataConfig, load
from dflow.evaluate import evaluate
from dflow.train import Schedule, TrainConfig, history, identity, load_recipe, loop, machine, recipe_of, train

ROOT = Path(__file__).parent.parent
# Recipes of synthetic laws are trained on these, in test_synthetic.py.
RECIPES = sorted(
    p
    for p in (ROOT / "recipes").rglob("*.yaml")
    if p.parent.name not in ("synthetic", "images", "binary", "accelerate")
)
#: Of the recipes of images those that take seconds, although they are made small, are slow tests.
IMAGES = [
    pytest.param(
        path,
        id=path.stem,
        marks=[pytest.mark.slow]
        * path.stem.startswith(("binarized_mnist_truncated", "multiscale_", "idf_imagenet")),
    )
    for path in sorted((ROOT / "recipes" / "images").glob("*.yaml"))
]


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def recipe_file(folder, text, family="grouped", model=None, **settings):
    values = {
        "data": {"name": str(text)},
        "model": {"family": family, "length": 16, **SETTINGS[family], **(model or {})},
        "train": {"steps": 6, "batch_size": 8, "samples": 1, "trackers": [], "warmup": 2, **settings},
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run(path, *overrides, resume=False):
    return train(load_recipe(path, list(overrides)), resume=resume)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    tensors = load_file(folder / "state.safetensors")
    with safe_open(folder / "state.safetensors", "pt") as file:
        return tensors, json.loads(file.metadata()["dflow"])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("path", RECIPES, ids=[str(p.relative_to(ROOT)) for p in RECIPES])
def test_every_recipe_trains_for_two_steps(path, text, tmp_path):
    recipe = load_recipe(path)
    small = {
        "length": 64 if recipe.data.by_lines else 16, "hidden_size": 8, "num_hidden_layers": 1,
        "num_calls": 4, "calls": [1, 2], "embedding_size": 4, "num_attention_heads": 1,
    }  # fmt: skip
    fields = zoo.find(recipe.family).fields
    overrides = [f"model.{name}={value}" for name, value in small.items() if name in fields] + [
        f"data={{name: '{text}', protocol: {recipe.data.protocol or 'null'}}}",
        "train.steps=2",
        "train.minutes=null",
        "train.batch_size=4",
        "train.accumulation=1",
        "train.mixed_precision='no'",
        "train.eval_chunks=4",
        "train.eval_every=null",
        "train.trackers=[]",
        f"output={tmp_path / 'out'}",
    ]
    out = run(path, *overrides)
    rows = metrics(out)
    assert rows[-1]["step"] == 2
    assert 0 < rows[-1]["valid_bits"] < 12
    assert hf.load(out).config.family == recipe.family


@pytest.mark.parametrize("path", IMAGES)
def test_every_recipe_of_images_trains_for_two_steps(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.output == Path("runs/images") / path.stem
    small = ["hidden_size=8", "num_hidden_layers=2", f"num_flows={min(2, recipe.model.num_flows)}"]
    if not zoo.find(recipe.family).exact:
        small += ["dequantizer_hidden_size=12", "dequantizer_hidden_layers=1", "dequantizer_flows=2"]
    overrides = [f"model.{s}" for s in small]
    if recipe.data.name != "checkerboard":
        colours = 1 if "mnist" in recipe.data.name else 3
        depth = 1 if recipe.data.name == "binarized_mnist" else 8
        overrides.append(f"data.name={write_pictures(tmp_path / 'pictures', 24, colours, depth)}")
        overrides += ["data.valid=0.2", "data.test=0.2", "data.crop=null", "data.tiles=null"]
    if recipe.family == "integer":
        overrides.append("model.groups=1")
    # Sizes of our own have no paper.
    assert (
        recipe.paper
        or path.stem in ("idf_mnist", "idf_cifar10_small")
        or path.stem.startswith(("multiscale", "bits_back", "modular"))
    )
    for paper in recipe.paper:
        found = load_recipe(path, [*paper.set, *overrides])
        assert paper.measure in ("vi", "nll", "kl")
        assert paper.unit == ("bits" if recipe.data.name == "checkerboard" else "bpd")
        assert paper.source
        hf.DflowImageConfig(family=found.family, **asdict(replace(found.model, shape=[1, 2, 2], levels=[2])))
    overrides += [
        "train.steps=2",
        "train.minutes=null",
        "train.batch_size=4",
        "train.mixed_precision='no'",
        "train.eval_chunks=4",
        "train.trackers=[]",
        f"output={tmp_path / 'out'}",
    ]
    out = run(path, *overrides)
    rows = metrics(out)
    assert rows[-1]["step"] == 2
    assert 0 < rows[-1]["valid_bits"] < 20
    found = recipe_of(out)
    assert found.paper == recipe.paper
    assert found.model.shape == hf.load(out, kind=hf.DflowImageModel).config.shape


@pytest.mark.parametrize(
    ("family", "model", "settings"),
    [
        ("grouped", {"num_calls": 4}, {}),
        ("lstm", {"dropout": 0.2}, {"ema": 0.9}),
        ("any_order", {"num_calls": 4, "order": "random", "schedule": "dp"}, {"ema": 0.5}),
        ("bipartite", {"num_flows": 2}, {"rule": "gumbel", "peak": {"start": 0.5, "end": 0.0}}),
        ("bipartite", {"num_flows": 4}, {"rule": "layerwise", "ema": 0.5}),
        ("autoregressive", {"base": "autoregressive"}, {"accumulation": 2}),
        ("multiscale", {}, {}),
        ("multiscale", {"conditional": "categorical"}, {}),
        ("bipartite", {"num_flows": 2, "elementwise": "affine"}, {"rule": "expected"}),
    ],
)
def test_training_lowers_bits_and_the_folder_holds_the_best_model(family, model, settings, text, tmp_path):
    path = recipe_file(tmp_path, text, family, model, steps=60, eval_every=20, learning_rate=0.01, **settings)
    out = run(path)
    rows = metrics(out)
    assert [r["step"] for r in rows] == [20, 40, 60]
    assert rows[-1]["valid_bits"] < rows[0]["valid_bits"]
    files = {p.name for p in out.iterdir() if p.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "data.json",
        "manifest.json",
        "metrics.jsonl",
        "model.safetensors",
        "modeling_dflow.py",
        "recipe.yaml",
        "state.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocabulary.json",
    }
    corpus = load(DataConfig(name=str(text)))
    result = evaluate(hf.load(out), corpus.valid)
    assert result.bpc == pytest.approx(min(r["valid_bits"] for r in rows), abs=1e-3)
    assert result.round_trip
    assert recipe_of(out).family == family


def test_sentences_are_trained_with_their_lengths(text, tmp_path):
    path = recipe_file(tmp_path, text, "grouped", {"length": 64, "num_calls": 8}, steps=4)
    out = run(path, "data.protocol=sentence")
    model = hf.load(out)
    assert model.config.explicit_length
    corpus = load(DataConfig(name=str(text), protocol="sentence"))
    assert model.length_counts.sum() == len(corpus.train.lengths)
    assert evaluate(model, corpus.valid).bpc == pytest.approx(metrics(out)[-1]["valid_bits"], abs=1e-3)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("grouped", {}),
        pytest.param("lstm", {"ema": 0.9}, marks=pytest.mark.slow),
        pytest.param("bipartite", {"rule": "gumbel"}, marks=pytest.mark.slow),
        pytest.param("any_order", {"ema": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(family, settings, text, tmp_path):
    model = {"dropout": 0.3} if family != "bipartite" else {}
    path = recipe_file(tmp_path, text, family, model, steps=12, eval_every=4, **settings)
    whole = run(path, f"output={tmp_path / 'whole'}")
    out = tmp_path / "parts"
    # The learning rate follows the budget, so the budget must be the whole one: stop as Ctrl-C does.
    recipe = load_recipe(path, [f"output={out}"])
    stop_after(recipe, 7)
    rows = metrics(out)
    assert rows[-1]["step"] == 4
    run(path, f"output={out}", resume=True)
    assert same(state(whole)[0], state(out)[0])
    assert same(load_file(whole / "model.safetensors"), load_file(out / "model.safetensors"))

    def plain(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert plain(metrics(whole)) == plain(metrics(out))


def stop_after(recipe, step):
    """Train from the beginning; Ctrl-C comes in a step, also of models without an optimizer to hook."""
    from dflow.train.loop import Run

    once = Run._one_step

    def interrupting(self, started):
        result = once(self, started)
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_one_step", interrupting)
        with pytest.raises(KeyboardInterrupt, match=f"step {step} and saved; go on with: dflow train"):
            train(recipe)


def test_compiled_steps_are_the_same_and_go_on_uncompiled(text, tmp_path, monkeypatch):
    """Traced by torch.compile as ever, but run by torch: that needs no compiler and little time."""
    once, compiled = torch.compile, []

    def quick(function, **_):
        compiled.append(function)
        return once(function, backend="aot_eager")

    path = recipe_file(tmp_path, text, "grouped", steps=12, eval_every=4, ema=0.9)
    whole = run(path, f"output={tmp_path / 'whole'}")
    assert not compiled
    monkeypatch.setattr(torch, "compile", quick)
    torch._dynamo.reset()
    out = tmp_path / "out"
    stop_after(load_recipe(path, [f"output={out}", "train.compile=true"]), 7)
    assert [getattr(f, "__name__", "") for f in compiled] == ["cos", "_call_impl"]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 1
    run(path, f"output={out}", resume=True)
    assert len(compiled) == 2
    torch._dynamo.reset()
    for a, b in zip(metrics(whole), metrics(out), strict=True):
        assert a["train_loss_bits"] == pytest.approx(b["train_loss_bits"], abs=1e-4)
        assert a["valid_bits"] == pytest.approx(b["valid_bits"], abs=1e-4)
    ends = [state(folder)[0] for folder in (whole, out)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=1e-4) for k in ends[0])


def test_without_a_compiler_it_is_said(text, tmp_path, monkeypatch):
    def none(function, **_):
        def call(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", none)
    path = recipe_file(tmp_path, text)
    with pytest.raises(InputError, match=r"train.compile: no compiler that works \(InvalidCxx.*leave out"):
        run(path, "train.compile=true")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="compile goes with whole models"):
        run(path, "train.compile=true", "train.shard=true")


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(text, tmp_path):
    path = recipe_file(tmp_path, text, "grouped", {"num_calls": 4}, steps=400, save_every=5, eval_every=200)
    whole = run(path, f"output={tmp_path / 'whole'}")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "dflow", "train", str(path), "--output", str(out)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    limit = time.monotonic() + 120
    while not (out / "state.safetensors").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert state(out)[1]["step"] < 400
    run(path, f"output={out}", resume=True)
    assert same(state(whole)[0], state(out)[0])
    assert same(load_file(whole / "model.safetensors"), load_file(out / "model.safetensors"))


CHECKED = """
import gc, sys
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from dflow.cli import main

destroy = torch.distributed.destroy_process_group

def checked(*args):
    assert not any(isinstance(o, DistributedDataParallel) for o in gc.get_objects())
    print("destroyed alone")
    destroy(*args)

torch.distributed.destroy_process_group = checked
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "model"), [("grouped", {"num_calls": 4}), ("bipartite", {"num_flows": 2})]
)
def test_two_processes_see_what_one_sees(family, model, text, tmp_path):
    path = recipe_file(tmp_path, text, family, model, steps=8, eval_every=1, learning_rate=0.01)
    one = metrics(run(path, f"output={tmp_path / 'one'}"))
    # A reducer that outlives the process group waits for it for ever, once in twenty times.
    script = tmp_path / "checked.py"
    script.write_text(CHECKED, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += [str(script), "train", str(path), "--output", str(tmp_path / "two")]
    command[3:3] = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout
    assert done.stdout.count("destroyed alone") == 2
    two = metrics(tmp_path / "two")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a["train_loss_bits"] == pytest.approx(b["train_loss_bits"], abs=1e-4)
        # Where two logits are equal but for rounding, a rank may turn out otherwise.
        assert a["valid_bits"] == pytest.approx(b["valid_bits"], abs=1e-4 if family == "grouped" else 0.05)


@pytest.mark.parametrize("base", ["factorized", "mixture"])
def test_a_flow_starts_at_the_unigram_entropy(base, text, tmp_path):
    path = recipe_file(tmp_path, text, "bipartite", {"base": base, "num_flows": 2}, steps=1)
    corpus = load(DataConfig(name=str(text)))
    p = corpus.train.marginals(corpus.tokenizer.size)
    entropy = -(p[p > 0] * p[p > 0].log2()).sum().item()
    first = metrics(run(path, "train.rule=straight_through", "train.batch_size=64"))[0]
    assert first["train_loss_bits"] == pytest.approx(entropy, abs=0.15)


def test_accumulation_changes_nothing(text, tmp_path):
    path = recipe_file(tmp_path, text, "bipartite", {"num_flows": 2}, eval_every=1)
    whole = metrics(run(path))
    pieces = metrics(run(path, "train.accumulation=4", f"output={tmp_path / 'pieces'}"))
    for a, b in zip(whole, pieces, strict=True):
        assert a["train_loss_bits"] == pytest.approx(b["train_loss_bits"], abs=1e-4)


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_half_precision_trains_and_the_result_is_exact(family, text, tmp_path):
    path = recipe_file(tmp_path, text, family, mixed_precision="bf16", steps=2)
    out = run(path)
    result = evaluate(hf.load(out), load(DataConfig(name=str(text))).valid)
    assert result.round_trip
    assert result.bpc == pytest.approx(metrics(out)[-1]["valid_bits"], abs=1e-3)


@pytest.mark.parametrize(("faster", "precision"), [(True, "bf16"), (False, "no")])
def test_the_precision_is_chosen_once_by_the_processor(faster, precision, text, tmp_path, monkeypatch):
    path = recipe_file(tmp_path, text, mixed_precision="auto", steps=2)
    monkeypatch.setattr(machine, "_cpu_is_faster", lambda: faster)
    out = train(load_recipe(path), device=torch.device("cpu"))
    assert load_recipe(out / "recipe.yaml").train.mixed_precision == precision
    # On another machine the training goes on as it has begun.
    monkeypatch.setattr(machine, "_cpu_is_faster", lambda: not faster)
    identity.check_begun_by(load_recipe(path), load_recipe(out / "recipe.yaml"))
    train(load_recipe(path, ["train.steps=3"]), resume=True, device=torch.device("cpu"))
    assert load_recipe(out / "recipe.yaml").train.mixed_precision == precision


@pytest.mark.parametrize(("seconds_of_bfloat16", "faster"), [(0.6, True), (0.7, False), (9.0, False)])
def test_a_processor_is_faster_where_products_take_less_than_two_thirds(
    seconds_of_bfloat16, faster, monkeypatch
):
    clock = itertools.accumulate(itertools.cycle([0.0, 1.0, 0.0, seconds_of_bfloat16]))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine._cpu_is_faster() == faster


def test_the_tracker_is_tensorboard_unless_told_otherwise(text, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = recipe_file(tmp_path, text, steps=4, eval_every=2, trackers=["tensorboard"])
    out = run(path)
    [file] = (out / "logs").glob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    for tag, name in (("loss_bits", "train_loss_bits"), ("valid_bits", "valid_bits")):
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in written] == [2, 4]
        assert [value for _, value in written] == pytest.approx([m[name] for m in metrics(out)], abs=1e-4)
    with pytest.raises(InputError, match="train"):
        run(path, "train.trackers=[nothing]", f"output={tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("tracker", "pattern"), [("wandb", "wandb/offline-run-*/*.wandb"), ("trackio", "trackio/dflow.db")]
)
def test_a_tracker_of_ones_own_runs_offline(tracker, pattern, text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before it is imported
    pytest.importorskip(tracker, reason=f"{tracker} is not installed, which is large and optional")
    monkeypatch.chdir(tmp_path)
    words = ["train", str(recipe_file(tmp_path, text, steps=2)), "--sweep", "train.seed=0,1"]
    assert cli.main([*words, "--tracker", tracker, "--tracker", "tensorboard"]) == 0
    # Each run of a sweep is one of the tracker, with the name of its folder.
    logged = b"".join(path.read_bytes() for path in tmp_path.glob(f"{pattern}*"))
    for name in ("seed=0", "seed=1"):
        assert name.encode() in logged
        assert len(list((tmp_path / "out" / name / "logs").glob("events.out.tfevents*"))) == 1


def test_a_training_leaves_one_state_and_one_model(text, tmp_path):
    out = run(recipe_file(tmp_path, text, steps=4, eval_every=2, save_every=1))
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["model.safetensors", "state.safetensors"]


def test_a_budget_in_minutes_ends(text, tmp_path):
    path = recipe_file(tmp_path, text, steps=None, minutes=0.03)
    started = time.monotonic()
    out = run(path)
    assert time.monotonic() - started < 20
    assert metrics(out)[-1]["seconds"] >= 1.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.step=3", "unknown key 'step'; did you mean 'steps'"),
        ("model.num_cals=3", "unknown key 'num_cals'; did you mean 'num_calls'"),
        ("model.family=groupd", "did you mean 'grouped'"),
        ("dta.name=x", "unknown key 'dta'; did you mean 'data'"),
        ("data.nam=x", "did you mean 'name'"),
        ("train.steps=many", "expected int, found 'many'"),
        ("train.steps=0", "steps must be positive"),
        ("train.steps=null", "give a budget"),
        ("train.rule=gumble", "did you mean 'gumbel'"),
        ("train.rule=gumbel", "does not train this model"),
        ("train.batch_size=0", "batch_size must be at least 1"),
        ("train.accumulation=3", "no multiple of 3"),
        ("train.temperature={start: 1, end: 1, schedule: cosin}", "did you mean 'cosine'"),
        ("train.temperature={start: 1}", "key 'end' is missing"),
        ("train.ema=1.0", "ema"),
        ("model.length=100000", "too few"),
        ("data.name=nowhere.txt", "nowhere.txt"),
        ("model", "write key=value"),
        ("model.family.x=1", "is not a section"),
        ("train.steps=[", "not a YAML value"),
    ],
)
def test_wrong_settings_end_with_one_clear_error_and_2(change, message, text, tmp_path, capsys):
    path = recipe_file(tmp_path, text)
    assert cli.main(["train", str(path), "--set", change]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_texts_that_cannot_be_used(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    path = recipe_file(tmp_path, empty)
    assert cli.main(["train", str(path)]) == 2
    assert "empty.txt" in capsys.readouterr().err


def test_recipes_that_are_none(tmp_path):
    for content, message in [(None, "no such recipe"), ("a: [", "not a recipe"), ("- 1", "is a mapping")]:
        path = tmp_path / "r.yaml"
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_recipe(path)


def test_outputs_that_exist_are_kept(text, tmp_path):
    path = recipe_file(tmp_path, text, steps=2)
    out = run(path)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(InputError, match="exists already; add --resume"):
        run(path)
    with pytest.raises(InputError, match="was trained with other settings"):
        run(path, "train.learning_rate=0.5", resume=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "state.safetensors").write_bytes(before["state.safetensors"][:500])
    with pytest.raises(InputError, match="truncated or foreign"):
        run(path, resume=True)
    (out / "state.safetensors").unlink()
    with pytest.raises(InputError, match="nothing to resume"):
        run(path, resume=True)


def test_what_a_run_has_not_made_is_not_removed(text, tmp_path, monkeypatch):
    path = recipe_file(tmp_path, text, steps=2)
    other, own = tmp_path / "precious", tmp_path / "own"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="not the beginning of a training"):
        run(path, f"output={other}", resume=True)
    # Of a run that was killed before its first state the recipe is there, of one's own recipe too.
    own.mkdir()
    for name in ("recipe.yaml", "notes.txt"):
        (own / name).write_text("mine")
    with pytest.raises(InputError, match="batch_size 8 is no multiple"):
        run(path, f"output={own}", "train.accumulation=3", resume=True)

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.Run, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        run(path, f"output={own}", resume=True)
    assert (own / "notes.txt").read_text() == "mine"
    assert (other / "thesis.txt").read_text() == "years"


def test_evaluations_are_due_by_the_settings_of_today(text, tmp_path):
    path = recipe_file(tmp_path, text, steps=3, eval_every=1000)
    out = run(path)
    run(path, "train.eval_every=1", "train.steps=6", resume=True)
    assert [row["step"] for row in metrics(out)] == [3, 4, 5, 6]
    # By the clock, in a budget of steps too; and back again.
    run(path, "train.eval_every=null", "train.eval_minutes=60", "train.steps=8", resume=True)
    assert [row["step"] for row in metrics(out)] == [3, 4, 5, 6, 8]
    run(path, "train.eval_every=1", "train.steps=10", resume=True)
    assert [row["step"] for row in metrics(out)] == [3, 4, 5, 6, 8, 9, 10]


def test_validation_is_measured_as_before(text, tmp_path):
    path = recipe_file(tmp_path, text, steps=2)
    out = run(path)
    with pytest.raises(InputError, match=r"other settings \(train.eval_chunks: None then, 1 now\)"):
        run(path, "train.eval_chunks=1", resume=True)
    with pytest.raises(
        InputError, match=r"model.hidden_size: 8 then, 16 now; train.seed: 0 then, 5 now"
    ) as told:
        run(path, "train.seed=5", "model.hidden_size=16", resume=True)
    assert f"With its own: dflow train --resume {out}" in str(told.value)
    train(load_recipe(out / "recipe.yaml", ["train.steps=3"]), resume=True)
    assert metrics(out)[-1]["step"] == 3


def test_data_that_have_changed_are_noticed(text, tmp_path, capsys):
    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    path = recipe_file(tmp_path, own, steps=2)
    out = run(path)
    assert cli.main(["evaluate", "--model", str(out)]) == 0
    own.write_text(own.read_text()[200:])
    for again in (lambda: run(path, "train.steps=4", resume=True), lambda: load(recipe_of(out).data)):
        with pytest.raises(InputError, match="the data have changed"):
            again()
    assert cli.main(["evaluate", "--model", str(out)]) == 2
    assert "score what they are now with --data" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", str(out), "--data", str(own)]) == 0


def test_a_training_ends_with_a_model_or_an_error(text, tmp_path):
    path = recipe_file(tmp_path, text, steps=2)
    with pytest.raises(InputError, match="no finite evaluation: there is no model"):
        run(path, "train.learning_rate=1e30", f"output={tmp_path / 'wild'}")
    with pytest.raises(InputError, match="no model yet, the training was stopped before"):
        hf.load(tmp_path / "wild")
    # Stopped before its first evaluation, and then told to end where it is.
    out = tmp_path / "out"
    stop_after(load_recipe(path, ["train.steps=50"]), 5)
    assert not (out / "model.safetensors").exists()
    run(path, "train.steps=5", resume=True)
    assert [row["step"] for row in metrics(out)] == [5]
    assert isinstance(metrics(out)[0]["train_loss_bits"], float)
    assert hf.load(out).config.length == 16
    run(path, "train.steps=5", resume=True)
    assert len(metrics(out)) == 1


def test_a_best_model_that_is_damaged_is_made_anew(text, tmp_path, capsys):
    path = recipe_file(tmp_path, text, steps=3)
    out = run(path)
    whole = load_file(out / "model.safetensors")
    for spoil in (lambda file: file.write_bytes(file.read_bytes()[:-9]), lambda file: file.unlink()):
        spoil(out / "model.safetensors")
        run(path, resume=True)
        assert "the best model is damaged or gone" in capsys.readouterr().out
        assert same(load_file(out / "model.safetensors"), whole)
        hf.load(out)


def test_two_do_not_train_into_one_folder(text, tmp_path):
    path = recipe_file(tmp_path, text, steps=2)
    out = run(path)
    number = os.open(out, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(InputError, match="another process is training into this folder"):
        run(path, "train.steps=4", resume=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    os.close(number)
    run(path, "train.steps=4", resume=True)
    assert metrics(out)[-1]["step"] == 4


def test_files_are_as_readable_as_the_others(text, tmp_path):
    out = run(recipe_file(tmp_path, text, steps=2))
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {p.stat().st_mode for p in out.iterdir() if p.is_file()} == {usual}


def test_the_bar_is_that_of_the_budget_that_ends_first():
    config = TrainConfig(steps=40, minutes=60)

    def shown(step, elapsed):
        bar.show(step, elapsed, 1.0, 8, False)
        return bar.bar.unit, bar.bar.n, bar.bar.total

    bar = machine.Bar(config, 0, 0.0, "bits/char", "chars", False)
    assert (bar.bar.unit, bar.bar.n, bar.bar.total) == ("s", 0, 3600)
    assert shown(10, 4.0) == ("step", 10, 40)
    assert shown(10, 1000.0) == ("s", 1000, 3600)
    assert shown(20, 1000.0) == ("step", 20, 40)
    bar.bar.close()


def test_samples_that_a_log_cannot_show_end_nothing(tmp_path):
    (tmp_path / "greek.txt").write_text("ἐν ἀρχῇ ἦν ὁ λόγος\n" * 60, encoding="utf-8")
    path = recipe_file(tmp_path, tmp_path / "greek.txt", steps=2)
    done = subprocess.run(
        [sys.executable, "-m", "dflow", "train", str(path)],
        env=environment() | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"?" in done.stdout


def test_schedules():
    falling = Schedule(1.0, 0.0, "linear", until=0.5)
    assert [falling.at(f) for f in (0, 0.25, 0.5, 1)] == [1, 0.5, 0, 0]
    with pytest.raises(InputError, match="an exponential schedule needs positive ends, found 0"):
        Schedule(1.0, 0.0, "exponential")
    with pytest.raises(InputError, match="must be finite"):
        Schedule(float("inf"), 0.0)
    Schedule(1.0, 0.5, "exponential")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.temperature={start: 1.0, end: 0.0}", "temperature must be positive"),
        ("train.noise={start: 1.0, end: -0.5}", "noise must not be negative"),
        ("train.minutes=.inf", "minutes must be positive and finite"),
        ("train.learning_rate=.inf", "learning_rate must be positive and finite"),
        ("train.final_learning_rate=-1", r"final_learning_rate must lie in \[0, 1\]"),
        ("train.seed=100000000000000000000", "seed must be a number of 64 bits"),
    ],
)
def test_settings_that_would_fail_later_are_refused_at_once(setting, message, text, tmp_path):
    with pytest.raises(InputError, match=message):
        run(recipe_file(tmp_path, text), setting)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_a_script_shows_its_help_and_does_nothing(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_scripts_are_the_same_command(text, tmp_path):
    path = recipe_file(tmp_path, text, steps=2)
    command = [sys.executable, str(ROOT / "scripts" / "train_text8.py"), str(path)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_curves_are_plotted_and_what_is_none_is_refused(text, tmp_path, capsys):
    out = run(recipe_file(tmp_path, text, steps=4, eval_every=2))
    assert [row["step"] for row in history(out).rows] == [2, 4]
    assert history(out).unit == "bits a character"
    png = tmp_path / "curves.png"
    assert cli.main(["plot", "training", str(out), str(out), "-o", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    told = tmp_path / "told"
    told.mkdir()
    capsys.readouterr()
    argv = ["plot", "training", str(out), str(told), "-o", str(tmp_path / "other.png")]
    lines = (out / "metrics.jsonl").read_text()
    for content, message in [
        (None, "No such file or directory; name a folder that dflow train wrote"),
        ("", "no evaluation yet"),
        (lines + "{", "line 3: not an evaluation"),
        (lines + "[1]\n", "line 3: not an evaluation"),
        (lines + '{"step": 5}\n', "line 3: not an evaluation"),
    ]:
        if content is not None:
            (told / "metrics.jsonl").write_text(content)
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(told / "metrics.jsonl") in error
        assert not (tmp_path / "other.png").exists()
