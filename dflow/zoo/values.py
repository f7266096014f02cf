"""Settings that all families over images and tables share: shape and range of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from dflow.config import InputError
from dflow.zoo.settings import check_settings, setting

Shape = tuple[int, int, int]

#: Error of a builder whose settings lack those of the data.
MISSING = "shape and levels are missing; they are those of the data that the model is trained on"

#: Up to this integer float32 can represent x + 1/2.
LARGEST = 1 << 22

#: Largest number of entries of a datum.
_MOST = 1 << 24


@dataclass
class ValuesConfig:
    """Shape and range of the data."""

    shape: list[int] = setting([], "channels, height, width (default: those of the data)")
    levels: list[int | None] = setting(
        [],
        "number of values of an entry, one for all or one for each column; null for a real "
        "column (default: those of the data)",
        least=1,
    )
    lowest: list[int | None] = setting(
        [], "smallest value of an entry, in the same way (default: that of the data)"
    )
    columns: list[str] = setting([], "names of the columns of a table (default: those of the data)")
    loc: list[float | None] = setting(
        [],
        "number that is subtracted from each real column, null for a discrete one (default: the "
        "mean over the training rows)",
    )
    scale: list[float | None] = setting(
        [],
        "number by which each real column is divided, in the same way (default: the standard "
        "deviation over the training rows)",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.shape and (len(self.shape) != 3 or min(self.shape) < 1):
            raise InputError(f"shape must be channels, height and width, found {self.shape}")
        if self.dim > _MOST:
            raise InputError(
                f"shape {self.shape} is of {self.dim:,} entries, more than the {_MOST:,} that a model is "
                "built for: cut the data (data.tiles, data.crop)"
            )
        if self.shape and len(self.levels) not in (0, 1, prod(self.shape)):
            raise InputError(f"levels must be one number, or {prod(self.shape)}, found {len(self.levels)}")
        if self.shape and len(self.lowest) not in (0, len(self.levels)):
            raise InputError(
                f"lowest must be as many as levels, {len(self.levels)}, found {len(self.lowest)}"
            )
        if self.shape and len(self.columns) not in (0, self.dim):
            raise InputError(f"columns must be {self.dim} names, found {len(self.columns)}")
        self._check_units()

    def _check_units(self) -> None:
        """InputError unless all real columns have a loc and a scale, or none has."""
        if not self.loc and not self.scale:
            return
        real = [level is None for level in self.levels]
        for name in ("loc", "scale"):
            values = getattr(self, name)
            if [value is not None for value in values] != real:
                raise InputError(f"{name} must be a number for each real column, and null for each other")
        if any(value is not None and value <= 0 for value in self.scale):
            raise InputError(f"scale must be above 0, found {self.scale}")

    def about(self) -> str:
        """One line about the model, shown when it is trained; "" to show only the name of its family."""
        return ""

    @property
    def dim(self) -> int:
        """Entries of one datum."""
        return prod(self.shape) if self.shape else 0

    @property
    def ranges(self) -> list[tuple[int, int] | None]:
        """Smallest and largest value of each entry; None for a real one."""
        lowest = self.lowest or [0]
        lows = lowest if len(lowest) == self.dim else lowest * self.dim
        levels = self.levels if len(self.levels) == self.dim else self.levels * self.dim
        pairs = zip(lows, levels, strict=True)
        return [None if low is None or n is None else (low, low + n - 1) for low, n in pairs]

    @property
    def support(self) -> list[tuple[int, int] | None]:
        """Smallest and largest value of each entry that can be scored; None for a real one."""
        return self.ranges


@contextmanager
def naming_setting(setting: str) -> Iterator[None]:
    """Turn a ValueError of a network into an `InputError` that names the setting."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{setting}: {error}") from None
