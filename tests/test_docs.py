"""The documentation is run: its Python, its recipes and its commands; its reference pages are up to date."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import write_model, write_text
from stand_ins import ROOT, Workshop, replace_data_sets

from dflow import cli, recipes

#: What one reads and runs first: the pages of the site under Start. tests/test_wheel.py runs their commands,
#: in an empty folder and with the models that come with dflow.
START = ["README.md", "docs/guide.md", "docs/guide/models.md"]
PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
#: Pages whose commands and examples take long, all together.
LONG = {page for page in PAGES if page not in ("README.md", "CONTRIBUTING.md")}

#: Commands that are only parsed, and why they cannot be run here.
NOT_RUN = {
    "dflow serve": "it serves until it is stopped; tests/test_serve.py draws on its page",
    "dflow page tolstoy": "tests/test_page.py writes the page of these models",
    "dflow train recipes/images/multiscale_histology.yaml": "its pictures are no known set",
    "dflow compare runs/ptb/calls_grouped@{": "its bipartite models are cut by scripts/truncate_flow.py",
}
#: Flags that make a training or a measurement short; they follow those of the page.
SHORT = {
    "train": ["--set", "train.steps=2"],
    "compare": ["--rounds", "1", "--batch-size", "2", "--threads", "1"],
    "codecs": ["--rounds", "1"],
    "page": ["--rounds", "1", "--threads", "1"],
}


def blocks(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    # Every block, so that the end of one in another language is not taken for a beginning.
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [code for language, code in fenced if language in languages]


CODE = [(page, i, code) for page in PAGES for i, code in enumerate(blocks(page, "python"))]


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("page", "number", "code"),
    [
        pytest.param(*row, marks=[pytest.mark.slow] * (row[0] in LONG), id=f"{row[0]}:{row[1]}")
        for row in CODE
    ],
)
def test_python_examples_run(
    page: str, number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "demo" / "grouped", "grouped", write_text(tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{page}:{number}", "exec", dont_inherit=True), {"__name__": "example"})


def lines_of(page: str) -> list[str]:
    """The command lines of a page, continued ones joined."""
    return [
        line.strip()
        for block in blocks(page, "", "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def commands(page: str) -> list[str]:
    return [line for line in lines_of(page) if line.startswith("dflow ")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] * (p in LONG))
        for p in PAGES
        if p not in START and commands(p)
    ],
)
def test_commands_run(page: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_data_sets(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "folder", lambda: tmp_path / "recipes")
    workshop = Workshop(tmp_path, models)
    for code in blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code, encoding="utf-8")
    for line in commands(page):
        if not line.startswith(tuple(NOT_RUN)):
            # As the shell reads it: quotes, patterns of names, comments.
            shell = ["bash", "-c", f"printf '%s\\n' {line}"]
            _, *words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
            workshop.provide(words)
            assert cli.main([*words, *SHORT.get(words[0], [])]) == 0, line


def test_start_is_that_of_the_site() -> None:
    nav = (
        (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("  - Start:\n")[2].partition("\n  - ")[0]
    )
    files = {"index.md": "README.md"}
    assert [files.get(p, f"docs/{p}") for p in re.findall(r"([\w/]+\.md)", nav)] == START


def test_what_is_not_run_is_on_a_page_and_parses() -> None:
    every = [line for page in PAGES for line in commands(page)]
    for beginning in NOT_RUN:
        lines = [line for line in every if line.startswith(beginning)]
        assert lines, beginning
        for line in lines:
            cli.build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_commands_under_a_launcher_parse() -> None:
    launched = [line for page in PAGES for line in lines_of(page) if " -m dflow " in line]
    assert launched
    for line in launched:
        words = shlex.split(line, comments=True)
        cli.build_parser().parse_args(words[words.index("dflow") + 1 :])


def test_recipes_and_scripts_that_commands_name_exist() -> None:
    for page in PAGES:
        for line in lines_of(page):
            for path in re.findall(r"\b(?:scripts|recipes)/[\w/]+\.(?:py|yaml)", line):
                assert (ROOT / path).is_file(), f"{page}: {path}"
            command = line.partition("#")[0]
            for name in re.findall(r"\bdflow (?:train|recipes) ([a-z]\w*(?:/\w+)*)(?= |$)", command):
                assert name in recipes.names(), f"{page}: {name}"


def test_the_workflow_makes_targets_that_exist_and_the_citation_is_complete() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    targets = set(workflow["jobs"]["make"]["strategy"]["matrix"]["target"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
    assert targets >= set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text("utf-8"), re.M))
    # Keys that Citation File Format 1.2.0 requires.
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert set(citation) >= {"cff-version", "message", "title", "authors"}
    # The version stands in one place, dflow/__init__.py.
    assert "version" not in citation


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            path, _, heading = link.partition("#")
            if not link.startswith("http"):
                target = (ROOT / page).parent / path if path else ROOT / page
                assert target.exists(), f"{page}: {link}"
                assert not heading or heading in anchors(target), f"{page}: {link}"


def anchors(page: Path) -> set[str]:
    """What a link to a section of a page may name: as GitHub makes it of the headings."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def reference() -> Any:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "commands.md", "precision.md"])
def test_reference_pages_are_what_the_program_says(name: str) -> None:
    written = (ROOT / "docs" / "guide" / name).read_text(encoding="utf-8")
    assert written == reference().PAGES[name](), "run python scripts/write_reference.py"
