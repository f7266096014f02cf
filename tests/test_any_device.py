"""Every family of the registry on an accelerator, with float64 and without: see tests/pretend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pretend.cells import ELSEWHERE, WAITS
from pretend.device import build, compiler
from stand_ins import ROOT

from dflow import zoo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler, which the pretend device is built with"),
]

Faults = dict[tuple[str, str], str]

#: Mistakes that CUDA does not forgive: file, what stands there, what is put in its place.
MISTAKES = [
    ("ops/noise.py", "torch.arange(-(-K // 2), device=self.samples.device)", "torch.arange(-(-K // 2))"),
    ("train/loop.py", "torch.Generator(device)", "torch.Generator()"),
    ("generate.py", "yield from x.cpu()", "yield from torch.from_numpy(x.numpy())"),
]


def run(package: Path, precision: str, *families: str) -> Faults:
    """The fault of each cell, "" for none, in a process of its own, which the device changes."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pretend.cells", str(build()), precision, *families],
        cwd=package,  # from which modules come first
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(variant, task): fault for variant, task, fault in rows}


@pytest.fixture(scope="module", params=["float64", "float32"])
def faults(request: pytest.FixtureRequest) -> Faults:
    return run(ROOT, request.param)


@pytest.mark.parametrize("family", zoo.names())
def test_a_family_does_everything_on_any_device(family: str, faults: Faults) -> None:
    cells = {cell: fault for cell, fault in faults.items() if cell[0].split()[0] == family}
    assert {"score", "train", "dflow train", "dflow evaluate"} <= {task for _, task in cells}
    failed = [f"{' / '.join(cell)}: {fault}" for cell, fault in cells.items() if fault]
    assert not failed, "\n".join(failed)


def test_mistakes_that_an_accelerator_does_not_forgive_are_seen(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dflow", tmp_path / "dflow")
    for name, right, wrong in MISTAKES:
        path = tmp_path / "dflow" / name
        text = path.read_text(encoding="utf-8")
        assert right in text
        path.write_text(text.replace(right, wrong), encoding="utf-8")
    faults = run(tmp_path, "float64", "lstm", "dequantized", "modular")
    assert "at least two devices, pretend:0 and cpu" in faults["lstm", "draw"]
    assert "'pretend' device type for generator" in faults["dequantized", "dflow train"]
    assert "to numpy" in faults["modular", "dflow generate"]
    assert not faults["lstm", "score"]


def test_the_guide_lists_what_is_done_elsewhere_and_what_is_waited_for() -> None:
    page = (ROOT / "docs" / "guide" / "devices.md").read_text(encoding="utf-8")
    rows = [
        f"| {what} | {why} |" for what, why in (ELSEWHERE | {f"`{k}`": v for k, v in WAITS.items()}).items()
    ]
    assert [row for row in rows if row not in page] == []
