"""Base class of user-defined laws over symbols that are drawn in steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from dflow.core import Context, Distribution, noise_in, present
from dflow.distributions.categorical import clear_absent
from dflow.ops.devices import widen, widest
from dflow.ops.noise import Noise
from dflow.ops.precision import agree

#: Yields places in the flat ``(n, dim)`` with the logits of the symbols there, and is sent these symbols.
Steps = Generator[tuple[Tensor, Tensor], Tensor, None]


class Stepwise(Distribution):
    """A law over symbols that says how it is drawn; a subclass defines `log_prob`, `steps` and ``dim``.

    `sample`, exact coding (`dflow.coding.codec`) and `round_trip`, the check that the steps agree with
    `log_prob`, follow from the steps.

    Attributes:
        dim: entries of a draw, set in the constructor.
    """

    dim: int

    @abstractmethod
    def steps(self, n: int, context: Context | None = None) -> Steps:
        """The steps that make ``n`` draws: one ``yield`` a step, in evaluation mode, without gradients.

        A step yields places, int64 ``(m,)`` in the flat ``(n, dim)``, and logits ``(m, K)`` of the symbols
        there, independent of one another given the steps before. It is sent the symbols, int64 ``(m,)``.
        Every place comes once. The same arguments and symbols have to give the same logits to the bit.
        Absent entries (context of lengths) may be among the places; their symbol is 0, whatever the logits.
        """

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Context | None = None,
        generator: torch.Generator | None = None,
        prompt: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """``n`` exact draws, int64 ``(n, dim)``; absent entries are 0.

        ``prompt``, int64 ``(m,)``, is forced at the first positions while the others are drawn; see
        ``prompt`` of `dflow.zoo.Family`. ``length`` is for laws that can stop early; here it has no effect.
        """
        mask = present(context, n, self.dim)
        rows: list[tuple[Tensor, Tensor]] = []
        noise: Noise | None = None

        def draw(places: Tensor, logits: Tensor) -> Tensor:
            nonlocal noise
            noise = noise_in(context, n, generator, places.device) if noise is None else noise
            drawn = noise.draw(logits, places // self.dim, places % self.dim)
            if prompt is not None:
                position = places % self.dim
                forced = prompt[position.clamp(max=len(prompt) - 1)]
                drawn = torch.where(position < len(prompt), forced, drawn)
            if mask is not None:
                drawn = torch.where(mask.flatten()[places], drawn, 0)
            rows.append((places, drawn))
            return drawn

        follow(self.steps(n, context), draw)
        places, symbols = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        return symbols.new_zeros(n * self.dim).index_copy(0, places, symbols).view(n, self.dim)

    @torch.no_grad()
    def log_prob_by_steps(self, x: Tensor, context: Context | None = None) -> Tensor:
        """`log_prob` of symbols ``(n, dim)``, from the logits that `steps` yields, float64 ``(n,)``."""
        mask = present(context, len(x), self.dim)
        line = clear_absent(x, mask).flatten()
        total = torch.zeros(len(x), dtype=widest(x.device), device=x.device)

        def score(places: Tensor, logits: Tensor) -> Tensor:
            symbols = line[places]
            terms = widen(logits).log_softmax(-1).gather(-1, symbols[:, None]).flatten()
            if mask is not None:
                terms = torch.where(mask.flatten()[places], terms, 0.0)
            total.index_add_(0, places // self.dim, terms)
            return symbols

        follow(self.steps(len(x), context), score)
        return total

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """Whether `log_prob_by_steps` and `log_prob` agree up to rounding."""
        steps = self.log_prob_by_steps(x, context)
        return agree(steps, self.log_prob(x, context), self)


def follow(steps: Steps, symbols: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Run ``steps`` to their end, sending to each the result of ``symbols(places, logits)``."""
    step = next(steps, None)
    while step is not None:
        try:
            step = steps.send(symbols(*step))
        except StopIteration:
            return
