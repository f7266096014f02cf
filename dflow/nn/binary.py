"""Layers of binary networks: weights and activations on {-1, +1}, which may be random.

A layer takes numbers (`Tensor`) or random signs (`dflow.nn.moments.Signs`). A layer of random weights returns
the `dflow.nn.moments.Moments` of its sums, which are nearly Gaussian; normalisation and pooling transform
these, and `dflow.nn.moments.StochasticSign` turns them into random signs again, or draws signs. A layer of
fixed weights maps numbers to numbers, and the modules after it do so too. So networks of random weights, of
signs and of floats are sequences of the same modules.

Source: Peters and Welling 2018, arXiv 1809.03368 (probabilistic binary networks), with two corrections: the
number of summands is that of valid taps where the border is padded, and the variance of a sum of numbers h
that are not random is ``sum (1 - theta^2) h^2``. Hubara et al. 2016, arXiv 1602.02830 (signs).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, only_lengths
from dflow.nn.batch_norm import StochasticBatchNorm
from dflow.nn.flat import check_sizes
from dflow.nn.moments import Moments, Signs, StochasticSign, means
from dflow.nn.recompute import Recomputable
from dflow.ops.modular import one_hot
from dflow.ops.precision import at_least_float32, without_float16
from dflow.ops.straight_through import sign_

#: Random weights of mean ``tanh(w)`` or ``clip(w, -0.9, 0.9)``; signs of w, clipped to -1..1; w itself.
WeightKind = Literal["tanh", "clip", "sign", "float"]
#: Limits of clipped parameters.
_ENDS = {"clip": 0.9, "sign": 1.0}


class BinaryLayer(Recomputable, ABC):
    r"""Sums :math:`a_j = \sum_i w_{ji} h_i` of independent weights on {-1, +1} of mean :math:`\theta`.

    For numbers h that are not random: mean :math:`\theta h`, variance :math:`(1 - \theta^2) h^2`. For random
    signs of mean :math:`\phi`: mean :math:`\theta \phi`, variance :math:`N - \theta^2 \phi^2` with N the
    number of summands. Both are exact. For drawn signs :math:`h^2 = 1`, so that the variance is one number an
    output and passes no gradient to them.

    Weights "sign" and "float" are not random: they map numbers and drawn signs to numbers, and refuse random
    signs.

    Attributes:
        weight: the parameter.
        noise: None, or variances ``(outputs,)`` that fixed weights report beside their sums.
    """

    noise: Tensor | None

    def __init__(self, shape: tuple[int, ...], weights: WeightKind) -> None:
        super().__init__()
        if weights not in get_args(WeightKind):
            raise ValueError(f"weights {weights!r} must be one of {', '.join(get_args(WeightKind))}")
        self.weights = weights
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_buffer("noise", None)
        fan = math.prod(shape[1:])
        end = 1 / math.sqrt(fan) if weights == "float" else _ENDS.get(weights, 0.9)
        self.start(torch.empty(shape).uniform_(-end, end))

    @property
    def random(self) -> bool:
        """Whether the weights are random."""
        return self.weights in ("tanh", "clip")

    @torch.no_grad()
    def start(self, theta: Tensor) -> None:
        """Set the means of random weights, clipped to +-0.9, or the values of fixed weights."""
        if self.random:
            theta = theta.clamp(-0.9, 0.9)
        self.weight.copy_(torch.atanh(theta) if self.weights == "tanh" else theta)

    @property
    def theta(self) -> Tensor:
        """Means of random weights, or the values of fixed weights, at least float32."""
        if self.weights == "tanh":
            return torch.tanh(at_least_float32(self.weight))
        if self.weights == "float":
            return at_least_float32(self.weight)
        end = _ENDS[self.weights]
        if self.training:
            # A parameter beyond its limit has no gradient and would stay there. The clamp is idempotent, and
            # written to .data, so that a second pass does not invalidate the graph of the first.
            self.weight.data.clamp_(-end, end)
            weight = at_least_float32(self.weight)
            return weight if self.random else sign_(weight)
        inside = at_least_float32(self.weight).clamp(-end, end)
        return inside if self.random else sign_(inside)

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sums of ``x`` under the weights ``weight``."""

    @abstractmethod
    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sums of ones in the shape of a row of ``x``, for a batch of one."""

    def forward(self, x: Tensor | Signs) -> Tensor | Moments:
        """Sums, or their moments.

        Raises:
            ValueError: random signs for weights that are not random.
        """
        values, exact, ones = (x.mean, x.hard, x.hard) if isinstance(x, Signs) else (x, True, False)
        # Sums of squares of pixels lie beyond the range of float16.
        with without_float16(values):
            return self.recomputed(self._sums, values, exact, ones)

    def _sums(self, values: Tensor, exact: bool, ones: bool) -> Tensor | Moments:
        theta = self.theta
        if theta.dtype != self.weight.dtype:
            # Sums of signs are integers, of which bfloat16 holds those up to 256.
            values = values.to(theta.dtype)
        if not self.random:
            if not exact:
                raise ValueError(f"weights {self.weights!r} take numbers or drawn signs, found random signs")
            sums = self.product(values, theta)
            if self.noise is None:
                return sums
            return Moments(sums, self.noise.view(1, -1, *[1] * (sums.ndim - 2)))
        mean = self.product(values, theta)
        if ones:
            return Moments(mean, self.total(values, 1 - theta * theta))
        if exact:
            return Moments(mean, self.product(values * values, 1 - theta * theta))
        count = self.total(values, torch.ones_like(theta))
        return Moments(mean, count - self.product(values * values, theta * theta))


class BinaryLinear(BinaryLayer):
    """Sums over all entries of a row; images are flattened in the order C, H, W.

    Args:
        inputs: number of entries of a row.
        outputs: number of sums.
        weights: see `WeightKind`.

    Raises:
        ValueError: a size below 1, unknown weights.
    """

    def __init__(self, inputs: int, outputs: int, weights: WeightKind = "tanh") -> None:
        check_sizes(inputs=inputs, outputs=outputs)
        super().__init__((outputs, inputs), weights)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `BinaryLayer`."""
        return F.linear(x.flatten(1), weight)

    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `BinaryLayer`."""
        return weight.sum(1)[None]


class BinaryConv2d(BinaryLayer):
    """Sums over the ``kernel x kernel`` places around each; the border is padded with zeros.

    Args:
        inputs: channels of images ``(batch, inputs, H, W)``.
        outputs: channels of the sums.
        kernel: height and width of the kernel, odd; outputs have H and W divided by the stride, rounded up.
        weights: see `WeightKind`.
        stride: distance between neighbouring sums.

    Raises:
        ValueError: a size below 1, an even kernel, unknown weights.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, weights: WeightKind = "tanh", stride: int = 1
    ) -> None:
        check_sizes(inputs=inputs, outputs=outputs, kernel=kernel, stride=stride)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, found {kernel}")
        self.kernel, self.stride = kernel, stride
        super().__init__((outputs, inputs, kernel, kernel), weights)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `BinaryLayer`."""
        if x.shape[1] == 1:
            # A tensor of one channel is contiguous in both formats; its strides select the fast one.
            x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, stride=self.stride, padding=self.kernel // 2)

    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `BinaryLayer`."""
        return self.product(x.new_ones(1, 1, *x.shape[2:]), weight.sum(1, keepdim=True))


class SymbolPerceptron(nn.Module):
    """Parameters of hidden entries given known symbols, by a perceptron of signs, random signs or floats.

    A conditioner. Symbols are encoded as numbers on {-1, +1}, one number for K = 2 and K numbers otherwise.
    The sums of each layer are normalised; the activations are signs, or ReLU in a network of floats. Sums of
    signs are integers: in evaluation a network of signs returns the same numbers in batches of any size.

    Args:
        K: size of the alphabet.
        num_params: numbers for each hidden entry.
        n_known, n_hidden: number of known and of hidden entries.
        hidden_size: units of a hidden layer.
        num_layers: hidden layers.
        weights: see `WeightKind`; with random weights, activations are drawn in training and propagated in
            evaluation.

    Raises:
        ValueError: a size below 1, unknown weights.
    """

    def __init__(
        self,
        K: int,
        num_params: int,
        n_known: int,
        n_hidden: int,
        *,
        hidden_size: int = 512,
        num_layers: int = 2,
        weights: WeightKind = "sign",
    ) -> None:
        super().__init__()
        check_sizes(num_params=num_params, n_known=n_known, n_hidden=n_hidden, num_layers=num_layers)
        self.K, self.num_params = K, num_params
        size = n_known * (1 if K == 2 else K)
        modules: list[nn.Module] = []
        for _ in range(num_layers):
            modules += [BinaryLinear(size, hidden_size, weights), StochasticBatchNorm(hidden_size)]
            modules.append(nn.ReLU() if weights == "float" else StochasticSign("sample"))
            size = hidden_size
        outputs = n_hidden * num_params
        modules += [BinaryLinear(size, outputs, weights), StochasticBatchNorm(outputs)]
        self.net = nn.Sequential(*modules)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters ``(batch, n_hidden, num_params)``.

        Args:
            x: int64 ``(batch, n_known)`` or one-hot rows ``(batch, n_known, K)``.
            context: None or an empty context, since all entries have to be present.

        Raises:
            ValueError: a context with lengths or given tensors.
        """
        if only_lengths(context) is not None:
            raise ValueError("a perceptron of symbols takes whole rows; leave the lengths out")
        rows = x if x.is_floating_point() else one_hot(x, self.K, next(self.parameters()).dtype)
        values = rows[..., 1] - rows[..., 0] if self.K == 2 else 2 * rows.flatten(1) - 1
        params: Tensor = means(self.net(values)).unflatten(1, (-1, self.num_params))
        return params
