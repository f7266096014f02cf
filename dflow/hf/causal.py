"""Models of text as `AutoModelForCausalLM` of transformers has them: logits, losses, draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import ModelOutput

from dflow.config import InputError
from dflow.core import Context, Known
from dflow.distributions import SequenceCategorical
from dflow.hf.arguments import IGNORED, answer, refuse_unknown
from dflow.hf.config import DflowConfig
from dflow.hf.generation import Wanted, default_config, ended, prompts_of, wanted
from dflow.hf.text import DflowModel, DflowOutput
from dflow.ops.noise import Likeliest, Noise


@dataclass
class DflowCausalOutput(ModelOutput):
    """What a model of text says of a batch, as models of transformers say it.

    Attributes:
        loss: with labels. Of a model with logits the mean of ``-log p(next symbol)`` in nats over the labels
            from the second on; of any other what `DflowOutput` says: in evaluation mode the exact mean in
            nats over all symbols, in training mode the objective of its family.
        logits: ``(batch, n, K)``: those at place i are of the symbol at i + 1, given the symbols up to i.
            None for a family whose law has no such terms.
        log_prob: of a model without logits, exact nats of each sequence, ``(batch,)``, as in `DflowOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    log_prob: Tensor | None = None


#: Arguments that models of transformers take and this one does not have, and why.
_NOT_GIVEN = {
    "output_hidden_states": "its features differ by family and are no part of what it says",
    "output_attentions": "its attention differs by family and is no part of what it says",
    "past_key_values": "it keeps no cache between calls; generate has its own",
    "use_cache": "it keeps no cache between calls; generate has its own",
    "inputs_embeds": "its law is one of symbols; give input_ids",
    "position_ids": "a position is the number of symbols before it; give an attention_mask",
}


class DflowForCausalLM(DflowModel, GenerationMixin):
    """A model of text whose `forward` and `generate` take and mean what those of transformers do.

    It has the weights, the scores (`log_prob`) and the samples of `DflowModel`. What a family cannot say or
    draw exactly is refused, with what there is instead.
    """

    def __init__(self, config: DflowConfig) -> None:
        """Build the model that ``config`` describes, with fresh weights."""
        super().__init__(config)
        self.generation_config = self._default_generation()
        if not self.has_logits:
            # Trainer counts the labels that a loss is a mean over: here all, elsewhere all but the first.
            self.loss_type = None  # type: ignore[assignment]

    def adjust_generation_fn(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> None:
        """Read the generation config of a folder, where it has one; without it draws are exact."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)  # type: ignore[misc]
        if generation_config is None:
            loaded = self.generation_config.to_diff_dict()
            self.generation_config = self._default_generation()
            known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
            # A folder without such a file gives the settings of the model here, which do not belong.
            self.generation_config.update(**{k: v for k, v in loaded.items() if k in known})

    def _default_generation(self) -> GenerationConfig:
        return default_config(None if getattr(self.config, "context", 0) else self.config.length)

    @property
    def has_logits(self) -> bool:
        """Whether one network call gives the laws of all symbols, each given those before it."""
        law = self.distribution
        return self.config.record.left_to_right and isinstance(law, SequenceCategorical) and law.lay is None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> DflowCausalOutput | tuple[Any, ...]:
        """Logits of the next symbols, and the loss for labels; see `DflowCausalOutput`.

        Args:
            input_ids: symbols, int64 ``(batch, n)``.
            attention_mask: ``(batch, n)``, 1 for symbols that are present, and 0 for what fills up the batch,
                at either end.
            labels: ``(batch, n)``, not shifted, with -100 for those that are not scored. Of a family without
                logits they are the symbols themselves, with -100 where the mask is 0.
            return_dict: False for a tuple.
            num_items_in_batch: how many labels the batches of one step have together, of which the loss is
                then this batch's share.
            logits_to_keep: only those of the last so many places, or of these places; 0 for all.
            kwargs: refused, but for what asks for nothing.

        Raises:
            InputError: an argument that is unknown or cannot be given; symbols, labels or lengths that the
                model cannot score.
        """
        for name in set(kwargs) & set(_NOT_GIVEN):
            if kwargs.pop(name) not in (None, False):
                raise InputError(f"forward gives no {name} for a model of dflow: {_NOT_GIVEN[name]}")
        refuse_unknown(kwargs, self.forward)
        x, mask = self._aligned(input_ids, attention_mask)
        if not self.has_logits:
            lengths = None if mask is None else mask.sum(1)
            if labels is not None and mask is not None:
                labels = _first(labels, mask).masked_fill(~_first(mask, mask), IGNORED)
            output = super().forward(
                x, lengths, labels=labels, num_items_in_batch=num_items_in_batch, return_dict=True
            )
            assert isinstance(output, DflowOutput)
            loss = None if labels is None else output.loss
            return answer(DflowCausalOutput(loss=loss, log_prob=output.log_prob), return_dict, self.config)
        self.check_trains()
        laws = self._next_symbols(x)
        if mask is None:
            logits = laws[:, 1:].contiguous()
        else:
            # What fills up a row before its first symbol is given nothing; behind its last it is given all.
            logits = laws.gather(1, mask.cumsum(1)[..., None].expand(-1, -1, laws.shape[2]))
        loss = None
        if labels is not None:
            self._check_labels(labels, input_ids)
            size = self.config.vocab_size
            loss = self.loss_function(logits, labels, size, num_items_in_batch=num_items_in_batch)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return answer(DflowCausalOutput(loss=loss, logits=logits[:, keep]), return_dict, self.config)

    def _aligned(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The symbols, those that are present first, and the mask, bool; no mask where all are present."""
        if attention_mask is None:
            return input_ids, None
        if attention_mask.shape != input_ids.shape:
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, the symbols "
                f"{tuple(input_ids.shape)}; give a 1 for each symbol that is present, and a 0 for others"
            )
        mask = attention_mask != 0
        if bool(mask.all()):
            return input_ids, None
        if not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise InputError(f"attention_mask: no symbol of row {row} is present; leave the row out")
        return _first(input_ids.masked_fill(~mask, 0), mask), mask

    def _next_symbols(self, x: Tensor) -> Tensor:
        """Logits of each symbol given those before, ``(batch, n + 1, K)``, and of one behind all.

        A sequence may be as long as the model and its context.
        """
        law, n = self.law, x.shape[1]
        assert isinstance(law, SequenceCategorical)
        longest = self.config.length + getattr(self.config, "context", 0)
        if n > longest:
            raise InputError(f"sequence of {n} symbols; this model gives logits of at most {longest}")
        self._check(x, None, complete=False)
        return law.next_logits(x)

    def _check_labels(self, labels: Tensor, input_ids: Tensor) -> None:
        """Refuse labels that are no symbols."""
        if labels.shape != input_ids.shape:
            raise InputError(
                f"labels have shape {tuple(labels.shape)}, the symbols {tuple(input_ids.shape)}; give labels "
                f"that are not shifted, with {IGNORED} for those that are not scored"
            )
        wrong = (labels != IGNORED) & ((labels < 0) | (labels >= self.config.vocab_size))
        if bool(wrong.any()):
            raise InputError(
                f"label {int(labels[wrong][0])} is no symbol of 0..{self.config.vocab_size - 1}; give "
                f"{IGNORED} for what fills up a batch"
            )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Draws that continue prompts, int64 ``(batch * num_return_sequences, n + new)``.

        By default they are exact, from the law as it is (``do_sample=True, temperature=1, top_k=0``), up to
        the model's length. ``torch.manual_seed``, as `transformers.set_seed` calls it, fixes them. Symbols
        are drawn by `DflowModel.generate`.

        Args:
            inputs: the prompts, int64 ``(batch, n)``; None for one draw without a prompt.
            generation_config: arguments in place of the model's.
            input_ids: the prompts, under their other name.
            attention_mask: ``(batch, n)``, 0 for what fills up shorter prompts, on the left.
            kwargs: max_new_tokens, max_length, do_sample, temperature, top_k, top_p, min_p,
                num_return_sequences, eos_token_id, pad_token_id; others are refused.

        Raises:
            InputError: an argument that dflow does not have; prompts or lengths that the model cannot draw;
                the likeliest symbols (``do_sample=False``) of a model that draws several at once.
        """
        if inputs is not None and input_ids is not None:
            raise InputError("generate: inputs and input_ids are both the prompts; give one of them")
        prompts_given = inputs if input_ids is None else input_ids
        config = {} if generation_config is None else generation_config.to_diff_dict()
        values = self.generation_config.to_diff_dict() | config | kwargs
        if "max_length" in config | kwargs and "max_new_tokens" not in config | kwargs:
            values["max_new_tokens"] = None
        call = wanted(values, self.config.vocab_size)
        self._check_greedy(call)
        prompts = prompts_of(prompts_given, attention_mask)
        width = 0 if prompts_given is None else prompts_given.shape[1]
        seed = Noise.of(None, 1, self.device).seed
        numbers = torch.arange(len(prompts) * call.each, device=self.device).view(-1, call.each)
        # What is drawn together: prompts of one length, or the same prompt.
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            key = (len(prompt),) if self._takes_known else tuple(prompt.tolist())
            alike.setdefault(key, []).append(row)
        parts = []
        for rows in alike.values():
            several = torch.stack([prompts[row] for row in rows]).repeat_interleave(call.each, 0)
            noise = Noise(seed, numbers[rows].flatten(), None, call.controls)
            parts.append(self._continued(several.to(self.device), width, call, noise))
        # Sequences that end before others are filled up behind.
        longest = max(part.shape[1] for part in parts)
        drawn = torch.cat([nn.functional.pad(part, (0, longest - part.shape[1]), value=-1) for part in parts])
        drawn = drawn[torch.cat([numbers[rows].flatten() for rows in alike.values()]).argsort()]
        drawn = drawn.masked_fill(drawn < 0, call.pad)
        if prompts_given is not None:
            drawn[:, :width] = prompts_given.to(drawn).repeat_interleave(call.each, 0)
        return drawn

    def _check_greedy(self, call: Wanted) -> None:
        """Refuse the likeliest symbols of a law that has none in transformers' sense."""
        if call.sample or (self.config.record.left_to_right and not self.config.explicit_length):
            return
        if self.config.explicit_length:
            why = "this model draws the length of a text first, which has no likeliest symbol"
        else:
            why = (
                f"a {self.config.family} model does not draw one symbol after another, each given those "
                "before, so that no symbol is the likeliest next one"
            )
        raise InputError(f"generate: do_sample=False is not available: {why}; draw with do_sample=True")

    @property
    def _takes_known(self) -> bool:
        """Whether each sample can have a prompt of its own: the law takes it as known, which is exact."""
        return self.documents is not None or (self.has_logits and not self.config.explicit_length)

    def _continued(self, prompts: Tensor, width: int, call: Wanted, noise: Noise) -> Tensor:
        """Draws that continue prompts ``(n, m)``, which are alike unless the law takes known symbols.

        Returns:
            int64 ``(n, width + new)``, -1 for the padding and behind an end.
        """
        config, (n, before) = self.config, prompts.shape
        new = call.new
        if new is None and call.total is not None:
            new = call.total - width
            if new < 1:
                raise InputError(
                    f"generate: max_length {call.total} leaves no symbol to draw behind prompts of {width}; "
                    "raise it, or give max_new_tokens"
                )
        if new is None:
            new = config.length if self.documents is not None else config.length - before
        if not call.sample:
            noise = Likeliest(0, noise.samples)
        elif noise.controls is not None and noise.controls.exact:
            noise = Noise(noise.seed, noise.samples)
        length = before + new
        if self.documents is None and length > config.length and not config.explicit_length:
            raise InputError(
                f"generate: {before} symbols of the prompt and {new} new ones are {length}, and this model "
                f"draws {config.length} at most; lower max_new_tokens, or train with a model.context, which "
                "has no such limit"
            )
        if before and self._takes_known:
            self._check(prompts, None, complete=False)
            drawn = self._draw_behind(prompts, length, noise)
        else:
            prompt, most = prompts[0] if before else None, None if config.explicit_length else length
            drawn = super().generate(n, most, prompt=prompt, noise=noise)
        drawn = ended(drawn, before, call.ends)[:, :length]
        return nn.functional.pad(drawn, (width - before, 0), value=-1)

    def _draw_behind(self, prompts: Tensor, length: int, noise: Noise) -> Tensor:
        """Draws int64 ``(n, length)`` that begin with prompts ``(n, m)``."""
        n, before = prompts.shape
        if (documents := self.documents) is not None:
            known = Known(prompts, torch.ones(before, dtype=torch.bool, device=prompts.device))
            return documents.sample(n, Context(known=known, noise=noise), length=length)
        mask = torch.arange(length, device=prompts.device) < before
        known = Known(nn.functional.pad(prompts, (0, length - before)), mask)
        return self._drawn.sample(n, Context(known=known, noise=noise))


def _first(x: Tensor, mask: Tensor) -> Tensor:
    """The entries of ``x``, ``(batch, n)``, with those of the mask first, in their order."""
    return x.gather(1, (~mask).long().argsort(dim=1, stable=True))


AutoModelForCausalLM.register(DflowConfig, DflowForCausalLM)
# The pipeline reads names of classes there, and complains of others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(DflowConfig.model_type, DflowForCausalLM.__name__)
