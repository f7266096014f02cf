"""The script that checks a device: on the CPU and on the pretend device, without optional libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pretend.device import build, compiler
from stand_ins import ROOT

from dflow import zoo
from dflow.data import image_sets

SCRIPT = ROOT / "scripts" / "gpu_check.py"

#: What a machine may lack on which a GPU is lent.
MISSING = "import sys; sys.modules |= dict.fromkeys(('constriction', 'numba', 'sentencepiece', 'datasets'))\n"
RUN = "import runpy; runpy.run_path({!r}, run_name='__main__')"
PRETEND = "from pathlib import Path; from pretend import device; device.start(Path({!r}))\n"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, *words: str, start: str = "") -> tuple[int, dict[str, Any], str]:
    """The exit code, and both files."""
    code = MISSING + start + RUN.format(str(SCRIPT))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words, "-o", str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "gpu_check.json").is_file(), done.stderr[-3000:]
    results = json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))
    return done.returncode, results, (folder / "gpu_check.md").read_text(encoding="utf-8")


def check_all_families(results: dict[str, Any], markdown: str) -> None:
    rows = {(row["part"], row["subject"]): row for row in results["checks"]}
    failed = [f"{name}: {row['reason']} {row['figures']}" for name, row in rows.items() if row["reason"]]
    assert [name for name, row in rows.items() if row["status"] == "failed"] == [], failed
    for family in zoo.names():
        assert rows["train", f"{family} float32"]["status"] == "passed"
        assert rows["train", f"{family} mixed bf16"]["status"] == "passed"
        assert rows["score", family]["status"] == "passed"
        assert (rows["draw", family]["status"] == "passed") == (zoo.find(family).kind != "labels")
        assert f"| train | {family} float32 | passed |" in markdown
    assert "drafts 0" in str(rows["draw", "transformer"]["figures"])


def test_what_the_time_does_not_suffice_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image_sets.KNOWN, "mnist", image_sets.KNOWN["mnist"])  # which it replaces
    assert script().main(["--minutes", "0", "--device", "cpu", "-o", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["checks"]
    assert {row["status"] for row in rows} == {"skipped"}
    markdown = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    assert all(f"| {family} | skipped: the time ran out |" in markdown for family in zoo.names())


def test_a_failure_is_one_row(tmp_path: Path) -> None:
    module = script()
    report = module.Report(tmp_path, 1, {})
    for run_check in (lambda: {"a": 1}, lambda: {"a": 2, "fault": "too | slow"}, lambda: 1 / 0):
        report.check("part", "of", run_check)
    rows = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["checks"]
    assert [row["status"] for row in rows] == ["passed", "failed", "failed"]
    assert rows[2]["reason"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in rows[2]["figures"]["traceback"]
    markdown = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    assert "failed: too \\| slow" in markdown
    assert "Traceback" not in markdown


@pytest.mark.slow
def test_every_family_on_the_cpu(tmp_path: Path) -> None:
    code, results, markdown = run(tmp_path / "out", "--minutes", "15", "--device", "cpu")
    check_all_families(results, markdown)
    assert code == 0
    assert {row["status"] for row in results["checks"] if row["part"] == "processes"} == {"passed"}


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler, which the pretend device is built with")
def test_every_family_on_the_pretend_device(tmp_path: Path) -> None:
    start = PRETEND.format(str(build()))
    code, results, markdown = run(tmp_path / "out", "--minutes", "15", "--device", "pretend", start=start)
    check_all_families(results, markdown)
    assert code == 0
