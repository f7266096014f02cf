"""Categorical laws: factorized, mixture of factorized, and conditional."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dflow.core import Context, Distribution, lengths_in, noise_in, present, span_in
from dflow.distributions.conditional import Conditional, check_rows
from dflow.ops.devices import float64, widen, widest
from dflow.ops.memo import Memo
from dflow.ops.modular import check_alphabet, symbols
from dflow.ops.noise import COMPONENTS


class Categorical(Distribution):
    """Factorized law ``p(x) = prod_i b[classes[i], x_i]`` of ``dim`` entries.

    By default b is the soft-max of a parameter ``logits``, which learns by the gradient of `log_prob`. With
    ``learned=False`` b has a closed form instead: the counts of symbols seen in each class, smoothed,
    ``b[c, k] = (counts[c, k] + 1/2) / (sum_k counts[c, k] + K/2)`` (Krichevsky and Trofimov 1981). The
    counts are a buffer without a gradient: the training loop updates them with `statistics` and `update`, as
    ``dflow train`` does for flows.

    While ``peak`` is above 0 the law is ``b^(1-peak) q^peak``, normalised, where q has half of its mass on
    symbol 0 and is uniform on the others. With a base equal to the data's marginals the identity is a local
    optimum of a flow; a peaked base at the start of training helps to leave it.

    In a law of hidden entries alone (`dflow.flows.Infilled`) there are some of the entries only, and the
    classes may depend on which around them are known (``lay``). Then each class is smoothed towards all of
    them together, by as many counts, so that one that hardly ever comes is like the others.

    Args:
        dim: number of entries.
        K: size of the alphabet.
        classes: int64 ``(dim,)``, the class of each entry; default one class an entry.
        learned: logits learned by gradient, or counts.
        lay: from the mask of known entries around, bool ``(n,)``, and the index of the first hidden one
            among the ``dim`` entries, to the classes of hidden ones; in place of ``classes``, with counts.
        num_classes: classes that there are with ``lay``.

    Raises:
        ValueError: dim < 1, K < 2, classes of another shape or dtype, or negative.
    """

    one_table = True

    classes: Tensor
    counts: Tensor

    def __init__(
        self,
        dim: int,
        K: int,
        classes: Tensor | None = None,
        learned: bool = True,
        lay: Callable[[Tensor, int], Tensor] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}")
        self.register_buffer("classes", check_classes(classes, dim))
        self.dim = dim
        self.K = check_alphabet(K)
        self.n_classes = num_classes or int(self.classes.max()) + 1
        self.lay, self._laid = lay, Memo[Tensor]()
        self.learned = learned
        self._peak = 0.0
        if learned:
            self.logits = nn.Parameter(torch.zeros(self.n_classes, K))
        else:
            self.register_buffer("counts", torch.zeros(self.n_classes, K, dtype=torch.float32))

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"dim={self.dim}, K={self.K}, n_classes={self.n_classes}, learned={self.learned}"

    @property
    def peak(self) -> float:
        """Weight in [0, 1] of a law that is peaked on symbol 0; 0 is the law itself."""
        return self._peak

    @peak.setter
    def peak(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"peak must lie in [0, 1], found {value}")
        self._peak = float(value)

    def log_law(self) -> Tensor:
        """``log b``, float64 ``(n_classes, K)``, ``peak`` included."""
        if self.learned:
            law = torch.log_softmax(widen(self.logits), -1)
        else:
            counts = widen(self.counts)
            prior = 0.5 if self.lay is None else self.K / 2 * _smoothed(counts.sum(0))
            law = torch.log((counts + prior) / (counts.sum(-1, keepdim=True) + self.K / 2))
        if self.peak == 0:
            return law
        q = torch.full_like(law, 0.5 / (self.K - 1))
        q[:, 0] = 0.5
        return torch.log_softmax((1 - self.peak) * law + self.peak * q.log(), -1)

    def classes_in(self, context: Context | None) -> Tensor:
        """The class of each entry, int64.

        Raises:
            ValueError: classes that depend on what is known around, and a context that does not say it.
        """
        if self.lay is None:
            start, n = span_in(context, self.dim)
            return self.classes[start : start + n]
        if context is None or context.around is None:
            raise ValueError("these classes are of a law of hidden entries, see dflow.flows.Infilled")
        lay, mask, first = self.lay, context.around.mask, context.around.first
        device = self.classes.device
        return self._laid(lambda: lay(mask, first).to(device), mask, key=(first, device))

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``.

        Summed in float64. On symbols the result has the dtype of the counts or logits, but at least
        float32; on one-hot rows that of ``x``.
        """
        n = check_entries(x, span_in(context, self.dim)[1], self.K)
        law, classes = self.log_law(), self.classes_in(context)
        if x.is_floating_point():
            terms = _pick(law[classes].to(x.dtype), x)
            dtype = x.dtype
        else:
            terms = law[classes, x]
            dtype = self._dtype()
        return total(terms, present(context, len(x), n)).to(dtype)

    def _dtype(self) -> torch.dtype:
        source = self.logits if self.learned else self.counts
        return torch.promote_types(source.dtype, torch.float32)

    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws, int64 ``(n, dim)``; absent entries are 0.

        Args:
            n: number of draws.
            context: lengths, or None.
            generator: on the device of the distribution.
        """
        law = self.log_law().detach()[self.classes_in(context)]
        x = draw_all(law, n, context, generator)
        return clear_absent(x, present(context, *x.shape))

    @torch.no_grad()
    def statistics(self, z: Tensor, context: Context | None = None) -> Tensor:
        """Counts of the symbols of ``z`` (either mode) in each class, ``(n_classes, K)``.

        Present entries only; without gradient; in the dtype of the counts.
        """
        n = check_entries(z, span_in(context, self.dim)[1], self.K)
        index = (self.classes_in(context) * self.K + symbols(z)).flatten()
        mask = present(context, len(z), n)
        # Sums of ones are exact, and the device is not asked how many there are.
        ones = index.new_ones(len(index)) if mask is None else mask.flatten()
        counts = torch.zeros(self.n_classes * self.K, dtype=self._dtype(), device=index.device)
        return counts.index_add_(0, index, ones.to(counts.dtype)).view(self.n_classes, self.K)

    @torch.no_grad()
    def update(self, counts: Tensor, momentum: float) -> None:
        """``counts <- momentum * counts + new``; the caller adds up the counts of several processes.

        Raises:
            ValueError: learned logits, counts of another shape, momentum outside [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], found {momentum}")
        self._check_counts(counts)
        self.counts.mul_(momentum).add_(counts)

    @torch.no_grad()
    def assign(self, counts: Tensor) -> None:
        """Take ``counts`` ``(n_classes, K)`` in place of the present ones; errors as in `update`."""
        self._check_counts(counts)
        self.counts.copy_(counts)

    def _check_counts(self, counts: Tensor) -> None:
        if self.learned:
            raise ValueError("a law with learned logits has no counts; make it with learned=False")
        if counts.shape != self.counts.shape:
            raise ValueError(f"counts have shape {tuple(counts.shape)}, expected {tuple(self.counts.shape)}")

    @torch.no_grad()
    def initialize(self, marginals: Tensor, weight: float = 1000.0) -> None:
        """Start every class from the data's marginals ``(K,)``, as if seen in ``weight`` symbols.

        Raises:
            ValueError: no law over K symbols, or a weight that is not positive.
        """
        counts = smoothed_counts(marginals, self.K, weight)
        if self.learned:
            self.logits.copy_(torch.log((counts + 0.5) / (weight + self.K / 2)))
        else:
            self.counts.copy_(counts)


class Mixture(Distribution):
    """Mixture of factorized laws, ``p(x) = sum_m w_m prod_i b[m, i, x_i]``, all learned, as `Categorical`.

    ``w`` is the soft-max of ``weight_logits`` ``(components,)``, ``b`` that of ``logits``
    ``(components, dim, K)``. These start with small random numbers, so that the components can differ.

    Raises:
        ValueError: dim < 1, K < 2 or components < 1.
    """

    one_table = True

    def __init__(self, dim: int, K: int, components: int) -> None:
        super().__init__()
        if dim < 1 or components < 1:
            raise ValueError(f"dim and components must be at least 1, found {dim} and {components}")
        self.dim = dim
        self.K = check_alphabet(K)
        self.components = components
        self.weight_logits = nn.Parameter(torch.zeros(components))
        self.logits = nn.Parameter(0.1 * torch.randn(components, dim, K))

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"dim={self.dim}, K={self.K}, components={self.components}"

    @torch.no_grad()
    def initialize(self, marginals: Tensor, weight: float = 1000.0) -> None:
        """Start every entry of every component near the data's marginals ``(K,)``, smoothed.

        Raises:
            ValueError: no law over K symbols, or a weight that is not positive.
        """
        counts = smoothed_counts(marginals, self.K, weight)
        start = torch.log((counts + 0.5) / (weight + self.K / 2)).to(self.logits)
        self.logits.copy_(start + 0.1 * torch.randn_like(self.logits))

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``; dtypes as in `Categorical.log_prob`."""
        start, n = span_in(context, self.dim)
        check_entries(x, n, self.K)
        law = torch.log_softmax(widen(self.logits[:, start : start + n]), -1)
        mask = present(context, len(x), n)
        if x.is_floating_point():
            # (batch, components, dim) would be the largest tensor of a model: contract in one product.
            z = x if mask is None else torch.where(mask[..., None], x, 0)
            with torch.autocast(device_type=x.device.type, enabled=False):
                joint = z.flatten(1) @ law.to(x.dtype).flatten(1).T
            dtype = x.dtype
        else:
            terms = law[:, torch.arange(n, device=x.device), x]
            joint = total(terms, mask).T
            dtype = torch.promote_types(self.logits.dtype, torch.float32)
        weights = torch.log_softmax(widen(self.weight_logits), -1)
        return torch.logsumexp(widen(joint) + weights, -1).to(dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` exact draws, int64 ``(n, dim)``: a component, then its symbols; absent entries are 0."""
        noise = noise_in(context, n, generator, self.logits.device)
        rows = torch.arange(n, device=self.logits.device)
        gumbel = noise.gumbel(rows, torch.zeros_like(rows), self.components, COMPONENTS)
        component = (widen(self.weight_logits) + gumbel).argmax(-1)
        start, number = span_in(context, self.dim)
        logits = self.logits[component, start : start + number]
        x = draw_all(logits, n, Context(noise=noise), None)
        return clear_absent(x, present(context, *x.shape))


class ConditionalCategorical(Conditional):
    """Entries independent given the context, ``p(x | context) = prod_i softmax(net(context))[i, x_i]``.

    The net is called as ``net(x, rest)``, see `dflow.core.conditioned`, and returns logits
    ``(batch, dim, K)``. Inside a `Split` x is the kept entries.

    Raises:
        ValueError: no context, or an ``x`` or n that does not fit the logits.
    """

    one_table = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def logits(self, context: Context | None) -> Tensor:
        """Logits ``(batch, dim, K)``, at least float32."""
        return self.outputs(context, None, None)

    def log_prob(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``: on rows in the dtype of ``x``, else the logits'."""
        logits = self.logits(context)
        check_entries(x, *logits.shape[1:])
        if x.shape[0] != logits.shape[0]:
            raise ValueError(f"{x.shape[0]} rows of x for a context of {logits.shape[0]}")
        law = torch.log_softmax(logits, -1)
        if x.is_floating_point():
            terms, dtype = _pick(law.to(x.dtype), x), x.dtype
        else:
            terms, dtype = law.gather(-1, x[..., None]).squeeze(-1), law.dtype
        return total(terms, present(context, len(x), x.shape[1])).to(dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Context | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """One exact draw for each of the ``n`` rows of the context, int64 ``(n, dim)``."""
        logits = self.logits(context)
        check_rows(n, len(logits))
        x = draw_all(logits, n, context, generator)
        return clear_absent(x, present(context, len(x), x.shape[1]))


def draw_all(logits: Tensor, n: int, context: Context | None, generator: torch.Generator | None) -> Tensor:
    """``n`` draws, int64 ``(n, dim)``, of independent entries with logits ``(dim, K)`` or ``(n, dim, K)``."""
    lengths_in(context)
    if context is None or context.noise is None:
        law = widen(logits).softmax(-1)
        if law.ndim == 2:
            return law.multinomial(n, replacement=True, generator=generator).T
        return law.flatten(0, 1).multinomial(1, generator=generator).view(law.shape[:2])
    noise = noise_in(context, n, generator, logits.device)
    rows = torch.arange(n, device=logits.device)[:, None]
    return noise.draw(logits, rows, torch.arange(logits.shape[-2], device=logits.device))


def check_entries(x: Tensor, dim: int, K: int) -> int:
    """``dim``; ValueError unless ``x`` is int64 ``(batch, dim)`` or floating ``(batch, dim, K)``."""
    rows = x.is_floating_point()
    fits = x.shape[1:] == ((dim, K) if rows else (dim,))
    if not fits or not (rows or x.dtype == torch.int64):
        raise ValueError(
            f"expected int64 (batch, {dim}) or one-hot rows (batch, {dim}, {K}), "
            f"found {x.dtype} {tuple(x.shape)}"
        )
    return dim


def check_classes(classes: Tensor | None, dim: int) -> Tensor:
    """A copy of the classes of ``dim`` entries, by default one each; ValueError unless they fit."""
    classes = torch.arange(dim) if classes is None else classes.clone()
    if classes.shape != (dim,) or classes.dtype != torch.int64 or int(classes.min()) < 0:
        raise ValueError(
            f"classes must be int64 ({dim},) and not negative, found {classes.dtype} {classes.tolist()}"
        )
    return classes


def total(terms: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over the last axis in float64, of the present entries."""
    if mask is not None:
        terms = torch.where(mask, terms, 0)
    return terms.sum(-1, dtype=widest(terms.device))


def clear_absent(x: Tensor, mask: Tensor | None) -> Tensor:
    """Symbols with 0 where an entry is absent."""
    return x if mask is None else torch.where(mask, x, 0)


def smoothed_counts(marginals: Tensor, K: int, weight: float) -> Tensor:
    """``weight * marginals``, float64 ``(K,)``; ValueError unless marginals are a law over K symbols."""
    law = float64(marginals)
    if law.shape != (K,) or not (law >= 0).all() or abs(float(law.sum()) - 1) > 1e-6:
        raise ValueError(f"marginals must be {K} probabilities that sum to 1, found {marginals.tolist()}")
    if not weight > 0:
        raise ValueError(f"weight must be positive, found {weight}")
    return weight * law


def _smoothed(counts: Tensor) -> Tensor:
    """A law, ``(K,)``, of counts and half a count for each symbol."""
    return (counts + 0.5) / (counts.sum() + len(counts) / 2)


def _pick(law: Tensor, x: Tensor) -> Tensor:
    # A product and a sum, not a matrix product: the only term that is not 0 is then exact, on every device
    # and at every precision setting.
    return (law * x).sum(-1)
