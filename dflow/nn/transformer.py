"""The group-causal Transformer: one pass scores a sequence, G calls draw it; causal is a special case.

It is independent of flows: symbols in, ``num_params`` numbers an entry out. Its first layer reads a window of
neighbouring symbols: without that locality bidirectional networks stay at the unigram entropy for a thousand
steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, only_lengths
from dflow.nn.attention import Block, TransformerSize, initialize, ngrams, rotated
from dflow.nn.counted import Counted
from dflow.nn.embed import Neighbours
from dflow.nn.plans import GAPS, Plan, Reach, Reading, make_plan
from dflow.ops.devices import all_moved
from dflow.ops.memo import Memo, OnCpu
from dflow.ops.orders import check_order


@dataclass
class _BlockWeights:
    """The parameters of one block as `GroupCausalTransformer.step` reads them."""

    norm_attention: Tensor
    qkv: Tensor
    out: Tensor
    norm_mlp: Tensor
    up: Tensor
    down: Tensor


@dataclass
class State:
    """What a `GroupCausalTransformer` remembers between the steps of one draw.

    Attributes:
        batch: sequences.
        plan: the order that is walked.
        lengths: (batch, 1), or None.
        symbols: the symbols drawn so far, (batch, dim + 1); K where there is no symbol yet.
        weights: the parameters of each block.
        keys: keys of each block, (batch, heads, slots, head), filled up to the present call.
        values: values of each block, in the same way.
        hidden: features of the slots of the present call.
        first: the first of these slots.
        row: number of steps so far.
        read: slots that were read before the first step, see `GroupCausalTransformer.read`.
        even: whether each call attends to the slots of the whole plan, those to come with the weight 0. Then
            calls of one width give an entry the same bits wherever they begin, see `dflow.core.AheadNet`.
    """

    batch: int
    plan: Plan
    lengths: Tensor | None
    symbols: Tensor
    weights: list[_BlockWeights]
    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor
    first: int = 0
    row: int = 0
    read: int = 0
    even: bool = False


class Inner(nn.Module):
    """Joins the features of a slot with symbols drawn later in its block: a perceptron, no attention."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """Sizes as in `Block`."""
        super().__init__()
        self.read = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, h: Tensor, read: Tensor) -> Tensor:
        """``h`` and ``read`` (..., hidden): features of the slot, and of the symbols around the entry."""
        h = h + self.read(read)
        out: Tensor = h + self.down(F.relu(self.up(self.norm(h))).square())
        return out


class GroupCausalTransformer(nn.Module):
    """A Transformer that scores a whole sequence in one pass and draws it in G calls.

    With an order ``(R, S)`` (see `dflow.ops.orders`) and blocks of one row, every slot (g, s) predicts the
    entry at ``order[g, s]``. It reads the symbols of earlier rows that stand next to it, on either side, and
    the last one of its lane, and attends to all slots of groups up to its own, in every lane. The output for
    a position depends on symbols of strictly earlier rows only. With one lane it is the causal Transformer.

    With blocks of m rows a slot predicts m entries of its lane. The first is predicted as before; for each
    further one a small perceptron (`Inner`) joins the slot's features with the symbols that are drawn around
    the entry by then. It models the dependence inside a group at a small fraction of the cost of a call.

    No parameter belongs to an order: a slot sees only which symbols around an entry are known, so that the
    network can walk any order, in blocks of as many rows as it was built for or of fewer (`plan`).

    Args:
        K: size of the alphabet.
        num_params: numbers for each entry of the output.
        order: int64 ``(R, S)``, the order walked unless another plan is given.
        dim: longest sequence.
        size: see `TransformerSize`; ``window`` counts symbols before an entry, and n-grams may lie before the
            entry, after it or around it.
        block: rows of the order that one call predicts, at most.
        ahead: how many symbols after an entry are read directly, where an order draws any of them earlier;
            default ``window`` if the order has several lanes, else 0.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).
    """

    order: Tensor
    offsets: Tensor
    size: TransformerSize

    ahead_cost = 0.11

    def __init__(
        self,
        K: int,
        num_params: int,
        order: Tensor,
        dim: int,
        size: TransformerSize = TransformerSize(),
        *,
        block: int = 1,
        ahead: int | None = None,
        zero_head: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        check_order(order, dim)
        ahead = (size.window if order.shape[1] > 1 else 0) if ahead is None else ahead
        if block < 1 or ahead < 0:
            raise ValueError(f"block {block} must be at least 1, ahead {ahead} at least 0")
        self.K, self.dim, self.block, self.size = K, dim, block, size
        self._plan: Memo[Plan] = Memo()
        self._offsets_on_cpu = OnCpu()
        self.register_buffer("order", order.clone())
        self.register_buffer(
            "offsets", torch.tensor([*range(-1, -size.window - 1, -1), *range(1, ahead + 1)])
        )
        offsets = self.offsets.tolist()
        # The last columns hold the symbols that the lane drew last. Without symbols ahead the nearest known
        # symbol is always the one before, so that distances are not read.
        self.gaps = ahead > 0
        patterns = ngrams(size.window, ahead, size.ngram_size)
        self.embed = Neighbours(
            K,
            size.hidden_size,
            len(offsets) + block,
            [[offsets.index(offset) for offset in pattern] for pattern in patterns],
            size.ngram_rows,
            extra=2 * GAPS if self.gaps else 0,
            ngram_dropout=size.ngram_dropout,
        )
        self.blocks = size.blocks()
        self.inner = Inner(size.hidden_size, size.inner_size) if block > 1 else None
        self.norm = nn.LayerNorm(size.hidden_size, bias=False)
        self.head = nn.Linear(size.hidden_size, num_params)
        initialize(self, size.num_hidden_layers)
        if zero_head:
            nn.init.zeros_(self.head.weight)
        self.counted = Counted.of(size, K, ahead > 0, num_params - K)

    def plan(
        self, order: Tensor, known: Tensor | None = None, dim: int | None = None, block: int | None = None
    ) -> Plan:
        """How to walk ``order``, another one, over sequences of ``dim`` entries (default: the network's).

        The positions ``known``, int64 ``(known,)``, are read before the first call, and are not in the order.
        A call predicts ``block`` rows, at most as many as the network was built for, the default.
        """
        gaps_row = self.embed.extra_row if self.gaps else None
        counted = None if self.counted is None else torch.tensor(self.counted.offsets)
        [offsets] = self._offsets_on_cpu.of(self.offsets)
        reach = Reach(self.dim if dim is None else dim, self.block, offsets, gaps_row, counted)
        # On the CPU, which has to know how many there are of everything.
        known = None if known is None else known.cpu()
        rows = self.block if block is None else block
        plan = make_plan(order.cpu(), reach, self.size.head_size, self.norm.weight.dtype, known, rows)
        return all_moved(plan, self.offsets.device)

    def _own_plan(self) -> Plan:
        """The plan of the network's own order, made once for an order and a precision."""
        return self._plan(lambda: self.plan(self.order), self.order, key=self.norm.weight.dtype)

    def _read(self, x: Tensor, symbols: Tensor, reading: Reading) -> Tensor:
        """Features (batch, entries, hidden) of the symbols of ``reading``; K in ``symbols`` is no symbol."""
        h: Tensor = self.embed(symbols[:, reading.sources], reading.gaps)
        if x.is_floating_point():
            # Adds zeros with a gradient: both modes give the same features to the last bit.
            h = h + self.embed.gradient_of(x, reading.sources)
        return h

    def forward(self, x: Tensor, context: Context | None = None, plan: Plan | None = None) -> Tensor:
        """Parameters of every entry, in the order of positions.

        Args:
            x: symbols, int64 ``(batch, n)``, or one-hot rows ``(batch, n, K)``, with ``n <= dim``.
            context: lengths, or None.
            plan: the plan of another order, made by `plan`; default the order of the network.

        Returns:
            ``(batch, n, num_params)``; entry i depends on entries of earlier rows only.
        """
        lengths = only_lengths(context, len(x))
        n = x.shape[1]
        plan = self._own_plan() if plan is None else plan
        dim = plan.dim
        if n > dim:
            raise ValueError(f"the sequence has {n} entries, the network at most {dim}")
        if n < dim:
            # A short sequence is a long one whose other entries are absent.
            short = torch.full((len(x),), n, device=x.device)
            lengths = short if lengths is None else torch.minimum(lengths, short)
        symbols = F.pad(x.argmax(-1) if x.is_floating_point() else x, (0, dim + 1 - n), value=self.K)
        mask = plan.mask
        if lengths is not None:
            absent = torch.arange(dim + 1, device=x.device) >= lengths[:, None]
            symbols = symbols.masked_fill(absent, self.K)
            if x.is_floating_point():
                x = F.pad(x, (0, 0, 0, dim - n)).masked_fill(absent[:, :dim, None], 0.0)
            if not plan.ascending:
                mask = _causal(0, len(plan.least), x.device) if mask is None else mask
                # A row without a single visible key would be undefined; every slot sees itself.
                diagonal = torch.eye(len(plan.least), dtype=torch.bool, device=x.device)
                mask = ((mask & (plan.least < lengths[:, None])[:, None]) | diagonal)[:, None]
        h = self._read(x, symbols, plan.slots)
        for block in self.blocks:
            h = block(h, plan.rotation, mask, mask is None)
        features = h[:, plan.entries[0].slots]
        if self.inner is not None:
            later = self.inner(h[:, plan.later.slots], self._read(x, symbols, plan.later))
            features = torch.cat([features, later], 1)
        features = self.norm(features[:, plan.inverse[:n]])
        out: Tensor = self.head(features)
        if self.counted is not None and plan.around is not None:
            out = self.counted(out, symbols[:, plan.around[:n]], features)
        return out

    def start(self, batch: int, context: Context | None = None, plan: Plan | None = None) -> State:
        """Begin to draw ``batch`` sequences."""
        lengths = only_lengths(context, batch)
        plan = self._own_plan() if plan is None else plan
        dtype, device = self.norm.weight.dtype, self.norm.weight.device
        shape = (batch, self.size.num_attention_heads, len(plan.least), self.size.head_size)
        symbols = torch.full((batch, plan.dim + 1), self.K, device=device)
        if context is not None and context.known is not None:
            symbols[:, plan.known] = context.known.symbols[:, plan.known]
            if lengths is not None:
                symbols[:, plan.known] = symbols[:, plan.known].masked_fill(
                    plan.known >= lengths[:, None], self.K
                )
        return State(
            batch,
            plan,
            None if lengths is None else lengths[:, None],
            symbols,
            [
                _BlockWeights(
                    block.norm_attention.weight,
                    block.attention.qkv.weight,
                    block.attention.out.weight,
                    block.norm_mlp.weight,
                    block.up.weight,
                    block.down.weight,
                )
                for block in cast("list[Block]", list(self.blocks))
            ],
            # Zeros: what a sequence does not see yet has the weight 0, and 0 times it has to be 0.
            [torch.zeros(shape, dtype=dtype, device=device) for _ in self.blocks],
            [torch.zeros(shape, dtype=dtype, device=device) for _ in self.blocks],
            torch.empty(0, dtype=dtype, device=device),
        )

    @torch.no_grad()
    def step(self, x: Tensor | None, state: State) -> Tensor:
        """Parameters (batch, m, num_params) of the next row, given the symbols of the last.

        ``x``, int64 (batch, entries of the last row), is None at the first step; symbols beyond a length are
        ignored. Every ``block`` steps of the plan cost one call of the network.
        """
        plan = state.plan
        if x is not None:
            g, j = divmod(state.row - 1, plan.block)
            drawn = plan.entries[j]
            positions = drawn.positions[drawn.cuts[g] : drawn.cuts[g + 1]]
            if state.lengths is not None:
                x = x.masked_fill(positions >= state.lengths, self.K)
            state.symbols[:, positions] = x
        g, j = divmod(state.row, plan.block)
        state.row += 1
        if j == 0:
            state.first = max(plan.slots.cuts[g], state.read)
            state.hidden = self._call(state, state.first, plan.slots.cuts[g + 1])
        h, entries = state.hidden, plan.entries[j]
        members = slice(entries.cuts[g], entries.cuts[g + 1])
        if members.stop - members.start < h.shape[1]:
            h = h[:, entries.slots[members] - state.first]
        if j and self.inner is not None:
            gaps = None if entries.gaps is None else entries.gaps[members]
            h = self.inner(h, self.embed(state.symbols[:, entries.sources[members]], gaps))
        return self._output(h, state, entries.positions[members])

    @torch.no_grad()
    def groups_ahead(self, number: int, state: State) -> tuple[Tensor, Tensor]:
        """Parameters of all entries of the next groups in one call, given symbols proposed for them.

        The proposed symbols stand in ``state.symbols``, where each entry reads those that the order draws
        before it. `step` goes on from any row of these groups to which ``state.row`` is then set.

        Args:
            number: of groups. The last `step` or call must have ended a group.
            state: the state of the draw.

        Returns:
            Positions of the entries, ``(entries,)``, and their parameters ``(batch, entries, num_params)``.
        """
        plan = state.plan
        g = state.row // plan.block
        state.first = max(plan.slots.cuts[g], state.read)
        state.hidden = h = self._call(state, state.first, plan.slots.cuts[g + number], several=True)

        def members(reading: Reading) -> slice:
            return slice(reading.cuts[g], reading.cuts[g + number])

        rows = members(entries := plan.entries[0])
        features, positions = h[:, entries.slots[rows] - state.first], entries.positions[rows]
        if self.inner is not None and plan.block > 1:
            rows = members(entries := plan.following)
            gaps = None if entries.gaps is None else entries.gaps[rows]
            read = self.embed(state.symbols[:, entries.sources[rows]], gaps)
            later = self.inner(h[:, entries.slots[rows] - state.first], read)
            features = torch.cat([features, later], 1)
            positions = torch.cat([positions, entries.positions[rows]])
        return positions, self._output(features, state, positions)

    def _output(self, h: Tensor, state: State, entries: Tensor | slice) -> Tensor:
        """Parameters of entries at some positions from their features."""
        h = F.layer_norm(h, (self.size.hidden_size,), self.norm.weight)
        out = F.linear(h, self.head.weight, self.head.bias)
        if self.counted is not None and state.plan.around is not None:
            out = self.counted(out, _at(state.symbols, state.plan.around[entries]), h)
        return out

    @torch.no_grad()
    def ahead(self, x: Tensor, begins: Sequence[int], state: State) -> Tensor:
        """Parameters of several entries a sequence in one call, see `dflow.core.AheadNet`.

        The order is one from left to right, and the plan reaches as far as the entries.
        """
        plan, width = state.plan, x.shape[1]
        first, alike = begins[0], len(set(begins)) == 1
        if alike:
            # Before the first symbol there is none, as at the last place of the state.
            places: Tensor | slice = slice(first - 1, first - 1 + width)
            if first:
                state.symbols[:, places] = x
            else:
                state.symbols[:, : width - 1] = x[:, 1:]
            h = self._call(state, first, first + width)
            entries: Tensor | slice = slice(first, first + width)
        else:
            entries = torch.tensor(begins, device=x.device)[:, None] + torch.arange(width, device=x.device)
            state.symbols.scatter_(1, (entries - 1).remainder(plan.dim + 1), x)
            h = self._call(state, min(begins), max(begins) + width, entries)
        return self._output(h, state, entries)

    @torch.no_grad()
    def read(self, x: Tensor, state: State) -> None:
        """Read known symbols in one call, before the first step.

        In an order from left to right they are the first symbols ``x``, int64 ``(batch or 1, p)``, and the
        next `step` is given the last of them. In a plan with known entries they are those of the state, of
        which ``x`` gives the number of rows. One row is read once for the whole batch, whose sequences then
        have no lengths.
        """
        plan, n = state.plan, x.shape[1]
        if not len(plan.known):
            state.symbols[:, : n - 1] = x[:, :-1]
            if state.lengths is not None:
                line = torch.arange(n - 1, device=x.device)
                state.symbols[:, : n - 1].masked_fill_(line >= state.lengths, self.K)
            state.row = n
        state.read = len(plan.known) or plan.slots.cuts[n]
        if len(x) == state.batch:
            self._call(state, 0, state.read)
            return
        # The first sequence of the batch, as views into its state.
        keys, values = ([t[:1] for t in tensors] for tensors in (state.keys, state.values))
        first = replace(state, batch=1, symbols=state.symbols[:1], keys=keys, values=values)
        self._call(first, 0, state.read)
        for tensor in (*state.keys, *state.values):
            tensor[1:, :, : state.read] = tensor[:1, :, : state.read]

    def _call(
        self, state: State, begin: int, end: int, slots: Tensor | None = None, several: bool = False
    ) -> Tensor:
        """Features (batch, slots, hidden) of the slots of the next group, or of ``several`` groups.

        Where the sequences are at different slots, these are in ``slots``, (batch, width), between begin and
        end. The blocks are written out with as few operations as possible: for one sequence the overhead of
        each operation, not its arithmetic, takes most of the time.
        """
        size, plan, batch = self.size.hidden_size, state.plan, state.batch
        width = end - begin if slots is None else slots.shape[1]
        heads, head, norm = self.size.num_attention_heads, self.size.head_size, (size,)
        # The last bits of a sum depend on the number of its terms.
        stop = len(plan.least) if state.even else end
        present = slice(begin, end) if slots is None else slots
        gaps = None if plan.slots.gaps is None else plan.slots.gaps[present]
        h: Tensor = self.embed(_at(state.symbols, plan.slots.sources[present]), gaps).flatten(0, 1)
        mask = None
        if state.lengths is not None and not plan.ascending:
            diagonal = torch.zeros(width, end, dtype=torch.bool, device=h.device)
            diagonal[:, begin:].fill_diagonal_(True)
            mask = (plan.least[:end] < state.lengths)[:, None, None] | diagonal
        if slots is not None:
            mask = slots[:, None, :, None] >= torch.arange(end, device=h.device)
            rows = torch.arange(batch, device=h.device)[:, None]
        elif several or (
            (width > 1 or state.even) and (plan.mask is None or (begin == 0 and len(plan.known)))
        ):
            # Several groups, or known entries and the first group, in one call.
            seen = _causal(begin, end, h.device, stop) if plan.mask is None else plan.mask[begin:end, :end]
            mask = seen if mask is None else mask & (seen | diagonal)
        rotation = plan.rotation[present]
        for w, keys, values in zip(state.weights, state.keys, state.values, strict=True):
            qkv = _product(F.layer_norm(h, norm, w.norm_attention), w.qkv)
            qk = rotated(qkv[:, : 2 * size].view(batch, width, 2, heads, head), rotation)
            qk = qk.flatten(2, 3).transpose(1, 2)
            value = qkv[:, 2 * size :].view(batch, width, heads, head)
            if slots is None:
                keys[:, :, begin:end] = qk[:, heads:]
                values[:, :, begin:end] = value.transpose(1, 2)
            else:
                keys[rows, :, slots] = qk[:, heads:].transpose(1, 2)
                values[rows, :, slots] = value
            out = F.scaled_dot_product_attention(
                qk[:, :heads], keys[:, :, :stop], values[:, :, :stop], attn_mask=mask
            )
            h = _product(out.transpose(1, 2).reshape(-1, size), w.out, h)
            up = _product(F.layer_norm(h, norm, w.norm_mlp), w.up).relu_()
            h = _product(up.mul_(up), w.down, h)
        return h.view(batch, width, size)


def _causal(begin: int, end: int, device: torch.device, stop: int | None = None) -> Tensor:
    """Mask of the slots from ``begin`` to before ``end``, which see those before them and themselves.

    It has a column for each slot before ``stop``, by default the end.
    """
    line = torch.arange(end if stop is None else stop, device=device)
    return line[begin:end, None] >= line


def _at(symbols: Tensor, places: Tensor) -> Tensor:
    """Symbols (batch, entries, columns) at places (entries, columns), or (batch, entries, columns)."""
    if places.ndim == 2:
        return symbols[:, places]
    return symbols.gather(1, places.flatten(1)).view(places.shape)


def _product(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """``plus + x @ weight.T``; for one row a matrix-vector product is faster than a matrix product."""
    if len(x) == 1:
        vector = x.view(-1)
        out = torch.mv(weight, vector) if plus is None else torch.addmv(plus.view(-1), weight, vector)
        return out.view(1, -1)
    return F.linear(x, weight) if plus is None else torch.addmm(plus, x, weight.t())
