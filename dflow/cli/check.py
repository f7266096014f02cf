"""``dflow check``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dflow.cli.flags import Verbs, argument
from dflow.cli.shared import Results, complain, print_table, table_of
from dflow.config import InputError


@dataclass(kw_only=True)
class Check(Results):
    """Check whether a model folder is whole.

    In a whole one every file is as it was saved, and the model loads.
    """

    model: str = argument("folder of the model")


def check(flags: Check) -> int:
    """`dflow check`; exit code 1 where a file is damaged or missing, or the model cannot be loaded."""
    from dflow import hf
    from dflow.hf import kind_of

    kind = kind_of(flags.model)
    folder, _ = hf.split_calls(flags.model)
    findings = hf.check(folder)
    if not flags.json:
        print_table(table_of(findings))
    wrong = [f"{f.name} {f.status}" for f in findings if f.status in ("damaged", "missing")]
    try:
        needed = {"config.json", *(file.name for file in hf.weight_files(folder))}
        hf.load(flags.model, kind=kind)  # type: ignore[type-var]
    except InputError as error:
        wrong.append(str(error))
    files = [dataclasses.asdict(f) for f in findings]
    flags.end({"model": flags.model, "whole": not wrong, "wrong": wrong, "files": files})
    if wrong:
        complain(f"{flags.model}: not whole: " + "; ".join(wrong))
        return 1
    unlisted = sorted(needed & {f.name for f in findings if f.status == "unlisted"})
    if flags.json:
        return 0
    if unlisted:
        print(
            f"{flags.model}: the model loads; whether {', '.join(unlisted)} are as they were saved cannot be "
            f"checked, since no {hf.MANIFEST} lists them"
        )
    else:
        print(f"{flags.model}: whole; the model loads")
    return 0


VERBS: Verbs = (("check", Check, check, "dflow check runs/grouped"),)
