"""Reorder the entries."""

from __future__ import annotations

import torch
from torch import Tensor

from dflow.core import Bijector, Context
from dflow.ops.lengths import lengths


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
    back: Tensor
    closed: Tensor

    def __init__(self, permutation: Tensor) -> None:
        super().__init__()
        line = torch.arange(permutation.numel())
        if permutation.ndim != 1 or not torch.equal(permutation.cpu().sort().values, line):
            raise ValueError(f"not a permutation of 0..{permutation.numel() - 1}: {permutation.tolist()}")
        self.dim = len(line)
        self.register_buffer("permutation", permutation.clone())
        self.register_buffer("back", permutation.argsort(), persistent=False)
        # closed[T]: the first T entries stay among themselves.
        top = torch.cat([line.new_tensor([-1]), permutation.cpu().cummax(0).values])
        self.register_buffer("closed", top < torch.arange(self.dim + 1), persistent=False)

    def forward(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det zeros ``(batch,)``."""
        return self._map(x, context, self.permutation)

    def inverse(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Latent to data: x like ``z``, log_det zeros ``(batch,)``."""
        return self._map(z, context, self.back)

    def _map(self, x: Tensor, context: Context, index: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.dim:
            raise ValueError(f"expected {self.dim} entries, found x of shape {tuple(x.shape)}")
        found = lengths(context)
        if found is not None and not self.closed[found.clamp(max=self.dim)].all():
            bad = sorted(set(found[~self.closed[found.clamp(max=self.dim)]].tolist()))
            raise ValueError(f"the permutation moves absent entries among present ones for lengths {bad}")
        return x.index_select(1, index), no_log_det(x)


class Reverse(Bijector):
    """The entries in reverse order; with lengths T as context the first T of each row.

    >>> Reverse().forward(torch.tensor([[5, 6, 7]]), torch.tensor([2]))[0]
    tensor([[6, 5, 7]])
    """

    def forward(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Data to latent: z like ``x``, log_det zeros ``(batch,)``."""
        found = lengths(context)
        if found is None:
            return x.flip(1), no_log_det(x)
        line = torch.arange(x.shape[1], device=x.device)
        last = found.clamp(max=x.shape[1])[:, None] - 1
        index = torch.where(line <= last, last - line, line)
        if x.ndim == 3:
            index = index[..., None].expand_as(x)
        return x.gather(1, index), no_log_det(x)

    def inverse(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Latent to data: the same map."""
        return self.forward(z, context)


def no_log_det(x: Tensor) -> Tensor:
    """Zeros ``(batch,)``, in the dtype of ``x`` if it is floating."""
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return torch.zeros(x.shape[0], dtype=dtype, device=x.device)
