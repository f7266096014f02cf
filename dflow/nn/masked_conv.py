"""Masked convolutions: a feed-forward autoregressive network on images of real numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context
from dflow.nn.flat import check_sizes, flat_input, zero_
from dflow.nn.recompute import Recomputable


class MaskedConv(Recomputable):
    """Parameters of entry i depend on ``x[:, :i]`` and the whole context only, entries in the order C, H, W.

    So entry (c, h, w) sees all channels before c at every place, and its own channel before (h, w), row by
    row. Every hidden channel belongs to a channel of the image and is of one of three kinds:

    - "before": depends on all earlier channels, and the context, at every place;
    - "row": also on its own channel above the row;
    - "place": also on its own channel before the place.

    Each reads the 3x3 neighbourhood of every earlier channel, and of its own channel what its kind allows.
    With three kinds there is no blind spot: with enough layers parameters depend on every earlier entry. At
    places (1, 1), a vector of numbers, there is one kind, and this is a MADE.

    The masks are buffers applied at each call, so that training cannot change them.

    Source: Song et al. 2019, arXiv 1907.07945 (masks by channel); van den Oord et al. 2016, arXiv 1606.05328
    (rows against the blind spot); Germain et al. 2015, arXiv 1502.03509 (MADE).

    Args:
        shape: (C, H, W).
        num_params: numbers for each entry.
        hidden_size: hidden channels, at least 3 C; C for a vector.
        depth: residual layers after the first product.
        context_channels: of the context, flat rows of the same size; 0 for none.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).

    Raises:
        ValueError: a size below 1, too few hidden channels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_params: int,
        *,
        hidden_size: int = 192,
        depth: int = 12,
        context_channels: int = 0,
        zero_head: bool = True,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        check_sizes(channels=channels, height=height, width=width, num_params=num_params, depth=depth)
        kinds = 1 if height * width == 1 else 3
        if hidden_size < kinds * channels:
            raise ValueError(
                f"hidden_size must be at least {kinds} for each of {channels} channels, found {hidden_size}"
            )
        self.size, self.num_params = (height, width), num_params
        self.sizes = (channels * height * width, context_channels * height * width)
        kernel = 1 if self.size == (1, 1) else 3
        # Pairs of channel and kind. The context comes before every channel.
        channel, hidden_channel = torch.arange(channels), torch.arange(hidden_size) * channels // hidden_size
        inputs = torch.cat([channel, torch.full((context_channels,), -1)])
        entries = inputs, torch.full_like(inputs, _ENTRY)
        number = torch.arange(hidden_size) - torch.searchsorted(hidden_channel, hidden_channel)
        kind = number % kinds
        if kinds > 1 and not context_channels:
            # Nothing comes before the first channel.
            kind = torch.where(hidden_channel == 0, _ROW + number % 2, kind)
        hidden = hidden_channel, kind
        params = channel.repeat(num_params), torch.full((num_params * channels,), _PLACE)
        self.first = _MaskedConv2d(entries, hidden, kernel)
        self.layers = nn.ModuleList(_MaskedConv2d(hidden, hidden, kernel) for _ in range(depth))
        self.head = _MaskedConv2d(hidden, params, kernel)
        if zero_head:
            zero_(self.head)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters ``(batch, C * H * W, num_params)`` in one parallel call.

        Args:
            x: numbers ``(batch, C * H * W)``.
            context: given tensors with ``context_channels * H * W`` columns together.

        Raises:
            ValueError: an ``x`` or context of another size.
        """
        return self.recomputed(self._forward, x, context)

    def _forward(self, x: Tensor, context: Context | None) -> Tensor:
        h = flat_input(x, context, self.sizes, None, self.head.weight)
        h = self.first(h.unflatten(1, (-1, *self.size)))
        for layer in self.layers:
            h = h + layer(F.silu(h))
        out: Tensor = self.head(F.silu(h))
        params: Tensor = out.flatten(1).unflatten(1, (self.num_params, -1))
        return params.transpose(1, 2)


#: Kinds of hidden channels, each of which may depend on all that the kind before depends on; image entries.
_BEFORE, _ROW, _PLACE, _ENTRY = range(4)


class _MaskedConv2d(nn.Conv2d):
    """A convolution whose outputs read only the inputs that they may depend on."""

    mask: Tensor

    def __init__(self, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], kernel: int) -> None:
        super().__init__(len(inputs[0]), len(outputs[0]), kernel, padding=kernel // 2)
        (in_channel, in_kind), (out_channel, out_kind) = (
            [t[None] for t in inputs],
            [t[:, None] for t in outputs],
        )
        mask = (in_channel < out_channel)[..., None, None].repeat(1, 1, kernel, kernel)
        middle = kernel // 2
        # Of its own channel a unit reads all places of units of kind "before", ...
        same = in_channel == out_channel
        mask |= (same & (in_kind == _BEFORE))[..., None, None]
        # ... everything in the rows above, unless its own kind is "before", ...
        mask[..., :middle, :] |= (same & (out_kind != _BEFORE))[..., None, None]
        # ... in its row units of kind "row"; and for kind "place" such units up to here and entries before.
        mask[..., middle, :] |= (same & (out_kind != _BEFORE) & (in_kind == _ROW))[..., None]
        mask[..., middle, : middle + 1] |= (same & (out_kind == _PLACE) & (in_kind == _PLACE))[..., None]
        mask[..., middle, :middle] |= (same & (out_kind == _PLACE) & (in_kind == _ENTRY))[..., None]
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.where(self.mask, self.weight, 0.0)
        if self.kernel_size == (1, 1) and x.shape[2:] == (1, 1):
            return F.linear(x.flatten(1), weight.flatten(1), self.bias)[..., None, None]
        return F.conv2d(x, weight, self.bias, padding=self.padding)
