"""The table of named cases that every property is tested on. A new bijector or base is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dflow.bijectors import (
    ActNorm,
    Autoregressive,
    Chain,
    Conv1x1,
    Coupling,
    Inverse,
    Permute,
    Reverse,
    squeeze,
)
from dflow.core import Bijector, Context, Distribution, Elementwise
from dflow.data import count
from dflow.distributions import (
    AnyOrder,
    Categorical,
    ConditionalCategorical,
    Confident,
    Mixture,
    Ordered,
    RankedSequence,
    SequenceCategorical,
    Spectra,
)
from dflow.elementwise import Affine, IntegerShift, MixtureLogistic, ModAffine, ModRank, ModShift, Spline
from dflow.flows import Flow, Split
from dflow.nn.attention import TransformerSize
from dflow.nn.counted import Counted
from dflow.nn.densenet import DenseNet
from dflow.nn.infill import InfillTransformer, MaskedTransformer
from dflow.nn.lstm import LSTM
from dflow.nn.made import MADE
from dflow.nn.masked_conv import MaskedConv
from dflow.nn.ngram import NgramNet
from dflow.nn.perceptron import InfillPerceptron, Perceptron
from dflow.nn.table import InfillTable, PrefixTable
from dflow.nn.transformer import GroupCausalTransformer
from dflow.ops.modular import one_hot
from dflow.ops.orders import ORDERS, lockstep, shuffled

#: Alphabet -> number of entries: primes, composites and a prime power, each small enough to enumerate.
DIMS = {2: 8, 3: 5, 5: 4, 6: 3, 9: 3}


class Conditioner(nn.Module):
    """Feed-forward net from known entries (and kept ones, in the context) to params of hidden ones."""

    def __init__(self, known: Tensor, hidden: int, K: int, num_params: int, extra: int = 0) -> None:
        super().__init__()
        self.K, self.hidden = K, hidden
        self.register_buffer("known", known)
        self.net = nn.Sequential(
            nn.Linear((len(known) + extra) * K, 16), nn.Tanh(), nn.Linear(16, hidden * num_params)
        )

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        lengths, given = (context.lengths, list(context.given)) if context else (None, [])
        # Inside a `Split` the lengths of its kept entries come last.
        count = given.pop() if lengths is not None and given else None
        parts = [self._rows(x, self.known, lengths)]
        parts += [self._rows(item, torch.arange(item.shape[1]), count) for item in given]
        return self.net(torch.cat(parts, 1).flatten(1)).unflatten(1, (self.hidden, -1))

    def _rows(self, x: Tensor, positions: Tensor, lengths: Tensor | None) -> Tensor:
        rows = (x if x.is_floating_point() else one_hot(x, self.K)).to(self.net[0].weight.dtype)
        return rows if lengths is None else torch.where((positions < lengths[:, None])[..., None], rows, 0)


class Given(Conditioner):
    """Net of a conditional law: called with the kept entries and, with lengths, theirs."""

    def __init__(self, kept: int, hidden: int, K: int, num_params: int | None = None) -> None:
        super().__init__(torch.arange(kept), hidden, K, num_params or K)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return super().forward(x, None if context is None else Context(lengths=context.given[-1]))


def alternate(dim: int, start: int = 0) -> Tensor:
    """True at every second entry, from ``start`` on."""
    return torch.arange(dim) % 2 == start


def coupling(elementwise: Elementwise, K: int, dim: int, start: int = 0, extra: int = 0) -> Coupling:
    mask = alternate(dim, start)
    hidden = int((~mask).sum())
    net = Conditioner(mask.nonzero().flatten(), hidden, K, elementwise.num_params, extra)
    return Coupling(elementwise, net, mask)


def partial_coupling(K: int, dim: int) -> Coupling:
    """The first entry is known, the last is hidden, all others pass unseen."""
    line = torch.arange(dim)
    return Coupling(
        ModAffine(K), Conditioner(line[:1], 1, K, ModAffine(K).num_params), line < 1, line == dim - 1
    )


def autoregressive(elementwise: Elementwise, K: int, dim: int, inversion: str = "loop") -> Autoregressive:
    net = MADE(dim, K, elementwise.num_params, [16, 16])
    return Autoregressive(elementwise, net, dim, inversion)  # type: ignore[arg-type]


#: A small Transformer.
SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "window": 2,
}


def transformer(
    K: int, num_params: int, order: Tensor, dim: int, block: int = 1, ahead: int | None = None, **sizes: int
) -> GroupCausalTransformer:
    size = TransformerSize(**SMALL | sizes)
    return GroupCausalTransformer(K, num_params, order, dim, size, block=block, ahead=ahead)


def infill_coupling(elementwise: Elementwise, K: int, dim: int, counts: int = 0) -> Coupling:
    mask = alternate(dim)
    net = InfillTransformer(
        K,
        elementwise.num_params,
        mask.nonzero().flatten(),
        (~mask).nonzero().flatten(),
        TransformerSize(**SMALL | {"num_hidden_layers": 1, "counts": counts}),
    )
    return counting(Coupling(elementwise, net, mask), K)


def perceptron_coupling(elementwise: Elementwise, K: int, dim: int) -> Coupling:
    mask = alternate(dim)
    places = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    net = InfillPerceptron(K, elementwise.num_params, *places, hidden_size=8, intermediate_size=8)
    return Coupling(elementwise, net, mask)


def table_coupling(elementwise: Elementwise, K: int, dim: int) -> Coupling:
    mask = torch.arange(dim) != 1
    net = InfillTable(K, elementwise.num_params, mask.nonzero().flatten(), torch.tensor([1]))
    return Coupling(elementwise, net, mask)


def autoregressive_table(elementwise: Elementwise, K: int, dim: int) -> Autoregressive:
    return Autoregressive(elementwise, PrefixTable(K, elementwise.num_params, dim), dim)


def autoregressive_transformer(elementwise: Elementwise, K: int, dim: int) -> Autoregressive:
    net = transformer(K, elementwise.num_params, lockstep(dim, dim), dim)
    return Autoregressive(elementwise, net, dim)


def autoregressive_lstm(elementwise: Elementwise, K: int, dim: int) -> Autoregressive:
    net = LSTM(K, elementwise.num_params, hidden_size=8, num_layers=1, embedding_size=4)
    return Autoregressive(elementwise, net.eval(), dim)


def grouped(K: int, dim: int, calls: int, order: str = "lockstep") -> SequenceCategorical:
    matrix = ORDERS[order](dim, calls)
    return SequenceCategorical(transformer(K, K, matrix, dim), matrix, dim)


def any_order(K: int, dim: int, ngram_rows: int = 0) -> AnyOrder:
    size = TransformerSize(**SMALL, ngram_rows=ngram_rows)
    return AnyOrder(MaskedTransformer(K, K, dim, size), dim, K)


M = TypeVar("M", bound=nn.Module)


def counting(law: M, K: int) -> M:
    """The law, or a bijector, with counts of a random text, which has common contexts and lacks others."""
    text = torch.randint(0, K, (60,), generator=torch.Generator().manual_seed(K)) // torch.randint(
        1, 3, (60,), generator=torch.Generator().manual_seed(K + 1)
    )
    for module in law.modules():
        if isinstance(module, Counted):
            module.use(count(text, K, module.patterns))
    return law


def counting_grouped(K: int, dim: int, calls: int, block: int = 1, ahead: int = 2) -> SequenceCategorical:
    matrix = lockstep(dim, min(dim, calls * block))
    law = SequenceCategorical(transformer(K, K, matrix, dim, block, ahead, counts=3), matrix, dim, block)
    law.lay = lockstep
    counting(law, K)
    return law


def counting_any_order(K: int, dim: int) -> Ordered:
    net = MaskedTransformer(K, K, dim, TransformerSize(**SMALL, counts=3))
    law = Ordered(AnyOrder(net, dim, K), lockstep(dim, 2))
    law.lay = lockstep
    counting(law, K)
    return law


def counting_causal(K: int, dim: int, name: str) -> SequenceCategorical:
    order = lockstep(dim, dim)
    nets: dict[str, Callable[[], nn.Module]] = {
        "transformer": lambda: transformer(K, K, order, dim, counts=3),
        "lstm": lambda: LSTM(K, K, hidden_size=8, num_layers=1, embedding_size=4, counts=3).eval(),
        "ngram": lambda: NgramNet(K, 3),
    }
    law = SequenceCategorical(nets[name](), order, dim)
    counting(law, K)
    return law


def ranked(K: int, dim: int, counts: int = 0) -> RankedSequence:
    order = lockstep(dim, dim)
    return RankedSequence(transformer(K, K + 3, order, dim, counts=counts), order, dim, K, 3)


def permutation(K: int, dim: int) -> Permute:
    return Permute(torch.randperm(dim, generator=torch.Generator().manual_seed(dim)))


def deep(K: int, dim: int) -> Chain:
    return Chain(
        [
            coupling(ModRank(K), K, dim),
            autoregressive(ModAffine(K), K, dim),
            Reverse(),
            coupling(ModShift(K), K, dim, start=1),
            Inverse(autoregressive(ModShift(K), K, dim)),
        ]
    )


BIJECTORS: dict[str, Callable[[int, int], Bijector]] = {
    "coupling shift": lambda K, dim: coupling(ModShift(K), K, dim),
    "coupling affine": lambda K, dim: coupling(ModAffine(K), K, dim),
    "coupling rank": lambda K, dim: coupling(ModRank(K), K, dim),
    "coupling partial": partial_coupling,
    "autoregressive shift": lambda K, dim: autoregressive(ModShift(K), K, dim),
    "autoregressive affine": lambda K, dim: autoregressive(ModAffine(K), K, dim),
    "autoregressive rank": lambda K, dim: autoregressive(ModRank(K), K, dim),
    "coupling rank infill": lambda K, dim: infill_coupling(ModRank(K), K, dim),
    "coupling rank infill counts": lambda K, dim: infill_coupling(ModRank(K), K, dim, 4),
    "coupling affine infill": lambda K, dim: infill_coupling(ModAffine(K), K, dim),
    "coupling rank perceptron": lambda K, dim: perceptron_coupling(ModRank(K), K, dim),
    "coupling shift table": lambda K, dim: table_coupling(ModShift(K), K, dim),
    "autoregressive affine table": lambda K, dim: autoregressive_table(ModAffine(K), K, dim),
    "autoregressive rank transformer": lambda K, dim: autoregressive_transformer(ModRank(K), K, dim),
    "autoregressive affine transformer": lambda K, dim: autoregressive_transformer(ModAffine(K), K, dim),
    "autoregressive affine jacobi": lambda K, dim: autoregressive(ModAffine(K), K, dim, "jacobi"),
    "autoregressive shift lstm": lambda K, dim: autoregressive_lstm(ModShift(K), K, dim),
    "permute": permutation,
    "reverse": lambda K, dim: Reverse(),
    "inverse": lambda K, dim: Inverse(coupling(ModAffine(K), K, dim)),
    "chain": deep,
    "empty chain": lambda K, dim: Chain([]),
}

#: Bijectors that refuse lengths, since they move absent entries among present ones.
WITHOUT_LENGTHS = {"permute"}


def counted(K: int, dim: int, classes: Tensor | None = None) -> Categorical:
    base = Categorical(dim, K, classes, learned=False).double()
    counts = torch.rand(base.counts.shape, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
    base.assign(20 * counts)
    return base


def peaked(K: int, dim: int) -> Categorical:
    base = counted(K, dim)
    base.peak = 0.4
    return base


def split(K: int, dim: int) -> Split:
    mask = alternate(dim)
    kept = int(mask.sum())
    return Split(mask, ConditionalCategorical(Given(kept, dim - kept, K)), counted(K, kept))


def split_spectra(elementwise: Elementwise, K: int, dim: int, components: int) -> Split:
    mask = alternate(dim)
    kept = int(mask.sum())
    net = Given(kept, dim - kept, K, Spectra.num_outputs(elementwise, components))
    return Split(mask, Spectra(elementwise, net, K, components), counted(K, kept))


def split_flow(K: int, dim: int) -> Split:
    """Both parts of the split are flows; the conditional one sees the kept part."""
    mask = alternate(dim)
    kept = int(mask.sum())
    rest = dim - kept
    law: Distribution = counted(K, rest)
    if rest > 1:
        law = Flow(coupling(ModRank(K), K, rest, extra=kept), law)
    return Split(mask, law, Flow(autoregressive(ModAffine(K), K, kept), counted(K, kept)))


BASES: dict[str, Callable[[int, int], Distribution]] = {
    "uniform": lambda K, dim: Categorical(dim, K, learned=False),
    "counted": counted,
    "tied": lambda K, dim: counted(K, dim, torch.arange(dim) % 2),
    "peaked": peaked,
    "learned": lambda K, dim: Categorical(dim, K, learned=True),
    "mixture": lambda K, dim: Mixture(dim, K, 3),
    "autoregressive": lambda K, dim: grouped(K, dim, dim),
    "grouped": lambda K, dim: grouped(K, dim, 2),
    "grouped bit-reversed": lambda K, dim: grouped(K, dim, min(4, dim), "bit_reversed"),
    "grouped n-grams": lambda K, dim: SequenceCategorical(
        transformer(K, K, lockstep(dim, 2), dim, window=3, ngram_rows=7), lockstep(dim, 2), dim
    ),
    "grouped islands": lambda K, dim: grouped(K, dim, 3, "islands"),
    "grouped blocks": lambda K, dim: SequenceCategorical(
        transformer(K, K, lockstep(dim, 3), dim, 2, window=3, ngram_rows=7), lockstep(dim, 3), dim, 2
    ),
    "autoregressive blocks": lambda K, dim: SequenceCategorical(
        transformer(K, K, lockstep(dim, dim), dim, block=2), lockstep(dim, dim), dim, 2
    ),
    "grouped shuffled": lambda K, dim: grouped(K, dim, 2, "shuffled"),
    "any order, lockstep": lambda K, dim: Ordered(any_order(K, dim, 7), lockstep(dim, 2)),
    "any order, random": lambda K, dim: Ordered(any_order(K, dim), shuffled(dim, dim), 2),
    "any order, confidence": lambda K, dim: Confident(any_order(K, dim), 2),
    "lstm": lambda K, dim: SequenceCategorical(
        LSTM(K, K, hidden_size=8, num_layers=2, embedding_size=4).eval(), lockstep(dim, dim), dim
    ),
    "counts, grouped": lambda K, dim: counting_grouped(K, dim, 2),
    "counts, blocks": lambda K, dim: counting_grouped(K, dim, 2, 2),
    "counts, any order": counting_any_order,
    "counts, transformer": lambda K, dim: counting_causal(K, dim, "transformer"),
    "counts, lstm": lambda K, dim: counting_causal(K, dim, "lstm"),
    "counts, ngram": lambda K, dim: counting_causal(K, dim, "ngram"),
    "counts, ranked": lambda K, dim: counting(ranked(K, dim, counts=2), K),
    "split": split,
    "split flow": split_flow,
    "spectra": lambda K, dim: split_spectra(ModRank(K), K, dim, 3),
    "spectra affine": lambda K, dim: split_spectra(ModAffine(K), K, dim, 2),
    "spectrum shift": lambda K, dim: split_spectra(ModShift(K), K, dim, 1),
    "flow": lambda K, dim: Flow(coupling(ModAffine(K), K, dim), counted(K, dim)),
}


Shape = tuple[int, int, int]

#: Images and vectors that the bijectors of the reals are tested on.
SHAPES: list[Shape] = [(2, 1, 1), (4, 1, 1), (2, 4, 4), (1, 4, 4), (3, 2, 2)]

#: Channels of the context of the cases that take one.
CONTEXT_CHANNELS = 2


def halves(shape: Shape) -> tuple[Tensor, int, int, tuple[int, int]]:
    """Mask of the first half, channels known and hidden, and size of what the net sees.

    Half of the channels, or of the rows where there is one channel only.
    """
    C, H, W = shape
    if C > 1:
        known, hidden, size = C // 2, C - C // 2, (H, W)
    else:
        known, hidden, size = 1, 1, (H // 2, W)
    places = size[0] * size[1]
    return torch.arange(C * H * W) < known * places, known, hidden, size


def image_coupling(elementwise: Elementwise, shape: Shape, context: int = 0, first: bool = True) -> Coupling:
    mask, known, hidden, size = halves(shape)
    if not first:
        mask, known, hidden = ~mask, hidden, known
    net = DenseNet(
        known, hidden, size, elementwise.num_params, hidden_size=6, depth=2, context_channels=context
    )
    return Coupling(elementwise, net, mask)


def vector_coupling(elementwise: Elementwise, shape: Shape, context: int = 0) -> Coupling:
    """Every second entry known: no halves."""
    dim = shape[0] * shape[1] * shape[2]
    mask = alternate(dim)
    net = Perceptron(
        int(mask.sum()), int((~mask).sum()), elementwise.num_params, hidden_size=8, context_features=context
    )
    return Coupling(elementwise, net, mask)


def masked(elementwise: Elementwise, shape: Shape, context: int = 0) -> Autoregressive:
    net = MaskedConv(
        shape, elementwise.num_params, hidden_size=6 * shape[0], depth=2, context_channels=context
    )
    return Autoregressive(elementwise, net, shape[0] * shape[1] * shape[2])


def squeezed(shape: Shape) -> Chain:
    """Space to depth where the size allows, and a step of a flow there."""
    layers: list[Bijector] = []
    if shape[1] % 2 == 0:
        bijector, shape = squeeze(shape)
        layers.append(bijector)
    step = [ActNorm(shape), Conv1x1(shape, torch.Generator().manual_seed(1))]
    return Chain(
        [*layers, *step, image_coupling(Spline(4), shape), image_coupling(Affine(), shape, 0, False)]
    )


#: Bijectors of the reals, on images of the given shape.
CONTINUOUS: dict[str, Callable[[Shape], Bijector]] = {
    "coupling affine": lambda shape: image_coupling(Affine(), shape),
    "coupling spline": lambda shape: image_coupling(Spline(5, 3.0), shape),
    "coupling mixture": lambda shape: image_coupling(MixtureLogistic(3), shape),
    "coupling second half": lambda shape: image_coupling(Affine(), shape, first=False),
    "coupling every second": lambda shape: vector_coupling(Spline(4), shape),
    "coupling affine context": lambda shape: image_coupling(Affine(1.0), shape, CONTEXT_CHANNELS),
    "coupling perceptron context": lambda shape: vector_coupling(
        Affine(), shape, CONTEXT_CHANNELS * shape[1] * shape[2]
    ),
    "autoregressive affine": lambda shape: masked(Affine(1.0), shape),
    "autoregressive spline": lambda shape: masked(Spline(4), shape),
    "autoregressive mixture": lambda shape: masked(MixtureLogistic(2, 3.0), shape),
    "autoregressive affine context": lambda shape: masked(Affine(1.0), shape, CONTEXT_CHANNELS),
    "actnorm": ActNorm,
    "conv 1x1": lambda shape: Conv1x1(shape, torch.Generator().manual_seed(0)),
    "step": squeezed,
    "inverse step": lambda shape: Inverse(squeezed(shape)),
}


def integer_step(shape: Shape) -> Chain:
    """Space to depth where the size allows, a permutation undone after the coupling, and a kept one."""
    layers: list[Bijector] = []
    if shape[1] % 2 == 0:
        bijector, shape = squeeze(shape)
        layers.append(bijector)
    size = shape[0] * shape[1] * shape[2]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    inner = image_coupling(IntegerShift(), shape)
    layers += [
        Permute(order),
        inner,
        Inverse(Permute(order)),
        image_coupling(IntegerShift(), shape, 0, False),
    ]
    return Chain([*layers, Permute(order), vector_coupling(IntegerShift(), shape)])


#: Bijectors of the integers, on images of the given shape.
INTEGER: dict[str, Callable[[Shape], Bijector]] = {
    "coupling": lambda shape: image_coupling(IntegerShift(), shape),
    "coupling second half": lambda shape: image_coupling(IntegerShift(), shape, first=False),
    "coupling every second": lambda shape: vector_coupling(IntegerShift(), shape),
    "autoregressive": lambda shape: Autoregressive(
        IntegerShift(), masked(IntegerShift(), shape).net, shape[0] * shape[1] * shape[2], "jacobi"
    ),
    "permute": lambda shape: Permute(torch.arange(shape[0] * shape[1] * shape[2] - 1, -1, -1)),
    "step": integer_step,
    "inverse step": lambda shape: Inverse(integer_step(shape)),
}


def build_continuous(name: str, shape: Shape) -> Bijector:
    """The named bijector with random weights, of a size at which networks neither die nor saturate."""
    bijector = randomize(CONTINUOUS[name](shape))
    with torch.no_grad():
        for parameter in bijector.parameters():
            parameter.div_(2 * parameter[0].numel() ** 0.5)
    return bijector  # type: ignore[return-value]


def context_for(name: str, shape: Shape, batch: int) -> Context | None:
    """What the named bijector is conditioned on."""
    if "context" not in name:
        return None
    # The coupling by rows of a single channel has images of half the height.
    size = halves(shape)[3] if name == "coupling affine context" else shape[1:]
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(batch, CONTEXT_CHANNELS * size[0] * size[1], dtype=torch.float64, generator=generator)
    return Context(given=(given,))


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 with random weights, far from the identity."""
    module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
        for gate in module.modules():
            # Its layers are wide: with weights of 1 nearly every choice would be one of probability 0.
            if isinstance(gate, Counted):
                for layer in (gate.features, gate.inner, gate.weights):
                    layer.weight.div_(layer.in_features**0.5)
    return module


def uneven(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random counts in its bases, under which permutations of symbols matter."""
    generator = torch.Generator().manual_seed(seed)
    for base in module.modules():
        if isinstance(base, Categorical) and not base.learned:
            base.assign(20 * torch.rand(base.counts.shape, generator=generator).to(base.counts))
    return module


def build_bijector(name: str, K: int, dim: int | None = None) -> Bijector:
    """The named bijector with random weights."""
    return randomize(BIJECTORS[name](K, dim or DIMS[K]))  # type: ignore[return-value]


def build_base(name: str, K: int, dim: int | None = None) -> Distribution:
    """The named base with random weights."""
    return randomize(BASES[name](K, dim or DIMS[K]), 1)  # type: ignore[return-value]


def enumerate_all(K: int, dim: int) -> Tensor:
    """All K^dim sequences, int64 ``(K^dim, dim)``, in lexicographic order."""
    return torch.cartesian_prod(*[torch.arange(K)] * dim).view(-1, dim)


def code(x: Tensor, K: int) -> Tensor:
    """The place of each sequence in that order."""
    return (x * K ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)
