"""A model in pieces learns what a whole one learns, in a share of the memory, and is saved whole."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LENGTH, SETTINGS, SMALL, make_model
from forks import FORKS
from safetensors.torch import load_file
from test_hostile import INTEGER
from test_processes import agree, metrics, recipe_file, run, start, stop_one, train
from torch import nn

from dflow import hf, objectives, zoo
from dflow.bijectors import Chain, Coupling
from dflow.config import InputError
from dflow.dequantize import Elbo
from dflow.distributions import SequenceCategorical
from dflow.elementwise import Affine
from dflow.nn.lstm import LSTM
from dflow.nn.rescaled import Rescaled
from dflow.ops.orders import lockstep
from dflow.train import load_recipe, shards

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]


def objective_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    """What is minimised, with weights that are the same wherever it is made; and a batch."""
    if name in SETTINGS:
        law = make_model(name, 11).distribution
        return objectives.Objective(law, objectives.default_rule(law)), torch.randint(0, 11, (4, LENGTH))
    if name == "tied":
        law = SequenceCategorical(LSTM(11, 11, 12, 2, 12, tied=True), lockstep(LENGTH, LENGTH), LENGTH)
        return objectives.Objective(law, "likelihood"), torch.randint(0, 11, (4, LENGTH))
    values: dict[str, Any] = {"dequantized": SMALL, "integer": INTEGER}[name]
    given = {k: v for k, v in values.items() if k != "family"}
    given |= {"shape": [1, 8, 8], "levels": [256], "lowest": [0]}
    law = zoo.build_image(name, zoo.settings(name, given, "here"))
    with torch.no_grad():
        for p in law.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x = torch.randint(0, 256, (4, 64))
    return (
        objectives.BoundObjective(law, Elbo()) if name == "dequantized" else objectives.ExactObjective(law)
    ), x


NAMES = [*sorted(SETTINGS), "tied", "dequantized", "integer"]


def compare(rank: int, world: int, port: int, report: Path) -> None:
    """Gradients of pieces, put together, and those of the whole model: the largest difference."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    found = {}
    for name in NAMES:
        gradients, sizes = [], []
        for pieces in (False, True):
            torch.manual_seed(0)
            objective, x = objective_of(name)
            if pieces:
                shards.shard(objective, torch.device("cpu"), world)
            torch.manual_seed(1)
            # The mean over processes is the gradient itself, of parts that differ.
            factor = 2 * (rank + 1) / (world + 1) if pieces else 1.0
            (objective(x, None)[0] * factor).backward()
            optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
            gradients.append({k: shards.whole(p.grad) for k, p in objective.named_parameters()})
            optimizer.step()
            held = [p for p in objective.parameters()]
            held += [m for state in optimizer.state.values() for m in state.values() if m.ndim]
            sizes.append(sum((t.to_local() if shards.is_piece(t) else t).numel() for t in held))
        whole, parts = gradients
        assert list(whole) == list(parts)
        # Rounding of sums in another order, on the scale of each gradient.
        off = max(float((whole[k] - parts[k]).norm() / (1e-6 + whole[k].norm())) for k in whole)
        found[name] = [off, sizes[1] / sizes[0]]
    if rank == 0:
        report.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_gradients_of_pieces_are_those_of_the_whole_in_half_of_the_memory(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    report = tmp_path / "report.json"
    processes = [FORKS.Process(target=compare, args=(rank, 2, port, report)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = json.loads(report.read_text())
    assert list(found) == NAMES
    for name, (off, share) in found.items():
        assert off < 1e-4, name
        # Weights and both moments; a matrix of an odd number of rows has one more on the first process.
        assert share < 0.6, name


SHARD = ("--set", "train.shard=true")


def copied(out: Path, to: Path, state: str = "state.safetensors") -> Path:
    """A run as it was when ``state`` was its last one."""
    shutil.copytree(out, to)
    data = (to / state).read_bytes()
    for path in [*to.glob("state*"), to / "manifest.json"]:
        path.unlink()
    (to / "state.safetensors").write_bytes(data)
    return to


def test_pieces_learn_what_the_whole_learns_and_go_on_on_any_number_of_processes(tmp_path: Path) -> None:
    recipe = recipe_file(
        tmp_path, steps=54, batch_size=12, eval_every=9, ema=0.9, save_every=18, keep=9, clip=0.5, samples=1
    )
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    run(train(recipe, whole), log, 1)
    run(train(recipe, out, *SHARD), log)
    assert "each with a piece of the model" in log.with_suffix(".0").read_text()
    agree(whole, out)
    assert len(metrics(out)) == 6
    for name in ("model.safetensors", "state.safetensors"):
        a, b = load_file(whole / name), load_file(out / name)
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert {f.status for f in hf.check(out)} <= {"whole", "unlisted"}
    assert hf.load(out).generate(2).shape == (2, 16)

    # From pieces to the whole, and from the whole to pieces of another number that do not come out even.
    early = "state-000000018.safetensors"
    one = copied(out, tmp_path / "one", early)
    run(train(recipe, one, "--resume"), log, 1)
    agree(whole, one)
    three = copied(whole, tmp_path / "three", early)
    run(train(recipe, three, "--resume", *SHARD), log, 3)
    agree(whole, three)
    again = copied(out, tmp_path / "again", early)
    run(train(recipe, again, "--resume", *SHARD), log)
    ends = [load_file(folder / "state.safetensors") for folder in (out, again)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_pieces_stop_together_by_a_signal_or_without_a_finite_loss(tmp_path: Path) -> None:
    stop_one(tmp_path, *SHARD)
    recipe, log = recipe_file(tmp_path, steps=10**6, eval_every=10**6), tmp_path / "log"
    out = tmp_path / "lost"
    settings = ["--set", "train.learning_rate=1e30", "--set", "train.skip=3", "--set", "train.warmup=0"]
    for rank, process in enumerate(start(train(recipe, out, *SHARD, *settings), log)):
        process.join(60)
        assert process.exitcode == 2
        assert "of the 3 steps before it: stopped with" in log.with_suffix(f".{rank}").read_text()
    assert all(bool(v.isfinite().all()) for v in load_file(out / "state.safetensors").values())


def test_what_cannot_be_cut_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not with fp16"):
        load_recipe(recipe_file(tmp_path, steps=1, shard=True, mixed_precision="fp16"))
    net = Rescaled(nn.Linear(2, 2), torch.zeros(2), torch.ones(2), torch.ones(2), rezero=True)
    with pytest.raises(InputError, match=r"train.shard cannot cut factor, a single number"):
        shards.shard(net, torch.device("cpu"), 2)
    monkeypatch.setattr(shards, "fully_shard", None)
    with pytest.raises(InputError, match=r"needs torch.distributed of torch 2.6 or newer"):
        shards.shard(nn.Linear(2, 2), torch.device("cpu"), 2)


def test_blocks_are_put_together_one_at_a_time() -> None:
    grouped, _ = objective_of("grouped")
    assert [type(m).__name__ for m in shards._units(grouped)] == ["Block"]
    flow, _ = objective_of("bipartite")
    assert [type(m).__name__ for m in shards._units(flow)].count("InfillTransformer") == 2
    # Called by two layers, a network is needed twice.
    net = nn.Linear(2, 2)
    mask = torch.tensor([True, False])
    twice = Chain([Coupling(Affine(), net, mask), Coupling(Affine(), net, ~mask)])
    assert shards._units(twice) == []
