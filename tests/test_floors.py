"""Imports go down, never up, never sideways: import-linter says so, and it can say otherwise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--config", "pyproject.toml"],
        cwd=root,
        capture_output=True,
        text=True,
    )


def test_imports_keep_to_the_floors() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("flows/__init__.py", "import dflow.zoo", "dflow.flows is not allowed to import dflow.zoo"),
        ("nn/__init__.py", "import dflow.bijectors", "dflow.nn is not allowed to import dflow.bijectors"),
        ("core.py", "import numpy", "dflow.core is not allowed to import numpy"),
        ("coding/codes.py", "import numpy", "dflow.coding.codes -> numpy"),
        ("coding/codec.py", "import constriction", "dflow.coding.codec -> constriction"),
        ("attic.py", "", "dflow.attic"),
    ],
    ids=["up", "sideways", "library", "arrays", "coder", "on no floor"],
)
def test_the_check_can_fail(tmp_path: Path, file: str, line: str, said: str) -> None:
    shutil.copytree(ROOT / "dflow", tmp_path / "dflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "dflow" / file).open("a") as module:
        module.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode != 0
    assert said in " ".join((result.stdout + result.stderr).split())
