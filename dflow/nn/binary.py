"""Networks of weights and activations on {-1, +1}: laws over them, moved through layer by layer.

A layer takes numbers (`Tensor`) or random signs (`Signs`). One whose weights are random gives the `Moments`
of its sums, which are nearly Gaussian; normalisation and pooling move these, and `StochasticSign` turns them
into random signs again, or draws signs. One whose weights are given makes of numbers numbers, and the modules
behind it do to numbers what their names say. So networks of random weights, of signs and of floats are
sequences of the same modules.

Source: Peters and Welling 2018, arXiv 1809.03368 (probabilistic binary networks), with its errata put right:
the number of summands is that of valid taps where the border is padded, and the variance of a sum of given
numbers h is ``sum (1 - theta^2) h^2``. Hubara et al. 2016, arXiv 1602.02830 (signs).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, check_lengths, only_lengths
from dflow.nn.flat import check_sizes
from dflow.ops.modular import one_hot
from dflow.ops.normal import LOG_SQRT_2PI, ndtr_logit
from dflow.ops.straight_through import binary_concrete, sign_

#: Random weights of mean ``tanh(w)`` or ``clip(w, -0.9, 0.9)``; signs of w, clipped to -1..1; w itself.
Weights = Literal["tanh", "clip", "sign", "float"]
#: Where clipped parameters end.
_ENDS = {"clip": 0.9, "sign": 1.0}


class Moments(NamedTuple):
    """Independent Gaussians: means, and variances of a shape that broadcasts to that of the means."""

    mean: Tensor
    var: Tensor


class Signs(NamedTuple):
    """Independent numbers on {-1, +1}: their means; ``hard`` where these are the numbers themselves."""

    mean: Tensor
    hard: bool


class BinaryLayer(nn.Module, ABC):
    r"""Sums :math:`a_j = \sum_i w_{ji} h_i` of independent weights on {-1, +1} of mean :math:`\theta`.

    Given numbers h: mean :math:`\theta h`, variance :math:`(1 - \theta^2) h^2`. Random signs of mean
    :math:`\phi`: mean :math:`\theta \phi`, variance :math:`N - \theta^2 \phi^2` with N the number of
    summands. Both are exact. Of drawn signs :math:`h^2 = 1` whatever is drawn, so that the variance is one
    number an output, and no gradient goes through it to them.

    Weights "sign" and "float" are given: numbers and drawn signs become numbers; random signs are refused.

    Attributes:
        weight: the parameter.
        noise: None, or variances ``(outputs,)`` that given weights report beside their sums.
    """

    noise: Tensor | None

    def __init__(self, shape: tuple[int, ...], weights: Weights) -> None:
        super().__init__()
        if weights not in get_args(Weights):
            raise ValueError(f"weights {weights!r} must be one of {', '.join(get_args(Weights))}")
        self.weights = weights
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_buffer("noise", None)
        fan = math.prod(shape[1:])
        end = 1 / math.sqrt(fan) if weights == "float" else _ENDS.get(weights, 0.9)
        self.start(torch.empty(shape).uniform_(-end, end))

    @property
    def random(self) -> bool:
        """Whether the weights are."""
        return self.weights in ("tanh", "clip")

    @torch.no_grad()
    def start(self, theta: Tensor) -> None:
        """Set the means of random weights, clipped to +-0.9; given weights as they are."""
        if self.random:
            theta = theta.clamp(-0.9, 0.9)
        self.weight.copy_(torch.atanh(theta) if self.weights == "tanh" else theta)

    @property
    def theta(self) -> Tensor:
        """Means of random weights; given weights."""
        if self.weights == "tanh":
            return torch.tanh(self.weight)
        if self.weights == "float":
            return self.weight
        end = _ENDS[self.weights]
        if self.training:
            # A parameter beyond its end would never come back. What is clamped once stays as it is: a second
            # pass changes nothing that the graph of the first one holds, and is not counted as a change.
            self.weight.data.clamp_(-end, end)
            return self.weight if self.random else sign_(self.weight)
        inside = self.weight.clamp(-end, end)
        return inside if self.random else sign_(inside)

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sums of ``x`` under any weights."""

    @abstractmethod
    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sums of ones in the shape of ``x``, for one row."""

    def forward(self, x: Tensor | Signs) -> Tensor | Moments:
        """Sums, or their moments.

        Raises:
            ValueError: random signs, and weights that are not random.
        """
        values, exact, ones = (x.mean, x.hard, x.hard) if isinstance(x, Signs) else (x, True, False)
        theta = self.theta
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
    """Sums over all entries of a row; what comes as images is taken flat, in the order C, H, W.

    Args:
        inputs: entries of a row.
        outputs: sums.
        weights: see `Weights`.

    Raises:
        ValueError: a size below 1, unknown weights.
    """

    def __init__(self, inputs: int, outputs: int, weights: Weights = "tanh") -> None:
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
        kernel: odd; H and W stay, or are divided by the stride (rounded up).
        weights: see `Weights`.
        stride: places from sum to sum.

    Raises:
        ValueError: a size below 1, an even kernel, unknown weights.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, weights: Weights = "tanh", stride: int = 1
    ) -> None:
        check_sizes(inputs=inputs, outputs=outputs, kernel=kernel, stride=stride)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, found {kernel}")
        self.kernel, self.stride = kernel, stride
        super().__init__((outputs, inputs, kernel, kernel), weights)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `BinaryLayer`."""
        if x.shape[1] == 1:
            # Of one channel every tensor is contiguous in both formats; strides tell the one that is meant.
            x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, stride=self.stride, padding=self.kernel // 2)

    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `BinaryLayer`."""
        return self.product(x.new_ones(1, 1, *x.shape[2:]), weight.sum(1, keepdim=True))


class StochasticBatchNorm(nn.Module):
    r"""Batch normalisation of random numbers ``(batch, C)`` or ``(batch, C, H, W)``, by expected moments.

    .. math:: m = \tfrac 1 M \sum_i \mu_i, \quad
        v = \tfrac 1 {M - 1} \sum_i \left(\sigma_i^2 + (\mu_i - m)^2\right), \quad
        a'_i = \gamma \frac{a_i - m}{\sqrt{v + \varepsilon}} + \beta

    over the M numbers of a channel in the batch: of what is drawn from the law, m is the expectation of the
    mean and, up to the variance of the mean of M draws, v that of the variance. Running averages are kept
    for evaluation. Numbers that are given have variance 0.

    Args:
        channels: C.
        eps: added to v.
        momentum: share of a batch in the running averages.

    Attributes:
        shared: in training take the moments over the batches of all processes (torch.distributed), each of
            which has to call it; else, as at first, over those of this process.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        check_sizes(channels=channels)
        self.eps, self.momentum, self.shared = eps, momentum, False
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor | Moments) -> Tensor | Moments:
        """Normalised numbers, or their moments.

        Raises:
            ValueError: training on a single number a channel.
        """
        mean, var = x if isinstance(x, Moments) else (x, None)
        if self.training:
            m, v = _batch_moments(mean, var, self.shared)
            with torch.no_grad():
                self.running_mean.lerp_(m.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(v.to(self.running_var.dtype), self.momentum)
        else:
            m, v = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(v + self.eps)
        one = (-1, *[1] * (mean.ndim - 2))
        shift = (self.bias - m * scale).view(one)
        scale = scale.view(one)
        mean = mean * scale + shift
        return mean if var is None else Moments(mean, var * scale.square())

    @torch.no_grad()
    def estimate(self, batches: Sequence[Tensor | Moments]) -> None:
        """Set the running averages to the moments of all batches together.

        Raises:
            ValueError: less than two numbers a channel.
        """
        pairs = [x if isinstance(x, Moments) else Moments(x, x.new_zeros(1, 1)) for x in batches]
        means = [mean.transpose(0, 1).flatten(1).double() for mean, _ in pairs]
        count = sum(mean.shape[1] for mean in means)
        if count < 2:
            raise ValueError(f"the variance of {count} numbers a channel; give two or more")
        m = torch.stack([mean.sum(1) for mean in means]).sum(0) / count
        v = torch.zeros_like(m)
        for mean, (_, var) in zip(means, pairs, strict=True):
            v += (mean - m[:, None]).square().sum(1) + _mean(var).double() * mean.shape[1]
        self.running_mean.copy_(m)
        self.running_var.copy_(v / (count - 1))

    @torch.no_grad()
    def fold(self, limit: int) -> tuple[Tensor, Tensor]:
        """Thresholds ``T`` and flips ``f`` with ``sign(forward(a)) = +1`` where ``(a >= T) != f``.

        For evaluation, and all integers ``-limit <= a <= limit``: found by asking `forward` itself, so that
        no rounding tells the two apart. A falling line (gamma < 0) has f; a level one T at an end.

        Returns:
            int64 ``(C,)`` of ``-limit .. limit + 1``, and bool ``(C,)``.

        Raises:
            ValueError: while training.
        """
        if self.training:
            raise ValueError("the thresholds of a batch normalisation are those of its evaluation mode")
        flip = self.weight < 0
        low = torch.full_like(flip, -limit, dtype=torch.long)
        high = torch.full_like(low, limit + 1)
        while bool((low < high).any()):
            middle = torch.div(low + high, 2, rounding_mode="floor")
            value = self(middle.to(self.weight.dtype)[None])[0]
            above = (value >= 0) != flip
            low, high = torch.where(above, low, middle + 1), torch.where(above, middle, high)
        return low, flip


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is that of the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        out: Tensor = _Sum.apply(grad[0])  # type: ignore[no-untyped-call]
        return out


def _batch_moments(mean: Tensor, var: Tensor | None, shared: bool = False) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(mean.ndim) if d != 1]
    local_count = mean.numel() // mean.shape[1]
    count = local_count * torch.distributed.get_world_size() if shared else local_count
    if count < 2:
        raise ValueError(f"the variance of {count} numbers a channel; train on two or more")

    def total(x: Tensor) -> Tensor:
        everywhere: Tensor = _Sum.apply(x) if shared else x  # type: ignore[no-untyped-call]
        return everywhere

    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    m = total(mean.sum(dims)) / count
    # In two passes, as accurate as torch.var_mean and five times as fast.
    squares = (mean - m.view(1, -1, *[1] * (mean.ndim - 2))).square().sum(dims)
    # Variances stand for many numbers where a size is 1.
    return m, total(squares if var is None else squares + _mean(var) * local_count) / (count - 1)


def _mean(var: Tensor) -> Tensor:
    """Over all but the channels, of variances that stand for many where a size is 1."""
    return var.mean([d for d in range(var.ndim) if d != 1])


class StochasticMaxPool2d(nn.Module):
    """The largest of each window of random numbers ``(batch, C, H, W)``; what is left over at the end goes.

    "sample" draws all numbers of a window and takes the moments of the one that came out largest (Peters
    and Welling 2018). "moments" takes the mean and the variance of the largest itself, from two numbers
    at a time: exact for two Gaussians, close for more (Clark 1961). Of given numbers the largest is taken.

    Args:
        size: of a window, and from window to window.
        how: "sample" or "moments".
    """

    def __init__(self, size: int = 2, how: Literal["sample", "moments"] = "sample") -> None:
        super().__init__()
        check_sizes(size=size)
        if how not in ("sample", "moments"):
            raise ValueError(f"how {how!r} must be sample or moments")
        self.size, self.how = size, how

    def forward(self, x: Tensor | Moments) -> Tensor | Moments:
        """Numbers, or moments, ``(batch, C, H // size, W // size)``."""
        if isinstance(x, Tensor):
            return F.max_pool2d(x, self.size)
        mean, var = x
        if self.how == "moments":
            n = self.size
            height, width = (size // n * n for size in mean.shape[2:])
            places = [(..., slice(i, height, n), slice(j, width, n)) for i in range(n) for j in range(n)]
            return reduce(larger, (Moments(mean[place], var[place]) for place in places))
        with torch.no_grad():
            drawn = torch.addcmul(mean, var.sqrt(), _draw(torch.randn, mean))
            index = _last(F.max_pool2d(drawn, self.size, return_indices=True)[1])
        flat = index.flatten(1, 2)

        def pick(moment: Tensor) -> Tensor:
            chosen = _last(moment.expand_as(mean)).flatten(1, 2).gather(1, flat)
            return chosen.view_as(index).permute(0, 3, 1, 2)

        return Moments(pick(mean), pick(var))


def _last(images: Tensor) -> Tensor:
    """``(batch, H, W, C)`` of ``(batch, C, H, W)``, as convolutions lay it out."""
    return images.permute(0, 2, 3, 1)


def _draw(law: Callable[..., Tensor], like: Tensor) -> Tensor:
    """Draws in the shape, dtype, device and memory format of ``like``.

    ``randn_like`` and ``rand_like`` draw one number at a time where channels come last: eight times slower.
    """
    images = like.ndim == 4
    shape = _last(like).shape if images else like.shape
    drawn = law(shape, dtype=like.dtype, device=like.device)
    return drawn.permute(0, 3, 1, 2) if images else drawn


def larger(a: Moments, b: Moments) -> Moments:
    """Mean and variance of the larger of two independent Gaussians.

    Source: Clark 1961, The greatest of a finite set of random variables.
    """
    above = a.mean >= b.mean
    # As a distance below the higher mean: squares of far means would cancel.
    top, var_top = torch.where(above, a.mean, b.mean), torch.where(above, a.var, b.var)
    gap, var_low = -(a.mean - b.mean).abs(), torch.where(above, b.var, a.var)
    spread = torch.sqrt((a.var + b.var).clamp_min(TINY))
    t = gap / spread
    p = torch.erfc(t * -(0.5**0.5)) / 2
    peak = spread * torch.exp(t * t / -2 - LOG_SQRT_2PI)
    rise = gap * p + peak
    var = var_top * (1 - p) + var_low * p + gap * rise - rise * rise
    return Moments(top + rise, var.clamp_min(0))


#: Least variance: what has none is divided by its root.
TINY = 1e-12


class StochasticSign(nn.Module):
    r"""Signs of Gaussians: random, of mean :math:`2 \Phi(\mu / \sigma) - 1`, or drawn; 0 counts as positive.

    "sample" draws them in training, by the hard binary concrete law with a straight-through gradient; in
    evaluation the mean is propagated in either mode. Of given numbers the signs are taken, with the gradient
    of ``clamp(a, -1, 1)``.

    Args:
        mode: "propagate" or "sample".
        temperature: of the relaxation that gives drawn signs their gradient.
    """

    def __init__(self, mode: Literal["propagate", "sample"] = "propagate", temperature: float = 1.0) -> None:
        super().__init__()
        if mode not in ("propagate", "sample"):
            raise ValueError(f"mode {mode!r} must be propagate or sample")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, found {temperature}")
        self.mode, self.temperature = mode, temperature

    def forward(self, x: Tensor | Moments) -> Signs:
        """The signs of ``x``, in its shape."""
        if isinstance(x, Tensor):
            return Signs(sign_(x), True)
        t = standardized(x)
        if self.mode == "propagate" or not self.training:
            return Signs(torch.erf(t * 0.5**0.5), False)
        noise = torch.logit(_draw(torch.rand, t), 1e-7)
        return Signs(binary_concrete(ndtr_logit(t), noise, self.temperature), True)


def standardized(x: Moments) -> Tensor:
    """``mu / sigma``."""
    return x.mean * torch.rsqrt(x.var.clamp_min(TINY))


class Head(nn.Module):
    """Logits of classes from the last sums.

    "ce": their means, for cross-entropy. "bce": the log-odds ``logit Phi(mu / sigma)`` that each is positive,
    for the sum of the binary cross-entropies of all classes (equation 14 of Peters and Welling 2018); as
    logits of a soft-max they give the law of the class, given that exactly one is positive.
    """

    def __init__(self, loss: Literal["ce", "bce"] = "ce") -> None:
        super().__init__()
        if loss not in ("ce", "bce"):
            raise ValueError(f"loss {loss!r} must be ce or bce")
        self.kind = loss

    def forward(self, x: Tensor | Moments) -> Tensor:
        """Logits ``(batch, classes)``.

        Raises:
            ValueError: "bce", and sums without a variance.
        """
        if self.kind == "ce":
            return x.mean if isinstance(x, Moments) else x
        if isinstance(x, Tensor):
            raise ValueError("head 'bce' needs random sums; use 'ce'")
        return ndtr_logit(standardized(x))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss in nats, summed over the batch; labels are int64 ``(batch,)``."""
        check_lengths(labels, len(logits), "labels")
        if self.kind == "ce":
            return F.cross_entropy(logits, labels, reduction="sum")
        target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum")


class Pixels(nn.Module):
    """Integers ``0 .. levels - 1`` of flat images as odd or even integers about 0, or as floats of -1..1.

    ``2 x - (levels - 1)``: an integer, so that the sums of a first layer are; ``unit`` divides it by
    ``levels - 1``. The zeros of a padded border lie in the middle of the range.

    Args:
        shape: (C, H, W).
        levels: values of a pixel.
        unit: whether to divide.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, unit: bool = False) -> None:
        super().__init__()
        self.shape, self.levels, self.unit = shape, levels, unit

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(batch, C, H, W)`` from rows ``(batch, C * H * W)``, in the default dtype of floats."""
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        values = 2 * x.to(dtype).view(-1, *self.shape) - (self.levels - 1)
        return values / (self.levels - 1) if self.unit else values


class SymbolPerceptron(nn.Module):
    """Parameters of hidden entries given known symbols, by a perceptron of signs, random signs or floats.

    A conditioner: symbols come as numbers on {-1, +1} (one each of two symbols, else one-hot rows), each
    layer's sums are normalised, and between layers stand signs, or ReLU in a network of floats. Sums of signs
    are integers: in evaluation a network of signs gives the same numbers in batches of any size.

    Args:
        K: size of the alphabet.
        num_params: numbers for each hidden entry.
        n_known, n_hidden: entries given and asked for.
        hidden_size: units of a hidden layer.
        num_layers: hidden layers.
        weights: see `Weights`; signs of random weights are drawn in training and propagated in evaluation.

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
        weights: Weights = "sign",
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
            context: nothing; all entries have to be there.

        Raises:
            ValueError: a context.
        """
        if only_lengths(context) is not None:
            raise ValueError("a perceptron of symbols takes whole rows; leave the lengths out")
        rows = x if x.is_floating_point() else one_hot(x, self.K, next(self.parameters()).dtype)
        values = rows[..., 1] - rows[..., 0] if self.K == 2 else 2 * rows.flatten(1) - 1
        out = self.net(values)
        mean: Tensor = out.mean if isinstance(out, Moments) else out
        return mean.view(len(x), -1, self.num_params)


@torch.no_grad()
def reestimate(net: nn.Sequential, batches: Sequence[Tensor]) -> None:
    """Set the averages of every batch normalisation to those of ``batches``, each given those before it.

    For a network in evaluation mode; all batches pass layer by layer, so their activations are held together.
    """
    values: Sequence[object] = batches
    for module in net:
        if isinstance(module, StochasticBatchNorm):
            module.estimate(values)  # type: ignore[arg-type]
        values = [module(value) for value in values]
