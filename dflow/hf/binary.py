"""Classifiers of images as transformers models. Thin: the network is in `zoo`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from dflow import zoo
from dflow.config import InputError
from dflow.hf.arguments import answer, refuse_unknown, scaled
from dflow.hf.config import DflowClassifierConfig
from dflow.hf.images import ValuesModel
from dflow.nn.classifier import head_of


class DflowClassifier(ValuesModel):
    """Labels of images of integers; in evaluation a probabilistic network propagates its law."""

    config_class = DflowClassifierConfig
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "DflowClassifier",
        "AutoModelForImageClassification": "DflowClassifier",
    }
    base_model_prefix = "net"
    config: DflowClassifierConfig

    def __init__(self, config: DflowClassifierConfig) -> None:
        """Build the network that ``config`` describes, with fresh weights."""
        super().__init__(config)
        self._settings = config.settings()
        # Masks and averages are computed, not loaded; see `DflowModel`.
        with torch.device("cpu"):
            self.net = zoo.build_classifier(config.family, self._settings)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Logits of the classes; with labels the mean loss of the model's head, in nats.

        Args:
            pixel_values: integers ``(batch, C, H, W)`` or ``(batch, C*H*W)``.
            labels: int64 ``(batch,)``.
            return_dict: False for a tuple.
            num_items_in_batch: number of labels in all batches of one step; the loss is then the share of
                this batch in their mean.
            kwargs: refused.

        Raises:
            InputError: an unknown argument; another shape, or values outside the model's levels; labels
                outside the classes.
        """
        refuse_unknown(kwargs, self.forward)
        self.check_trains()
        logits: Tensor = self.net(self._as_weights(pixel_values))
        output = ImageClassifierOutput(logits=logits)
        if labels is not None:
            self._check_labels(pixel_values, labels)
            loss = head_of(self.net).loss(logits, labels) / len(labels)
            output.loss = scaled(loss, len(labels), num_items_in_batch)
        return answer(output, return_dict, self.config)

    def _check_labels(self, x: Tensor, labels: Tensor) -> None:
        classes: int = self.config.settings().classes
        if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
            raise InputError(
                f"labels are int64 ({len(x)},), one for each image, found {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
        low, high = (int(v) for v in labels.aminmax()) if labels.numel() else (0, 0)
        if low < 0 or high >= classes:
            raise InputError(
                f"label {high if high >= classes else low} is not one of the classes 0..{classes - 1}"
            )

    def log_prob(self, pixel_values: Tensor) -> Tensor:
        """Log-probabilities in nats ``(batch, classes)``; values as in `forward`."""
        logits: Tensor = self.net(self._as_weights(pixel_values))
        return logits.log_softmax(1)

    def binarized(
        self, images: Tensor, rule: zoo.Rule = "map", generator: torch.Generator | None = None
    ) -> nn.Sequential:
        """The network with fixed weights on {-1, +1}, normalised anew on ``images``; see `to_deterministic`.

        Raises:
            InputError: a network of floats; values as in `forward`.
        """
        return zoo.to_deterministic(self.net, self._as_weights(images).split(_BATCH), rule, generator)

    def _as_weights(self, x: Tensor) -> Tensor:
        """`check`, in the precision of the weights, at least float32."""
        return self.check(x).to(torch.promote_types(self.dtype, torch.float32))


#: Images in a batch for the re-estimated normalisation.
_BATCH = 256

AutoModel.register(DflowClassifierConfig, DflowClassifier)
AutoModelForImageClassification.register(DflowClassifierConfig, DflowClassifier)
