"""A network between numbers of any range: its input is rescaled to [-1, 1), its output has given units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dflow.core import Context, only_given
from dflow.nn.densenet import DenseNet


class Rescaled(nn.Module):
    """``unit * factor * net((x - offset) / scale)``.

    Args:
        net: from ``(batch, n)`` to ``(batch, m, num_params)``.
        offset: middles of the entries of x, ``(n,)``.
        scale: half their ranges, ``(n,)``; powers of two, so that nothing is rounded.
        unit: units of the outputs, ``(m,)``.
        rezero: whether there is a learned factor, which starts at 0 (IDF++, arXiv 2006.12459).
        linear: the net may start as a linear map (`regress`).
    """

    offset: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(
        self, net: nn.Module, offset: Tensor, scale: Tensor, unit: Tensor, rezero: bool, linear: bool = False
    ) -> None:
        super().__init__()
        self.net, self.linear = net, linear
        self.register_buffer("offset", offset.clone())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("unit", unit.clone())
        self.factor = nn.Parameter(torch.zeros(())) if rezero else None

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """``(batch, m, num_params)``, in the dtype of the buffers; given tensors are joined before x."""
        out: Tensor = self.net(self._seen(x, context))
        if self.factor is not None:
            out = out * self.factor
        return out * self.unit[:, None]

    def _seen(self, x: Tensor, context: Context | None) -> Tensor:
        x = torch.cat([*only_given(context), x], 1)
        return (x.to(self.scale.dtype) - self.offset) / self.scale

    @torch.no_grad()
    def regress(self, y: Tensor, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor] | None:
        """The best linear map and its predictions for ``x``, see `DenseNet.regress`; None without a map."""
        if not self.linear or not isinstance(self.net, DenseNet):
            return None
        seen = self._seen(x, context)
        weight = self.net.regress(seen, y)
        return None if weight is None else (weight, self.net.predict(seen, weight))
