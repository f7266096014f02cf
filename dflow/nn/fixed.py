"""A densely connected network of integers: the same bits on every machine.

A float64 holds integers below 2^53 exactly. Products of small integers that add up to less than that have one
sum, whatever the order of summation, the number of threads, the batch, the library and the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context
from dflow.nn.densenet import DenseNet
from dflow.nn.flat import flat_input

#: Bits of the largest weight of an output channel, without the sign.
WEIGHT_BITS = 14
#: Activations are multiples of 2^-14, clamped at 2^12.
FRACTION_BITS, RANGE_BITS = 14, 12

_LARGEST = 1 << (FRACTION_BITS + RANGE_BITS)
# The step of a channel is at least 2^-26: with a smaller step, as for tiny weights, the bias could overflow.
_FINEST = -26


class FixedDenseNet(nn.Module):
    """A `DenseNet` of ReLU without norm, computed in integers held by float64.

    ``a <- clamp(floor(step (sum w a + b) + 1/2), 0, 2^26)``: activations a are in units of 2^-14, weights w
    of an output channel in units of its step, the power of two for which the largest weight has 14 bits.
    Inputs are rounded in the same way: multiples of 2^-14 up to 2^12 are exact. Outputs are not rounded.

    Idea: Ballé, Johnston and Minnen 2019 (integer networks).

    Args:
        net: the network; it is not changed.

    Raises:
        ValueError: another activation than relu, a norm, weights that are not finite, sums that could reach
            2^53.
    """

    def __init__(self, net: DenseNet) -> None:
        super().__init__()
        for name, value, needed in (("activation", net.activation, "relu"), ("norm", net.norm, "none")):
            if value != needed:
                raise ValueError(
                    f"a network with {name} {value!r} has no integer form: train with activation relu and "
                    "norm none, or use mode float64"
                )
        self.size, self.num_params, self.levels, self.sizes = net.size, net.num_params, net.levels, net.sizes
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(
                    FixedProduct(module, True)
                    for module in layer.children()
                    if isinstance(module, (nn.Linear, nn.Conv2d))
                )
            )
            for layer in net.layers
        )
        self.head = FixedProduct(net.head, False)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """As `DenseNet.forward`, in float64."""
        h = flat_input(x, context, self.sizes, self.levels, self.head.weight)
        h = torch.floor(h * (1 << FRACTION_BITS) + 0.5).clamp(-_LARGEST, _LARGEST)
        if self.size != (1, 1):
            h = h.unflatten(1, (-1, *self.size))
        for layer in self.layers:
            h = torch.cat([h, layer(h)], 1)
        out: Tensor = self.head(h) * 0.5**FRACTION_BITS
        return out.view(len(x), self.num_params, -1).transpose(1, 2)


class FixedProduct(nn.Module):
    """A layer of `FixedDenseNet`: a product with bias, times the step of each channel.

    Args:
        layer: the layer in floats.
        active: whether a ReLU of integers follows.

    Raises:
        ValueError: see `FixedDenseNet`.
    """

    weight: Tensor
    bias: Tensor
    step: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, active: bool) -> None:
        super().__init__()
        weight = layer.weight.detach().cpu().double()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().double()
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError("weights are not finite; the training diverged or the weights are damaged")
        rows = weight.flatten(1)
        # Largest magnitudes are below 2^exponent; Python's powers of two are exact everywhere.
        exponents = torch.frexp(rows.abs().amax(1)).exponent - WEIGHT_BITS
        steps = [2.0 ** max(_FINEST, e) for e in exponents.tolist()]
        step = torch.tensor(steps, dtype=torch.float64)
        rows = (rows / step[:, None]).round()
        bias = (bias * (1 << FRACTION_BITS) / step).round()
        # The 1/2 that rounds the sum must not be lost either.
        most = rows.abs().sum(1) * _LARGEST + bias.abs() + (0.5 / step).clamp(min=1)
        if float(most.max()) >= 2.0**53:
            raise ValueError(
                f"sums of {rows.shape[1]} products of {WEIGHT_BITS} and {FRACTION_BITS + RANGE_BITS} bits "
                f"and a bias could reach {float(most.max()):.3g}, beyond 2^53: use mode float64"
            )
        self.register_buffer("weight", rows.view_as(weight))
        self.register_buffer("bias", bias)
        self.register_buffer("step", step.view(-1, *[1] * (weight.ndim - 2)))
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        """The layer for integers ``x``, in units of 2^-14."""
        if self.weight.ndim == 2:
            product = F.linear(x, self.weight, self.bias)
        else:
            product = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        product = product * self.step
        return torch.floor(product + 0.5).clamp(0, _LARGEST) if self.active else product
