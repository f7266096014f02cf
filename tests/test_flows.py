from __future__ import annotations

import pytest
import torch
from cases import (
    BASES,
    BIJECTORS,
    DIMS,
    WITHOUT_LENGTHS,
    alternate,
    build_base,
    build_bijector,
    code,
    counted,
    enumerate_all,
)
from torch import nn

from dflow.core import Context, Distribution
from dflow.flows import Flow, Split
from dflow.ops.modular import one_hot


@pytest.mark.parametrize("K", DIMS)
# To a flow, a base with counts is as one without: the same classes under a network with other outputs.
@pytest.mark.parametrize("base", [name for name in BASES if not name.startswith("counts, ")])
@pytest.mark.parametrize("bijector", BIJECTORS)
@torch.no_grad()
def test_total_probability_is_one_and_modes_agree(bijector, base, K):
    flow = Flow(build_bijector(bijector, K), build_base(base, K))
    x = enumerate_all(K, DIMS[K])
    log_prob = flow.log_prob(x)
    assert abs(float(log_prob.exp().sum()) - 1) < 1e-12
    torch.testing.assert_close(flow.log_prob(one_hot(x, K, torch.float64)), log_prob, rtol=0, atol=1e-12)
    # A flow on Z/K permutes the probabilities of its base.
    z, log_det = flow.transform(x)
    assert torch.equal(log_prob, flow.base.log_prob(z) + log_det)
    torch.testing.assert_close(
        log_prob.sort().values, flow.base.log_prob(x).sort().values, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("bijector", sorted(set(BIJECTORS) - WITHOUT_LENGTHS))
@torch.no_grad()
def test_total_probability_of_each_length_is_one(bijector):
    K, dim = 3, DIMS[3]
    flow, x = Flow(build_bijector(bijector, K), build_base("split", K)), enumerate_all(K, dim)
    for T in range(dim + 1):
        rows = x[(x[:, T:] == 0).all(1)]
        log_prob = flow.log_prob(rows, Context(lengths=torch.full((len(rows),), T)))
        assert len(rows) == K**T
        assert abs(float(log_prob.exp().sum()) - 1) < 1e-12
    lengths = torch.arange(100) % (dim + 1)
    draws = flow.sample(100, Context(lengths=lengths), torch.Generator().manual_seed(0))
    assert (draws[torch.arange(dim) >= lengths[:, None]] == 0).all()


@pytest.mark.parametrize("bijector", ["chain", "autoregressive rank"])
def test_samples_are_the_bases_taken_back(bijector):
    K = 6
    flow = Flow(build_bijector(bijector, K), build_base("counted", K))
    z = flow.base.sample(200, generator=torch.Generator().manual_seed(0))
    x = flow.sample(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.transform(x)[0], z)
    assert flow.num_calls == flow.bijector.num_calls + flow.base.num_calls


@torch.no_grad()
def test_flows_nest():
    K, dim = 5, DIMS[5]
    inner = Flow(build_bijector("coupling rank", K), build_base("mixture", K))
    outer = Flow(build_bijector("autoregressive shift", K), inner)
    x = enumerate_all(K, dim)
    assert abs(float(outer.log_prob(x).exp().sum()) - 1) < 1e-12
    assert outer.num_calls == 1 + dim + 1


class Recorder(Distribution):
    """A uniform law that notes the contexts it is given."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.contexts = dim, []

    def log_prob(self, x, context=None):
        self.contexts.append(context)
        return torch.zeros(len(x))

    def sample(self, n, context=None, generator=None):
        self.contexts.append(context)
        return torch.full((n, self.dim), self.dim)

    num_calls = 2


def test_split_hands_each_part_its_context():
    mask = torch.tensor([True, False, False, True, False])
    split = Split(mask, Recorder(3), Recorder(2))
    x = torch.arange(10).view(2, 5)
    kept, given = split.base.contexts, split.conditional.contexts
    split.log_prob(x)
    assert kept[-1] is None
    assert given[-1].given[0].tolist() == [[0, 3], [5, 8]]
    split.log_prob(x, Context(lengths=torch.tensor([3, 5])))
    assert kept[-1].lengths.tolist() == [1, 2]
    assert [t.tolist() for t in given[-1].given] == [[[0, 3], [5, 8]], [1, 2]]
    assert given[-1].lengths.tolist() == [2, 3]
    # What is given goes to both parts as it is, class labels too.
    other, labels = torch.ones(2, 1, 1), torch.tensor([0, 1])
    split.log_prob(x, Context(given=(other, labels)))
    assert kept[-1].given == (other, labels)
    assert given[-1].given[1:] == (other, labels)
    assert kept[-1].lengths is given[-1].lengths is None
    # Inside another split: kept entries, their lengths and the lengths of this part.
    split.log_prob(x, Context(given=(other, torch.tensor([9, 9])), lengths=torch.tensor([1, 4])))
    assert [kept[-1].given[1].tolist(), kept[-1].lengths.tolist()] == [[9, 9], [1, 2]]
    assert [t.tolist() for t in given[-1].given[2:]] == [[9, 9], [1, 2]]
    assert given[-1].lengths.tolist() == [0, 2]
    draws = split.sample(2)
    assert draws.tolist() == [[2, 3, 3, 2, 3]] * 2
    assert given[-1].given[0].tolist() == [[2, 2]] * 2
    assert split.num_calls == 4


@torch.no_grad()
def test_split_of_a_split():
    K, dim = 3, 5
    outer = Split(alternate(dim), build_base("split", K, 2), counted(K, 3))

    class Sum(nn.Module):
        def forward(self, x, context):
            entries = [c.float() if c.ndim == 2 else c.argmax(-1).float() for c in (x, *context.given)]
            entries = torch.cat(entries, 1)
            return torch.stack([torch.sin(entries.sum(1) + k) for k in range(K)], -1)[:, None].double()

    outer.conditional.conditional.net = Sum()
    x = enumerate_all(K, dim)
    log_prob = outer.log_prob(x)
    assert abs(float(log_prob.exp().sum()) - 1) < 1e-12
    torch.testing.assert_close(outer.log_prob(one_hot(x, K, torch.float64)), log_prob, rtol=0, atol=1e-12)
    law = torch.bincount(
        code(outer.sample(30_000, generator=torch.Generator().manual_seed(0)), K), minlength=K**dim
    )
    assert float((law / 30_000 - log_prob.exp()).abs().sum()) < 0.1


def test_arguments_are_checked():
    part = Recorder(1)
    for mask in (torch.ones(3), torch.tensor([True, True]), torch.tensor([False]), torch.ones(2, 2).bool()):
        with pytest.raises(ValueError, match="both values"):
            Split(mask, part, part)
    with pytest.raises(ValueError, match="expected 2 entries"):
        Split(torch.tensor([True, False]), part, part).log_prob(torch.zeros(1, 3, dtype=torch.int64))
