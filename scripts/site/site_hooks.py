"""Hooks of MkDocs: what the documentation site has beside the files of ``docs``.

The pages of the root (README, CONTRIBUTING, CHANGELOG), the notebooks as pages, and a page of the API for
each part of the package, whose members are the names that it exports. Links are those of the files on
GitHub; here they are turned into those between the pages of the site.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from site_docstrings import EXAMPLE, FENCE

ROOT = Path(__file__).parent.parent.parent
#: Pages of the site that are files of the root, and cards of models that the package ships.
OF_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CARDS = {
    path.relative_to(ROOT).as_posix(): f"models/{path.parent.name}.md"
    for path in (ROOT / "dflow").glob("models/*/README.md")
}
OUTSIDE = OF_ROOT | CARDS
#: Modules that export what they define.
MODULES = ("core", "config", "generate", "fill", "score", "objectives", "plugins", "recipes")
LINK = re.compile(r"(\]\()([^)#\s]+)")
FENCED = re.compile(r"^(```.*?^```)", re.S | re.M)


def exported(package: Path) -> list[str]:
    """The names of ``__all__`` of a file, in its order; empty where it has none."""
    for node in ast.parse(package.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def parts() -> dict[str, list[str]]:
    """Modules and packages with a page of the API, and the members on it; none stands for all public ones."""
    folders = sorted(path.parent for path in (ROOT / "dflow").glob("*/__init__.py"))
    packages = {folder.name: exported(folder / "__init__.py") for folder in folders}
    return {name: [] for name in MODULES} | {name: names for name, names in packages.items() if names}


def summary(name: str) -> str:
    """The first line of the docstring of a part."""
    path = ROOT / "dflow" / name
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]


def api_pages() -> Iterator[tuple[str, str]]:
    """Path and text of each page of the API."""
    rows = [f"| [`dflow.{name}`]({name}.md) | {' '.join(summary(name).split())} |" for name in parts()]
    top = [name for name in exported(ROOT / "dflow/__init__.py") if name != "__version__"]
    names = ", ".join(f"[`{name}`][dflow.{name}]" for name in top)
    yield (
        "api/index.md",
        "# API\n\nMade from the docstrings of every public name.\n\n| module | content |\n|---|---|\n"
        + "\n".join(rows)
        + f"\n\n## dflow\n\nThese names can also be imported from `dflow` itself: {names}.\n",
    )
    for name, members in parts().items():
        modules = {path.stem for path in (ROOT / "dflow" / name).glob("*.py")}
        listed = [member for member in members if member not in modules]
        options = f"    options: {{ members: {json.dumps(listed)} }}\n" if listed else ""
        text = f"# dflow.{name}\n\n::: dflow.{name}\n{options}"
        text += "".join(_shadowed(ROOT / "dflow" / name, member) for member in sorted(modules & set(members)))
        yield f"api/{name}.md", text


def _shadowed(package: Path, member: str) -> str:
    """A member that has the name of a module of its package: griffe takes the name for that of the module."""
    home = f"dflow.{package.name}.{member}"
    functions = {
        path: {
            node.name: node
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
        for path in (package / "__init__.py", package / f"{member}.py")
    }
    of_package, of_module = functions.values()
    if member in of_package:
        node = of_package[member]
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"{member}({ast.unparse(node.args)}){returns}"
        about = EXAMPLE.sub(FENCE, ast.get_docstring(node) or "")
        return f"\n## {member} {{ #{home} .doc-heading }}\n\n```python\n{signature}\n```\n\n{about}\n"
    path = f"{home}.{member}" if member in of_module else home
    anchor = f'<a id="{home}"></a>' if member in of_module else ""
    return f"\n{anchor}\n\n::: {path}\n    options: {{ show_root_heading: true }}\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of the API in the navigation."""
    nav: list[dict[str, Any]] = config.nav  # type: ignore[assignment]
    [section] = [entry for entry in nav if "API" in entry]
    section["API"] = ["api/index.md", *({f"dflow.{name}": f"api/{name}.md"} for name in parts())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no Markdown file of ``docs``."""
    for source, page in OUTSIDE.items():
        file = File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8"))
        if source in CARDS:
            # Reached by links from the guide.
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    for path, text in api_pages():
        files.append(File.generated(config, path, content=text))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        for file in notebook_files(config, path):
            files.append(file)
    return files


def notebook_files(config: MkDocsConfig, path: Path) -> Iterator[File]:
    """A notebook as a page, with the outputs that are stored in it, and its pictures."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    blocks: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(blocks)}.png"
                picture = base64.b64decode("".join(data["image/png"]))
                yield File.generated(config, f"notebooks/{name}", content=picture)
                blocks.append(f"![output of the cell above]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                blocks.append(f'<div class="output" markdown>\n\n```text\n{text.rstrip()}\n```\n\n</div>')
    note = (
        f"*This page is the notebook [`docs/notebooks/{path.name}`]({path.name}){{: download }} "
        "with its outputs.*"
    )
    blocks.insert(1, note)
    yield File.generated(config, f"notebooks/{path.stem}.md", content="\n\n".join(blocks) + "\n")
    # The notebook itself, to take along.
    yield File.generated(config, f"notebooks/{path.name}", content=path.read_text(encoding="utf-8"))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a file of the repository into links between pages."""
    here = page.file.src_uri
    source = {page: path for path, page in OUTSIDE.items()}.get(here, f"docs/{here}")

    def turn(match: re.Match[str]) -> str:
        link = match[2]
        if ":" in link or here.startswith("api/"):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        site = OUTSIDE.get(target, target.removeprefix("docs/"))
        if not here.startswith("notebooks/"):
            site = re.sub(r"\.ipynb$", ".md", site)
        return match[1] + posixpath.relpath(site, posixpath.dirname(here) or ".")

    pieces = FENCED.split(markdown)
    return "".join(piece if piece.startswith("```") else LINK.sub(turn, piece) for piece in pieces)
