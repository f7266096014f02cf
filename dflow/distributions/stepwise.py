"""Laws of one's own over symbols, drawn in steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from dflow.core import Context, Distribution, noise_in, present
from dflow.distributions.categorical import clear_absent
from dflow.ops.noise import Noise

#: Places in the flat ``(n, dim)`` and the logits of what stands there; the symbols there are sent back.
Steps = Generator[tuple[Tensor, Tensor], Tensor, None]


class Stepwise(Distribution):
    """A law over symbols that says how it is drawn; who extends it writes `log_prob`, `steps` and ``dim``.

    From the steps follow `sample`, exact coding (`dflow.coding.codec`) and `round_trip`, the check that
    they agree with `log_prob`.

    Attributes:
        dim: entries of a draw, set in the constructor.
    """

    dim: int

    @abstractmethod
    def steps(self, n: int, context: Context | None = None) -> Steps:
        """How ``n`` draws are made: one ``yield`` a step, in evaluation mode and without gradients.

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

        ``prompt``, int64 ``(m,)``, is forced at the first positions while the rest is drawn; see ``prompt``
        of `dflow.zoo.Family`. ``length`` is for laws that can stop early; here it changes nothing.
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
        places, symbols = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return symbols.new_zeros(n * self.dim).index_copy(0, places, symbols).view(n, self.dim)

    @torch.no_grad()
    def log_prob_by_steps(self, x: Tensor, context: Context | None = None) -> Tensor:
        """`log_prob` of symbols ``(n, dim)`` by what `steps` yields, float64 ``(n,)``."""
        mask = present(context, len(x), self.dim)
        line = clear_absent(x, mask).flatten()
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)

        def score(places: Tensor, logits: Tensor) -> Tensor:
            symbols = line[places]
            terms = logits.double().log_softmax(-1).gather(-1, symbols[:, None]).flatten()
            if mask is not None:
                terms = torch.where(mask.flatten()[places], terms, 0.0)
            total.index_add_(0, places // self.dim, terms)
            return symbols

        follow(self.steps(len(x), context), score)
        return total

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """Whether `log_prob_by_steps` and `log_prob` agree, but for the last bits."""
        steps = self.log_prob_by_steps(x, context)
        return torch.allclose(steps, self.log_prob(x, context).double(), rtol=1e-4, atol=1e-3)


def follow(steps: Steps, symbols: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Run ``steps`` to their end, sending to each what ``symbols(places, logits)`` gives."""
    step = next(steps, None)
    while step is not None:
        try:
            step = steps.send(symbols(*step))
        except StopIteration:
            return
