"""Training with accelerate: one loop for every model, one process or many.

The batch of a step depends on the seed and the step alone, so a run on two processes sees the batches of a
run on one, and a resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from dflow import hf, objectives
from dflow.config import InputError
from dflow.core import Context, Known
from dflow.memory import keep_memory
from dflow.nn.batch_norm import StochasticBatchNorm
from dflow.ops.devices import moved, widest
from dflow.terminal import shown
from dflow.threads import Suited
from dflow.train import identity, machine, schedule, state
from dflow.train.footprint import footprint
from dflow.train.identity import resume_command
from dflow.train.material import Batch, mix
from dflow.train.methods import Judgement
from dflow.train.recipe import METRICS, RECIPE, STATE, Recipe
from dflow.train.tasks import Task, task_of
from dflow.train.weights import Weights


class Preempted(KeyboardInterrupt):
    """A signal other than Ctrl-C asked for room: the state is saved, and the training can be resumed."""


def train(
    recipe: Recipe,
    resume: bool = False,
    device: torch.device | None = None,
    watch: machine.Watch | None = None,
) -> Path:
    """Train, evaluate and save; returns the output folder, which is a model folder.

    Ctrl-C ends the step in progress, saves the state and raises `KeyboardInterrupt`; so do SIGTERM and
    SIGUSR1, by which schedulers ask for room, with `Preempted`. An evaluation in progress is done again.

    Args:
        recipe: what to train on what.
        resume: go on from the last whole state; from the beginning where a run was killed before its first.
        device: on which one process trains; None for the one that accelerate chooses, for each process.
        watch: who follows it, see `dflow.train.machine.Watch`; then there is no bar but on a terminal.

    Raises:
        InputError: the output exists (and not ``resume``), nothing to resume, another process that trains
            into it, other settings or data than it was begun with, unusable ones; too many steps in a row
            without a finite loss, or no finite evaluation.
    """
    machine.check_trackers(recipe.train.trackers)
    keep_memory()
    recipe = machine.with_precision(recipe, device)
    output = recipe.output
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output}: exists already; add --resume to go on ({resume_command(output)}), or choose another "
            "output"
        )
    states = state.states(output)
    if resume and not states and (output / "config.json").exists():
        raise InputError(f"{output}: a model, but nothing to resume (no {STATE}); choose another output")
    if resume and not states and not identity.begun(output):
        raise InputError(f"{output}: nothing to resume, and not the beginning of a training; choose another")
    task = identity.resumed_task(recipe) if states else task_of(recipe, False)
    config = task.model.config
    piece = recipe.train.batch_size // recipe.train.accumulation
    Suited.to(config.record.multiplications(config.settings(), piece))
    run = Run(task, device, watch)
    try:
        run.clean(resume)
        if states:
            run.progress = run.states.restore(states)
        run.begin(bool(states))
        run.loop()
    except RuntimeError as error:
        if run.world == 1 or not machine.lost_process(error):
            raise
        raise InputError(
            f"another process of this run is gone ({str(error).splitlines()[0]}); start all again with "
            f"--resume to go on from step {state.step_of(output)}: {resume_command(output)}"
        ) from error
    finally:
        run.close()
    return output


class Run:
    """One training in progress.

    Attributes:
        progress: the numbers that a state holds beside the weights.
        stop: the signal on which all processes agreed to stop, 0 for none.
        saved: whether the output folder holds something that is not this run's to remove.
    """

    def __init__(self, task: Task, device: torch.device | None, watch: machine.Watch | None = None) -> None:
        self.watch = watch
        self.task, self.recipe, self.config = task, task.recipe, task.recipe.train
        self.accelerator = machine.accelerator_of(self.recipe, device)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self._check_batch_size()
        self.base = task.method.closed_form(task.model)
        self.footprint = footprint(task, self.world)
        self.weights = Weights(task, self.accelerator)
        self.states = state.States(task, self.weights, self.say)
        self.progress = state.Progress()
        self.signals = machine.Signals(
            lambda: self.say("stopping after this step; once more stops at once, without saving"),
            self._without_saving,
        )
        self.stop = 0
        self.saved = self.recipe.output.is_dir() and any(self.recipe.output.iterdir())

    def _check_batch_size(self) -> None:
        """Refuse a batch that cannot be cut into pieces; tell normalisations of the other processes."""
        config, pieces = self.config, self.world * self.config.accumulation
        if config.batch_size % pieces:
            raise InputError(
                f"train.batch_size {config.batch_size} is no multiple of {pieces}, processes x accumulation"
            )
        norms = [m for m in self.task.method.objective.modules() if isinstance(m, StochasticBatchNorm)]
        if norms and config.batch_size < 2 * config.accumulation:
            raise InputError(
                f"train.batch_size {config.batch_size} in {config.accumulation} pieces: normalisation takes "
                "pieces of two or more; raise batch_size or lower accumulation"
            )
        for norm in norms:
            norm.shared = self.world > 1

    def batch(self, step: int) -> Batch:
        """The whole batch of ``step``: the same on every process and in every run with this seed."""
        return self.task.data.batch(mix(self.config.seed, step))

    def fraction(self) -> float:
        """How much of the budget is spent, in [0, 1]."""
        return self.progress.fraction(self.config)

    # -- beginning and end -----------------------------------------------------------------------------------

    def clean(self, resume: bool) -> None:
        """Remove what a killed process left behind; a beginning without a state is begun again."""
        if resume and self.accelerator.is_main_process and self.recipe.output.is_dir():
            self.states.lock()
            hf.clean(self.recipe.output)
        self.accelerator.wait_for_everyone()

    def begin(self, resumed: bool) -> None:
        """Open the output and say what will happen."""
        output, is_main = self.recipe.output, self.accelerator.is_main_process
        # With the checksum, an evaluation of the model finds out if the data have changed since.
        data = replace(self.recipe.data.located(), checksum=self.task.data.checksum)
        text = yaml.safe_dump(replace(self.recipe, data=data).as_dict(), sort_keys=False)
        # The budget may have changed, or the place of the data: the next --resume goes on by these.
        if is_main and not (resumed and _holds(output / RECIPE, text)):
            with hf.replacing(output) as folder:
                (folder / RECIPE).write_text(text, encoding="utf-8")
                if not resumed:
                    self.task.data.save(folder)
        if not resumed:
            if is_main:
                self.states.lock()
            # Whenever it is killed from here on, it can be resumed.
            self.save_state()
        self.accelerator.wait_for_everyone()
        machine.start_trackers(self.accelerator, self.recipe)
        self.say(
            f"{self.task.description}\n"
            f"{self.world} process{'es' * (self.world > 1)} on {self.accelerator.device.type}, "
            f"{'each with a piece of the model, ' * self.weights.sharded}"
            f"precision {self.config.mixed_precision}, {torch.get_num_threads()} threads each; "
            f"output {output}" + (f"\n{self.footprint}" if self.footprint else "")
        )

    def save_state(self) -> None:
        """Save all that resuming needs."""
        self.saved |= self.accelerator.is_main_process and self.progress.step > 0
        self.states.save(self.progress)

    def say(self, text: str) -> None:
        """Print above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(shown(text, sys.stdout))

    def _without_saving(self) -> str:
        """The last message of a run that is stopped for the second time."""
        output = self.recipe.output
        if not self.saved:
            return "stopped at once, before anything was saved"
        return (
            f"stopped at once, without saving; go on from step {state.step_of(output)} with: "
            f"{resume_command(output)}"
        )

    def close(self) -> None:
        """Flush trackers, leave the other processes; a folder in which nothing was ever saved is removed."""
        # Before the process group goes: torch's reducer holds it too, and if that were the last to let go, it
        # would wait for the group's threads with the interpreter's lock held, which they may be waiting for.
        self.weights.objective = None
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()
        self.states.unlock()
        output = self.recipe.output
        if self.accelerator.is_main_process and output.is_dir() and not self.saved:
            shutil.rmtree(output, ignore_errors=True)

    # -- steps -----------------------------------------------------------------------------------------------

    def loop(self) -> None:
        """Steps until the budget is spent."""
        progress, config, data = self.progress, self.config, self.task.data
        started = time.monotonic() - progress.elapsed
        bar = machine.Bar(
            config,
            progress.step,
            progress.elapsed,
            data.short,
            data.things,
            not self.accelerator.is_main_process,
            self.watch,
        )
        with self.signals.noted(), bar.bar:
            self._catch_up()
            while self.fraction() < 1 and not self.stop:
                progress.loss, count = self._one_step(started)
                progress.step += 1
                if self.world == 1:
                    self.stop = self.signals.number  # at once, where nobody else has to know
                done = self.fraction() >= 1
                bar.show(progress.step, progress.elapsed, progress.loss, count, done)
                if done or (progress.is_due(config) and not self.stop):
                    self._evaluate(progress.loss, done)
                if config.save_every and (done or progress.step >= progress.next_save):
                    progress.next_save = progress.after(config, config.save_every)
                    self.save_state()
            if self.stop and (self.fraction() < 1 or not math.isnan(progress.pending)):
                self.save_state()
                command = resume_command(self.recipe.output)
                message = f"stopped at step {progress.step} and saved; go on with: {command}"
                raise KeyboardInterrupt(message) if self.stop == signal.SIGINT else Preempted(message)
        if self.accelerator.is_main_process:
            # Killed before it removed the last one, a run that is resumed has no step left to do it after.
            self.states.prune()
        if progress.best == math.inf:
            raise InputError(
                f"{progress.step:,} steps and no finite evaluation: there is no model; lower "
                "train.learning_rate"
            )
        self._write_card()
        self.say(f"done: {progress.step:,} steps, best validation {progress.best:.4f} {self._rank_unit()}")

    def _write_card(self) -> None:
        """Say in the card of the model what it was trained on, and its best figure on the validation data."""
        data, kind = self.recipe.data, self.task.method.kind
        name = Path(data.name).name if data.is_path else data.name
        figure = hf.Figure(
            name, "valid", self.task.data.protocol, self.progress.best, self._rank_unit(), kind
        )
        if self.accelerator.is_main_process:
            hf.write_card(self.recipe.output, figures=[figure], calls=self.task.model.calls_to_draw)

    def _catch_up(self) -> None:
        """Begin to count, and do the evaluation that was broken off or is missing at the end."""
        progress, config = self.progress, self.config
        if progress.step == 0:
            progress.next_eval = progress.after(config, config.eval_every)
            progress.next_save = progress.after(config, config.save_every)
        if not math.isnan(progress.pending):
            self._evaluate(progress.pending, self.fraction() >= 1)
        elif self.fraction() >= 1 and progress.evaluated != progress.step:
            # Stopped at its last step, or its budget was lowered since.
            self._evaluate(progress.loss, True)

    def _one_step(self, started: float) -> tuple[float, float]:
        """The loss in the unit of the data, and the things (characters, dimensions) it was measured on."""
        config, accelerator, weights, step = self.config, self.accelerator, self.weights, self.progress.step
        fraction = self.fraction()
        for group in weights.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(config, step, fraction)
        self.task.method.schedule(step, fraction)
        x, lengths = batch = self.batch(step)
        known = self.task.data.known(mix(config.seed, step))
        # Of the entries of the batch, the share that the loss is of.
        share_hidden = 1.0 if known is None else int((~known).sum()) / len(known)
        entries = self.task.data.entries(batch) * share_hidden
        share = slice(self.rank, None, self.world)
        xs = x[share].chunk(config.accumulation)
        ls = [None] * len(xs) if lengths is None else list(lengths[share].chunk(config.accumulation))
        # Dropout and Gumbel noise come from the seed and the step too, so that resuming needs no more.
        torch.manual_seed(mix(config.seed + 1 + self.rank, step))
        self.task.model.train()
        nats, counts = torch.zeros((), device=accelerator.device), None
        turn: tuple[Any, ...] = self.task.method.turn(step)
        if known is not None:
            turn = (*turn, objectives.KnownMask(known))
        for i, piece in enumerate(zip(xs, ls, strict=True)):
            with weights.exchanging(last=i == len(xs) - 1):
                loss, latents = weights.objective(*self._on_device(piece), *turn)
                # Processes average their gradients: the mean over the whole batch needs the factor.
                weights.backward(loss * (self.world / entries))
            nats = nats + loss.detach()
            if latents is not None:
                counts = latents if counts is None else counts + latents
        total, norm = self._agree(nats, time.monotonic() - started, weights.clip())
        count = self.task.data.count(batch) * share_hidden
        value = objectives.bits(total, count)
        # A scaler of fp16 looks after gradients by itself.
        if not math.isfinite(value) or not (accelerator.scaler or math.isfinite(norm)):
            self._leave_out(value if math.isfinite(norm) else norm)
            return value, count
        self.progress.skipped = 0
        weights.step(step)
        if self.base is not None and counts is not None:
            momentum = self.task.method.momentum(step, self.fraction())
            self.base.update(accelerator.reduce(counts) if self.world > 1 else counts, momentum)
        return value, count

    def _on_device(self, batch: Batch) -> Batch:
        x, lengths = batch
        device = self.accelerator.device
        return moved(x, device), None if lengths is None else lengths.to(device)

    def _agree(self, nats: Tensor, elapsed: float, norm: Tensor | None = None) -> tuple[float, float]:
        """The loss, summed over all processes, and the norm; set the time spent and whether to stop on all.

        The time is that of the main process, and a signal to one stops all.
        """
        device = self.accelerator.device
        time_spent = elapsed if self.accelerator.is_main_process else 0.0
        stops = [float(self.signals.number == number) for number in machine.SIGNALS]
        message = torch.tensor([0.0, 0.0, time_spent, *stops], dtype=widest(device))
        message = message.to(device)
        message[0] = nats
        if norm is not None:
            message[1] = norm / self.world  # the same on all processes
        if self.world > 1:
            message = self.accelerator.reduce(message)
        # The one place at which a step waits for an accelerator.
        total, whole_norm, self.progress.elapsed, *stops = message.tolist()
        self.stop = next((n for n, stop in zip(machine.SIGNALS, stops, strict=True) if stop), 0)
        return total, whole_norm

    def _leave_out(self, value: float) -> None:
        """Go on without this step; after too many in a row stop, with the weights of before them."""
        progress = self.progress
        progress.skipped += 1
        self.weights.leave_out()
        what = f"the loss or its gradient is {value} at step {progress.step}"
        if progress.skipped <= self.config.skip:
            return self.say(f"{what}: left out, {progress.skipped} in a row")
        way = "lower train.learning_rate or train.clip"
        if progress.step < progress.skipped:
            raise InputError(f"{what}, and was from the beginning; {way}")
        # Resumed, it has as many steps to recover.
        progress.step, progress.skipped = progress.step + 1, 0
        self.save_state()
        raise InputError(
            f"{what}, and of the {self.config.skip} steps before it: stopped with the last good weights; "
            f"add --resume to try the next steps ({resume_command(self.recipe.output)}), or start anew with "
            f"{way}"
        )

    # -- evaluation ------------------------------------------------------------------------------------------

    def _evaluate(self, loss: float, done: bool) -> None:
        """Evaluate, and save unless saves have times of their own."""
        progress = self.progress
        if progress.skipped >= progress.step:
            raise InputError(f"up to step {progress.step} none had a finite loss; lower train.learning_rate")
        self.evaluate(loss)
        if self.stop:
            return
        progress.next_eval = progress.after(self.config, self.config.eval_every)
        if self.config.save_every is None or done:
            self.save_state()

    def evaluate(self, loss: float) -> None:
        """Score the validation data; keep the model if it is the best so far; show samples.

        Broken off to stop the training, an evaluation is done again when that is resumed.
        """
        progress, method, device = self.progress, self.task.method, self.accelerator.device
        batches = map(self._conditioned, range(progress.step, progress.step + self.config.refit_batches))
        with self.weights.evaluation() as model, method.ready(model, batches):
            bits = self._bits(model)
            progress.pending = loss if self.stop else math.nan
            if not self.stop:
                progress.evaluated = progress.step
                self._keep(model, loss, bits, method.judge(model, bits, device))
        self.accelerator.wait_for_everyone()

    def _conditioned(self, step: int) -> tuple[Tensor, Context]:
        """The symbols that a step learns, and the context in which it does."""
        x, lengths = self._on_device(self.batch(step))
        known = self.task.data.known(mix(self.config.seed, step))
        return x, Context(lengths=lengths, known=None if known is None else Known(x, known))

    def _rank_unit(self) -> str:
        return self.task.method.rank_unit or self.task.data.unit

    @torch.no_grad()
    def _bits(self, model: Any) -> float:
        """The cost of the validation data in their unit, spread over the processes."""
        device = self.accelerator.device
        batches, count = self.task.data.valid(device, self.rank, self.world)
        # The same noise at every evaluation, so that two of them compare.
        seed = mix(self.config.seed, self.rank)
        torch.manual_seed(seed)
        noise = torch.Generator(device).manual_seed(seed)
        nats = torch.zeros((), dtype=widest(device), device=device)
        for batch in batches:
            # A process that has to make room within seconds cannot finish: the others learn of it at the end.
            if self.signals.number:
                break
            nats += self.task.method.nats(model, batch, noise)
        return objectives.bits(self._agree(nats, self.progress.elapsed)[0], count)

    def _keep(self, model: Any, loss: float, bits: float, judgement: Judgement) -> None:
        """Save the model if it is the best; report its figures and samples."""
        progress, data, unit = self.progress, self.task.data, self._rank_unit()
        improved = judgement.rank < progress.best
        if self.accelerator.is_main_process:
            if improved:
                hf.save(model, self.recipe.output)
                self.saved = True
            record = {
                "step": progress.step,
                "seconds": round(progress.elapsed, 1),
                "train_loss_bits": round(loss, 5),
                "valid_bits": round(bits, 5),
                "unit": data.unit,
                "learning_rate": self.weights.optimizer.param_groups[0]["lr"],
            } | dict(judgement.shares)
            with (self.recipe.output / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            of = f" {unit}" if unit != data.unit else ""
            note = f"best{of and ' by' + of}" if improved else f"best {progress.best:.4f}{of}"
            self.say(
                f"step {progress.step:,}: valid {bits:.4f} {data.unit} ({self.task.method.kind}, {note})"
            )
            if self.config.samples:
                lines = data.samples(model, progress.step, self.accelerator.device)
                for line in [*judgement.notes, *lines]:
                    self.say(line)
        progress.best = min(progress.best, judgement.rank)
        self.accelerator.log({"loss_bits": loss, "valid_bits": bits}, step=progress.step)


def _holds(path: Path, text: str) -> bool:
    """Whether a file holds this text."""
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False
