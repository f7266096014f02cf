"""The page on architecture says of the code what is true."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_its_floors_are_those_of_the_import_check() -> None:
    [block] = [part for part in re.findall(r"^```\n(.*?)^```", PAGE, re.S | re.M) if "__main__" in part]
    # What follows two spaces is a comment.
    drawn = [re.split("  ", line)[0].strip().split(" | ") for line in block.splitlines()]
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [floors] = [c for c in config["tool"]["importlinter"]["contracts"] if c["id"] == "floors"]
    assert drawn == [layer.replace("(", "").replace(")", "").split(" | ") for layer in floors["layers"]]


def test_the_files_that_it_names_exist() -> None:
    today = PAGE
    names = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py|(?:[a-z_]+/)+)`", today)) | {"core.py"}
    assert len(names) >= 5
    for name in names:
        assert any((root / name).exists() for root in (ROOT, ROOT / "dflow")), name


#: Names that say nothing about what they hold.
VAGUE = {"found", "told", "own", "asked", "mine"}


def test_files_and_functions_are_short_and_local_names_say_something() -> None:
    for path in sorted((ROOT / "dflow").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert node.id not in VAGUE, f"{path}:{node.lineno}: a variable called {node.id!r}"


def test_one_word_is_one_class() -> None:
    """But for commands, whose flags have the name of the command."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "dflow").rglob("*.py")):
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(path.name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
