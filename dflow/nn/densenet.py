"""Densely connected convolutions: the conditioner of flows on images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dflow.core import Context
from dflow.nn.flat import check_levels, check_sizes, flat_input, zero_
from dflow.nn.recompute import Recomputable
from dflow.ops.devices import float64


class DenseNet(Recomputable):
    """Each layer adds channels, computed from all channels before it: 1x1, activation, 3x3, activation.

    Input and output are flat rows in the order C, H, W. At a size of (1, 1), a vector of numbers, the
    convolutions are products of matrices.

    Source: Hoogeboom et al. 2019, arXiv 1905.07376 (integer discrete flows: ReLU, no norm); van den Berg et
    al. 2021, arXiv 2006.12459 (IDF++: SiLU and group norm).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        size: (H, W) of input, context and output.
        num_params: numbers for each entry of the output.
        hidden_size: channels that the layers add together.
        depth: layers.
        context_channels: of the context, flat rows of the same size; 0 for none.
        levels: values 0..levels-1 of the input are spread over -1..1; None leaves it as it is.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).
        activation: "silu", or "relu": then it needs nothing but products, sums and maxima.
        head_kernel: kernel size of the last layer, 3 or 1; with many outputs a size of 3 is slow.
        norm: before each activation: "none", or "group", over groups of at least 16 channels (all of them
            where there are fewer) at all places.

    Raises:
        ValueError: a size below 1, fewer hidden channels than layers, fewer than 2 levels, an unknown
            activation, norm or kernel, a norm of a single number.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int],
        num_params: int = 1,
        *,
        hidden_size: int = 192,
        depth: int = 12,
        context_channels: int = 0,
        levels: int | None = None,
        zero_head: bool = True,
        activation: Literal["silu", "relu"] = "silu",
        norm: Literal["none", "group"] = "none",
        head_kernel: int = 3,
    ) -> None:
        super().__init__()
        if activation not in ("silu", "relu") or norm not in ("none", "group"):
            raise ValueError(f"activation {activation!r} is silu or relu, and norm {norm!r} none or group")
        if head_kernel not in (1, 3):
            raise ValueError(f"head_kernel must be 1 or 3, found {head_kernel}")
        height, width = size
        check_sizes(in_channels=in_channels, out_channels=out_channels, height=height, width=width)
        check_sizes(num_params=num_params, depth=depth)
        if hidden_size < depth:
            raise ValueError(f"hidden_size {hidden_size} is less than a channel for each of {depth} layers")
        self.size, self.num_params, self.levels = (height, width), num_params, check_levels(levels)
        self.sizes = (in_channels * height * width, context_channels * height * width)
        self.activation, self.norm = activation, norm
        channels, layers = in_channels + context_channels, []
        for i in range(depth):
            growth = hidden_size * (i + 1) // depth - hidden_size * i // depth
            # ReLU loses half of the values of a channel, so that few channels are widened first.
            width = max(channels, growth)
            layers.append(
                nn.Sequential(
                    self._product(channels, width, 1),
                    *self._active(width),
                    self._product(width, growth, 3),
                    *self._active(growth),
                )
            )
            channels += growth
        self.layers = nn.ModuleList(layers)
        self.head = self._product(channels, num_params * out_channels, head_kernel)
        if zero_head:
            zero_(self.head)

    def _product(self, inputs: int, outputs: int, kernel: int) -> nn.Linear | nn.Conv2d:
        if self.size == (1, 1):
            return nn.Linear(inputs, outputs)
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def _active(self, channels: int) -> list[nn.Module]:
        """The norm and activation after a product."""
        active: nn.Module = nn.SiLU() if self.activation == "silu" else nn.ReLU()
        if self.norm == "none":
            return [active]
        groups = next(n for n in range(max(1, channels // 16), 0, -1) if channels % n == 0)
        if channels // groups * self.size[0] * self.size[1] == 1:
            raise ValueError("norm 'group' of a single number is 0; use norm 'none'")
        return [nn.GroupNorm(groups, channels), active]

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters ``(batch, out_channels * H * W, num_params)`` of a bijector or a law.

        Args:
            x: numbers ``(batch, in_channels * H * W)``.
            context: given tensors with ``context_channels * H * W`` columns together.

        Raises:
            ValueError: an ``x`` or context of another size.
        """
        params: Tensor = self.features(x, context).unflatten(1, (self.num_params, -1))
        return params.transpose(1, 2)

    @torch.no_grad()
    def regress(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The best linear map from the 3x3 neighbourhood to ``y``: ``(out_channels, C * k + 1)``.

        Least squares with a small ridge; C the channels of the input, k = 9 places (1 at a size of (1, 1)),
        the constant last. None where there are fewer than ten examples for each number of a row.

        Args:
            x: numbers ``(batch, in_channels * H * W)``.
            y: numbers ``(batch, out_channels * H * W)``.
        """
        rows = self._around(x)
        if len(rows) < 10 * rows.shape[1]:
            return None
        targets = float64(y).unflatten(1, (-1, self.size[0] * self.size[1])).transpose(1, 2).flatten(0, 1)
        ridge = 1e-4 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
        ridge[-1, -1] = 0
        solution: Tensor = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ targets)
        return solution.T

    @torch.no_grad()
    def predict(self, x: Tensor, weight: Tensor) -> Tensor:
        """Predictions of a map of `regress` for ``x``: float64 ``(batch, out_channels * H * W)``."""
        prediction: Tensor = self._around(x) @ weight.T
        rows: Tensor = prediction.unflatten(0, (len(x), -1)).transpose(1, 2).flatten(1)
        return rows

    @torch.no_grad()
    def lead(self, weight: Tensor, factor: Tensor) -> None:
        """Add a map of `regress`, times ``factor`` ``(out_channels, n)``, to the first n params."""
        inputs, count = self.sizes[0] // (self.size[0] * self.size[1]), factor.shape[1]
        maps = factor.T[..., None] * weight
        head = self.head.weight.unflatten(0, (self.num_params, -1))[:count, :, :inputs]
        head.add_(maps[..., :-1].reshape(head.shape).to(head))
        bias: Tensor = self.head.bias  # type: ignore[assignment]
        bias.unflatten(0, (self.num_params, -1))[:count].add_(maps[..., -1].to(head))

    def _around(self, x: Tensor) -> Tensor:
        """Rows of a 3x3 neighbourhood and a one: float64 ``(batch * H * W, in_channels * k + 1)``."""
        planes = float64(x).unflatten(1, (-1, *self.size))
        if self.size == (1, 1):
            rows = planes.flatten(1)
        else:
            rows = functional.unfold(planes, 3, padding=1).transpose(1, 2).flatten(0, 1)
        return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)

    def features(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The output, flat, as a context for other networks: ``(batch, C * H * W)``.

        C is ``num_params * out_channels``; arguments and errors as in `forward`.
        """
        return self.recomputed(self._features, x, context)

    def _features(self, x: Tensor, context: Context | None) -> Tensor:
        h = flat_input(x, context, self.sizes, self.levels, self.head.weight)
        if self.size != (1, 1):
            h = h.unflatten(1, (-1, *self.size))
        for layer in self.layers:
            h = torch.cat([h, layer(h)], 1)
        out: Tensor = self.head(h)
        return out.flatten(1)
