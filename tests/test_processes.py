"""Several processes do what one does: the same losses, the same draws; and when one dies, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from folders import SETTINGS, write_model, write_pictures, write_text
from forks import FORKS
from safetensors.torch import load_file, save_file

from dflow import cli
from dflow.nn.batch_norm import StochasticBatchNorm
from dflow.nn.moments import Moments

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]

CONFIGS = sorted((Path(__file__).parent.parent / "recipes" / "accelerate").glob("*.yaml"))


def environ(rank: int, world: int, port: int) -> None:
    """What a launcher tells one of several processes."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def work(rank: int, world: int, port: int, words: list[str], log: Path) -> None:
    """`dflow` as one of several processes, as a launcher starts it."""
    torch.set_num_threads(1)
    environ(rank, world, port)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = cli.main(words)
    os._exit(code)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(words: list[str], log: Path, world: int = 2) -> list[BaseProcess]:
    port = free_port()
    found: list[BaseProcess] = [
        FORKS.Process(target=work, args=(rank, world, port, words, log.with_suffix(f".{rank}")))
        for rank in range(world)
    ]
    for process in found:
        process.start()
    return found


def run(words: list[str], log: Path, world: int = 2) -> None:
    for rank, process in enumerate(start(words, log, world)):
        process.join(240)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0, log.with_suffix(f".{rank}").read_text()[-3000:]


def recipe_file(folder: Path, family: str = "grouped", **settings: object) -> Path:
    usual = {"batch_size": 8, "samples": 0, "trackers": [], "warmup": 2, "learning_rate": 0.01}
    values = {
        "data": {"name": str(write_text(folder))},
        "model": {"family": family, "length": 16, **SETTINGS[family]},
        "train": usual | settings,
        "output": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def train(recipe: Path, out: Path, *words: str) -> list[str]:
    return ["train", str(recipe), "--output", str(out), *words]


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def agree(a: Path, b: Path, loss: float = 1e-4, valid: float = 1e-4) -> None:
    assert len(metrics(a)) == len(metrics(b))
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["step"] == y["step"]
        assert x["train_loss_bits"] == pytest.approx(y["train_loss_bits"], abs=loss)
        assert x["valid_bits"] == pytest.approx(y["valid_bits"], abs=valid)


def test_200_steps_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    recipe, log = recipe_file(tmp_path, steps=200, eval_every=10, ema=0.9), tmp_path / "log"
    run(train(recipe, tmp_path / "one"), log, 1)
    run(train(recipe, tmp_path / "two"), log)
    assert len(metrics(tmp_path / "one")) == 20
    agree(tmp_path / "one", tmp_path / "two")


def normalise(rank: int, port: int, folder: Path) -> None:
    """Half of a batch, normalised by the moments of the whole of it."""
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    save_file(normalised(rank, 2), folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()
    os._exit(0)


def normalised(rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = x[rank::world].clone().requires_grad_()
    var = (1 + x[rank::world].square()).detach().requires_grad_()
    norm = StochasticBatchNorm(3).double()
    norm.shared = world > 1
    out = norm(Moments(mean, var))
    assert isinstance(out, Moments)
    (out.mean.pow(3) + out.var.square()).sum().backward()
    found = {"mean": out.mean.detach(), "grad": mean.grad, "grad_var": var.grad, "own": norm.weight.grad}
    found |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}


def test_halves_of_a_batch_are_normalised_as_the_whole(tmp_path: Path) -> None:
    port = free_port()
    processes = [FORKS.Process(target=normalise, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    halves, whole = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)], normalised()
    for name in ("running_mean", "running_var"):
        for half in halves:
            torch.testing.assert_close(half[name], whole[name])
    torch.testing.assert_close(halves[0]["own"] + halves[1]["own"], whole["own"])
    for name in ("mean", "grad", "grad_var"):
        together = torch.stack([half[name] for half in halves], 1).flatten(0, 1)
        torch.testing.assert_close(together, whole[name])


def test_normalised_networks_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 60, 1, 1)
    values = {
        "data": {"name": str(pictures), "valid": 0.2, "test": 0.2},
        "model": {"family": "modular", "kind": "float", "num_flows": 1, "hidden_size": 6},
        "train": {"steps": 20, "eval_every": 4, "batch_size": 8, "samples": 0, "trackers": [], "warmup": 2},
        "output": str(tmp_path / "out"),
    }
    recipe, log = tmp_path / "recipe.yaml", tmp_path / "log"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    run(train(recipe, tmp_path / "one"), log, 1)
    for name, words in (("two", ()), ("pieces", ("--set", "train.shard=true"))):
        run(train(recipe, tmp_path / name, *words), log)
        # Where two logits are equal but for rounding, a rank turns out otherwise.
        agree(tmp_path / "one", tmp_path / name, 1e-3, 0.01)
    words = ["--set", "train.batch_size=2", "train.accumulation=2"]
    assert cli.main(train(recipe, tmp_path / "none", *words)) == 2


def state_step(out: Path) -> int:
    from safetensors import safe_open

    with safe_open(out / "state.safetensors", "pt") as file:
        return int(json.loads(file.metadata()["dflow"])["step"])


@pytest.mark.parametrize("dead", [0, 1])
def test_two_processes_of_which_one_dies_come_back(dead: int, tmp_path: Path) -> None:
    recipe, log = recipe_file(tmp_path, steps=300, save_every=5, eval_every=100), tmp_path / "log"
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(train(recipe, whole), log)
    found = start(train(recipe, out), log)
    while not (out / "state.safetensors").is_file() or state_step(out) == 0:
        assert all(p.exitcode is None for p in found), log.with_suffix(".0").read_text()[-3000:]
        time.sleep(0.01)
    assert found[dead].pid is not None
    os.kill(found[dead].pid, signal.SIGKILL)
    # The other one is told by its library, and ends by itself.
    found[1 - dead].join(60)
    assert found[1 - dead].exitcode == 2
    assert "another process of this run is gone" in log.with_suffix(f".{1 - dead}").read_text()
    assert state_step(out) < 300
    run(train(recipe, out, "--resume"), log)
    ends = [load_file(folder / "state.safetensors") for folder in (whole, out)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def stop_one(tmp_path: Path, *words: str) -> None:
    """SIGTERM to one of two processes that train: both save and end alike, and one tells how to go on."""
    recipe, out = recipe_file(tmp_path, steps=100_000, eval_every=100_000), tmp_path / "out"
    found = start(train(recipe, out, *words), tmp_path / "log")
    while not (out / "state.safetensors").is_file():
        assert all(p.exitcode is None for p in found)
        time.sleep(0.01)
    time.sleep(0.5)
    assert found[1].pid is not None
    os.kill(found[1].pid, signal.SIGTERM)
    for process in found:
        process.join(60)
        assert process.exitcode == 0
    step = state_step(out)
    assert 0 < step < 100_000
    said = f"stopped at step {step} and saved; go on with: dflow train --resume {out}\n"
    assert [log.read_text().count(said) for log in (tmp_path / "log.0", tmp_path / "log.1")] == [1, 0]


def test_a_signal_to_one_stops_all(tmp_path: Path) -> None:
    stop_one(tmp_path)


def test_it_is_resumed_on_another_number_of_processes(tmp_path: Path) -> None:
    recipe, log = recipe_file(tmp_path, steps=60, eval_every=10), tmp_path / "log"
    run(train(recipe, tmp_path / "whole"), log, 1)
    out = tmp_path / "out"
    # The recipe is the same but for the budget, which the learning rate follows: stopped, not ended.
    found = start(train(recipe, out, "--set", "train.save_every=20"), log)
    while not (out / "state.safetensors").is_file() or state_step(out) < 20:
        time.sleep(0.005)
    for process in found:
        process.kill()
        process.join()
    run(train(recipe, out, "--resume"), log, 1)
    agree(tmp_path / "whole", out)


@pytest.mark.parametrize("n", [7, 20])
def test_two_processes_draw_what_one_draws(n: int, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "grouped", write_text(tmp_path))
    words = [
        "generate",
        "--model",
        str(model),
        "--n",
        str(n),
        "--batch-size",
        "4",
        "--seed",
        "3",
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--output", str(tmp_path / "one.txt")]) == 0
    run([*words, "--output", str(tmp_path / "two.txt")], tmp_path / "log")
    run([*words, "--output", str(tmp_path / "three.txt")], tmp_path / "log", 3)
    one = (tmp_path / "one.txt").read_bytes()
    assert one.count(b"--- sample") == n
    assert (tmp_path / "two.txt").read_bytes() == one
    assert (tmp_path / "three.txt").read_bytes() == one


def test_two_processes_draw_the_pictures_of_one(tmp_path: Path) -> None:
    from folders import image_recipe

    recipe = image_recipe(tmp_path, str(write_pictures(tmp_path / "pictures")), steps=1)
    assert cli.main(["train", str(recipe)]) == 0
    words = ["generate", "--model", str(tmp_path / "out"), "--n", "9", "--batch-size", "2", "--device", "cpu"]
    assert cli.main([*words, "--output", str(tmp_path / "one.png")]) == 0
    run([*words, "--output", str(tmp_path / "two.png")], tmp_path / "log")
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_of_accelerate_are_such(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    # Precision is the recipe's: the two would not agree.
    assert config.mixed_precision == "no"
