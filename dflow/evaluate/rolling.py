"""A stream scored as a whole: every symbol once, given symbols before it."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from dflow.config import InputError
from dflow.core import Context, Distribution, Known
from dflow.data import Draws, GrowingCounts, Text
from dflow.data.counting import WEIGHT
from dflow.distributions import SequenceCategorical
from dflow.distributions.documents import Documents
from dflow.evaluate.driver import Rows, Scorer
from dflow.models import TextModel
from dflow.models.counts import counted, patterns_in
from dflow.nn.lstm import LSTM, Carried
from dflow.ops.devices import widen
from dflow.ops.precision import agree


class Rolling(Scorer):
    """Pieces of a stream; each symbol is in one of them.

    A limit is one on chunks of the model's length, so that all models of one length score the same symbols,
    by this protocol and by chunks.

    Attributes:
        num_symbols: symbols scored, the first ones of the stream.
        protocol: how they are scored, in words.
    """

    model: TextModel
    row = "piece"
    num_symbols: int
    protocol: str

    def __init__(self, model: TextModel, law: Distribution, text: Text, limit: int | None) -> None:
        self.model, self.law, self.text = model, law, text
        self.length, self.what = model.config.length, f"likelihood of the {text.name} text"
        self.num_symbols = len(text.ids) if limit is None else min(len(text.ids), limit * self.length)
        self.protocol = "rolling" if limit is None else f"rolling over the first {self.num_symbols:,} symbols"
        #: Counts of what has been scored, which the model reads beside those of its training text.
        self.growing: GrowingCounts | None = None

    @abstractmethod
    def _score(self, rows: slice) -> Rows:
        """The figures of rows, given counts that do not change."""

    @abstractmethod
    def _scored(self, row: int) -> tuple[int, int]:
        """The first symbol that a row scores, and the one behind its last."""

    def score(self, rows: slice) -> Rows:
        """See `Scorer`; counts that grow do so from row to row."""
        if self.growing is None:
            return self._score(rows)
        pieces = []
        for row in range(rows.start, rows.stop):
            pieces.append(self._score(slice(row, row + 1)))
            self._count(row)
        values = torch.cat([piece.values["nats"] for piece in pieces])
        return Rows({"nats": values}, torch.cat([piece.sizes for piece in pieces if piece.sizes is not None]))

    def adapt(self) -> None:
        """Let the counts of the model go on counting what has been scored.

        Raises:
            InputError: the model reads no counts.
        """
        modules = list(counted(self.model))
        if not modules:
            raise InputError(
                f"a {self.model.config.family} model without counts has none that could adapt; train it with "
                "model.counts, or leave adapt out"
            )
        self.growing = GrowingCounts(self.model.config.vocab_size, patterns_in(self.model), WEIGHT)
        for module in modules:
            module.also = self.growing
        self.protocol += f"; counts go on with the text scored so far, each symbol {WEIGHT} times"

    def _count(self, row: int) -> None:
        """Count what a row has scored."""
        if self.growing is not None:
            begin, end = self._scored(row)
            self.growing.extend(self.symbols(begin, min(end, self.num_symbols)))

    def symbols(self, start: int, stop: int) -> Tensor:
        """The symbols from ``start`` to before ``stop``, int64, on the CPU; absent ones are -1."""
        ids = self.text.ids[start : min(stop, self.num_symbols)].long()
        if ids.numel() and int(ids.max()) >= self.model.config.vocab_size:
            raise InputError(
                f"the {self.text.name} text has symbol {int(ids.max())}, outside the model's vocabulary, 0 "
                f"to {self.model.config.vocab_size - 1}; spell it with the tokenizer of the model"
            )
        return F.pad(ids, (0, stop - start - len(ids)), value=-1)


class _Windowed(Rolling):
    """Windows of a stream, each the symbols to score and known ones before them."""

    law: Distribution

    @abstractmethod
    def _batches(self, rows: slice) -> list[tuple[Tensor, Tensor, Context]]:
        """Windows of one shape together: the characters scored in each, the symbols, the context."""

    def _score(self, rows: slice) -> Rows:
        batches = self._batches(rows)
        nats = [-self.law.log_prob(x, context) for _, x, context in batches]
        return Rows({"nats": torch.cat(nats)}, torch.cat([characters for characters, _, _ in batches]))

    def check(self, rows: slice) -> bool | None:
        return all(bool(self.law.round_trip(x, context)) for _, x, context in self._batches(rows))


class _WindowScorer(_Windowed):
    """Windows that overlap by ``context`` symbols; each scores the others, the first window all of its own.

    For networks that are drawn from left to right and read at most a window.
    """

    def __init__(
        self,
        model: TextModel,
        law: SequenceCategorical,
        text: Text,
        limit: int | None,
        checks: int,
        context: int | None,
    ) -> None:
        super().__init__(model, law, text, limit)
        length, n = self.length, self.num_symbols
        self.context = length // 2 if context is None else context
        if not 0 <= self.context < length:
            raise InputError(
                f"context {self.context} is not in 0..{length - 1}: a window of the model has {length} "
                "symbols, and at least one of them is scored"
            )
        self.stride = length - self.context
        self.num_rows = (1 + -(-max(0, n - length) // self.stride)) if n else 0
        self.num_checks = min(checks, self.num_rows)
        self.protocol += (
            f": windows of {length:,} symbols, each scores its last {self.stride:,} given the "
            f"{self.context:,} before, the first window all"
        )

    def _scored(self, row: int) -> tuple[int, int]:
        end = row * self.stride + self.length
        return (end - self.stride if row else 0), end

    def _batches(self, rows: slice) -> list[tuple[Tensor, Tensor, Context]]:
        """See `_Windowed`; nothing is known of the first window."""
        start, stop = rows.start, rows.stop
        if start == 0 and self.context:
            return [self._batch(0, 1, 0), *([self._batch(1, stop, self.context)] if stop > 1 else [])]
        return [self._batch(start, stop, self.context)]

    def _batch(self, start: int, stop: int, known: int) -> tuple[Tensor, Tensor, Context]:
        end, device = (stop - 1) * self.stride + self.length, self.model.device
        ids = self.symbols(start * self.stride, end).unfold(0, self.length, self.stride).contiguous()
        x, mask = ids.clamp(min=0).to(device), torch.arange(self.length) < known
        # The last window may reach beyond the end of the text.
        lengths = (ids >= 0).sum(1).to(device)
        characters = self.text.characters(ids.masked_fill(mask, -1))
        return characters, x, Context(lengths=lengths, known=Known(x, mask) if known else None)


class _DocumentScorer(_Windowed):
    """Chunks of a model that was trained with a context: each is given up to ``context`` symbols before it.

    It is the law of `dflow.distributions.documents.Documents`: every symbol is scored given at least so many
    symbols before its chunk, where there are as many.
    """

    def __init__(
        self,
        model: TextModel,
        law: Distribution,
        text: Text,
        limit: int | None,
        checks: int,
        context: int | None,
    ) -> None:
        super().__init__(model, law, text, limit)
        trained = model.config.context
        self.context = trained if context is None else context
        if not 0 <= self.context <= trained:
            raise InputError(
                f"context {self.context} is not in 0..{trained}: the model was trained to read up to "
                f"{trained} symbols before a chunk (model.context)"
            )
        self.chunks = list(Documents(law, self.length, self.context).chunks(self.num_symbols))
        self.num_rows = len(self.chunks)
        self.num_checks = min(checks, self.num_rows)
        self.protocol += (
            f": chunks of {self.length:,} symbols, each given the {self.context:,} symbols before it"
        )

    def _scored(self, row: int) -> tuple[int, int]:
        _, begin, end = self.chunks[row]
        return begin, end

    def _batches(self, rows: slice) -> list[tuple[Tensor, Tensor, Context]]:
        """See `_Windowed`; the windows of the first chunks and of the last one are shorter."""
        groups: dict[tuple[int, int], list[Tensor]] = {}
        for window, begin, end in self.chunks[rows]:
            groups.setdefault((begin - window, end - begin), []).append(self.symbols(window, end))
        batches = []
        for (known, _), windows in groups.items():
            ids = torch.stack(windows)
            x, mask = ids.to(self.model.device), torch.arange(ids.shape[1]) < known
            characters = self.text.characters(ids.masked_fill(mask, -1))
            batches.append((characters, x, Context(known=Known(x, mask))))
        return batches


class _StreamScorer(Rolling):
    """One sequence that an `LSTM` reads piece by piece, with its state carried from piece to piece.

    Batches come in the order of the text, since one process scores them all.
    """

    def __init__(
        self, model: TextModel, law: SequenceCategorical, text: Text, limit: int | None, checks: int
    ) -> None:
        super().__init__(model, law, text, limit)
        self.num_rows = -(-self.num_symbols // self.length)
        self.num_checks = min(checks, self.num_rows)
        self.protocol += ": each symbol given all before it, the state carried over the text"
        self.net: LSTM = law.net
        self.carried: Carried | None = None
        #: Nats of the pieces that `check` computes once more, by the steps of a draw.
        self.scored = torch.zeros(self.num_checks, dtype=torch.float64)
        self.drawing = self.net.start(1)
        self.drawn: Tensor | None = None

    def _scored(self, row: int) -> tuple[int, int]:
        return row * self.length, (row + 1) * self.length

    def _score(self, rows: slice) -> Rows:
        ids = self.symbols(rows.start * self.length, rows.stop * self.length)
        x = ids[ids >= 0].to(self.model.device)[None]
        logits, self.carried = self.net.carry(x, self.carried)
        nats = torch.zeros(len(ids), dtype=torch.float64)
        nats[: x.shape[1]] = F.cross_entropy(widen(logits[0]), x[0], reduction="none").cpu()
        pieces = nats.view(-1, self.length).sum(1)
        checked = self.scored[rows]
        checked.copy_(pieces[: len(checked)])
        return Rows({"nats": pieces}, self.text.characters(ids.view(-1, self.length)))

    def check(self, rows: slice) -> bool | None:
        stepped = torch.zeros(rows.stop - rows.start, self.length, dtype=torch.float64)
        ids = self.symbols(rows.start * self.length, rows.stop * self.length)
        if rows.start == 0 and self.growing is not None:
            self.growing.clear()
        for i, symbol in enumerate(ids[ids >= 0].to(self.model.device)):
            if i and i % self.length == 0:
                self._count(rows.start + i // self.length - 1)
            logits = self.net.step(self.drawn, self.drawing)[0, 0]
            stepped.view(-1)[i] = F.cross_entropy(widen(logits), symbol)
            self.drawn = symbol.view(1, 1)
        self._count(rows.stop - 1)
        return agree(stepped.sum(1), self.scored[rows], self.net)


def rolling(
    model: TextModel,
    text: Text,
    limit: int | None,
    checks: int,
    context: int | None,
    processes: int,
    adapt: bool = False,
) -> Rolling:
    """The scorer of a stream for the family of ``model``, which gives every symbol the text before it.

    A Transformer scores it given at least ``context`` symbols, or as many as there are; an LSTM given all.

    Args:
        model: one that is drawn from left to right.
        text: a stream.
        limit: score the symbols of the first ``limit`` chunks only.
        checks: number of windows or pieces that go through the round trip.
        context: symbols before those that a window scores; default half of a window.
        processes: among which the rows are spread.
        adapt: let the model's counts go on counting the text that has been scored.

    Raises:
        InputError: sentences, draws from a law, a model that is not drawn from left to right, a context out
            of range or one for an LSTM, an LSTM or ``adapt`` on several processes, or a model without counts
            that should adapt.
    """
    scorer = _rolling(model, text, limit, checks, context, processes)
    if adapt:
        if processes > 1:
            raise InputError(
                "counts adapt to all of the text before, which one process scores; run dflow without a "
                "launcher"
            )
        scorer.adapt()
    return scorer


def _rolling(
    model: TextModel, text: Text, limit: int | None, checks: int, context: int | None, processes: int
) -> Rolling:
    if text.lengths is not None or model.config.explicit_length:
        raise InputError(
            "sentences are scored each on its own, with nothing before them, so that there is no rolling "
            "protocol for them; use protocol 'chunks'"
        )
    if isinstance(text, Draws):
        raise InputError(
            f"the {text.name} text is drawn from a law of whole sequences, with nothing before them; use "
            "protocol 'chunks'"
        )
    law, family = model.law, model.config.family
    carries = isinstance(law, SequenceCategorical) and isinstance(law.net, LSTM)
    if model.documents is not None and not carries:
        return _DocumentScorer(model, law, text, limit, checks, context)
    if not (model.config.record.left_to_right and isinstance(law, SequenceCategorical) and law.lay is None):
        raise InputError(
            f"a {family} model scores chunks only: it has not been trained to read the text before what it "
            "scores; use protocol 'chunks', a transformer or lstm model, or train it with a model.context"
        )
    if not isinstance(law.net, LSTM):
        return _WindowScorer(model, law, text, limit, checks, context)
    if context is not None:
        raise InputError(
            f"context {context}: a {family} model is scored given all symbols before each one, since its "
            "state is carried over the text; leave context out"
        )
    if processes > 1:
        raise InputError(
            f"a {family} model carries its state over the whole text, which one process does; run dflow "
            "without a launcher"
        )
    return _StreamScorer(model, law, text, limit, checks)
