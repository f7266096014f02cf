"""A network between numbers of any range: shown them in [-1, 1), it answers in units of what it speaks of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dflow.core import Context


class Rescaled(nn.Module):
    """``unit * factor * net((x - offset) / scale)``.

    Args:
        net: from ``(batch, n)`` to ``(batch, m, num_params)``.
        offset: middles of the entries of x, ``(n,)``.
        scale: half their ranges, ``(n,)``; powers of two, so that nothing is rounded.
        unit: of the answers, ``(m,)``.
        rezero: a learned factor, at first 0 (IDF++, arXiv 2006.12459); else there is none.
    """

    offset: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, net: nn.Module, offset: Tensor, scale: Tensor, unit: Tensor, rezero: bool) -> None:
        """See the class."""
        super().__init__()
        self.net = net
        self.register_buffer("offset", offset.clone())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("unit", unit.clone())
        self.factor = nn.Parameter(torch.zeros(())) if rezero else None

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """``(batch, m, num_params)``, in the dtype of the buffers; a context stands before x."""
        if context is not None:
            before = context if isinstance(context, tuple) else (context,)
            x = torch.cat([*before, x], 1)
        out: Tensor = self.net((x.to(self.scale.dtype) - self.offset) / self.scale)
        if self.factor is not None:
            out = out * self.factor
        return out * self.unit[:, None]
