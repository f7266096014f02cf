"""Bijections of Z/K: shift, affine with unit scales, and rank (a full permutation).

int64 symbols ``(batch, dim)`` are mapped exactly, by arg-max of the parameters; one-hot rows
``(batch, dim, K)`` are mapped to one-hot rows, with straight-through gradients. All logits zero is the
identity in every family.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from dflow.core import Elementwise
from dflow.ops import modular
from dflow.ops.precision import at_least_float32
from dflow.ops.straight_through import StraightThrough, straight_through


class Discrete(Elementwise):
    """Base class of the families on Z/K: it selects the mode and checks the arguments.

    A subclass maps what `forward` and `inverse` were given: symbols, by the arg-max of the parameters, in
    ``_symbols``; and one-hot rows, by ``estimator`` of the parameters, in ``_rows``. There the parameters are
    float32 or wider; the rows that ``_rows`` returns are then given the dtype of those that came in.
    """

    def __init__(self, K: int, num_params: int, estimator: StraightThrough | None = None) -> None:
        super().__init__()
        self.K = modular.check_alphabet(K)
        self.num_params = num_params
        self.estimator = estimator or StraightThrough()

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"K={self.K}"

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Data to latent.

        Args:
            x: int64 ``(batch, dim)`` in 0..K-1, or one-hot rows ``(batch, dim, K)``.
            params: ``(batch, dim, num_params)``.

        Returns:
            z like ``x``, and log_det, zeros ``(batch, dim)``.

        Raises:
            ValueError: wrong shapes or dtype; on the CPU, a symbol outside 0..K-1.
        """
        return self._map(x, params, True)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Latent to data; arguments, result and errors as in `forward`."""
        return self._map(z, params, False)

    def _map(self, x: Tensor, params: Tensor, to_latent: bool) -> tuple[Tensor, Tensor]:
        rows = x.is_floating_point()
        expected = (*x.shape[:-1], self.K) if rows else x.shape
        if x.ndim != 2 + rows or x.shape != expected or not (rows or x.dtype == torch.int64):
            raise ValueError(
                f"expected int64 (batch, dim) or one-hot rows (batch, dim, {self.K}), "
                f"found {x.dtype} {tuple(x.shape)}"
            )
        if params.shape != (*x.shape[:2], self.num_params):
            raise ValueError(
                f"params have shape {tuple(params.shape)}, expected {(*x.shape[:2], self.num_params)}"
            )
        params = at_least_float32(params)
        if rows:
            z = self._rows(x, params, to_latent).to(x.dtype)
        else:
            # Only data come from the user; latents come from a base over the same K symbols. Looking at them
            # would wait for an accelerator, at every layer. What is compiled reads no values: models check
            # the data before.
            check = to_latent and x.device.type == "cpu" and not torch.compiler.is_compiling()
            if check and x.numel() and (int(x.min()) < 0 or int(x.max()) >= self.K):
                raise ValueError(f"symbols lie in 0..{self.K - 1}, found {int(x.min())}..{int(x.max())}")
            z = self._symbols(x, params.detach(), to_latent)
        return z, params.new_zeros(x.shape[:2])

    @abstractmethod
    def _symbols(self, x: Tensor, params: Tensor, to_latent: bool) -> Tensor: ...

    @abstractmethod
    def _rows(self, x: Tensor, params: Tensor, to_latent: bool) -> Tensor: ...


class ModShift(Discrete):
    """``z = x - loc mod K``, ``loc`` the arg-max of K logits.

    Source: Tran et al. 2019, arXiv 1905.10347.

    Raises:
        ValueError: K < 2.

    >>> ModShift(5).forward(torch.tensor([[1]]), torch.tensor([[[0.0, 0, 0, 9, 0]]]))[0]
    tensor([[3]])
    """

    predicts = True

    def __init__(self, K: int, estimator: StraightThrough | None = None) -> None:
        super().__init__(K, K, estimator)

    def _symbols(self, x: Tensor, params: Tensor, to_latent: bool) -> Tensor:
        loc = params.argmax(-1)
        return (x - loc if to_latent else x + loc).remainder_(self.K)

    def _rows(self, x: Tensor, params: Tensor, to_latent: bool) -> Tensor:
        loc = self.estimator(params)
        return modular.shift(x, loc) if to_latent else modular.unshift(x, loc)

    def expected(self, x: Tensor, params: Tensor, cost: Tensor) -> Tensor:
        """Mean cost of the latent under a random loc: ``sum_s softmax(params / temperature)_s cost[x - s]``.

        Args:
            x: symbols, int64 ``(batch, dim)``.
            params: ``(batch, dim, K)``.
            cost: of every latent, floating ``(batch, dim, K)``.

        Returns:
            ``(batch, dim)``, differentiable in ``params`` and ``cost``; O(K) an entry.
        """
        latents = (x[..., None] - torch.arange(self.K, device=x.device)).remainder_(self.K)
        return (torch.softmax(params / self.estimator.temperature, -1) * cost.gather(-1, latents)).sum(-1)


class ModAffine(Discrete):
    """``z = (x - loc) / scale mod K``: K logits for ``loc``, then phi(K) for ``scale``, a unit of Z/K.

    Scales that are no units have no logit, so the map is a bijection for every K.

    Source: Tran et al. 2019, arXiv 1905.10347.

    Raises:
        ValueError: K < 2.
    """

    units: Tensor
    inverses: Tensor

    def __init__(self, K: int, estimator: StraightThrough | None = None) -> None:
        units = modular.units(K)
        super().__init__(K, K + len(units), estimator)
        self.register_buffer("units", units)
        self.register_buffer("inverses", modular.inverses(K)[units])

    def _symbols(self, x: Tensor, params: Tensor, to_latent: bool) -> Tensor:
        loc, scale = params[..., : self.K].argmax(-1), params[..., self.K :].argmax(-1)
        if to_latent:
            return ((x - loc) * self.inverses[scale]).remainder_(self.K)
        return (x * self.units[scale] + loc).remainder_(self.K)

    def _rows(self, x: Tensor, params: Tensor, to_latent: bool) -> Tensor:
        loc, scale = self.estimator(params[..., : self.K]), self.estimator(params[..., self.K :])
        if to_latent:
            return modular.affine(x, loc, scale, self.inverses)
        return modular.unaffine(x, loc, scale, self.units)

    def expected(self, x: Tensor, params: Tensor, cost: Tensor) -> Tensor:
        """Mean cost of the latent under independent random loc and scale.

        ``sum_s sum_a softmax(l / temperature)_s softmax(m / temperature)_a cost[(x - s) / units[a]]`` for
        ``params`` l (K) and m (phi(K)); arguments and result as in `ModShift.expected`, O(K phi(K)) an entry.
        """
        moved = (x[..., None] - torch.arange(self.K, device=x.device)).remainder_(self.K)
        latents = (moved[..., None] * self.inverses).remainder_(self.K)
        costs = cost.gather(-1, latents.flatten(-2)).view(latents.shape)
        params = params / self.estimator.temperature
        loc, scale = torch.softmax(params[..., : self.K], -1), torch.softmax(params[..., self.K :], -1)
        return (loc * (costs @ scale[..., None]).squeeze(-1)).sum(-1)


class ModRank(Discrete):
    """``z`` = the rank of symbol ``x`` when the K symbols are sorted by descending logit.

    Ties go by symbol, so every vector of logits gives a permutation. ``z`` is 0 when ``x`` is the most
    probable symbol: in every context a good classifier maps the data to the same few latents.

    Gradients to the logits are those of a SoftSort row, ``softmax(-|l_x - sort(l)| / temperature)`` over
    ranks (over symbols in the inverse), gradients to ``x`` those of the hard permutation. With Gumbel
    noise the ranking is a Plackett-Luce draw.

    Source: Lindt and Hoogeboom 2021, arXiv 2107.11625 (sorting by probability); Prillo and Eisenschlos
    2020, arXiv 2006.16038 (SoftSort).

    Raises:
        ValueError: K < 2.

    >>> ModRank(3).forward(torch.tensor([[2, 0, 1]]), torch.tensor([[[1.0, 0.0, 2.0]] * 3]))[0]
    tensor([[0, 1, 2]])
    """

    predicts = True

    def __init__(self, K: int, estimator: StraightThrough | None = None) -> None:
        super().__init__(K, K, estimator)

    def _symbols(self, x: Tensor, params: Tensor, to_latent: bool) -> Tensor:
        x = x[..., None]
        if to_latent:
            logit, symbol = params.gather(-1, x), torch.arange(self.K, device=x.device)
            before = (params > logit) | ((params == logit) & (symbol < x))
            return before.sum(-1)
        return self._order(params).gather(-1, x).squeeze(-1)

    def _rows(self, x: Tensor, params: Tensor, to_latent: bool) -> Tensor:
        logits = self.estimator.perturb(params)
        order = self._order(logits.detach())
        line = torch.arange(self.K, device=x.device)
        rank = torch.empty_like(order).scatter_(-1, order, line.expand_as(order))
        hard = x.gather(-1, order if to_latent else rank)
        if not (logits.requires_grad and torch.is_grad_enabled()):
            return hard
        hot = x.detach().argmax(-1, keepdim=True)
        # |difference|, written with the sign from the hard ranking: the same value, but at a tie (all logits
        # 0, the identity) it has a one-sided derivative instead of a derivative of 0.
        if to_latent:
            difference = logits.gather(-1, hot) - logits.gather(-1, order)
            sign = torch.sign(line - rank.gather(-1, hot))
        else:
            difference = logits.gather(-1, order.gather(-1, hot)) - logits
            sign = torch.sign(rank - hot)
        soft = torch.softmax(-sign * difference / self.estimator.temperature, -1)
        return straight_through(hard, soft)

    @staticmethod
    def _order(logits: Tensor) -> Tensor:
        return logits.sort(dim=-1, descending=True, stable=True).indices


#: Constructors of the families on Z/K by their names in recipes, called with K and an estimator, None for a
#: new one. A family that is added here can be used by every flow on Z/K.
DISCRETE: dict[str, Callable[[int, StraightThrough | None], Elementwise]] = {
    "shift": ModShift,
    "affine": ModAffine,
    "rank": ModRank,
}
