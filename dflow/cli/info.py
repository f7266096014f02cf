"""``dflow info``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dflow.cli.flags import Verbs, argument
from dflow.cli.shared import Results


@dataclass(kw_only=True)
class Info(Results):
    """Describe a .dfl file: model, mode, files, sizes of levels.

    No model is needed.
    """

    file: str = argument(".dfl file")


def info(flags: Info) -> int:
    """`dflow info`."""
    from dflow.coding.container import TEXT, kind_of
    from dflow.compress import describe_images, describe_text

    data = Path(flags.file).read_bytes()
    rows = (describe_text if kind_of(data) == TEXT else describe_images)(data, flags.file)
    # Two files may be called as a line of the table is, so the lines are pairs.
    flags.show({"file": flags.file, "rows": rows}, rows)
    return 0


VERBS: Verbs = (("info", Info, info, "dflow info pictures.dfl"),)
