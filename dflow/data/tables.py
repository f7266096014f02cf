"""Tables of numbers: CSV files with a header row."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflow.config import InputError, nearest
from dflow.data import files

#: Discrete values lie below this in size: float32 has at least 16 numbers in each of their unit cells.
LARGEST = 1 << 20


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers by row: float64 ``(n, D)``, names of the columns, and which of them are real numbers."""

    columns: tuple[str, ...]
    real: tuple[bool, ...]
    values: NDArray[np.float64]


def read(path: Path, continuous: Sequence[str] | None = None) -> Table:
    """The table of a CSV file (comma, header row; plain, ``.xz`` or ``.gz``).

    ``continuous`` names the columns of real numbers; by default they are those with any value that is not an
    integer. All other columns hold integers.

    Raises:
        InputError: No header or no rows, rows of unequal length, missing values, what is no finite number, a
            value of a discrete column that is no integer or too large.
    """
    lines = csv.reader(io.StringIO(files.decode(files.read(path), path), newline=""))
    try:
        header = [name.strip() for name in next(lines, [])]
        numbered = [(lines.line_num, row) for row in lines if row]
    except csv.Error as error:
        raise InputError(f"{path}, line {lines.line_num}: {error}; correct the file") from None
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise InputError(f"{path}: the first line has no comma, found {header[0][:80]!r}; separate by commas")
    if not header or not all(header) or all(_number(name) is not None for name in header):
        raise InputError(
            f"{path}: the first line must name the columns, found {','.join(header)[:80]!r}; add a header row"
        )
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}: two columns are called {twice!r}; give each its own name")
    if not numbered:
        raise InputError(f"{path}: no rows below the header; name a table that has some")
    for name in continuous or ():
        if name not in header:
            raise InputError(f"continuous: {path} has no column {name!r}; {nearest(name, header)}")
    values = np.array([_row(path, number, header, row) for number, row in numbered])
    whole = values == np.floor(values)
    real = (~whole).any(0) if continuous is None else np.isin(header, continuous)
    out = ~whole | (np.abs(values) > LARGEST)
    for i, j in np.argwhere(out & ~real)[:1]:
        reason = f"above {LARGEST:,} in size" if whole[i, j] else "no integer"
        number, row = numbered[i]
        raise InputError(
            f"{path}, line {number}: {row[j].strip()} in the discrete column {header[j]!r} is "
            f"{reason}; name the column in data.continuous, or correct the value"
        )
    return Table(tuple(header), tuple(real.tolist()), values)


def _row(path: Path, number: int, header: list[str], row: list[str]) -> list[float]:
    if len(row) != len(header):
        raise InputError(
            f"{path}, line {number}: {len(row)} values, and the header names {len(header)} columns; correct "
            "the line"
        )
    values = []
    for name, cell in zip(header, row, strict=True):
        value = _number(cell)
        if value is None or not np.isfinite(value):
            what = f"{cell.strip()!r} is no finite number" if cell.strip() else "the value is missing"
            raise InputError(
                f"{path}, line {number}, column {name!r}: {what}; leave the row out or fill the value in"
            )
        values.append(value)
    return values


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
