"""The page on architecture says of the code what is true."""

from __future__ import annotations

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
    today = PAGE[: PAGE.index("## What version 0.2 adds")]
    names = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py|(?:[a-z_]+/)+)`", today)) | {"core.py"}
    assert len(names) >= 5
    for name in names:
        assert any((root / name).exists() for root in (ROOT, ROOT / "dflow")), name
