"""The notebooks run, and hold small outputs that can be read without running them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    pytest.importorskip("nbclient", reason="notebooks run with the extra docs")
    # In a process of its own: a kernel has sockets and loops that outlive it, and threads of torch.
    command = [sys.executable, str(ROOT / "scripts/run_notebooks.py"), "--check", path.stem]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran_last(path: Path) -> None:
    assert path.stat().st_size < 200_000, "pictures of fewer dots, or fewer of them"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["source"][0].startswith("# ")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    # From top to bottom, in a fresh kernel.
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= 4
    for output in outputs:
        # Neither errors nor warnings and bars of progress, and no path of a machine.
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert "/tmp/" not in json.dumps(output)


def test_every_cell_of_code_has_a_sentence_before_it() -> None:
    assert len(NOTEBOOKS) >= 4
    for path in NOTEBOOKS:
        kinds = [cell["cell_type"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        assert "codecode" not in "".join(kinds), path
