"""``dflow data``: list, prepare, check."""

from __future__ import annotations

from dataclasses import dataclass

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Results, show_records


@dataclass(kw_only=True)
class DataList(Results):
    """List texts and images known by name, and which are there."""

    folder: str | None = flag("folder of the data (default: DFLOW_DATA)", None)


@dataclass(kw_only=True)
class DataPrepare(DataList):
    """Fetch a text or set of images unless it is there; check it."""

    name: str = argument("name of the set")


@dataclass(kw_only=True)
class DataCheck(DataPrepare):
    """Check files of a text or set of images by their checksums."""


def data_list(flags: DataList) -> int:
    """`dflow data list`."""
    from dflow.data import list_sets

    return show_records(flags, list_sets(flags.folder))


def data_prepare(flags: DataPrepare) -> int:
    """`dflow data prepare`."""
    from dflow.data import prepare

    return show_records(flags, prepare(flags.name, flags.folder))


def data_check(flags: DataCheck) -> int:
    """`dflow data check`."""
    from dflow.data import check

    return show_records(flags, check(flags.name, flags.folder))


#: What these verbs are about.
GROUP = "texts and images: list, prepare, check"


VERBS: Verbs = (
    ("data list", DataList, data_list, "dflow data list --folder texts"),
    ("data prepare", DataPrepare, data_prepare, "dflow data prepare text8 --folder texts"),
    ("data check", DataCheck, data_check, "dflow data check ptb --folder texts"),
)
