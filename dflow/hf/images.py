"""Models of images and tables as transformers models. Thin: the model is in `zoo`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from dflow import zoo
from dflow.config import InputError, nearest
from dflow.dequantize import Estimate


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

    def settings(self) -> zoo.DequantizedConfig:
        """The family's settings, checked."""
        if self.family not in zoo.IMAGES:
            hint = nearest(str(self.family), list(zoo.IMAGES))
            raise InputError(f"{self.family!r} is no family of models of images; {hint}")
        found: zoo.DequantizedConfig = zoo.settings(
            self.family, {name: getattr(self, name) for name in zoo.fields(self.family)}
        )
        if not found.shape or not found.levels:
            raise InputError("shape and levels are missing; restore the file")
        return found


@dataclass
class DflowImageOutput(ModelOutput):
    """Mean of minus the bound in bits a dimension, and the bound of each datum in nats."""

    loss: Tensor | None = None
    elbo: Tensor | None = None


class DflowImageModel(PreTrainedModel):
    """A model of integers (pixels, columns): bounds of its likelihood, the likelihood of some, and draws."""

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
    def dim(self) -> int:
        """Entries of one datum."""
        return self.config.settings().dim

    def forward(
        self, pixel_values: Tensor, generator: torch.Generator | None = None, **kwargs: Any
    ) -> DflowImageOutput:
        """The evidence lower bound, from one draw; values as in `elbo`."""
        x = self.check(pixel_values)
        values = self.law.elbo(x, 1, generator).values
        return DflowImageOutput(
            loss=Estimate(values, "elbo", True).bits_per_dim(x.shape[1]).mean(), elbo=values
        )

    def elbo(self, pixel_values: Tensor, k: int = 1, generator: torch.Generator | None = None) -> Estimate:
        """``E_q[log p(v) - log q(v | x)]`` in nats, from ``k`` draws: a lower bound in expectation.

        ``pixel_values`` are integers ``(batch, C, H, W)`` or ``(batch, C*H*W)``.

        Raises:
            InputError: another shape, or values outside the model's levels.
        """
        return self.law.elbo(self.check(pixel_values), k, generator)

    def iwbo(self, pixel_values: Tensor, k: int, generator: torch.Generator | None = None) -> Estimate:
        """``E log 1/k sum_i p(v_i) / q(v_i | x)`` in nats: a lower bound in expectation."""
        return self.law.iwbo(self.check(pixel_values), k, generator)

    def exact_log_prob(self, pixel_values: Tensor) -> Tensor:
        """Exact log-likelihood in nats, where the model has one.

        Raises:
            InputError: it has none.
        """
        x = self.check(pixel_values)
        try:
            return self.law.exact_log_prob(x)
        except ValueError as error:
            raise InputError(str(error)) from None

    @torch.no_grad()
    def generate(self, num_return_sequences: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws ``(n, C, H, W)``; on hypercubes one may lie outside the levels of the data."""
        if num_return_sequences < 1:
            raise InputError(f"cannot draw {num_return_sequences} samples; ask for 1 or more")
        x = self.law.sample(num_return_sequences, generator)
        return x.view(len(x), *self.config.shape)

    def check(self, x: Tensor) -> Tensor:
        """``x`` flat, ``(batch, dim)``, or an `InputError`."""
        shape = tuple(self.config.shape)
        if x.shape[1:] != shape and (x.ndim != 2 or x.shape[1] != self.dim):
            raise InputError(f"data of shape {tuple(x.shape[1:])}; this model takes {shape}")
        x = x.reshape(len(x), -1)
        ranges = self.config.settings().ranges
        low, high = (
            torch.tensor([sign * torch.inf if r is None else r[i] for r in ranges], device=x.device)
            for i, sign in enumerate((-1, 1))
        )
        fits = (x >= low) & (x <= high)
        if x.is_floating_point():
            fits &= x.isfinite() & ((x == x.floor()) | low.isinf())
        if not fits.all():
            row, column = (~fits).nonzero()[0].tolist()
            found, known = x[row, column].item(), ranges[column]
            if known is None:
                raise InputError(f"value {found} of entry {column} is not finite")
            raise InputError(
                f"value {found} of entry {column} is none of {known[0]}..{known[1]}, those of the data that "
                "this model was trained on"
            )
        return x


AutoConfig.register("dflow-image", DflowImageConfig)
AutoModel.register(DflowImageConfig, DflowImageModel)
