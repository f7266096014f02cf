"""Check a device in some minutes: every family trains, scores and draws on it; speed and memory.

    python scripts/gpu_check.py --minutes 8 -o gpu
    python scripts/gpu_check.py --device cpu --families grouped lstm -o cpu

It needs torch, transformers, accelerate and what these bring, and no network: texts and pictures are made
here. The folder gets `gpu_check.json` and `gpu_check.md`, written anew after each check, so that they are
whole whenever the script ends. A check is passed, failed or skipped, with the reason; after --minutes all
that remain are skipped. Exit code 1: a check failed.

- `train`: 50 steps of the training loop on one batch, in float32 and in bfloat16 mixed precision.
- `score`, `draw`: the trained model on the device next to a copy on the CPU, on one and the same noise. One
  row in 16 may differ: where two symbols, or two maps on Z/K, tie up to rounding, either is right.
- `speed`: symbols a second of training steps next to a plain Transformer of torch, in turns.
- `latency`: draws of 1 and of 100 sequences, with drafts of counts and without.
- `processes`: two processes with half of a batch each, on one device, have the gradients of one process.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image
from torch import Tensor, nn

from dflow import __version__, zoo
from dflow.compare.models import environment
from dflow.config import InputError
from dflow.data import files, image_sets
from dflow.generate import generate
from dflow.models.counts import counts_drafter
from dflow.train import Recipe, recipe_from
from dflow.train.loop import Run
from dflow.train.tasks import Task, task_of

#: Sizes of the models that train and are compared, each for the families that have such a setting.
SMALL: dict[str, Any] = {
    "length": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_calls": 8,
    "intermediate_size": 64, "window": 4, "num_flows": 2, "embedding_size": 16, "counts": 4, "num_spectra": 4,
    "context_size": 4, "dequantizer_flows": 2, "dequantizer_hidden_size": 16, "dequantizer_hidden_layers": 1,
    "channels": [4, 8], "hidden": [16], "pooling": "moments",
}  # fmt: skip
#: Of those that are timed: on an accelerator, on a CPU.
TIMED: dict[bool, dict[str, int]] = {
    True: {"length": 256, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "batch": 64},
    False: {"length": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "batch": 4},
}
#: Nats an entry by which device and CPU may differ, and the share of rows that may differ by more.
TOLERANCE, TIES = 1e-3, 1 / 16
ROWS = 64
Figures = dict[str, Any]


class Skipped(Exception):
    """A check that cannot be made here, with the reason."""


class Report:
    """The results so far, and the time that is left."""

    def __init__(self, folder: Path, minutes: float, about: Figures) -> None:
        self.folder, self.about, self.rows = folder, about, list[Figures]()
        self.end = time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def check(self, part: str, subject: str, run: Callable[[], Figures]) -> None:
        """Make a check: its figures, of which `fault` says why it failed."""
        began, row = time.monotonic(), {"part": part, "subject": subject, "status": "passed", "reason": ""}
        try:
            if self.left <= 0:
                raise Skipped("the time ran out")
            figures = run()
            if fault := figures.pop("fault", ""):
                row |= {"status": "failed", "reason": fault}
        except Skipped as reason:
            figures = {}
            row |= {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            figures = {"traceback": traceback.format_exc()}
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
        self.rows.append(row | {"seconds": round(time.monotonic() - began, 1), "figures": figures})
        print(f"{row['status']:7} {part} {subject} {row['reason']}", flush=True)
        self.write()

    def write(self) -> None:
        """Both files, each whole."""
        text = json.dumps({"about": self.about, "checks": self.rows}, indent=1)
        files.write(self.folder / "gpu_check.json", text.encode())
        lines = ["# Check of a device", "", ", ".join(f"{k} {v}" for k, v in self.about.items()), ""]
        lines += ["| check | of | result | s | figures |", "|---|---|---|---:|---|"]
        for row in self.rows:
            shown = ", ".join(f"{k} {v}" for k, v in row["figures"].items() if k != "traceback")
            result = ": ".join(filter(None, (row["status"], row["reason"].replace("|", "\\|"))))
            lines.append(f"| {row['part']} | {row['subject']} | {result} | {row['seconds']} | {shown} |")
        files.write(self.folder / "gpu_check.md", "\n".join([*lines, ""]).encode())


# -- data and models -------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """A text with words that follow each other, pictures of bright squares, and the same with labels."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(2, 7, 40)]
    steps = rng.integers(1, 4, 30_000).cumsum() % len(words)
    (folder / "text.txt").write_text(" ".join(words[i] for i in steps), encoding="utf-8")
    labels = rng.integers(3, size=400, dtype=np.uint8)
    pictures = rng.integers(90, size=(400, 1, 28, 28), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[0, 9 * label : 9 * label + 9] += 120
    (folder / "pictures").mkdir()
    for i, picture in enumerate(pictures[:, 0, ::7, ::7]):
        Image.fromarray(picture).save(folder / "pictures" / f"{i}.png")
    parts = [slice(0, 300), slice(300, 350), slice(350, 400)]
    split = image_sets.SplitPixels(
        *(pictures[part] for part in parts), labels=tuple(labels[part] for part in parts)
    )
    known = image_sets.KNOWN["mnist"]
    image_sets.KNOWN["mnist"] = dataclasses.replace(known, read=lambda folder=None: split)


def recipe(folder: Path, family: str, precision: str = "no", **sizes: Any) -> Recipe:
    """A short training of a family on the data that are made here."""
    record, batch_size = zoo.find(family), sizes.pop("batch", 32)
    data: Figures = {"name": "mnist"}
    if record.kind == "text":
        data = {"name": str(folder / "text.txt")}
    elif record.kind == "images":
        data = {"name": str(folder / "pictures"), "bits": 2}
    model = {name: value for name, value in (SMALL | sizes).items() if name in record.fields}
    train = {"steps": 1000, "batch_size": batch_size, "warmup": 5, "learning_rate": 0.003, "trackers": []}
    train |= {"mixed_precision": precision, "samples": 0, "eval_chunks": 4}
    values = {"data": data, "model": {"family": family} | model, "train": train}
    output = str(folder / f"{family}-{precision}-{len(list(folder.iterdir()))}")
    return recipe_from(values | {"output": output}, "gpu_check")


class Steps:
    """A training of which the steps are made here."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.run = task, Run(task, device)
        self.run.begin(False)
        self.started = time.monotonic()

    def __call__(self, n: int) -> list[float]:
        """The losses of n steps."""
        losses = []
        for _ in range(n):
            self.run.progress.loss, _ = self.run._one_step(self.started)
            self.run.progress.step += 1
            losses.append(self.run.progress.loss)
        return losses


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# -- checks ----------------------------------------------------------------------------------------------


def train(folder: Path, family: str, precision: str, device: torch.device, models: dict[str, Any]) -> Figures:
    """50 steps; the model of float32 is kept."""
    steps = Steps(task_of(recipe(folder, family, precision), False), device)
    # One batch again and again, so that the loss has to fall.
    batch = steps.run.batch(0)
    steps.run.batch = lambda step: batch  # type: ignore[method-assign]
    try:
        losses = steps(50)
    finally:
        steps.run.close()
    if precision == "no":
        models[family] = steps.task.model.eval(), batch[0]
    first, last = statistics.fmean(losses[:5]), statistics.fmean(losses[-5:])
    fault = "" if np.isfinite(losses).all() and last < first else "the loss does not fall"
    return {"loss": f"{first:.4f} to {last:.4f} {steps.task.data.short}", "fault": fault}


@torch.no_grad()
def likelihoods(model: Any, x: Tensor, noise: Tensor | None) -> Tensor:
    """Nats of each row, exact or a weight of a bound; of a classifier the log-probabilities."""
    torch.manual_seed(0)
    if model.config.model_kind != "labels" and not model.config.record.exact:
        assert noise is not None
        values: Tensor = model.dequantized.log_weights(x, noise=noise.to(x.device)[None])[0]
        return values.cpu().double()
    return model.log_prob(x).cpu().double()


def trained(models: dict[str, Any], family: str) -> tuple[Any, Any, Tensor]:
    """The model that has been trained, a copy on the CPU, and rows of its data."""
    if family not in models:
        raise Skipped("no trained model")
    model, x = models[family]
    return model, copy.deepcopy(model).to("cpu"), x[:ROWS].cpu()


def score(models: dict[str, Any], family: str) -> Figures:
    """Likelihoods on the device next to those on the CPU."""
    (model, on_cpu, x), noise = trained(models, family), None
    if on_cpu.config.model_kind != "labels" and not on_cpu.config.record.exact:
        generator = torch.Generator().manual_seed(0)
        noise = on_cpu.dequantized.dequantizer.noise(len(x), x.shape[1], generator)
    there, here = likelihoods(model, x.to(model.device), noise), likelihoods(on_cpu, x, noise)
    apart = (there - here).abs().flatten(1).amax(1) if there.ndim > 1 else (there - here).abs() / x.shape[1]
    far = float((apart > TOLERANCE).double().mean())
    fault = "" if far <= TIES and bool(there.isfinite().all()) else "the CPU gives other numbers"
    shown = f"{float(apart.median()):.1e}, most {float(apart.max()):.1e}"
    return {"nats an entry apart": shown, "rows apart": f"{far:.0%} by > {TOLERANCE}", "fault": fault}


def draw(models: dict[str, Any], family: str) -> Figures:
    """Draws by the same seed on both; with drafts too, where counts can draft."""
    model, on_cpu, _ = trained(models, family)
    if on_cpu.config.model_kind == "labels":
        raise Skipped("a classifier draws nothing")
    if on_cpu.config.model_kind != "text":
        drawn = model.generate(ROWS, generator=torch.Generator(model.device).manual_seed(0)).cpu()
        fault = "" if bool(drawn.double().isfinite().all()) else "a draw is not finite"
        return {"drawn": f"{ROWS}, not compared: generators of devices differ", "fault": fault}
    drawers = {"device": model, "CPU": on_cpu}
    try:
        drafter = counts_drafter(model)
        drawers |= {} if drafter is None else {"drafts": model.drafted(drafter, 4)}
    except InputError:
        pass  # not drawn from left to right
    drawn = {name: torch.stack(list(generate(drawer, ROWS, seed=1))) for name, drawer in drawers.items()}
    others = {name: int((drawn[name] != drawn["device"]).any(1).sum()) for name in drawn if name != "device"}
    fault = "" if max(others.values()) <= TIES * ROWS else "other draws by the same seed"
    return {f"of {ROWS} draws differ": ", ".join(f"{k} {v}" for k, v in others.items()), "fault": fault}


class Plain(nn.Module):
    """A causal Transformer of torch, as one would write it."""

    def __init__(self, K: int, sizes: dict[str, int]) -> None:
        super().__init__()
        hidden, n = sizes["hidden_size"], sizes["length"]
        self.embed, self.place = nn.Embedding(K + 1, hidden), nn.Parameter(0.02 * torch.randn(n, hidden))
        layer = nn.TransformerEncoderLayer(
            hidden, sizes["num_attention_heads"], 4 * hidden, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, sizes["num_hidden_layers"], enable_nested_tensor=False)
        self.head, self.K = nn.Linear(hidden, K), K
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(n))

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([torch.full_like(x[:, :1], self.K), x[:, :-1]], 1)
        h = self.layers(self.embed(before) + self.place, self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), x.flatten())


def plain_steps(task: Task, sizes: dict[str, int], half: bool, device: torch.device) -> Callable[[int], Any]:
    """Steps of the simplest loop, on the batches of a task."""
    net = Plain(task.model.config.vocab_size, sizes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def steps(n: int) -> None:
        for step in range(n):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = net(task.data.batch(step)[0].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

    return steps


def speed(folder: Path, precision: str, device: torch.device, models: dict[str, Any]) -> Figures:
    """Training steps of `transformer` and `grouped` next to the plain loop, in turns after a warm-up."""
    sizes, cuda = TIMED[device.type not in ("cpu", "pretend")], device.type == "cuda"
    runs, steps, figures = list[Run](), dict[str, Callable[[int], Any]](), Figures()
    extra = {"counts": 0, "intermediate_size": 4 * sizes["hidden_size"], "window": 8, "num_calls": 16}
    try:
        for family in ("transformer", "grouped"):
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            steps[family] = made = Steps(
                task_of(recipe(folder, family, precision, **sizes | extra), False), device
            )
            runs.append(made.run)
            made(3)
            if made.run.footprint is not None:
                figures[f"{family} estimated"] = str(made.run.footprint).partition(":")[0]
            if cuda:
                most = torch.cuda.max_memory_allocated(device) - before
                figures[f"{family} peak"] = f"{most / 1e6:,.0f} MB"
            models[f"timed {family}"] = made.task.model
        steps["plain"] = plain_steps(made.task, sizes, precision == "bf16", device)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        number = 10 if device.type == "cuda" else 2
        for turn in range(6):
            for name, some in steps.items():
                synchronize(device)
                began = time.perf_counter()
                some(number)
                synchronize(device)
                if turn:
                    seconds[name].append((time.perf_counter() - began) / number)
    finally:
        for run in runs:
            run.close()
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    symbols = sizes["batch"] * sizes["length"]
    figures |= {name: f"{symbols / value:,.0f} symbols/s" for name, value in middle.items()}
    figures |= {f"{name} of plain": f"{middle['plain'] / middle[name]:.2f}" for name in middle}
    return figures


def latency(folder: Path, device: torch.device, models: dict[str, Any]) -> Figures:
    """Seconds and network calls of draws, of the timed models."""
    if "timed grouped" not in models:
        raise Skipped("no model was timed")
    drafter = task_of(recipe(folder, "ngram"), False).model.to(device).eval()
    drawers = {name: models[f"timed {name}"].eval() for name in ("grouped", "transformer")}
    drawers["transformer with drafts"] = drawers["transformer"].drafted(drafter, 8)
    figures = Figures()
    for name, model in drawers.items():
        for batch in (1, 100):
            seconds = []
            for seed in range(3):
                if model.tally is not None:
                    model.tally.clear()
                began = time.perf_counter()
                drawn = model.generate(batch, generator=torch.Generator(device).manual_seed(seed)).cpu()
                seconds.append(time.perf_counter() - began)
            calls = model.num_calls if model.tally is None else max(model.tally.calls.values())
            figures[f"{name}, batch {batch}"] = f"{min(seconds):.3f} s in {calls} calls"
            assert drawn.shape == (batch, model.config.length)
    return figures


def memory(device: torch.device) -> Figures:
    """What torch and the driver say."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        raise Skipped(f"no nvidia-smi for {device.type}")
    fields = "name,driver_version,memory.used,memory.total"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return {"torch, most": f"{torch.cuda.max_memory_reserved(device) / 1e6:,.0f} MB", "nvidia-smi": said}


# -- two processes ---------------------------------------------------------------------------------------


def processes(folder: Path, device: torch.device, left: float) -> Figures:
    """Start two workers on the device; one says how far they are apart."""
    if device.type not in ("cpu", "cuda"):
        raise Skipped(f"torch has no communication for {device.type}")
    words = [sys.executable, __file__, "--device", str(device), "--worker", str(folder)]
    workers = [
        subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        (said, _), (_, errors) = (process.communicate(timeout=max(1.0, left)) for process in workers)
    except subprocess.TimeoutExpired:
        raise Skipped("the time ran out") from None
    finally:
        for process in workers:
            process.kill()
    if any(process.returncode for process in workers):
        return {"traceback": errors[-3000:], "fault": "a process ended with an error"}
    figures: Figures = json.loads(said.splitlines()[-1])
    return figures


def worker(folder: Path, rank: int, device: torch.device) -> None:
    """Gradients of half a batch, averaged over both processes, next to those of the whole batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    # Without counts, of which training leaves out some at random.
    task = task_of(recipe(folder, "grouped", counts=0), False)
    objective, (x, _) = task.method.objective.to(device), task.data.batch(0)

    def gradients(module: nn.Module, rows: Tensor) -> Tensor:
        module.zero_grad()
        loss, _ = module(rows.to(device))
        (loss / rows.numel()).backward()
        return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]).cpu()

    alone = gradients(objective, x)
    both = gradients(nn.parallel.DistributedDataParallel(objective), x[rank::2])
    apart = float((both - alone).abs().max() / alone.abs().max())
    others = [torch.empty_like(both) for _ in range(2)]
    dist.all_gather(others, both)
    fault = "" if apart < 1e-4 and torch.equal(*others) else "other gradients"
    print(json.dumps({"gradients apart": f"{apart:.1e} of the largest", "fault": fault}), flush=True)
    dist.destroy_process_group()


def versions() -> Figures:
    packages = {"transformers": transformers.__version__, "accelerate": accelerate.__version__}
    return packages | {"dflow": __version__, "machine": platform.platform()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="after which checks are skipped")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--families", nargs="+", default=zoo.names(), help="default: all")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_check"), help="folder of the results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    name = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    # Convolutions of float32 keep the digits of float32, as matrix products do.
    torch.backends.cudnn.allow_tf32 = False
    if given.worker:
        worker(Path(given.worker[0]), int(given.worker[1]), device)
        return 0
    report = Report(given.output, given.minutes, environment(device) | versions())
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        for family in given.families:
            for precision in ("no", "bf16"):
                of = f"{family} {'float32' if precision == 'no' else 'mixed bf16'}"
                report.check("train", of, lambda: train(folder, family, precision, device, models))  # noqa: B023
            report.check("score", family, lambda: score(models, family))  # noqa: B023
            report.check("draw", family, lambda: draw(models, family))  # noqa: B023
            models.pop(family, None)
        for precision in ("no", "bf16"):
            of = "float32" if precision == "no" else "mixed bf16"
            report.check("speed", of, lambda: speed(folder, precision, device, models))  # noqa: B023
        report.check("latency", "draws", lambda: latency(folder, device, models))
        report.check("processes", "two", lambda: processes(folder, device, report.left))
        report.check("memory", device.type, lambda: memory(device))
    return int(any(row["status"] == "failed" for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
