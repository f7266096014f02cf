"""The documentation site: every public name is on a page, and its pages ask no other host for anything."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: How an address on another host begins.
OUTSIDE = r"(?:https?:)?//[^\s>]*"
pytest.importorskip("mkdocs", reason="the site is built with the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by ``make docs``."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


def public_names() -> list[str]:
    """What the package and its parts export."""
    names = []
    for path in [ROOT / "dflow/__init__.py", *sorted((ROOT / "dflow").glob("*/__init__.py"))]:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        exported = getattr(importlib.import_module(package), "__all__", [])
        names += [f"{package}.{name}" for name in exported if name != "__version__"]
    return names


@pytest.mark.slow
def test_every_public_name_is_on_a_page(site: Path) -> None:
    anchors: set[str] = set()
    for page in (site / "api").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        anchors.update(re.findall(r'\bid="?(dflow\.[\w.]+)', text))
        if page.name == "index.html":
            # What dflow itself exports has a link there, to the part that it comes from.
            anchors.update(
                f"dflow.{name}" for name in re.findall(r"#dflow\.[^>]*><code>(\w+)</code></a>", text)
            )
    names = public_names()
    assert len(names) > 200
    assert sorted(set(names) - anchors) == []


@pytest.mark.slow
def test_pages_need_no_other_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert (
            re.findall(rf"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"?{OUTSIDE}", text) == []
        ), page
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(rf"(?:url\(|@import)\s*[\"']?{OUTSIDE}", text), style


@pytest.mark.slow
def test_examples_of_docstrings_are_code_and_pages_of_the_root_are_there(site: Path) -> None:
    assert 'class="language-pycon' in (site / "api/elementwise.html").read_text(encoding="utf-8")
    for page in ("index", "contributing", "changelog", "RESULTS", "guide/commands", "api/index"):
        assert (site / f"{page}.html").is_file()


@pytest.mark.slow
def test_a_dead_link_fails(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# A\n\n[b](a.md#b) [c](index.md#nowhere)\n", encoding="utf-8")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    kept = re.search(r"^validation:\n(?:  .*\n)+", config, re.M)
    assert kept is not None
    (tmp_path / "mkdocs.yml").write_text(f"site_name: a\nstrict: true\n{kept[0]}", encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "a.md" in run.stderr
    assert "#nowhere" in run.stderr
