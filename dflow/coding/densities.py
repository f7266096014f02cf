"""Densities of reals as codes of symbols on grids, see `dflow.coding.local`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor

from dflow.coding.codes import Stack, join
from dflow.coding.layers import Layer, layers, move
from dflow.coding.local import CodingSettings, Frame
from dflow.coding.normals import NormalCode
from dflow.core import Context, Distribution
from dflow.distributions import ConditionalNormal, CovarianceNormal, Normal, StandardNormal
from dflow.flows import Flow, Split


class DensityLaw(Protocol):
    """A density on symbols."""

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        """Push symbols ``(n, dim)``."""
        ...

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        """Pop as many rows."""
        ...


@singledispatch
def density(law: Distribution, frame: Frame, settings: CodingSettings) -> DensityLaw:
    """What codes a density of symbols on ``frame``. Register others here.

    Raises:
        ValueError: a density without a code.
    """
    raise ValueError(f"no code for a density {type(law).__name__} by local bits-back")


@density.register
def _(law: Flow, frame: Frame, settings: CodingSettings) -> DensityLaw:
    codes, out = layers(law.bijector, frame, settings)
    return _Flowing(codes, density(law.base, out, settings))


class _Flowing:
    def __init__(self, layers: Sequence[Layer], base: DensityLaw) -> None:
        self.layers, self.base = layers, base

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        self.base.push(move(self.layers, symbols, stack, context, True), stack, context)

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        return move(self.layers, self.base.pop(n, stack, context), stack, context, False)


@density.register
def _(law: Split, frame: Frame, settings: CodingSettings) -> DensityLaw:
    return _Factored(law, frame, settings)


class _Factored:
    def __init__(self, law: Split, frame: Frame, settings: CodingSettings) -> None:
        self.law, self.base_index, self.other_index = law, law.kept_index.cpu(), law.rest_index.cpu()
        self.frame = frame.at(self.base_index)
        self.base = density(law.base, self.frame, settings)
        self.conditional = density(law.conditional, frame.at(self.other_index), settings)

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        x_a = symbols[:, self.base_index]
        base_context, other_context = self.law.contexts(self.frame.values(x_a), context)
        self.conditional.push(symbols[:, self.other_index], stack, other_context)
        self.base.push(x_a, stack, base_context)

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        x_a = self.base.pop(n, stack, self.law.contexts(None, context)[0])
        other_context = self.law.contexts(self.frame.values(x_a), context)[1]
        return self.law.join(x_a, self.conditional.pop(n, stack, other_context))


class Independent:
    """Entries that are independent, by means and standard deviations ``(n or 1, dim)`` given the context."""

    def __init__(
        self, params: Callable[[Context | None], tuple[Tensor, Tensor]], frame: Frame, narrow: bool = False
    ) -> None:
        self.params, self.frame, self.narrow = params, frame, narrow

    @classmethod
    def standard(cls, dim: int, frame: Frame, narrow: bool = False) -> Independent:
        """Standard normal."""
        one = torch.ones(1, dim, dtype=torch.float64)
        return cls(lambda context: (0 * one, one), frame, narrow)

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        """See `DensityLaw`."""
        stack.push(*self._code(len(symbols), context).intervals(symbols.flatten()))

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        """See `DensityLaw`."""
        return self._code(n, context).pop(stack).view(n, -1)

    def _code(self, n: int, context: Context | None) -> NormalCode:
        loc, scale = self.params(context)
        units = self.frame.units(loc), scale / self.frame.step
        loc, scale = (v.expand(n, -1).flatten() for v in units)
        return NormalCode(loc, scale, self.narrow)


@density.register
def _(law: StandardNormal, frame: Frame, settings: CodingSettings) -> DensityLaw:
    return Independent.standard(law.dim, frame)


@density.register
def _(law: Normal, frame: Frame, settings: CodingSettings) -> DensityLaw:
    L, loc = (v.detach().double() for v in law.conditionals())
    return Independent(lambda context: (loc[None], 1 / L[None]), frame)


@density.register
def _(law: ConditionalNormal, frame: Frame, settings: CodingSettings) -> DensityLaw:
    def params(context: Context | None) -> tuple[Tensor, Tensor]:
        loc, log_scale = law.params(context)
        # Beyond any grid all the same.
        return loc.double(), log_scale.double().clamp(max=100).exp()

    return Independent(params, frame)


@density.register
def _(law: CovarianceNormal, frame: Frame, settings: CodingSettings) -> DensityLaw:
    return _Covaried(law, frame)


class _Covaried:
    """From the last entry to the first, each given those after it."""

    def __init__(self, law: CovarianceNormal, frame: Frame) -> None:
        L, loc = (v.detach().double() for v in law.conditionals())
        self.scale = 1 / L.diagonal()
        self.weight, self.loc, self.frame = (L * self.scale).T.contiguous(), loc, frame

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        centred = self.frame.values(symbols) - self.loc
        entries = reversed(range(len(self.loc)))
        stack.push(*join([self._code(centred, i).intervals(symbols[:, i]) for i in entries]))

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        symbols = torch.zeros(n, len(self.loc), dtype=torch.int64)
        centred = torch.zeros(symbols.shape, dtype=torch.float64)
        for i in reversed(range(len(self.loc))):
            symbols[:, i] = self._code(centred, i).pop(stack)
            centred[:, i] = symbols[:, i].double() * self.frame.step[i] + self.frame.offset[i] - self.loc[i]
        return symbols

    def _code(self, centred: Tensor, i: int) -> NormalCode:
        mean = self.loc[i] - (centred[:, i + 1 :] * self.weight[i, i + 1 :]).sum(1)
        step = self.frame.step[i]
        return NormalCode((mean - self.frame.offset[i]) / step, (self.scale[i] / step).expand(len(mean)))
