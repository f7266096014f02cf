"""Training with accelerate: one loop for every model, one process or many.

The batch of a step depends on the seed and the step alone, so a run on two processes sees the batches of a
run on one, and a resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from dflow import hf, objectives, zoo
from dflow.config import InputError, convert, nearest, parse
from dflow.data import Corpus, DataConfig, Text, Tokenizer, files, load
from dflow.distributions import Categorical, Mixture
from dflow.ops.straight_through import SCHEDULES, scheduled
from dflow.zoo import setting

STATE = "state.safetensors"
RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"


@dataclass
class Schedule:
    """A value that moves from `start` to `end` over the first `until` of the training."""

    start: float
    end: float
    schedule: str = "linear"
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {self.schedule!r}; {nearest(self.schedule, list(SCHEDULES))}")
        if not 0 < self.until <= 1:
            raise InputError(f"until must lie in (0, 1], found {self.until}")

    def at(self, fraction: float) -> float:
        """The value after ``fraction`` of the training."""
        return scheduled(self.schedule, min(1.0, fraction / self.until), self.start, self.end)


@dataclass
class TrainConfig:
    """How a model is trained. The budget is `steps`, `minutes` or both: what is reached first ends it."""

    steps: int | None = setting(None, "budget in steps of the optimizer")
    minutes: float | None = setting(None, "budget in minutes, evaluations included")
    batch_size: int = setting(32, "sequences of one step, over all processes and accumulation")
    accumulation: int = setting(1, "pieces into which each process cuts its part of a batch")
    learning_rate: float = setting(2e-3, "peak learning rate (AdamW)")
    final_learning_rate: float = setting(0.0, "learning rate at the end, as a share of the peak (cosine)")
    warmup: int = setting(100, "steps of linear warm-up")
    weight_decay: float = setting(0.01, "weight decay of matrices")
    clip: float = setting(1.0, "largest norm of the gradient; 0 for none")
    ema: float = setting(
        0.0, "decay of the moving average of weights that is evaluated and saved; 0 for none"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = setting(
        "no", "precision of the networks: no, bf16, fp16"
    )
    rule: Literal["auto", "likelihood", "straight_through", "gumbel", "layerwise", "expected", "masked"] = (
        setting("auto", "training rule; auto takes the best for the model")
    )
    temperature: Schedule = field(
        default_factory=lambda: Schedule(1.0, 1.0),
        metadata={"help": "of the soft-max of rules straight_through, gumbel and expected"},
    )
    noise: Schedule | None = field(
        default=None, metadata={"help": "factor of the Gumbel noise (rule gumbel: 1 falling to 0)"}
    )
    peak: Schedule | None = field(
        default=None, metadata={"help": "pull of the base towards symbol 0, which breaks the identity trap"}
    )
    refit_batches: int = setting(16, "batches that set a base in closed form before an evaluation")
    base_momentum: float = setting(0.98, "memory of a base in closed form, a step")
    seed: int = setting(0, "seed of weights, batches and dropout")
    eval_every: int | None = setting(None, "steps between evaluations")
    eval_minutes: float | None = setting(None, "minutes between evaluations (default: a tenth of the budget)")
    eval_chunks: int = setting(128, "chunks of the validation text used during training; 0 for all")
    save_every: int | None = setting(None, "steps between saves of the training state (default: evaluations)")
    samples: int = setting(2, "samples printed at each evaluation")
    trackers: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "trackers of accelerate; [] for none"}
    )

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise InputError("give a budget: steps or minutes")
        for name in ("steps", "minutes", "eval_every", "eval_minutes", "save_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be positive, found {value}")
        for name in ("batch_size", "accumulation", "refit_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("ema", "base_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), found {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate must be positive, found {self.learning_rate}")


@dataclass
class Paper:
    """A published value that a recipe is measured against."""

    value: float
    unit: str
    source: str
    protocol: str = ""


@dataclass
class Recipe:
    """What to train, on what, how, and where to put it."""

    data: DataConfig
    family: str
    model: zoo.ModelConfig
    train: TrainConfig
    output: Path
    paper: Paper | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        values: dict[str, Any] = {
            "data": asdict(self.data),
            "model": {"family": self.family} | asdict(self.model),
            "train": asdict(self.train),
            "output": str(self.output),
        }
        return values | ({"paper": asdict(self.paper)} if self.paper else {})


@dataclass
class _File:
    """The sections of a recipe's file."""

    model: dict[str, Any]
    train: dict[str, Any]
    output: str
    data: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] | None = None


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe strictly; ``overrides`` are ``key=value`` with dotted keys and YAML values.

    Raises:
        InputError: no such file, no YAML, an unknown key or a value of the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe; recipes/ holds some to start from") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a recipe ({str(error).splitlines()[0]})") from None
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: a recipe is a mapping with the sections data, model, train and output")
    tree = copy.deepcopy(dict(values))
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override}: write key=value, for example train.minutes=3")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"--set {override}: {parent} is not a section")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {override}: {text!r} is not a YAML value") from None
    return recipe_from(tree, str(path))


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain values; ``where`` names their source in errors."""
    sections = parse(_File, values, where)
    model = dict(sections.model)
    family = model.pop("family", None)
    if family is None:
        raise InputError(f"{where}: key 'model.family' is missing; {nearest('', list(zoo.FAMILIES))}")
    data = parse(DataConfig, sections.data, f"{where}: data")
    law = data.law(f"{where}: data")
    if law is not None:
        model.setdefault("length", law.dim)
    config = zoo.settings(family, model, f"{where}: model")
    if law is not None and config.length != law.dim:
        raise InputError(
            f"{where}: model.length is {config.length} and sequences of {data.name} have {law.dim} symbols; "
            "leave it out, or change data.parameters"
        )
    return Recipe(
        data=data,
        family=family,
        model=config,
        train=parse(TrainConfig, sections.train, f"{where}: train"),
        output=Path(convert(str, sections.output, f"{where}: output")),
        paper=parse(Paper, sections.paper, f"{where}: paper") if sections.paper else None,
    )


def recipe_of(folder: str | Path) -> Recipe:
    """The recipe that the model in ``folder`` was trained by."""
    path = Path(folder) / RECIPE
    if not path.is_file():
        raise InputError(f"{folder}: no {RECIPE}; name the data yourself")
    return load_recipe(path)


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train, evaluate and save; returns the output folder, which is a model folder.

    Ctrl-C and SIGTERM end the step in progress, save the state and raise `KeyboardInterrupt`.

    Raises:
        InputError: the output exists (and not ``resume``), nothing to resume, unusable settings or data.
    """
    output = recipe.output
    if resume and not (output / STATE).is_file():
        raise InputError(f"{output}: nothing to resume (no {STATE}); start without --resume")
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; add --resume to go on, or choose another output")
    corpus = load(recipe.data, Tokenizer.load(output) if resume else None)
    run = _Run(recipe, corpus)
    try:
        if resume:
            run.restore()
        run.begin(resume)
        run.loop()
    finally:
        run.close()
    return output


class _Run:
    """One training in progress."""

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        config = recipe.train
        self.recipe, self.config, self.corpus = recipe, config, corpus
        AcceleratorState._reset_state()  # a second training in one process may use another precision
        trackers = [t for t in config.trackers if t]
        try:
            self.accelerator = Accelerator(
                # Asked for by name, since several processes are seen on a CPU only then.
                cpu=not torch.accelerator.is_available(),
                mixed_precision=config.mixed_precision,
                log_with=trackers or None,
                project_dir=str(recipe.output),
            )
        except ValueError as error:
            raise InputError(f"train: {error}") from None
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        pieces = self.world * config.accumulation
        if config.batch_size % pieces:
            raise InputError(
                f"train.batch_size {config.batch_size} is no multiple of {pieces}, processes x accumulation"
            )
        explicit = corpus.protocol == "sentence"
        length = recipe.model.length
        for text in (corpus.train, corpus.valid):
            text.crops(1, length, torch.Generator().manual_seed(0))
        torch.manual_seed(config.seed)
        settings = hf.DflowConfig(
            family=recipe.family,
            vocab_size=corpus.tokenizer.size,
            explicit_length=explicit,
            **asdict(recipe.model),
        )
        self.model = hf.DflowModel(settings)
        distribution = self.model.distribution
        base = objectives.closed_form(distribution)
        law = objectives.base_of(distribution)
        if isinstance(law, (Categorical, Mixture)):
            law.initialize(corpus.train.marginals(corpus.tokenizer.size))
        if explicit:
            self.model.set_length_counts(corpus.train.length_counts(length).float())
        rule = objectives.default_rule(distribution) if config.rule == "auto" else config.rule
        self.rule = rule
        self.base = base
        self.estimators = objectives.estimators(distribution)
        self.laws = objectives.elastic(distribution)
        objective = objectives.Objective(distribution, rule)
        matrices = [p for p in objective.parameters() if p.ndim >= 2]
        others = [p for p in objective.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.averaged = copy.deepcopy(self.model) if config.ema else None
        self.step, self.elapsed, self.best = 0, 0.0, math.inf
        self.next_eval = self.next_save = 0.0
        self.interrupted: int | None = None
        self.wrapped: Any
        self.wrapped, self.optimizer = self.accelerator.prepare(objective, self.optimizer)
        if self.averaged is not None:
            self.averaged.to(self.accelerator.device)

    # -- batches ---------------------------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The whole batch of ``step``: the same on every process and in every run with this seed."""
        generator = torch.Generator().manual_seed(_mix(self.config.seed, step))
        return self.corpus.train.crops(self.config.batch_size, self.recipe.model.length, generator)

    def fraction(self) -> float:
        """How much of the budget is spent, in [0, 1]."""
        c = self.config
        spent = [self.step / c.steps] if c.steps else []
        spent += [self.elapsed / (60 * c.minutes)] if c.minutes else []
        return min(1.0, max(spent))

    # -- the loop --------------------------------------------------------------------------------------------

    def begin(self, resumed: bool) -> None:
        """Open the output and say what will happen."""
        out = self.recipe.output
        if self.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            if not resumed:
                files.write(out / RECIPE, yaml.safe_dump(self.recipe.as_dict(), sort_keys=False).encode())
                self.corpus.tokenizer.save(out)
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("logs")
        d, corpus = self.accelerator.device, self.corpus
        parameters = sum(p.numel() for p in self.model.parameters())
        most = "at most " * (getattr(self.recipe.model, "inversion", "loop") == "jacobi")
        self.say(
            f"{self.recipe.family}: {parameters:,} parameters, rule {self.rule}, "
            f"{most}{self.model.num_calls} network calls to draw {self.recipe.model.length} symbols\n"
            f"{corpus.name} ({corpus.protocol}): {corpus.train.amount}, "
            f"{corpus.tokenizer.size} different\n"
            f"{self.world} process{'es' * (self.world > 1)} on {d.type}, "
            f"precision {self.config.mixed_precision}, {torch.get_num_threads()} threads each; output {out}"
        )

    def loop(self) -> None:
        """Steps until the budget is spent."""
        config = self.config
        in_steps = config.minutes is None
        total = int(config.steps or 0) if in_steps else round(60 * (config.minutes or 0))
        bar = tqdm(
            total=total,
            initial=self.step if in_steps else round(self.elapsed),
            unit="step" if in_steps else "s",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
            smoothing=0.05,
        )
        started = time.monotonic() - self.elapsed
        shown, characters, since = 0.0, 0, time.monotonic()
        with self._signals(), bar:
            if self.step == 0:
                self.next_eval, self.next_save = self._next(config.eval_every), self._next(config.save_every)
            while self.fraction() < 1:
                loss, count = self._one_step()
                self.step += 1
                stop = self._agree(time.monotonic() - started)
                shown, characters = loss, characters + count
                now = time.monotonic()
                if now - since > 1.0 or self.fraction() >= 1:
                    # Under layerwise and expected the loss is that of the conditioners, not of the model;
                    # under masked it is an estimate of a bound.
                    rate = characters / (now - since)
                    bar.set_postfix_str(f"{shown:.3f} bits/char, {rate:,.0f} chars/s")
                    characters, since = 0, now
                bar.n = min(total, self.step if in_steps else round(self.elapsed))
                bar.update(0)
                done = self.fraction() >= 1
                if done or self._due(self.next_eval, config.eval_every):
                    self.evaluate(loss)
                    self.next_eval = self._next(config.eval_every)
                    if config.save_every is None:
                        self.save_state()
                if config.save_every and (done or self.step >= self.next_save):
                    self.save_state()
                    self.next_save = self._next(config.save_every)
                if stop:
                    self.save_state()
                    raise KeyboardInterrupt(f"stopped at step {self.step}; add --resume to go on")
        self.say(f"done: {self.step:,} steps, best validation {self.best:.4f} bits a character")

    def _one_step(self) -> tuple[float, int]:
        """The loss in bits a character, and the characters it was measured on."""
        config, accelerator = self.config, self.accelerator
        self._schedules()
        x, lengths = self.batch(self.step)
        total = x.numel() if lengths is None else int(lengths.sum())
        own = slice(self.rank, None, self.world)
        xs = x[own].chunk(config.accumulation)
        ls = [None] * len(xs) if lengths is None else list(lengths[own].chunk(config.accumulation))
        # Dropout and Gumbel noise come from the seed and the step too, so that resuming needs no more.
        torch.manual_seed(_mix(config.seed + 1 + self.rank, self.step))
        self.model.train()
        nats, counts = torch.zeros((), device=accelerator.device), None
        for i, (piece, part) in enumerate(zip(xs, ls, strict=True)):
            last = i == len(xs) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss, latents = self.wrapped(
                    piece.to(accelerator.device), None if part is None else part.to(accelerator.device)
                )
                # Processes average their gradients: the mean over the whole batch needs the factor.
                accelerator.backward(loss * (self.world / total))
            nats = nats + loss.detach()
            if latents is not None:
                counts = latents if counts is None else counts + latents
        if config.clip:
            accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.world > 1:
            nats = accelerator.reduce(nats)
        if self.base is not None and counts is not None:
            self.base.update(accelerator.reduce(counts) if self.world > 1 else counts, config.base_momentum)
        if self.averaged is not None:
            # A young average would be mostly the random start.
            decay = min(config.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay
                )
        characters = total * self.corpus.train.characters_per_symbol
        value = objectives.bits(float(nats), characters)
        if not math.isfinite(value):
            raise InputError(
                f"the loss is {value} at step {self.step}; start again with a lower train.learning_rate"
            )
        return value, round(characters)

    def _schedules(self) -> None:
        config, fraction = self.config, self.fraction()
        decay = config.final_learning_rate
        cosine = decay + (1 - decay) * (1 + math.cos(math.pi * fraction)) / 2
        rate = config.learning_rate * cosine * min(1.0, (self.step + 1) / max(1, config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        noise = config.noise or (Schedule(1.0, 0.0) if self.rule == "gumbel" else Schedule(0.0, 0.0))
        for estimator in self.estimators:
            estimator.temperature = config.temperature.at(fraction)
            estimator.noise = noise.at(fraction)
        for law in self.laws:
            # From the seed and the step, so that all processes and resumed runs take the same.
            law.choose(law.budgets[_mix(config.seed + 2, self.step) % len(law.budgets)])
        if self.base is not None:
            self.base.peak = config.peak.at(fraction) if config.peak and fraction < config.peak.until else 0.0

    def _next(self, every: int | None) -> float:
        """The next evaluation or save: a step, or a time in seconds."""
        if every is not None:
            return float(self.step + every)
        config = self.config
        if config.minutes is None:
            return self.step + math.ceil((config.steps or 10) / 10)
        return self.elapsed + 60 * (config.eval_minutes or config.minutes / 10)

    def _due(self, when: float, every: int | None) -> bool:
        in_steps = every is not None or self.config.minutes is None
        return (self.step if in_steps else self.elapsed) >= when

    def _agree(self, elapsed: float) -> bool:
        """Set the time spent and say whether to stop: as the main process sees it, so that all turn alike."""
        self.elapsed, stop = elapsed, bool(self.interrupted)
        # Without a budget in minutes nothing hangs on the time, and asking costs a round of messages.
        if self.world > 1 and (self.config.minutes is not None or self.step % _STEPS_UNASKED == 0):
            agreed: list[Any] = broadcast_object_list([elapsed, stop])
            self.elapsed, stop = float(agreed[0]), bool(agreed[1])
        elif self.world > 1:
            stop = False
        return stop

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, loss: float) -> None:
        """Exact bits on the validation text; keep the model if it is the best so far; print samples."""
        model = self.averaged if self.averaged is not None else self.model
        model.train(False)
        for law in objectives.elastic(model.distribution):
            law.choose(None)
        if self.averaged is not None:
            # What is counted, not learned, has its own memory.
            for old, new in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
                old.copy_(new)
        base = objectives.closed_form(model.distribution)
        peak, training = (base.peak if base is not None else 0.0), self.base
        if base is not None and training is not None:
            base.peak = 0.0
            kept = training.counts.clone()
            # The exact optimum for the weights at hand, where training had a running average of old ones.
            batches = (self._on_device(self.batch(self.step + i)) for i in range(self.config.refit_batches))
            objectives.refit(model.distribution, batches)
        bpc = self._bits(model, self.corpus.valid)
        improved = bpc < self.best
        if self.accelerator.is_main_process:
            if improved:
                hf.save(model, self.recipe.output)
            record = {
                "step": self.step,
                "seconds": round(self.elapsed, 1),
                "train_loss_bits": round(loss, 5),
                "valid_bpc": round(bpc, 5),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
            }
            with (self.recipe.output / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            note = "best" if improved else f"best {self.best:.4f}"
            self.say(f"step {self.step:,}: valid {bpc:.4f} bits a character (exact, {note})")
            if self.config.samples:
                generator = torch.Generator(self.accelerator.device).manual_seed(self.config.seed)
                for row in model.generate(self.config.samples, generator=generator):
                    text = self.corpus.tokenizer.decode(row.cpu())
                    self.say("  | " + text.replace("\n", "\n  | "))
        self.best = min(self.best, bpc)
        self.accelerator.log({"loss_bits": loss, "valid_bpc": bpc}, step=self.step)
        if base is not None and training is not None:
            base.peak = peak
            if model is self.model:
                training.counts.copy_(kept)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _bits(self, model: hf.DflowModel, text: Text) -> float:
        """Exact bits a character on the first `eval_chunks` chunks, spread over the processes."""
        ids, lengths = text.chunks(self.recipe.model.length)
        limit = self.config.eval_chunks or len(ids)
        ids, lengths = ids[:limit], None if lengths is None else lengths[:limit]
        nats = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        size = max(1, self.config.batch_size // self.world)
        for start in range(self.rank * size, len(ids), self.world * size):
            rows = slice(start, start + size)
            x, part = self._on_device((ids[rows], None if lengths is None else lengths[rows]))
            nats -= model.log_prob(x, part).double().sum()
        if self.world > 1:
            nats = self.accelerator.reduce(nats)
        symbols = ids.numel() if lengths is None else int(lengths.sum()) + len(lengths)
        return objectives.bits(float(nats), symbols * text.characters_per_symbol)

    def _on_device(self, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        x, lengths = batch
        device = self.accelerator.device
        return x.to(device), None if lengths is None else lengths.to(device)

    # -- state -----------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """All that resuming needs, in one file that is replaced whole."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.averaged is not None:
            tensors |= {f"averaged.{k}": v for k, v in self.averaged.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        about = {
            "step": self.step,
            "elapsed": self.elapsed,
            "best": self.best,
            "next_eval": self.next_eval,
            "next_save": self.next_save,
            "recipe": _fingerprint(self.recipe),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        # Tied weights share memory, which the format refuses: each name gets its own copy.
        data = safetensors.torch.save(
            {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()},
            {"dflow": json.dumps(about)},
        )
        files.write(self.recipe.output / STATE, data)

    def restore(self) -> None:
        """Go back to the last saved state."""
        path = self.recipe.output / STATE
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["dflow"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
            if about["recipe"] != _fingerprint(self.recipe):
                raise InputError(
                    f"{self.recipe.output}: was trained with other settings of data, model or train; resume "
                    f"with its own {RECIPE} (only the budget, evaluation and output may differ)"
                )
            self.model.load_state_dict(_part(tensors, "model."))
            if self.averaged is not None:
                self.averaged.load_state_dict(_part(tensors, "averaged."))
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _part(tensors, "optimizer.").items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = tensor
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
            self.step, self.elapsed, self.best = (
                int(about["step"]),
                float(about["elapsed"]),
                float(about["best"]),
            )
            self.next_eval, self.next_save = float(about["next_eval"]), float(about["next_save"])
        except (SafetensorError, KeyError, RuntimeError, TypeError, json.JSONDecodeError) as error:
            raise InputError(
                f"{path}: truncated or foreign ({error}); the model folder itself may be whole, but this run "
                "cannot be resumed"
            ) from None
        metrics = self.recipe.output / METRICS
        if self.accelerator.is_main_process and metrics.is_file():
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if json.loads(line)["step"] <= self.step)
            files.write(metrics, kept.encode())

    # -- the rest --------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt("stopped without saving")
            self.interrupted = number
            self.say("stopping after this step; once more stops at once, without saving")

        try:
            old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # only the main thread may; elsewhere the defaults stand
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Flush trackers; a folder in which nothing was ever saved is removed."""
        self.accelerator.end_training()
        out = self.recipe.output
        saved = (out / STATE).is_file() or (out / "config.json").is_file()
        if self.accelerator.is_main_process and out.is_dir() and not saved:
            shutil.rmtree(out, ignore_errors=True)


#: Steps between two agreements of several processes that have no budget in minutes.
_STEPS_UNASKED = 16


def _mix(*numbers: int) -> int:
    """A seed that differs for every combination of ``numbers``."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _fingerprint(recipe: Recipe) -> str:
    """What has to be the same for a run to go on: everything but the budget, evaluation and output."""
    values = recipe.as_dict()
    free = {"steps", "minutes", "accumulation", "samples", "trackers"}
    free |= {"eval_every", "eval_minutes", "eval_chunks", "save_every"}
    values["train"] = {k: v for k, v in values["train"].items() if k not in free}
    values["data"] = {k: v for k, v in values["data"].items() if k != "folder"}
    kept = {k: values[k] for k in ("data", "model", "train")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
