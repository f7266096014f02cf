"""Pieces of work done side by side, each in one of several processes; results come in the order of pieces."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

import torch

from dflow.config import InputError

T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")

#: Pieces that are on their way for each process: one that is worked on, one that waits.
_AHEAD = 2


class Loaded(Generic[T]):
    """A model that each process has once: made by ``load`` when it is first used.

    A process that is forked has that of its parent; to any other one ``load`` is sent, and not the model.
    """

    def __init__(self, load: Callable[[], T]) -> None:
        self._load = load

    @cached_property
    def value(self) -> T:
        """The model."""
        return self._load()

    def __getstate__(self) -> dict[str, Any]:
        return {"_load": self._load}


@dataclass(frozen=True)
class Crew:
    """Processes that share pieces of work; a single one is this process.

    With several, this process must not have computed with more than one thread of torch before: the others
    are forked of it, where the system can do that.

    Attributes:
        jobs: how many.
        threads: of torch of each, where they are several.
    """

    jobs: int = 1
    threads: int = 1

    def map(self, work: Callable[[P], R], pieces: Iterable[P]) -> Iterator[R]:
        """``work`` done to each piece, in order. Of pieces two a process are in memory, at most.

        Raises:
            InputError: a process was ended from outside, as where memory runs out.
        """
        if self.jobs == 1:
            yield from map(work, pieces)
            return
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        pool = ProcessPoolExecutor(self.jobs, context, _begin, (work, self.threads))
        pending = deque[Future[R]]()
        try:
            for piece in pieces:
                pending.append(pool.submit(_do, piece))
                if len(pending) >= _AHEAD * self.jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                f"one of {self.jobs} processes was ended from outside, perhaps because memory ran out: use "
                "fewer --jobs, or a smaller --batch-size"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


#: This process alone.
ALONE = Crew()

#: What this process does to each piece.
_WORK: Callable[[Any], Any] | None = None


def _begin(work: Callable[[Any], Any], threads: int) -> None:
    """Make this process ready: it ignores Ctrl-C, which its parent handles, and ends when its parent does."""
    global _WORK
    _WORK = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _do(piece: Any) -> Any:
    assert _WORK is not None
    return _WORK(piece)
