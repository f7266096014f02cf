"""The documentation site: every public name is on a page, and its pages ask no other host for anything."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import FunctionType

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
    """What the package and its parts export; a function with the name of its module by its full name."""
    names = []
    for path in [ROOT / "dflow/__init__.py", *sorted((ROOT / "dflow").glob("*/__init__.py"))]:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", []):
            same = path.with_name(f"{name}.py").exists() and isinstance(getattr(module, name), FunctionType)
            if name != "__version__":
                names.append(f"{package}.{name}.{name}" if same else f"{package}.{name}")
    return names


@pytest.mark.slow
def test_every_public_name_is_on_a_page(site: Path) -> None:
    # The inventory of Sphinx, version 2: four lines, then compressed rows
    # "name domain:role priority page#anchor title".
    rows = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    anchors = {}
    for row in zlib.decompress(rows).decode().splitlines():
        name, _, _, link, _ = row.split(" ", 4)
        anchors[name] = link.replace("$", name)
    names = public_names()
    assert len(names) > 200
    assert [name for name in names if name not in anchors] == []
    for name in names:
        page, _, anchor = anchors[name].partition("#")
        assert f'id="{anchor}"' in (site / page).read_text(encoding="utf-8"), name


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
