"""Models of text as transformers models: loss, training, saving. Scores and draws are in `dflow.models`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.utils.generic import ModelOutput

from dflow.hf import training
from dflow.hf.arguments import IGNORED, answer, labels_optional, present_lengths, refuse_unknown, scaled
from dflow.hf.config import DflowConfig
from dflow.hf.pretrained import Pretrained
from dflow.hf.tokenizer import PIECES, VOCABULARY, size_of, tokenizer_of
from dflow.models.symbols import TextModel


@dataclass
class DflowOutput(ModelOutput):
    """Cost of a batch, and the log-likelihoods that it was computed from.

    Attributes:
        loss: in evaluation mode the exact mean negative log-likelihood in nats a symbol. In training mode the
            objective of the family's rule (`dflow.objectives.default_rule`) in nats a symbol: the same number
            where that rule is "likelihood". It has a gradient for every parameter in any family.
        log_prob: exact log-likelihood of each sequence in nats, ``(batch,)``; None in training mode under
            another rule than "likelihood".
    """

    loss: Tensor | None = None
    log_prob: Tensor | None = None


class DflowModel(TextModel, Pretrained):
    """A distribution over sequences of symbols, exact in both directions: `log_prob` and `generate`."""

    config_class = DflowConfig
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "DflowModel",
        "AutoModelForCausalLM": "DflowForCausalLM",
    }
    base_model_prefix = "distribution"
    main_input_name = "input_ids"
    config: DflowConfig

    def __init__(self, config: DflowConfig) -> None:
        """Build the model that ``config`` describes, with fresh weights."""
        Pretrained.__init__(self, config)
        self._build()
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def calls_to_draw(self) -> int | None:
        """The same as `num_calls`, for the card of the model."""
        return self.num_calls

    def _save_beside(self, temporary: Path, folder: Path) -> None:
        """The tokenizer of transformers too, where the vocabulary is known or in the folder already."""
        super()._save_beside(temporary, folder)
        files = {
            name: self.companions.get(name)
            or ((folder / name).read_bytes() if (folder / name).is_file() else None)
            for name in (VOCABULARY, PIECES)
        }
        vocabulary = files[VOCABULARY]
        # The one in the folder may be that of another model, which has not been replaced yet.
        if vocabulary is not None and size_of(vocabulary) == self.config.vocab_size:
            longest = None if getattr(self.config, "context", 0) else self.config.length
            tokenizer_of(vocabulary, files[PIECES], longest).save_pretrained(temporary)

    @labels_optional
    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> DflowOutput | tuple[Any, ...]:
        """Loss and log-likelihood as a `DflowOutput`; in training mode a base in closed form is updated.

        Args:
            input_ids: symbols, int64 ``(batch, n)``.
            lengths: int64 ``(batch,)``, how many symbols of each sequence are present; None: all.
            attention_mask: ``(batch, n)``, the same in another form: ones, then zeros.
            labels: ``(batch, n)``, the symbols themselves, with -100 for those that are not present. They are
                not shifted, and may be left out.
            return_loss: whether to return a loss.
            return_dict: False for a tuple.
            num_items_in_batch: how many labels the batches of one step have together, of which the loss is
                then this batch's share.
            kwargs: refused.

        Raises:
            InputError: an unknown argument, or arguments that contradict each other; a mask or labels that
                are no prefix of each row; and the errors of `log_prob`.
        """
        refuse_unknown(kwargs, self.forward)
        self.check_trains()
        lengths = present_lengths(input_ids, lengths, attention_mask, labels)
        if self.training and not training.trained_by_likelihood(self.law):
            log_prob, nats = None, self._objective(input_ids, lengths)
        else:
            log_prob = self.log_prob(input_ids, lengths)
            nats = -log_prob.sum()
            if nats.requires_grad and not training.reached(self.law):
                nats = training.evaluated(nats)
        if self.training and torch.is_grad_enabled() and self.config.explicit_length:
            _, present = self._whole(input_ids, lengths)
            if present is not None:
                self.length_counts.index_add_(0, present, torch.ones_like(present).to(self.length_counts))
        entries = input_ids.numel() if lengths is None else int(lengths.sum())
        # With a law of lengths the end of a sequence counts as a symbol.
        loss = nats / (entries + len(input_ids) * self.config.explicit_length)
        scored = entries if labels is None else (labels != IGNORED).sum()
        loss = scaled(loss, scored, num_items_in_batch)
        output = DflowOutput(loss=loss if return_loss else None, log_prob=log_prob)
        return answer(output, return_dict, self.config)

    def _objective(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Loss in nats, summed over the batch, by the family's rule."""
        x, context = self._whole(input_ids, lengths)
        loss = training.loss_of_symbols(self.law, x, context)
        if context is None or not self.config.explicit_length:
            return loss
        return loss - self._length_log_prob()[context].sum()


AutoModel.register(DflowConfig, DflowModel)
