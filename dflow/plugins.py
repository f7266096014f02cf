"""Modules of users that add to dflow: families, maps on Z/K, orders, data sets, commands.

A module adds to a registry when it is imported. It is imported by the flag ``--import`` of every command, or
because an installed package names it in the entry point group ``dflow.plugins``. Modules that a model folder
or a recipe names are never imported: such files may come from strangers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from dflow.config import InputError

#: Entry point group of the modules of installed packages.
GROUP = "dflow.plugins"

#: Advice in errors about a name that is in no registry.
WAY = "if it comes from a module of yours, give --import MODULE"

_loaded: list[str] = []


def load(module: str) -> None:
    """Import ``module``, a name or the path of a ``.py`` file, unless it is imported already.

    A name is also searched for in the working folder, and a file can import the modules beside it.

    Raises:
        InputError: no such module or file, or an error while it was imported.
    """
    path = Path(module)
    if path.suffix != ".py":
        _within_reach(Path.cwd())
        _import(f"--import {module}", lambda: importlib.import_module(module))
        origin = module
    elif path.is_file():
        path = path.resolve()
        _within_reach(path.parent)
        if not any(getattr(m, "__file__", None) == str(path) for m in list(sys.modules.values())):
            _import(f"--import {module}", lambda: _run(path))
        origin = str(path)
    else:
        raise InputError(f"--import {module}: no such file")
    if origin not in _loaded:
        _loaded.append(origin)


def loaded() -> list[str]:
    """The modules that `load` has imported in this process: names, or absolute paths of files."""
    return list(_loaded)


@functools.cache
def load_installed() -> None:
    """Import the modules that installed packages name in the entry point group `GROUP`, once.

    Raises:
        InputError: an error while one was imported.
    """
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist else "a package"
        _import(f"plug-in {point.name} ({point.value}) of {package}", point.load)


def _within_reach(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _run(path: Path) -> None:
    # A unique name, so that a file that is called like a module of Python does not replace it.
    name = f"dflow_import_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not Python")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _import(what: str, action: Callable[[], object]) -> None:
    try:
        # Standard output is for the results of the command: with --json they are one document.
        with contextlib.redirect_stdout(sys.stderr):
            action()
    except (Exception, SystemExit) as error:
        # The last line that is neither in Python's import system nor in dflow.
        ours = str(Path(__file__).parent)
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if not f.filename.startswith(("<frozen", ours))
        ]
        at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise InputError(
            f"{what} cannot be imported: {type(error).__name__}: {error}{at}; correct it or leave it out"
        ) from error
