"""Runs of a sweep side by side, each in a process of its own."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dflow import plugins
from dflow.sweep.once import TimeLeft, train_once
from dflow.threads import Suited
from dflow.train import Preempted, Recipe, recipe_from
from dflow.train.machine import Signals

#: Processes begin afresh: one that is forked cannot use a GPU, nor threads that its parent has started.
CONTEXT: Any = multiprocessing.get_context("spawn")


@dataclass
class _Job:
    """A run in its process.

    Attributes:
        index: of the run.
        slot: the place among those that run at a time.
        link: what the process sends: progress, and its end.
        rate: things a second that it trains on, and what these are.
        reason: why it failed, "" where it did not; None before its end.
    """

    index: int
    slot: int
    process: BaseProcess
    link: Connection
    rate: tuple[float, str] = (0.0, "")
    reason: str | None = None


@dataclass
class SideBySide:
    """How many runs are trained at a time, and on what.

    Attributes:
        jobs: number of them.
        threads: of each; None for one where the model is small, else its share of the processors.
        device: of each; of several GPUs they take turns.
    """

    jobs: int
    threads: int | None
    device: torch.device | None

    def device_of(self, slot: int) -> str | None:
        """The name of the device of the job in a slot."""
        if str(self.device) == "cuda":
            return f"cuda:{slot % torch.cuda.device_count()}"
        return None if self.device is None else str(self.device)

    def train(
        self,
        indices: Iterable[int],
        recipe_of: Callable[[int], Recipe],
        time_left: TimeLeft,
        say: Callable[[str], None],
    ) -> Iterator[tuple[int, str]]:
        """Train some runs; the index of each that has ended, and the reason where it failed.

        What a run prints is in ``FOLDER.log`` beside its folder.

        Raises:
            KeyboardInterrupt: a signal, after all have stopped and saved their states.
        """
        running: dict[Connection, _Job] = {}

        def stop() -> None:
            say("stopping all runs after their steps; once more stops at once, without saving")
            for job in running.values():
                job.process.terminate()

        waiting, signals = deque(indices), Signals(stop, lambda: "")
        bar: tqdm[Any] = tqdm(
            total=1.0,
            disable=None,
            dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}%|{bar}| [{elapsed}{postfix}]",
        )
        try:
            with signals.noted(), bar:
                while running or (waiting and not signals.number):
                    while waiting and len(running) < self.jobs and not signals.number:
                        slot = min({*range(self.jobs)} - {job.slot for job in running.values()})
                        job = self._start(waiting[0], slot, recipe_of(waiting.popleft()))
                        running[job.link] = job
                    for link in wait(list(running), timeout=1.0):
                        job = running[link]  # type: ignore[index]
                        if _hear(job, time_left):
                            continue
                        del running[job.link]
                        if not signals.number or job.reason == "":
                            time_left.shares[job.index] = 1.0
                            yield job.index, str(job.reason)
                    _show(bar, time_left, running)
        finally:
            for job in running.values():
                job.process.kill()
        if signals.number:
            raise KeyboardInterrupt if signals.number == signal.SIGINT else Preempted

    def _start(self, index: int, slot: int, recipe: Recipe) -> _Job:
        receiver, sender = CONTEXT.Pipe(duplex=False)
        work = (recipe.as_dict(), plugins.loaded(), self.threads, self.jobs, self.device_of(slot), sender)
        process = CONTEXT.Process(target=_work, args=work)
        # Ctrl-C is for this process, which stops the others, also those that are just starting.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        sender.close()
        return _Job(index, slot, process, receiver)


def _hear(job: _Job, time_left: TimeLeft) -> bool:
    """Take what a job has sent; whether there may be more."""
    try:
        share, rate, things, reason = job.link.recv()
    except EOFError:
        job.process.join()
        if job.reason is None:
            job.reason = (
                f"its process was ended from outside (exit code {job.process.exitcode}), perhaps because "
                "memory ran out: use fewer --jobs, or a smaller train.batch_size"
            )
        job.link.close()
        return False
    job.rate, job.reason = (rate, things), reason
    time_left.shares[job.index] = share
    return True


def _show(bar: tqdm[Any], time_left: TimeLeft, jobs: dict[Connection, _Job]) -> None:
    if bar.disable:
        return
    ended = sum(share == 1 for share in time_left.shares)
    bar.desc = f"{ended} of {len(time_left.shares)} runs, {len(jobs)} running: "
    rates = [job.rate for job in jobs.values() if job.rate[1]]
    speed = f", {sum(rate for rate, _ in rates):,.0f} {rates[0][1]}/s" if rates else ""
    bar.postfix = f"{time_left.left()} left{speed}"
    bar.n = time_left.share()
    bar.refresh()


def _work(
    values: dict[str, Any],
    modules: list[str],
    threads: int | None,
    jobs: int,
    device: str | None,
    sender: Connection,
) -> None:
    """Train one run in this process; send how far it is, and why it failed."""
    # Its parent handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    folder = Path(values["output"])
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    Suited.free, Suited.sharing = threads is None and "OMP_NUM_THREADS" not in os.environ, jobs
    if threads is not None or Suited.free:
        torch.set_num_threads(threads or Suited.most())
    for module in modules:
        plugins.load(module)
    last = (0.0, 0.0, "")

    def watch(share: float, rate: float, things: str) -> str:
        nonlocal last
        last = (share, rate, things)
        sender.send((*last, None))
        return ""

    try:
        recipe = recipe_from(values, str(folder))
        reason = train_once(recipe, None if device is None else torch.device(device), watch)
    except KeyboardInterrupt as stop:
        reason = str(stop) or "stopped by a signal"
    if reason:
        print(f"error: {reason}", flush=True)
    sender.send((*last, reason))


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
