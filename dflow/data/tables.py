"""Tables of numbers: CSV and TSV files with a header row."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflow.config import InputError, nearest
from dflow.data import files

#: Discrete values lie below this in size: float32 has at least 16 numbers in each of their unit cells.
LARGEST = 1 << 20
#: Names of files that are tables, before ``.xz`` or ``.gz``.
SUFFIXES = (".csv", ".tsv")

#: A real column has more different values than this, unless its rows are few.
_FEW = 10
#: Float64 resolves the deviation of a real column into at least so many steps.
_STEPS = 1 << 16
#: Smallest eigenvalue of the correlations: below it a column is a linear function of others.
_DEPENDENT = 1e-10


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers by row: float64 ``(n, D)``, names of the columns, and which of them are real numbers.

    ``note`` says what of the file is left out.
    """

    columns: tuple[str, ...]
    real: tuple[bool, ...]
    values: NDArray[np.float64]
    note: str = ""


def is_table(path: Path) -> bool:
    """Whether the name of a file is that of a table.

    >>> is_table(Path("a.CSV.gz")), is_table(Path("a.png"))
    (True, False)
    """
    return any(suffix.lower() in SUFFIXES for suffix in path.suffixes)


def read(path: Path, continuous: Sequence[str] | None = None, whole: bool = False) -> Table:
    """The table of a file with a header row (plain, ``.xz`` or ``.gz``).

    Columns are separated by commas, semicolons or tabs, whichever the header has; between semicolons a comma
    is a decimal comma. First columns that have no name and count the rows, as pandas writes them, are left
    out unless ``whole``.

    ``continuous`` names the columns of real numbers; by default they are those with any value that is not an
    integer. All other columns hold integers.

    Raises:
        InputError: no header or no rows, rows of unequal length, missing values, values that are no finite
            numbers, a value of a discrete column that is no integer or too large.
    """
    header, lines, comma = _cells(path)
    values = np.array([_row(path, number, header, row, comma) for number, row in lines])
    note = ""
    while _unnamed(header[0]) and not (whole and header[0]):
        if len(header) == 1 or (values[:, 0] != np.arange(len(values))).any():
            raise InputError(
                f"{path}: the first column has no name; name it, or leave the column out (with pandas: "
                "to_csv(..., index=False))"
            )
        header, values = header[1:], values[:, 1:]
        lines = [(number, row[1:]) for number, row in lines]
        note = "the first column has no name and counts the rows: it is left out"
    for name in continuous or ():
        if name not in header:
            raise InputError(f"continuous: {path} has no column {name!r}; {nearest(name, header)}")
    integer = values == np.floor(values)
    real = (~integer).any(0) if continuous is None else np.isin(header, continuous)
    unfit = ~integer | (np.abs(values) > LARGEST)
    for i, j in np.argwhere(unfit & ~real)[:1]:
        reason = f"above {LARGEST:,} in size" if integer[i, j] else "no integer"
        number, row = lines[i]
        # All real columns: those that the setting leaves out are discrete.
        names = ",".join(header[k] for k in np.flatnonzero(real | unfit.any(0)))
        raise InputError(
            f"{path}, line {number}: {row[j].strip()} in the discrete column {header[j]!r} is "
            f"{reason}; name the column in data.continuous, data.continuous=[{names}], or correct the value"
        )
    return Table(tuple(header), tuple(real.tolist()), values, note)


@dataclass(frozen=True)
class ColumnUnits:
    """Mean and standard deviation of each real column, None of a discrete one.

    Attributes:
        loc: the means.
        scale: the deviations.
        unfit: why no density can be learned on a column, and what to do; empty where all is well.
        note: on columns on which a density can grow without limit.
    """

    loc: tuple[float | None, ...]
    scale: tuple[float | None, ...]
    unfit: str = ""
    note: str = ""


def units(path: Path, table: Table, values: NDArray[np.float64]) -> ColumnUnits:
    """The units of a table's real columns over ``values``, the rows to train on.

    No density can be learned on a real column whose values are all the same, few, or differ by less than
    float64 resolves: it has no limit, or none that could be computed.
    """
    moments = [
        _moments(column) if real else (None, None) for column, real in zip(values.T, table.real, strict=True)
    ]
    loc, scale = zip(*moments, strict=True)
    notes = []
    for name, column, deviation in zip(table.columns, values.T, scale, strict=True):
        if deviation is None:
            continue
        if reason := _unfit(column, deviation):
            return ColumnUnits(loc, scale, unfit=f"{path}: the real column {name!r} {reason}")
        distinct, counts = np.unique(column, return_counts=True)
        if 2 * counts.max() > len(column):
            share, value = 100 * counts.max() / len(column), distinct[counts.argmax()]
            notes.append(f"the real column {name!r} is {value} in {share:.0f} % of the rows")
    notes += _dependent(table, values, loc, scale)
    warning = ": a density can grow there without limit, so that its bits mean little"
    return ColumnUnits(loc, scale, note="; ".join(note + warning for note in notes))


def _moments(column: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and deviation, without overflow or cancellation."""
    size = float(np.abs(column).max()) or 1.0
    scaled = column / size
    mean = float(scaled.mean())
    return mean * size, float(np.sqrt(np.square(scaled - mean).mean())) * size


def _unfit(column: NDArray[np.float64], scale: float) -> str | None:
    """Why a column has no density that could be learned, and what to do."""
    distinct = len(np.unique(column))
    if distinct == 1:
        return f"is {column[0]} in every row to train on, and has no density; leave the column out"
    if distinct <= _FEW and len(column) >= 2 * distinct:
        return (
            f"has only {distinct} different values in the {len(column):,} rows to train on, and a density "
            "could grow there without limit; multiply the column so that its values are integers and do not "
            "name it in data.continuous, or leave it out"
        )
    if scale < np.finfo(float).tiny or scale == np.inf:
        return f"has a standard deviation of {scale:.3g}, beyond 64 bits; multiply the column by a constant"
    step = float(np.spacing(np.abs(column).max()))
    if not step * _STEPS < scale < np.inf:
        return (
            f"has a standard deviation of {scale:.3g}, and numbers of its size are {step:.3g} apart in 64 "
            "bits; subtract a constant from the column in the file"
        )
    return None


def _dependent(
    table: Table, values: NDArray[np.float64], loc: tuple[float | None, ...], scale: tuple[float | None, ...]
) -> list[str]:
    """Real columns that are linear functions of each other, in words."""
    names = [name for name, real in zip(table.columns, table.real, strict=True) if real]
    if len(names) < 2 or len(values) <= 2 * len(names):
        return []
    standard = np.stack(
        [(column - m) / s for column, m, s in zip(values.T, loc, scale, strict=True) if s and m is not None],
        1,
    )
    sizes, directions = np.linalg.eigh(standard.T @ standard / len(standard))
    groups = [np.flatnonzero(np.abs(d) > 1e-3) for d in directions.T[sizes < _DEPENDENT]]
    return [f"the real columns {' and '.join(repr(names[i]) for i in g)} depend linearly" for g in groups]


# -- lines and cells -------------------------------------------------------------------------------------


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], bool]:
    """Names of the columns, rows with the numbers of their lines, and whether there are decimal commas."""
    text = files.decode(files.read(path), path)
    if "\n" not in text:
        # Line ends of old Macintosh programs, which spreadsheets still offer.
        text = text.replace("\r", "\n")
    delimiter = _delimiter(path, text)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(rows, [])]
        numbered = [(rows.line_num, row) for row in rows if row]
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}; correct the file") from None
    _check_header(path, header)
    if not numbered:
        raise InputError(f"{path}: no rows below the header; name a table that has some")
    comma = delimiter == ";" and any("," in cell for _, row in numbered for cell in row)
    return header, numbered, comma


def _delimiter(path: Path, text: str) -> str:
    """Comma, semicolon or tab: the one that separates names in the header."""
    line = text.partition("\n")[0]
    counts = {}
    for delimiter in (",", ";", "\t"):
        try:
            counts[delimiter] = len(next(csv.reader([line], delimiter=delimiter), []))
        except csv.Error as error:
            raise InputError(f"{path}, line 1: {error}; correct the file") from None
    several = [delimiter for delimiter, count in counts.items() if count > 1]
    if len(several) > 1:
        names = {",": "commas", ";": "semicolons", "\t": "tabs"}
        raise InputError(
            f"{path}: the first line has {' and '.join(names[d] for d in several)}, found "
            f"{line[:80]!r}; separate by one of them, and put a name that holds another into double quotes"
        )
    others = [other for other in (None, "|", ":") if len(line.split(other)) > 1]
    row = text.partition("\n")[2].partition("\n")[0]
    if not several and any(all(_number(cell) is not None for cell in row.split(o)) for o in others):
        raise InputError(
            f"{path}: the first line has no comma, semicolon or tab, found {line[:80]!r}; separate by commas"
        )
    return several[0] if several else ","


def _unnamed(name: str) -> bool:
    """Whether a name is that of a pandas index: empty, or as pandas writes an empty name that it has read."""
    return not name or re.fullmatch(r"Unnamed: 0(\.\d+)*", name) is not None


def _check_header(path: Path, header: list[str]) -> None:
    if not any(header):
        raise InputError(
            f"{path}: the first line must name the columns, and is empty; remove empty lines above it, "
            "or write a line of names, such as a,b,c"
        )
    if all(_number(name) is not None for name in header):
        raise InputError(
            f"{path}: the first line must name the columns, found {','.join(header)[:80]!r}; add a line of "
            "names, such as a,b,c, above it"
        )
    if "" in header[1:]:
        column = header.index("", 1) + 1
        raise InputError(
            f"{path}: the first line must name every column, and column {column} has no name; name it, "
            "or delete the column (perhaps a separator at the ends of the lines)"
        )
    if len(set(header)) < len(header):
        repeated = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}: two columns are called {repeated!r}; give each its own name")


def _row(path: Path, number: int, header: list[str], row: list[str], comma: bool) -> list[float]:
    if len(row) != len(header):
        raise InputError(
            f"{path}, line {number}: {len(row)} values, and the header names {len(header)} columns, "
            f"{','.join(header)[:80]!r}; correct one of the lines (where commas are decimal commas, separate "
            "columns by semicolons)"
        )
    values = []
    for name, cell in zip(header, row, strict=True):
        value = _number(cell, comma)
        if value is None or not np.isfinite(value):
            reason = f"{cell.strip()[:80]!r} is no finite number" if cell.strip() else "the value is missing"
            way = "leave the row out or fill the value in"
            if cell.strip() and value is None:
                way += "; in a column of words write a number for each word, or leave the column out"
            if comma and "." in cell:
                way = "other numbers of the file have decimal commas, so write all of them with a point"
            elif "," in cell:
                way = "write numbers with a decimal point and without separators of thousands"
            raise InputError(f"{path}, line {number}, column {name!r}: {reason}; {way}")
        values.append(value)
    return values


def _number(cell: str, comma: bool = False) -> float | None:
    """The number that a cell spells, with a decimal comma where there are some, or None."""
    if "_" in cell or (comma and "." in cell):
        return None
    try:
        return float(cell.replace(",", ".", 1) if comma else cell)
    except ValueError:
        return None
