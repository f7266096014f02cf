"""How much of the time the networks take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Clock:
    """Seconds: in all, and in networks."""

    total: float = 0.0
    network: float = 0.0

    @property
    def coder(self) -> float:
        """All that is not the networks: tables, intervals, the stack."""
        return self.total - self.network


@contextmanager
def clock(law: nn.Module) -> Iterator[Clock]:
    """Time what is done with ``law``, whose networks are the modules called ``net``.

    Some of these answer step by step, by a method ``step``.
    """
    found, started = Clock(), [0.0]

    def start(*_: Any) -> None:
        started[0] = time.perf_counter()

    def stop(*_: Any) -> None:
        found.network += time.perf_counter() - started[0]

    # A net within a net is no second one.
    paths = ((name.split("."), module) for name, module in law.named_modules())
    nets = [module for path, module in paths if path[-1] == "net" and path.count("net") == 1]
    handles = [h for m in nets for h in (m.register_forward_pre_hook(start), m.register_forward_hook(stop))]
    walking: list[Any] = [m for m in nets if hasattr(m, "step")]

    def timed(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            start()
            answer = step(*given)
            stop()
            return answer

        return call

    before = [vars(module).get("step") for module in walking]
    for module in walking:
        module.step = timed(module.step)
    begun = time.perf_counter()
    try:
        yield found
    finally:
        found.total = time.perf_counter() - begun
        for handle in handles:
            handle.remove()
        for module, step in zip(walking, before, strict=True):
            if step is None:
                del module.step
            else:  # timed by another
                module.step = step
