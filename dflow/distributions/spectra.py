"""A conditional law on Z/K: the context chooses a bijection, and weights of a few shared laws ("spectra")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dflow.core import Context, Elementwise, conditioned, present
from dflow.distributions.categorical import check_entries, clear_absent, draw_all, total
from dflow.distributions.conditional import Conditional, check_rows
from dflow.ops.modular import check_alphabet
from dflow.ops.precision import at_least_float32, full_precision

#: Spectra are the soft-max of this number times their parameter: Adam moves a parameter by at most the
#: learning rate a step, which would be too slow for logits at the learning rate of networks.
_GAIN = 10.0


def power_laws(components: int, K: int) -> Tensor:
    """Parameters of shared laws ``(z + 1)^-a``, ``(components, K)``, the first of which is most peaked."""
    powers = torch.linspace(2.5, 0.5, components) if components > 1 else torch.ones(1)
    return -powers[:, None] * torch.arange(1, K + 1).log() / _GAIN


def log_laws(spectra: Tensor) -> Tensor:
    """The logarithms of the shared laws with parameters ``(components, K)``, at least float32."""
    return torch.log_softmax(_GAIN * at_least_float32(spectra), -1)


class Spectra(Conditional):
    r"""Entries independent given the context: each is mapped to a latent with a mixture of C laws.

    .. math:: p(x_i \mid \text{context}) = \sum_{c=1}^{C} w_{ic} \, S_{c, z_i},
        \qquad z_i = \text{elementwise}(x_i; \text{params}_i)

    The parameters of the map and the logits of the weights w come from one call of the net; the spectra S,
    ``(C, K)``, are shared by all entries and contexts. They start as power laws ``(z + 1)^-a`` of which the
    first is the most peaked. A flow on Z/K over a factorized base has C = 1: in every context it permutes the
    same K probabilities. With several spectra an entry can be more certain in one context than in another.

    With ranks (`dflow.elementwise.ModRank`) z is the rank of the symbol, 0 for the most probable one.
    The gradient of `log_prob` reaches w and S in both modes, params in the mode of one-hot rows only
    (straight-through).

    Args:
        elementwise: family of the map on Z/K.
        net: called as ``net(x, rest)``, see `dflow.core.conditioned`, gives ``(batch, dim, num_params + C)``;
            without the last C where C = 1.
        K: size of the alphabet.
        components: C.

    Raises:
        ValueError: K < 2, components < 1, no context, or an output of the net or ``x`` that does not fit.
    """

    def __init__(self, elementwise: Elementwise, net: nn.Module, K: int, components: int) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"components must be at least 1, found {components}")
        self.elementwise = elementwise
        self.net = net
        self.K = check_alphabet(K)
        self.components = components
        self.spectra = nn.Parameter(power_laws(components, K))

    def round_trip(self, x: Tensor, context: Context | None = None) -> bool | None:
        """Whether the inverse map recovers ``x`` from its latents."""
        params, _ = self.params(context)
        z, _ = self.elementwise.forward(x, params)
        return torch.equal(self.elementwise.inverse(z, params)[0], x)

    @staticmethod
    def num_outputs(elementwise: Elementwise, components: int) -> int:
        """Numbers that the net has to give for each entry."""
        return elementwise.num_params + (components if components > 1 else 0)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"K={self.K}, components={self.components}"

    def log_spectra(self) -> Tensor:
        """``log S``, ``(C, K)``, at least float32."""
        return log_laws(self.spectra)

    def params(self, context: Context | None) -> tuple[Tensor, Tensor]:
        """Parameters of the map ``(batch, dim, num_params)`` and ``log w`` ``(batch, dim, C)``."""
        # As in a coupling: the result of an arg-max must not depend on the precision.
        with full_precision(self.spectra):
            out = at_least_float32(conditioned(self.net, context))
        size, expected = self.elementwise.num_params, self.num_outputs(self.elementwise, self.components)
        if out.ndim != 3 or out.shape[-1] != expected:
            raise ValueError(f"the net gave {tuple(out.shape)}, expected (batch, dim, {expected})")
        if self.components == 1:
            return out, out.new_zeros(*out.shape[:2], 1)
        return out[..., :size], torch.log_softmax(out[..., size:], -1)

    def log_latent(self, z: Tensor, log_weights: Tensor) -> Tensor:
        """``log sum_c w_c S[c, z]`` of symbols z, ``(batch, dim)``, given ``log w`` ``(batch, dim, C)``."""
        return torch.logsumexp(log_weights + self.log_spectra().T[z], -1)

    def log_law(self, log_weights: Tensor) -> Tensor:
        """The same for every latent: ``(batch, dim, K)``."""
        return torch.logsumexp(log_weights[..., None] + self.log_spectra(), -2)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``, at least float32: on rows in the dtype of ``x``."""
        params, log_weights = self.params(context)
        check_entries(x, params.shape[1], self.K)
        if x.shape[0] != params.shape[0]:
            raise ValueError(f"{x.shape[0]} rows of x for a context of {params.shape[0]}")
        z, _ = self.elementwise.forward(x, params)
        if x.is_floating_point():
            terms, dtype = (self.log_law(log_weights).to(x.dtype) * z).sum(-1), x.dtype
        else:
            terms, dtype = self.log_latent(z, log_weights), log_weights.dtype
        return total(terms, present(context, len(x), x.shape[1])).to(dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """One exact draw for each of the ``n`` rows of the context, int64 ``(n, dim)``."""
        params, log_weights = self.params(context)
        check_rows(n, len(params))
        # Each entry's map is a permutation, so that controls do to symbols what they do to latents.
        z = draw_all(self.log_law(log_weights), n, context, generator)
        x, _ = self.elementwise.inverse(z, params)
        return clear_absent(x, present(context, len(x), x.shape[1]))
