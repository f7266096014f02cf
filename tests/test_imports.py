"""``import dflow`` is fast and light, and every name it offers is there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import dflow

HEAVY = ("torch", "transformers", "datasets", "accelerate", "sentencepiece", "matplotlib", "tensorboard")


def loaded(statements: str) -> tuple[set[str], float]:
    """The heavy libraries that a fresh interpreter holds after ``statements``, and the seconds they took."""
    code = (
        "import json, sys, time; start = time.perf_counter()\n"
        f"{statements}\n"
        f"print(json.dumps([[m for m in {HEAVY!r} if m in sys.modules], time.perf_counter() - start]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, seconds = json.loads(result.stdout.splitlines()[-1])
    return set(found), seconds


def test_the_package_loads_nothing() -> None:
    found, seconds = loaded("import dflow")
    assert not found
    assert seconds < 1


def test_the_lower_floors_load_torch_alone() -> None:
    found, _ = loaded("import dflow.zoo, dflow.objectives, dflow.data")
    assert found == {"torch"}


def test_the_check_can_fail() -> None:
    found, _ = loaded("import dflow, datasets")
    assert "datasets" in found


def test_every_name_is_there() -> None:
    assert sorted(dflow.__all__) == sorted(
        {name for names in dflow._HOMES.values() for name in names} | {"__version__"}
    )
    for name in dflow.__all__:
        assert getattr(dflow, name) is not None
        assert name in dir(dflow)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Flaw'"):
        _ = dflow.Flaw
