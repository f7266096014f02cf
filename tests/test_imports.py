"""``import dflow`` is fast and light, and every name it offers is there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import dflow

HEAVY = ("torch", "transformers", "datasets", "accelerate", "sentencepiece", "matplotlib", "tensorboard")


def loaded(statements: str) -> set[str]:
    """The modules that a fresh interpreter loads for ``statements``."""
    code = (
        "import json, sys; before = set(sys.modules)\n"
        f"{statements}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_the_package_loads_nothing() -> None:
    """Counted in modules, since seconds depend on the machine and on what else it does."""
    found = loaded("import dflow")
    assert "dflow" in found
    assert {name.partition(".")[0] for name in found} <= {"dflow", *sys.stdlib_module_names}
    assert len(found) < 40


def test_the_lower_floors_load_torch_alone() -> None:
    assert loaded("import dflow.zoo, dflow.objectives, dflow.data") & set(HEAVY) == {"torch"}


def test_the_check_can_fail() -> None:
    found = loaded("import dflow, datasets")
    assert "datasets" in found
    assert len(found) > 100


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
