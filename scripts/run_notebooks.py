"""Run the notebooks of the documentation and store what they print and draw, or only check that they run.

    python scripts/run_notebooks.py                       # all of them; or: make notebooks
    python scripts/run_notebooks.py --check dequantization

Stored outputs are text and small pictures, so that the notebooks can be read on GitHub and on the site.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


def run(path: Path) -> nbformat.NotebookNode:
    """A notebook with new outputs, run in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs, Path(folder))
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def tidy(outputs: list[nbformat.NotebookNode], folder: Path) -> list[nbformat.NotebookNode]:
    """Without bars of progress and warnings, what was printed in one piece, paths as seen from the folder."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if "text" in output:
            output.text = output.text.replace(f"{folder.resolve()}/", "")
            if kept and "text" in kept[-1]:
                kept[-1].text += output.text.lstrip("\n")
                continue
        kept.append(output)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", help="notebooks, without .ipynb (default: all)")
    parser.add_argument("--check", action="store_true", help="store nothing")
    options = parser.parse_args()
    for path in [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb")):
        start = time.monotonic()
        notebook = run(path)
        if not options.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
