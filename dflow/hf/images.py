"""Models of images and tables as transformers models. Thin: the model is in `zoo`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils.generic import ModelOutput

from dflow import zoo
from dflow.config import InputError
from dflow.core import Distribution
from dflow.dequantize import Dequantized, Estimate
from dflow.hf import training
from dflow.hf.arguments import answer, refuse_unknown
from dflow.hf.config import DflowImageConfig
from dflow.hf.pretrained import Pretrained


@dataclass
class DflowImageOutput(ModelOutput):
    """Cost of a batch in bits a dimension, and what it was made from.

    Attributes:
        loss: mean cost: the exact one, or minus the bound. Of family modular in training mode the objective
            of its rule (`dflow.objectives.default_rule`), which reaches every parameter.
        elbo: the bound of each datum in nats, ``(batch,)``, of a dequantized model.
        log_prob: exact log-likelihood of each datum in nats, ``(batch,)``, of a model that has one; None of
            family modular in training mode.
    """

    loss: Tensor | None = None
    elbo: Tensor | None = None
    log_prob: Tensor | None = None


class DflowImageModel(Pretrained):
    """A model of integers (pixels, columns): its likelihood or, if dequantized, bounds of it; and draws."""

    config_class = DflowImageConfig
    base_model_prefix = "law"
    main_input_name = "pixel_values"
    config: DflowImageConfig

    def __init__(self, config: DflowImageConfig) -> None:
        """Build the model that ``config`` describes, with fresh weights."""
        super().__init__(config)
        self._settings = settings = config.settings()
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
        return self.config.record.exact

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
        return self._settings.dim

    def forward(
        self,
        pixel_values: Tensor,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DflowImageOutput | tuple[Any, ...]:
        """Cost as `DflowImageOutput` tells it; while it trains, what has a closed form moves.

        Args:
            pixel_values: values as in `elbo`.
            generator: of the draw that a bound is made from.
            return_loss: whether there is a loss to tell.
            return_dict: False for a tuple.
            kwargs: none.

        Raises:
            InputError: an argument that is none of these; values as in `elbo`.
        """
        way = " (a model of images has no labels; leave out the column 'label')" if "labels" in kwargs else ""
        refuse_unknown(kwargs, self.forward, way)
        x = self.check(pixel_values)
        output = DflowImageOutput()
        if isinstance(self.law, Dequantized):
            if self.training:
                output.elbo = values = training.elbo_of_values(self.law, x, generator)
            else:
                output.elbo = values = self.law.elbo(x, 1, generator).values
            nats = -values.mean()
        elif not self._symbols:
            # On floats, so that rounding has its straight-through gradient.
            output.log_prob = values = self.law.log_prob(x.to(self.dtype))
            nats = -values.mean()
        elif self.training:
            nats = training.loss_of_symbols(self.law, x.long()) / len(x)
        else:
            output.log_prob = values = self.law.log_prob(x.long())
            nats = -values.mean()
            nats = training.evaluated(nats) if nats.requires_grad else nats
        if return_loss:
            output.loss = nats / (x.shape[1] * math.log(2))
        return answer(output, return_dict, self.config)

    @property
    def _symbols(self) -> bool:
        """Whether entries are symbols of Z/K (modular), whose floats are one-hot rows."""
        return zoo.MAPS[0] in (self.config.record.rules or ())

    def initialize(self, pixel_values: Tensor) -> None:
        """Start from data, as `dflow train` does: scales of layers, and what has a closed form.

        A model that is trained by `forward` without it starts what has a closed form from its first batch.

        Args:
            pixel_values: values as in `elbo`, many rows.

        Raises:
            InputError: fewer rows than a full covariance needs; values as in `elbo`.
        """
        training.initialize(self.law, self.check(pixel_values))

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
    def round_trip(self, pixel_values: Tensor) -> bool | None:
        """Whether a law of integers draws what it scores: a flow gives back every value from its latents.

        None where some part of the law offers no check.

        Raises:
            InputError: a dequantized model; values as in `elbo`.
        """
        return self.distribution.round_trip(self.check(pixel_values).long())

    def check(self, x: Tensor) -> Tensor:
        """``x`` flat, ``(batch, dim)``, or an `InputError`."""
        return checked(x, self._settings)


def checked(x: Tensor, settings: zoo.ValuesConfig) -> Tensor:
    """``x`` flat, ``(batch, dim)``, if they are data that ``settings`` describe, or an `InputError`."""
    shape = tuple(settings.shape)
    if x.shape[1:] != shape and (x.ndim != 2 or x.shape[1] != settings.dim):
        raise InputError(f"data of shape {tuple(x.shape[1:])}; this model takes {shape}")
    x = x.reshape(len(x), -1)
    support = settings.support
    several = support if len(settings.levels) > 1 else support[:1]
    # Entries of one range, as of all images, need one number each.
    low, high = (
        torch.tensor([sign * torch.inf if r is None else r[i] for r in several], device=x.device)
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


AutoModel.register(DflowImageConfig, DflowImageModel)
