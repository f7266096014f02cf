"""Tables of counts against counting by hand, and the mixture that reads them."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict

import pytest
import torch
from torch import Tensor

from dflow.data import GrowingCounts, count
from dflow.nn.counted import Counted, neighbours
from dflow.ops.counts import ContextReader, CountsError, CountTable, RowReader, patterns_of


def by_hand(
    text: list[int], K: int, offsets: tuple[int, ...], entries: range
) -> dict[tuple[int, ...], Counter[int]]:
    """The counts of the contexts of one pattern."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for i in entries:
        places = [i + offset for offset in offsets]
        if text[i] < K and all(0 <= p < len(text) and text[p] < K for p in places):
            counts[tuple(text[p] for p in places)][text[i]] += 1
    return counts


def random_text(K: int, n: int = 200, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, K, (n,), generator=generator)
    text[torch.randint(0, n, (7,), generator=generator)] = K
    return text


def look_up(
    table: CountTable, text: Tensor, K: int, offsets: list[int], patterns: list[tuple[int, ...]]
) -> Tensor:
    """Counts of all symbols in the contexts of every entry of a text, (n, patterns, K)."""
    keys, present = ContextReader(K, offsets, patterns)(neighbours(text[None], offsets, K)[0])
    return table.dense(keys, present, K)


@pytest.mark.parametrize("K", [2, 3, 5, 300])
def test_a_table_has_the_counts_of_every_context(K: int) -> None:
    offsets, patterns = patterns_of(4, True)
    text, other = random_text(K), random_text(K, seed=1)
    dense = look_up(count(text, K, patterns), other, K, offsets, patterns)
    met = 0
    for j, pattern in enumerate(patterns):
        counts = by_hand(text.tolist(), K, pattern, range(len(text)))
        for i in range(len(other)):
            places = [i + offset for offset in pattern]
            symbols = [int(other[p]) if 0 <= p < len(other) else K for p in places]
            expected = torch.zeros(K)
            for symbol, times in counts.get(tuple(symbols), Counter()).items():
                expected[symbol] = times
            met += bool(expected.any()) and len(pattern) > 1
            assert torch.equal(dense[i, j], expected)
    assert met > 20 or K == 300


@pytest.mark.parametrize("together", [7, 1 << 22])
def test_the_look_up_of_accelerators_is_that_of_the_cpu(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dflow.ops.counts._TOGETHER", together)
    K, (offsets, patterns) = 5, patterns_of(3, True)
    table, empty = (count(random_text(K)[:n], K, patterns) for n in (200, 0))
    keys, present = ContextReader(K, offsets, patterns)(torch.randint(0, K + 1, (40, len(offsets))))
    for t in (table, empty):
        dense = t.dense(keys, present, K)
        assert torch.equal(t._padded(keys.flatten(), present.flatten(), K).view_as(dense), dense)
    assert dense.shape == (40, len(patterns), K)


@pytest.mark.parametrize("K", [2, 5])
def test_counts_without_a_fold_are_those_of_the_other_entries(K: int) -> None:
    offsets, patterns = patterns_of(3, True)
    text = random_text(K)
    table, fold = count(text, K, patterns), count(text, K, patterns, entries=range(50, 90))
    rest = [count(text, K, patterns, entries=range(*ends)) for ends in ((0, 50), (90, 200))]
    every = [look_up(t, text, K, offsets, patterns) for t in (table, fold, *rest)]
    assert torch.equal(every[0] - every[1], every[2] + every[3])
    assert K == 2 or len(fold.within(rest[0]).keys) < len(fold.keys)
    assert not len(fold.within(count(text[:0], K, patterns)).keys)


def test_a_budget_leaves_out_the_rarest_of_the_longest_contexts() -> None:
    K, patterns = 4, patterns_of(5, False)[1]
    text = random_text(K, 3000)
    whole = count(text, K, patterns)
    table = count(text, K, patterns, budget=whole.num_bytes // 2)
    assert whole.num_bytes // 4 < table.num_bytes <= whole.num_bytes // 2
    offsets = patterns_of(5, False)[0]
    before, after = (look_up(t, text, K, offsets, patterns).sum(-1) for t in (whole, table))
    assert torch.equal(before[:, :4], after[:, :4])
    lost = after[:, 5] == 0
    assert before[lost, 5].max() < before[~lost, 5].max()
    assert not len(count(text, K, patterns, budget=1).keys)


def test_tensors_that_are_no_table_are_refused() -> None:
    table = count(random_text(3), 3, [(), (-1,), (-2, -1)])
    tensors = table.tensors()
    for name, value in {
        "keys": table.keys.flip(0),
        "sizes": table.sizes + 1,
        "counts": table.counts - table.counts.min(),
        "symbols": table.symbols[1:],
    }.items():
        with pytest.raises(CountsError):
            CountTable(**tensors | {name: value})
    for name, tensor in tensors.items():
        with pytest.raises(CountsError, match=f"{name} must be a vector of"):
            CountTable(**tensors | {name: tensor.double()})


def counted(K: int = 3, dropout: float = 0.0) -> Counted:
    torch.manual_seed(0)
    module = Counted(K, 4, *patterns_of(2, False), dropout=dropout).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_the_mixture_is_that_of_the_formula() -> None:
    """With a gate of zeros the network and the patterns that are met have equal weights."""
    module = Counted(3, 4, *patterns_of(2, False)).double()
    module.use(count(torch.tensor([0, 1, 2, 0, 1, 1]), 3, module.patterns))
    symbols = torch.tensor([[3, 3], [3, 0], [0, 1], [2, 2]])
    logits, h = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    p = module(logits, symbols, h).exp()
    net = logits.softmax(-1)
    unigram = torch.tensor([2, 3, 1]) / 6
    after_0, after_01 = torch.tensor([0.0, 1, 0]), torch.tensor([0, 0.5, 0.5])
    after_1, after_2 = torch.tensor([0, 0.5, 0.5]), torch.tensor([1.0, 0, 0])
    expected = [
        (net[0] + unigram) / 2,
        (net[1] + unigram + after_0) / 3,
        (net[2] + unigram + after_1 + after_01) / 4,
        (net[3] + unigram + after_2) / 3,
    ]
    torch.testing.assert_close(p, torch.stack(expected))


@pytest.mark.parametrize("adapting", [False, True])
@pytest.mark.parametrize("both_sides", [False, True])
@torch.no_grad()
def test_every_way_of_looking_up_gives_one_law(both_sides: bool, adapting: bool) -> None:
    """Many entries at once, a few, and one."""
    K = 5
    module = Counted(K, 4, *patterns_of(4, both_sides)).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.use(count(random_text(K), K, module.patterns))
    if adapting:
        growing = GrowingCounts(K, module.patterns, 3)
        for piece in random_text(K, 150, seed=2).split(40):
            growing.extend(piece)
        module.also = growing
    text = random_text(K, seed=1)
    symbols = neighbours(text[None], module.offsets, K)[0]
    logits, h = torch.randn(len(text), K, dtype=torch.float64), torch.randn(len(text), 4, dtype=torch.float64)
    many = module(logits, symbols, h)
    few = torch.cat(
        [module(*part) for part in zip(logits.split(7), symbols.split(7), h.split(7), strict=True)]
    )
    one = torch.cat(
        [module(*part) for part in zip(logits.split(1), symbols.split(1), h.split(1), strict=True)]
    )
    assert len(text) > module.few
    for law in (few, one):
        torch.testing.assert_close(law, many, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        many.exp().sum(-1), torch.ones(len(text), dtype=torch.float64), rtol=0, atol=1e-12
    )
    # What is looked up one by one is the very counts.
    assert torch.equal(module._few_counts(symbols), module._counts(symbols))


@pytest.fixture(params=["loops", "tensors"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compiled loops, and what is done without numba."""
    if request.param == "tensors":
        monkeypatch.setattr("dflow.nn.counted.loops", lambda: None)
    return str(request.param)


@pytest.mark.parametrize(("K", "hidden"), [(5, 4), (300, 0)])
@torch.no_grad()
def test_a_few_entries_in_single_precision(K: int, hidden: int, way: str) -> None:
    torch.manual_seed(0)
    module = Counted(K, hidden, *patterns_of(4, True)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.use(count(random_text(K), K, module.patterns))
    symbols = neighbours(random_text(K, seed=1)[None, :40], module.offsets, K)
    logits, h = 3 * torch.randn(1, 40, K), torch.randn(1, 40, hidden) if hidden else None

    def agree() -> Tensor:
        exact = copy.deepcopy(module).double()
        law = module(logits, symbols, h)
        expected = exact(logits.double(), symbols, None if h is None else h.double())
        torch.testing.assert_close(law, expected.float(), rtol=0, atol=2e-5)
        single = module(logits[:, 3:4], symbols[:, 3:4], None if h is None else h[:, 3:4])
        torch.testing.assert_close(single[:, 0], law[:, 3], rtol=0, atol=1e-5)
        return law

    before = agree()
    # Other weights and other counts are read from then on, also in a copy.
    module.inner.weight.add_(0.05)
    changed = agree()
    assert not torch.equal(before, changed)
    module.use(count(random_text(K, seed=2), K, module.patterns))
    assert not torch.equal(agree(), changed)
    module.double().float()
    agree()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_drafts_are_the_most_probable_symbols_after_noise(dtype: torch.dtype, way: str) -> None:
    torch.manual_seed(0)
    K = 5
    module = Counted(K, 0, *patterns_of(4, False)).eval().to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.use(count(random_text(K), K, module.patterns))
    for before in ([], [1], [0, 1, 2, 3, 4, 0, 1]):
        noise = -torch.rand(20, K, dtype=torch.float64).log().neg().log()
        line = list(before)
        for row in noise:
            padded = torch.tensor([K] * 4 + line)[-4:]
            line.append(int((module(torch.zeros(K, dtype=dtype), padded) + row).argmax()))
        assert module.draft(before, noise) == line[len(before) :]


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [0],
        [-(1 << 62), (1 << 62) - 1],
        [-1, 0, 1],
        [*range(-100, 100)],
        [*range(50), 1 << 60, (1 << 60) + 1],
        torch.randint(-(1 << 62), 1 << 62, (1000,)).unique().tolist(),
    ],
)
def test_single_rows_are_those_of_the_table(keys: list[int]) -> None:
    n = len(keys)
    ones = torch.ones(n, dtype=torch.int32)
    table = CountTable(torch.tensor(keys, dtype=torch.int64), ones, (torch.arange(n) % 7).byte(), ones + 1)
    read = RowReader(table)
    for i, key in enumerate(keys):
        assert read(key) == ([i % 7], [2])
        for other in (key - 1, key + 1):
            if other not in keys:
                assert read(other) is None
    assert read(-(1 << 62) + 5) is None


def test_left_out_counts_and_dropout_are_for_training_alone() -> None:
    text = random_text(3, 100)
    module = counted(dropout=0.5)
    table, fold = count(text, 3, module.patterns), count(text, 3, module.patterns, entries=range(40))
    module.use(table)
    symbols = neighbours(text[None], module.offsets, 3)
    logits, h = torch.randn(1, 100, 3).double(), torch.randn(1, 100, 4).double()
    module.eval()
    plain = module(logits, symbols, h)
    module.left_out = fold
    assert torch.equal(module(logits, symbols, h), plain)
    module.train()
    kinds = torch.stack([module(logits, symbols, h) for _ in range(60)])
    alone = logits.log_softmax(-1)
    nothing_counted = (kinds - alone).abs().amax(-1) < 1e-12
    assert abs(float(nothing_counted.double().mean()) - 0.5) < 0.05
    module.dropout = 0.0
    one = module(logits, symbols, h)
    other = counted()
    other.use(count(text, 3, module.patterns, entries=range(40, 100)))
    torch.testing.assert_close(other.eval()(logits, symbols, h), one)


def test_every_weight_of_the_mixture_learns() -> None:
    module = counted()
    module.use(count(random_text(3), 3, module.patterns))
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    symbols = torch.tensor([[3, 3], [3, 0], [0, 1], [2, 2], [1, 2], [1, 0]])
    h = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (-module(logits, symbols, h)[:, 0].mean()).backward()
    for tensor in (logits, h, *module.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()
