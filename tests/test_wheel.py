"""The wheel in an empty folder: what is in it, and the commands of README and Start as they are printed."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from folders import TEXT
from stand_ins import ROOT
from test_docs import SHORT, START, blocks, commands

import dflow
from dflow import recipes, shipped

pytestmark = pytest.mark.slow

#: Seconds of CPU, of all threads, that the first samples may take. The promise is 3 seconds of the clock, on
#: a machine that does nothing else. The clock of one that runs other tests says how busy it is; CPU time does
#: not, but for the caches that it shares, which may double it.
FIRST_SAMPLES = 6
#: Minutes that the first model of one's own may take, and those of them that are not steps.
FIRST_MODEL, AROUND_STEPS = 10, 1
#: What makes a command short, behind what the page prints; the data are scored in part.
SHORTER = SHORT | {
    "train": [*SHORT["train"], "train.eval_chunks=4", "train.samples=1"],
    "page": [*SHORT["page"], "--limit", "2", "--samples", "1"],
}


@contextmanager
def cpu() -> Iterator[list[float]]:
    """Seconds of CPU that processes started within it take, as the only entry of a list."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, seconds = used(), [0.0]
    yield seconds
    seconds[0] = used() - before


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("dflow", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=source, check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    assert path.name.split("-")[:2] == ["dflow", dflow.__version__]
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """An environment in which the wheel is installed, and what it requires is that of the tests.

    Files ``.pth`` of the latter are not followed, so that its dflow, an editable one, is not there.
    """
    path = wheel.parent / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    python = path / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel]
    subprocess.run([*pip, "--disable-pip-version-check"], check=True, capture_output=True)
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "required.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    script = "import dflow, torch; print(dflow.__file__)"
    imported = subprocess.run([python, "-I", "-c", script], check=True, capture_output=True, text=True)
    assert Path(imported.stdout.strip()).is_relative_to(site)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, but for the texts of the reader that the pages name."""
    folder = tmp_path_factory.mktemp("empty")
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (folder / "my.txt").write_text(text[:20_000], encoding="utf-8")
    (folder / "notes.txt").write_text(TEXT[:300], encoding="utf-8")
    return folder


class Shell:
    """Runs lines in the folder, with the environment of the wheel and nothing else of this checkout."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.bin, self.folder = environment / "bin", folder
        passed_on = {n: value for n, value in os.environ.items() if not n.startswith(("PYTHON", "DFLOW"))}
        self.variables = passed_on | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def __call__(self, line: str) -> str:
        """What it prints; a line that fails fails the test."""
        # A comment ends with its line, so that flags are put behind the words as the shell reads them.
        shown = self._run(["bash", "-c", f"printf '%s\\n' {line}"]).splitlines()
        return self._run([*shown, *SHORTER.get(shown[1] if len(shown) > 1 else "", [])])

    def python(self, code: str) -> str:
        """What a program prints."""
        return self._run([str(self.bin / "python"), "-c", code])

    def _run(self, words: list[str]) -> str:
        if words[0] == "dflow":
            words = [str(self.bin / "dflow"), *words[1:]]
        done = subprocess.run(
            words, cwd=self.folder, env=self.variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def shell(environment: Path, folder: Path) -> Shell:
    return Shell(environment, folder)


def test_the_wheel_has_the_package_all_recipes_and_the_licence(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "dflow").rglob("*.py")}
    yaml = {
        f"dflow/_recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")
    }
    page = {f"dflow/page/{name}" for name in ("page.html", "page.css", "page.js", "plots.js")}
    models = {
        str(path.relative_to(ROOT)) for name in shipped.names() for path in shipped.folder_of(name).iterdir()
    }
    about = {name for name in files if ".dist-info/" in name}
    assert files - about == package | yaml | page | models | {"dflow/py.typed"}
    assert any(name.endswith("/LICENSE") for name in about)


def test_the_models_of_the_wheel_take_eight_megabytes_and_their_cards_tell_them(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {f.filename: (f.file_size, f.compress_size) for f in archive.infolist()}
        cards = {name: archive.read(f"dflow/models/{name}/README.md").decode() for name in shipped.names()}
    total = 0
    for name, card in cards.items():
        files = [size for file, size in sizes.items() if file.startswith(f"dflow/models/{name}/")]
        whole, packed = map(sum, zip(*files, strict=True))
        total += packed
        assert "## Licence" in card
        [shown] = re.findall(r"(\d+\.\d) MB in the folder, (\d+\.\d) MB in the wheel", card)
        # How small the wheel is depends a little on who packs it.
        assert [float(size) for size in shown] == pytest.approx([whole / 1e6, packed / 1e6], abs=0.1)
    assert total <= 8e6


@pytest.mark.parametrize("page", [page for page in START if commands(page)])
def test_every_command_of_start_runs_as_printed(page: str, shell: Shell) -> None:
    """In the order of the page: README begins with samples; a training gives a model in the promised time."""
    spent = {}
    for line in commands(page):
        with cpu() as seconds:
            printed = shell(line)
        spent[line] = round(seconds[0], 1)
        print(f"{seconds[0]:.1f} s: {line}", flush=True)  # shown if the test fails
        if minutes := re.findall(r"train\.minutes=(\d+)", line):
            assert seconds[0] < 60 * AROUND_STEPS, spent
            assert int(minutes[0]) + AROUND_STEPS <= FIRST_MODEL, line
        if page == "README.md" and len(spent) == 1:
            assert printed.count("--- sample ") == 3
            assert seconds[0] < FIRST_SAMPLES, spent
        if line.startswith("dflow recipes "):
            assert [row.split()[0] for row in printed.splitlines()] == recipes.names()
    for code in blocks(page, "python"):
        assert shell.python(code)


def test_the_models_of_the_wheel_score_fill_and_compress(shell: Shell, folder: Path) -> None:
    text = "Prince Andrew looked at Natasha, who was smiling, and did not know what to say.\n" * 10
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "gap.txt").write_text("Prince ____ was in love.", encoding="utf-8")
    assert shell("dflow generate --model tolstoy-causal --draft counts --length 80")
    assert "Prince" in shell("dflow fill gap.txt --model tolstoy --size 6")
    assert "bits" in shell("dflow score text.txt --model tolstoy@4")
    shell("dflow compress text.txt -o text.dfl --model tolstoy@4")
    shell("dflow decompress text.dfl -o back --model tolstoy")
    assert (folder / "back" / "text.txt").read_text(encoding="utf-8") == text
    assert (folder / "text.dfl").stat().st_size < len(text) / 4
