"""The documentation is run: its Python, its recipes and its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from folders import write_model, write_text

from dflow import cli

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/guide.md"]


def blocks(page, *languages):
    text = (ROOT / page).read_text(encoding="utf-8")
    # Every block, so that the end of one in another language is not taken for a beginning.
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [code for language, code in found if language in languages]


CODE = [(page, i, code) for page in PAGES for i, code in enumerate(blocks(page, "python"))]


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(("page", "number", "code"), CODE, ids=[f"{p}:{i}" for p, i, _ in CODE])
def test_python_examples_run(page, number, code, tmp_path, monkeypatch):
    write_model(tmp_path / "demo" / "grouped", "grouped", write_text(tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{page}:{number}", "exec", dont_inherit=True), {"__name__": "example"})


def commands():
    for page in PAGES:
        for block in blocks(page, "", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["dflow"]:
                    yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_parse_and_their_recipes_exist(words):
    values = vars(cli.build_parser().parse_args(words))
    if "recipe" in values:
        assert (ROOT / values["recipe"]).is_file()


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, "docs/LOG.md", "docs/RESULTS.md"]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
