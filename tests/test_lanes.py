"""Stacks in turn: symbols come back, take their bits, and are decided by numbers that are known before."""

from __future__ import annotations

import math

import pytest
import torch

from dflow.coding.lanes import Lanes, interleave
from dflow.coding.tables import PRECISION, integer_counts


def laws(n: int, K: int, seed: int = 0) -> tuple[list[list[int]], list[int], list[int], list[int]]:
    """Ends of the intervals of n laws, a symbol of each, and where its interval starts and how long it is."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(4 * torch.randn(n, K, generator=generator, dtype=torch.float64), 1)
    symbols = torch.multinomial(p, 1, generator=generator)
    counts = integer_counts(p)
    ends = counts.cumsum(1)
    sizes = counts.gather(1, symbols)
    starts = ends.gather(1, symbols) - sizes
    lists = (tensor.flatten().tolist() for tensor in (symbols, starts, sizes))
    return ends.tolist(), *lists


@pytest.mark.parametrize("lanes", [1, 2, 8, 13])
@pytest.mark.parametrize("n", [0, 1, 5, 700])
def test_symbols_come_back_and_take_their_bits(lanes: int, n: int) -> None:
    ends, symbols, starts, sizes = laws(n, 11)
    data = interleave(starts, sizes, lanes)
    ideal = sum(PRECISION - math.log2(size) for size in sizes)
    assert 8 * len(data) <= ideal + 64 * lanes + 1
    coded = Lanes(data, lanes)
    assert [coded.pop(row) for row in ends] == symbols
    coded.finish()


def test_the_numbers_of_the_next_symbols_are_known() -> None:
    ends, _, starts, sizes = laws(60, 5)
    coded = Lanes(interleave(starts, sizes, 4), 4)
    for i in range(0, 56):
        for ahead in range(4):
            number = coded.noise(ahead)
            assert starts[i + ahead] <= number < starts[i + ahead] + sizes[i + ahead]
        coded.pop(ends[i])


def test_what_is_damaged_is_refused() -> None:
    ends, _, starts, sizes = laws(200, 7)
    data = interleave(starts, sizes, 4)
    with pytest.raises(ValueError, match="are no 4 stacks"):
        Lanes(data[:24], 4)
    with pytest.raises(ValueError, match="below 2"):
        Lanes(bytes(32), 4)
    for wrong in (data[:-4], data + b"1234"):
        coded = Lanes(wrong, 4)
        with pytest.raises(ValueError, match=r"used up|bits are left"):
            _ = [coded.pop(row) for row in ends], coded.finish()
