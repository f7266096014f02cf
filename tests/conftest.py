"""What every test starts from: no network, one seed, the real data only where DFLOW_DATA names them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports the libraries that read these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# The models of the tests are tiny: a second thread only waits for the first.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from forks import start_forks

torch.set_num_threads(1)

_REAL = os.environ.get("DFLOW_DATA")


def pytest_collection_finish() -> None:
    """Freeze what stays: trainings collect garbage, which took a quarter of the time of the tests."""
    # Hypothesis looks for who refers to numpy's generator when it first runs, and cannot see what is frozen.
    hypothesis.find(hypothesis.strategies.none(), lambda _: True)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("DFLOW_DATA", raising=False)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test adds to a registry is gone after it."""
    from dflow import plugins, zoo
    from dflow.cli import verbs
    from dflow.data import IMAGES, TEXTS
    from dflow.elementwise import DISCRETE
    from dflow.ops.orders import ORDERS

    known: tuple[dict[str, Any], ...] = (zoo.FAMILIES, DISCRETE, ORDERS, TEXTS, IMAGES)
    before, commands = [dict(registry) for registry in known], list(verbs.ADDED)
    monkeypatch.setattr(plugins, "_loaded", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for registry, kept in zip(known, before, strict=True):
        registry.clear()
        registry.update(kept)
    verbs.ADDED[:] = commands
    for name in [name for name in sys.modules if name.startswith("dflow_import_")]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Makes processes of `forks.FORKS` quick to start."""
    start_forks(tmp_path_factory.mktemp("forks"))


@pytest.fixture
def real_data() -> Path:
    """The folder of the real texts; skips where there is none."""
    if not _REAL:
        pytest.skip("DFLOW_DATA names no folder with the real texts")
    return Path(_REAL)
