"""Models of text without what training and transformers add: score, draw. Thin: the model is in `zoo`."""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from dflow import zoo
from dflow.config import InputError
from dflow.core import Context, Distribution, Known, check_lengths
from dflow.distributions import SequenceCategorical, Walk
from dflow.distributions.documents import Documents
from dflow.distributions.drafted import Drafted, Drafter, LawDrafter
from dflow.distributions.drafted_groups import DraftedGroups, is_drawn_in_groups
from dflow.distributions.drafting import SameLaw, Tally
from dflow.flows import Infilled
from dflow.models.buffers import KeepsBuffers
from dflow.models.counts import counted
from dflow.ops.devices import widen
from dflow.ops.noise import LENGTHS, Noise


class TextModel(KeepsBuffers):
    """A distribution over sequences of symbols, exact in both directions: `log_prob` and `generate`.

    Attributes:
        config: a `dflow.models.TextConfig`, or `dflow.DflowConfig`.
    """

    config: Any
    distribution: Distribution
    length_counts: Tensor

    def __init__(self, config: Any) -> None:
        """Build the model that ``config`` describes, with fresh weights."""
        super().__init__()
        self.config = config
        self._build()

    def _build(self) -> None:
        """Make the law, and the law of lengths."""
        settings = self.config.settings()
        # Masks and orders are computed, not loaded, so they need a real device even while transformers
        # builds everything else on the meta device.
        with torch.device("cpu"):
            self.distribution = zoo.build(self.config.family, settings, self.config.vocab_size)
            self.register_buffer("length_counts", torch.zeros(self.config.length + 1))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        # Those that train are moved by themselves, and the counts of lengths stay behind.
        return next((p.device for p in self.parameters()), self.length_counts.device)

    #: Network calls of the law in use; None where it is `distribution` itself.
    _calls: int | None = None

    @property
    def law(self) -> Distribution:
        """The law that is scored and drawn from: `distribution`, or one that shares its network, see `at`."""
        return self.distribution if self._calls is None else self.distribution.at(self._calls)

    #: The law as `generate` draws it in fewer calls; in a tuple, since it is no part of the model.
    _drafted: tuple[()] | tuple[SameLaw] = ()

    @property
    def _drawn(self) -> Distribution:
        """The law that `generate` draws from: `law`, or the same in fewer calls."""
        return self._drafted[0] if self._drafted else self.law

    @property
    def tally(self) -> Tally | None:
        """The network calls of each sample drawn so far, of a model that is `drafted`."""
        return self._drafted[0].tally if self._drafted else None

    @property
    def documents(self) -> Documents | None:
        """The law of texts of any length, chunk after chunk; None where the model has no context."""
        context = getattr(self.config, "context", 0)
        return Documents(self._drawn, self.config.length, context) if context else None

    def drafted(self, drafter: TextModel | Drafter, width: int | None = None) -> Self:
        """The model that draws the same samples in fewer network calls; it shares all weights with this one.

        Another model proposes symbols ahead, and one call of this one verifies them: see
        `dflow.distributions.drafted`. By the same noise the samples are those of this model.

        Args:
            drafter: a fast model of the same alphabet that is drawn from left to right, above all one of
                family ``ngram``; or a `dflow.distributions.Drafter`.
            width: symbols that are drafted for a call, up to 32; of a model drawn in groups, groups beyond
                the next one. None for as many as pay off.

        Raises:
            InputError: this model or the drafter is drawn in another way; or the drafter has another number
                of symbols.
        """
        if isinstance(drafter, TextModel):
            if drafter.config.vocab_size != self.config.vocab_size:
                raise InputError(
                    f"the model that drafts has {drafter.config.vocab_size} symbols, and this one "
                    f"{self.config.vocab_size}; both need one vocabulary"
                )
            for mixture in counted(self):
                for other in counted(drafter):
                    other.share(mixture)
            drafter = LawDrafter(drafter.train(False).law)
        model = copy.copy(self)
        kind = DraftedGroups if is_drawn_in_groups(self.law) else Drafted
        model._drafted = (kind(self.law, drafter, width),)
        return model

    @property
    def num_calls(self) -> int:
        """Sequential network calls that drawing a sequence costs, at most."""
        return self.law.num_calls

    def at(self, calls: int) -> Self:
        """The model that scores and draws in ``calls`` network calls; it shares all weights with this one.

        Raises:
            InputError: the model was not trained for that number.
        """
        try:
            law = self.distribution.at(calls)
        except ValueError:
            budgets = self.distribution.budgets
            choices = f"1 to {budgets[-1]}" if isinstance(budgets, range) else ", ".join(map(str, budgets))
            raise InputError(
                f"this {self.config.family} model is not drawn in {calls} calls, but in {choices}; a grouped "
                "model can be trained for more (model.calls)"
            ) from None
        model = copy.copy(self)
        if isinstance(law, Walk):
            # The order is saved with the model, so that the config has to name its number of calls.
            model._modules = dict(self._modules)
            model.distribution, model.config = law, copy.copy(self.config)
            model.config.num_calls = calls
        else:
            model._calls = calls
        return model

    def log_prob(
        self, input_ids: Tensor, lengths: Tensor | None = None, given: Tensor | None = None
    ) -> Tensor:
        """Exact log-likelihood in nats, ``(batch,)``, of symbols int64 ``(batch, n)``.

        With ``config.explicit_length`` it includes the log-probability of each length.

        Args:
            input_ids: symbols, int64 ``(batch, n)``.
            lengths: int64 ``(batch,)``, how many symbols of each sequence are present; None: all.
            given: int64 ``(m,)``, symbols that stand before each sequence; for models with a context, and
                for those that are drawn from left to right, which then take m + n symbols at most.

        Raises:
            InputError: a symbol outside the alphabet, lengths that this model cannot score, or given symbols
                for a model that takes none.
        """
        if given is not None and len(given):
            law, x, context = self._given(input_ids, given)
            return law.log_prob(x, context)
        x, lengths = self._whole(input_ids, lengths)
        law = self.law if self.documents is None or lengths is not None else self.documents
        log_prob = law.log_prob(x, Context(lengths=lengths))
        if self.config.explicit_length:
            log_prob = log_prob + self._length_log_prob()[lengths]
        return log_prob

    def log_prob_each(
        self, input_ids: Tensor, lengths: Tensor | None = None, given: Tensor | None = None
    ) -> Tensor:
        """The terms of `log_prob` in nats, one for each symbol: ``(batch, n)``, 0 for absent ones.

        With ``config.explicit_length`` a last column has the log-probability of each length. They are those
        of ``log p(symbol | given, earlier groups)``, with ``given`` the text that stands before.

        Args:
            input_ids: symbols, int64 ``(batch, n)``.
            lengths: int64 ``(batch,)``, as of `log_prob`.
            given: int64 ``(m,)``, as of `log_prob`.

        Raises:
            InputError: a family whose law has no terms by entry; the errors of `log_prob`; and given symbols
                for a model that takes none.
        """
        if given is not None and len(given):
            law, x, context = self._given(input_ids, given)
            self._check_by_entry(law)
            return law.log_prob_each(x, context)[:, len(given) :]
        x, lengths = self._whole(input_ids, lengths)
        law = self.law if self.documents is None or lengths is not None else self.documents
        self._check_by_entry(law)
        terms = law.log_prob_each(x, Context(lengths=lengths))
        if self.config.explicit_length:
            terms = torch.cat([terms, self._length_log_prob()[lengths][:, None]], 1)
        return terms

    def _given(self, input_ids: Tensor, given: Tensor) -> tuple[Distribution, Tensor, Context]:
        """The law of sequences, and these with what stands before them, which the context knows."""
        documents, record = self.documents, self.config.record
        if self.config.explicit_length or (documents is None and not record.left_to_right):
            raise InputError(
                f"this {self.config.family} model scores no text given what stands before it; use one that "
                "was trained on a stream with a model.context, or a transformer or lstm"
            )
        x = torch.cat([given.to(input_ids.device).expand(len(input_ids), -1), input_ids], 1)
        self._check(x, None)
        mask = torch.arange(x.shape[1]) < len(given)
        return documents or self.law, x, Context(known=Known(x, mask))

    def _check_by_entry(self, law: Distribution) -> None:
        if not law.by_entry:
            raise InputError(
                f"a {self.config.family} model gives whole sequences a probability, and single symbols no "
                "share in it; score the whole"
            )

    def _whole(self, input_ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Symbols and lengths, checked, as the law takes them: a flow needs a fixed number of entries."""
        self._check(input_ids, lengths)
        if self.config.explicit_length and lengths is None:
            lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        return self._padded(input_ids), lengths

    @torch.no_grad()
    def generate(
        self,
        num_return_sequences: int = 1,
        length: int | None = None,
        generator: torch.Generator | None = None,
        prompt: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """Exact draws: int64 ``(num_return_sequences, length)``; entries beyond the end of a sequence are -1.

        A length below the model's gives the first symbols of full draws, which has the model's own law;
        with ``config.explicit_length`` lengths are drawn too unless one is given. By the same noise the same
        samples are drawn, whatever others are drawn with them.

        Args:
            num_return_sequences: number of draws.
            length: symbols of each, at most ``config.length``, the default.
            generator: source of randomness, on the model's device.
            noise: what symbols are drawn by, in place of a generator; its controls change the law.
            prompt: int64 ``(n,)`` first symbols, for models that draw symbols themselves; see
                `SequenceCategorical.sample` for what it means in orders other than left to right, and
                `Walk.sample` for any-order models.

        Raises:
            InputError: a number, length or prompt that the model cannot draw.
        """
        longest, documents = self.config.length, self.documents
        if not isinstance(num_return_sequences, int):
            raise InputError(
                f"num_return_sequences is a number, found {type(num_return_sequences).__name__}; symbols to "
                "begin with are given as prompt="
            )
        if num_return_sequences < 1:
            raise InputError(f"cannot draw {num_return_sequences} samples; ask for 1 or more")
        if length is not None and (length < 1 or (length > longest and documents is None)):
            raise InputError(
                f"length {length} is not in 1..{longest}, what this model can draw; one that was trained "
                "with a model.context draws any length"
            )
        if prompt is not None:
            most = longest if documents is None else len(prompt) + longest
            prompt = self._prompt(prompt, length or most)
        if noise is None:
            noise = Noise.of(generator, num_return_sequences, self.device)
        if documents is not None:
            known = None if prompt is None else prompted(prompt, num_return_sequences)
            return documents.sample(num_return_sequences, Context(noise=noise, known=known), length=length)
        lengths = self._draw_lengths(noise, length, 0 if prompt is None else len(prompt))
        context = Context(lengths=lengths, noise=noise)
        # A law that takes a prompt takes the length too, and may stop there.
        options = {} if self.config.record.prompt == "no" else {"prompt": prompt, "length": length}
        x = self._drawn.sample(num_return_sequences, context, generator, **options)
        if lengths is not None:
            x = x.masked_fill(torch.arange(longest, device=x.device) >= lengths[:, None], -1)
            return x[:, : length or max(1, int(lengths.max()))]
        return x[:, : length or longest]

    def _draw_lengths(self, noise: Noise, length: int | None, prompt_length: int) -> Tensor | None:
        """Lengths of the sequences, int64 ``(n,)``; None where the model has no law of lengths."""
        if not self.config.explicit_length:
            return None
        rows = torch.arange(len(noise.samples), device=self.device)
        if length is not None:
            return torch.full_like(rows, length)
        law = self._length_log_prob().clone()
        # From left to right this is the law of the length given the prompt.
        law[:prompt_length] = -math.inf
        return (law + noise.gumbel(rows, torch.zeros_like(rows), len(law), LENGTHS)).argmax(-1)

    def _prompt(self, prompt: Tensor, length: int) -> Tensor:
        """A prompt of draws of ``length`` symbols, checked, on the device of the model."""
        if self.config.record.prompt == "no" and self.documents is None:
            families = [name for name in zoo.names("text") if zoo.find(name).prompt != "no"]
            context = "one that was trained with a model.context, or " * (self.config.record.known != "no")
            raise InputError(
                f"a {self.config.family} model cannot continue a prompt; use {context}one of family "
                f"{', '.join(families)}"
            )
        if not (isinstance(prompt, Tensor) and (prompt.dtype, prompt.ndim) == (torch.int64, 1)):
            received = (
                f"{prompt.dtype} {tuple(prompt.shape)}"
                if isinstance(prompt, Tensor)
                else type(prompt).__name__
            )
            raise InputError(
                f"a prompt is a tensor of symbols int64 (n,), one for all samples, found {received}; make it "
                "from a text with dflow.data.Tokenizer.load(FOLDER).encode(text)"
            )
        if not 1 <= len(prompt) < length:
            raise InputError(
                f"the prompt has {len(prompt)} symbols; it needs at least 1 and fewer than the length "
                f"{length}"
            )
        self._check(prompt[None], None, complete=False)
        return prompt.to(self.device)

    @torch.no_grad()
    def round_trip(self, input_ids: Tensor, lengths: Tensor | None = None) -> bool | None:
        """Whether scoring and drawing agree; None where some part of the law offers no check.

        A map on Z/K has to recover every symbol from its latent. A law that draws symbols group by group has
        to give them the same probability step by step, as it draws, and in the single pass that scores them.
        The parts of a split are checked separately. A table of probabilities needs no check: the same table
        scores and draws.
        """
        self._check(input_ids, lengths)
        return self.law.round_trip(self._padded(input_ids), Context(lengths=lengths))

    def _padded(self, x: Tensor) -> Tensor:
        """``x``, padded to the model's length where its law takes no other."""
        any_length = isinstance(self.distribution, (SequenceCategorical, Walk, Infilled))
        if self.config.record.left_to_right or any_length:
            return x
        return nn.functional.pad(x, (0, self.config.length - x.shape[1]))

    def set_length_counts(self, counts: Tensor) -> None:
        """Set how often each length occurs in the training data, ``(config.length + 1,)``."""
        self.length_counts.copy_(counts)

    def _length_log_prob(self) -> Tensor:
        """Log-probability of each length from 1, smoothed by half a count (Krichevsky and Trofimov 1981)."""
        counts = widen(self.length_counts) + 0.5
        counts[0] = 0
        return (counts / counts.sum()).log()

    def _check(self, input_ids: Tensor, lengths: Tensor | None, complete: bool = True) -> None:
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
            raise InputError(
                f"expected symbols int64 (batch, n), found {input_ids.dtype} {tuple(input_ids.shape)}; "
                "one sequence is a batch of one, x[None]"
            )
        n, longest, K = input_ids.shape[1], self.config.length, self.config.vocab_size
        if n > longest and self.documents is None:
            raise InputError(f"sequence of {n} symbols; this model takes at most {longest}")
        low, high = (int(v) for v in input_ids.aminmax()) if input_ids.numel() else (0, 0)
        if low < 0 or high >= K:
            raise InputError(f"symbol {high if high >= K else low} lies outside 0..{K - 1}, the vocabulary")
        if lengths is not None:
            check_lengths(lengths, len(input_ids))
        if lengths is not None and lengths.numel() and not 0 < int(lengths.min()) <= int(lengths.max()) <= n:
            raise InputError(f"lengths must lie in 1..{n}, found {int(lengths.min())}..{int(lengths.max())}")
        shorter = self.config.record.left_to_right or self.config.explicit_length or self.documents
        if complete and n < longest and not shorter:
            raise InputError(
                f"a {self.config.family} model scores sequences of exactly {longest} symbols, found {n}; "
                "cut the text into such chunks"
            )


def prompted(prompt: Tensor, n: int) -> Known:
    """The known entries of n documents that begin with ``prompt``, int64 ``(m,)``."""
    return Known(prompt.expand(n, -1), torch.ones(len(prompt), dtype=torch.bool))
