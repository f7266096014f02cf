"""Tables: one row of parameters for every context, for alphabets and contexts small enough to list."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dflow.core import Context, only_lengths

#: Largest number of parameters of a table.
LARGEST = 1 << 26


class InfillTable(nn.Module):
    """Parameters of hidden entries given known ones, one row for each of the K^n_known contexts.

    It starts as zeros, the identity for the parameters of a bijector. Known entries that are absent are read
    as symbol 0. On one-hot rows the gradient is that of the multilinear extension
    ``sum_c table[c] prod_i x[i, c_i]`` at the hard rows, at a cost of n_known x K rows a sequence.

    Args:
        K: size of the alphabet.
        num_params: numbers for each hidden entry.
        known, hidden: int64 ``(n_known,)`` and ``(n_hidden,)``: positions in the whole sequence.

    Raises:
        ValueError: more than `LARGEST` numbers.

    >>> InfillTable(3, 3, torch.tensor([0, 1]), torch.tensor([2]))(torch.tensor([[2, 1]])).shape
    torch.Size([1, 1, 3])
    """

    known: Tensor
    places: Tensor

    def __init__(self, K: int, num_params: int, known: Tensor, hidden: Tensor) -> None:
        super().__init__()
        self.K, self.num_hidden = K, len(hidden)
        self.register_buffer("known", known.clone())
        self.register_buffer("places", K ** torch.arange(len(known) - 1, -1, -1))
        self.table = nn.Parameter(torch.zeros(_checked(K ** len(known), len(hidden) * num_params)))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters ``(batch, n_hidden, num_params)``.

        Args:
            x: int64 ``(batch, n_known)`` or hard one-hot rows ``(batch, n_known, K)``.
            context: lengths of whole sequences, or None.
        """
        symbols = x.argmax(-1) if x.is_floating_point() else x
        lengths = only_lengths(context, len(x))
        absent = None if lengths is None else self.known >= lengths[:, None]
        if absent is not None:
            symbols = symbols.masked_fill(absent, 0)
        code = (symbols * self.places).sum(1)
        out = _rows(self.table, code)
        if x.is_floating_point() and x.requires_grad:
            # Rows of all contexts that differ in one entry; the product with x contributes only its gradient.
            line = torch.arange(self.K, device=x.device)
            other = code[:, None, None] + (line - symbols[..., None]) * self.places[:, None]
            weight = x if absent is None else torch.where(absent[..., None], 0.0, x)
            soft = torch.einsum("bik,bikp->bp", weight, self.table.detach()[other].to(x.dtype))
            out = out + (soft - soft.detach()).to(out.dtype)
        params: Tensor = out.unflatten(1, (self.num_hidden, -1))
        return params


class PrefixTable(nn.Module):
    """A `SequenceNet` with a row for each of the ``1 + K + ... + K^(dim-1)`` prefixes.

    It starts as zeros. It ignores lengths, which is right: absent entries come last. There is no gradient for
    one-hot rows ``x``, only for the table.

    Args:
        K: size of the alphabet.
        num_params: numbers for each entry.
        dim: number of entries.

    Raises:
        ValueError: more than `LARGEST` numbers.
    """

    first_rows: Tensor

    def __init__(self, K: int, num_params: int, dim: int) -> None:
        super().__init__()
        self.K, self.dim = K, dim
        first_rows = [(K**i - 1) // (K - 1) for i in range(dim + 1)]
        self.table = nn.Parameter(torch.zeros(_checked(first_rows[dim], num_params)))
        self.register_buffer("first_rows", torch.tensor(first_rows[:dim]))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters ``(batch, n, num_params)`` of symbols ``(batch, n)`` or rows ``(batch, n, K)``."""
        only_lengths(context, len(x))
        symbols = x.argmax(-1) if x.is_floating_point() else x
        code = torch.zeros_like(symbols)
        for i in range(1, symbols.shape[1]):
            code[:, i] = code[:, i - 1] * self.K + symbols[:, i - 1]
        return _rows(self.table, code + self.first_rows[: symbols.shape[1]])

    def start(self, batch: int, context: Context | None = None) -> _PrefixState:
        """State before the first entry."""
        only_lengths(context, batch)
        return _PrefixState(torch.zeros(batch, dtype=torch.int64, device=self.table.device))

    def step(self, x: Tensor | None, state: _PrefixState) -> Tensor:
        """Parameters ``(batch, 1, num_params)`` of the next entry; ``x`` ``(batch, 1)`` is None at first."""
        if x is not None:
            state.code = state.code * self.K + x[:, 0]
            state.call += 1
        return _rows(self.table, state.code + self.first_rows[state.call])[:, None]


class _PrefixState:
    def __init__(self, code: Tensor) -> None:
        self.code, self.call = code, 0


def _rows(table: Tensor, index: Tensor) -> Tensor:
    return nn.functional.embedding(index, table)


def _checked(rows: int, columns: int) -> tuple[int, int]:
    if rows * columns > LARGEST:
        raise ValueError(
            f"a table of {rows:,} contexts x {columns} numbers is too large; at most {LARGEST:,}"
        )
    return rows, columns
