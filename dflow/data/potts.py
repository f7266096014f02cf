"""The Potts model on a square lattice: exact by transfer matrices where rows have few states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dflow.config import InputError
from dflow.data.laws import Law, check_bounds, sequences
from dflow.zoo import setting

#: Largest number of states of a row for which the law is exact.
_EXACT_ROWS = 1024
#: Lattices drawn together, each with a law over the states of a row.
_DRAWS = 2048


@dataclass(frozen=True)
class Potts(Law):
    r"""Potts model on a square lattice, ``p(x) ~ exp(coupling * number of equal neighbours)``.

    Rows and columns close into a torus when ``periodic`` (every entry then has four neighbours; it takes
    ``side >= 3``), and each pair of neighbours counts once. Up to `_EXACT_ROWS` states of a row the law is
    exact by the transfer matrix between rows: Z = tr T^side on the torus, and rows are drawn one after
    another from their conditional laws. Beyond, draws come from ``sweeps`` sweeps of Gibbs sampling from a
    uniform start, which is an approximation, and there is no entropy.

    Entries of a draw are in the order of rows.
    """

    note = "Potts model on a square lattice, by transfer matrix"
    source = "Potts 1952; Kramers and Wannier 1941 (transfer matrix); Tran et al. 2019, arXiv 1905.10347"

    side: int = setting(3, "rows and columns")
    states: int = setting(3, "states of an entry")
    coupling: float = setting(0.1, "log odds of an equal pair of neighbours")
    periodic: bool = setting(True, "close rows and columns into a torus")
    sweeps: int = setting(200, "sweeps of Gibbs sampling, where rows have too many states to be exact")

    def __post_init__(self) -> None:
        check_bounds(side=(self.side, 3 if self.periodic else 1, 256), states=(self.states, 2, 256))
        check_bounds(sweeps=(self.sweeps, 1, 10**9))
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
        return int(self.states**self.side) <= _EXACT_ROWS

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
        between = torch.eye(len(step), dtype=torch.float64) if self.periodic else torch.ones_like(step[0])
        weights, log_scale = [between], 0.0
        for _ in range(self.side if self.periodic else self.side - 1):
            between = step @ between
            scale = float(between.max())
            between = between / scale
            log_scale += math.log(scale) + log_step
            weights.append(between)
        if self.periodic:
            return weights, math.log(float(between.trace())) + log_scale
        return weights, float((self._inside + between.log()).logsumexp(0)) + log_scale

    @property
    def log_normalizer(self) -> float:
        """The log of the sum of all weights, log Z."""
        return self._chain[1]

    @cached_property
    def entropy(self) -> float | None:
        """``log Z - E[log weight]``, by the laws of a row and of two neighbouring rows."""
        if not self.exact:
            return None
        weights, log_z = self._chain
        step, _ = self._step
        if self.periodic:
            pairs = step * weights[self.side - 1].T
            pairs /= pairs.sum()
            mean = self.side * float((pairs * (self._between + self._inside)).sum())
            return log_z - mean
        above, mean = (self._inside - self._inside.max()).exp(), 0.0
        for i in range(self.side):
            row = above * weights[self.side - 1 - i]
            mean += float((row * self._inside).sum() / row.sum())
            if i + 1 < self.side:
                pairs = above[:, None] * step * weights[self.side - 2 - i]
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
        draws = [self._by_rows(min(_DRAWS, n - start), generator) for start in range(0, n, _DRAWS)]
        return torch.cat(draws) if draws else torch.empty(0, self.dim, dtype=torch.int64)

    def _by_rows(self, n: int, generator: torch.Generator | None) -> Tensor:
        weights, _ = self._chain
        step, _ = self._step
        if self.periodic:
            law = weights[-1].diagonal()
        else:
            law = (self._inside - self._inside.max()).exp() * weights[-1]
        top = row = law.multinomial(n, replacement=True, generator=generator)
        rows = [row]
        for num_below in range(self.side - 1, 0, -1):
            # On the torus the rows below lead back to the top row.
            below = weights[num_below].T[top] if self.periodic else weights[num_below - 1]
            row = (step[row] * below).multinomial(1, generator=generator).squeeze(1)
            rows.append(row)
        return self._rows[torch.stack(rows, 1)].flatten(1)

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
        site = torch.arange(self.dim)
        row, column = site // self.side, site % self.side
        each_way = []
        for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            r, c = row + down, column + right
            inside = (r >= 0) & (r < self.side) & (c >= 0) & (c < self.side)
            neighbour = r % self.side * self.side + c % self.side
            each_way.append(neighbour if self.periodic else torch.where(inside, neighbour, self.dim))
        neighbours = torch.stack(each_way, 1)
        colours = [-1] * self.dim
        for i, around in enumerate(neighbours.tolist()):
            taken = {colours[j] for j in around if j < self.dim}
            colours[i] = next(c for c in range(5) if c not in taken)
        classes = torch.tensor(colours)
        return neighbours, [(classes == c).nonzero().flatten() for c in range(max(colours) + 1)]
