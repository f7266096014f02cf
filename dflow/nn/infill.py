"""Bidirectional Transformers: hidden entries given known ones, in a fixed pattern or in any pattern.

They are independent of flows: symbols in, ``num_params`` numbers an entry out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Around, Context, around_for, lengths_in, only_lengths
from dflow.nn.attention import TransformerSize, initialize, ngrams, rotations
from dflow.nn.counted import Counted, neighbours
from dflow.nn.embed import Neighbours
from dflow.nn.plans import GAPS, gap_classes
from dflow.ops.counts import patterns_among, patterns_of
from dflow.ops.devices import all_moved
from dflow.ops.memo import Memo, OnCpu

#: Symbols further away than this from an entry are not counted: they say hardly anything about it.
_REACH = 8
#: Longest contexts of contiguous symbols that are counted for hidden entries around which any may be known.
_CONTIGUOUS = 4


class InfillTransformer(nn.Module):
    """Parameters of hidden entries given known ones: the conditioner of a coupling.

    Every hidden entry reads the ``window`` nearest known symbols on each side, in place of a convolution over
    a grid with holes. The layers then attend among the hidden entries, which together have read every known
    symbol. Nothing is computed for known entries.

    With ``takes_known`` these entries are some of the hidden ones of a sequence of which any others may be
    known: a prompt, what stands around a gap (`dflow.core.Around`). ``known`` and ``hidden`` are then places
    among all that there may be, and ``known`` may be empty. A neighbour is read in its column as
    far as nothing that is known around stands between. Each entry also reads all readable symbols up to
    ``window`` positions away, n-grams of these, and the distances to the nearest symbols that are known
    around. Of these every ``window``-th attends too, so that text far away is read through them.

    Where ``size`` has counts, the first K of the numbers are logits of the entry's symbol, and become
    log-probabilities of their mixture with counts of the training text (`dflow.nn.counted`). The patterns are
    those of the nearest known symbols of most hidden entries: in every second position -1, +1, -3, +3. With
    ``takes_known`` there are also some of contiguous symbols. Where no symbol that is known is near enough
    the numbers remain logits. What is known must then be text, and no latents. Further numbers, as the
    weights of `dflow.distributions.Spectra`, also depend on how sure the mixture is.

    Args:
        K: size of the alphabet.
        num_params: numbers for each hidden entry.
        known, hidden: int64 ``(n_known,)`` and ``(n_hidden,)``: positions in the whole sequence, sorted.
        size: see `TransformerSize`; ``window`` counts known symbols.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).
        takes_known: read what is known around; the context always says it.
    """

    known: Tensor
    hidden: Tensor
    neighbours: Tensor
    size: TransformerSize

    def __init__(
        self,
        K: int,
        num_params: int,
        known: Tensor,
        hidden: Tensor,
        size: TransformerSize = TransformerSize(),
        *,
        zero_head: bool = False,
        takes_known: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        if len(known) < (not takes_known) or len(hidden) < 1:
            raise ValueError(
                f"an infilling network needs known and hidden entries, found {len(known)} and {len(hidden)}"
            )
        self.K, self.size, self.takes_known, window = K, size, takes_known, size.window
        self._slots: Memo[_Slots] = Memo()
        self._on_cpu = OnCpu()
        self.register_buffer("known", known.clone())
        self.register_buffer("hidden", hidden.clone())
        right = torch.searchsorted(known, hidden)[:, None]
        reach = torch.arange(window)
        neighbours = torch.cat([right - 1 - reach, right + reach], 1)
        outside = (neighbours < 0) | (neighbours >= len(known))
        self.register_buffer("neighbours", neighbours.masked_fill(outside, len(known)))
        # Column j: the known symbol j + 1 places before the entry; column window + j: j + 1 places after it.
        patterns = ngrams(window, window, size.ngram_size)
        columns = [[-o - 1 if o < 0 else window + o - 1 for o in pattern] for pattern in patterns]
        if takes_known:
            # Column 3 * window + o: the symbol at distance o.
            columns += [[3 * window + o for o in pattern] for pattern in patterns]
        self.embed = Neighbours(
            K,
            size.hidden_size,
            4 * window + 1 if takes_known else 2 * window,
            columns,
            size.ngram_rows,
            extra=2 * GAPS if takes_known else 0,
            std=(2 * window) ** -0.5,
            ngram_dropout=size.ngram_dropout,
        )
        self.mix = nn.Linear(size.hidden_size, size.hidden_size)
        self.blocks = size.blocks()
        self.norm = nn.LayerNorm(size.hidden_size, bias=False)
        self.head = nn.Linear(size.hidden_size, num_params)
        initialize(self, max(1, size.num_hidden_layers))
        nn.init.kaiming_normal_(self.mix.weight, nonlinearity="relu")
        if zero_head:
            nn.init.zeros_(self.head.weight)
        self.counted = self._counted(num_params - K)

    def _counted(self, more: int) -> Counted | None:
        """The mixture with counts; None where nothing is counted."""
        size, none = self.size, len(self.known)
        if not size.counts:
            return None
        distances = F.pad(self.known, (0, 1))[self.neighbours] - self.hidden[:, None]
        near = (self.neighbours < none) & (distances.abs() <= _REACH)
        columns = zip(distances.T, near.T, strict=True)
        # The commonest distance of each neighbour.
        common = [Counter(column[there].tolist()).most_common(1) for column, there in columns]
        left, right = (
            list(dict.fromkeys(offset for column in side for offset, _ in column))
            for side in (common[: size.window], common[size.window :])
        )
        patterns = patterns_among(left, right, size.counts)[1]
        if self.takes_known:
            patterns += patterns_of(min(size.counts, _CONTIGUOUS), True)[1]
        patterns = list(dict.fromkeys(patterns))
        offsets = sorted({offset for pattern in patterns for offset in pattern})
        if not offsets:
            return None
        return Counted(self.K, size.hidden_size, offsets, patterns, size.counts_dropout, few=0, more=more)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters (batch, n_hidden, num_params) given the known symbols or rows ``x``.

        Args:
            x: int64 ``(batch, n_known)`` or one-hot rows ``(batch, n_known, K)``.
            context: lengths of whole sequences, what is known around, or None.

        Raises:
            ValueError: a network with ``takes_known`` and a context that does not say what is known around.
        """
        lengths, around = only_lengths(context, len(x)), around_for(self, context)
        slots, text = self._of(around), None if around is None else around.symbols
        symbols = x.argmax(-1) if x.is_floating_point() else x
        mask = None
        if lengths is not None:
            symbols = symbols.masked_fill(slots.known >= lengths[:, None], self.K)
            present = slots.hidden < lengths[:, None]
            diagonal = torch.eye(len(slots.hidden), dtype=torch.bool, device=x.device)
            mask = (present[:, None] | diagonal)[:, None]
        readable = F.pad(symbols, (0, 1), value=self.K)
        readable = readable if text is None else torch.cat([readable, text], 1)
        h: Tensor = self.embed(readable[:, slots.sources], slots.gaps)
        if x.is_floating_point():
            rows = torch.where((symbols != self.K)[..., None], x, 0.0)
            h = h + self.embed.gradient_of(rows, slots.sources.clamp(max=x.shape[1]))
        h = h + self.mix(F.gelu(h, approximate="tanh"))
        rotation = rotations(slots.positions, slots.positions, self.size.head_size, h.dtype)
        for block in self.blocks:
            h = block(h, rotation, mask)
        h = self.norm(h[:, : len(slots.hidden)])
        out: Tensor = self.head(h)
        if self.counted is not None:
            out = self.counted(out, readable[:, slots.counted], h)
        return out

    def _of(self, around: Around | None) -> _Slots:
        """The slots of a pattern of known entries, made once."""
        if not self.takes_known:
            return self._slots(self._lay_alone, self.known, self.hidden, self.neighbours)
        if around is None:
            raise ValueError("this network is one of a law of hidden entries, see dflow.flows.Infilled")
        mask, first, buffers = around.mask, around.first, (self.known, self.hidden, self.neighbours)
        device = self.known.device
        return self._slots(
            lambda: all_moved(self._lay(mask, first, *self._on_cpu.of(*buffers)), device),
            mask,
            *buffers,
            key=first,
        )

    def _lay_alone(self) -> _Slots:
        """The slots of sequences in which ``known`` alone is known."""
        line = self._line(1 + int(torch.cat([self.known, self.hidden]).max()), self.known)
        counted = self._of_counts(line, self.hidden)
        return _Slots(self.known, self.hidden, self.hidden, self.neighbours, counted)

    def _line(self, n: int, known: Tensor, text: Tensor | None = None) -> Tensor:
        """Which readable symbol stands at each of n positions, and at `_pad` more on each side."""
        none, pad = len(known), self._pad
        line = torch.full((n + 2 * pad,), none, device=known.device)
        line[pad + known] = torch.arange(none, device=known.device)
        if text is not None:
            line[pad + text] = none + 1 + text
        return line

    @property
    def _pad(self) -> int:
        return max(self.size.window, _REACH)

    def _of_counts(self, line: Tensor, hidden: Tensor) -> Tensor | None:
        if self.counted is None:
            return None
        return line[self._pad + hidden[:, None] + torch.tensor(self.counted.offsets, device=line.device)]

    def _lay(
        self, mask: Tensor, first: int, all_known: Tensor, all_hidden: Tensor, neighbours: Tensor
    ) -> _Slots:
        window, places = self.size.window, (~mask).nonzero().flatten()
        there = [(index >= first) & (index < first + len(places)) for index in (all_known, all_hidden)]
        of_known, of_hidden = all_known[there[0]] - first, all_hidden[there[1]] - first
        known, hidden, none = places[of_known], places[of_hidden], len(of_known)
        # Neighbours among the known entries that are there.
        near = neighbours[there[1]] - int((all_known < first).sum())
        near = near.masked_fill((near < 0) | (near >= none), none)
        # Which stretch of hidden entries an entry stands in.
        stretch = mask.cumsum(0)
        apart = F.pad(stretch[known], (0, 1), value=-1)[near] != stretch[hidden][:, None]
        near = near.masked_fill(apart, none)
        text = mask.nonzero().flatten()
        positions = torch.cat([hidden, text[::window]])
        near = F.pad(near, (0, 0, 0, len(positions) - len(hidden)), value=none)
        line = self._line(len(mask), known, text)
        reach = self._pad + torch.arange(-window, window + 1, device=mask.device)
        sources = torch.cat([near, line[positions[:, None] + reach]], 1)
        gaps = gap_classes(mask)[positions] + self.embed.extra_row
        return _Slots(of_known, of_hidden, positions, sources, self._of_counts(line, hidden), gaps)


@dataclass(frozen=True)
class _Slots:
    """What an `InfillTransformer` computes, and what it reads.

    Attributes:
        known: int64 ``(n_known,)``, places among the hidden entries of the sequence.
        hidden: int64 ``(n_hidden,)``, alike.
        positions: int64 ``(slots,)``, in the whole sequence: of ``hidden``, then of others that are read.
        sources: int64 ``(slots, columns)``, which of the known symbols is read, then none, then which of the
            whole sequence.
        counted: int64 ``(n_hidden, offsets)``, alike: the symbols of the contexts that are counted.
        gaps: rows of the embedding ``(slots, 2)`` for the distances to the nearest that is known around.
    """

    known: Tensor
    hidden: Tensor
    positions: Tensor
    sources: Tensor
    counted: Tensor | None = None
    gaps: Tensor | None = None


class StridedInfill(nn.Module):
    """An infilling network as the net of a split: every second entry given the kept entries.

    Entries of the split are ``stride`` positions of the whole sequence apart, and the net takes the lengths
    of whole sequences.
    """

    def __init__(self, net: nn.Module, stride: int) -> None:
        super().__init__()
        self.net, self.stride = net, stride
        self.takes_known = getattr(net, "takes_known", False)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The parameters that the network gives."""
        num_hidden = lengths_in(context, len(x))
        if context is not None and num_hidden is not None:
            *given, num_kept = context.given
            lengths = self.stride * (num_kept + num_hidden)
            context = replace(context, lengths=lengths, given=tuple(given))
        out: Tensor = self.net(x, context)
        return out


class MaskedTransformer(nn.Module):
    """Bidirectional Transformer over a sequence with any set of known entries: the any-order network.

    Every entry reads itself and the ``window`` symbols on either side as far as they are known, n-grams of
    these neighbours, and the distances to the nearest known symbols. Then all present entries attend to each
    other.

    Args:
        K: size of the alphabet.
        num_params: numbers for each entry of the output.
        dim: longest sequence.
        size: see `TransformerSize`.
    """

    def __init__(
        self,
        K: int,
        num_params: int,
        dim: int,
        size: TransformerSize = TransformerSize(),
    ) -> None:
        """See the class."""
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, found {dim}")
        self.K, self.dim, self.size, window = K, dim, size, size.window
        self._rotation: Memo[Tensor] = Memo()
        patterns = ngrams(window, window, size.ngram_size)
        self.embed = Neighbours(
            K,
            size.hidden_size,
            2 * window + 1,
            [[window + offset for offset in pattern] for pattern in patterns],
            size.ngram_rows,
            extra=2 * GAPS,
            ngram_dropout=size.ngram_dropout,
        )
        self.blocks = size.blocks()
        self.norm = nn.LayerNorm(size.hidden_size, bias=False)
        self.head = nn.Linear(size.hidden_size, num_params)
        initialize(self, size.num_hidden_layers)
        self.counted = Counted.of(size, K, both_sides=True)

    def forward(self, x: Tensor, known: Tensor, context: Context | None = None) -> Tensor:
        """Parameters (batch, n, num_params) of every entry given the known ones.

        Args:
            x: symbols, int64 ``(batch, n)``, or one-hot rows ``(batch, n, K)``, with ``n <= dim``; entries
                that are not known are never read.
            known: bool ``(batch, n)``.
            context: lengths, or None.
        """
        lengths = only_lengths(context, len(x))
        n = x.shape[1]
        if n > self.dim:
            raise ValueError(f"the sequence has {n} entries, the network at most {self.dim}")
        line = torch.arange(n, device=x.device)
        mask = None
        if lengths is not None:
            present = line < lengths[:, None]
            known = known & present
            # A row without a single visible key would be undefined; every entry sees itself.
            mask = (present[:, None] | torch.eye(n, dtype=torch.bool, device=x.device))[:, None]
        symbols = (x.argmax(-1) if x.is_floating_point() else x).masked_fill(~known, self.K)
        window = self.size.window
        read = F.pad(symbols, (window, window), value=self.K).unfold(1, 2 * window + 1, 1)
        h: Tensor = self.embed(read, gap_classes(known) + self.embed.extra_row)
        if x.is_floating_point():
            # The inference mode's sum to the last bit, with a gradient.
            sources = line[:, None] + torch.arange(-window, window + 1, device=x.device)
            sources = sources.masked_fill((sources < 0) | (sources >= n), n)
            h = h + self.embed.gradient_of(torch.where(known[..., None], x, 0.0), sources)
        rotation = self._rotations(line, h.dtype)
        for block in self.blocks:
            h = block(h, rotation, mask)
        h = self.norm(h)
        out: Tensor = self.head(h)
        if self.counted is not None:
            out = self.counted(out, neighbours(symbols, self.counted.offsets, self.K), h)
        return out

    def _rotations(self, line: Tensor, dtype: torch.dtype) -> Tensor:
        """The rotations of the first positions, a slice of those of all positions, which are made once."""
        whole = torch.arange(self.dim, device=line.device)
        whole_rotation = self._rotation(
            lambda: rotations(whole, whole, self.size.head_size, dtype), key=(line.device, dtype)
        )
        return whole_rotation[: len(line)]
