"""Partitions of the reals into cells, one for each discrete value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dflow.ops.devices import widen, widest


class Partition(nn.Module, ABC):
    """Disjoint boxes that cover space, one for each discrete ``x`` ``(batch, dim)``.

    Cells are closed below and open above. ``x`` may be of any dtype that holds its values; whatever is
    computed is at least float32, with autocast off.

    Raises:
        ValueError: an ``x`` that is not ``(batch, dim)`` or has no cell, or whose cell the dtype of ``v``
            cannot resolve.
    """

    #: No cell reaches to infinity.
    finite: bool

    @abstractmethod
    def bounds(self, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(lower, upper)`` ends of the cells of ``x``, like ``x``; they may be infinite."""

    @abstractmethod
    def quantize(self, v: Tensor) -> Tensor:
        """``x`` whose cell holds ``v`` ``(batch, dim)``, int64."""

    @abstractmethod
    def spread(self, z: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The line onto the open interval between ``lower`` and ``upper``: ``(v, log dv/dz)``."""

    def place(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unconstrained ``z`` to the cells of ``x``.

        Args:
            z: ``(batch, d)``, one number for each of the d discrete columns.
            x: ``(batch, dim)``.

        Returns:
            v ``(batch, dim)`` with ``quantize(v) == x`` for any z, and log_det ``(batch, d)``.
        """
        dtype = torch.promote_types(z.dtype, torch.float32)
        with torch.autocast(device_type=z.device.type, enabled=False):
            lower, upper = self.bounds(x, dtype)
            if z.shape != (len(x), self.count(x.shape[1])):
                raise ValueError(f"z has shape {tuple(z.shape)} for x of shape {tuple(x.shape)}")
            v, log_det = self.spread(z.to(dtype), lower, upper)
            return inside(v, lower, upper), log_det

    def discrete(self, dim: int) -> Tensor:
        """Bool ``(dim,)``: columns that are discrete."""
        return torch.ones(dim, dtype=torch.bool)

    def count(self, dim: int) -> int:
        """Number of discrete columns among ``dim``."""
        return dim


def inside(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """``v``, held to the numbers of its dtype in ``[lower, upper)``: x + u alone may round up to x + 1."""
    return torch.clamp(torch.maximum(v, lower), max=torch.nextafter(upper, lower))


class Hypercube(Partition):
    """Unit cells ``[x, x + 1)`` for integers ``x``; ``v = x + sigmoid(z)``.

    >>> v, log_det = Hypercube().place(torch.tensor([[0.0, 40.0]]), torch.tensor([[7, 254]]))
    >>> Hypercube().quantize(v), log_det
    (tensor([[  7, 254]]), tensor([[ -1.3863, -40.0000]]))

    Source: Theis et al. 2016, arXiv 1511.01844; Hoogeboom et al. 2020, arXiv 2001.11235.
    """

    finite = True

    def bounds(self, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(x, x + 1)``."""
        lower = _values(x, dtype)
        # From 2^23 in float32 on, no number lies inside a cell.
        fits = (lower == lower.floor()) & (lower.abs() < 1 / torch.finfo(dtype).eps)
        # Looking at them would wait for an accelerator, at every step, and what is compiled reads no values.
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not fits.all():
            raise ValueError(f"{dtype} has no unit cell for {_misfit(x, fits)}: is it an integer?")
        return lower, lower + 1

    def quantize(self, v: Tensor) -> Tensor:
        """``floor(v)``, int64."""
        return _finite(v).floor().to(torch.int64)

    def spread(self, z: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """``lower + sigmoid(z)``; its log_det comes from z, since u = sigmoid(z) saturates."""
        return lower + torch.sigmoid(z), F.logsigmoid(z) + F.logsigmoid(-z)


class Orthant(Partition):
    """Half-lines for binary ``x``: ``v >= threshold`` is 1; ``v = threshold + (2x - 1) softplus(z)``.

    Each cell holds the hypercube of its ``x``, and no probability lies outside {0, 1}^dim. (The set
    ``x + u, u >= 0`` for x in {-1, 1} that is printed in the source overlaps for -1 and 1.)

    Source: Winkler et al. 2019, arXiv 1912.00042; Hoogeboom et al. 2020, arXiv 2001.11235, section 3.1.
    """

    finite = False

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"threshold={self.threshold}"

    def bounds(self, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(threshold, inf)`` at 1, ``(-inf, threshold)`` at 0."""
        values = _values(x, dtype)
        fits = (values == 0) | (values == 1)
        if not torch.compiler.is_compiling() and not fits.all():
            raise ValueError(f"orthants are the cells of 0 and 1, found {_misfit(x, fits)}")
        ones = values == 1
        infinite = values.new_tensor(torch.inf)
        return torch.where(ones, self.threshold, -infinite), torch.where(ones, infinite, self.threshold)

    def quantize(self, v: Tensor) -> Tensor:
        """``v >= threshold``, int64."""
        return (_finite(v) >= self.threshold).to(torch.int64)

    def spread(self, z: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Softplus away from the finite end."""
        r = F.softplus(z)
        return torch.where(torch.isinf(upper), lower + r, upper - r), F.logsigmoid(z)


class Columns(Partition):
    """A partition for each run of columns of a table; None where columns are continuous.

    A continuous column is its own ``v``: it is not dequantized. Where there is one, ``x`` has to be
    floating, and `quantize` gives float64.

    Args:
        runs: partition and number of columns of each run, from the left.

    Raises:
        ValueError: a run without columns, no discrete column, or an ``x`` of another dim.
    """

    mask: Tensor

    def __init__(self, runs: Sequence[tuple[Partition | None, int]]) -> None:
        super().__init__()
        if any(width < 1 for _, width in runs) or all(cells is None for cells, _ in runs):
            raise ValueError(f"runs need columns, one of them discrete, found {list(runs)}")
        self.partitions = nn.ModuleList([cells for cells, _ in runs if cells is not None])
        self.runs = tuple(runs)
        masks = [
            torch.zeros(width, dtype=torch.bool) if cells is None else cells.discrete(width)
            for cells, width in runs
        ]
        self.finite = all(cells.finite for cells, _ in runs if cells is not None)
        self.register_buffer("mask", torch.cat(masks))
        self._count = int(self.mask.sum())

    def bounds(self, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Those of each run; ``(x, x)`` for continuous columns."""
        ends = []
        for (cells, _), values in zip(self.runs, self._split(x), strict=True):
            if cells is None:
                same = _values(values, dtype)
                ends.append((same, same))
            else:
                ends.append(cells.bounds(values, dtype))
        lower, upper = zip(*ends, strict=True)
        return torch.cat(lower, 1), torch.cat(upper, 1)

    def quantize(self, v: Tensor) -> Tensor:
        """Each run by its partition; int64, or float64 where a column is continuous."""
        runs = zip(self.runs, self._split(v), strict=True)
        columns = [widen(values) if cells is None else cells.quantize(values) for (cells, _), values in runs]
        dtype = torch.int64 if self._count == len(self.mask) else widest(v.device)
        return torch.cat([values.to(dtype) for values in columns], 1)

    def spread(self, z: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Each run by its partition; continuous columns stay."""
        v, log_det, start = [], [], 0
        for (cells, width), low, high in zip(self.runs, self._split(lower), self._split(upper), strict=True):
            if cells is None:
                v.append(low)
                continue
            end = start + cells.count(width)
            placed, term = cells.spread(z[:, start:end], low, high)
            v.append(placed)
            log_det.append(term)
            start = end
        return torch.cat(v, 1), torch.cat(log_det, 1)

    def discrete(self, dim: int) -> Tensor:
        """Bool ``(dim,)``: columns of a run with a partition."""
        self._check(dim)
        return self.mask

    def count(self, dim: int) -> int:
        """Number of discrete columns."""
        self._check(dim)
        return self._count

    def _check(self, dim: int) -> None:
        if dim != len(self.mask):
            raise ValueError(f"a partition of {len(self.mask)} columns for {dim}")

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim != 2:
            raise ValueError(f"expected (batch, dim), found shape {tuple(x.shape)}")
        self._check(x.shape[1])
        runs: tuple[Tensor, ...] = x.split([width for _, width in self.runs], 1)
        return runs


def _values(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"expected x (batch, dim), found shape {tuple(x.shape)}")
    return x.to(dtype)


def _misfit(x: Tensor, fits: Tensor) -> str:
    row, column = (~fits).nonzero()[0].tolist()
    return f"{x[row, column].item()} in row {row}, column {column}"


def _finite(v: Tensor) -> Tensor:
    if not torch.isfinite(v).all():
        raise ValueError("v is not finite: the density has gone astray")
    return v
