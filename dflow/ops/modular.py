"""The ring Z/K on symbols and on one-hot rows.

On one-hot rows the forward pass is index arithmetic, so a result is one-hot to the bit, whatever the
depth of the flow. The backward pass is that of the multilinear extension of the map at the hard point,
which is one gather for each argument: O(K) time and memory a symbol, no K x K table and no FFT.

The data are ``x = z * scale + loc`` and the latents ``z = (x - loc) / scale``, modulo K. A scale is one
of the phi(K) units of Z/K, named by its index in `units`: no other scale is invertible.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def one_hot(x: Tensor, K: int, dtype: torch.dtype | None = None) -> Tensor:
    """One-hot rows ``(..., K)`` of the symbols ``x`` ``(...)``, in ``dtype`` (default: torch's default).

    >>> one_hot(torch.tensor([2, 0]), 3)
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    rows = torch.zeros(*x.shape, K, dtype=dtype or torch.get_default_dtype(), device=x.device)
    return rows.scatter_(-1, x[..., None], 1)


def symbols(x: Tensor) -> Tensor:
    """The symbols of ``x``: int64 is returned unchanged, one-hot rows ``(..., K)`` give their index.

    Raises:
        ValueError: ``x`` is neither int64 nor floating.
    """
    if x.is_floating_point():
        return x.argmax(-1)
    if x.dtype != torch.int64:
        raise ValueError(f"symbols are int64 or floating one-hot rows, found {x.dtype}")
    return x


def check_alphabet(K: int) -> int:
    """``K`` itself when it is the size of an alphabet, at least 2; otherwise a ValueError."""
    if K < 2:
        raise ValueError(f"an alphabet has K >= 2 symbols, found K={K}")
    return K


def units(K: int) -> Tensor:
    """The units of Z/K in increasing order, int64 ``(phi(K),)``; the first is 1.

    >>> units(10)
    tensor([1, 3, 7, 9])
    """
    check_alphabet(K)
    return torch.tensor([a for a in range(1, K) if math.gcd(a, K) == 1])


def inverses(K: int) -> Tensor:
    """Table of multiplicative inverses modulo K, int64 ``(K,)``; 0 for numbers that are no units.

    >>> inverses(10)
    tensor([0, 1, 0, 7, 0, 0, 0, 3, 0, 9])
    """
    check_alphabet(K)
    return torch.tensor([pow(a, -1, K) if math.gcd(a, K) == 1 else 0 for a in range(K)])


def shift(x: Tensor, loc: Tensor) -> Tensor:
    """Data to latent ``z = x - loc`` on one-hot rows ``(..., K)``.

    With ``g = dL/dz``: ``dL/dx[k] = g[k - loc]`` and ``dL/dloc[j] = g[x - j]``.

    >>> shift(one_hot(torch.tensor(1), 3), one_hot(torch.tensor(2), 3))
    tensor([0., 0., 1.])
    """
    return _apply(x, loc, None, None, True)


def unshift(z: Tensor, loc: Tensor) -> Tensor:
    """Latent to data ``x = z + loc`` on one-hot rows ``(..., K)``.

    With ``g = dL/dx``: ``dL/dz[k] = g[k + loc]`` and ``dL/dloc[j] = g[z + j]``.
    """
    return _apply(z, loc, None, None, False)


def affine(x: Tensor, loc: Tensor, scale: Tensor, factors: Tensor | None = None) -> Tensor:
    """Data to latent ``z = (x - loc) / scale`` on one-hot rows.

    With ``g = dL/dz``: ``dL/dx[k] = g[(k - loc) / scale]``, ``dL/dloc[j] = g[(x - j) / scale]`` and
    ``dL/dscale[a] = g[(x - loc) / units[a]]``.

    Args:
        x: ``(..., K)``.
        loc: ``(..., K)``.
        scale: ``(..., phi(K))``, one-hot over `units`.
        factors: inverses of the units, int64 ``(phi(K),)``; computed when not given.
    """
    if factors is None:
        factors = inverses(x.shape[-1])[units(x.shape[-1])].to(x.device)
    return _apply(x, loc, scale, factors, True)


def unaffine(z: Tensor, loc: Tensor, scale: Tensor, factors: Tensor | None = None) -> Tensor:
    """Latent to data ``x = z * scale + loc`` on one-hot rows.

    With ``g = dL/dx``: ``dL/dz[k] = g[k * scale + loc]``, ``dL/dloc[j] = g[z * scale + j]`` and
    ``dL/dscale[a] = g[z * units[a] + loc]``.

    Args:
        z: ``(..., K)``.
        loc: ``(..., K)``.
        scale: ``(..., phi(K))``, one-hot over `units`.
        factors: the units, int64 ``(phi(K),)``; computed when not given.
    """
    if factors is None:
        factors = units(z.shape[-1]).to(z.device)
    return _apply(z, loc, scale, factors, False)


def _apply(x: Tensor, loc: Tensor, scale: Tensor | None, factors: Tensor | None, to_latent: bool) -> Tensor:
    if x.shape != loc.shape:
        raise ValueError(f"loc has shape {tuple(loc.shape)}, x has {tuple(x.shape)}")
    if scale is not None and factors is not None:
        expected = (*x.shape[:-1], len(factors))
        if scale.shape != expected:
            raise ValueError(f"scale has shape {tuple(scale.shape)}, expected {expected}")
    result: Tensor = _AffineModK.apply(x, loc, scale, factors, to_latent)  # type: ignore[no-untyped-call]
    return result


class _AffineModK(torch.autograd.Function):
    """``m * (x - loc)`` or ``m * x + loc`` modulo K, with m the factor that ``scale`` selects, or 1.

    Each gradient is a gather from ``g`` at an index that is affine in the symbol.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, loc: Tensor, scale: Tensor | None, factors: Tensor | None, to_latent: bool
    ) -> Tensor:
        K = x.shape[-1]
        i, j = x.argmax(-1, keepdim=True), loc.argmax(-1, keepdim=True)
        a = None if scale is None else scale.argmax(-1, keepdim=True)
        m = None if factors is None or a is None else factors[a]
        ctx.save_for_backward(i, j, m, factors)
        ctx.to_latent = to_latent
        ctx.dtypes = (x.dtype, loc.dtype, None if scale is None else scale.dtype)
        index = i - j if to_latent else i
        if m is not None:
            index = index * m
        if not to_latent:
            index = index + j
        return torch.zeros_like(x).scatter_(-1, index.remainder_(K), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        i, j, m, factors = ctx.saved_tensors
        line = torch.arange(g.shape[-1], device=g.device)
        scaled = line if m is None else line * m
        image = i if m is None else i * m
        gx = gloc = gscale = None
        if ctx.needs_input_grad[0]:
            offset = j if m is None or not ctx.to_latent else j * m
            gx = _read(g, scaled - offset if ctx.to_latent else scaled + offset, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            gloc = _read(g, image - scaled if ctx.to_latent else image + line, ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            index = (i - j) * factors if ctx.to_latent else i * factors + j
            gscale = _read(g, index, ctx.dtypes[2])
        return gx, gloc, gscale, None, None


def _read(g: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return g.gather(-1, index.remainder_(g.shape[-1])).to(dtype)
