"""The regularised LSTM of Merity et al. as a sequence net: the baseline of comparisons."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dflow.core import Context, only_lengths
from dflow.nn.counted import Counted, neighbours
from dflow.nn.recompute import Recomputable
from dflow.ops.counts import patterns_of
from dflow.ops.lookup import lookup
from dflow.ops.precision import full_precision, without_float16
from dflow.ops.recent import LOOK_BACK, Recent


def locked_dropout(x: Tensor, rate: float) -> Tensor:
    """Variational dropout: one mask a row, shared by all positions of ``(batch, dim, features)``.

    Source: Gal and Ghahramani 2016, arXiv 1512.05287.
    """
    if rate == 0:
        return x
    mask = torch.empty_like(x[:, :1]).bernoulli_(1 - rate).div_(1 - rate)
    return x * mask


@dataclass
class _LstmWeights:
    """The weights in the layout of `LSTM.step`, and a copy of the parameters that they were computed from."""

    snapshot: list[Tensor]
    table: Tensor
    recurrent: list[Tensor]
    biases: list[Tensor]


@dataclass
class Carried:
    """Where `LSTM.carry` stops reading a sequence.

    Attributes:
        before: vector of the last symbol, ``(batch, 1, embedding_size)``.
        states: hidden and cell state of each layer, ``(1, batch, hidden_size)``.
        recent: the last symbols, ``(batch, counts)``; K at places without a symbol.
    """

    before: Tensor
    states: list[tuple[Tensor, Tensor]]
    recent: Tensor


@dataclass
class _Past:
    """What `LSTM.ahead` has read of late.

    Attributes:
        states: hidden states and cells of all layers before each of the last entries, (batch, `LOOK_BACK`,
            2 * layers * hidden_size), in a ring: entry i is at place ``i % LOOK_BACK``.
        recent: the symbols before each, or None where nothing is counted.
    """

    states: Tensor
    recent: Recent | None


@dataclass
class _LstmState:
    """Tensors that a step reads and writes in place; the views are made once, not at every step."""

    weights: _LstmWeights
    start: Tensor
    inputs: list[Tensor]
    hidden: list[Tensor]
    cells: list[Tensor]
    gates: Tensor
    sigmoids: Tensor
    parts: tuple[Tensor, ...]
    activated: Tensor
    recent: Tensor
    past: _Past | None = None


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name}={rate} must be in [0, 1)")


class LSTM(Recomputable):
    r"""Autoregressive LSTM with the regularisation of AWD-LSTM.

    The parameters at position i depend on ``x[:, :i]`` only; a learned vector stands before the first symbol.
    In training, DropConnect acts on the hidden-to-hidden weights, locked dropout on the input of the first
    layer, between layers and on the output, and whole symbols are dropped from the embedding. The full pass
    runs on the fused kernels of torch; `step` has the cheapest form that was measured on a CPU: the first
    layer's input product is read from a table of symbols, the hidden states of all layers lie side by side
    so that a layer's input and its own state are one slice and one product, and everything is in place.

    Absent entries (those at or beyond the ``lengths`` in ``context``) come after all present ones and so
    influence none of them.

    Args:
        K: symbols.
        num_params: numbers given for each entry.
        hidden_size: width of each layer.
        num_layers: layers.
        embedding_size: width of the symbols' vectors.
        dropout: locked dropout on the output.
        dropout_hidden: locked dropout between layers.
        dropout_input: locked dropout on the embedded symbols.
        dropout_embedding: rate at which symbols are dropped from the embedding.
        weight_drop: DropConnect rate of the hidden-to-hidden weights.
        tied: share the embedding with the output (Press and Wolf 2017, arXiv 1608.05859); needs
            ``num_params == K`` and ``embedding_size == hidden_size``.
        counts: longest context of counts of the training text, see `dflow.nn.counted`; 0 for none.
        counts_dropout: share of the entries for which nothing is counted in training.

    Raises:
        ValueError: A size below 1, a rate outside [0, 1), or ``tied`` with sizes that differ.

    Source: Merity, Keskar and Socher 2018, arXiv 1708.02182 (words) and 1803.08240 (characters).

    >>> net = LSTM(K=5, num_params=5, hidden_size=8, num_layers=2, embedding_size=4)
    >>> net(torch.tensor([[0, 3, 1]])).shape
    torch.Size([1, 3, 5])
    """

    #: The entries are computed one after another.
    ahead_cost = 0.85

    def __init__(
        self,
        K: int,
        num_params: int,
        hidden_size: int = 512,
        num_layers: int = 2,
        embedding_size: int = 128,
        dropout: float = 0.1,
        dropout_hidden: float = 0.1,
        dropout_input: float = 0.0,
        dropout_embedding: float = 0.0,
        weight_drop: float = 0.1,
        tied: bool = False,
        counts: int = 0,
        counts_dropout: float = 0.0,
    ) -> None:
        """See the class."""
        super().__init__()
        _check_sizes(K=K, num_params=num_params, hidden_size=hidden_size, num_layers=num_layers)
        _check_sizes(embedding_size=embedding_size)
        _check_rates(dropout=dropout, dropout_hidden=dropout_hidden, dropout_input=dropout_input)
        _check_rates(dropout_embedding=dropout_embedding, weight_drop=weight_drop)
        if tied and (num_params != K or embedding_size != hidden_size):
            raise ValueError(
                f"tied needs num_params == K and embedding_size == hidden_size, not {num_params} and {K}, "
                f"{embedding_size} and {hidden_size}"
            )
        self.K, self.num_params, self.hidden_size = K, num_params, hidden_size
        self.dropout, self.dropout_hidden, self.dropout_input = dropout, dropout_hidden, dropout_input
        self.dropout_embedding, self.weight_drop = dropout_embedding, weight_drop
        self.embedding = nn.Parameter(torch.empty(K, embedding_size).uniform_(-0.1, 0.1))
        self.before = nn.Parameter(torch.empty(embedding_size).uniform_(-0.1, 0.1))
        widths = [embedding_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(nn.LSTM(width, hidden_size, batch_first=True) for width in widths)
        for layer in self._layers():
            _, _, *biases = layer.all_weights[0]
            for bias in biases:
                nn.init.zeros_(bias)
            # A forget gate that starts open keeps the gradient over long spans (Jozefowicz et al. 2015).
            nn.init.ones_(biases[0].data[hidden_size : 2 * hidden_size])
        self.head = nn.Linear(hidden_size, num_params)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        if tied:
            self.head.weight = self.embedding
        self.counts = counts
        self.counted = (
            Counted(K, hidden_size, *patterns_of(counts, False), counts_dropout) if counts else None
        )
        self._laid_out: _LstmWeights | None = None

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters ``(batch, dim, num_params)`` of every entry, in one pass.

        Args:
            x: symbols, int64 ``(batch, dim)``, or one-hot rows, floating ``(batch, dim, K)``.
            context: lengths, or None; changes nothing, see the class.
        """
        only_lengths(context, len(x))
        weight: Tensor = self.embedding
        if self.training and self.dropout_embedding:
            keep = 1 - self.dropout_embedding
            weight = weight * torch.empty_like(weight[:, :1]).bernoulli_(keep).div_(keep)
        before = self.before.expand(x.shape[0], 1, -1)
        h = torch.cat([before, lookup(x[:, :-1], weight)], 1)[:, : x.shape[1]]
        if self.training:
            h = locked_dropout(h, self.dropout_input)
        for i, layer in enumerate(self._layers()):
            if self.training and i:
                h = locked_dropout(h, self.dropout_hidden)
            rate = self.weight_drop if self.training else 0.0
            h, _ = self.recomputed(self._run, layer, h, None, rate)
        if self.training:
            h = locked_dropout(h, self.dropout)
        out: Tensor = self.head(h)
        if self.counted is not None:
            symbols = x.argmax(-1) if x.is_floating_point() else x
            out = self.counted(out, neighbours(symbols, self.counted.offsets, self.K), h)
        return out

    def carry(self, x: Tensor, carried: Carried | None = None) -> tuple[Tensor, Carried]:
        """`forward` in evaluation mode, for a sequence that is read piece by piece.

        Args:
            x: the next symbols, int64 ``(batch, n)``, n at least 1.
            carried: the second result for the piece before; None at the beginning of the sequence.

        Returns:
            Parameters ``(batch, n, num_params)`` of the entries of the piece, given all symbols before each,
            and where it stops.

        Raises:
            ValueError: training mode, whose dropout would differ from piece to piece.
        """
        if self.training:
            raise ValueError("a sequence is read piece by piece in evaluation mode; call eval() first")
        zeros = self.before.new_zeros(1, len(x), self.hidden_size)
        if carried is None:
            states = [(zeros, zeros)] * len(self.layers)
            recent = x.new_full((len(x), self.counts), self.K)
            carried = Carried(self.before.expand(len(x), 1, -1), states, recent)
        vectors = lookup(x, self.embedding)
        h, states = torch.cat([carried.before, vectors[:, :-1]], 1), []
        for layer, state in zip(self._layers(), carried.states, strict=True):
            h, state = self._run(layer, h, state)
            states.append(state)
        out: Tensor = self.head(h)
        symbols = torch.cat([carried.recent, x], 1)
        if self.counted is not None:
            around = neighbours(symbols, self.counted.offsets, self.K)[:, self.counts :]
            out = self.counted(out, around, h)
        return out, Carried(vectors[:, -1:], states, symbols[:, x.shape[1] :])

    def _layers(self) -> list[nn.LSTM]:
        return cast("list[nn.LSTM]", list(self.layers))

    def _run(
        self,
        layer: nn.LSTM,
        h: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        dropout: float = 0.0,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One layer over all positions, by the fused kernel; ``state`` before and after, zeros by default.

        ``dropout`` is the rate of DropConnect on the hidden-to-hidden weights.
        """
        ih, hh, *biases = layer.all_weights[0]
        dropped = nn.functional.dropout(hh, dropout) if dropout else hh
        zeros = h.new_zeros(1, h.shape[0], self.hidden_size)
        with warnings.catch_warnings():
            # cuDNN packs the weights anew at each call, which cannot be avoided: dropout changes them.
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
            # The kernel's training flag only keeps what a gradient needs; its own dropout is 0.
            keep = torch.is_grad_enabled()
            # The kernel of CPUs has no float16.
            with without_float16(h) if h.device.type == "cpu" else nullcontext():
                out, hidden, cell = torch.lstm(
                    h, state or (zeros, zeros), [ih, dropped, *biases], True, 1, 0.0, keep, False, True
                )
        return out, (hidden, cell)

    def start(self, batch: int, context: Context | None = None) -> _LstmState:
        """State before the first `step` of ``batch`` sequences."""
        only_lengths(context, batch)
        # Tensors made in inference mode could not be updated outside of it, so they are made outside.
        with torch.inference_mode(False), torch.no_grad():
            weights = self._layout()
            size, layers = self.hidden_size, len(self.layers)
            new = weights.table.new_zeros
            hidden, gates = new(batch, layers * size), new(batch, 4 * size)
            i, f, o, g = gates.chunk(4, 1)
            return _LstmState(
                weights=weights,
                start=torch.full((batch,), self.K, device=hidden.device),
                inputs=[hidden[:, max(i - 1, 0) * size : (i + 1) * size] for i in range(layers)],
                hidden=list(hidden.chunk(layers, 1)),
                cells=[new(batch, size) for _ in range(layers)],
                gates=gates,
                sigmoids=gates[:, : 3 * size],
                parts=(i, f, o, g),
                activated=new(batch, size),
                recent=torch.full((batch, self.counts), self.K, device=hidden.device),
            )

    @torch.no_grad()
    def step(self, x: Tensor | None, state: _LstmState) -> Tensor:
        """Parameters ``(batch, 1, num_params)`` of the next entry; ``state`` is updated in place.

        Args:
            x: None at the first call, else the symbols just drawn, int64 ``(batch, 1)``.
            state: from `start`.
        """
        weights, gates, (i, f, o, g) = state.weights, state.gates, state.parts
        symbols = state.start if x is None else x.flatten()
        for n, (h, w, c) in enumerate(zip(state.inputs, weights.recurrent, state.cells, strict=True)):
            bias = weights.biases[n] if n else weights.table.index_select(0, symbols)
            torch.addmm(bias, h, w, out=gates)
            state.sigmoids.sigmoid_()
            g.tanh_()
            c.mul_(f).addcmul_(i, g)
            torch.tanh(c, out=state.activated)
            torch.mul(o, state.activated, out=state.hidden[n])
        out: Tensor = self.head(state.hidden[-1])
        if self.counted is not None:
            state.recent = torch.cat([state.recent[:, 1:], symbols[:, None]], 1)
            out = self.counted(out, state.recent, state.hidden[-1])
        return out[:, None]

    @torch.no_grad()
    def ahead(self, x: Tensor, begins: Sequence[int], state: _LstmState) -> Tensor:
        """Parameters of several entries a sequence in one call, see `dflow.core.AheadNet`.

        The states before the last entries are kept, so that it can go back to them.
        """
        # In the precision of the weights, as `step`, whose operations in place know no autocast.
        with full_precision(state.weights.table):
            return self._ahead(x, begins, state)

    def _ahead(self, x: Tensor, begins: Sequence[int], state: _LstmState) -> Tensor:
        width, weights, first = x.shape[1], state.weights, torch.tensor(begins, device=x.device)
        if state.past is None:
            state.past = self._past(state, begins[0])
        rows = torch.arange(len(x), device=x.device)[:, None]
        places = (first[:, None] + torch.arange(width + 1, device=x.device)) % LOOK_BACK
        before = state.past.states[rows[:, 0], places[:, 0]]
        hidden, cells = (part.split(self.hidden_size, 1) for part in before.chunk(2, 1))
        gates = weights.table[x]
        kept_hidden: list[Tensor] = []
        kept_cells: list[Tensor] = []
        for n, (h, c) in enumerate(zip(hidden, cells, strict=True)):
            recurrent = weights.recurrent[n]
            if n:
                # What comes from the layer below is one product for all entries; what comes from the entry
                # before is not.
                below = kept_hidden[-1].flatten(0, 1)
                gates = torch.addmm(weights.biases[n], below, recurrent[: self.hidden_size])
                gates, recurrent = gates.view(len(x), width, -1), recurrent[self.hidden_size :]
            states = _follow(gates, h, c, recurrent)
            kept_hidden.append(states[0])
            kept_cells.append(states[1])
        state.past.states[rows, places[:, 1:]] = torch.cat([*kept_hidden, *kept_cells], -1)
        out: Tensor = self.head(kept_hidden[-1])
        if self.counted is not None and state.past.recent is not None:
            out = self.counted(out, state.past.recent(x, first), kept_hidden[-1])
        return out

    def _past(self, state: _LstmState, begin: int) -> _Past:
        """The state before the first call of `ahead`."""
        with torch.inference_mode(False), torch.no_grad():
            now = torch.cat([*state.hidden, *state.cells], 1)
            states = now.new_zeros(len(now), LOOK_BACK, now.shape[1])
            states[:, begin % LOOK_BACK] = now
        return _Past(states, Recent(state.recent, begin) if self.counts else None)

    @torch.no_grad()
    def read(self, x: Tensor, state: _LstmState) -> None:
        """Read the first symbols ``x``, int64 ``(batch or 1, p)``, in one call, before the first step.

        One row is read once for the whole batch. The next `step` is given the last symbol.
        """
        h = torch.cat([self.before.expand(len(x), 1, -1), lookup(x[:, :-1], self.embedding)], 1)
        before = x[:, :-1].expand(len(state.recent), -1)
        state.recent = torch.cat([state.recent, before], 1)[:, before.shape[1] :]
        for n, layer in enumerate(self._layers()):
            h, (hidden, cell) = self._run(layer, h)
            state.hidden[n].copy_(hidden[0].expand_as(state.hidden[n]))
            state.cells[n].copy_(cell[0].expand_as(state.cells[n]))

    def _layout(self) -> _LstmWeights:
        """The weights in the layout of `step`, computed anew only when a parameter has changed."""
        parameters = [*self.parameters()]
        old = self._laid_out
        if (
            old is not None
            and old.table.device == parameters[0].device
            and old.table.dtype == parameters[0].dtype
            and all(torch.equal(a, b) for a, b in zip(old.snapshot, parameters, strict=True))
        ):
            return old
        # torch has the gates as i, f, g, o; with i, f, o, g one sigmoid serves three.
        i, f, g, o = torch.arange(4 * self.hidden_size, device=self.before.device).chunk(4)
        order = torch.cat([i, f, o, g])
        recurrent, biases = [], []
        for n, layer in enumerate(self._layers()):
            ih, hh, b_ih, b_hh = layer.all_weights[0]
            recurrent.append((torch.cat([ih, hh], 1) if n else hh)[order].t().contiguous())
            biases.append((b_ih + b_hh)[order])
        input_weight = self._layers()[0].all_weights[0][0][order]
        with full_precision(input_weight):
            table = torch.addmm(biases[0], torch.cat([self.embedding, self.before[None]]), input_weight.t())
        snapshot = [p.detach().clone() for p in parameters]
        self._laid_out = _LstmWeights(snapshot, table, recurrent, biases)
        return self._laid_out


def _follow(gates: Tensor, hidden: Tensor, cell: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and cells of one layer, (batch, width, size) each.

    Args:
        gates: the gates i, f, o, g without what comes from the entry before, (batch, width, 4 * size).
        hidden: state before the first entry, (batch, size).
        cell: the same of the cells.
        recurrent: (size, 4 * size).
    """
    size, states, cells = hidden.shape[1], [], []
    for gate in gates.unbind(1):
        gate = torch.addmm(gate, hidden, recurrent)
        i, f, o = gate[:, : 3 * size].sigmoid_().chunk(3, 1)
        cell = (cell * f).addcmul_(i, gate[:, 3 * size :].tanh_())
        hidden = o * cell.tanh()
        states.append(hidden)
        cells.append(cell)
    return torch.stack(states, 1), torch.stack(cells, 1)
