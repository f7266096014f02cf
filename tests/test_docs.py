"""The documentation is run: its Python, its recipes and its commands; its reference pages are up to date."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import write_model, write_text
from stand_ins import ROOT, Workshop, replace_data_sets

from dflow import cli, recipes
from dflow.cli.command import parse_words
from dflow.cli.verbs import VERBS
from dflow.train import load_recipe

#: What one reads and runs first: the pages of the site under Start. tests/test_wheel.py runs their commands,
#: in an empty folder and with the models that come with dflow.
START = ["README.md", "docs/guide.md", "docs/guide/models.md"]
PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
RESULTS = "docs/RESULTS.md"
#: Pages on which a command in running text is whole, so that it parses.
MEASURED = ("README.md", RESULTS, "docs/LOG.md")
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


def test_what_is_not_run_is_on_a_page() -> None:
    every = [line for page in PAGES for line in commands(page)]
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in every), beginning


def spelled_out(page: str) -> list[list[str]]:
    """The words of a page's commands, as the shell reads them; on `MEASURED` pages also of those in text."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)] if page in MEASURED else []
    program = re.compile(r"dflow \w|python scripts/|make \w")
    lines = [line for line in [*lines_of(page), *spans] if program.match(line)]
    # Each word ends with a zero byte, and each command with one more.
    script = "".join(f"printf '%s\\0' {line}\nprintf '\\0'\n" for line in lines)
    printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return [command.split("\0") for command in printed.split("\0\0") if command]


def test_commands_parse_and_name_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    verbs = {row[0] for row in VERBS}
    monkeypatch.setattr("dflow.cli.command.build_parser", functools.cache(cli.build_parser))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    every = [(page, command) for page in PAGES for command in spelled_out(page)]
    for page, (program, first, *words) in every:
        line = f"{page}: {' '.join([program, first, *words])}"
        for path in re.findall(r"\b(?:scripts|recipes)/[\w/]+\.(?:py|yaml)", line):
            assert "NAME" in path or (ROOT / path).is_file(), line
        for name in re.findall(r"\bdflow (?:train|recipes) ([a-z]\w*(?:/\w+)*)(?= |$)", line):
            assert name in recipes.names(), line
        if program == "make":
            assert re.search(rf"^{first}:", makefile, re.M), line
        elif program == "python":
            source = (ROOT / first).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), line
        elif not words:
            assert first in verbs, line
        elif "--import" not in words:  # what a module of users adds is not known here
            try:
                flags = vars(parse_words([first, *words]))
            except SystemExit:  # the reason is on stderr
                pytest.fail(line)
            recipe = flags.get("recipe")
            if page in MEASURED and recipe and not flags.get("resume") and "NAME" not in recipe:
                # A setting that there is not is refused.
                load_recipe(recipe, flags.get("set"), output="out")


def test_commands_under_a_launcher_parse() -> None:
    launched = [line for page in PAGES for line in lines_of(page) if " -m dflow " in line]
    assert launched
    for line in launched:
        words = shlex.split(line, comments=True)
        cli.build_parser().parse_args(words[words.index("dflow") + 1 :])


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


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """What a link to a section of a page may name: as GitHub makes it of the headings."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {slug(heading) for heading in headings} | set(re.findall(r'<a id="([^"]+)">', text))


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


def sections(page: str) -> dict[str, str]:
    """The text of every section of a page, with those below it, by its anchor."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    heads = [(m.start(), len(m[1]), slug(m[2])) for m in re.finditer(r"^(#+) (.*)$", text, re.M)]
    ends = [min((at for at, level, _ in heads if at > start and level <= depth), default=len(text))
            for start, depth, _ in heads]  # fmt: skip
    return {anchor: text[start:end] for (start, _, anchor), end in zip(heads, ends, strict=True)}


def figures(text: str) -> list[str]:
    """The numbers of a text, without code, links and what is part of a name (Apache-2.0)."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    return [n.replace(",", "") for n in re.findall(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w.]*\d)", plain)]


def stands_in(figure: str, text: str) -> bool:
    """Whether a figure is one of the text, or rounded from one."""
    unit = Decimal(figure)
    return any(Decimal(n).quantize(unit, ROUND_HALF_UP) == unit for n in figures(text))


def rows(text: str) -> Iterator[tuple[str, str]]:
    """Model and text of every row of the tables; a row without a model is of the one above it."""
    model = ""
    for row in re.findall(r"^\|(?! model |-)(.*)\|$", text, re.M):
        model = re.split(r"[(,|]", row.replace("*", ""))[0].strip() or model
        yield model, row


def disagreements(text: str, link: str) -> list[str]:
    """What a text quotes from the results and they do not say.

    Decimal numbers of a paragraph have to stand, perhaps with more digits, in a section that the paragraph
    links to; the numbers of a row of a table in one row for the same model, in the section that the paragraph
    above the table links to.
    """
    parts, linked, faults = sections(RESULTS), "", []
    for block in re.split(r"\n\n|\n(?=- )", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)):
        if block.startswith("|"):
            for model, row in rows(block):
                there = [other for name, other in rows(linked) if name == model]
                if not any(all(stands_in(n, other) for n in figures(row)) for other in there):
                    faults.append(row)
        else:
            linked = "\n".join(parts[anchor] for anchor in re.findall(link + r"#([\w-]+)\)", block))
            faults += [f"{n}: {block}" for n in figures(block) if "." in n and not stands_in(n, linked)]
    return faults


def test_readme_and_the_summary_of_the_results_say_what_the_results_say() -> None:
    assert disagreements((ROOT / "README.md").read_text(encoding="utf-8"), r"\]\(docs/RESULTS\.md") == []
    assert disagreements(sections(RESULTS)["summary"], r"\]\(") == []
