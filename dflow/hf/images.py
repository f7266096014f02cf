"""Models of images and tables as transformers models. Thin: the model is in `zoo`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
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
    """Cost of a batch in bits a dimension, and the values that it was computed from.

    Attributes:
        loss: mean cost, exact or minus the bound. For family modular in training mode the objective of its
            rule (`dflow.objectives.default_rule`), which has a gradient for every parameter.
        elbo: the bound of each datum in nats, ``(batch,)``, for a dequantized model.
        log_prob: exact log-likelihood of each datum in nats, ``(batch,)``, for a model that has one; None for
            family modular in training mode.
    """

    loss: Tensor | None = None
    elbo: Tensor | None = None
    log_prob: Tensor | None = None


class ValuesModel(Pretrained):
    """Base class of models that take images or rows of a table."""

    main_input_name = "pixel_values"
    _settings: zoo.ValuesConfig

    @property
    def dim(self) -> int:
        """Entries of one datum."""
        return self._settings.dim

    def check(self, x: Tensor) -> Tensor:
        """``x`` flat, ``(batch, dim)``, if its shape and values fit the settings; else an `InputError`."""
        settings = self._settings
        shape = tuple(settings.shape)
        if x.shape[1:] != shape and (x.ndim != 2 or x.shape[1] != settings.dim):
            raise InputError(f"data of shape {tuple(x.shape[1:])}; this model takes {shape}")
        x = x.flatten(1)
        support = settings.support
        ranges = support if len(settings.levels) > 1 else support[:1]
        # One number is enough where all entries have the same range, as in images.
        low, high = (
            torch.tensor([sign * torch.inf if r is None else r[i] for r in ranges], device=x.device)
            for i, sign in enumerate((-1, 1))
        )
        fits = (x >= low) & (x <= high)
        if x.is_floating_point():
            fits &= x.isfinite() & ((x == x.floor()) | low.isinf())
        if not fits.all():
            row, column = (~fits).nonzero()[0].tolist()
            value, allowed = x[row, column].item(), support[column]
            if allowed is None:
                raise InputError(f"value {value} of entry {column} is not finite")
            origin = ", the range of the training data" * (allowed == settings.ranges[column])
            raise InputError(
                f"value {value} of entry {column} is no integer in {allowed[0]}..{allowed[1]}{origin}"
            )
        return x


class DflowImageModel(ValuesModel):
    """A model of integers (pixels, columns): exact likelihoods or, if dequantized, bounds; and draws."""

    config_class = DflowImageConfig
    auto_classes: ClassVar[dict[str, str]] = {"AutoModel": "DflowImageModel"}
    base_model_prefix = "law"
    config: DflowImageConfig

    def __init__(self, config: DflowImageConfig) -> None:
        """Build the model that ``config`` describes, with fresh weights."""
        super().__init__(config)
        self._settings = config.settings()
        # Masks and permutations are computed, not loaded; see `DflowModel`.
        with torch.device("cpu"):
            self.law = zoo.build_image(config.family, self._settings)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, or of the density's moments where everything has a closed form."""
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
        """Whether the model has an exact likelihood (integer, modular), or bounds only (dequantized)."""
        return self.config.record.exact

    @property
    def dequantized(self) -> Dequantized:
        """The law of a model with bounds.

        Raises:
            InputError: the model has an exact likelihood.
        """
        if isinstance(self.law, Dequantized):
            return self.law
        raise InputError(
            f"a model of family {self.config.family!r} has an exact likelihood and no bounds; use log_prob"
        )

    @property
    def distribution(self) -> Distribution:
        """The law of a model with an exact likelihood.

        Raises:
            InputError: the model has bounds.
        """
        if isinstance(self.law, Distribution):
            return self.law
        raise InputError(
            f"a model of family {self.config.family!r} has bounds of its likelihood: use elbo, iwbo or, for "
            "few dimensions, exact_log_prob"
        )

    def forward(
        self,
        pixel_values: Tensor,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DflowImageOutput | tuple[Any, ...]:
        """Cost as a `DflowImageOutput`; in training mode parts in closed form are updated.

        Args:
            pixel_values: values as in `elbo`.
            generator: source of the draw for a bound.
            return_loss: whether to return a loss.
            return_dict: False for a tuple.
            kwargs: refused.

        Raises:
            InputError: an unknown argument; values as in `elbo`.
        """
        way = " (a model of images has no labels; leave out the column 'label')" if "labels" in kwargs else ""
        refuse_unknown(kwargs, self.forward, way)
        self.check_trains()
        x = self.check(pixel_values)
        output = DflowImageOutput()
        if not self.exact:
            law = self.dequantized
            elbo = (
                training.elbo_of_values(law, x, generator)
                if self.training
                else law.elbo(x, 1, generator).values
            )
            output.elbo, nats = elbo, -elbo.mean()
        elif self.training and self._symbols:
            nats = training.loss_of_symbols(self.distribution, x.long()) / len(x)
        else:
            # For floats that hold integers, rounding has its straight-through gradient.
            values = x.long() if self._symbols else x.to(torch.promote_types(self.dtype, torch.float32))
            output.log_prob = log_prob = self.distribution.log_prob(values)
            nats = -log_prob.mean()
            if self._symbols and nats.requires_grad:
                nats = training.evaluated(nats)
        if return_loss:
            output.loss = nats / (x.shape[1] * math.log(2))
        return answer(output, return_dict, self.config)

    @property
    def _symbols(self) -> bool:
        """Whether entries are symbols of Z/K (modular), whose floats are one-hot rows."""
        return zoo.MAPS[0] in (self.config.record.rules or ())

    def initialize(self, pixel_values: Tensor) -> None:
        """Initialise scales of layers and parts in closed form from data, as `dflow train` does.

        Without this call the first batch in training mode initialises the parts in closed form.

        Args:
            pixel_values: values as in `elbo`, many rows.

        Raises:
            InputError: fewer rows than a full covariance needs; values as in `elbo`.
        """
        training.initialize(self.law, self.check(pixel_values))

    def log_prob(self, pixel_values: Tensor) -> Tensor:
        """Exact log-likelihood in nats ``(batch,)``, for a model that has one; values as in `elbo`.

        For family integer probabilities sum to 1 over all integers, not over the levels of the data.

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
        """Exact log-likelihood in nats; for a dequantized model where it can be computed.

        Raises:
            InputError: it cannot.
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
        """Exact draws ``(n, C, H, W)``; except on orthants, values may lie outside the levels of the data."""
        if num_return_sequences < 1:
            raise InputError(f"cannot draw {num_return_sequences} samples; ask for 1 or more")
        x = self.law.sample(num_return_sequences, generator=generator)
        return x.view(len(x), *self.config.shape)

    @torch.no_grad()
    def round_trip(self, pixel_values: Tensor) -> bool | None:
        """Whether scoring and drawing agree: a flow of integers recovers every value from its latent.

        None where some part of the law offers no check.

        Raises:
            InputError: a dequantized model; values as in `elbo`.
        """
        return self.distribution.round_trip(self.check(pixel_values).long())


AutoModel.register(DflowImageConfig, DflowImageModel)
