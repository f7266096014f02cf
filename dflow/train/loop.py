"""Training with accelerate: one loop for every model, one process or many.

The batch of a step depends on the seed and the step alone, so a run on two processes sees the batches of a
run on one, and a resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from dflow import hf, objectives, zoo
from dflow.config import InputError, nearest
from dflow.data import files
from dflow.hf import manifest
from dflow.memory import keep_memory
from dflow.nn.batch_norm import StochasticBatchNorm
from dflow.terminal import shown
from dflow.train import schedule, shards
from dflow.train.recipe import METRICS, RECIPE, STATE, Recipe, load_recipe
from dflow.train.tasks import Batch, Task, mix, task_of

try:
    import fcntl
except ImportError:  # of systems other than Unix
    fcntl = None  # type: ignore[assignment]


class Preempted(KeyboardInterrupt):
    """A signal other than Ctrl-C asked for room: the state is saved, and the training can be resumed."""


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train, evaluate and save; returns the output folder, which is a model folder.

    Ctrl-C ends the step in progress, saves the state and raises `KeyboardInterrupt`; so do SIGTERM and
    SIGUSR1, by which schedulers ask for room, with `Preempted`. An evaluation in progress is done again.

    Args:
        recipe: what to train on what.
        resume: go on from the last whole state; from the beginning where a run was killed before its first.

    Raises:
        InputError: the output exists (and not ``resume``), nothing to resume, another process that trains
            into it, other settings or data than it was begun with, unusable ones; too many steps in a row
            without a finite loss, or no finite evaluation.
    """
    check_trackers(recipe.train.trackers)
    keep_memory()
    output = recipe.output
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output}: exists already; add --resume to go on ({resume_command(output)}), or choose another "
            "output"
        )
    states = _states(output)
    if resume and not states and (output / "config.json").exists():
        raise InputError(f"{output}: a model, but nothing to resume (no {STATE}); choose another output")
    if resume and not states and not _begun(output):
        raise InputError(f"{output}: nothing to resume, and not the beginning of a training; choose another")
    run = _Run(_resumed_task(recipe) if states else task_of(recipe, False))
    try:
        run.clean(resume)
        if states:
            run.restore(states)
        run.begin(bool(states))
        run.loop()
    except RuntimeError as error:
        if run.world == 1 or not _of_others(error):
            raise
        raise InputError(
            f"another process of this run is gone ({str(error).splitlines()[0]}); start all again with "
            f"--resume to go on from step {_step_of(output)}: {resume_command(output)}"
        ) from error
    finally:
        run.close()
    return output


class _Run:
    """One training in progress."""

    def __init__(self, task: Task) -> None:
        recipe, config = task.recipe, task.recipe.train
        self.task, self.recipe, self.config, self.model = task, recipe, config, task.model
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
        if (kind := self.accelerator.distributed_type) in _OTHERS:
            raise InputError(
                f"accelerate is configured for {kind.value}, which cuts the model into pieces that the saved "
                "state does not know; launch without it, and set train.shard=true for pieces that it knows"
            )
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        pieces = self.world * config.accumulation
        if config.batch_size % pieces:
            raise InputError(
                f"train.batch_size {config.batch_size} is no multiple of {pieces}, processes x accumulation"
            )
        objective, device = task.objective, self.accelerator.device
        self.base = task.closed_form(self.model)
        norms = [m for m in objective.modules() if isinstance(m, StochasticBatchNorm)]
        if norms and config.batch_size < 2 * config.accumulation:
            raise InputError(
                f"train.batch_size {config.batch_size} in {config.accumulation} pieces: normalisation takes "
                "pieces of two or more; raise batch_size or lower accumulation"
            )
        for norm in norms:
            norm.shared = self.world > 1
        # What is all in closed form has nothing to optimise.
        self.learned = any(True for _ in objective.parameters())
        self.sharded = config.shard and self.world > 1 and self.learned
        #: The model that is evaluated and saved; in pieces it has its weights only then.
        self.shown: Any = self.model
        if self.sharded:
            self.shown = shards.shell(self.model).to(device)
            shards.shard(objective, device, self.world)
        elif config.ema:
            self.shown = copy.deepcopy(self.model).to(device)
        #: Its weights: those that are trained, or their moving averages.
        self.averages: list[Tensor] = list(self.model.parameters())
        if config.ema:
            of = self.model if self.sharded else self.shown
            self.averages = [p.detach().clone() if self.sharded else p for p in of.parameters()]
        groups = schedule.parameter_groups(objective.parameters(), config.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups if self.learned else [torch.zeros(())],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.lock: int | None = None
        self.step, self.elapsed, self.best = 0, 0.0, math.inf
        # The step of the last evaluation, and the loss of the last step.
        self.evaluated, self.loss = -1, math.nan
        self.next_eval = self.next_save = 0.0
        # Steps left out, one after another up to now; the loss at which an evaluation was broken off.
        self.skipped, self.pending = 0, math.nan
        #: The signal that asked this process to stop, and when; and that on which all of them agreed.
        self.interrupted, self.interrupted_at, self.stop = 0, 0.0, 0
        # A folder with anything in it is not this run's to remove.
        self.saved = recipe.output.is_dir() and any(recipe.output.iterdir())
        self.wrapped: Any
        if config.compile:
            _compile(objective, device)
        if self.learned:
            # Whatever is in pieces exchanges its gradients by itself.
            self.wrapped = self.accelerator.prepare_model(objective, evaluation_mode=self.sharded)
            self.optimizer = self.accelerator.prepare(self.optimizer)
        else:
            self.wrapped = objective.to(device)

    # -- batches ---------------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """The whole batch of ``step``: the same on every process and in every run with this seed."""
        return self.task.batch(mix(self.config.seed, step))

    def fraction(self) -> float:
        """How much of the budget is spent, in [0, 1]."""
        return schedule.fraction(self.config, self.step, self.elapsed)

    # -- the loop --------------------------------------------------------------------------------------------

    def begin(self, resumed: bool) -> None:
        """Open the output and say what will happen."""
        out = self.recipe.output
        if not resumed:
            if self.accelerator.is_main_process:
                with hf.replacing(out) as folder:
                    (folder / RECIPE).write_text(self._recipe_text(), encoding="utf-8")
                    self.task.save(folder)
                self._lock()
            # Whenever it is killed from here on, it can be resumed.
            self.save_state()
        elif self.accelerator.is_main_process and not self._is_recipe(out / RECIPE):
            # The budget may have changed, or the place of the data: the next time, --resume goes on by these.
            with hf.replacing(out) as folder:
                (folder / RECIPE).write_text(self._recipe_text(), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("logs")
        self.say(
            f"{self.task.describe()}\n"
            f"{self.world} process{'es' * (self.world > 1)} on {self.accelerator.device.type}, "
            f"{'each with a piece of the model, ' * self.sharded}"
            f"precision {self.config.mixed_precision}, {torch.get_num_threads()} threads each; output {out}"
        )

    def _recipe_text(self) -> str:
        """The recipe as the output folder keeps it: with absolute paths, and the checksum of the data.

        With the checksum, whoever evaluates the model hears if the data have changed since.
        """
        data = replace(self.recipe.data.located(), checksum=self.task.checksum)
        return yaml.safe_dump(replace(self.recipe, data=data).as_dict(), sort_keys=False)

    def _is_recipe(self, path: Path) -> bool:
        """Whether a file holds the recipe of this run."""
        try:
            return path.read_text(encoding="utf-8") == self._recipe_text()
        except (OSError, UnicodeDecodeError):
            return False

    def loop(self) -> None:
        """Steps until the budget is spent."""
        config = self.config
        bar = self._bar()
        started = time.monotonic() - self.elapsed
        shown, counted, since = 0.0, 0.0, time.monotonic()
        with self._signals(), bar:
            if self.step == 0:
                self.next_eval, self.next_save = self._next(config.eval_every), self._next(config.save_every)
            if not math.isnan(self.pending):
                self._evaluate(self.pending, self.fraction() >= 1)
            elif self.fraction() >= 1 and self.evaluated != self.step:
                # Stopped at its last step, or its budget was lowered since.
                self._evaluate(self.loss, True)
            while self.fraction() < 1 and not self.stop:
                loss, count = self._one_step(started)
                self.loss = loss
                self.step += 1
                if self.world == 1:
                    self.stop = self.interrupted  # at once, where nobody else has to know
                shown, counted = loss, counted + count
                now = time.monotonic()
                if now - since > 1.0 or self.fraction() >= 1:
                    # Under layerwise and expected the loss is that of the conditioners, not of the model;
                    # under masked it is an estimate of a bound.
                    rate = counted / (now - since)
                    task = self.task
                    bar.set_postfix_str(f"{shown:.3f} {task.short}, {rate:,.0f} {task.things}/s")
                    counted, since = 0.0, now
                self._show(bar)
                done = self.fraction() >= 1
                if done or (self._due(self.next_eval, config.eval_every) and not self.stop):
                    self._evaluate(loss, done)
                if config.save_every and (done or self.step >= self.next_save):
                    self.next_save = self._next(config.save_every)
                    self.save_state()
            if self.stop and (self.fraction() < 1 or not math.isnan(self.pending)):
                self.save_state()
                message = (
                    f"stopped at step {self.step} and saved; go on with: {resume_command(self.recipe.output)}"
                )
                if self.stop == signal.SIGINT:
                    raise KeyboardInterrupt(message)
                raise Preempted(message)
        if self.accelerator.is_main_process:
            # Killed before it removed the last one, a run that is resumed has no step left to do it after.
            self._prune()
        if self.best == math.inf:
            raise InputError(
                f"{self.step:,} steps and no finite evaluation: there is no model; lower train.learning_rate"
            )
        self.say(f"done: {self.step:,} steps, best validation {self.best:.4f} {self.task.rank_unit}")

    def _budget(self) -> tuple[str, float, int]:
        """What is spent of the budget that is nearer to its end, and all of it: of steps or of seconds."""
        steps, minutes = self.config.steps, self.config.minutes
        if minutes is None or (steps and self.step * 60 * minutes > self.elapsed * steps):
            return "step", self.step, int(steps or 0)
        return "s", self.elapsed, round(60 * minutes)

    def _bar(self) -> tqdm[Any]:
        unit, spent, total = self._budget()
        return tqdm(
            total=total,
            initial=min(round(spent), total),
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
            smoothing=0.05,
            unit=unit,
            bar_format=_FORMATS[unit],
        )

    def _show(self, bar: tqdm[Any]) -> None:
        """Move the bar; it is that of the other budget from where this is nearer to its end."""
        if bar.disable:
            return
        unit, spent, total = self._budget()
        if unit != bar.unit:
            bar.reset(total)
            bar.initial = bar.n = bar.last_print_n = min(round(spent), total)
            bar.unit, bar.bar_format = unit, _FORMATS[unit]
        bar.n = min(round(spent), total)
        bar.update(0)

    def _evaluate(self, loss: float, done: bool) -> None:
        """Evaluate, and save unless saves have times of their own."""
        if self.skipped >= self.step:
            raise InputError(f"up to step {self.step} none had a finite loss; lower train.learning_rate")
        if not self.evaluate(loss):
            return
        self.next_eval = self._next(self.config.eval_every)
        if self.config.save_every is None or done:
            self.save_state()

    def _one_step(self, started: float) -> tuple[float, float]:
        """The loss in the task's unit, and the things (characters, dimensions) it was measured on."""
        config, accelerator = self.config, self.accelerator
        self._schedules()
        x, lengths = batch = self.batch(self.step)
        total = self.task.entries(batch)
        own = slice(self.rank, None, self.world)
        xs = x[own].chunk(config.accumulation)
        ls = [None] * len(xs) if lengths is None else list(lengths[own].chunk(config.accumulation))
        # Dropout and Gumbel noise come from the seed and the step too, so that resuming needs no more.
        torch.manual_seed(mix(config.seed + 1 + self.rank, self.step))
        self.model.train()
        nats, counts = torch.zeros((), device=accelerator.device), None
        number = self.task.turn(self.step)
        turn = () if number is None else (number,)
        for i, (piece, part) in enumerate(zip(xs, ls, strict=True)):
            last = i == len(xs) - 1
            alone = last or not self.learned
            with contextlib.nullcontext() if alone else accelerator.no_sync(self.wrapped):
                lengths = None if part is None else part.to(accelerator.device)
                loss, latents = self.wrapped(piece.to(accelerator.device), lengths, *turn)
                # Processes average their gradients: the mean over the whole batch needs the factor.
                if self.learned:
                    accelerator.backward(loss * (self.world / total))
            nats = nats + loss.detach()
            if latents is not None:
                counts = latents if counts is None else counts + latents
        norm = None
        if self.learned:
            # Without a limit nothing is clipped, and the norm tells whether the gradient is finite.
            norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip or math.inf)
            norm = None if norm is None else shards.whole(norm)
        total_nats, size = self._agree(nats, norm, time.monotonic() - started)
        count = self.task.count(batch)
        value = objectives.bits(total_nats, count)
        # A scaler of fp16 looks after gradients by itself.
        if not math.isfinite(value) or not (accelerator.scaler or math.isfinite(size)):
            self._leave_out(value if math.isfinite(size) else size)
            return value, count
        self.skipped = 0
        if self.learned:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.base is not None and counts is not None:
            momentum = self.task.momentum(self.step, self.fraction())
            self.base.update(accelerator.reduce(counts) if self.world > 1 else counts, momentum)
        if config.ema and self.learned:
            decay = schedule.average_decay(config.ema, self.step)
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, list(self.model.parameters()), 1 - decay)
        return value, count

    def _schedules(self) -> None:
        fraction = self.fraction()
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(self.config, self.step, fraction)
        self.task.schedule(self.step, fraction)

    def _intervals(self) -> list[Any]:
        return [list(schedule.interval(self.config, self.config.eval_every)), self.config.save_every]

    def _next(self, every: int | None) -> float:
        """The next evaluation or save: a step, or a time in seconds."""
        unit, size = schedule.interval(self.config, every)
        return size + (self.step if unit == "steps" else self.elapsed)

    def _due(self, when: float, every: int | None) -> bool:
        unit, _ = schedule.interval(self.config, every)
        return (self.step if unit == "steps" else self.elapsed) >= when

    def _agree(self, nats: Tensor, norm: Tensor | float | None, elapsed: float) -> tuple[float, float]:
        """Add up the loss of all processes; set the time spent and whether to stop, alike on all of them.

        The time is that of the main process, and a signal to one stops all.
        """
        device = self.accelerator.device
        mine = [elapsed if self.accelerator.is_main_process else 0.0]
        mine += [float(self.interrupted == number) for number in _SIGNALS]
        told = torch.tensor([0.0, *mine], dtype=torch.float64 if device.type != "mps" else None)
        told = told.to(device)
        told[0] = nats
        if self.world > 1:
            told = self.accelerator.reduce(told)
        total, self.elapsed, *stops = told.tolist()
        self.stop = next((number for number, stop in zip(_SIGNALS, stops, strict=True) if stop), 0)
        return total, 0.0 if norm is None else float(norm)

    def _leave_out(self, value: float) -> None:
        """Go on without this step; after too many in a row stop, with the weights of before them."""
        self.skipped += 1
        if self.accelerator.scaler:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        what = f"the loss or its gradient is {value} at step {self.step}"
        if self.skipped <= self.config.skip:
            return self.say(f"{what}: left out, {self.skipped} in a row")
        way = "lower train.learning_rate or train.clip"
        if self.step < self.skipped:
            raise InputError(f"{what}, and was from the beginning; {way}")
        # Resumed, it has as many steps to recover.
        self.step, self.skipped = self.step + 1, 0
        self.save_state()
        raise InputError(
            f"{what}, and of the {self.config.skip} steps before it: stopped with the last good weights; "
            f"add --resume to try the next steps ({resume_command(self.recipe.output)}), or start anew with "
            f"{way}"
        )

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(self, loss: float) -> bool:
        """Score the validation data; keep the model if it is the best so far; show samples.

        False if it was broken off to stop the training: it is done again when that is resumed.
        """
        task, model = self.task, self.shown
        model.train(False)
        if model is not self.model:
            # What is counted, not learned, has its own memory.
            for old, new in zip(model.buffers(), self.model.buffers(), strict=True):
                old.copy_(new)
        if self.sharded:
            shards.fill(model, self.averages)
        kept = task.settle(
            model, (self._on_device(self.batch(self.step + i)) for i in range(self.config.refit_batches))
        )
        found = self._bits(model)
        self.pending = loss if self.stop else math.nan
        if not self.stop:
            self.evaluated = self.step
            self._keep(model, loss, found, task.rank(model, found, self.accelerator.device))
        task.unsettle(model, kept)
        if self.sharded:
            shards.empty(model)
        self.accelerator.wait_for_everyone()
        return not self.stop

    def _keep(self, model: Any, loss: float, found: float, rank: float) -> None:
        """The model, if it is the best; what was found, in numbers and samples."""
        task, improved = self.task, rank < self.best
        if self.accelerator.is_main_process:
            if improved:
                hf.save(model, self.recipe.output)
                self.saved = True
            record = {
                "step": self.step,
                "seconds": round(self.elapsed, 1),
                "train_loss_bits": round(loss, 5),
                "valid_bits": round(found, 5),
                "unit": task.unit,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
            } | dict(task.shares)
            with (self.recipe.output / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            of = f" {task.rank_unit}" if task.rank_unit != task.unit else ""
            note = f"best{of and ' by' + of}" if improved else f"best {self.best:.4f}{of}"
            self.say(f"step {self.step:,}: valid {found:.4f} {task.unit} ({task.kind}, {note})")
            if self.config.samples:
                for line in task.show(model, self.step, self.accelerator.device):
                    self.say(line)
        self.best = min(self.best, rank)
        self.accelerator.log({"loss_bits": loss, "valid_bits": found}, step=self.step)

    @torch.no_grad()
    def _bits(self, model: Any) -> float:
        """What the validation data cost in the task's unit, spread over the processes."""
        device = self.accelerator.device
        batches, count = self.task.valid(device, self.rank, self.world)
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            # Who has to make room within seconds cannot finish: one process that stops is told at the end.
            if self.interrupted:
                break
            nats += self.task.nats(model, batch)
        return objectives.bits(self._agree(nats, None, self.elapsed)[0], count)

    def _on_device(self, batch: Batch) -> Batch:
        x, lengths = batch
        device = self.accelerator.device
        return x.to(device), None if lengths is None else lengths.to(device)

    # -- state -----------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """All that resuming needs, in one file that is replaced whole."""
        tensors = {}
        for name, tensor in self._tensors().items():
            # One after the other, so that only what is saved is ever there whole; all processes take part.
            tensor = shards.whole(tensor.detach())
            if self.accelerator.is_main_process:
                # Tied weights share memory, which the format refuses: each name gets its own copy.
                tensors[name] = tensor.cpu().clone().contiguous()
        if not self.accelerator.is_main_process:
            return
        about = {
            "step": self.step,
            "elapsed": self.elapsed,
            "best": self.best,
            "next_eval": self.next_eval,
            "next_save": self.next_save,
            "intervals": self._intervals(),
            "skipped": self.skipped,
            "pending": self.pending,
            "recipe": _fingerprint(self.recipe),
            "data": self.task.checksum,
            "evaluated": self.evaluated,
            "loss": self.loss,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        out = self.recipe.output
        self.saved |= self.step > 0
        name = f"state-{self.step:09d}.safetensors"
        with hf.replacing(out) as folder:
            safetensors.torch.save_file(tensors, folder / STATE, {"dflow": json.dumps(about)})
            if self.config.keep > 1:
                shutil.copyfile(folder / STATE, folder / name)
        self._prune()

    def _prune(self) -> None:
        """Remove states that are older than those to be kept."""
        out = self.recipe.output
        # The newest of these is a copy of the last state, which may be the one that is damaged.
        kept = self.config.keep if self.config.keep > 1 else 0
        hf.remove(out, [p.name for p in _states(out) if p.name != STATE][kept:])

    def _tensors(self) -> dict[str, Tensor]:
        """What a state holds, by name; in pieces where the model is."""
        model = self.model.state_dict(keep_vars=True)
        tensors = {f"model.{k}": v for k, v in model.items()}
        if self.config.ema:
            average = {id(p): a for p, a in zip(self.model.parameters(), self.averages, strict=True)}
            counted = self.shown.state_dict()
            tensors |= {f"averaged.{k}": average.get(id(v), counted[k]) for k, v in model.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        return tensors

    def _pieces(self) -> dict[str, Any]:
        """What the tensors of a state that are in pieces here are cut like, by name."""
        if not self.sharded:
            return {}
        model = {k: v for k, v in self.model.state_dict(keep_vars=True).items() if shards.is_piece(v)}
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {f"optimizer.{i}.{k}": p for i, p in enumerate(learned) for k in ("exp_avg", "exp_avg_sq")}
        return {f"{of}.{k}": v for of in ("model", "averaged") for k, v in model.items()} | moments

    def restore(self, states: list[Path]) -> None:
        """Go back to the last saved state, or the last one before it that is whole."""
        for path in states:
            try:
                self._restore(path)
                return self._check_best()
            except _Damaged as error:
                self.say(str(error))
        raise InputError(
            f"{states[0]}: truncated or foreign; the model folder itself may be whole, but this run cannot "
            "be resumed"
        )

    def _check_best(self) -> None:
        """Begin anew with the best model where it is damaged or gone."""
        out = self.recipe.output
        try:
            hf.verify(out, ["config.json", "model.safetensors"])
            whole = (out / "model.safetensors").is_file()
        except InputError:
            whole = False
        if self.best < math.inf and not whole:
            self.say(f"{out}: the best model is damaged or gone; the next evaluation is the best anew")
            self.best, self.evaluated = math.inf, -1

    def _restore(self, path: Path) -> None:
        try:
            hf.verify(path.parent, [path.name])
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["dflow"])
        except (InputError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise _Damaged(str(error) if isinstance(error, InputError) else f"{path}: {error}") from None
        if about.get("recipe") != _fingerprint(self.recipe) and not _same_run(self.recipe):
            raise _other_settings(self.recipe)
        files.check_same(self.recipe.data.name, self.task.checksum, about.get("data"))
        try:
            with safetensors.safe_open(path, "pt") as file:
                like = self._pieces()
                tensors = {
                    k: shards.piece(file, k, like[k]) if k in like else file.get_tensor(k)
                    for k in file.keys()  # noqa: SIM118 - not a dict
                }
            self.model.load_state_dict(_part(tensors, "model."))
            if self.config.ema:
                own = self._tensors()
                for name in like:
                    if name.startswith("averaged."):
                        own[name].copy_(tensors.pop(name))
                self.shown.load_state_dict(_part(tensors, "averaged."), strict=not like)
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
            if about.get("intervals", self._intervals()) != self._intervals():
                # What was due by other settings no longer is; nor may steps be taken for seconds.
                self.next_eval = self._next(self.config.eval_every)
                self.next_save = self._next(self.config.save_every)
            self.skipped, self.pending = int(about["skipped"]), float(about["pending"])
            # States of before these were kept were mostly written by an evaluation.
            self.evaluated, self.loss = about.get("evaluated", self.step), about.get("loss", math.nan)
            if self.accelerator.scaler and about["scaler"]:
                self.accelerator.scaler.load_state_dict(about["scaler"])
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _Damaged(f"{path}: not a state of this run ({error})") from None
        metrics = self.recipe.output / METRICS
        if self.accelerator.is_main_process and metrics.is_file():
            files.write(metrics, "".join(_until(metrics, self.step)).encode())

    def clean(self, resume: bool) -> None:
        """Remove what a killed process left behind; a beginning without a state is begun again."""
        if resume and self.accelerator.is_main_process and self.recipe.output.is_dir():
            self._lock()
            hf.clean(self.recipe.output)
        self.accelerator.wait_for_everyone()

    def _lock(self) -> None:
        """Keep others from training into the same folder, where the system can."""
        if fcntl is None or self.lock is not None:
            return
        self.lock = os.open(self.recipe.output, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.recipe.output}: another process is training into this folder; wait for it, or choose "
                "another output"
            ) from None
        except OSError:
            return  # a file system without locks

    # -- the rest --------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(shown(text, sys.stdout))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if not self.interrupted:
                self.interrupted, self.interrupted_at = number, now
                self.say("stopping after this step; once more stops at once, without saving")
            elif now - self.interrupted_at > _ECHO:
                raise KeyboardInterrupt(self._without_saving())

        try:
            old = {s: signal.signal(s, note) for s in _SIGNALS}
        except ValueError:  # only the main thread may; elsewhere the defaults stand
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _without_saving(self) -> str:
        """What is left of a run that is stopped for the second time."""
        out = self.recipe.output
        if not self.saved:
            return "stopped at once, before anything was saved"
        return f"stopped at once, without saving; go on from step {_step_of(out)} with: {resume_command(out)}"

    def close(self) -> None:
        """Flush trackers, leave the other processes; a folder in which nothing was ever saved is removed."""
        # Before the process group goes: torch's reducer holds it too, and if that were the last to let go, it
        # would wait for the group's threads with the interpreter's lock held, which they may be waiting for.
        self.wrapped = None
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()
        if self.lock is not None:
            os.close(self.lock)
        out = self.recipe.output
        if self.accelerator.is_main_process and out.is_dir() and not self.saved:
            shutil.rmtree(out, ignore_errors=True)


#: Bars by what they count; seconds a second tell nothing.
_FORMATS = {"step": None, "s": "{l_bar}{bar}| {n_fmt}/{total_fmt} s [{elapsed}<{remaining}{postfix}]"}

#: Ways of accelerate to distribute a model of which no process has the whole.
_OTHERS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

#: Seconds within which a second signal is the first one again: of Ctrl-C under a launcher a process hears
#: from the terminal and from the launcher.
_ECHO = 1.0

#: By which people and schedulers ask a training to stop; not every system has the last.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def _compile(objective: torch.nn.Module, device: torch.device) -> None:
    """Compile a module in place: its names of weights, and what is drawn in it, stay as they are."""
    try:
        torch.compile(torch.cos)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        raise InputError(
            f"train.compile: no compiler that works ({str(error).splitlines()[0]}); install one (g++; for a "
            "GPU Triton as well), or leave out train.compile"
        ) from error
    # That complex numbers (rotary positions) are left to what there is, and that it looks at all of a tensor.
    for said in ("Torchinductor does not support code generation for complex", "The .grad attribute of a"):
        warnings.filterwarnings("ignore", said)
    objective.compile(options={"fallback_random": True})


class _Damaged(Exception):
    """A file of a training state that cannot be used."""


def _of_others(error: RuntimeError) -> bool:
    """Whether a library of communication says that it cannot reach another process."""
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "closed by peer", "reset by peer")
    )


def _step_of(output: Path) -> str:
    """The step of the last saved state, to be told."""
    try:
        with safetensors.safe_open(output / STATE, "pt") as file:
            return str(json.loads(file.metadata()["dflow"])["step"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return "0"


def _states(output: Path) -> list[Path]:
    """Training states in a folder, the last first."""
    older = sorted(output.glob("state-*.safetensors"), reverse=True)
    return [path for path in (output / STATE, *older) if path.is_file()]


def _begun(output: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that was killed before its first state.

    The manifest lists the recipe before the file is moved into the folder, and other files are moved first.
    """
    if not output.exists():
        return True
    names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    return not names or RECIPE in names or RECIPE in manifest.read(output)


def _until(metrics: Path, step: int) -> Iterator[str]:
    """Lines up to a step; one that a machine broke off in the middle is none."""
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                yield line + "\n"


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def resume_command(output: Path) -> str:
    """The command that goes on with the training in ``output``."""
    name = str(output)
    return shlex.join(["dflow", "train", "--resume", "./" + name if name.startswith("-") else name])


def check_trackers(names: list[str]) -> None:
    """Raise `InputError` unless accelerate knows each tracker and what it needs is installed.

    Accelerate itself warns of one that is missing and goes on without any.
    """
    known = {str(kind): kind for kind in LOGGER_TYPE_TO_CLASS}
    ready = {str(kind) for kind in get_available_trackers()}
    for name in filter(None, names):
        if name not in known and name != "all":
            raise InputError(f"train.trackers: no tracker {name!r}; {nearest(name, [*known, 'all'])}")
    missing = [name for name in names if name in known and name not in ready]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        rest = ",".join(name for name in names if name not in missing)
        raise InputError(
            f"train.trackers: {', '.join(missing)} not installed; pip install {packages}, or train "
            f"without {'it' if len(missing) == 1 else 'them'}: --set 'train.trackers=[{rest}]'"
        )


def _resumed_task(recipe: Recipe) -> Task:
    """The task of a run that goes on; other settings or data are refused before anything is built."""
    try:
        before = load_recipe(recipe.output / RECIPE)
    except InputError:
        return task_of(recipe, True)  # the state tells whether it is the same run
    then, now = _fixed(before), _fixed(recipe)
    if before.family != recipe.family or any(then[part] != now[part] for part in ("data", "train")):
        raise _other_settings(recipe)
    expected = recipe.data.checksum or before.data.checksum
    try:
        return task_of(replace(recipe, data=replace(recipe.data, checksum=expected)), True)
    except files.Changed:
        if files.absolute(before.data.name) == files.absolute(recipe.data.name):
            raise
        raise _other_settings(recipe, f"data.name: {before.data.name} then, {recipe.data.name} now") from None


def _same_run(recipe: Recipe) -> bool:
    """Whether the output is that of ``recipe``, by the recipe that it keeps.

    Fingerprints of versions that had other settings, or kept the name of a file, are others.
    """
    try:
        hf.verify(recipe.output, [RECIPE])
        return _fixed(load_recipe(recipe.output / RECIPE)) == _fixed(recipe)
    except InputError:
        return False


def _other_settings(recipe: Recipe, differences: str = "") -> InputError:
    """What to say where the output holds another run."""
    return InputError(
        f"{recipe.output}: was trained with other settings ({differences or _differences(recipe)}); only the "
        "budget, the times of evaluation and the output may differ. With its own: "
        f"{resume_command(recipe.output)}"
    )


def _fixed(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What has to be the same for a run to go on: all that the result depends on but the budget.

    Files may have moved: they are known by their checksum, which the state has.
    """
    values = recipe.as_dict()
    free = {"steps", "minutes", "accumulation", "samples", "trackers", "shard", "compile"}
    free |= {"eval_every", "eval_minutes", "save_every", "keep", "skip"}
    if zoo.find(recipe.family).pieces_matter:
        free.remove("accumulation")  # pieces are normalised by themselves
    values["train"] = {k: v for k, v in values["train"].items() if k not in free}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("folder", "store", "checksum")}
    # Runs that were begun before there was this setting go on.
    values["data"] = {k: v for k, v in values["data"].items() if (k, v) != ("split_by", "tail")}
    if recipe.data.is_path:
        values["data"]["name"] = "a path"
    return {k: values[k] for k in ("data", "model", "train")}


def _fingerprint(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(_fixed(recipe), sort_keys=True).encode()).hexdigest()


def _differences(recipe: Recipe) -> str:
    """What is not as it was when the run in the output was begun, in words."""
    try:
        before = _fixed(load_recipe(recipe.output / RECIPE))
    except InputError:
        return "its own recipe.yaml cannot be read"
    now, found = _fixed(recipe), []
    for part in now:
        for name in sorted(before[part].keys() | now[part].keys(), key=lambda n: (n != "family", n)):
            old, new = (values[part].get(name) for values in (before, now))
            if old != new:
                found.append(f"{part}.{name}: {old} then, {new} now")
    return "; ".join(found[:4]) or "settings that this version of dflow knows otherwise"
