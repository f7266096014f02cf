"""Bijectors that reorder the entries."""

from __future__ import annotations

import torch
from torch import Tensor

from dflow.core import Bijector, Context, lengths_in, present


class Permute(Bijector):
    """``z[:, i] = x[:, permutation[i]]``, in both modes.

    Args:
        permutation: int64 ``(dim,)``.

    Raises:
        ValueError: not a permutation; an ``x`` of another dim; lengths for which absent entries would
            change places with present ones.

    >>> Permute(torch.tensor([2, 0, 1])).forward(torch.tensor([[5, 6, 7]]))[0]
    tensor([[7, 5, 6]])
    """

    permutation: Tensor

    def __init__(self, permutation: Tensor) -> None:
        super().__init__()
        line = torch.arange(permutation.numel())
        if permutation.ndim != 1 or not torch.equal(permutation.cpu().sort().values, line):
            raise ValueError(f"not a permutation of 0..{permutation.numel() - 1}: {permutation.tolist()}")
        self.dim = len(line)
        self.register_buffer("permutation", permutation.clone())

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det zeros ``(batch,)``."""
        return self._map(x, context, self.permutation)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: x like ``z``, log_det zeros ``(batch,)``."""
        return self._map(z, context, self.permutation.argsort())

    def _map(self, x: Tensor, context: Context | None, index: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.dim:
            raise ValueError(f"expected {self.dim} entries, found x of shape {tuple(x.shape)}")
        lengths = lengths_in(context, len(x))
        present(context, len(x), self.dim)  # refuses known entries, which would change their places
        if lengths is not None:
            # Entry i lands among the first T exactly when it comes from there.
            line = torch.arange(self.dim, device=x.device)
            moved = ((index < lengths[:, None]) != (line < lengths[:, None])).any(1)
            if moved.any():
                bad = sorted(set(lengths[moved].tolist()))
                raise ValueError(f"the permutation moves absent entries among present ones for lengths {bad}")
        return x.index_select(1, index), no_log_det(x)


class Reverse(Bijector):
    """The entries in reverse order; with lengths T as context the first T of each row.

    >>> Reverse().forward(torch.tensor([[5, 6, 7]]), Context(lengths=torch.tensor([2])))[0]
    tensor([[6, 5, 7]])
    """

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det zeros ``(batch,)``."""
        lengths = lengths_in(context, len(x))
        present(context, *x.shape[:2])  # refuses known entries, which would change their places
        if lengths is None:
            return x.flip(1), no_log_det(x)
        line = torch.arange(x.shape[1], device=x.device)
        last = lengths.clamp(max=x.shape[1])[:, None] - 1
        index = torch.where(line <= last, last - line, line)
        if x.ndim == 3:
            index = index[..., None].expand_as(x)
        return x.gather(1, index), no_log_det(x)

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Latent to data: the same map."""
        return self.forward(z, context)


def squeeze(shape: tuple[int, int, int]) -> tuple[Permute, tuple[int, int, int]]:
    """Space to depth: images (C, H, W) become (4 C, H / 2, W / 2); the bijector and the new shape.

    Channel ``4 c + 2 i + j`` holds the entries of channel c in rows of parity i and columns of parity j.

    Source: Dinh et al. 2017, arXiv 1605.08803, section 3.6.

    Raises:
        ValueError: H or W is odd.

    >>> bijector, shape = squeeze((1, 2, 4))
    >>> shape, bijector.forward(torch.arange(8)[None])[0]
    ((4, 1, 2), tensor([[0, 2, 1, 3, 4, 6, 5, 7]]))
    """
    C, H, W = shape
    if H % 2 or W % 2:
        raise ValueError(f"only images with an even height and width can be squeezed, found {H} x {W}")
    places = torch.arange(C * H * W).view(C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3)
    return Permute(places.flatten()), (4 * C, H // 2, W // 2)


def no_log_det(x: Tensor) -> Tensor:
    """Zeros ``(batch,)``, in the dtype of ``x`` if it is floating."""
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return torch.zeros(x.shape[0], dtype=dtype, device=x.device)
