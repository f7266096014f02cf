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

from dflow.core import Context
from dflow.nn.embed import Neighbours
from dflow.ops.lookup import lookup
from dflow.ops.orders import check_order


class Attention(nn.Module):
    """Multi-head attention with rotary positions; queries and keys may stand at different positions."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        """``hidden_size`` must be a multiple of ``2 * num_heads``."""
        super().__init__()
        if num_heads < 1 or hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of twice the number of heads {num_heads}"
            )
        self.num_heads, self.dropout = num_heads, dropout
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
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=self.dropout if self.training else 0.0
        )
        return F.linear(out.transpose(1, 2).flatten(2), self.out.weight)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a residual path."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, dropout: float = 0.0
    ) -> None:
        """Sizes as in `Attention`; ``intermediate_size`` is the width of the perceptron."""
        super().__init__()
        self.norm_attention = nn.LayerNorm(hidden_size, bias=False)
        self.attention = Attention(hidden_size, num_heads, dropout)
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
class Plan:
    """An order as `GroupCausalTransformer` walks it, for sequences of at most ``n`` entries.

    Slots are listed group by group. That of lane s in group g predicts the entry at ``order[g, s]`` and
    carries the symbol drawn before it in its lane, at ``order[g - 1, s]``; slots with neither are left out.

    Attributes:
        n: entries.
        ends: slots up to and including each group.
        targets: position that each slot predicts, n for none.
        carried: position of the symbol that each slot carries, n for none.
        sources: positions (slots, columns) whose symbols a slot reads, n for none.
        near: distances to the nearest known symbols (slots, 2), before and after.
        slots: slot of each position.
        predicting: of each group, its slots that predict, counted from its first; None where all do.
        mask: which slot attends to which, (slots, slots); None when each sees those before it and itself.
        rotation: complex (slots, 2, 1, head / 2), turns queries and keys to their positions.
        gaps: rows of the embedding (slots, 2) that stand for `near`; None with one lane.
    """

    n: int
    ends: list[int]
    targets: Tensor
    carried: Tensor
    sources: Tensor
    near: Tensor
    slots: Tensor
    predicting: list[Tensor | None]
    mask: Tensor | None
    rotation: Tensor
    gaps: Tensor | None


@dataclass
class State:
    """What a `GroupCausalTransformer` remembers between the calls of one draw.

    Attributes:
        batch: sequences.
        plan: the order that is walked.
        present: slots that others may attend to, (batch, slots); None when all are.
        lengths: (batch, 1), or None.
        rotation: as in the plan, or (batch, slots, ...) with lengths.
        gaps: likewise.
        symbols: those drawn so far, (batch, n + 1); K stands for none.
        weights: of each block.
        keys: of each block, (batch, heads, slots, head), filled up to the present call.
        values: the same.
        call: calls so far.
    """

    batch: int
    plan: Plan
    present: Tensor | None
    lengths: Tensor | None
    rotation: Tensor
    gaps: Tensor | None
    symbols: Tensor
    weights: list[_Weights]
    keys: list[Tensor]
    values: list[Tensor]
    call: int = 0


#: Distances to the nearest known symbol are told apart up to this many half powers of two.
_GAPS = 18
_FAR = 1 << 20


class GroupCausalTransformer(nn.Module):
    """A Transformer that scores a whole sequence in one pass and draws it in G calls.

    With an order ``(G, S)`` (see `dflow.ops.orders`), every slot predicts one entry and reads the symbols of
    earlier groups that stand next to it, on either side, and the last one of its lane; it attends to all
    slots of groups up to its own, in every lane. The output for a position depends on symbols of strictly
    earlier groups only. With one lane it is the causal Transformer. No parameter belongs to an order: what is
    known around an entry is all that a slot is told of it, and any order can be walked (`plan`).

    Args:
        K: size of the alphabet.
        num_params: numbers for each entry of the output.
        order: int64 ``(G, S)``, the order walked unless another plan is given.
        dim: longest sequence.
        hidden_size, num_layers, num_heads, intermediate_size, dropout: the usual.
        window: how many symbols before an entry its slot reads directly, one vector for each distance and
            symbol (a convolution over one-hot rows).
        ahead: how many symbols after it likewise, where an order draws any of them earlier; default ``window``
            if the order has several lanes, else 0.
        ngram_rows: rows of each table that holds a vector for several neighbours together, found by hashing;
            0 for none. They cost no arithmetic. No gradient reaches the symbols of one-hot rows through them.
        ngram_size: longest n-gram with a table, to either side and across the entry.
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
        hidden_size: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        intermediate_size: int | None = None,
        window: int = 4,
        ahead: int | None = None,
        ngram_rows: int = 0,
        ngram_size: int = 4,
        dropout: float = 0.0,
        zero_head: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        check_order(order, dim)
        several = order.shape[1] > 1
        ahead = (window if several else 0) if ahead is None else ahead
        if window < 1 or ahead < 0 or ngram_rows < 0 or ngram_size < 2:
            raise ValueError(
                f"window {window} must be at least 1, ahead {ahead} and ngram_rows {ngram_rows} at least 0, "
                f"ngram_size {ngram_size} at least 2"
            )
        self.K, self.dim, self.gaps = K, dim, ahead > 0
        self.num_heads, self.hidden_size = num_heads, hidden_size
        self._plan: Plan | None = None
        self.register_buffer("order", order.clone())
        self.register_buffer("offsets", torch.tensor([*range(-1, -window - 1, -1), *range(1, ahead + 1)]))
        reach = self.offsets.tolist()
        # The last column is the symbol that the slot carries; with one lane there are no gaps to tell of.
        self.embed = Neighbours(
            K,
            hidden_size,
            len(reach) + 1,
            [[reach.index(o) for o in pattern] for pattern in ngrams(window, ahead, ngram_size)],
            ngram_rows,
            extra=2 * _GAPS if ahead else 0,
        )
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size or 4 * hidden_size, dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, num_params)
        _initialize(self, num_layers)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def plan(self, order: Tensor, n: int) -> Plan:
        """How to walk ``order`` over sequences of at most ``n`` entries."""
        groups, lanes = order.shape
        device = order.device
        targets = order.masked_fill(order >= n, n)
        carried = torch.cat([targets.new_full((1, lanes), n), targets[:-1]])
        used = (targets < n) | (carried < n)
        ends = used.sum(1).cumsum(0).tolist()
        group = torch.arange(groups, device=device)[:, None].expand_as(order)[used]
        targets, carried = targets[used], carried[used]
        # The group that draws each position; n is drawn never.
        rank = torch.full((n + 1,), groups, device=device)
        rank[targets] = torch.where(targets < n, group, groups)
        around = targets[:, None] + self.offsets
        around = around.masked_fill((around < 0) | (around > n) | (targets[:, None] == n), n)
        sources = around.masked_fill(rank[around] >= group[:, None], n)
        sources = torch.cat([sources, carried[:, None]], 1)
        known = rank[:n] < group[:, None]
        away = torch.arange(n, device=device) - targets[:, None]
        near = [
            torch.where(known & (away * side > 0), away.abs(), _FAR).min(1).values for side in (-1, 1)
        ]
        slots = torch.full((n + 1,), -1, device=device)
        slots[targets] = torch.arange(len(targets), device=device)
        starts = [0, *ends[:-1]]
        predicting = [targets[a:b] < n for a, b in zip(starts, ends, strict=True)]
        plan = Plan(
            n,
            ends,
            targets,
            carried,
            sources,
            torch.stack(near, 1),
            slots[:n],
            [None if bool(p.all()) else p.nonzero().flatten() for p in predicting],
            None if lanes == 1 else group[:, None] >= group,
            sources.new_empty(0),
            None,
        )
        plan.rotation, plan.gaps = self._geometry(plan, None)
        return plan

    def _geometry(self, plan: Plan, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rotation and gaps (slots, ...), or (batch, slots, ...) with lengths (batch,)."""
        end = torch.tensor(plan.n, device=plan.targets.device) if lengths is None else lengths[:, None]
        queries = torch.where(plan.targets < end, plan.targets, plan.carried)
        keys = torch.where(plan.carried < end, plan.carried, plan.targets)
        rotation = _rotation(queries, keys, self.hidden_size // self.num_heads)
        rotation = rotation.to(torch.complex128 if self.norm.weight.dtype == torch.float64 else torch.complex64)
        if not self.gaps:
            return rotation, None
        before, after = plan.near.unbind(-1)
        before = torch.where(plan.targets < end, before, _FAR)
        after = torch.where(plan.targets + after < end, after, _FAR)
        bucket = (2 * torch.stack([before, after], -1).double().log2()).long().clamp(max=_GAPS - 1)
        rows = self.embed.extra_row + torch.tensor([0, _GAPS], device=bucket.device)
        return rotation, bucket + rows

    def _own_plan(self, n: int) -> Plan:
        """The plan of the network's own order, made once for a length, device and precision."""
        plan, wide = self._plan, self.norm.weight.dtype == torch.float64
        if (
            plan is None
            or plan.n != n
            or plan.targets.device != self.order.device
            or (plan.rotation.dtype == torch.complex128) != wide
        ):
            plan = self._plan = self.plan(self.order, n)
        return plan

    def _embed(self, x: Tensor, plan: Plan, gaps: Tensor | None, lengths: Tensor | None) -> Tensor:
        """What each slot reads: (batch, slots, hidden)."""
        symbols = x.argmax(-1) if x.is_floating_point() else x
        if lengths is not None:
            absent = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            symbols = symbols.masked_fill(absent, self.K)
        read = F.pad(symbols, (0, 1), value=self.K)[:, plan.sources]
        if lengths is not None:
            # A slot that predicts nothing has no neighbours, only the symbol it carries.
            read[..., :-1].masked_fill_((plan.targets >= lengths[:, None])[..., None], self.K)
        h: Tensor = self.embed(read, gaps)
        if x.is_floating_point():
            # The inference mode's sum to the last bit, with a gradient.
            present = torch.where((symbols != self.K)[..., None], x, 0.0)
            h = h + self.embed.gradient_of(present, plan.sources)
        return h

    def forward(self, x: Tensor, context: Context = None, plan: Plan | None = None) -> Tensor:
        """Parameters of every entry, in the order of positions.

        Args:
            x: symbols, int64 ``(batch, n)``, or one-hot rows ``(batch, n, K)``, with ``n <= dim``.
            context: lengths, int64 ``(batch,)``, or None.
            plan: of another order than the network's own, made for n entries.

        Returns:
            ``(batch, n, num_params)``; entry i depends on entries of earlier groups only.
        """
        lengths = _lengths(context)
        n = x.shape[1]
        if n > self.dim:
            raise ValueError(f"the sequence has {n} entries, the network at most {self.dim}")
        plan = self._own_plan(n) if plan is None else plan
        rotation, gaps = (plan.rotation, plan.gaps) if lengths is None else self._geometry(plan, lengths)
        h = self._embed(x, plan, gaps, lengths)
        mask = plan.mask
        if lengths is not None:
            visible = self._visible(plan, lengths)
            mask = _causal(len(plan.targets), x.device) if mask is None else mask
            # A row without a single visible key would be undefined; every slot sees itself.
            own = torch.eye(len(plan.targets), dtype=torch.bool, device=x.device)
            mask = ((mask & visible[:, None]) | own)[:, None]
        for block in self.blocks:
            h = block(h, rotation, mask, mask is None)
        out: Tensor = self.head(self.norm(h[:, plan.slots]))
        return out

    def _visible(self, plan: Plan, lengths: Tensor) -> Tensor:
        """Slots (batch, slots) that others may attend to: those that carry or predict a present symbol."""
        return torch.minimum(plan.targets, plan.carried) < lengths[:, None]

    def start(self, batch: int, context: Context = None, plan: Plan | None = None) -> State:
        """Begin to draw ``batch`` sequences."""
        lengths = _lengths(context)
        plan = self._own_plan(self.dim) if plan is None else plan
        dtype, device = self.norm.weight.dtype, self.norm.weight.device
        present: Tensor | None = None
        if lengths is not None:
            present = self._visible(plan, lengths)
            present = None if bool(present.all()) else present
        shape = (batch, self.num_heads, len(plan.targets), self.hidden_size // self.num_heads)
        return State(
            batch,
            plan,
            present,
            None if lengths is None else lengths[:, None],
            *((plan.rotation, plan.gaps) if lengths is None else self._geometry(plan, lengths)),
            torch.full((batch, plan.n + 1), self.K, device=device),
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
        )

    @torch.no_grad()
    def step(self, x: Tensor | None, state: State) -> Tensor:
        """Parameters (batch, m, num_params) of the next group, given the symbols of the last.

        ``x``, int64 (batch, entries of the last group), is None at the first call; symbols beyond a length
        are ignored. The blocks are written out here with as few operations as they take: at one sequence the
        calls of operations, not their arithmetic, are what drawing costs.
        """
        g, size, plan = state.call, self.hidden_size, state.plan
        begin, end = plan.ends[g - 1] if g else 0, plan.ends[g]
        batch, width, head = state.batch, end - begin, size // self.num_heads
        if x is not None:
            drawn = plan.targets[plan.ends[g - 2] if g > 1 else 0 : begin]
            if plan.predicting[g - 1] is not None:
                drawn = drawn[plan.predicting[g - 1]]
            if state.lengths is not None:
                x = x.masked_fill(drawn >= state.lengths, self.K)
            state.symbols[:, drawn] = x
        state.call += 1
        symbols = state.symbols[:, plan.sources[begin:end]]
        if state.lengths is not None:
            symbols[..., :-1].masked_fill_((plan.targets[begin:end] >= state.lengths)[..., None], self.K)
        gaps = None if state.gaps is None else state.gaps[..., begin:end, :]
        h: Tensor = self.embed(symbols, gaps).flatten(0, 1)
        mask = None
        if state.present is not None:
            mask = state.present[:, None, None, :end].expand(-1, -1, width, -1)
            own = torch.zeros(width, end, dtype=torch.bool, device=h.device)
            own[:, begin:].fill_diagonal_(True)
            mask = mask | own
        rotation = state.rotation[..., begin:end, :, :, :]
        norm = (size,)
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
        h = h.view(batch, width, size)
        if plan.predicting[g] is not None:
            h = h[:, plan.predicting[g]]
        h = F.layer_norm(h, norm, self.norm.weight)
        return F.linear(h, self.head.weight, self.head.bias)


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
        embedding_size: features of one symbol in the window.
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
        embedding_size: int = 32,
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
        self.embedding = nn.Parameter(torch.randn(K, embedding_size) * 0.3)
        self.edge = nn.Parameter(torch.zeros(embedding_size))
        self.front = nn.Linear(2 * window * embedding_size, hidden_size)
        self.mix = nn.Linear(hidden_size, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size or 4 * hidden_size, dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, num_params)
        _initialize(self, max(1, num_layers))
        for layer in (self.front, self.mix):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """Parameters (batch, n_hidden, num_params) given the known symbols or rows ``x``.

        Args:
            x: int64 ``(batch, n_known)`` or one-hot rows ``(batch, n_known, K)``.
            context: lengths of the whole sequences, int64 ``(batch,)``, or None.
        """
        lengths = _lengths(context)
        e = lookup(x, self.embedding)
        mask = None
        if lengths is not None:
            e = torch.where((self.known < lengths[:, None])[..., None], e, self.edge)
            present = self.hidden < lengths[:, None]
            own = torch.eye(len(self.hidden), dtype=torch.bool, device=x.device)
            mask = (present[:, None] | own)[:, None]
        e = torch.cat([e, self.edge.expand(len(e), 1, -1)], 1)
        h = self.front(e[:, self.neighbours].flatten(2))
        h = h + self.mix(F.gelu(h, approximate="tanh"))
        rotation = _rotation(self.hidden, self.hidden, self.hidden_size // self.num_heads)
        rotation = rotation.to(torch.complex128 if h.dtype == torch.float64 else torch.complex64)
        for block in self.blocks:
            h = block(h, rotation, mask)
        out: Tensor = self.head(self.norm(h))
        return out


def _lengths(context: Context) -> Tensor | None:
    if isinstance(context, tuple):
        raise TypeError("a sequence network takes lengths (batch,) as context, found a tuple")
    return context


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
        ngram_rows, ngram_size: tables of hashed n-grams as in `GroupCausalTransformer`.
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
        )
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size or 4 * hidden_size, dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, num_params)
        _initialize(self, num_layers)

    def forward(self, x: Tensor, known: Tensor, context: Context = None) -> Tensor:
        """Parameters (batch, n, num_params) of every entry given the known ones.

        Args:
            x: symbols, int64 ``(batch, n)``, or one-hot rows ``(batch, n, K)``, with ``n <= dim``; entries
                that are not known are never read.
            known: bool ``(batch, n)``.
            context: lengths, int64 ``(batch,)``, or None.
        """
        lengths = _lengths(context)
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
