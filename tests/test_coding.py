"""Coding: integer tables, the coder against its reference, and round trips of every law."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import BASES, DIMS, alternate, build_base, counted, enumerate_all
from reference_coder import ReferenceCoder
from test_known import FLOWS, build, given
from torch import Tensor, nn

from dflow import zoo
from dflow.bijectors import Chain, Coupling, Permute
from dflow.coding import (
    Coder,
    LogisticTables,
    Tables,
    codec,
    integer_counts,
    logistic_tables,
    logit_counts,
    pop,
    push,
)
from dflow.coding.codec import logistic_steps
from dflow.coding.codes import Bernoulli, Bits, Code, Edges, Golomb, RowsCode, Shared
from dflow.coding.integers import LogisticCode, MixtureCode
from dflow.coding.tables import sigmoid_counts
from dflow.core import Context, Distribution, Elementwise
from dflow.distributions import Categorical, ConditionalCategorical, StandardNormal
from dflow.flows import Flow, Split

TOTAL = 1 << 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(loc: Tensor, log_scale: Tensor, seed: int = 0) -> Tensor:
    u = random(*loc.shape, seed=seed).clamp(1e-12, 1 - 1e-12)
    return (loc + log_scale.exp() * (u.log() - (-u).log1p())).round().long()


def log2_logistic(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    a, b = (x - 0.5 - loc) / scale, (x + 0.5 - loc) / scale
    a, b = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)
    # F(b) - F(a) without cancellation.
    return (b.sigmoid() * -torch.expm1(a - b) * (-a).sigmoid()).log2()


def cost(code: Code, x: Tensor) -> Tensor:
    """Bits that the intervals hold."""
    return (24 - code.intervals(x)[1].double().log2()).sum()


def round_trip(code: Code, x: Tensor) -> bytes:
    """The stream, the same of both coders, and popped by both."""
    streams = []
    for kind in (Coder, ReferenceCoder):
        coder = kind()
        coder.push(*code.intervals(x))
        streams.append(coder.to_bytes())
        assert coder.num_bits <= float(cost(code, x)) + 64
        again = kind(streams[-1])
        assert torch.equal(code.pop(again), x)
        again.finish()
    assert streams[0] == streams[1]
    return streams[0]


# Tables


@pytest.mark.parametrize("K", [2, 3, 27, 256, 5000])
def test_counts_are_whole_positive_and_cost_next_to_nothing(K):
    p = torch.cat([random(50, K) ** 8 + 1e-9, torch.eye(K, dtype=torch.float64)[[0, K // 2, K - 1]]])
    p = p / p.sum(1, keepdim=True)
    counts = integer_counts(p)
    assert counts.dtype == torch.int32
    assert (counts.sum(1) == TOTAL).all()
    assert counts.min() >= 1 + (K == 2)
    assert counts.max() <= TOTAL - 2
    excess = torch.special.xlogy(p, p * TOTAL / counts).sum(1) / math.log(2)
    assert excess.max() < 2 * K / TOTAL + 1e-12
    # The same for each row alone, in another layout and in float32 input of the same values.
    assert torch.equal(integer_counts(p.T.contiguous().T), counts)
    assert torch.equal(torch.stack([integer_counts(row) for row in p]), counts)
    assert torch.equal(integer_counts(p.float()), integer_counts(p.float().double()))


def test_counts_of_a_uniform_law_give_the_rest_to_the_first():
    assert integer_counts(torch.full((3,), 1 / 3)).tolist() == [5592406, 5592405, 5592405]
    assert integer_counts(torch.tensor([1.0, 0.0])).tolist() == [TOTAL - 2, 2]
    assert integer_counts(torch.tensor([0.0, 1.0, 0.0])).tolist() == [1, TOTAL - 2, 1]


@pytest.mark.parametrize("row", [[0.5, 0.4], [1.5, -0.5], [math.nan, 1.0], [math.inf, 0.0], [1.0]], ids=str)
def test_counts_refuse_what_is_no_law(row):
    with pytest.raises(ValueError, match=r"probabilities|symbols"):
        integer_counts(torch.tensor(row))


@pytest.mark.parametrize("K", [2, 3, 27, 256, 5000])
def test_counts_of_logits(K):
    logits = 4 * torch.randn(200, K, dtype=torch.float64)
    logits[0, 1:], logits[1, 0] = -torch.inf, 1e5
    counts = logit_counts(logits)
    assert counts.dtype == torch.int32
    assert (counts.sum(1) == TOTAL).all()
    assert counts.min() >= 1 + (K == 2)
    p = logits.softmax(1)
    excess = torch.special.xlogy(p, p * TOTAL / counts).sum(1) / math.log(2)
    assert excess.max() < 2 * K / TOTAL + 1e-5
    # What differs in the last bits, or by a constant, gives the same.
    assert torch.equal(logit_counts(logits + 1e-14 * torch.randn(200, 1)), counts)
    steps = torch.randint(0, 2000, (200, K)) / 128
    assert torch.equal(logit_counts(steps.double()), logit_counts(steps - 3))
    assert torch.equal(logit_counts(steps + 1e-3 * torch.rand(200, K)), logit_counts(steps))


def test_counts_of_logits_are_pinned():
    """If this fails, streams of before can no longer be read."""
    counts = logit_counts(torch.arange(0, 30, 0.75))
    assert counts[-4:].tolist() == [933015, 1975193, 4181483, 8852211]
    assert int((counts * torch.arange(40)).sum() % 1000003) == 289002


def test_counts_of_one_logit_are_pinned():
    """If this fails, streams of before can no longer be read."""
    counts = sigmoid_counts()
    middle = len(counts) // 2
    law = torch.sigmoid(torch.arange(-middle, middle + 1).double() / 128)
    assert float((counts - TOTAL * law).abs().max()) <= 1.5
    assert torch.equal(counts + counts.flip(0), torch.full_like(counts, TOTAL))
    assert counts[[0, middle, middle + 128, -1]].tolist() == [2, 8388608, 12265128, 16777214]
    assert int((counts.long() * torch.arange(len(counts))).sum() % 1000003) == 472662


@pytest.mark.parametrize("row", [[math.nan, 1.0], [math.inf, 0.0], [-math.inf, -math.inf], [1.0]], ids=str)
def test_counts_of_logits_refuse_what_is_no_law(row):
    with pytest.raises(ValueError, match=r"logits|symbols"):
        logit_counts(torch.tensor(row))


def test_tables_of_logistic_laws_are_pinned():
    """If this fails, streams of before can no longer be read."""
    tables = logistic_tables()
    assert tables.cumulative.shape == (1680, 259)
    assert tables.fingerprint() == "bd4d6ed8ad0d4b8974ad8f25d63a8a3517b15caf72c0caffd2a7a240f9017dfb"
    other = LogisticTables()
    other.load_state_dict(tables.state_dict())
    assert other.fingerprint() == tables.fingerprint()


def test_tables_hold_the_law():
    tables = logistic_tables()
    scale = 2 ** (torch.arange(-40, 32, dtype=torch.float64) / 8)
    x = torch.arange(-128, 128)
    for fraction in (0, 3 / 8, 0.5, 7 / 8):
        loc = torch.full_like(scale, 5 + fraction)
        index, base, shift, _ = tables.locate(loc, scale.log())
        size = tables.log_fractions
        nearest = (loc * (1 << size)).round() / (1 << size)
        assert (shift == 0).all()
        law = 2 ** log2_logistic(x + base[:, None], nearest[:, None], scale[:, None])
        counts = tables.cumulative[index].diff(dim=1)
        ideal = (law * (TOTAL - 258)).floor().nan_to_num() + 1
        difference = (counts[:, 1:-1] - ideal).abs()
        difference.scatter_(1, counts[:, 1:-1].argmax(1, keepdim=True), 0)
        assert difference.max() <= 1
        assert (counts[:, [0, -1]] - 1 <= ((-127.5 / scale).sigmoid() * TOTAL)[:, None]).all()


def test_cost_of_the_tables_over_the_law():
    """Expected excess, enumerated over x and averaged over the mean, below 0.002 bit at every scale."""
    tables = logistic_tables()
    means = (torch.arange(97, dtype=torch.float64) + 0.4) / 97
    for log2_scale in torch.linspace(-9, 5, 57, dtype=torch.float64).tolist():
        scale = torch.tensor(2.0**log2_scale, dtype=torch.float64)
        reach = min(120 << max(0, math.floor(log2_scale) - 3), math.ceil(45 * float(scale)) + 3)
        x = torch.arange(-reach, reach + 1)
        p = log2_logistic(x[:, None], means, scale)
        index, base, shift, _ = tables.locate(means, scale.log().expand(97))
        cell = ((x[:, None] - base) >> shift) + 129
        row = tables.cumulative.diff(dim=1)[index]
        q = row.T.gather(0, cell).double().log2() - 24 - shift
        excess = (2**p * (p - q)).nan_to_num().sum(0).mean()
        assert -1e-4 < excess < 0.0017, log2_scale


@pytest.mark.parametrize("log2_scale", [3.95, 9.95])
def test_cost_of_the_tails(log2_scale):
    """The rest of the excess: where the window is narrowest in scales."""
    scale = torch.tensor([2.0**log2_scale], dtype=torch.float64)
    loc = torch.tensor([0.3], dtype=torch.float64)
    code = LogisticCode(logistic_tables(), loc, scale.log())
    end, step = 128 << int(code.shift), 1 << max(0, int(code.shift) - 1)
    excess = 0.0
    for x in range(end + 1, end + math.ceil(22 * float(scale)), step):
        for sign in (-1, 1):
            number = torch.tensor([sign * x])
            p = log2_logistic(number, loc, scale)
            excess += step * float(2**p * (p + cost(code, number)))
    assert -0.001 < excess < 0.0004


def test_where_numbers_lie():
    """Means are rounded to fractions that hang on the scale, halves to even; wide scales have wide cells."""
    tables = logistic_tables()
    scale = torch.tensor([10.0, 10.0, 10.0, 5.0, 20.0, 20.0, 40.0, 1e-9, 1e30, 1.0], dtype=torch.float64)
    loc = torch.tensor([0.5, 1.5, -0.6, -0.5, 3.0, -0.1, 3.9, 0.01, 7.0, 1e30], dtype=torch.float64)
    index, base, shift, orders = tables.locate(loc, scale.log())
    assert shift.tolist() == [0, 0, 0, 0, 1, 1, 2, 0, 16, 0]
    assert base.tolist() == [0, 2, -1, -1, 3, -1, 2, 0, 8 - (1 << 15), 1 << 40]
    # The mean -0.5 lies in cell -1 of a table half a unit off.
    assert index[3] - tables.locate(torch.zeros(1), scale[3:4].log())[0] == 1
    assert orders.tolist() == [3, 3, 3, 2, 3, 3, 3, 0, 3, 0]
    # Far from an edge, for all that the scale says.
    assert index[7] == 1680 - 141
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            tables.locate(torch.tensor([bad]), torch.zeros(1))
    with pytest.raises(ValueError, match="twice"):
        tables.locate(torch.zeros(2), torch.zeros(1))


def test_sharp_laws_are_those_of_one_logit():
    """Any scale below 2^-5, at means on either side of an edge and far from it, not only on average."""
    tables = logistic_tables()
    for log2_scale in (-5.1, -6.0, -9.3, -14.0, -17.9):
        scale = torch.tensor(2.0**log2_scale, dtype=torch.float64)
        logits = torch.linspace(-15.5, 15.5, 249, dtype=torch.float64)
        means = (7.5 + logits * scale).clamp(7, 8)
        index, base, shift, _ = tables.locate(means, scale.log().expand(249))
        assert (shift == 0).all()
        assert (base >= 7).all()
        assert (base <= 8).all()
        x = torch.arange(5, 11)
        p = log2_logistic(x[:, None], means, scale)
        q = tables.cumulative.diff(dim=1)[index].T.gather(0, x[:, None] - base + 129).double().log2() - 24
        excess = (2**p * (p - q)).nan_to_num().sum(0)
        assert excess.max() < 0.0015
        assert excess.mean() < 0.0003


# The coder


@pytest.mark.parametrize("K", [2, 3, 4, 27, 256, 3000])
def test_rows_and_tables_are_coded_as_the_reference_does(K):
    p = random(200, K) ** 6
    p[0] = torch.eye(K, dtype=torch.float64)[0]
    p[1] = torch.eye(K, dtype=torch.float64)[K - 1]
    counts = integer_counts(p / p.sum(1, keepdim=True))
    x = (random(200, seed=1) * K).long()
    # The likeliest and the least likely, at both ends.
    x[:4] = torch.tensor([0, K - 1, K - 1, 0])
    round_trip(RowsCode(counts), x)
    round_trip(Shared(Tables(counts), (random(200, seed=2) * 200).long()), x)
    extreme = integer_counts(torch.eye(K)[[0, K - 1]])
    for index in (0, 1):
        likely = torch.full((1000,), index * (K - 1))
        code = Shared(Tables(extreme), torch.full((1000,), index))
        assert len(round_trip(code, likely)) <= 8
        round_trip(code, (K - 1) - likely)
        assert cost(code, (K - 1) - likely) >= 1000 * 23


@pytest.mark.parametrize("K", [2, 3, 6, 18, 259])
def test_edges_are_cut_into_counts_that_sum_up(K):
    p = random(300, K) ** 6
    p[0], p[1], p[2] = 0, 0, torch.eye(K, dtype=torch.float64)[0]
    p[1, K - 1] = 1
    # Masses of any size, about any place.
    scale = 10.0 ** (40 * random(300, seed=3) - 20)
    below = torch.nn.functional.pad(p.cumsum(1), (1, 0)).T * scale
    below += scale * random(300, seed=4)
    code = Edges(below)
    start, size = code.intervals(torch.zeros(300, dtype=torch.int64))
    total = 0 * start
    for k in range(K):
        start, size = code.intervals(torch.full((300,), k))
        assert torch.equal(start.long(), total.long())
        assert int(size.min()) >= (2 if K == 2 else 1)
        total = total + size
    assert bool((total == TOTAL).all())
    law = torch.where(p.sum(1, keepdim=True) > 0, p / p.sum(1, keepdim=True), 1 / K)
    x = law.multinomial(1, generator=torch.Generator().manual_seed(5)).squeeze(1)
    x[:6] = torch.tensor([0, 0, K - 1, K - 1, 0, 1])
    round_trip(code, x)
    ideal = -float(law.gather(1, x[:, None])[4:].log2().sum())
    assert abs(float((24 - code.intervals(x)[1].double().log2())[4:].sum()) - ideal) < 300 * K * 2e-5
    for wrong in (torch.full((300,), K), torch.full((300,), -1)):
        with pytest.raises(ValueError, match="symbols must lie in"):
            code.intervals(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_logit_costs_what_it_says(dtype):
    logits = torch.cat([torch.linspace(-15, 15, 4001), 0.1 * random(4000) - 0.05]).to(dtype)
    code, share = Bernoulli(logits), torch.sigmoid(logits.double())
    sizes = [code.intervals(torch.full(logits.shape, x))[1].double() / TOTAL for x in (0, 1)]
    # Half a step of 1/128, and half a count.
    for size, p in zip(sizes, (1 - share, share), strict=True):
        assert bool(((size / p).log().abs() <= 1 / 256 + 1 / (TOTAL * p) + 1e-6).all())
    assert torch.equal(sizes[0] + sizes[1], torch.ones(len(logits), dtype=torch.float64))
    excess = sum(p * (p / size).log2() for size, p in zip(sizes, (1 - share, share), strict=True))
    assert 0 <= float(excess.mean()) < 4e-6
    x = torch.bernoulli(share, generator=torch.Generator().manual_seed(1)).long()
    round_trip(code, x)
    # The other way round from what is sure: 23 bits, no more.
    sure = Bernoulli(torch.tensor([1e30, -1e30, 40, -40], dtype=dtype))
    for x in (torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 1, 0])):
        round_trip(sure, x)
    assert float(cost(sure, torch.tensor([0, 1, 0, 1]))) == 4 * 23
    round_trip(Bernoulli(logits[:0]), torch.zeros(0, dtype=torch.int64))


def test_what_is_no_logit_or_neither_symbol_is_refused():
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="logits must be finite"):
            Bernoulli(torch.tensor([0.0, wrong]))
    for symbol in (2, -1):
        with pytest.raises(ValueError, match="symbols must lie in"):
            Bernoulli(torch.zeros(1)).intervals(torch.tensor([symbol]))


@pytest.mark.parametrize("index", [torch.zeros(0, dtype=torch.int64), torch.tensor([1, 0, 1, 0, 0, 1])])
def test_symbols_of_shared_laws_come_back_in_their_order(index):
    tables = Tables(integer_counts(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])))
    round_trip(Shared(tables, index), torch.arange(len(index)) % 3)


def test_bits_of_any_width_and_golomb_codes():
    widths = torch.arange(62).repeat(3)
    x = (random(186) * (1 << 62)).long() & ((1 << widths) - 1)
    x[:62] = (1 << widths[:62]) - 1
    assert float(cost(Bits(widths), x)) == widths.sum()
    round_trip(Bits(widths), x)
    x = torch.cat([torch.arange(200), 1 << torch.arange(42), (1 << torch.arange(42)) - 1])
    orders = torch.arange(len(x)) % 6
    round_trip(Golomb(orders), x)
    # A unary prefix, as in the textbook.
    for number, order, expected in ((0, 0, 1), (1, 0, 3), (2, 0, 3), (3, 0, 5), (7, 3, 4), (8, 3, 6)):
        bits = cost(Golomb(torch.tensor([order])), torch.tensor([number]))
        assert abs(float(bits) - expected) < 1e-4


def test_golden_bytes():
    """If this fails, streams of before can no longer be read."""
    counts = integer_counts(torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.0, 1.0, 0.0]]))
    assert round_trip(RowsCode(counts), torch.tensor([2, 0, 1])).hex() == "0100c000"
    tables = Tables(counts)
    index = torch.tensor([1, 0, 2, 1, 0, 0, 1, 2])
    assert (
        round_trip(Shared(tables, index), torch.tensor([2, 0, 0, 1, 1, 2, 0, 1])).hex() == "0a000000000020b7"
    )
    x = torch.tensor([0, 3, -200, 5000, 1 << 40])
    loc, log_scale = torch.tensor([0.2, 2.6, 0.0, 4500.0, 0.0]), torch.tensor([-2.0, 0.0, 2.0, 5.0, 1.0])
    assert (
        round_trip(LogisticCode(logistic_tables(), loc, log_scale), x).hex()
        == "2a0b8b0d9ce161152386f6d9f9ffffff0082ffff"
    )
    assert Coder().to_bytes() == b""


def test_the_beginning_of_a_stream_holds_what_is_popped_first():
    counts = integer_counts(torch.full((4000, 16), 1 / 16))
    x = (random(4000) * 16).long()
    coder = Coder()
    coder.push(*RowsCode(counts).intervals(x))
    data = coder.to_bytes()
    assert torch.equal(Coder(data[:1000]).pop_rows(counts[:1900]), x[:1900])


def test_a_stack_goes_on_from_its_bytes():
    counts = integer_counts(random(50, 5).softmax(1))
    x = (random(100) * 5).long().view(2, 50)
    coder = Coder()
    coder.push(*RowsCode(counts).intervals(x[0]))
    coder = Coder(coder.to_bytes())
    coder.push(*RowsCode(counts).intervals(x[1]))
    assert torch.equal(coder.pop_rows(counts), x[1])
    assert torch.equal(coder.pop_rows(counts), x[0])
    coder.finish()


def test_damaged_streams_raise_or_give_other_symbols():
    counts = integer_counts(torch.full((300, 16), 1 / 16))
    x = (random(300) * 16).long()
    coder = Coder()
    coder.push(*RowsCode(counts).intervals(x))
    data = coder.to_bytes()
    with pytest.raises(ValueError, match="words of 4 bytes, found"):
        Coder(data[:-1])
    with pytest.raises(ValueError, match="zero word"):
        Coder(bytes(4) + data)
    longer = Coder(data + b"more")
    assert torch.equal(longer.pop_rows(counts)[:280], x[:280])
    with pytest.raises(ValueError, match="bits are left"):
        longer.finish()
    # One that is cut off gives something all the same; that is for a checksum to find.
    assert not torch.equal(Coder(data[:100]).pop_rows(counts), x)
    code = LogisticCode(logistic_tables(), torch.zeros(5000), torch.full((5000,), 3.0))
    assert code.pop(Coder(data)).shape == (5000,)
    assert code.pop(Coder()).shape == (5000,)
    # Distances that no one codes do not stop it either.
    garbage = bytes(range(1, 253)) * 40
    for found in (Coder(garbage), ReferenceCoder(garbage)):
        assert Golomb(torch.zeros(2000, dtype=torch.int64)).pop(found).shape == (2000,)


@pytest.mark.parametrize(
    ("start", "size"), [(-1, 5), (0, 0), (TOTAL - 4, 5), (0, TOTAL - 1), (0, TOTAL)], ids=str
)
def test_intervals_are_checked(start, size):
    with pytest.raises(ValueError, match="intervals must lie"):
        Coder().push(torch.tensor([3, start]), torch.tensor([3, size]))


def test_arguments_of_codes_are_checked():
    code = RowsCode(integer_counts(torch.full((2, 4), 0.25)))
    tables = logistic_tables()
    for x in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"symbols must lie in 0\.\.3"):
            code.intervals(torch.tensor(x))
    for x in (torch.zeros(2), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"int64 \(2,\)"):
            code.intervals(x)
        with pytest.raises(ValueError, match=r"int64 \(2,\)"):
            LogisticCode(tables, torch.zeros(2), torch.zeros(2)).intervals(x)
    with pytest.raises(ValueError, match=r"2\^40"):
        LogisticCode(tables, torch.zeros(1), torch.zeros(1)).intervals(torch.tensor([(1 << 40) + 1]))
    for counts in (torch.tensor([[TOTAL, 0]]), torch.tensor([[TOTAL - 3, 2]]), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="counts must be"):
            Tables(counts)
        with pytest.raises(ValueError, match="counts must be"):
            Coder().pop_rows(counts)
    with pytest.raises(ValueError, match="three times"):
        MixtureCode(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="not finite"):
        MixtureCode(torch.full((1, 1), math.nan), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1).long())
    with pytest.raises(ValueError, match="twice"):
        Coder().push(torch.zeros(2).long(), torch.ones(3).long())


def test_models_follow_their_tables():
    """Those kept from before are not used for tables loaded since; tables can be copied and saved."""
    one, other = (Tables(integer_counts(torch.tensor([row]))) for row in ([0.9, 0.05, 0.05], [0.1, 0.1, 0.8]))
    x, index = torch.tensor([0, 1, 2, 2]), torch.zeros(4, dtype=torch.int64)
    round_trip(Shared(one, index), x)
    assert copy.deepcopy(one).fingerprint() == pickle.loads(pickle.dumps(one)).fingerprint()
    one.load_state_dict(other.state_dict())
    assert round_trip(Shared(one, index), x) == round_trip(Shared(other, index), x)


# Codes of integers


def test_logistic_laws_of_any_scale_and_numbers_anywhere():
    n = 400
    loc = (random(n) - 0.5) * 10 ** (random(n, seed=1) * 9)
    log_scale = random(n, seed=2) * 40 - 20
    x = draw(loc, log_scale.clamp(max=14))
    far = torch.tensor([1 << 40, -(1 << 40), 0, 200, -129, -130, 127, 128, 129])
    round_trip(LogisticCode(logistic_tables(), loc, log_scale), x)
    round_trip(LogisticCode(logistic_tables(), loc[:9], log_scale[:9]), far)
    round_trip(LogisticCode(logistic_tables(), torch.zeros(9), torch.linspace(-5, 14, 9)), far)
    round_trip(LogisticCode(logistic_tables(), loc[:0], log_scale[:0]), far[:0])


def test_length_of_logistic_streams():
    n = 60_000
    loc, log_scale = 100 * random(n) - 50, 6 * random(n, seed=1) - 2
    x = draw(loc, log_scale, 2)
    coder = Coder()
    coder.push(*LogisticCode(logistic_tables(), loc, log_scale).intervals(x))
    ideal = -float(log2_logistic(x, loc, log_scale.exp()).sum())
    assert -0.002 * n < coder.num_bits - ideal < 0.002 * n + 64
    assert torch.equal(LogisticCode(logistic_tables(), loc, log_scale).pop(coder), x)
    coder.finish()


MIXTURES = {
    "one": ([[0.3]], [[1.0]]),
    "narrow": ([[-3.5, 0.2, 9.0]], [[-3.0, 0.0, 1.0]]),
    "wide": ([[-100.0, 20.0, 90.0]], [[3.0, 3.5, -1.0]]),
    "far apart": ([[-1e5, 3.0, 2e6]], [[-2.0, 1.0, 5.0]]),
    "several": ([[0.0, 1.0], [50.5, -700.0]], [[0.0, 1.0], [4.0, 2.0]]),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_cost_what_they_should(name):
    loc, log_scale = (torch.tensor(v, dtype=torch.float64) for v in MIXTURES[name])
    weights = torch.arange(1.0, 1 + loc.shape[1], dtype=torch.float64).expand_as(loc)
    n = 3000
    index = torch.arange(n) % len(loc)
    part = (weights / weights.sum(1, keepdim=True)).double()[index].multinomial(1)
    x = draw(*(v[index].gather(1, part).squeeze(1) for v in (loc, log_scale)))
    code = MixtureCode(loc, log_scale, weights.log(), index)
    p = log2_logistic(x[:, None], loc[index], log_scale[index].exp()) * math.log(2)
    ideal = -torch.logsumexp(
        p + weights[index].log() - weights.sum(1)[index, None].log(), 1
    ).sum() / math.log(2)
    assert abs(float(cost(code, x) - ideal)) < 0.002 * n
    again = MixtureCode(loc, log_scale, weights.log(), index)
    coder = Coder()
    coder.push(*code.intervals(x))
    assert torch.equal(again.pop(coder), x)
    coder.finish()
    far = torch.tensor([-(1 << 40), 1 << 40, 300, -300, 0, 1, 2, 3_000_000])
    round_trip(MixtureCode(loc, log_scale, weights.log(), torch.arange(8) % len(loc)), far)
    round_trip(MixtureCode(loc, log_scale, weights.log(), torch.zeros(0).long()), far[:0])


# Distributions


def coded(law: Distribution, x: Tensor, context=None) -> tuple[bytes, int]:
    coder, reference = Coder(), ReferenceCoder()
    push(law, x, coder, context)
    push(law, x, reference, context)
    data, bits = coder.to_bytes(), coder.num_bits
    assert data == reference.to_bytes()
    for found in (Coder(data), ReferenceCoder(data)):
        assert torch.equal(pop(law, len(x), found, context), x)
        found.finish()
    return data, bits


@pytest.mark.parametrize("K", [2, 3, 6])
@pytest.mark.parametrize("name", BASES)
def test_every_law_on_symbols_comes_back(name, K):
    law = build_base(name, K).eval()
    x = enumerate_all(K, DIMS[K])
    x = x[torch.randperm(len(x))[:60]]
    ideal = -float(law.log_prob(x).detach().sum()) / math.log(2)
    _, bits = coded(law, x)
    # Few symbols, some of them next to impossible: the least counts shorten these.
    assert bits <= ideal + 0.002 * x.numel() + 64


@pytest.mark.parametrize("name", BASES)
def test_only_what_is_present_is_coded(name):
    K, n = 3, 40
    dim = DIMS[K]
    law = build_base(name, K).eval()
    lengths = torch.arange(n) % (dim + 1)
    x = enumerate_all(K, dim)[torch.randperm(K**dim)[:n]]
    x = torch.where(torch.arange(dim) < lengths[:, None], x, 0)
    context = Context(lengths=lengths)
    ideal = -float(law.log_prob(x, context).detach().sum()) / math.log(2)
    _, bits = coded(law, x, context)
    assert bits <= ideal + 0.002 * x.numel() + 64
    assert torch.equal(
        pop(law, 2, Coder(), Context(lengths=0 * lengths[:2])), torch.zeros(2, dim, dtype=torch.int64)
    )
    noise = torch.where(torch.arange(dim) < lengths[:, None], x, 2)
    coder = Coder()
    push(law, noise, coder, context)
    assert torch.equal(pop(law, n, coder, context), x)


def test_length_of_streams_of_symbols():
    """The mean over the law of the coded length is its entropy, to 0.002 bit a symbol, enumerated."""
    for K, dim in ((2, 8), (27, 2), (256, 1)):
        law = counted(K, dim).eval()
        x = enumerate_all(K, dim)
        log_p = law.log_prob(x)
        _, chain = codec.steps(law, 1, None)
        sizes = Tables(logit_counts(law.log_law())).cumulative.diff(dim=1).double()
        bits = (24 - sizes[torch.arange(dim), x].log2()).sum(1)
        assert abs(float((log_p.exp() * (bits + log_p / math.log(2))).sum())) < 1e-4 * dim
        assert torch.equal(next(chain)[1].tables.cumulative.diff(dim=1), sizes.int())


def test_large_alphabets_and_extreme_laws():
    law = Categorical(3, 256, learned=True)
    with torch.no_grad():
        law.logits[:, 7] = 200.0
    law.eval()
    likely = torch.full((500, 3), 7)
    assert coded(law, likely)[1] <= 64
    coded(law, (random(20, 3) * 256).long())


class Shift(Elementwise):
    num_params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x - params.squeeze(-1).round().long(), torch.zeros(x.shape)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return z + params.squeeze(-1).round().long(), torch.zeros(z.shape)


class Given(nn.Module):
    """Some function of the known entries: num_params numbers for each of the others."""

    def __init__(self, hidden: int, num_params: int) -> None:
        super().__init__()
        self.shape = (hidden, num_params)

    def forward(self, known: Tensor, context=None) -> Tensor:
        total = known.double().sum(1, keepdim=True) + 0.0
        numbers = torch.arange(1.0, 1 + self.shape[0] * self.shape[1], dtype=torch.float64)
        return (2 * torch.sin(total * numbers)).unflatten(1, self.shape)


class Integers(Distribution):
    """Logistic laws or mixtures by given parameters, or by a net."""

    def __init__(self, params, net: nn.Module | None = None) -> None:
        super().__init__()
        self.given, self.net = params, net

    def params(self, context):
        return [v[None] for v in self.given] if self.net is None else self.net(*context.given).unbind(-1)

    def log_prob(self, x, context=None):
        raise NotImplementedError

    def sample(self, n, context=None, generator=None):
        raise NotImplementedError


@codec.steps.register
def _(distribution: Integers, n: int, context):
    return logistic_steps(n, *distribution.params(context))


def integer_flow() -> Flow:
    dim = 6
    mask = alternate(dim)
    bijector = Chain([Coupling(Shift(), Given(3, 1), mask), Permute(torch.tensor([2, 0, 1, 5, 4, 3]))])
    mixture = tuple(torch.linspace(-1, 2, 6, dtype=torch.float64).view(3, 2) * k for k in (30, 1, 1))
    return Flow(bijector, Split(mask, Integers(None, Given(3, 2)), Integers(mixture))).eval()


def test_flows_and_splits_over_the_integers():
    law, x = integer_flow(), (200 * random(50, 6) - 100).long()
    x[0, 3] = 1 << 39
    coded(law, x)


def test_mixtures_are_coded_in_parts(monkeypatch):
    monkeypatch.setattr(codec, "_MIXTURES", 7)
    x = (20 * random(9, 3)).long()
    shared = tuple(torch.linspace(-1, 2, 6).view(3, 2) * k for k in (8, 1, 1))
    own = tuple(v.expand(9, 3, 2) + torch.arange(9)[:, None, None] for v in shared)
    coded(Integers(shared).eval(), x)
    rows = Integers(None, nn.Identity()).eval()
    rows.params = lambda context: own
    coded(rows, x)


def test_several_laws_share_a_stack():
    laws = [build_base("mixture", 3).eval(), integer_flow(), build_base("grouped", 3).eval()]
    xs = [enumerate_all(3, 5)[:17], (20 * random(5, 6)).long(), enumerate_all(3, 5)[50:60]]
    coder = Coder()
    for law, x in zip(laws, xs, strict=True):
        push(law, x, coder)
    coder = Coder(coder.to_bytes())
    for law, x in zip(laws[::-1], xs[::-1], strict=True):
        assert torch.equal(pop(law, len(x), coder), x)
    coder.finish()


@pytest.mark.parametrize("name", ["counted", "mixture", "grouped", "any order, confidence", "split", "flow"])
def test_batches_of_none(name):
    law = build_base(name, 3).eval()
    coder = Coder()
    push(law, torch.zeros(0, DIMS[3], dtype=torch.int64), coder)
    assert coder.to_bytes() == b""
    assert pop(law, 0, coder).shape == (0, DIMS[3])


def test_another_model_is_noticed():
    x = enumerate_all(3, 5)
    coder = Coder()
    push(build_base("flow", 3).eval(), x, coder)
    other = build_base("uniform", 3).eval()
    assert not torch.equal(pop(other, len(x), coder), x)
    with pytest.raises(ValueError, match="another model coded it"):
        coder.finish()


def test_arguments_of_the_codec_are_checked():
    law, x, coder = build_base("counted", 3).eval(), enumerate_all(3, 5), Coder()
    with pytest.raises(ValueError, match=r"training mode.*call eval\(\)"):
        push(build_base("flow", 3), x, coder)
    with pytest.raises(ValueError, match=r"training mode.*call eval\(\)"):
        pop(build_base("split", 3), 2, coder)
    with pytest.raises(ValueError, match="no exact code for StandardNormal"):
        push(StandardNormal(5).eval(), x, coder)
    for bad in (x.double(), x[:, :4], x[0]):
        with pytest.raises(ValueError, match=r"int64 \(n, 5\)"):
            push(law, bad, coder)
    with pytest.raises(ValueError, match=r"int64 \(n, dim\)"):
        push(build_base("flow", 3).eval(), x.double(), coder)
    with pytest.raises(ValueError, match=r"symbols must lie in 0\.\.2"):
        push(law, x + 1, coder)
    for name in ("counted", "mixture", "grouped", "any order, lockstep"):
        with pytest.raises(ValueError, match=r"lengths must be int64 \(7,\).* found torch.int64 \(4,\)"):
            push(build_base(name, 3).eval(), x[:7], coder, Context(lengths=torch.full((4,), 5)))
    conditional = ConditionalCategorical(Given(2, 3)).eval()
    for run in (
        lambda: push(conditional, x[:7, :2], coder, Context(given=(x[:4],))),
        lambda: pop(conditional, 7, coder, Context(given=(x[:4],))),
    ):
        with pytest.raises(ValueError, match="7 rows of x for a context of 4"):
            run()
    with pytest.raises(ValueError, match="loc of shape"):
        logistic_steps(3, torch.zeros(2, 4), torch.zeros(2, 4))
    assert coder.to_bytes() == b""


# Integer flows


@pytest.mark.parametrize(
    "changes",
    [{}, {"permute": "kept", "split": "half", "rezero": True}, {"components": 1, "num_levels": 1}],
    ids=["default", "half", "single"],
)
@torch.no_grad()
def test_images_of_an_integer_flow_come_back_and_cost_what_the_likelihood_says(changes):
    values = {"shape": [1, 8, 8], "levels": [256], "lowest": [0], "num_levels": 2, "num_flows": 2}
    values |= {"hidden_size": 8, "num_hidden_layers": 2}
    torch.manual_seed(0)
    law = zoo.build_image("integer", zoo.settings("integer", values | changes)).double().eval()
    for parameter in law.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    smooth = (128 + 40 * torch.randn(6, 64).cumsum(1) / 8).round().long().clamp(0, 255)
    # Noise and constants, which no model expects, too.
    x = torch.cat(
        [smooth, torch.randint(0, 256, (2, 64)), torch.zeros(1, 64).long(), torch.full((1, 64), 255)]
    )
    coder = Coder()
    push(law, x, coder)
    data = coder.to_bytes()
    ideal = -float(law.log_prob(x).sum()) / math.log(2)
    assert abs(8 * len(data) - ideal) < 0.002 * x.numel() + 64
    again = Coder(data)
    assert torch.equal(pop(law, len(x), again), x)
    again.finish()


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_known_entries_are_not_coded(name):
    """The decoder knows them too; the others cost what they cost given these."""
    law, n = build(name, 3), 300
    mask = torch.tensor([True, False, False, True, False])
    known = torch.randint(0, 3, (n, 5), generator=torch.Generator().manual_seed(0))
    x = law.sample(n, given(known, mask), torch.Generator().manual_seed(1))
    coder = Coder()
    push(law, x, coder, given(x, mask))
    again = Coder(coder.to_bytes())
    assert torch.equal(pop(law, n, again, given(x, mask)), x)
    again.finish()
    ideal = -float(law.log_prob(x, given(x, mask)).sum()) / math.log(2)
    assert abs(coder.num_bits - ideal) < 64 + 0.01 * ideal
