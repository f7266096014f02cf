r"""Laws that are known: no model can beat their entropy, so a result can be given as a distance from it.

A law is over sequences of ``dim`` symbols of Z/K. It is drawn from, never stored: a batch is as fresh as its
generator. Names (``synthetic/`` before them in a recipe) are the keys of `LAWS`, parameters the fields of the
classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dflow.config import InputError, nearest, parse
from dflow.data.laws import Law, TableLaw, UniformLaw, check_bounds, entropy
from dflow.data.potts import Potts
from dflow.zoo import setting

PREFIX = "synthetic/"

#: Largest number of probabilities that a law keeps in a table.
_TABLE = 1 << 24


@dataclass(frozen=True)
class EightGaussians(TableLaw):
    """A ring of eight Gaussians, rounded to a grid.

    Standard deviation 0.1 around eight points on the circle of radius 2, clipped to +-2.25 and rounded to
    ``round(20 x) + 45``. The probabilities are those of the cells, exactly.
    """

    note = "eight Gaussians on a ring, rounded to 91 x 91 cells"
    source = "Tran et al. 2019, arXiv 1905.10347, figure 2; edward2's example"

    K = 91
    dim = 2

    @cached_property
    def probabilities(self) -> Tensor:
        """Products of the masses of intervals, averaged over the eight."""
        edges = (torch.arange(self.K + 1, dtype=torch.float64) - 45.5) / 20
        edges[0], edges[-1] = -math.inf, math.inf
        angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
        centres = 2 * torch.stack([angles.cos(), angles.sin()])
        low, high = ((e - centres[..., None]) / 0.1 for e in (edges[:-1], edges[1:]))
        # Far to the right both ends are 1 to the last bit: the same interval mirrored keeps its mass.
        low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
        masses = torch.special.ndtr(high) - torch.special.ndtr(low)
        return torch.einsum("gi,gj->ij", *masses) / 8


@dataclass(frozen=True)
class FullRank(TableLaw):
    """One draw of a Dirichlet(1) law over all K^dim sequences: no structure but what a model memorises."""

    note = "one Dirichlet(1) draw over all sequences"
    source = "Tran et al. 2019, arXiv 1905.10347, table 1"

    dim: int = setting(5, "entries")
    K: int = setting(5, "size of the alphabet")
    seed: int = setting(0, "of the draw of the law")

    def __post_init__(self) -> None:
        check_bounds(dim=(self.dim, 1, 24), K=(self.K, 2, _TABLE), seed=(self.seed, 0, 2**63 - 1))
        if self.K**self.dim > _TABLE:
            raise InputError(f"K^dim = {self.K}^{self.dim} outcomes are too many; at most {_TABLE:,}")

    @cached_property
    def probabilities(self) -> Tensor:
        """Exponential variates, normalised."""
        generator = torch.Generator().manual_seed(self.seed)
        # Not `exponential_`, which draws differently in different builds of torch.
        u = torch.rand((self.K,) * self.dim, dtype=torch.float64, generator=generator)
        p = -torch.log1p(-u)
        return p / p.sum()


@dataclass(frozen=True)
class Addition(UniformLaw):
    """Two uniform numbers of ``digits`` digits and their sum without the carry out, highest digits first."""

    note = "two numbers and the last digits of their sum"
    source = "Tran et al. 2019, arXiv 1905.10347, section 4.2"

    digits: int = setting(10, "digits of each number")

    K = 10

    def __post_init__(self) -> None:
        check_bounds(digits=(self.digits, 1, 1000))

    @property
    def dim(self) -> int:
        """Three numbers."""
        return 3 * self.digits

    @property
    def entropy(self) -> float:
        """``2 digits ln 10``: the sum is determined."""
        return 2 * self.digits * math.log(10)

    @property
    def factorized(self) -> float:
        """``3 digits ln 10``: every digit is uniform."""
        return 3 * self.digits * math.log(10)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Digits at random, and their sum."""
        terms = torch.randint(10, (n, 2, self.digits), generator=generator)
        return torch.cat([terms.flatten(1), self._sum(terms)], 1)

    def possible(self, x: Tensor) -> Tensor:
        """Those whose sum is right."""
        terms = x[:, : 2 * self.digits].unflatten(1, (2, self.digits))
        return (self._sum(terms) == x[:, 2 * self.digits :]).all(1)

    def _sum(self, terms: Tensor) -> Tensor:
        digits = terms.sum(1)
        for i in range(self.digits - 1, 0, -1):
            digits[:, i - 1] += digits[:, i] // 10
        return digits % 10


@dataclass(frozen=True)
class SetShuffling(UniformLaw):
    """A uniform permutation of 0 .. size - 1."""

    note = "a random permutation"
    source = "Lippe and Gavves 2021, arXiv 2006.09790"

    size: int = setting(16, "elements")

    def __post_init__(self) -> None:
        check_bounds(size=(self.size, 2, 4096))

    @property
    def K(self) -> int:
        """The elements."""
        return self.size

    @property
    def dim(self) -> int:
        """Each once."""
        return self.size

    @property
    def entropy(self) -> float:
        """``ln size!``."""
        return math.lgamma(self.size + 1)

    @property
    def factorized(self) -> float:
        """``size ln size``."""
        return self.size * math.log(self.size)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The order of random numbers."""
        return torch.rand(n, self.size, dtype=torch.float64, generator=generator).argsort(1)

    def possible(self, x: Tensor) -> Tensor:
        """Those that hold every element."""
        return (x.sort(1).values == torch.arange(self.size)).all(1)


@dataclass(frozen=True)
class SetSummation(UniformLaw):
    """Uniform over the sequences of ``size`` numbers in 1 .. ``largest`` that add up to ``total``.

    Symbol k stands for the number k + 1. The published optimum of 2.24 bits a number for 16 numbers that add
    up to 42 is that of ``largest`` 16 (2.2427; with ``largest`` 8 it would be 2.2162). Sequences are counted
    by dynamic programming over entries left and sum left.
    """

    note = "numbers with a given sum"
    source = "Lippe and Gavves 2021, arXiv 2006.09790"

    size: int = setting(16, "numbers")
    total: int = setting(42, "their sum")
    largest: int = setting(16, "largest number; the smallest is 1")

    def __post_init__(self) -> None:
        check_bounds(size=(self.size, 1, 1024), largest=(self.largest, 2, 1024))
        check_bounds(total=(self.total, self.size, self.size * self.largest))

    @property
    def K(self) -> int:
        """The numbers."""
        return self.largest

    @property
    def dim(self) -> int:
        """The entries."""
        return self.size

    @cached_property
    def _counts(self) -> list[list[int]]:
        """``counts[n][s]``: sequences of n numbers that add up to s, in integers of any size."""
        counts = [[1] + [0] * self.total]
        for _ in range(self.size):
            last = counts[-1]
            counts.append(
                [sum(last[max(0, s - self.largest) : s]) if s else 0 for s in range(self.total + 1)]
            )
        return counts

    @cached_property
    def _laws(self) -> Tensor:
        """Law of the next symbol given the entries and the sum left: float64 ``(size + 1, total + 1, K)``."""
        laws = torch.zeros(self.size + 1, self.total + 1, self.K, dtype=torch.float64)
        for n in range(1, self.size + 1):
            for s, whole in enumerate(self._counts[n]):
                if whole:
                    for v in range(1, min(self.largest, s) + 1):
                        laws[n, s, v - 1] = self._counts[n - 1][s - v] / whole
        return laws

    @cached_property
    def _cumulative(self) -> Tensor:
        return self._laws.cumsum(-1)

    @property
    def entropy(self) -> float:
        """The log of their number."""
        return math.log(self._counts[self.size][self.total])

    @cached_property
    def factorized(self) -> float:
        """``size`` times the entropy of the first number: all have its law."""
        return self.size * entropy(self._laws[self.size, self.total])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Number by number, each from its law given the entries and the sum left."""
        remainder = torch.full((n,), self.total)
        numbers = []
        u = torch.rand(self.size, n, 1, dtype=torch.float64, generator=generator)
        for num_entries in range(self.size, 0, -1):
            cumulative = self._cumulative[num_entries, remainder]
            x = (u[num_entries - 1] * cumulative[:, -1:] >= cumulative).sum(1)
            remainder = remainder - x - 1
            numbers.append(x)
        return torch.stack(numbers, 1)

    def possible(self, x: Tensor) -> Tensor:
        """Those whose sum is right."""
        return x.sum(1) + self.dim == self.total


#: Laws by name.
LAWS: dict[str, type[Law]] = {
    "eight_gaussians": EightGaussians,
    "full_rank": FullRank,
    "addition": Addition,
    "potts": Potts,
    "set_shuffling": SetShuffling,
    "set_summation": SetSummation,
}


def is_law(name: str) -> bool:
    """Whether ``name`` is that of a law: it begins with ``synthetic/``."""
    return name.startswith(PREFIX)


def law(name: str, parameters: Mapping[str, Any], where: str = "data") -> Law:
    """The law called ``synthetic/...``, with parameters read strictly.

    >>> law("synthetic/addition", {"digits": 2}).dim
    6
    >>> law("synthetic/adition", {})
    Traceback (most recent call last):
    dflow.config.InputError: data: no law 'adition' among synthetic/; did you mean 'addition'?
    """
    short = name.removeprefix(PREFIX)
    kind = LAWS.get(short)
    if kind is None:
        raise InputError(f"{where}: no law {short!r} among {PREFIX}; {nearest(short, list(LAWS))}")
    parsed: Law = parse(kind, parameters, f"{where}.parameters")
    return parsed
