"""Arrays of numpy in files: read without running anything, checked before any memory is taken."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dflow.config import InputError

Array = NDArray[Any]

#: Errors of numpy and the parsers under it for bytes that are no header.
_NO_HEADER = (
    ValueError, SyntaxError, TypeError, KeyError, IndexError, EOFError, OverflowError, RecursionError,
    MemoryError, struct.error, tokenize.TokenError,
)  # fmt: skip
#: Errors for a damaged archive.
_NO_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, RuntimeError, struct.error,
    NotImplementedError,
)  # fmt: skip


def from_npy(data: bytes, name: str | Path) -> Array:
    """The array of a ``.npy`` file, in C order and the byte order of this machine.

    Args:
        data: content of the file.
        name: of the file, for errors.

    Raises:
        InputError: No such file, a damaged one, one whose size is not what its header says, or one that holds
            anything but numbers.
    """
    if data.startswith(b"PK"):
        raise InputError(
            f"{name}: an archive of arrays (.npz), not one array (.npy); save the array with numpy.save"
        )
    shape, fortran, dtype, start = _header(data, name)
    if dtype.hasobject or dtype.kind not in "biuf":
        raise InputError(
            f"{name}: no array of numbers but one of {dtype}, which is not read; save integers or floats"
        )
    if any(type(n) is not int or n < 0 for n in shape):
        raise InputError(f"{name}: damaged, its header says that it is of shape {shape}; save it again")
    size, expected = len(data) - start, math.prod(shape) * dtype.itemsize
    if size != expected:
        raise InputError(
            f"{name}: {size:,} bytes follow its header, which says {expected:,} (shape {shape} of {dtype}); "
            + ("the file is truncated or damaged" if size < expected else "save each array to its own file")
        )
    flat = np.frombuffer(data, dtype, offset=start)
    values = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return np.ascontiguousarray(values, dtype.newbyteorder("=")).reshape(shape)


def from_npz(path: Path, names: Sequence[str], limit: int) -> list[Array]:
    """Arrays of a ``.npz`` file of up to ``limit`` bytes together.

    Raises:
        InputError: Damaged, an array is missing, or what `from_npy` refuses.
    """
    arrays = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                # A small archive may say that it holds any amount, and may hold it.
                with archive.open(f"{name}.npy") as member:
                    data = member.read(limit + 1)
                if len(data) > limit:
                    raise ValueError(f"more than the {limit:,} bytes that were expected")
                limit -= len(data)
                arrays.append(from_npy(data, name))
    except _NO_ARCHIVE as error:
        raise InputError(
            f"{path}: damaged or truncated, or without the arrays {', '.join(names)} ({error}); fetch the "
            "file again"
        ) from error
    return arrays


def _header(data: bytes, name: str | Path) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, dtype, and where the values begin."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"format {version[0]}.{version[1]}, which is that of named fields")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 2 wrote headers that are read with a warning
            shape, fortran, dtype = readers[version](file)
    except _NO_HEADER as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name}: damaged, truncated or no array ({reason}); save it again") from None
    return shape, fortran, dtype, file.tell()
