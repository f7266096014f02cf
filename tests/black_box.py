"""Local bits-back without looking into a flow: by its whole Jacobian, for tests of the layers' codes."""

from __future__ import annotations

import torch
from torch import Tensor

from dflow.coding.codes import Stack, join
from dflow.coding.densities import DensityLaw, density
from dflow.coding.local import CodingSettings, Frame
from dflow.coding.normals import NormalCode
from dflow.core import Context
from dflow.flows import Flow


class BlackBox:
    """A density that is a flow, its bijector as one map f of ``dim`` reals.

    z is popped under a normal law of mean f(x) and covariance ``s^2 J J^T``, J the Jacobian at x, entry by
    entry, and x is pushed under one of mean f^-1(z) and covariance ``s^2``. It costs ``-log2 |det J|``, dim
    evaluations of gradients and ``dim^3`` operations a row.

    Source: Ho, Lohn and Abbeel 2019, arXiv 1905.08500, algorithm 1.

    Args:
        law: in float64 and evaluation mode.
        frame: of x.
        settings: of these, sigma and grid.
    """

    def __init__(self, law: Flow, frame: Frame, settings: CodingSettings) -> None:
        """See the class."""
        self.bijector, self.old, dim = law.bijector, frame, len(frame.step)
        self.new, self.sigma = Frame.plain(dim, settings.step), 0.5**settings.sigma
        self.base: DensityLaw = density(law.base, self.new, settings)

    def push(self, symbols: Tensor, stack: Stack, context: Context | None) -> None:
        """Push symbols of x ``(n, dim)``."""
        found = torch.zeros_like(symbols)
        mean, factor = self._linear(symbols, context)
        noise = torch.zeros_like(mean)
        for i in range(symbols.shape[1]):
            found[:, i] = self._entry(mean, factor, noise, i).pop(stack)
            self._tell(found, mean, factor, noise, i)
        stack.push(*self._inputs(found, context).intervals(symbols.flatten()))
        self.base.push(found, stack, context)

    def pop(self, n: int, stack: Stack, context: Context | None) -> Tensor:
        """Pop symbols of x."""
        symbols = self.base.pop(n, stack, context)
        found = self._inputs(symbols, context).pop(stack).view(symbols.shape)
        mean, factor = self._linear(found, context)
        noise, parts = torch.zeros_like(mean), []
        for i in range(symbols.shape[1]):
            parts.append(self._entry(mean, factor, noise, i).intervals(symbols[:, i]))
            self._tell(symbols, mean, factor, noise, i)
        stack.push(*join(parts))
        return found

    def _linear(self, symbols: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """f(x) ``(n, dim)`` and L ``(n, dim, dim)`` of ``J J^T = L L^T``."""
        x = self.old.values(symbols)

        def f(x: Tensor) -> Tensor:
            return self.bijector.forward(x, context)[0].sum(0)

        with torch.enable_grad():
            # Rows do not see each other: the Jacobian of the sum over rows holds that of each.
            jacobian = torch.autograd.functional.jacobian(f, x).transpose(0, 1)
        factor = torch.linalg.qr(jacobian.transpose(1, 2), mode="r").R.transpose(1, 2)
        return self.bijector.forward(x, context)[0].detach(), factor

    def _inputs(self, symbols: Tensor, context: Context | None) -> NormalCode:
        x = self.bijector.inverse(self.new.values(symbols), context)[0].detach()
        scale = (self.sigma / self.old.step).expand(x.shape)
        return NormalCode(self.old.units(x).flatten(), scale.flatten())

    def _at(self, mean: Tensor, factor: Tensor, noise: Tensor, i: int) -> Tensor:
        return mean[:, i] + (factor[:, i, :i] * noise[:, :i]).sum(1)

    def _entry(self, mean: Tensor, factor: Tensor, noise: Tensor, i: int) -> NormalCode:
        scale = self.sigma * factor[:, i, i].abs()
        return NormalCode(self._at(mean, factor, noise, i) / self.new.step[i], scale / self.new.step[i])

    def _tell(self, symbols: Tensor, mean: Tensor, factor: Tensor, noise: Tensor, i: int) -> None:
        z = symbols[:, i].double() * self.new.step[i]
        noise[:, i] = (z - self._at(mean, factor, noise, i)) / factor[:, i, i]
