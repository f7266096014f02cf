"""What `generate` of transformers is asked for, read strictly: what dflow draws, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dflow.config import InputError, nearest
from dflow.ops.noise import Controls

#: Arguments that are read here.
_READ = (
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("num_return_sequences", "pad_token_id", "eos_token_id"),
)

#: Arguments that change nothing about what is drawn, and what else a config holds.
_IDLE = (
    "use_cache",
    "bos_token_id",
    "transformers_version",
    "cache_implementation",
    "disable_compile",
    "tokenizer",
)

#: Why other arguments are refused, and what there is instead.
_REFUSED: dict[tuple[str, ...], str] = {
    (
        *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
        *("constraints", "force_words_ids", "penalty_alpha", "dola_layers", "low_memory"),
    ): "dflow draws samples and searches no beams; draw several with num_return_sequences and take the one "
    "of the highest model.log_prob",
    (
        *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids"),
        *("encoder_no_repeat_ngram_size", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "guidance_scale"),
        *("watermarking_config", "logits_processor", "prefix_allowed_tokens_fn", "negative_prompt_ids"),
        *("negative_prompt_attention_mask", "renormalize_logits", "remove_invalid_values", "token_healing"),
    ): "dflow draws from the law of the model and reweights no symbols by what was drawn; temperature, "
    "top_k, top_p and min_p change the law",
    ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"): "dflow cuts a law by top_k, top_p or min_p",
    (
        "min_length",
        "min_new_tokens",
    ): "dflow does not change how long a text is likely to be; draw again where one is too short",
    ("stop_strings", "stopping_criteria", "max_time"): "a text ends at max_new_tokens or at a symbol of "
    "eos_token_id; `dflow generate --stop` ends it at a string",
    (
        *("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "assistant_early_exit"),
        *("is_assistant", "use_mtp", "speculation_type"),
    ): "model.drafted(other) draws the same samples by the drafts of another model",
    (
        *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
        "output_hidden_states",
    ): "generate returns the symbols; model.log_prob_each(symbols) gives the log-probability of each",
    ("streamer",): "symbols are returned together; `dflow generate` shows a text as it is drawn",
    (
        "inputs_embeds",
        "past_key_values",
    ): "a prompt is given as input_ids, and the sampler keeps its own cache",
}
_REASONS = {name: reason for names, reason in _REFUSED.items() for name in names}

#: Values that ask for nothing, of arguments for which they are not None or False.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("typical_p", "top_h", "guidance_scale"), 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty"), 0.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    "min_new_tokens": 0,
}

#: Arguments that say how an assistant drafts, which mean nothing without one.
_OF_AN_ASSISTANT = (
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size", "assistant_ensemble_weight"),
)


@dataclass(frozen=True)
class Wanted:
    """What a call of `generate` asks for, as transformers means it.

    Attributes:
        new: symbols behind the prompt, at most; None where the call names no length.
        total: symbols with the prompt and the padding before it, at most; None as above, and where `new` is.
        sample: whether symbols are drawn, and not each the likeliest.
        controls: changes of the law.
        each: sequences for a prompt.
        pad: the number that fills up sequences that end before others.
        ends: symbols behind which a sequence ends.
    """

    new: int | None
    total: int | None
    sample: bool
    controls: Controls
    each: int
    pad: int
    ends: tuple[int, ...]


def default_config(longest: int | None) -> GenerationConfig:
    """Exact draws, from the law as it is, of at most ``longest`` symbols."""
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=longest)


def wanted(arguments: Mapping[str, Any], pad: int) -> Wanted:
    """The arguments of a call, over those of its config, over those of the model's.

    Raises:
        InputError: an argument that dflow does not have, or a value out of its range.
    """
    for name, value in arguments.items():
        if name not in _READ:
            _refuse(name, value)
    values = {name: value for name, value in arguments.items() if value is not None}
    new, total = values.get("max_new_tokens"), values.get("max_length")
    for name in ("max_new_tokens", "max_length", "num_return_sequences"):
        if name in values and not (isinstance(values[name], int) and values[name] >= 1):
            raise InputError(f"{name} {values[name]!r} must be a number of 1 or more")
    sample = bool(values.get("do_sample", True))
    changes: dict[str, Any] = {}
    if sample:
        changes = {
            name: values[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in values
        }
        # What transformers takes for no change at all.
        neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        changes = {name: value for name, value in changes.items() if value != neutral.get(name)}
    ends = values.get("eos_token_id", ())
    if isinstance(ends, Tensor):
        ends = ends.flatten().tolist()
    ends = (ends,) if isinstance(ends, int) else tuple(ends)
    return Wanted(
        new,
        None if new is not None else total,
        sample,
        Controls(**changes),
        values.get("num_return_sequences", 1),
        values.get("pad_token_id", pad),
        ends,
    )


def _refuse(name: str, value: Any) -> None:
    """Refuse an argument that asks for something."""
    if name.startswith("_") or name in _IDLE or name in _OF_AN_ASSISTANT:
        return
    empty = isinstance(value, (list, tuple)) and not value
    if value is None or value is False or empty or (name in _NEUTRAL and value == _NEUTRAL[name]):
        return
    if name in _REASONS:
        shown = repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
        raise InputError(f"generate: {name}={shown} is not available: {_REASONS[name]}")
    raise InputError(f"generate takes no argument {name!r}; {nearest(name, list(_READ))}")


def prompts_of(input_ids: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """The prompt of each row of a batch, int64 ``(n,)``, without what fills it up.

    Args:
        input_ids: int64 ``(batch, n)``, or None for one draw without a prompt.
        mask: ``(batch, n)``, 1 for symbols that are present; None for all.

    Raises:
        InputError: tensors of another shape, or rows that are filled up at their end.
    """
    if input_ids is None:
        return [torch.zeros(0, dtype=torch.int64)]
    if input_ids.ndim != 2 or (input_ids.numel() and input_ids.dtype != torch.int64):
        raise InputError(
            f"generate takes input_ids int64 (batch, n), found {input_ids.dtype} {tuple(input_ids.shape)}; "
            "make them by tokenizer(texts, return_tensors='pt', padding=True)"
        )
    if mask is None:
        return list(input_ids.long())
    if mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, the symbols {tuple(input_ids.shape)}; give a 1 "
            "for each symbol that is present and a 0 for each that is not"
        )
    present = mask != 0
    if bool((present[:, 1:] < present[:, :-1]).any()):
        raise InputError(
            "attention_mask: a prompt is filled up at its end, where its continuation would stand; pad on "
            "the left (padding_side='left')"
        )
    return [row[here] for row, here in zip(input_ids.long(), present, strict=True)]


def ended(drawn: Tensor, begin: int, ends: tuple[int, ...]) -> Tensor:
    """``drawn``, int64 ``(n, length)``, with -1 behind the first end from ``begin`` on."""
    if not ends:
        return drawn
    new = drawn[:, begin:]
    stops = torch.isin(new, torch.tensor(ends, device=new.device))
    behind = stops.cumsum(1) - stops.long() > 0
    return torch.cat([drawn[:, :begin], new.masked_fill(behind, -1)], 1)
