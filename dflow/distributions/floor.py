"""A floor under laws of integers: a small share of a law that is never sure, so that no value costs too much.

A mixture of logistic laws, or a soft-max, can be surer of a value than the numbers that it is computed from
warrant: one unexpected pixel then costs millions of bits, and a mean of log-likelihoods describes that pixel
alone. With a share f of a fixed law U the cost of any x is at most ``-log2 f - log2 U(x)``, and that of what
the law expects rises by ``-log2(1 - f)``, 2.2e-5 bits an entry. A coder that gives every value of its tables
at least one count has such a floor already; this is the likelihood that goes with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dflow.ops.devices import widen

#: The share f of the floor.
FLOOR = 2.0**-16

#: Largest exponent that is drawn: integers up to 2^53 are exact in float64.
_MOST = 52


def gamma_bits(j: Tensor) -> Tensor:
    """``2 q + 1`` with ``q = floor(log2(j + 1))``, j at least 0: lengths of the gamma code (Elias 1975).

    ``2^-gamma_bits`` sums to 1. The result is in the widest floating type of the device, exact for j + 1
    below 2^53, in float32 below 2^24.

    >>> gamma_bits(torch.tensor([0, 1, 2, 3, 6, 7])).tolist()
    [1.0, 3.0, 3.0, 5.0, 5.0, 7.0]
    """
    return widen(2 * (torch.frexp(widen(j) + 1).exponent - 1) + 1)


def gamma_draws(u: Tensor) -> Tensor:
    """Draws of the law ``2^-gamma_bits(j)``, int64, from uniform numbers u in (0, 1], by its inverse.

    q is ``floor(-log2 u)``, at most 52, and all integers of one q have equal parts of what u that leaves.

    >>> gamma_draws(torch.tensor([1.0, 0.75, 0.5, 0.4, 0.3, 0.25], dtype=torch.float64)).tolist()
    [0, 0, 1, 1, 2, 3]
    """
    q = (-torch.log2(u)).floor().clamp(0, _MOST)
    # u 2^(q + 1) lies in (1, 2], so that this does in [0, 1).
    within = 2 - u * 2 ** (q + 1)
    return torch.floor((1 + within) * 2**q).long() - 1


def with_floor(log_p: Tensor, offset: Tensor) -> Tensor:
    """``log((1 - f) exp(log_p) + f U(offset))``, in the dtype of ``log_p``.

    ``U(o) = 2^-(gamma_bits(j) + 1)`` with j = o from 0 on and j = -1 - o below, which sums to 1 over all
    integers.

    Args:
        log_p: nats of each entry under the law.
        offset: of each entry from where the floor is highest, whole numbers; no gradient goes to it.
    """
    j = torch.where(offset < 0, -1 - offset, offset)
    log_floor = math.log(FLOOR) - math.log(2) * (gamma_bits(j) + 1)
    return torch.logaddexp(log_p + math.log1p(-FLOOR), log_floor.to(log_p.dtype))


def instead_of(x: Tensor, middle: Tensor, at: Tensor, u: Tensor) -> Tensor:
    """Draws ``x`` of a law made draws of that law with the floor.

    Args:
        x: int64 ``(n, dim)``.
        middle: where the floor is highest, int64 ``(dim,)``.
        at: bool ``(n, dim)``, true with probability f: the floor is drawn here, and elsewhere x stays.
        u: uniform numbers in [0, 1) that are independent of ``at``.
    """
    j = gamma_draws(1 - (2 * u) % 1)
    return torch.where(at, middle + torch.where(u < 0.5, -1 - j, j), x)
