r"""Laws that are known: no model can beat their entropy, so a result can be told as a distance from it.

A law is over sequences of ``dim`` symbols of Z/K. It is drawn from, never stored: a batch is as fresh as its
generator. Names (``synthetic/`` before them in a recipe) are the keys of `LAWS`, parameters the fields of the
classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dflow.config import InputError, nearest, parse

PREFIX = "synthetic/"

#: Largest K^dim whose outcomes are listed, so that an expectation is a sum and not an estimate.
ENUMERABLE = 1 << 18

#: Largest number of probabilities that a law keeps in a table.
_TABLE = 1 << 24


def parameter(default: Any, help: str) -> Any:
    """A parameter of a law, with a line of help."""
    return field(default=default, metadata={"help": help})


class Law(ABC):
    """A law of sequences of ``dim`` symbols of Z/K.

    Attributes:
        note: a line about it.
        source: where it comes from.
    """

    note: ClassVar[str]
    source: ClassVar[str]

    @property
    @abstractmethod
    def K(self) -> int:
        """Size of the alphabet."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Entries of a sequence."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws, int64 ``(n, dim)``; they depend on the generator alone, which is on the CPU."""

    @property
    @abstractmethod
    def entropy(self) -> float | None:
        """Exact entropy of a sequence in nats; None where it is not to be had."""

    @property
    @abstractmethod
    def factorized(self) -> float | None:
        """Sum of the exact entropies of the entries in nats: what independent entries cost at best."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor | None:
        """Exact log-probability in nats, float64 ``(batch,)``, of symbols; None where there is no entropy."""

    @cached_property
    def support(self) -> tuple[Tensor, Tensor] | None:
        """All possible outcomes, int64 ``(n, dim)``, and their probabilities, float64 ``(n,)``.

        None where K^dim is above `ENUMERABLE` or the probabilities are not known.
        """
        if self.entropy is None or self.K**self.dim > ENUMERABLE:
            return None
        x = sequences(self.K, self.dim)
        log_p = self.log_prob(x)
        if log_p is None:
            return None
        possible = log_p > -math.inf
        return x[possible], log_p[possible].exp()


def sequences(K: int, dim: int) -> Tensor:
    """All K^dim sequences, int64 ``(K^dim, dim)``, in lexicographic order."""
    return torch.arange(K**dim)[:, None] // _powers(K, dim) % K


def entropy(p: Tensor) -> float:
    """Entropy in nats of probabilities of any shape, in float64."""
    return -float(torch.special.xlogy(p, p).sum())


def _powers(K: int, dim: int) -> Tensor:
    return K ** torch.arange(dim - 1, -1, -1)


def _uniform(possible: Tensor, entropy: float) -> Tensor:
    """Log-probabilities of a law that is uniform over its outcomes."""
    return torch.full(possible.shape, -entropy, dtype=torch.float64).masked_fill(~possible, -math.inf)


def _check(**bounds: tuple[int, int, float]) -> None:
    for name, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise InputError(f"{name} must lie in {low}..{high}, found {value}")


class _Table(Law):
    """A law given by the probabilities of all its outcomes."""

    @cached_property
    @abstractmethod
    def probabilities(self) -> Tensor:
        """Float64, ``(K,) * dim``."""

    @cached_property
    def _cumulative(self) -> Tensor:
        return self.probabilities.flatten().cumsum(0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """By the inverse of the distribution function."""
        u = torch.rand(n, dtype=torch.float64, generator=generator) * self._cumulative[-1]
        # A number that rounds up to the whole mass, or meets the end of an impossible outcome exactly.
        code = torch.searchsorted(self._cumulative, u, right=True).clamp_(max=self._last)
        return code[:, None] // _powers(self.K, self.dim) % self.K

    @cached_property
    def _last(self) -> int:
        return int(self.probabilities.flatten().nonzero().max())

    @cached_property
    def entropy(self) -> float:
        """By the sum over the table."""
        return entropy(self.probabilities)

    @cached_property
    def factorized(self) -> float:
        """By sums over the table."""
        marginals = (self.probabilities.movedim(i, 0).reshape(self.K, -1).sum(1) for i in range(self.dim))
        return sum(map(entropy, marginals))

    def log_prob(self, x: Tensor) -> Tensor:
        """By the table."""
        return self.probabilities.flatten()[(x * _powers(self.K, self.dim)).sum(1)].log()


@dataclass(frozen=True)
class EightGaussians(_Table):
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
class FullRank(_Table):
    """One draw of a Dirichlet(1) law over all K^dim sequences: no structure but what a model memorises."""

    note = "one Dirichlet(1) draw over all sequences"
    source = "Tran et al. 2019, arXiv 1905.10347, table 1"

    dim: int = parameter(5, "entries")
    K: int = parameter(5, "size of the alphabet")
    seed: int = parameter(0, "of the draw of the law")

    def __post_init__(self) -> None:
        _check(dim=(self.dim, 1, 24), K=(self.K, 2, _TABLE), seed=(self.seed, 0, 2**63 - 1))
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
class Addition(Law):
    """Two uniform numbers of ``digits`` digits and their sum without the carry out, highest digits first."""

    note = "two numbers and the last digits of their sum"
    source = "Tran et al. 2019, arXiv 1905.10347, section 4.2"

    digits: int = parameter(10, "digits of each number")

    K = 10

    def __post_init__(self) -> None:
        _check(digits=(self.digits, 1, 1000))

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
        """Digits at random, then added."""
        terms = torch.randint(10, (n, 2, self.digits), generator=generator)
        return torch.cat([terms.flatten(1), self._sum(terms)], 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Minus the entropy where the sum is right."""
        terms = x[:, : 2 * self.digits].unflatten(1, (2, self.digits))
        right = (self._sum(terms) == x[:, 2 * self.digits :]).all(1)
        return _uniform(right, self.entropy)

    def _sum(self, terms: Tensor) -> Tensor:
        digits = terms.sum(1)
        for i in range(self.digits - 1, 0, -1):
            digits[:, i - 1] += digits[:, i] // 10
        return digits % 10


@dataclass(frozen=True)
class Potts(Law):
    r"""Potts model on a square lattice, ``p(x) ~ exp(coupling * number of equal neighbours)``.

    Rows and columns close into a torus when ``periodic`` (every entry then has four neighbours; it takes
    ``side >= 3``), and each pair of neighbours counts once. Up to `_ROWS` states of a row the law is exact by
    the transfer matrix between rows: Z = tr T^side on the torus, and rows are drawn one after another from
    their conditional laws. Beyond, draws come from ``sweeps`` sweeps of Gibbs sampling from a uniform start,
    which is an approximation, and there is no entropy.

    Entries of a draw are in the order of rows.
    """

    note = "Potts model on a square lattice, by transfer matrix"
    source = "Potts 1952; Kramers and Wannier 1941 (transfer matrix); Tran et al. 2019, arXiv 1905.10347"

    side: int = parameter(3, "rows and columns")
    states: int = parameter(3, "states of an entry")
    coupling: float = parameter(0.1, "log odds of an equal pair of neighbours")
    periodic: bool = parameter(True, "close rows and columns into a torus")
    sweeps: int = parameter(200, "sweeps of Gibbs sampling, where rows have too many states to be exact")

    def __post_init__(self) -> None:
        _check(side=(self.side, 3 if self.periodic else 1, 256), states=(self.states, 2, 256))
        _check(sweeps=(self.sweeps, 1, 10**9))
        if not math.isfinite(self.coupling):
            raise InputError(f"coupling must be finite, found {self.coupling}")

    @property
    def K(self) -> int:
        """The states."""
        return self.states

    @property
    def dim(self) -> int:
        """Entries of the lattice."""
        return self.side**2

    @property
    def factorized(self) -> float:
        """``dim ln K``: the states are alike, so every entry is uniform."""
        return self.dim * math.log(self.K)

    @property
    def exact(self) -> bool:
        """Whether a row has few enough states for the transfer matrix."""
        return int(self.states**self.side) <= _ROWS

    @cached_property
    def _rows(self) -> Tensor:
        return sequences(self.states, self.side)

    def _energy(self, x: Tensor, axis: int) -> Tensor:
        """Equal neighbours along an axis of ``x`` (..., side), summed over that axis."""
        if self.periodic:
            return (x == x.roll(-1, axis)).sum(axis)
        n = self.side - 1
        return (x.narrow(axis, 0, n) == x.narrow(axis, 1, n)).sum(axis)

    @cached_property
    def _inside(self) -> Tensor:
        """Log weight of a row, ``(rows,)``."""
        return self.coupling * self._energy(self._rows, 1).double()

    @cached_property
    def _between(self) -> Tensor:
        """Log weight of two rows above each other, ``(rows, rows)``."""
        pairs = torch.zeros(len(self._rows), len(self._rows), dtype=torch.float64)
        for column in self._rows.T:
            pairs += column[:, None] == column
        return self.coupling * pairs

    @cached_property
    def _step(self) -> tuple[Tensor, float]:
        """Weights of a row below another, ``(rows, rows)``, scaled to at most 1, and the log of the scale."""
        log_step = self._between + self._inside
        top = float(log_step.max())
        return (log_step - top).exp(), top

    @cached_property
    def _chain(self) -> tuple[list[Tensor], float]:
        """``M_k``, the weights of what lies between rows k apart, for k = 0 .. side; and log Z.

        Matrices ``(first row, last row)`` on the torus; open, vectors ``(row,)`` of all that lies below it.
        Each is scaled to a maximum of 1, and the logs of the scales go into log Z.
        """
        step, log_step = self._step
        rest = torch.eye(len(step), dtype=torch.float64) if self.periodic else torch.ones_like(step[0])
        found, log_scale = [rest], 0.0
        for _ in range(self.side if self.periodic else self.side - 1):
            rest = step @ rest
            scale = float(rest.max())
            rest = rest / scale
            log_scale += math.log(scale) + log_step
            found.append(rest)
        if self.periodic:
            return found, math.log(float(rest.trace())) + log_scale
        return found, float((self._inside + rest.log()).logsumexp(0)) + log_scale

    @property
    def log_normalizer(self) -> float:
        """The log of the sum of all weights, log Z."""
        return self._chain[1]

    @cached_property
    def entropy(self) -> float | None:
        """``log Z - E[log weight]``, by the laws of a row and of two neighbouring rows."""
        if not self.exact:
            return None
        found, log_z = self._chain
        step, _ = self._step
        if self.periodic:
            pairs = step * found[self.side - 1].T
            pairs /= pairs.sum()
            mean = self.side * float((pairs * (self._between + self._inside)).sum())
            return log_z - mean
        above, mean = (self._inside - self._inside.max()).exp(), 0.0
        for i in range(self.side):
            row = above * found[self.side - 1 - i]
            mean += float((row * self._inside).sum() / row.sum())
            if i + 1 < self.side:
                pairs = above[:, None] * step * found[self.side - 2 - i]
                mean += float((pairs * self._between).sum() / pairs.sum())
                above = above @ step
                above = above / above.max()
        return log_z - mean

    def log_prob(self, x: Tensor) -> Tensor | None:
        """The log weight less log Z."""
        if not self.exact:
            return None
        lattice = x.unflatten(1, (self.side, self.side))
        equal = self._energy(lattice, 1).sum(1) + self._energy(lattice, 2).sum(1)
        return self.coupling * equal.double() - self.log_normalizer

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Exactly, row by row; by Gibbs sampling where there is no entropy."""
        if not self.exact:
            return self._gibbs(n, generator)
        parts = [self._by_rows(min(_DRAWS, n - start), generator) for start in range(0, n, _DRAWS)]
        return torch.cat(parts) if parts else torch.empty(0, self.dim, dtype=torch.int64)

    def _by_rows(self, n: int, generator: torch.Generator | None) -> Tensor:
        found, _ = self._chain
        step, _ = self._step
        law = found[-1].diagonal() if self.periodic else (self._inside - self._inside.max()).exp() * found[-1]
        first = row = law.multinomial(n, replacement=True, generator=generator)
        drawn = [row]
        for left in range(self.side - 1, 0, -1):
            # On the torus what is left to draw leads back to the first row.
            rest = found[left].T[first] if self.periodic else found[left - 1]
            row = (step[row] * rest).multinomial(1, generator=generator).squeeze(1)
            drawn.append(row)
        return self._rows[torch.stack(drawn, 1)].flatten(1)

    def _gibbs(self, n: int, generator: torch.Generator | None) -> Tensor:
        neighbours, colours = self._neighbours
        # The last column stands for a neighbour that is missing: a state that equals none.
        x = torch.randint(self.K, (n, self.dim + 1), generator=generator, dtype=torch.int16)
        x[:, -1] = self.K
        for _ in range(self.sweeps):
            for colour in colours:
                near = x[:, neighbours[colour]]
                equal = torch.stack([(near == k).sum(2) for k in range(self.K)], 2)
                u = torch.rand(equal.shape, generator=generator)
                # Arg-max of logits plus Gumbel noise is an exact draw.
                x[:, colour] = (self.coupling * equal - u.log_().neg_().log_()).argmax(-1).to(x.dtype)
        return x[:, :-1].long()

    @cached_property
    def _neighbours(self) -> tuple[Tensor, list[Tensor]]:
        """Neighbours ``(dim, 4)``, ``dim`` for a missing one; and sites in classes that share no pair."""
        line = torch.arange(self.dim)
        row, column = line // self.side, line % self.side
        found = []
        for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            r, c = row + down, column + right
            inside = (r >= 0) & (r < self.side) & (c >= 0) & (c < self.side)
            other = r % self.side * self.side + c % self.side
            found.append(other if self.periodic else torch.where(inside, other, self.dim))
        neighbours = torch.stack(found, 1)
        colour = [-1] * self.dim
        for site, others in enumerate(neighbours.tolist()):
            taken = {colour[o] for o in others if o < self.dim}
            colour[site] = next(c for c in range(5) if c not in taken)
        colours = torch.tensor(colour)
        return neighbours, [(colours == c).nonzero().flatten() for c in range(int(colours.max()) + 1)]


#: Largest number of states of a row of a Potts model that is exact.
_ROWS = 1024

#: Lattices drawn together, each with a law over the states of a row.
_DRAWS = 2048


@dataclass(frozen=True)
class SetShuffling(Law):
    """A uniform permutation of 0 .. size - 1."""

    note = "a random permutation"
    source = "Lippe and Gavves 2021, arXiv 2006.09790"

    size: int = parameter(16, "elements")

    def __post_init__(self) -> None:
        _check(size=(self.size, 2, 4096))

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

    def log_prob(self, x: Tensor) -> Tensor:
        """Minus the entropy where every element is there."""
        right = (x.sort(1).values == torch.arange(self.size)).all(1)
        return _uniform(right, self.entropy)


@dataclass(frozen=True)
class SetSummation(Law):
    """Uniform over the sequences of ``size`` numbers in 1 .. ``largest`` that add up to ``total``.

    Symbol k stands for the number k + 1. The published optimum of 2.24 bits a number for 16 numbers that add
    up to 42 is that of ``largest`` 16 (2.2427; with ``largest`` 8 it would be 2.2162). Sequences are counted
    by dynamic programming over entries left and sum left.
    """

    note = "numbers with a given sum"
    source = "Lippe and Gavves 2021, arXiv 2006.09790"

    size: int = parameter(16, "numbers")
    total: int = parameter(42, "their sum")
    largest: int = parameter(16, "largest number; the smallest is 1")

    def __post_init__(self) -> None:
        _check(size=(self.size, 1, 1024), largest=(self.largest, 2, 1024))
        _check(total=(self.total, self.size, self.size * self.largest))

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
        left = torch.full((n,), self.total)
        drawn = []
        u = torch.rand(self.size, n, 1, dtype=torch.float64, generator=generator)
        for entries in range(self.size, 0, -1):
            cumulative = self._cumulative[entries, left]
            x = (u[entries - 1] * cumulative[:, -1:] >= cumulative).sum(1)
            left = left - x - 1
            drawn.append(x)
        return torch.stack(drawn, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Minus the entropy where the sum is right."""
        return _uniform(x.sum(1) + self.dim == self.total, self.entropy)


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
    found: Law = parse(kind, parameters, f"{where}.parameters")
    return found
