"""Transformers: group-causal (causal is its special case) and infilling (bidirectional).

Both know nothing of flows: symbols in, ``num_params`` numbers an entry out. Positions are rotary (Su et al.
2021, arXiv 2104.09864), blocks are pre-norm with squared rectifiers (So et al. 2021, arXiv 2109.08668), and
both start with a window over neighbouring symbols: without that locality bidirectional nets stay at the
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
    """Unit complex numbers (n, 2, 1, head_size / 2) that turn queries and keys to their positions."""
    exponent = torch.arange(0, head_size, 2, device=queries.device, dtype=torch.float64) / head_size
    angle = torch.stack([queries, keys], 1)[..., None].to(torch.float64) * base**-exponent
    return torch.polar(torch.ones_like(angle), angle)[:, :, None]


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
class State:
    """What a `GroupCausalTransformer` remembers between the calls of one draw.

    Attributes:
        batch: sequences.
        rotation: complex, (G, S, 2 x heads, head / 2).
        present: slots that others may attend to, (batch, G, S); None when all are.
        window: the last symbols of each lane, (rows, window), newest first; K stands for none.
        weights: of each block.
        keys: of each block, (batch, heads, G x S, head), filled up to the present call.
        values: the same.
        call: calls so far.
    """

    batch: int
    rotation: Tensor
    present: Tensor | None
    window: Tensor
    weights: list[_Weights]
    keys: list[Tensor]
    values: list[Tensor]
    call: int = 0


class GroupCausalTransformer(nn.Module):
    """A Transformer that scores a whole sequence in one pass and draws it in G calls.

    With an order ``(G, S)`` (see `dflow.ops.orders`), slot (g, s) holds the symbol drawn at ``order[g-1, s]``
    (a start vector for g = 0), its query stands at the position ``order[g, s]`` it has to predict, and it
    attends to all slots of groups up to g, in every lane. The output for a position depends on symbols of
    strictly earlier groups only. With S = 1 it is the causal Transformer.

    Args:
        K: size of the alphabet.
        num_params: numbers for each entry of the output.
        order: int64 ``(G, S)``.
        dim: longest sequence.
        hidden_size, num_layers, num_heads, intermediate_size, dropout: the usual.
        window: how many last symbols of its lane a slot reads directly (a causal convolution of that width
            over one-hot rows).
        ngram_rows: rows of each of ``window - 1`` further tables, which hold a vector for the last 2, 3, ...
            ``window`` symbols together, found by hashing; 0 for none. They cost no arithmetic. No gradient
            reaches the symbols of one-hot rows through them.
        zero_head: start with an output of zeros (the identity, for the parameters of a bijector).
    """

    order: Tensor
    hash: Tensor
    first_rows: Tensor

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
        ngram_rows: int = 0,
        dropout: float = 0.0,
        zero_head: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        check_order(order, dim)
        if window < 1 or ngram_rows < 0:
            raise ValueError(f"window {window} must be at least 1 and ngram_rows {ngram_rows} at least 0")
        self.K, self.dim, self.window, self.ngram_rows = K, dim, window, ngram_rows
        self.num_heads, self.hidden_size = num_heads, hidden_size
        self._rotation: Tensor | None = None
        self.register_buffer("order", order.clone())
        tables = window - 1 if ngram_rows else 0
        self.embedding = nn.Parameter(torch.randn(window * (K + 1) + tables * ngram_rows, hidden_size) * 0.02)
        # A linear hash: the factors of column n are zero beyond its n + 2 symbols.
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(1 << 20, 1 << 40, (window, tables), generator=generator)
        self.register_buffer("hash", factors * (torch.arange(window)[:, None] < torch.arange(tables) + 2))
        first = [torch.arange(window) * (K + 1), window * (K + 1) + torch.arange(tables) * ngram_rows]
        self.register_buffer("first_rows", torch.cat(first))
        # With one lane the group is the position, which is told by rotation.
        self.group_embedding: nn.Parameter | None = None
        if order.shape[1] > 1:
            self.group_embedding = nn.Parameter(torch.randn(order.shape[0], hidden_size) * 0.02)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size or 4 * hidden_size, dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, num_params)
        _initialize(self, num_layers)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def _sources(self) -> Tensor:
        """Positions (G, S, window) that a slot reads: the last ones of its lane; ``dim`` stands for none."""
        groups, lanes = self.order.shape
        none = self.order.new_full((self.window, lanes), self.dim)
        padded = torch.cat([none, self.order.clamp(max=self.dim)])
        return torch.stack([padded[self.window - 1 - j :][:groups] for j in range(self.window)], -1)

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Positions (G, S) at which the queries and the keys of the slots stand."""
        first = self.order[:1] - 1
        return self.order, torch.cat([first, self.order[:-1]])

    def _visible(
        self,
        limit: int | Tensor,
        queries: Tensor | None = None,
        keys: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        """Slots that others may attend to: those that hold a present symbol or start a present lane."""
        if queries is None or keys is None or group is None:
            queries, keys = (p.flatten() for p in self._positions())
            group = torch.arange(len(keys), device=keys.device) // self.order.shape[1]
        return torch.where(group > 0, keys, queries) < limit

    def _rows(self, window: Tensor) -> Tensor:
        """Rows of the embedding for the last symbols (..., window): one a distance, one an n-gram."""
        if not self.ngram_rows:
            return window + self.first_rows
        # The sum of products is a matrix product, which torch lacks for integers on a GPU.
        keys = (window[..., None] * self.hash).sum(-2).remainder_(self.ngram_rows)
        return torch.cat([window, keys], -1) + self.first_rows

    def _embed(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Sum over the window of one embedding for each distance and symbol: (batch, G * S, hidden)."""
        sources = self._sources().flatten(0, 1)
        symbols = x.argmax(-1) if x.is_floating_point() else x
        if lengths is not None:
            absent = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            symbols = symbols.masked_fill(absent, self.K)
        none = symbols.new_full((x.shape[0], self.dim + 1 - x.shape[1]), self.K)
        index = self._rows(torch.cat([symbols, none], 1)[:, sources])
        h: Tensor = F.embedding_bag(index.flatten(0, 1), self.embedding, mode="sum")
        h = h.unflatten(0, index.shape[:2])
        if x.is_floating_point():
            # The sum above is what the inference mode computes, to the last bit. The same sum as a product
            # with the one-hot rows adds nothing but its gradient.
            present = F.pad(symbols != self.K, (0, self.dim + 1 - x.shape[1]))
            rows = F.pad(x, (0, 0, 0, self.dim + 1 - x.shape[1]))
            rows = torch.where(present[..., None], rows, 0.0)
            tables = self.embedding.detach()[: self.window * (self.K + 1)]
            tables = tables.unflatten(0, (self.window, self.K + 1))[:, : self.K]
            soft = sum(
                ((rows @ tables[j])[:, sources[:, j]] for j in range(self.window)), torch.zeros_like(h)
            )
            h = h + (soft - soft.detach())
        if self.group_embedding is not None:
            h = h + self.group_embedding.repeat_interleave(self.order.shape[1], 0)
        return h

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """Parameters of every entry, in the order of positions.

        Args:
            x: symbols, int64 ``(batch, n)``, or one-hot rows ``(batch, n, K)``, with ``n <= dim``.
            context: lengths, int64 ``(batch,)``, or None.

        Returns:
            ``(batch, n, num_params)``; entry i depends on entries of earlier groups only.
        """
        lengths = _lengths(context)
        n = x.shape[1]
        if n > self.dim:
            raise ValueError(f"the sequence has {n} entries, the network at most {self.dim}")
        groups, lanes = self.order.shape
        h = self._embed(x, lengths)
        queries, keys = (p.flatten() for p in self._positions())
        group = torch.arange(groups * lanes, device=x.device) // lanes
        slots = self.order.flatten().argsort()[:n]
        causal, mask = lanes == 1, None
        visible = self._visible(n)
        if not bool(visible.all()):
            # Slots that neither hold nor predict an entry are left out: fewer rows, the same values.
            used = (visible | (queries < n)).nonzero().flatten()
            h, queries, keys, group, visible = (
                h[:, used],
                queries[used],
                keys[used],
                group[used],
                visible[used],
            )
            slots = torch.searchsorted(used, slots)
        if lengths is not None:
            visible = self._visible(lengths[:, None], queries, keys, group)
        if lengths is not None or not bool(visible.all()):
            mask = (group[:, None] >= group) & visible[..., None, :]
            # A row without a single visible key would be undefined; every slot sees itself.
            mask = mask | torch.eye(len(group), dtype=torch.bool, device=x.device)
            mask, causal = mask[:, None] if lengths is not None else mask, False
        elif not causal:
            mask = group[:, None] >= group
        rotation = _rotation(queries, keys, self.hidden_size // self.num_heads)
        rotation = rotation.to(torch.complex128 if h.dtype == torch.float64 else torch.complex64)
        for block in self.blocks:
            h = block(h, rotation, mask, causal)
        out: Tensor = self.head(self.norm(h[:, slots]))
        return out

    def start(self, batch: int, context: Context = None) -> State:
        """Begin to draw ``batch`` sequences."""
        lengths = _lengths(context)
        groups, lanes = self.order.shape
        dtype, device = self.embedding.dtype, self.embedding.device
        present: Tensor | None = None
        if lengths is not None or self.order.numel() > self.dim:
            present = self._visible(self.dim if lengths is None else lengths[:, None])
            everything = bool(present.all())
            present = None if everything else present.unflatten(-1, (groups, lanes)).expand(batch, -1, -1)
        shape = (batch, self.num_heads, groups * lanes, self.hidden_size // self.num_heads)
        return State(
            batch,
            self._rotations(),
            present,
            torch.full((batch * lanes, self.window), self.K, device=device),
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

    def _rotations(self) -> Tensor:
        """The rotations of all slots, (G, S, 2 x heads, head / 2), made once for a device and precision."""
        dtype = torch.complex128 if self.embedding.dtype == torch.float64 else torch.complex64
        if self._rotation is None or (self._rotation.dtype, self._rotation.device) != (
            dtype,
            self.order.device,
        ):
            queries, keys = (p.flatten() for p in self._positions())
            rotation = _rotation(queries, keys, self.hidden_size // self.num_heads).to(dtype)
            rotation = rotation.expand(-1, -1, self.num_heads, -1).flatten(1, 2)
            self._rotation = rotation.unflatten(0, self.order.shape).contiguous()
        return self._rotation

    @torch.no_grad()
    def step(self, x: Tensor | None, state: State) -> Tensor:
        """Parameters (batch, S, num_params) of the next group, given the symbols (batch, S) of the last.

        ``x`` is None at the first call. Symbols of lanes that are padding or absent are ignored. The blocks
        are written out here with as few operations as they take: at one sequence the calls of operations,
        not their arithmetic, are what drawing costs.
        """
        g, size = state.call, self.hidden_size
        batch, lanes = state.batch, self.order.shape[1]
        rows, head = batch * lanes, size // self.num_heads
        if x is not None:
            if state.present is not None:
                x = x.masked_fill(~state.present[:, g], self.K)
            state.window = torch.cat([x.reshape(rows, 1), state.window[:, :-1]], 1)
        h: Tensor = F.embedding_bag(self._rows(state.window), self.embedding, mode="sum")
        if self.group_embedding is not None:
            h = h + self.group_embedding[g]
        mask = None
        if state.present is not None:
            mask = state.present[:, None, : g + 1].flatten(2)[:, None].expand(-1, -1, lanes, -1)
            own = torch.zeros(lanes, mask.shape[-1], dtype=torch.bool, device=h.device)
            own[:, -lanes:].fill_diagonal_(True)
            mask = mask | own
        rotation, begin, end = state.rotation[g], g * lanes, (g + 1) * lanes
        norm = (size,)
        for w, keys, values in zip(state.weights, state.keys, state.values, strict=True):
            qkv = _product(F.layer_norm(h, norm, w.norm_attention), w.qkv)
            pairs = torch.view_as_complex(qkv[:, : 2 * size].view(batch, lanes, -1, head // 2, 2))
            qk = torch.view_as_real(pairs * rotation).view(batch, lanes, 2 * self.num_heads, head)
            qk = qk.transpose(1, 2)
            keys[:, :, begin:end] = qk[:, self.num_heads :]
            values[:, :, begin:end] = qkv[:, 2 * size :].view(batch, lanes, -1, head).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                qk[:, : self.num_heads], keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )
            h = _product(out.transpose(1, 2).reshape(rows, size), w.out, h)
            up = _product(F.layer_norm(h, norm, w.norm_mlp), w.up).relu_()
            h = _product(up.mul_(up), w.down, h)
        state.call += 1
        h = F.layer_norm(h, norm, self.norm.weight)
        return F.linear(h, self.head.weight, self.head.bias).view(batch, lanes, -1)


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
