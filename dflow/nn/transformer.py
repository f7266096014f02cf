"""Transformers: group-causal (causal is its special case), infilling and masked (both bidirectional).

They know nothing of flows: symbols in, ``num_params`` numbers an entry out. Positions are rotary (Su et al.
2021, arXiv 2104.09864), blocks are pre-norm with squared rectifiers (So et al. 2021, arXiv 2109.08668), and
all start with a window over neighbouring symbols: without that locality bidirectional nets stay at the
unigram entropy for a thousand steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.core import Context, only_lengths
from dflow.nn.embed import Neighbours
from dflow.ops.memo import Memo
from dflow.ops.orders import check_order


class Attention(nn.Module):
    """Multi-head attention with rotary positions; queries and keys may stand at different positions."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        """``hidden_size`` must be a multiple of ``2 * num_heads``."""
        super().__init__()
        if num_heads < 1 or hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of twice the number of heads {num_heads}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        h: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        causal: bool = False,
    ) -> Tensor:
        """``h`` (batch, n, hidden); ``rotation`` complex (n, 2, 1, head/2), for queries and keys."""
        qkv = self.qkv(h).unflatten(-1, (3, self.num_heads, -1))
        qk = qkv[:, :, :2]
        real = torch.promote_types(qk.dtype, torch.float32)
        pairs = torch.view_as_complex(qk.to(real).unflatten(-1, (-1, 2)))
        qk = torch.view_as_real(pairs * rotation).flatten(-2).to(qkv.dtype)
        q, k, v = (t.transpose(1, 2) for t in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
        # No dropout of the weights: it would take the fused kernel away, six times the time on a CPU.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return F.linear(out.transpose(1, 2).flatten(2), self.out.weight)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a residual path."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, dropout: float = 0.0
    ) -> None:
        """Sizes as in `Attention`; ``intermediate_size``: the perceptron's; ``dropout``: of what both add."""
        super().__init__()
        self.norm_attention = nn.LayerNorm(hidden_size, bias=False)
        self.attention = Attention(hidden_size, num_heads)
        self.norm_mlp = nn.LayerNorm(hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        h: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        causal: bool = False,
    ) -> Tensor:
        """Shapes as in `Attention.forward`."""
        h = h + self.dropout(self.attention(self.norm_attention(h), rotation, mask, causal))
        out: Tensor = h + self.dropout(self.down(F.relu(self.up(self.norm_mlp(h))).square()))
        return out


def _initialize(module: nn.Module, num_layers: int) -> None:
    """Scale of GPT-2: normal(0.02), residual outputs smaller by sqrt(2 layers)."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            residual = name.endswith(("attention.out", "down"))
            nn.init.normal_(child.weight, std=0.02 / math.sqrt(2 * num_layers) if residual else 0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def _rotation(queries: Tensor, keys: Tensor, head_size: int, base: float = 10000.0) -> Tensor:
    """Unit complex numbers (..., 2, 1, head_size / 2) that turn queries and keys to their positions."""
    exponent = torch.arange(0, head_size, 2, device=queries.device, dtype=torch.float64) / head_size
    angle = torch.stack([queries, keys], -1)[..., None].to(torch.float64) * base**-exponent
    return torch.polar(torch.ones_like(angle), angle)[..., None, :]


@dataclass
class _Weights:
    """The parameters of one block as `GroupCausalTransformer.step` reads them."""

    norm_attention: Tensor
    qkv: Tensor
    out: Tensor
    norm_mlp: Tensor
    up: Tensor
    down: Tensor


@dataclass
class Reading:
    """Entries to be predicted, and what is read for each.

    Attributes:
        positions: of the entries, (entries,).
        slots: the slot that each belongs to, ascending.
        sources: positions (entries, columns) of the symbols read, n for none.
        gaps: rows of the embedding (entries, 2) that tell how far the nearest known symbols are, or None.
        cuts: entries up to each group, beginning with 0.
    """

    positions: Tensor
    slots: Tensor
    sources: Tensor
    gaps: Tensor | None
    cuts: list[int]

    def tensors(self) -> list[Tensor]:
        """What there is for each entry."""
        return [t for t in (self.positions, self.slots, self.sources, self.gaps) if t is not None]


@dataclass
class Plan:
    """An order as `GroupCausalTransformer` walks it.

    Attributes:
        slots: what the slots read; their positions are those of the first entry that they predict, or, where
            there is none, of the symbol that they carry.
        entries: those that the slots predict, one list for each row of a block.
        later: those of all rows but the first, one list after the other.
        inverse: where each position stands in all lists, one after the other.
        least: the least position that a slot predicts or carries.
        rotation: complex (slots, 2, 1, head / 2), turns queries and keys to their positions.
        mask: which slot attends to which, (slots, slots); None when each sees those before it and itself.
        ascending: whether slots stand from left to right.
    """

    slots: Reading
    entries: list[Reading]
    later: Reading
    inverse: Tensor
    least: Tensor
    rotation: Tensor
    mask: Tensor | None
    ascending: bool


@dataclass
class State:
    """What a `GroupCausalTransformer` remembers between the steps of one draw.

    Attributes:
        batch: sequences.
        plan: the order that is walked.
        lengths: (batch, 1), or None.
        symbols: those drawn so far, (batch, dim + 1); K stands for none.
        weights: of each block.
        keys: of each block, (batch, heads, slots, head), filled up to the present call.
        values: the same.
        hidden: features of the slots of the present call.
        row: steps so far.
    """

    batch: int
    plan: Plan
    lengths: Tensor | None
    symbols: Tensor
    weights: list[_Weights]
    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor
    row: int = 0


#: Distances to the nearest known symbol are told apart up to this many half powers of two.
_GAPS = 18
_FAR = 1 << 20


class Inner(nn.Module):
    """What a group knows, joined with symbols drawn after it: a perceptron, no attention."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """Sizes as in `Block`."""
        super().__init__()
        self.read = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, h: Tensor, read: Tensor) -> Tensor:
        """``h`` and ``read`` (..., hidden): features of the slot, and of what stands around the entry now."""
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
    further one a small perceptron (`Inner`) joins the slot's features with the symbols that stand around the
    entry by then. It removes the dependence inside a group at a small part of the cost of a call.

    No parameter belongs to an order: what is known around an entry is all that a slot is told of it, and any
    order can be walked (`plan`).

    Args:
        K: size of the alphabet.
        num_params: numbers for each entry of the output.
        order: int64 ``(R, S)``, the order walked unless another plan is given.
        dim: longest sequence.
        block: rows of the order that one call predicts.
        hidden_size, num_layers, num_heads, intermediate_size, dropout: the usual.
        window: how many symbols before an entry are read directly, one vector for each distance and symbol
            (a convolution over one-hot rows).
        ahead: how many symbols after it likewise, where an order draws any of them earlier; default
            ``window`` if the order has several lanes, else 0.
        ngram_rows: rows of each table of hashed n-grams, see `dflow.nn.embed`; 0 for none.
        ngram_size: longest n-gram with a table, to either side and across the entry.
        ngram_dropout: share of the n-grams left out in training, see there.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).
    """

    order: Tensor
    offsets: Tensor

    def __init__(
        self,
        K: int,
        num_params: int,
        order: Tensor,
        dim: int,
        *,
        block: int = 1,
        hidden_size: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        intermediate_size: int | None = None,
        window: int = 4,
        ahead: int | None = None,
        ngram_rows: int = 0,
        ngram_size: int = 4,
        ngram_dropout: float = 0.0,
        dropout: float = 0.0,
        zero_head: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        check_order(order, dim)
        ahead = (window if order.shape[1] > 1 else 0) if ahead is None else ahead
        if min(window, block) < 1 or min(ahead, ngram_rows) < 0 or ngram_size < 2:
            raise ValueError(
                f"window {window} and block {block} must be at least 1, ahead {ahead} and ngram_rows "
                f"{ngram_rows} at least 0, ngram_size {ngram_size} at least 2"
            )
        self.K, self.dim, self.block = K, dim, block
        self.num_heads, self.hidden_size = num_heads, hidden_size
        self._plan: Memo[Plan] = Memo()
        self.register_buffer("order", order.clone())
        self.register_buffer("offsets", torch.tensor([*range(-1, -window - 1, -1), *range(1, ahead + 1)]))
        reach = self.offsets.tolist()
        # The last columns are what the lane drew last; with one lane there are no gaps to tell of.
        self.gaps = ahead > 0
        self.embed = Neighbours(
            K,
            hidden_size,
            len(reach) + block,
            [[reach.index(o) for o in pattern] for pattern in ngrams(window, ahead, ngram_size)],
            ngram_rows,
            extra=2 * _GAPS if self.gaps else 0,
            ngram_dropout=ngram_dropout,
        )
        intermediate_size = intermediate_size or 4 * hidden_size
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size, dropout) for _ in range(num_layers)
        )
        self.inner = Inner(hidden_size, intermediate_size) if block > 1 else None
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, num_params)
        _initialize(self, num_layers)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def plan(self, order: Tensor) -> Plan:
        """How to walk ``order``, another one over sequences of the same ``dim``."""
        check_order(order, self.dim)
        m, n, device = self.block, self.dim, order.device
        order = order.masked_fill(order >= n, n)
        short = -len(order) % m
        order = torch.cat([order, order.new_full((short, order.shape[1]), n)])
        rows, lanes = order.shape
        row_of = torch.arange(rows, device=device)[:, None].expand_as(order)
        # The row that draws each position; n, which stands for none, is never drawn.
        drawn = torch.full((n + 1,), rows, device=device)
        drawn[order] = row_of
        drawn[n] = rows
        history = torch.cat([order.new_full((m, lanes), n), order])
        # Column c: what the lane drew c + 1 rows before.
        last = torch.stack([history[m - 1 - c : m - 1 - c + rows] for c in range(m)], -1)

        def reading(
            positions: Tensor, known: Tensor, carried: Tensor, slots: Tensor, cuts: list[int]
        ) -> Reading:
            around = positions[:, None] + self.offsets
            around = around.masked_fill((around < 0) | (around > n), n)
            sources = around.masked_fill(drawn[around] >= known[:, None], n)
            gaps = None
            if self.gaps:
                away = torch.arange(n, device=device) - positions[:, None]
                seen = drawn[:n] < known[:, None]
                near = [
                    torch.where(seen & (away * side > 0), away.abs(), _FAR).min(1).values for side in (-1, 1)
                ]
                gaps = (2 * torch.stack(near, 1).double().log2()).long().clamp(max=_GAPS - 1)
                gaps += self.embed.extra_row + torch.tensor([0, _GAPS], device=device)
            return Reading(positions, slots, torch.cat([sources, carried], 1), gaps, cuts)

        blocks = order.unflatten(0, (-1, m)).transpose(1, 2)
        present = blocks < n
        carried = last[::m]
        used = present.any(-1) | (carried < n).any(-1)
        slot = torch.full(used.shape, -1, device=device)
        slot[used] = torch.arange(int(used.sum()), device=device)
        # A slot stands at the first entry it predicts, else at the last symbol that it carries.
        chain = torch.cat([blocks, carried], -1)
        first = (chain < n).to(torch.uint8).argmax(-1, keepdim=True)
        anchor = chain.gather(-1, first)[..., 0]
        keys = torch.where(carried[..., 0] < n, carried[..., 0], anchor)[used]
        group = torch.arange(len(blocks), device=device)[:, None].expand_as(anchor)
        cuts = [0, *used.sum(1).cumsum(0).tolist()]
        slots = reading(anchor[used], m * group[used], carried[used], slot[used], cuts)
        entries = []
        for j in range(m):
            some = present[..., j]
            positions, known = blocks[..., j][some], m * group[some] + j
            cuts = [0, *some.sum(1).cumsum(0).tolist()]
            entries.append(reading(positions, known, last[j::m][some], slot[some], cuts))
        rotation = _rotation(slots.positions, keys, self.hidden_size // self.num_heads)
        wide = self.norm.weight.dtype == torch.float64
        rotation = rotation.to(torch.complex128 if wide else torch.complex64)
        later = [
            torch.cat(parts) for parts in zip(*(e.tensors() for e in entries[1:] or entries), strict=True)
        ]
        return Plan(
            slots,
            entries,
            Reading(later[0], later[1], later[2], later[3] if self.gaps else None, []),
            torch.cat([e.positions for e in entries]).argsort(),
            chain.min(-1).values[used],
            rotation,
            None if lanes == 1 else group[used][:, None] >= group[used],
            lanes == 1 and bool((slots.positions.diff() > 0).all()),
        )

    def _own_plan(self) -> Plan:
        """The plan of the network's own order, made once for an order and a precision."""
        return self._plan(lambda: self.plan(self.order), self.order, key=self.norm.weight.dtype)

    def _read(self, x: Tensor, symbols: Tensor, reading: Reading) -> Tensor:
        """Features (batch, entries, hidden) of what ``reading`` reads; K in ``symbols`` stands for none."""
        h: Tensor = self.embed(symbols[:, reading.sources], reading.gaps)
        if x.is_floating_point():
            # The inference mode's sum to the last bit, with a gradient.
            h = h + self.embed.gradient_of(x, reading.sources)
        return h

    def forward(self, x: Tensor, context: Context | None = None, plan: Plan | None = None) -> Tensor:
        """Parameters of every entry, in the order of positions.

        Args:
            x: symbols, int64 ``(batch, n)``, or one-hot rows ``(batch, n, K)``, with ``n <= dim``.
            context: of lengths, or None.
            plan: of another order than the network's own.

        Returns:
            ``(batch, n, num_params)``; entry i depends on entries of earlier rows only.
        """
        lengths = only_lengths(context, len(x))
        n = x.shape[1]
        if n > self.dim:
            raise ValueError(f"the sequence has {n} entries, the network at most {self.dim}")
        plan = self._own_plan() if plan is None else plan
        if n < self.dim:
            # A short sequence is a long one whose other entries are absent.
            short = torch.full((len(x),), n, device=x.device)
            lengths = short if lengths is None else torch.minimum(lengths, short)
        symbols = F.pad(x.argmax(-1) if x.is_floating_point() else x, (0, self.dim + 1 - n), value=self.K)
        mask = plan.mask
        if lengths is not None:
            absent = torch.arange(self.dim + 1, device=x.device) >= lengths[:, None]
            symbols = symbols.masked_fill(absent, self.K)
            if x.is_floating_point():
                x = F.pad(x, (0, 0, 0, self.dim - n)).masked_fill(absent[:, : self.dim, None], 0.0)
            if not plan.ascending:
                mask = _causal(len(plan.least), x.device) if mask is None else mask
                # A row without a single visible key would be undefined; every slot sees itself.
                own = torch.eye(len(plan.least), dtype=torch.bool, device=x.device)
                mask = ((mask & (plan.least < lengths[:, None])[:, None]) | own)[:, None]
        h = self._read(x, symbols, plan.slots)
        for block in self.blocks:
            h = block(h, plan.rotation, mask, mask is None)
        first = h[:, plan.entries[0].slots]
        if self.inner is not None:
            later = self.inner(h[:, plan.later.slots], self._read(x, symbols, plan.later))
            first = torch.cat([first, later], 1)
        out: Tensor = self.head(self.norm(first[:, plan.inverse[:n]]))
        return out

    def start(self, batch: int, context: Context | None = None, plan: Plan | None = None) -> State:
        """Begin to draw ``batch`` sequences."""
        lengths = only_lengths(context, batch)
        plan = self._own_plan() if plan is None else plan
        dtype, device = self.norm.weight.dtype, self.norm.weight.device
        shape = (batch, self.num_heads, len(plan.least), self.hidden_size // self.num_heads)
        return State(
            batch,
            plan,
            None if lengths is None else lengths[:, None],
            torch.full((batch, self.dim + 1), self.K, device=device),
            [
                _Weights(
                    block.norm_attention.weight,
                    block.attention.qkv.weight,
                    block.attention.out.weight,
                    block.norm_mlp.weight,
                    block.up.weight,
                    block.down.weight,
                )
                for block in cast("list[Block]", list(self.blocks))
            ],
            [torch.empty(shape, dtype=dtype, device=device) for _ in self.blocks],
            [torch.empty(shape, dtype=dtype, device=device) for _ in self.blocks],
            torch.empty(0, dtype=dtype, device=device),
        )

    @torch.no_grad()
    def step(self, x: Tensor | None, state: State) -> Tensor:
        """Parameters (batch, m, num_params) of the next row, given the symbols of the last.

        ``x``, int64 (batch, entries of the last row), is None at the first step; symbols beyond a length are
        ignored. Every `block` steps cost one call of the network.
        """
        plan = state.plan
        if x is not None:
            g, j = divmod(state.row - 1, self.block)
            drawn = plan.entries[j]
            positions = drawn.positions[drawn.cuts[g] : drawn.cuts[g + 1]]
            if state.lengths is not None:
                x = x.masked_fill(positions >= state.lengths, self.K)
            state.symbols[:, positions] = x
        g, j = divmod(state.row, self.block)
        state.row += 1
        begin = plan.slots.cuts[g]
        if j == 0:
            state.hidden = self._call(state, begin, plan.slots.cuts[g + 1])
        h, entries = state.hidden, plan.entries[j]
        some = slice(entries.cuts[g], entries.cuts[g + 1])
        if some.stop - some.start < h.shape[1]:
            h = h[:, entries.slots[some] - begin]
        if j and self.inner is not None:
            gaps = None if entries.gaps is None else entries.gaps[some]
            h = self.inner(h, self.embed(state.symbols[:, entries.sources[some]], gaps))
        h = F.layer_norm(h, (self.hidden_size,), self.norm.weight)
        return F.linear(h, self.head.weight, self.head.bias)

    def _call(self, state: State, begin: int, end: int) -> Tensor:
        """Features (batch, slots, hidden) of the slots of the next group.

        The blocks are written out with as few operations as they take: at one sequence the calls of
        operations, not their arithmetic, are what drawing costs.
        """
        size, plan, batch, width = self.hidden_size, state.plan, state.batch, end - begin
        head, norm = size // self.num_heads, (size,)
        gaps = None if plan.slots.gaps is None else plan.slots.gaps[begin:end]
        h: Tensor = self.embed(state.symbols[:, plan.slots.sources[begin:end]], gaps).flatten(0, 1)
        mask = None
        if state.lengths is not None and not plan.ascending:
            own = torch.zeros(width, end, dtype=torch.bool, device=h.device)
            own[:, begin:].fill_diagonal_(True)
            mask = (plan.least[:end] < state.lengths)[:, None, None] | own
        rotation = plan.rotation[begin:end]
        for w, keys, values in zip(state.weights, state.keys, state.values, strict=True):
            qkv = _product(F.layer_norm(h, norm, w.norm_attention), w.qkv)
            pairs = torch.view_as_complex(qkv[:, : 2 * size].view(batch, width, 2, -1, head // 2, 2))
            qk = torch.view_as_real(pairs * rotation).view(batch, width, 2 * self.num_heads, head)
            qk = qk.transpose(1, 2)
            keys[:, :, begin:end] = qk[:, self.num_heads :]
            values[:, :, begin:end] = qkv[:, 2 * size :].view(batch, width, -1, head).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                qk[:, : self.num_heads], keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )
            h = _product(out.transpose(1, 2).reshape(-1, size), w.out, h)
            up = _product(F.layer_norm(h, norm, w.norm_mlp), w.up).relu_()
            h = _product(up.mul_(up), w.down, h)
        return h.view(batch, width, size)


def ngrams(before: int, after: int, size: int) -> list[list[int]]:
    """Offsets of the neighbours that n-grams up to ``size`` join: before an entry, after it, and around it.

    >>> ngrams(4, 0, 3)
    [[-1, -2], [-1, -2, -3]]
    >>> ngrams(2, 2, 4)
    [[-1, -2], [1, 2], [-1, 1], [-1, 1, 2], [-1, -2, 1], [-1, -2, 1, 2]]
    """
    left = [list(range(-1, -n - 1, -1)) for n in range(1, min(size, before) + 1)]
    right = [list(range(1, n + 1)) for n in range(1, min(size, after) + 1)]
    # Around an entry both sides are balanced: the nearest symbols tell the most.
    around = [a + b for a in left for b in right if len(a + b) <= size and abs(len(a) - len(b)) <= 1]
    return left[1:] + right[1:] + around


def _causal(n: int, device: torch.device) -> Tensor:
    """Mask of slots that see those before them and themselves."""
    line = torch.arange(n, device=device)
    return line[:, None] >= line


def _product(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """``plus + x @ weight.T``; a product with a vector is faster than one with a matrix of one row."""
    if len(x) == 1:
        vector = x.view(-1)
        out = torch.mv(weight, vector) if plus is None else torch.addmv(plus.view(-1), weight, vector)
        return out.view(1, -1)
    return F.linear(x, weight) if plus is None else torch.addmm(plus, x, weight.t())


class InfillTransformer(nn.Module):
    """Parameters of hidden entries given known ones: the conditioner of a coupling.

    Every hidden entry reads the ``window`` nearest known symbols on each side, in place of a convolution over
    a grid with holes; the layers then attend among the hidden entries, which together have read every known
    symbol. No work is done for an entry whose output would be thrown away.

    Args:
        K: size of the alphabet.
        num_params: numbers for each hidden entry.
        known, hidden: int64 ``(n_known,)`` and ``(n_hidden,)``: positions in the whole sequence, sorted.
        window: known symbols read on each side.
        ngram_rows: rows of each table of hashed n-grams of these, see `dflow.nn.embed`; 0 for none.
        ngram_size: longest n-gram with a table.
        ngram_dropout: share of the n-grams left out in training, see there.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).
    """

    known: Tensor
    hidden: Tensor
    neighbours: Tensor

    def __init__(
        self,
        K: int,
        num_params: int,
        known: Tensor,
        hidden: Tensor,
        *,
        hidden_size: int = 128,
        num_layers: int = 1,
        num_heads: int = 4,
        intermediate_size: int | None = None,
        window: int = 8,
        ngram_rows: int = 0,
        ngram_size: int = 4,
        ngram_dropout: float = 0.0,
        dropout: float = 0.0,
        zero_head: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        if len(known) < 1 or len(hidden) < 1:
            raise ValueError(
                f"an infilling network needs known and hidden entries, found {len(known)} and {len(hidden)}"
            )
        self.K, self.num_heads, self.hidden_size = K, num_heads, hidden_size
        self.register_buffer("known", known.clone())
        self.register_buffer("hidden", hidden.clone())
        right = torch.searchsorted(known, hidden)[:, None]
        reach = torch.arange(window)
        neighbours = torch.cat([right - 1 - reach, right + reach], 1)
        outside = (neighbours < 0) | (neighbours >= len(known))
        self.register_buffer("neighbours", neighbours.masked_fill(outside, len(known)))
        # Column j is the symbol j + 1 places before the entry, column window + j that j + 1 places after it.
        columns = [
            [-o - 1 if o < 0 else window + o - 1 for o in pattern]
            for pattern in ngrams(window, window, ngram_size)
        ]
        self.embed = Neighbours(
            K,
            hidden_size,
            2 * window,
            columns,
            ngram_rows,
            std=(2 * window) ** -0.5,
            ngram_dropout=ngram_dropout,
        )
        self.mix = nn.Linear(hidden_size, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size or 4 * hidden_size, dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, num_params)
        _initialize(self, max(1, num_layers))
        nn.init.kaiming_normal_(self.mix.weight, nonlinearity="relu")
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Parameters (batch, n_hidden, num_params) given the known symbols or rows ``x``.

        Args:
            x: int64 ``(batch, n_known)`` or one-hot rows ``(batch, n_known, K)``.
            context: of the lengths of whole sequences, or None.
        """
        lengths = only_lengths(context, len(x))
        symbols = x.argmax(-1) if x.is_floating_point() else x
        mask = None
        if lengths is not None:
            symbols = symbols.masked_fill(self.known >= lengths[:, None], self.K)
            present = self.hidden < lengths[:, None]
            own = torch.eye(len(self.hidden), dtype=torch.bool, device=x.device)
            mask = (present[:, None] | own)[:, None]
        h: Tensor = self.embed(F.pad(symbols, (0, 1), value=self.K)[:, self.neighbours])
        if x.is_floating_point():
            rows = torch.where((symbols != self.K)[..., None], x, 0.0)
            h = h + self.embed.gradient_of(rows, self.neighbours)
        h = h + self.mix(F.gelu(h, approximate="tanh"))
        rotation = _rotation(self.hidden, self.hidden, self.hidden_size // self.num_heads)
        rotation = rotation.to(torch.complex128 if h.dtype == torch.float64 else torch.complex64)
        for block in self.blocks:
            h = block(h, rotation, mask)
        out: Tensor = self.head(self.norm(h))
        return out


class MaskedTransformer(nn.Module):
    """Bidirectional Transformer over a sequence of which any entries are known: the any-order network.

    Every entry reads itself and the ``window`` symbols on either side as far as they are known, n-grams of
    these neighbours, and how far off the nearest known symbols stand; all present entries then attend to all.

    Args:
        K: size of the alphabet.
        num_params: numbers for each entry of the output.
        dim: longest sequence.
        hidden_size, num_layers, num_heads, intermediate_size, dropout: the usual.
        window: symbols read on each side.
        ngram_rows, ngram_size, ngram_dropout: tables of hashed n-grams as in `GroupCausalTransformer`.
    """

    def __init__(
        self,
        K: int,
        num_params: int,
        dim: int,
        *,
        hidden_size: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        intermediate_size: int | None = None,
        window: int = 4,
        ngram_rows: int = 0,
        ngram_size: int = 4,
        ngram_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        """See the class."""
        super().__init__()
        if dim < 1 or window < 1 or ngram_rows < 0 or ngram_size < 2:
            raise ValueError(
                f"dim {dim} and window {window} must be at least 1, ngram_rows {ngram_rows} at least 0, "
                f"ngram_size {ngram_size} at least 2"
            )
        self.K, self.dim, self.window = K, dim, window
        self.head_size = hidden_size // num_heads
        self._turned: Tensor | None = None
        patterns = ngrams(window, window, ngram_size)
        self.embed = Neighbours(
            K,
            hidden_size,
            2 * window + 1,
            [[window + offset for offset in pattern] for pattern in patterns],
            ngram_rows,
            extra=2 * _GAPS,
            ngram_dropout=ngram_dropout,
        )
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size or 4 * hidden_size, dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, num_params)
        _initialize(self, num_layers)

    def forward(self, x: Tensor, known: Tensor, context: Context | None = None) -> Tensor:
        """Parameters (batch, n, num_params) of every entry given the known ones.

        Args:
            x: symbols, int64 ``(batch, n)``, or one-hot rows ``(batch, n, K)``, with ``n <= dim``; entries
                that are not known are never read.
            known: bool ``(batch, n)``.
            context: of lengths, or None.
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
        columns = 2 * self.window + 1
        read = F.pad(symbols, (self.window, self.window), value=self.K).unfold(1, columns, 1)
        h: Tensor = self.embed(read, self._gaps(known))
        if x.is_floating_point():
            # The inference mode's sum to the last bit, with a gradient.
            sources = line[:, None] + torch.arange(-self.window, self.window + 1, device=x.device)
            sources = sources.masked_fill((sources < 0) | (sources >= n), n)
            h = h + self.embed.gradient_of(torch.where(known[..., None], x, 0.0), sources)
        rotation = self._turns(line, h.dtype)
        for block in self.blocks:
            h = block(h, rotation, mask)
        out: Tensor = self.head(self.norm(h))
        return out

    def _gaps(self, known: Tensor) -> Tensor:
        """Rows of the embedding (batch, n, 2) for the distances to the nearest known entries, either side."""
        line = torch.arange(known.shape[1], device=known.device)
        last = torch.where(known, line, -_FAR).cummax(1).values
        following = torch.where(known, line, _FAR).flip(1).cummin(1).values.flip(1)
        before = line - F.pad(last[:, :-1], (1, 0), value=-_FAR)
        after = F.pad(following[:, 1:], (0, 1), value=_FAR) - line
        bucket = (2 * torch.stack([before, after], -1).double().log2()).long().clamp(max=_GAPS - 1)
        return bucket + (self.embed.extra_row + torch.tensor([0, _GAPS], device=known.device))

    def _turns(self, line: Tensor, dtype: torch.dtype) -> Tensor:
        """The rotation of positions ``line``, made once for the longest length seen, device and precision."""
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        made = self._turned
        if made is None or len(made) < len(line) or made.device != line.device or made.dtype != kind:
            with torch.inference_mode(False):  # or training could not use what scoring made
                made = self._turned = _rotation(line, line, self.head_size).to(kind)
        return made[: len(line)]
