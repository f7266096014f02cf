"""Bidirectional Transformers: hidden entries given known ones, in a fixed pattern or in any pattern.

They are independent of flows: symbols in, ``num_params`` numbers an entry out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, only_lengths
from dflow.nn.attention import TransformerSize, initialize, ngrams, rotations
from dflow.nn.counted import Counted, neighbours
from dflow.nn.embed import Neighbours
from dflow.nn.plans import FAR, GAPS, buckets
from dflow.ops.memo import Memo


class InfillTransformer(nn.Module):
    """Parameters of hidden entries given known ones: the conditioner of a coupling.

    Every hidden entry reads the ``window`` nearest known symbols on each side, in place of a convolution over
    a grid with holes. The layers then attend among the hidden entries, which together have read every known
    symbol. Nothing is computed for known entries.

    Args:
        K: size of the alphabet.
        num_params: numbers for each hidden entry.
        known, hidden: int64 ``(n_known,)`` and ``(n_hidden,)``: positions in the whole sequence, sorted.
        size: see `TransformerSize`; ``window`` counts known symbols.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).
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
    ) -> None:
        """See the class."""
        super().__init__()
        if len(known) < 1 or len(hidden) < 1:
            raise ValueError(
                f"an infilling network needs known and hidden entries, found {len(known)} and {len(hidden)}"
            )
        self.K, self.size, window = K, size, size.window
        self.register_buffer("known", known.clone())
        self.register_buffer("hidden", hidden.clone())
        right = torch.searchsorted(known, hidden)[:, None]
        reach = torch.arange(window)
        neighbours = torch.cat([right - 1 - reach, right + reach], 1)
        outside = (neighbours < 0) | (neighbours >= len(known))
        self.register_buffer("neighbours", neighbours.masked_fill(outside, len(known)))
        # Column j: the known symbol j + 1 places before the entry; column window + j: j + 1 places after it.
        columns = [
            [-o - 1 if o < 0 else window + o - 1 for o in pattern]
            for pattern in ngrams(window, window, size.ngram_size)
        ]
        self.embed = Neighbours(
            K,
            size.hidden_size,
            2 * window,
            columns,
            size.ngram_rows,
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

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters (batch, n_hidden, num_params) given the known symbols or rows ``x``.

        Args:
            x: int64 ``(batch, n_known)`` or one-hot rows ``(batch, n_known, K)``.
            context: lengths of whole sequences, or None.
        """
        lengths = only_lengths(context, len(x))
        symbols = x.argmax(-1) if x.is_floating_point() else x
        mask = None
        if lengths is not None:
            symbols = symbols.masked_fill(self.known >= lengths[:, None], self.K)
            present = self.hidden < lengths[:, None]
            diagonal = torch.eye(len(self.hidden), dtype=torch.bool, device=x.device)
            mask = (present[:, None] | diagonal)[:, None]
        h: Tensor = self.embed(F.pad(symbols, (0, 1), value=self.K)[:, self.neighbours])
        if x.is_floating_point():
            rows = torch.where((symbols != self.K)[..., None], x, 0.0)
            h = h + self.embed.gradient_of(rows, self.neighbours)
        h = h + self.mix(F.gelu(h, approximate="tanh"))
        rotation = rotations(self.hidden, self.hidden, self.size.head_size, h.dtype)
        for block in self.blocks:
            h = block(h, rotation, mask)
        out: Tensor = self.head(self.norm(h))
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
        h: Tensor = self.embed(read, self._gaps(known))
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

    def _gaps(self, known: Tensor) -> Tensor:
        """Rows of the embedding (batch, n, 2) for the distances to the nearest known entries, either side."""
        line = torch.arange(known.shape[1], device=known.device)
        last = torch.where(known, line, -FAR).cummax(1).values
        following = torch.where(known, line, FAR).flip(1).cummin(1).values.flip(1)
        before = line - F.pad(last[:, :-1], (1, 0), value=-FAR)
        after = F.pad(following[:, 1:], (0, 1), value=FAR) - line
        rows = self.embed.extra_row + torch.tensor([0, GAPS], device=known.device)
        return buckets(torch.stack([before, after], -1)) + rows

    def _rotations(self, line: Tensor, dtype: torch.dtype) -> Tensor:
        """The rotations of the first positions, a slice of those of all positions, which are made once."""
        whole = torch.arange(self.dim, device=line.device)
        whole_rotation = self._rotation(
            lambda: rotations(whole, whole, self.size.head_size, dtype), key=(line.device, dtype)
        )
        return whole_rotation[: len(line)]
