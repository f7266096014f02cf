"""What every family of the registry does on a device, next to the same on the CPU.

Run as a program it prints a line of JSON for each cell: its name, and its fault ("" for none). It takes the
library of the pretend device and "float64" or "float32", which switches float64 off.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import sys
import tempfile
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from folders import write_pictures, write_table, write_text
from test_classifiers import fake
from torch import Tensor
from waits import Waits

from dflow import cli, fill, hf, zoo
from dflow.core import Context, Known
from dflow.data import count, image_sets
from dflow.models.counts import counted, counts_drafter
from dflow.ops.devices import WITHOUT_FLOAT64
from dflow.ops.noise import Noise
from dflow.train import loop
from pretend import device as pretend

#: Sizes of the tiny models, each for the families that have such a setting.
TINY: dict[str, Any] = {
    "length": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
    "window": 2, "num_calls": 3, "num_flows": 2, "embedding_size": 4, "components": 2, "spline_bins": 3,
    "mixture_components": 2, "context_size": 2, "dequantizer_flows": 2, "dequantizer_hidden_size": 8,
    "dequantizer_hidden_layers": 1, "shape": [1, 4, 4], "levels": [4], "classes": 3, "channels": [3, 4],
    "hidden": [5],
}  # fmt: skip

#: Settings that are no choices, each as a variant of its own.
MORE: dict[str, list[Any]] = {
    "context": [3], "counts": [3], "ngram_rows": [7], "dropout": [0.2], "block": [2], "calls": [[1, 4]],
    "num_levels": [2], "num_spectra": [1], "weight_drop": [0.1], "prior_components": [2], "groups": [2],
}  # fmt: skip

#: What a choice needs beside it, by the setting and its value.
BESIDE: dict[tuple[str, object], dict[str, Any]] = {
    ("prior", "hurdle"): {"num_flows": 0},
    ("partition", "orthant"): {"levels": [2], "dequantizer": "normal"},
    ("dequantizer", "truncated"): {"density": "diagonal"},
    ("fit", "gradient"): {"density": "covariance"},
    ("schedule", "dp"): {"order": "random"},
    ("masks", "blocks"): {"conditioner": "perceptron"},
    ("conditioner", "table"): {"masks": "halves"},
    ("head", "bce"): {"kind": "probabilistic"},
    ("block", 2): {"num_calls": 2},
}

#: Settings of images that a training takes from its data.
SHAPES = ("shape", "levels", "classes")

#: What is not done on the device, each with its reason.
ELSEWHERE = {
    "`dflow compress`, `dflow decompress`": "on the CPU: a file has to be decoded on any machine",
    "`dflow evaluate` of images, without float64": "on the CPU; with `--precision float32` on the GPU",
    "the exact likelihood of two columns, without float64": "on the CPU: an integral needs the digits",
    "fits of a Gaussian density, without float64": "on the CPU: sums of squares need the digits",
}

#: Files that wait for the device at every step of a drawing or a training, each with its reason.
WAITS = {
    "train/loop.py": "the loss of a step is read for the progress bar, once, with all else that is asked for",
    "bijectors/autoregressive.py": "an inverse is iterated until nothing changes",
    "elementwise/mixture.py": "a mixture is inverted by iteration, for the entries that have not converged",
    "distributions/normal.py": "moments in closed form are checked, and enlarged until they have a density",
}

K = 5
_BATCH = 6


@dataclasses.dataclass(frozen=True)
class Variant:
    """A family with some of its settings."""

    family: str
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.family, *(f"{key}={value}" for key, value in self.changes)])

    def values(self) -> dict[str, Any]:
        names = zoo.find(self.family).fields
        beside: dict[str, Any] = {}
        for key, value in self.changes:
            if not isinstance(value, list):
                beside |= BESIDE.get((key, value), {})
        wanted = TINY | {key: value for key, value in beside.items()} | dict(self.changes)
        if wanted.get("base") == "spectra":
            wanted["num_flows"] = 1
        return {key: value for key, value in wanted.items() if key in names}

    def longer(self) -> Variant:
        """The same with twice the steps to draw a text."""
        return Variant(self.family, (*self.changes, ("length", 16), ("num_calls", 6), ("num_flows", 4)))

    def model(self) -> Any:
        """A model with random weights and counts, on the CPU."""
        torch.manual_seed(0)
        record, values = zoo.find(self.family), self.values()
        model: Any
        if record.kind == "text":
            model = hf.DflowModel(hf.DflowConfig(family=self.family, vocab_size=K, **values))
            for module in counted(model):
                module.use(count(torch.randint(0, K, (200,)), K, module.patterns))
        elif record.kind == "images":
            model = hf.DflowImageModel(hf.DflowImageConfig(family=self.family, **values))
            model.initialize(torch.randint(0, values["levels"][0], (40, 16)))
        else:
            model = hf.DflowClassifier(hf.DflowClassifierConfig(family=self.family, **values))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()


def variants(family: str) -> list[Variant]:
    """The family with tiny settings, and with each other value of each setting that is a choice."""
    record = zoo.find(family)
    kinds, found = typing.get_type_hints(record.settings), [Variant(family)]
    for field in dataclasses.fields(record.settings):
        kind = kinds[field.name]
        choices: list[Any] = [*MORE.get(field.name, []), *field.metadata.get("known", {})]
        if typing.get_origin(kind) is typing.Literal:
            choices += typing.get_args(kind)
        if kind is bool:
            choices += [True, False]
        if field.name == "context" and record.known == "no":
            continue
        found += [Variant(family, ((field.name, value),)) for value in choices if value != field.default]
    return found


# -- properties: each takes the model on the CPU, that on the device, and a batch on the CPU


def close(on_device: Tensor, on_cpu: Tensor) -> None:
    assert on_device.device.type != "cpu", "the result is on the CPU"
    torch.testing.assert_close(on_device.cpu().float(), on_cpu.float(), rtol=1e-3, atol=1e-4)


def batch_of(model: Any) -> Tensor:
    torch.manual_seed(1)
    if isinstance(model, hf.DflowModel):
        return torch.randint(0, K, (_BATCH, model.config.length))
    return torch.randint(0, model._settings.levels[0], (_BATCH, model.dim))


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@torch.no_grad()
def score(on_cpu: Any, model: Any, x: Tensor) -> None:
    device = model.device
    if isinstance(model, hf.DflowImageModel) and not model.exact:
        for result in (model.elbo(x.to(device), 2, generator(device)), model.iwbo(x.to(device), 2)):
            assert bool(result.values.isfinite().all())
        return
    torch.manual_seed(0)  # pooling draws
    expected = on_cpu.log_prob(x)
    torch.manual_seed(0)
    close(model.log_prob(x.to(device)), expected)
    if isinstance(model, hf.DflowModel):
        if model.law.by_entry:
            close(model.log_prob_each(x.to(device)), on_cpu.log_prob_each(x))
        if not model.config.context:
            lengths = torch.arange(_BATCH) % 4 + 5
            close(model.log_prob(x.to(device), lengths.to(device)), on_cpu.log_prob(x, lengths))


def labels_of(model: Any, device: torch.device) -> dict[str, Tensor]:
    return (
        {"labels": torch.arange(_BATCH, device=device) % 3} if isinstance(model, hf.DflowClassifier) else {}
    )


def train(on_cpu: Any, model: Any, x: Tensor) -> None:
    model = copy.deepcopy(model).train()
    learned = list(model.parameters())
    optimizer = torch.optim.AdamW(learned) if learned else None
    for _ in range(2):
        loss = model(x.to(model.device), **labels_of(model, model.device)).loss
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert bool(loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in learned if p.grad is not None)


def draw(on_cpu: Any, model: Any, x: Tensor) -> None:
    device = model.device
    if isinstance(model, hf.DflowModel):
        noise = [Noise(7, torch.arange(20, device=where)) for where in (device, torch.device("cpu"))]
        drawn, expected = model.generate(20, noise=noise[0]), on_cpu.generate(20, noise=noise[1])
        # A tie up to rounding goes either way, and all that is drawn later with it.
        assert int((drawn.cpu() != expected).any(1).sum()) <= 1
    assert model.generate(3, generator=generator(device)).device.type != "cpu"


def drafts(on_cpu: Any, model: Any, x: Tensor) -> None:
    # With a table that is on the device by now.
    noise = Noise(7, torch.arange(4, device=model.device))
    drafter = counts_drafter(model)
    if drafter is not None:
        drawn = model.drafted(drafter, 3).generate(4, noise=noise)
        assert int((drawn != model.generate(4, noise=noise)).any(1).sum()) <= 1


def prompt(on_cpu: Any, model: Any, x: Tensor) -> None:
    start = torch.tensor([2, 0])
    drawn = model.generate(4, generator=generator(model.device), prompt=start.to(model.device))
    assert bool((drawn[:, :2].cpu() == start).all())


def known(on_cpu: Any, model: Any, x: Tensor) -> None:
    hidden = torch.zeros(model.config.length, dtype=torch.bool)
    hidden[-2:] = True
    if zoo.find(model.config.family).known == "anywhere":
        hidden[2] = True
    for result in fill.fill(model, x[0], hidden, 3):
        assert bool((result.ids[~hidden] == x[0][~hidden]).all())


def round_trip(on_cpu: Any, model: Any, x: Tensor) -> None:
    assert model.round_trip(x.to(model.device)) is True


def waits_in_drawing(variant: Variant, device: torch.device) -> None:
    """What a longer text waits for more often than a short one is listed; alike of the rest of a text."""
    given = bool(variant.values().get("context"))
    for task in (plain_draws, continued_draws) if given else (plain_draws,):
        counts = []
        for size in (variant, variant.longer()):
            model = size.model().to(device)
            task(model)
            with Waits() as waits:
                task(model)
            counts.append(Counter(waits.places))
        unlisted(counts[1] - counts[0])


def plain_draws(model: Any) -> None:
    model.generate(3, generator=generator(model.device))


def continued_draws(model: Any) -> None:
    """Draws of a chunk given symbols before it and, where a family takes them, after it."""
    n = model.config.length
    mask = torch.arange(n + 3) < 2
    mask[-1] = zoo.find(model.config.family).known == "anywhere"
    symbols = torch.arange(3, device=model.device)[:, None].expand(3, n + 3)
    model.law.sample(3, Context(known=Known(symbols, mask)), generator(model.device))


def unlisted(places: Iterable[str]) -> None:
    """AssertionError if one of the places is in a file that is not listed."""
    others = [place for place in places if place.partition(":")[0] not in WAITS]
    assert not others, f"the device is waited for at every step: {others}"


def properties(variant: Variant, model: Any) -> Iterator[Callable[[Any, Any, Tensor], None]]:
    """What a model of this variant does."""
    record = zoo.find(variant.family)
    yield from (score, train)
    if record.kind == "labels":
        return
    yield draw
    if record.left_to_right:
        yield drafts
    if record.prompt != "no":
        yield prompt
    if record.kind == "text" and (record.known == "before" or model.config.context):
        yield known
    if record.exact:
        yield round_trip


# -- verbs: each takes a folder of its family, where the recipe is ------------------------------------------


def command(*words: object, device: torch.device | None = None) -> None:
    """Run a verb of the program; AssertionError with what it wrote where it fails."""
    chosen = [] if device is None else ["--device", str(device)]
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        code = cli.main([*map(str, words), *chosen])
    assert code == 0, written.getvalue()


def write_recipe(folder: Path, family: str) -> None:
    """A recipe of the family, with data that it takes."""
    record = zoo.find(family)
    model = {key: value for key, value in Variant(family).values().items() if key not in SHAPES}
    train: dict[str, Any] = {"steps": 2, "batch_size": 4, "eval_every": 1, "eval_chunks": 4, "trackers": []}
    data: dict[str, Any] = {"name": "mnist"}
    if record.kind == "text":
        data = {"name": str(write_text(folder))}
        model |= {"context": 3} if record.known != "no" else {}
    elif family == "dequantized":
        # A column of reals: data in float64.
        data = {"name": str(write_table(folder, "i0,i1,x"))}
        train["ema"] = 0.9
    elif record.kind == "images":
        data = {"name": str(write_pictures(folder / "pictures", size=4)), "bits": 2}
    recipe = {
        "data": data,
        "model": {"family": family} | model,
        "train": train,
        "output": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def commands(folder: Path, family: str, device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """By name what is done with a family at the command line."""
    record, out = zoo.find(family), folder / "out"

    def fill_a_gap() -> None:
        text = folder / "gap.txt"
        text.write_text("line ____" + (" of a" if record.known == "anywhere" else ""), encoding="utf-8")
        command("fill", text, "--model", out, "--size", 3, device=device)

    def compress() -> None:
        file = next(folder.glob("pictures/*.png"), folder / "text.txt")
        command("compress", file, "--model", out, "-o", folder / "a.dfl")
        command("decompress", folder / "a.dfl", "--model", out, "-o", folder / "back")

    def score_a_text() -> None:
        (folder / "short.txt").write_text("line 0 o", encoding="utf-8")
        command("score", folder / "short.txt", "--model", out, device=device)

    def waits_in_training() -> None:
        steps: list[list[str]] = []
        one_step = loop.Run._one_step

        def counted_step(run: loop.Run, started: float) -> tuple[float, float]:
            with Waits() as waits:
                result = one_step(run, started)
            steps.append(waits.places)
            return result

        # With a context what is known differs by step.
        for context in (0, 3) if record.known != "no" else (0,):
            steps.clear()
            words = ["-o", folder / f"other{context}"]
            if record.known != "no":
                words += ["--set", f"model.context={context}", "train.known=[0, 1, 1, 2]", "train.steps=6"]
            with mock.patch.object(loop.Run, "_one_step", counted_step):
                command("train", folder / "recipe.yaml", *words, device=device)
            # What depends on the model alone is computed at the first step.
            for places in steps[1:]:
                unlisted(places)
                assert sum(place.startswith("train/loop.py") for place in places) == 1

    yield "waits in training", waits_in_training
    yield "dflow train", lambda: command("train", folder / "recipe.yaml", device=device)
    resumed = ["train", out, "--resume", "--set", "train.steps=4"]
    yield "dflow train --resume", lambda: command(*resumed, device=device)
    yield "dflow evaluate", lambda: command("evaluate", "--model", out, device=device)
    if record.kind == "labels":
        yield "dflow export", lambda: command("export", "--model", out, "-o", folder / "net", device=device)
        return
    drawn = [] if record.kind == "text" else ["-o", folder / "drawn.csv"]
    yield "dflow generate", lambda: command("generate", "--model", out, "--samples", 3, *drawn, device=device)
    if family != "dequantized":
        yield "dflow compress", compress
    if record.kind == "text":
        yield "dflow score", score_a_text
        yield "dflow compare", lambda: command("compare", out, "--rounds", 1, "--limit", 2, device=device)
    if record.known != "no":
        yield "dflow fill", fill_a_gap


def main(library: str, precision: str, *families: str) -> None:
    """Print the fault of each cell."""
    device = pretend.start(Path(library), precision == "float64")
    if precision != "float64":
        WITHOUT_FLOAT64.add(device.type)
    image_sets.KNOWN["mnist"] = dataclasses.replace(image_sets.KNOWN["mnist"], read=fake)
    for family in families or zoo.names():
        for variant in variants(family):
            on_cpu = variant.model()
            model, x = copy.deepcopy(on_cpu).to(device), batch_of(on_cpu)
            for task in properties(variant, model):
                report(variant.name, task.__name__, functools.partial(task, on_cpu, model, x))
            # A table of a longer text would be too large.
            if zoo.find(family).kind == "text" and ("conditioner", "table") not in variant.changes:
                report(variant.name, "waits in drawing", functools.partial(waits_in_drawing, variant, device))
        with tempfile.TemporaryDirectory() as name:
            write_recipe(Path(name), family)
            for verb, run in commands(Path(name), family, device):
                report(family, verb, run)


def report(variant: str, task: str, run: Callable[[], None]) -> None:
    """Print the fault of a cell, "" for none."""
    fault = ""
    try:
        run()
    except Exception:
        fault = traceback.format_exc()
    print(json.dumps([variant, task, fault]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
