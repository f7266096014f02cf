"""What a training runs on: processes and trackers of accelerate, a compiler, signals, a terminal."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, patch_environment
from torch import nn
from tqdm import tqdm

from dflow.config import InputError, nearest
from dflow.train import schedule
from dflow.train.recipe import RECIPE, Recipe, TrainConfig, load_recipe

#: Ways of accelerate to distribute a model of which no process has the whole.
_CUT_MODELS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

#: Signals by which people and schedulers ask a training to stop; not every system has the last.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

#: Seconds within which a second signal is an echo of the first: under a launcher a process gets Ctrl-C from
#: the terminal and from the launcher.
ECHO = 1.0
#: Products by which the precision of a training is chosen, some milliseconds in all.
_PRODUCTS = 10


def accelerator_of(recipe: Recipe, device: torch.device | None) -> Accelerator:
    """The processes of a training, their device and precision.

    Args:
        recipe: of the training.
        device: on which one process trains; None for the one that accelerate chooses, for each process.

    Raises:
        InputError: a precision that the device lacks, or accelerate is configured to cut models into pieces.
    """
    # A second training in one process may use another precision, or another device where it is the only one.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # Asked for by name, since several processes are seen on a CPU only then.
    cpu = not torch.accelerator.is_available() if device is None else device.type == "cpu"
    # Accelerate reads the name of any other device from the environment.
    named = {} if device is None or cpu else {"ACCELERATE_TORCH_DEVICE": str(device)}
    try:
        with patch_environment(**named):
            accelerator = Accelerator(
                cpu=cpu,
                mixed_precision=recipe.train.mixed_precision,
                log_with=[tracker for tracker in recipe.train.trackers if tracker] or None,
                project_dir=str(recipe.output),
            )
    except ValueError as error:
        raise InputError(f"train: {error}") from None
    if (kind := accelerator.distributed_type) in _CUT_MODELS:
        raise InputError(
            f"accelerate is configured for {kind.value}, which cuts the model into pieces that the saved "
            "state does not know; launch without it, and set train.shard=true for pieces that it knows"
        )
    return accelerator


def with_precision(recipe: Recipe, device: torch.device | None) -> Recipe:
    """The recipe with a precision in place of ``auto``.

    A training that has begun keeps its precision wherever it goes on. A new one takes bf16 where its products
    of matrices are faster than those of float32: on GPUs with such units, and on processors with such
    instructions. Others do them in float32 after all, and more slowly.
    """
    if recipe.train.mixed_precision != "auto":
        return recipe
    try:
        precision = load_recipe(recipe.output / RECIPE).train.mixed_precision
    except InputError:
        kind = device or torch.accelerator.current_accelerator() or torch.device("cpu")
        faster = {"cpu": _cpu_is_faster, "cuda": torch.cuda.is_bf16_supported}.get(kind.type, lambda: False)()
        precision = "bf16" if faster else "no"
    return replace(recipe, train=replace(recipe.train, mixed_precision=precision))


def _cpu_is_faster() -> bool:
    """Whether a product of matrices takes less than two thirds of the time in bfloat16, the best of some."""
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(_PRODUCTS):
        for dtype in seconds:
            x = torch.ones(256, 256, dtype=dtype)
            begin = time.perf_counter()
            x @ x
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - begin)
    return seconds[torch.bfloat16] < seconds[torch.float32] / 1.5


def check_trackers(names: list[str]) -> None:
    """Raise `InputError` unless accelerate knows each tracker and what it needs is installed.

    Accelerate itself warns of one that is missing and goes on without any.
    """
    trackers = {str(kind) for kind in LOGGER_TYPE_TO_CLASS}
    installed = {str(kind) for kind in get_available_trackers()}
    for name in filter(None, names):
        if name not in trackers and name != "all":
            raise InputError(f"train.trackers: no tracker {name!r}; {nearest(name, [*trackers, 'all'])}")
    missing = [name for name in names if name in trackers and name not in installed]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        others = ",".join(name for name in names if name not in missing)
        raise InputError(
            f"train.trackers: {', '.join(missing)} not installed; pip install {packages}, or train "
            f"without {'it' if len(missing) == 1 else 'them'}: --set 'train.trackers=[{others}]'"
        )


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Begin a run of each tracker.

    Those of wandb and trackio are in the project ``dflow``, in a group with the others whose output lies in
    the same folder, and have the name of the output. Event files of TensorBoard lie in ``logs`` in the
    output, so that its path is the name of the run.
    """
    output = recipe.output.absolute()
    about = {"name": output.name, "group": output.parent.name, "config": recipe.as_dict()}
    accelerator.log_with = [
        LOGGER_TYPE_TO_CLASS[kind]("dflow", **about) if kind in ("wandb", "trackio") else kind
        for kind in map(str, accelerator.log_with)
    ]
    accelerator.init_trackers("logs")


def lost_process(error: RuntimeError) -> bool:
    """Whether a library of communication says that it cannot reach another process."""
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "closed by peer", "reset by peer")
    )


def compile_in_place(objective: nn.Module, device: torch.device) -> None:
    """Compile a module; the names of its weights, and what is drawn in it, stay as they are."""
    try:
        torch.compile(torch.cos)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        raise InputError(
            f"train.compile: no compiler that works ({str(error).splitlines()[0]}); install one (g++; for a "
            "GPU Triton as well), or leave out train.compile"
        ) from error
    # A warning that a gradient is looked at.
    warnings.filterwarnings("ignore", "The .grad attribute of a")
    objective.compile(options={"fallback_random": True})


class Signals:
    """The first signal that asks to stop: its number, 0 before it, and its time by `time.monotonic`.

    It calls ``at_first``. A second one raises `KeyboardInterrupt`, whose message ``at_second`` gives.
    """

    def __init__(self, at_first: Callable[[], None], at_second: Callable[[], str]) -> None:
        self.at_first, self.at_second = at_first, at_second
        self.number, self.time = 0, 0.0

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.time = number, now
            self.at_first()
        elif now - self.time > ECHO:
            raise KeyboardInterrupt(self.at_second())

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within it signals are noted; then the handlers of before are back."""
        try:
            handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:  # only the main thread may; elsewhere the defaults stand
            handlers = {}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


#: Who watches a training. It is called about once a second, and after the last step, with the share of the
#: budget that is spent, and the things (characters, rows) a second; what it returns stands before the bar.
Watch = Callable[[float, float, str], str]

#: Formats of the bar by what it counts; seconds a second say nothing.
_FORMATS = {"step": None, "s": "{l_bar}{bar}| {n_fmt}/{total_fmt} s [{elapsed}<{remaining}{postfix}]"}


class Bar:
    """The progress of a training: of its budget in steps or in seconds, whichever is nearer to its end.

    Beside it stand the loss in its unit, and the rate at which things (characters, rows) are trained on;
    before it what `Watch` says.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: int,
        elapsed: float,
        unit: str,
        things: str,
        disabled: bool,
        watch: Watch | None = None,
    ) -> None:
        self.config, self.unit, self.things, self.watch = config, unit, things, watch
        counted, spent, budget = self._budget(step, elapsed)
        self.bar: tqdm[Any] = tqdm(
            total=budget,
            initial=min(round(spent), budget),
            # Who watches may write into a log, where a bar has no place: None is for terminals alone.
            disable=disabled or (None if watch else False),
            dynamic_ncols=True,
            mininterval=1.0,
            smoothing=0.05,
            unit=counted,
            bar_format=_FORMATS[counted],
        )
        self.count, self.since = 0.0, time.monotonic()

    def _budget(self, step: int, elapsed: float) -> tuple[str, float, int]:
        """What is counted, how much of it is spent, and the budget."""
        steps, minutes = self.config.steps, self.config.minutes
        if minutes is None or (steps and step * 60 * minutes > elapsed * steps):
            return "step", step, int(steps or 0)
        return "s", elapsed, round(60 * minutes)

    def show(self, step: int, elapsed: float, loss: float, count: float, last: bool) -> None:
        """Move the bar after a step on ``count`` things; show its loss once a second, and after the last."""
        if self.bar.disable and self.watch is None:
            return
        self.count += count
        now = time.monotonic()
        if now - self.since > 1.0 or last:
            # Under layerwise and expected the loss is that of the conditioners, not of the model; under
            # masked it is an estimate of a bound.
            rate = self.count / (now - self.since)
            if self.watch is not None:
                share = schedule.fraction(self.config, step, elapsed)
                self.bar.desc = self.watch(share, rate, self.things)
            self.bar.set_postfix_str(f"{loss:.3f} {self.unit}, {rate:,.0f} {self.things}/s")
            self.count, self.since = 0.0, now
        if self.bar.disable:
            return
        counted, spent, budget = self._budget(step, elapsed)
        if counted != self.bar.unit:
            self.bar.reset(budget)
            self.bar.initial = self.bar.last_print_n = min(round(spent), budget)
            self.bar.unit, self.bar.bar_format = counted, _FORMATS[counted]
        self.bar.n = min(round(spent), budget)
        self.bar.update(0)
