"""Randomness by address: the noise of a sample, a position and a symbol is a function of these and of a seed.

Whoever draws, in whatever order, in batches of whatever size and on however many processes, draws the same
text: nothing depends on how often a generator was asked before. The numbers are those of Philox4x32-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in integer operations that every device
has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dflow.config import InputError
from dflow.ops.devices import widen, widest

#: Multipliers of the two halves of a round, and what is added to the key after each.
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF

#: What noise is for: symbols of a sequence, its length, a component of a mixture.
SYMBOLS, LENGTHS, COMPONENTS = range(3)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words of 32 bits for each counter of four, in int64 tensors.

    Args:
        counter: words in 0..2^32 - 1, int64, of shapes that broadcast.
        key: two words.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox((zero, zero, zero, zero), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, high0 = _product(c0, _MULTIPLIERS[0])
        low1, high1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a product of 32 by 32 bits; int64 overflows, but its bits are right."""
    product = word * multiplier
    return product & _WORD, (product >> 32) & _WORD


def gumbel_of(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """``-log(-log(u))`` of ``u = (bits + 1/2) / 2^52``, bits of 52: half a step off the grid, never 0 or 1.

    In float32, for devices without float64, the logarithm of a u above 1/2 is taken from 1 - u, which the
    integers give exactly. So neither tail is cut off, and the result is that of float64 rounded, within 3e-7
    times 1 + its size: a draw differs only where two symbols tie as closely.

    >>> gumbel_of(torch.tensor([0, (1 << 52) - 1]), torch.float32)
    tensor([-3.6038, 36.7368])
    """
    if dtype == torch.float64:
        return ((bits.double() + 0.5) * 2.0**-52).log_().neg_().log_().neg_()
    above = bits >= 1 << 51
    # The smaller of u and 1 - u.
    part = (torch.where(above, ((1 << 52) - 1) - bits, bits).to(dtype) + 0.5) * 2.0**-52
    return -torch.log(-torch.where(above, torch.log1p(-part), torch.log(part)))


@dataclass(frozen=True)
class Controls:
    """What users change about a law while it draws; what is drawn is then no longer what the model learned.

    They are applied in this order, to the law of one symbol given what its network call knows.

    Args:
        temperature: logits are divided by it; below 1 the likely becomes likelier.
        top_k: only so many symbols, the likeliest, can be drawn (and those as likely as the last of them).
        top_p: only the fewest symbols that together have this probability can be drawn (nucleus sampling;
            Holtzman et al. 2020, arXiv 1904.09751).
        min_p: only symbols can be drawn that are at least this times as likely as the likeliest (Nguyen et
            al. 2024, arXiv 2407.01082).

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(
                f"temperature {self.temperature} must be above 0; top_k=1 always takes the likeliest symbol"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k {self.top_k} must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"{name} {value} must be above 0 and at most 1")

    @property
    def exact(self) -> bool:
        """Whether they leave the law as it is."""
        return self == Controls()

    def __call__(self, logits: Tensor) -> Tensor:
        """Other logits of the same shape ``(..., K)``, -inf where a symbol cannot be drawn."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None:
            law, order = logits.softmax(-1).sort(-1, descending=True)
            # A symbol is kept while those before it have less than top_p: the first always is.
            cut = law.cumsum(-1) - law >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)
        if self.min_p is not None:
            likeliest = logits.max(-1, keepdim=True).values
            logits = logits.masked_fill(logits < likeliest + math.log(self.min_p), -math.inf)
        return logits


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise by which some samples of one seed are drawn.

    Args:
        seed: any integer of 64 bits.
        samples: the number of each sample, int64 ``(n,)``, on the device on which noise is wanted.
        positions: where the entries of the law that draws stand in the whole sequence, int64 ``(dim,)``; None
            where it is the whole.
        controls: changes of the law, or None.
    """

    seed: int
    samples: Tensor
    positions: Tensor | None = None
    controls: Controls | None = None

    @classmethod
    def of(cls, generator: torch.Generator | None, n: int, device: torch.device) -> Noise:
        """The noise of samples 0..n-1 of a seed that a generator draws (None: torch's own of ``device``)."""
        place = device if generator is None else generator.device
        seed = int(torch.randint(1 << 62, (), generator=generator, device=place))
        return cls(seed, torch.arange(n, device=device))

    def select(self, index: Tensor) -> Noise:
        """The noise of a law over some of the entries: ``index``, int64, are their places in this one's."""
        return replace(self, positions=index if self.positions is None else self.positions[index])

    def rows(self, start: int, end: int) -> Noise:
        """The noise of some of the samples."""
        return replace(self, samples=self.samples[start:end])

    def bits(self, rows: Tensor, positions: Tensor, K: int, purpose: int = SYMBOLS) -> Tensor:
        """Random integers of 52 bits, int64 ``(..., K)``, for each sample and position.

        Args:
            rows: places among the samples, int64, of a shape that broadcasts with that of ``positions``.
            positions: places in the sequence, int64.
            K: symbols.
            purpose: `SYMBOLS`, `LENGTHS` or `COMPONENTS`.
        """
        sample = self.samples[rows][..., None]
        position = (positions if self.positions is None else self.positions[positions])[..., None]
        # Two numbers of 64 bits for each counter.
        pair = torch.arange(-(-K // 2), device=self.samples.device)
        high = (sample >> 32 & 0xFFFFFF) | purpose << 24
        a, b, c, d = philox(
            (pair, position & _WORD, sample & _WORD, high), (self.seed & _WORD, self.seed >> 32 & _WORD)
        )
        return torch.stack([a << 20 | b >> 12, c << 20 | d >> 12], -1).flatten(-2)[..., :K]

    def gumbel(self, rows: Tensor, positions: Tensor, K: int, purpose: int = SYMBOLS) -> Tensor:
        """Gumbel noise ``(..., K)``, see `gumbel_of`; arguments as of `bits`.

        The arg-max of log-probabilities plus it is an exact draw (Gumbel 1954; Maddison et al. 2014, arXiv
        1411.0030).
        """
        return gumbel_of(self.bits(rows, positions, K, purpose), widest(self.samples.device))

    def draw(self, logits: Tensor, rows: Tensor, positions: Tensor, gumbel: Tensor | None = None) -> Tensor:
        """Draws, int64 ``(...)``, of laws with ``logits`` ``(..., K)`` up to a constant, under the controls.

        Args:
            logits: in any floating type; the draw is made in float64, if the device has it.
            rows: places among the samples, as of `bits`.
            positions: places in the sequence, as of `bits`.
            gumbel: what `gumbel` gives for them, where it is there already.
        """
        logits = widen(logits) if self.controls is None else self.controls(widen(logits))
        noise = self.gumbel(rows, positions, logits.shape[-1]) if gumbel is None else gumbel
        return (logits + noise).argmax(-1)


class Likeliest(Noise):
    """No noise: each symbol that is drawn is the likeliest under its law, of equals the first.

    >>> noise = Likeliest(0, torch.zeros(2, dtype=torch.int64))
    >>> logits, rows = torch.tensor([[0.5, 2.0, 2.0], [1.0, 0.0, 0.0]]), torch.arange(2)
    >>> noise.draw(logits, rows, rows).tolist()
    [1, 0]
    """

    def gumbel(self, rows: Tensor, positions: Tensor, K: int, purpose: int = SYMBOLS) -> Tensor:
        """Zeros."""
        device = self.samples.device
        return torch.zeros(
            *torch.broadcast_shapes(rows.shape, positions.shape), K, dtype=widest(device), device=device
        )
