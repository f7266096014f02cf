"""What the Transformers share: their size, attention with rotary positions, blocks, n-grams.

Positions are rotary (Su et al. 2021, arXiv 2104.09864), blocks are pre-norm with squared rectifiers (So et
al. 2021, arXiv 2109.08668).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflow.nn.recompute import Recomputable
from dflow.ops.devices import widest
from dflow.ops.precision import at_least_float32


@dataclass(frozen=True)
class TransformerSize:
    """Size of a Transformer of symbols, with the names that the settings of a recipe have.

    Args:
        hidden_size: features of an entry, a multiple of twice the number of heads.
        num_hidden_layers: blocks.
        num_attention_heads: heads of each attention.
        intermediate_size: width of the perceptrons; None for ``4 * hidden_size``.
        window: neighbouring symbols that are read directly on each side, one vector for each distance and
            symbol (a convolution over one-hot rows).
        ngram_rows: rows of each table of hashed n-grams of these, see `dflow.nn.embed`; 0 for no tables.
        ngram_size: longest n-gram with a table.
        ngram_dropout: share of the n-grams left out in training, see `dflow.nn.embed`.
        dropout: rate for the outputs of attention and perceptrons.
        counts: longest context, in symbols, of the counts of the training text that the law of an entry is
            mixed with, see `dflow.nn.counted`; 0 for none.
        counts_dropout: share of the entries for which nothing is counted in training.

    Raises:
        ValueError: a value out of its range.
    """

    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    window: int = 8
    ngram_rows: int = 0
    ngram_size: int = 4
    ngram_dropout: float = 0.0
    dropout: float = 0.0
    counts: int = 0
    counts_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.window < 1:
            raise ValueError(f"window must be at least 1, found {self.window}")
        if not 0 <= self.ngram_dropout < 1:
            raise ValueError(f"ngram_dropout must lie in [0, 1), found {self.ngram_dropout}")
        if self.ngram_rows < 0 or self.ngram_size < 2:
            raise ValueError(
                f"ngram_rows must be at least 0 and ngram_size at least 2, found {self.ngram_rows} and "
                f"{self.ngram_size}"
            )

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def inner_size(self) -> int:
        """Width of the perceptrons."""
        return self.intermediate_size or 4 * self.hidden_size

    def blocks(self) -> nn.ModuleList:
        """The layers, with fresh weights."""
        return nn.ModuleList(Block(self) for _ in range(self.num_hidden_layers))


class Attention(nn.Module):
    """Multi-head attention with rotary positions; query and key of a slot may have different positions."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        """``hidden_size`` must be a multiple of ``2 * num_heads``."""
        super().__init__()
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
        """``h`` (batch, n, hidden); ``rotation`` of the n queries and keys, see `rotations`."""
        qkv = self.qkv(h).unflatten(-1, (3, self.num_heads, -1))
        qk = rotated(qkv[:, :, :2], rotation)
        q, k, v = (t.transpose(1, 2) for t in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
        # No dropout of the attention weights: the fused kernel does not support it on a CPU, and the other
        # kernel takes six times as long.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return F.linear(out.transpose(1, 2).flatten(2), self.out.weight)


class Block(Recomputable):
    """Attention and a two-layer perceptron, each after a norm and inside a residual connection."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(size.hidden_size, bias=False)
        self.attention = Attention(size.hidden_size, size.num_attention_heads)
        self.norm_mlp = nn.LayerNorm(size.hidden_size, bias=False)
        self.up = nn.Linear(size.hidden_size, size.inner_size, bias=False)
        self.down = nn.Linear(size.inner_size, size.hidden_size, bias=False)
        self.dropout = nn.Dropout(size.dropout)

    def forward(
        self,
        h: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        causal: bool = False,
    ) -> Tensor:
        """Shapes as in `Attention.forward`."""
        return self.recomputed(self._forward, h, rotation, mask, causal)

    def _forward(self, h: Tensor, rotation: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        h = h + self.dropout(self.attention(self.norm_attention(h), rotation, mask, causal))
        out: Tensor = h + self.dropout(self.down(F.relu(self.up(self.norm_mlp(h))).square()))
        return out


def initialize(module: nn.Module, num_layers: int) -> None:
    """Random weights as in GPT-2: normal(0.02), those of residual outputs smaller by sqrt(2 layers)."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            residual = name.endswith(("attention.out", "down"))
            nn.init.normal_(child.weight, std=0.02 / math.sqrt(2 * num_layers) if residual else 0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def rotations(
    queries: Tensor, keys: Tensor, head_size: int, dtype: torch.dtype, base: float = 10000.0
) -> Tensor:
    """What `rotated` turns queries and keys by, to their positions, int64 ``(n,)`` each.

    Cosines and sines, real ``(n, 2, 1, head_size / 2, 2)``, in float64 for that ``dtype`` and otherwise in
    float32.
    """
    exponent = torch.arange(0, head_size, 2, device=queries.device, dtype=widest(queries.device)) / head_size
    angle = torch.stack([queries, keys], -1)[..., None, None].to(exponent.dtype) * base**-exponent
    if dtype == torch.float64:
        # Cosines and sines of older encoders, to the last bit.
        return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
    return torch.stack([angle.cos(), angle.sin()], -1).to(torch.float32)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries and keys ``x`` ``(batch, n, 2, heads, head)``, turned by `rotations`.

    Each pair ``(a, b)`` of neighbouring features becomes ``(a cos - b sin, a sin + b cos)``, the product of
    two complex numbers. On a CPU that product is three times as fast as real operations on every second
    number. Compilers and some devices have no complex numbers. In float64 it is always the product of complex
    numbers: files are coded in float64, and that product rounds in a way that no sequence of real operations
    repeats, so that a decoder would compute other bits than an older encoder.
    """
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))
    eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if rotation.dtype == torch.float64 or eager_cpu:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    else:
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    return turned.flatten(-2).to(x.dtype)


def ngrams(before: int, after: int, size: int) -> list[list[int]]:
    """Offsets of the neighbours that n-grams up to ``size`` join: before an entry, after it, and around it.

    >>> ngrams(4, 0, 3)
    [[-1, -2], [-1, -2, -3]]
    >>> ngrams(2, 2, 4)
    [[-1, -2], [1, 2], [-1, 1], [-1, 1, 2], [-1, -2, 1], [-1, -2, 1, 2]]
    """
    left = [list(range(-1, -n - 1, -1)) for n in range(1, min(size, before) + 1)]
    right = [list(range(1, n + 1)) for n in range(1, min(size, after) + 1)]
    # N-grams around an entry have as many symbols on either side: the nearest ones say the most about it.
    around = [a + b for a in left for b in right if len(a + b) <= size and abs(len(a) - len(b)) <= 1]
    return left[1:] + right[1:] + around
