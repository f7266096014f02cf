"""Dequantizers: laws of a continuous ``v`` in the cell of ``x``, to be sampled with their density."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from dflow.bijectors.conditioner import check_params
from dflow.core import Bijector, Context
from dflow.dequantize.partition import Partition, inside
from dflow.distributions.normal import standard_energy
from dflow.ops.devices import widen, widest
from dflow.ops.memo import Memo
from dflow.ops.precision import full_precision


class Dequantizer(nn.Module, ABC):
    """``q(v|x)``, whose support is the cell of x: noise in, ``v`` and ``log q(v|x)`` out.

    It acts on the discrete columns only; a net is given all of x.
    """

    #: Whether `noise` is uniform on (0, 1); else it is standard normal.
    uniform_noise: ClassVar[bool] = False

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self.partition = partition

    def noise(
        self,
        n: int,
        dim: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """What `forward` turns into v: ``(n, d)`` for the d discrete columns of ``dim``."""
        shape = n, self.partition.count(dim)
        if not self.uniform_noise:
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)
        u = torch.rand(shape, generator=generator, dtype=dtype, device=device)
        # 0 comes up once in 2^24: half a step of the generator stands for it.
        return u.clamp_(min=torch.finfo(dtype).eps / 4)

    def context(self, x: Tensor) -> Tensor | None:
        """What the net makes of ``x`` ``(batch, dim)``, a row each; once a batch, for any number of draws."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One draw a row.

        Args:
            x: ``(batch, dim)``.
            noise: from `noise`, ``(batch, d)``, float32 or float64: the dtype of what is computed.
            context: from `context`, a row for each of x; computed when not given.

        Returns:
            v ``(batch, dim)`` in the cell of x, and log q(v|x) in nats ``(batch,)``.
        """

    def _placed(self, x: Tensor, z: Tensor, noise: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """``v`` of z, and log q, where log_det ``(batch,)`` is that of noise to z."""
        v, terms = self.partition.place(z, x)
        log_q = -standard_energy(noise) - log_det - terms.sum(1, dtype=widest(x.device))
        return v, log_q.to(v.dtype)


class Uniform(Dequantizer):
    """Uniform in the cell, ``log q = -sum_i log(width_i)``: 0 for unit cells.

    Source: Uria et al. 2013, arXiv 1306.0186; Theis et al. 2016, arXiv 1511.01844.

    Raises:
        ValueError: a partition with infinite cells.
    """

    uniform_noise = True

    def __init__(self, partition: Partition) -> None:
        super().__init__(partition)
        if not partition.finite:
            raise ValueError(f"no law is uniform on an infinite cell: {partition}")
        self._columns: Memo[Tensor] = Memo()

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``v = lower + noise * width`` and log q."""
        with full_precision(noise):
            lower, upper = self.partition.bounds(x, noise.dtype)
            widths = upper - lower
            if noise.shape[1] == x.shape[1]:
                return inside(lower + noise * widths, lower, upper), -widths.log().sum(1)
            mask = self.partition.discrete(x.shape[1]).to(noise.device)
            columns = self._columns(lambda: mask.nonzero().flatten(), mask)
            v = lower.index_copy(1, columns, lower[:, columns] + noise * widths[:, columns])
            return inside(v, lower, upper), -widths[:, columns].log().sum(1)


class NormalDequantizer(Dequantizer):
    """Normal ``z`` given x, taken into the cell: logit-normal on hypercubes, softplus-normal on orthants.

    ``z = loc + exp(s) * eps``, or with ``full`` ``z = loc + exp(s) * eps + M eps`` where M is strictly
    lower triangular; ``log q = log N(eps) - sum(s) - log det(place)``.

    Source: Hoogeboom et al. 2020, arXiv 2001.11235, section 3.5.

    Args:
        partition: the cells.
        net: from x, floating ``(batch, dim)``, to params ``(batch, d, 2)``, ``(loc, s)`` of each discrete
            column; with ``full`` ``(batch, d, 2 + d)``, the row of M behind these. Zeros are z = eps.
        full: any covariance of z.

    Raises:
        ValueError: params of another shape than announced.
    """

    def __init__(self, partition: Partition, net: nn.Module, full: bool = False) -> None:
        super().__init__(partition)
        self.net = net
        self.full = full

    def context(self, x: Tensor) -> Tensor:
        """Params."""
        d = self.partition.count(x.shape[1])
        return check_params(self.net(floating(x, self.net)), len(x), d, 2 + d if self.full else 2)

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``v`` and log q."""
        params = (self.context(x) if context is None else context).to(noise.dtype)
        with full_precision(noise):
            log_scale = params[..., 1]
            z = params[..., 0] + log_scale.exp() * noise
            if self.full:
                z = z + (params[..., 2:].tril(-1) @ noise[..., None]).squeeze(-1)
            return self._placed(x, z, noise, log_scale.sum(1, dtype=widest(x.device)))


class FlowDequantizer(Dequantizer):
    """A flow given x, taken into the cell: ``z, log_det = bijector(eps)``, ``v = place(z)``.

    ``log q = log N(eps) - log_det - log det(place)``. Only the direction of sampling is ever needed, the
    bijector's `forward`. So an `Autoregressive` layer costs one parallel call, like a `Coupling`:
    autoregressive dequantization (ARD), ``z_i = loc_i(eps_<i, x) + scale_i(eps_<i, x) eps_i``.

    Source: Ho et al. 2019, arXiv 1902.00275; Hoogeboom et al. 2020, arXiv 2001.11235, equations 5 and 6.

    Args:
        partition: the cells.
        bijector: on floats ``(batch, d)``, called with a context that gives the features of x.
        net: from x, floating ``(batch, dim)``, to these features, a floating tensor with a row for each x.
    """

    def __init__(self, partition: Partition, bijector: Bijector, net: nn.Module) -> None:
        super().__init__(partition)
        self.bijector = bijector
        self.net = net

    def context(self, x: Tensor) -> Tensor:
        """Features of ``x``."""
        features: Tensor = self.net(floating(x, self.net))
        return features

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``v`` and log q."""
        features = (self.context(x) if context is None else context).to(noise.dtype)
        z, log_det = self.bijector.forward(noise, Context(given=(features,)))
        return self._placed(x, z, noise, widen(log_det))


def floating(x: Tensor, module: nn.Module) -> Tensor:
    """``x`` in the dtype of the module's parameters, in the default dtype where it has none."""
    dtypes = (value.dtype for value in module.parameters() if value.is_floating_point())
    return x.to(next(dtypes, torch.get_default_dtype()))
