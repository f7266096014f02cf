"""Discretized logistic laws on the integers: of independent entries, mixtures, and conditional ones."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, Distribution, conditioned, only_given
from dflow.distributions.categorical import check_classes
from dflow.distributions.conditional import Conditional, check_rows
from dflow.distributions.floor import instead_of, with_floor
from dflow.ops.devices import float64, widen, widest
from dflow.ops.precision import at_least_float32

#: Limits of log scales. Below the lower one a bin away from loc has less than exp(-80000) of the mass.
LEAST, MOST = -12.0, 30.0

#: Scale of a logistic law over its standard deviation.
PER_DEVIATION = math.sqrt(3) / math.pi


def log_mass(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """``log(sigmoid(b) - sigmoid(a))``, a and b the edges ``(x -+ 1/2 - loc) / scale`` of the bin of ``x``.

    Computed as ``log sigmoid(b) + log sigmoid(-a) + log(1 - exp(-1 / scale))``, the same number: nothing
    cancels in either tail or at any scale, and gradients are finite. Floats; ``log_scale`` counts as
    -12 where it lies below, and as 30 where it lies above.

    >>> log_mass(torch.tensor([0.0, 100.0, -1000.0]), torch.tensor(0.0), torch.tensor(0.0))
    tensor([  -1.4068,  -99.9587, -999.9587])
    """
    rate = torch.exp(-log_scale.clamp(LEAST, MOST))
    centred = x - loc
    upper, lower = (centred + 0.5) * rate, (centred - 0.5) * rate
    return F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-rate))


def check_numbers(x: Tensor, dim: int) -> None:
    """ValueError unless ``x`` is int64 or floating ``(batch, dim)``."""
    if x.ndim != 2 or x.shape[1] != dim or not (x.is_floating_point() or x.dtype == torch.int64):
        raise ValueError(f"expected int64 or floating (batch, {dim}), found {x.dtype} {tuple(x.shape)}")


class Logistics(Distribution):
    """Base class of laws with independent entries, each a discretized logistic law or a mixture of them.

    ``P(x) = prod_i ((1 - f) M_i(x_i) + f U(x_i - c_i))`` with
    ``M_i(x_i) = sum_m w_im (sigmoid((x_i + 1/2 - loc_im) / s_im) - sigmoid((x_i - 1/2 - loc_im) / s_im))``

    It sums to 1 over all integers, not over the range of the data. The floor U has the share f = 2^-16, so
    that no integer within a distance d of c_i, the rounded mean of the entry's centres, costs more than
    ``18 + 2 log2(d + 1)`` bits, 38 for d = 1,023, however sure the net is; see `dflow.distributions.floor`.

    The learned numbers ``r`` and ``q`` are relative to buffers of each component of each entry: ``loc =
    centre + unit * r`` and ``log s = log unit + q``. Where all learned numbers are 0, the components lie side
    by side: in parts of equal probability of one logistic law, or of the data after `initialize`.

    Source: Hoogeboom et al. 2019, arXiv 1905.07376; Salimans et al. 2017, arXiv 1701.05517 (mixtures).

    Args:
        dim: number of entries.
        components: number of components; 1 is a single logistic law.
        centre: location of the logistic law that the components start from, ``()`` or ``(dim,)``; default 0.
        unit: scale of that law, in the same way; default 1.

    Raises:
        ValueError: dim or components below 1, a centre or unit of another shape or not finite, a unit that is
            not positive.
    """

    one_table = True

    centre: Tensor
    unit: Tensor

    def __init__(
        self, dim: int, components: int = 1, centre: Tensor | None = None, unit: Tensor | None = None
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("components", components)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, found {size}")
        self.dim, self.components = dim, components
        centre = torch.tensor(0.0) if centre is None else centre
        unit = torch.tensor(1.0) if unit is None else unit
        for name, value in (("centre", centre), ("unit", unit)):
            if value.shape not in ((), (dim,)) or not value.isfinite().all():
                raise ValueError(f"{name} must be finite, () or ({dim},), found {value.tolist()}")
        if not (unit > 0).all():
            raise ValueError(f"unit must be positive, found {unit.tolist()}")
        middles = torch.logit((torch.arange(components) + 0.5) / components)
        centre, unit = (v.to(middles.dtype).expand(dim)[:, None] for v in (centre, unit))
        self.register_buffer("centre", centre + unit * middles)
        self.register_buffer("unit", (unit / components).expand_as(self.centre).clone())

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"dim={self.dim}, components={self.components}"

    @property
    def num_params(self) -> int:
        """Numbers for each entry that are learned or come from the net."""
        return 2 if self.components == 1 else 3 * self.components

    def rounded_mean(self, context: Context | None = None) -> Tensor:
        """See `Distribution.rounded_mean`: the weighted mean of the locations of the components."""
        loc, _, *log_weights = self.params(context)
        if log_weights:
            loc = (loc * log_weights[0].exp()).sum(-1)
        return widen(loc).round().long()

    @abstractmethod
    def _raw(self, context: Context | None) -> Tensor:
        """All r, then all q and, for a mixture, all logits of the weights: ``(n, dim, num_params)``."""

    def _log_unit(self, dtype: torch.dtype) -> Tensor:
        return self.unit.to(dtype).log()

    def params(self, context: Context | None = None) -> tuple[Tensor, ...]:
        """Parameters of the law, at least float32.

        ``(loc, log_scale)``, each ``(n, dim)``; for a mixture ``(loc, log_scale, log_weights)``, each
        ``(n, dim, components)``, with weights that add up to 1. n is the batch of the context, or 1.
        """
        loc, log_scale, *logits = self.unnormalised(context)
        return (loc, log_scale, *(torch.log_softmax(tensor, -1) for tensor in logits))

    def unnormalised(self, context: Context | None = None) -> tuple[Tensor, ...]:
        """The result of `params`, but with log weights up to a constant."""
        raw = at_least_float32(self._raw(context))
        r, q, *logits = raw.unflatten(-1, (-1, self.components)).unbind(-2)
        unit = self.unit.to(raw.dtype)
        loc, log_scale = self.centre.to(raw.dtype) + unit * r, q + self._log_unit(raw.dtype)
        if not logits:
            return loc.squeeze(-1), log_scale.squeeze(-1)
        return loc, log_scale, logits[0]

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``, summed in float64.

        Args:
            x: int64 ``(batch, dim)``, or floats that hold integers; differentiable in the latter too.
            context: see `ConditionalLogistic`; otherwise None.

        Returns:
            In the dtype of ``x`` if that is floating, else in that of the params.

        Raises:
            ValueError: an ``x`` that is neither, or of another shape, or a context of another batch.
        """
        check_numbers(x, self.dim)
        loc, log_scale, *log_weights = self.params(context)
        if len(loc) not in (1, len(x)):
            raise ValueError(f"x has {len(x)} rows, the context {len(loc)}")
        entries = x.to(torch.promote_types(loc.dtype, x.dtype) if x.is_floating_point() else loc.dtype)
        if not log_weights:
            terms = log_mass(entries, loc, log_scale)
        else:
            terms = torch.logsumexp(log_mass(entries[..., None], loc, log_scale) + log_weights[0], -1)
        terms = with_floor(terms, entries.detach() - self._middle(entries.dtype))
        return terms.sum(-1, dtype=widest(x.device)).to(x.dtype if x.is_floating_point() else loc.dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws, int64 ``(n, dim)``, one a row of the context: logistic draws, rounded."""
        loc, log_scale, *log_weights = self.params(context)
        if len(loc) > 1:
            check_rows(n, len(loc))
        shape = (n, *loc.shape[1:])
        if log_weights:
            # The exponential variable with the smallest value wins; its rate is the weight of the component.
            clocks = torch.empty(shape, dtype=widest(loc.device), device=loc.device)
            chosen = (log_weights[0] - clocks.exponential_(generator=generator).log()).argmax(
                -1, keepdim=True
            )
            loc, log_scale = (v.expand(shape).gather(-1, chosen).squeeze(-1) for v in (loc, log_scale))
        scale = widen(log_scale).clamp(LEAST, MOST).exp()
        standard, at, u = _standard((n, self.dim), generator, loc.device)
        x = (loc + scale * standard).round().to(torch.int64)
        return instead_of(x, self._middle(scale.dtype).long(), at, u)

    def _middle(self, dtype: torch.dtype) -> Tensor:
        """Where the floor of each entry is highest, ``(dim,)``: the mean of its centres, rounded."""
        return self.centre.to(dtype).mean(-1).round()

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Context | None = None) -> None:
        """Start from data ``(n, dim)``: the sorted values of an entry are cut into one part a component.

        Centres and units are the means and the logistic scales of these parts. A unit is at least 1/4 and at
        least 1/16 of its old value, since an entry may be constant in a few rows.
        """
        rows = float64(x).repeat(-(-self.components // len(x)), 1).sort(0).values
        moments = [torch.var_mean(piece, 0, correction=0) for piece in rows.tensor_split(self.components)]
        variance, mean = (torch.stack(moment, 1) for moment in zip(*moments, strict=True))
        least = (float64(self.unit) / 16).clamp_min(0.25)
        self.centre.copy_(mean)
        self.unit.copy_(torch.maximum(variance.sqrt() * PER_DEVIATION, least))


class LogisticMixture(Logistics):
    """Independent entries, each a mixture of discretized logistic laws; see `Logistics`.

    Args:
        dim: number of entries.
        components: of each.
        classes: int64 ``(dim,)``, the class of each entry; entries of a class share the learned numbers.
            Default one class an entry.
        centre: see `Logistics`.
        unit: see `Logistics`.

    Raises:
        ValueError: see `Logistics`; classes of another shape or dtype, or negative.
    """

    classes: Tensor

    def __init__(
        self,
        dim: int,
        components: int,
        classes: Tensor | None = None,
        centre: Tensor | None = None,
        unit: Tensor | None = None,
    ) -> None:
        super().__init__(dim, components, centre, unit)
        self.register_buffer("classes", check_classes(classes, dim))
        self.raw = nn.Parameter(torch.zeros(int(self.classes.max()) + 1, self.num_params))

    def _raw(self, context: Context | None) -> Tensor:
        only_given(context)
        return self.raw[self.classes][None]


class Logistic(LogisticMixture):
    """Independent entries, each a discretized logistic law: a `LogisticMixture` of one component."""

    def __init__(
        self,
        dim: int,
        classes: Tensor | None = None,
        centre: Tensor | None = None,
        unit: Tensor | None = None,
    ) -> None:
        super().__init__(dim, 1, classes, centre, unit)


class ConditionalLogistic(Conditional, Logistics):
    """Entries independent given the context, each a discretized logistic law or a mixture; see `Logistics`.

    The net is called as ``net(x, rest)``, see `dflow.core.conditioned`; it returns ``(batch,
    dim, num_params)``, r and q; or all r, all q, all logits of a mixture. Inside a `Split` x is the kept
    entries.

    Raises:
        ValueError: see `Logistics`; no context, or a net that returns another shape.
    """

    def __init__(
        self,
        net: nn.Module,
        dim: int,
        components: int = 1,
        centre: Tensor | None = None,
        unit: Tensor | None = None,
    ) -> None:
        super().__init__(dim, components, centre, unit)
        self.net = net

    def _raw(self, context: Context | None) -> Tensor:
        only_given(context)
        return self.outputs(context, self.dim, self.num_params)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Context | None = None) -> None:
        """Start from data, or from the residuals of the best linear prediction where the net has one.

        Centres and units of residuals are the same at all places of a channel.
        """
        regress = getattr(self.net, "regress", None)
        fit = None if regress is None or context is None else conditioned(partial(regress, x), context)
        if fit is None:
            return super().initialize(x)
        weight, prediction = fit
        super().initialize(float64(x) - prediction)
        for buffer in (self.centre, self.unit):
            planes = buffer.view(len(weight), -1, self.components)
            planes.copy_(planes.mean(1, keepdim=True).expand_as(planes))
        units = self.unit.view(len(weight), -1, self.components)[:, 0]
        self.net.net.lead(weight, 1 / float64(units))  # type: ignore[union-attr, operator]
        return None


def _standard(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of the standard logistic law, in the widest type of the device, finite; and of the floor.

    Returns:
        The draws; where the floor is to be drawn instead, bool; and uniform numbers in [0, 1) for that.

    All come from the bits of the same random numbers, so that a draw without the floor is that of a law
    without one: 16 low bits decide, and the bits above them are the uniform numbers. The lowest two are left
    out, as a device may round there.
    """
    dtype = widest(device)
    u = torch.rand(shape, dtype=dtype, device=device, generator=generator)
    if dtype == torch.float64:
        bits = (u * 2.0**53).long() >> 2
        return torch.logit(u, 2.0**-54), bits % 2**16 == 0, (bits >> 16) * 2.0**-35
    # The law is symmetric: a sign, and one side, whose uniform numbers below 1/2 have 48 bits in two parts.
    fine, side = (torch.rand(shape, dtype=dtype, device=device, generator=generator) for _ in range(2))
    tail = ((u + fine * 2.0**-24) / 2).clamp(2.0**-50, 0.5)
    at = (fine * 2.0**24).long() >> 2
    return torch.where(side < 0.5, 1, -1) * torch.logit(tail), at % 2**16 == 0, u
