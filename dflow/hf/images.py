"""Models of images and tables as transformers models. Thin: the model is in `zoo`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from dflow import zoo
from dflow.config import InputError, nearest
from dflow.core import Distribution
from dflow.dequantize import Dequantized, Estimate
from dflow.flows import Flow, Split


class DflowImageConfig(PreTrainedConfig):
    """Settings of a model of images or tables: its family, and what the family's settings list.

    Args:
        family: a name in `dflow.zoo.IMAGES`.
        kwargs: settings of the family (unknown ones are refused when the model is built), and those of
            every transformers config.
    """

    model_type = "dflow-image"

    def __init__(self, family: str = "dequantized", **kwargs: Any) -> None:
        """See the class."""
        self.family = family
        if family in zoo.IMAGES:
            known = set(zoo.fields(family))
            kwargs |= asdict(zoo.settings(family, {k: v for k, v in kwargs.items() if k in known}))
        super().__init__(**kwargs)

    def settings(self) -> zoo.ValuesConfig:
        """The family's settings, checked."""
        if self.family not in zoo.IMAGES:
            hint = nearest(str(self.family), list(zoo.IMAGES))
            raise InputError(f"{self.family!r} is no family of models of images; {hint}")
        found: zoo.ValuesConfig = zoo.settings(
            self.family, {name: getattr(self, name) for name in zoo.fields(self.family)}
        )
        if not found.shape or not found.levels:
            raise InputError("shape and levels are missing; restore the file")
        return found


@dataclass
class DflowImageOutput(ModelOutput):
    """Mean cost in bits a dimension; of each datum in nats the bound, or the exact log-likelihood."""

    loss: Tensor | None = None
    elbo: Tensor | None = None
    log_prob: Tensor | None = None


class DflowImageModel(PreTrainedModel):
    """A model of integers (pixels, columns): its likelihood or, if dequantized, bounds of it; and draws."""

    config_class = DflowImageConfig
    base_model_prefix = "law"
    main_input_name = "pixel_values"
    config: DflowImageConfig

    def __init__(self, config: DflowImageConfig) -> None:
        """Build the model that ``config`` describes, with fresh weights."""
        super().__init__(config)
        settings = config.settings()
        # Masks and permutations are computed, not loaded; see `DflowModel`.
        with torch.device("cpu"):
            self.law = zoo.build_image(config.family, settings)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves; the default would undo it."""

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights; of the density's moments where all is in closed form."""
        return next(t.dtype for t in self._tensors() if t.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._tensors()).device

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.parameters()
        yield from self.buffers()

    @property
    def exact(self) -> bool:
        """Whether the likelihood is exact (integer, modular), or there are bounds of it (dequantized)."""
        return self.config.settings().exact

    @property
    def dequantized(self) -> Dequantized:
        """The model where it has bounds.

        Raises:
            InputError: its likelihood is exact.
        """
        if isinstance(self.law, Dequantized):
            return self.law
        raise InputError(
            f"a model of family {self.config.family!r} has an exact likelihood and no bounds; use log_prob"
        )

    @property
    def distribution(self) -> Distribution:
        """The model where its likelihood is exact.

        Raises:
            InputError: it has bounds.
        """
        if isinstance(self.law, Dequantized):
            raise InputError(
                f"a model of family {self.config.family!r} has bounds of its likelihood: use elbo, iwbo "
                "or, of few dimensions, exact_log_prob"
            )
        return self.law

    @property
    def dim(self) -> int:
        """Entries of one datum."""
        return self.config.settings().dim

    def forward(
        self, pixel_values: Tensor, generator: torch.Generator | None = None, **kwargs: Any
    ) -> DflowImageOutput:
        """The exact log-likelihood, differentiable; or the evidence lower bound, from one draw.

        Values as in `elbo`.
        """
        x = self.check(pixel_values)
        if self.exact:
            values = self.distribution.log_prob(x.to(self.dtype))
            loss = -values.mean() / (x.shape[1] * math.log(2))
            return DflowImageOutput(loss=loss, log_prob=values)
        values = self.dequantized.elbo(x, 1, generator).values
        return DflowImageOutput(
            loss=Estimate(values, "elbo", True).bits_per_dim(x.shape[1]).mean(), elbo=values
        )

    def log_prob(self, pixel_values: Tensor) -> Tensor:
        """Exact log-likelihood in nats ``(batch,)``, of a model that has one; values as in `elbo`.

        Of family integer it sums to 1 over all integers, not over the levels of the data.

        Raises:
            InputError: a dequantized model; weights that are not finite; values as in `elbo`.
        """
        x = self.check(pixel_values).long()
        try:
            return self.distribution.log_prob(x)
        except ValueError as error:
            raise InputError(str(error)) from None

    def elbo(self, pixel_values: Tensor, k: int = 1, generator: torch.Generator | None = None) -> Estimate:
        """``E_q[log p(v) - log q(v | x)]`` in nats, from ``k`` draws: a lower bound in expectation.

        ``pixel_values`` are integers ``(batch, C, H, W)`` or ``(batch, C*H*W)``.

        Raises:
            InputError: another shape, values outside the model's levels, or a model without bounds.
        """
        return self.dequantized.elbo(self.check(pixel_values), k, generator)

    def iwbo(self, pixel_values: Tensor, k: int, generator: torch.Generator | None = None) -> Estimate:
        """``E log 1/k sum_i p(v_i) / q(v_i | x)`` in nats: a lower bound in expectation."""
        return self.dequantized.iwbo(self.check(pixel_values), k, generator)

    def exact_log_prob(self, pixel_values: Tensor) -> Tensor:
        """Exact log-likelihood in nats, where the model has one.

        Raises:
            InputError: it has none.
        """
        if self.exact:
            return self.log_prob(pixel_values)
        x = self.check(pixel_values)
        try:
            return self.dequantized.exact_log_prob(x)
        except ValueError as error:
            raise InputError(str(error)) from None

    @torch.no_grad()
    def generate(self, num_return_sequences: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws ``(n, C, H, W)``; but on orthants one may lie outside the levels of the data."""
        if num_return_sequences < 1:
            raise InputError(f"cannot draw {num_return_sequences} samples; ask for 1 or more")
        x = self.law.sample(num_return_sequences, generator=generator)
        return x.view(len(x), *self.config.shape)

    @torch.no_grad()
    def round_trip(self, pixel_values: Tensor) -> bool:
        """Whether a flow of integers gives back every value from the latents of all its levels.

        Raises:
            InputError: a dequantized model; values as in `elbo`.
        """
        x = self.check(pixel_values).long()
        return torch.equal(_there_and_back(self.distribution, x), x)

    def check(self, x: Tensor) -> Tensor:
        """``x`` flat, ``(batch, dim)``, or an `InputError`."""
        return checked(x, self.config.settings())


def checked(x: Tensor, settings: zoo.ValuesConfig) -> Tensor:
    """``x`` flat, ``(batch, dim)``, if they are data that ``settings`` describe, or an `InputError`."""
    shape = tuple(settings.shape)
    if x.shape[1:] != shape and (x.ndim != 2 or x.shape[1] != settings.dim):
        raise InputError(f"data of shape {tuple(x.shape[1:])}; this model takes {shape}")
    x = x.reshape(len(x), -1)
    support = settings.support
    low, high = (
        torch.tensor([sign * torch.inf if r is None else r[i] for r in support], device=x.device)
        for i, sign in enumerate((-1, 1))
    )
    fits = (x >= low) & (x <= high)
    if x.is_floating_point():
        fits &= x.isfinite() & ((x == x.floor()) | low.isinf())
    if not fits.all():
        row, column = (~fits).nonzero()[0].tolist()
        found, known = x[row, column].item(), support[column]
        if known is None:
            raise InputError(f"value {found} of entry {column} is not finite")
        of = ", those of the data that this model was trained on" * (known == settings.ranges[column])
        raise InputError(f"value {found} of entry {column} is none of {known[0]}..{known[1]}{of}")
    return x


def _there_and_back(law: Distribution, x: Tensor) -> Tensor:
    if isinstance(law, Flow):
        z, _ = law.transform(x)
        return law.bijector.inverse(_there_and_back(law.base, z))[0]
    if isinstance(law, Split):
        (kept, _), (rest, _) = law.parts(x)
        back = x.new_empty(x.shape).index_copy(1, law.kept_index, _there_and_back(law.base, kept))
        return back.index_copy(1, law.rest_index, _there_and_back(law.conditional, rest))
    return x


AutoConfig.register("dflow-image", DflowImageConfig)
AutoModel.register(DflowImageConfig, DflowImageModel)
