"""``dflow recipes``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dflow import recipes as library
from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Results, show_file
from dflow.config import InputError


@dataclass(kw_only=True)
class Recipes(Results):
    """List the recipes that come with dflow, or print one.

    `dflow train` takes their names; --copy gives a file to change.
    """

    name: str | None = argument("name of a recipe (default: none, and all are listed)", None)
    copy: bool = flag("write the recipe into the working folder, in place of printing it", False)


def recipes(flags: Recipes) -> int:
    """`dflow recipes`."""
    if flags.name is None:
        if flags.copy:
            raise InputError("--copy: name the recipe to copy; `dflow recipes` lists them")
        rows = [(name, library.about(name)) for name in library.names()]
        flags.show([{"name": name, "about": about} for name, about in rows], rows)
        return 0
    file = library.file_of(flags.name)
    if flags.copy:
        return show_file(flags, copied(file))
    text = file.read_text(encoding="utf-8")
    if not flags.json:
        print(text, end="")
    flags.end({"name": flags.name, "recipe": text})
    return 0


def copied(file: Path) -> Path:
    """A copy of a file in the working folder.

    Raises:
        InputError: there is a file of this name already.
    """
    copy = Path(file.name)
    try:
        with file.open("rb") as original, copy.open("xb") as target:
            shutil.copyfileobj(original, target)
    except FileExistsError:
        raise InputError(f"{copy}: exists already, and stays; rename it, or work in another folder") from None
    return copy


VERBS: Verbs = (("recipes", Recipes, recipes, "dflow recipes grouped --copy"),)
