"""The recipes that come with dflow, by name: ``grouped``, ``ptb/ngram``."""

from __future__ import annotations

import difflib
from pathlib import Path

from dflow.config import InputError

#: Names that begin so are configurations of ``accelerate launch``, which trains no model by itself.
LAUNCH = "accelerate/"


def folder() -> Path:
    """The folder of the recipes: inside of an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """The names of all files, those that are in no subfolder first.

    >>> names()[0], "ptb/ngram" in names()
    ('autoregressive', True)
    """
    files = [path.relative_to(folder()).with_suffix("") for path in folder().rglob("*.yaml")]
    return [file.as_posix() for file in sorted(files, key=lambda file: (len(file.parts), file))]


def trainable() -> list[str]:
    """The names of the recipes that ``dflow train`` takes."""
    return [name for name in names() if not name.startswith(LAUNCH)]


def file_of(name: str) -> Path:
    """The file of a name.

    Raises:
        InputError: no recipe has this name.
    """
    if name not in names():
        raise InputError(f"{name}: no such recipe; {hint(name)}")
    return folder() / f"{name}.yaml"


def about(name: str) -> str:
    """The comment in the first line of the recipe of a name."""
    with (folder() / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def locate(recipe: str | Path) -> Path:
    """The file that a path or a name means; a file under this path comes first.

    Raises:
        InputError: there is neither.
    """
    path = Path(recipe)
    if path.exists() and not path.is_dir():
        return path
    name = path.as_posix()
    if name in trainable():
        return file_of(name)
    if name in names():
        raise InputError(
            f"{name}: settings of accelerate launch, no recipe; `dflow recipes {name} --copy` writes them"
        )
    if path.is_dir():
        raise InputError(f"{recipe}: a folder; name a recipe, a YAML file")
    raise InputError(f"{recipe}: no such recipe; {hint(path)}")


def hint(recipe: str | Path) -> str:
    """What may have been meant by a recipe that is not there: files beside it, and names."""
    path = Path(recipe)
    beside = [other.name for other in path.parent.glob("*.yaml")] if path.suffix else []
    name = path.with_suffix("").as_posix().removeprefix("recipes/")
    near = [*difflib.get_close_matches(path.name, beside), *difflib.get_close_matches(name, trainable())]
    question = f"did you mean {' or '.join(map(repr, near[:3]))}? " if near else ""
    return f"{question}`dflow recipes` lists those that come with dflow"
