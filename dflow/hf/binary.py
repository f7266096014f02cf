"""Classifiers of images as transformers models. Thin: the network is in `zoo`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from dflow import zoo
from dflow.hf.config import DflowClassifierConfig
from dflow.hf.images import checked
from dflow.nn.binary import Head


class DflowClassifier(PreTrainedModel):
    """Labels of images of integers; in evaluation a probabilistic network propagates its law."""

    config_class = DflowClassifierConfig
    base_model_prefix = "net"
    main_input_name = "pixel_values"
    config: DflowClassifierConfig

    def __init__(self, config: DflowClassifierConfig) -> None:
        """Build the network that ``config`` describes, with fresh weights."""
        super().__init__(config)
        settings = config.settings()
        # Masks and averages are computed, not loaded; see `DflowModel`.
        with torch.device("cpu"):
            self.net = zoo.build_classifier(config.family, settings)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves; the default would undo it."""

    @property
    def dim(self) -> int:
        """Pixels of one image."""
        pixels: int = self.config.settings().dim
        return pixels

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits of the classes; with labels the mean loss of the model's head, in nats.

        ``pixel_values`` are integers ``(batch, C, H, W)`` or ``(batch, C*H*W)``.

        Raises:
            InputError: another shape, or values outside the model's levels.
        """
        logits = self.net(self._given(pixel_values))
        head = self.net[-1]
        if labels is None or not isinstance(head, Head):
            return ImageClassifierOutput(logits=logits)
        return ImageClassifierOutput(loss=head.loss(logits, labels) / len(labels), logits=logits)

    def log_prob(self, pixel_values: Tensor) -> Tensor:
        """Log-probabilities in nats ``(batch, classes)``; values as in `forward`."""
        logits: Tensor = self.net(self._given(pixel_values))
        return logits.log_softmax(1)

    def binarized(
        self, images: Tensor, rule: zoo.Rule = "map", generator: torch.Generator | None = None
    ) -> nn.Sequential:
        """The network of given weights on {-1, +1}, normalised anew on ``images``; see `to_deterministic`.

        Raises:
            InputError: a network of floats; values as in `forward`.
        """
        return zoo.to_deterministic(self.net, self._given(images).split(_BATCH), rule, generator)

    def _given(self, x: Tensor) -> Tensor:
        """`check`, in the precision of the weights."""
        return self.check(x).to(self.dtype)

    def check(self, x: Tensor) -> Tensor:
        """``x`` flat, ``(batch, dim)``, or an `InputError`."""
        return checked(x, self.config.settings())


#: Images that are re-estimated on at a time.
_BATCH = 256

AutoModel.register(DflowClassifierConfig, DflowClassifier)
AutoModelForImageClassification.register(DflowClassifierConfig, DflowClassifier)
