"""How much of the time the networks take, and the bar that shows progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from dflow.core import Bijector, Elementwise
from dflow.dequantize import Dequantizer


@dataclass
class Clock:
    """Seconds: in all, and in networks."""

    total: float = 0.0
    network: float = 0.0

    @property
    def coder(self) -> float:
        """All that is not the networks: tables, intervals, the stack."""
        return self.total - self.network


def networks(module: nn.Module) -> Iterator[nn.Module]:
    """The networks of a law: the outermost modules that can be called, but for maps and dequantizers."""
    if isinstance(module, (Bijector, Elementwise, Dequantizer)) or type(module).forward is nn.Module.forward:
        for child in module.children():
            yield from networks(child)
    else:
        yield module


@contextmanager
def clock(law: nn.Module) -> Iterator[Clock]:
    """Time what is done with ``law``: calls of its networks, and their steps (`dflow.core.AheadNet`)."""
    seconds, begins = Clock(), list[float]()

    def start(*_: Any) -> None:
        begins.append(time.perf_counter())

    def stop(*_: Any) -> None:
        begin = begins.pop()
        # A network that another one calls is timed with that one.
        if not begins:
            seconds.network += time.perf_counter() - begin

    with ExitStack() as stack:
        for network in {id(network): network for network in networks(law)}.values():
            for hook in (
                network.register_forward_pre_hook(start),
                network.register_forward_hook(stop, always_call=True),
            ):
                stack.callback(hook.remove)
            for name in ("step", "read", "ahead"):
                if hasattr(network, name):
                    stack.enter_context(_timed(network, name, start, stop))
        begin = time.perf_counter()
        try:
            yield seconds
        finally:
            seconds.total = time.perf_counter() - begin


@contextmanager
def _timed(network: Any, name: str, start: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    """Surround every call of a method of a network; torch calls hooks for its call as a whole only."""
    method, before = getattr(network, name), vars(network).get(name)

    def timed(*arguments: Any) -> Any:
        start()
        try:
            return method(*arguments)
        finally:
            stop()

    setattr(network, name, timed)
    try:
        yield
    finally:
        delattr(network, name)
        if before is not None:  # a clock around this one
            setattr(network, name, before)


def progress_bar(total: int, unit: str, what: str, progress: bool) -> tqdm[Any]:
    """A bar on stderr for what takes longer than a second; without ``progress`` nothing is shown."""
    return tqdm(total=total, unit=unit, desc=what, delay=1, mininterval=1, disable=not progress)


def bytes_bar(total: int, what: str, progress: bool) -> tqdm[Any]:
    """The same of bytes: how many of all, the rate and the time left."""
    return tqdm(
        total=total, unit="B", unit_scale=True, desc=what, delay=1, mininterval=1, disable=not progress
    )
