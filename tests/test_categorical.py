from __future__ import annotations

import pytest
import torch
from cases import BASES, DIMS, build_base, code, enumerate_all
from torch import nn

from dflow.bijectors import Coupling
from dflow.core import Around, Context
from dflow.distributions import Categorical, ConditionalCategorical, Mixture, RankedSequence, Spectra
from dflow.elementwise import ModAffine, ModRank, ModShift
from dflow.flows import Flow
from dflow.ops.modular import one_hot

every = pytest.mark.parametrize(("name", "K"), [(name, K) for name in BASES for K in DIMS])
each = pytest.mark.parametrize("name", BASES)


@every
@torch.no_grad()
def test_probabilities_sum_to_one_and_modes_agree(name, K):
    base, x = build_base(name, K), enumerate_all(K, DIMS[K])
    log_prob = base.log_prob(x)
    assert log_prob.shape == (len(x),)
    assert log_prob.dtype == torch.float64
    assert abs(float(log_prob.exp().sum()) - 1) < 1e-12
    rows = base.log_prob(one_hot(x, K, torch.float64))
    torch.testing.assert_close(rows, log_prob, rtol=0, atol=1e-12)


@every
def test_gradients_reach_the_data_and_every_parameter(name, K):
    base, x = build_base(name, K), enumerate_all(K, DIMS[K])
    weights = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).double()
    rows = one_hot(x, K, torch.float64).requires_grad_()
    (base.log_prob(rows) * weights).sum().backward()
    for name, parameter in (*base.named_parameters(), ("x", rows)):
        if isinstance(base, RankedSequence) and ".counted." in name and ".sureness." not in name:
            continue  # a part of the map, which learns by cross-entropy: see test_objectives.py
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@each
@torch.no_grad()
def test_absent_entries_count_nothing(name):
    K, dim = 3, DIMS[3]
    base, x = build_base(name, K), enumerate_all(K, dim)
    for T in range(dim + 1):
        context = Context(lengths=torch.full((len(x),), T))
        log_prob = base.log_prob(x, context)
        first = code(x[:, :T], K) * K ** (dim - T)
        torch.testing.assert_close(log_prob, log_prob[first], rtol=0, atol=1e-12)
        assert abs(float(log_prob[first.unique()].exp().sum()) - 1) < 1e-12
        rows = base.log_prob(one_hot(x, K, torch.float64), context)
        torch.testing.assert_close(rows, log_prob, rtol=0, atol=1e-12)


@each
@torch.no_grad()
def test_samples_follow_the_law(name):
    K, dim, n = 2, 4, 20_000
    base = build_base(name, K, dim)
    draws = base.sample(n, generator=torch.Generator().manual_seed(0))
    assert draws.dtype == torch.int64
    assert draws.shape == (n, dim)
    law = base.log_prob(enumerate_all(K, dim)).exp()
    found = torch.bincount(code(draws, K), minlength=K**dim) / n
    # Of a true sampler the statistic is chi-squared with 15 degrees of freedom: P(> 45) < 1e-4.
    assert float(n * ((found - law) ** 2 / law).sum()) < 45
    assert torch.equal(base.sample(n, generator=torch.Generator().manual_seed(0)), draws)
    assert not torch.equal(base.sample(n, generator=torch.Generator().manual_seed(1)), draws)


@each
def test_samples_of_given_lengths(name):
    K, dim = 5, DIMS[5]
    base, lengths = build_base(name, K), torch.arange(50) % (DIMS[5] + 1)
    context = Context(lengths=lengths)
    draws = base.sample(50, context, torch.Generator().manual_seed(0))
    assert (draws[torch.arange(dim) >= lengths[:, None]] == 0).all()
    assert int(draws.max()) < K
    assert int(draws.max()) > 0
    assert base.log_prob(draws, context).isfinite().all()


@each
def test_state_survives_saving(name):
    one, other, x = build_base(name, 3, 4), BASES[name](3, 4).double(), enumerate_all(3, 4)
    assert {buffer for buffer, _ in one.named_buffers()} <= set(one.state_dict())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.log_prob(x), other.log_prob(x))


def test_closed_form_is_krichevsky_trofimov():
    base = Categorical(2, 3, learned=False)
    x = torch.tensor([[0, 1], [0, 2], [1, 2]])
    base.assign(base.statistics(x))
    assert base.counts.tolist() == [[2, 1, 0], [0, 1, 2]]
    expected = torch.tensor([[2.5, 1.5, 0.5], [0.5, 1.5, 2.5]]).double() / 4.5
    torch.testing.assert_close(base.log_law().exp(), expected)
    assert base.log_prob(x).dtype == torch.float32
    torch.testing.assert_close(base.log_prob(x)[0], (expected[0, 0] * expected[1, 1]).log().float())
    base.update(base.statistics(x[:1]), momentum=0.5)
    assert base.counts.tolist() == [[2, 0.5, 0], [0, 1.5, 1]]


def test_statistics_tie_classes_skip_absent_entries_and_know_both_modes():
    base = Categorical(3, 4, torch.tensor([1, 0, 1]), learned=False)
    x = torch.tensor([[0, 1, 2], [3, 3, 3]])
    assert base.statistics(x).tolist() == [[0, 1, 0, 1], [1, 0, 1, 2]]
    context = Context(lengths=torch.tensor([3, 1]))
    counts = base.statistics(x, context)
    assert counts.tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]
    rows = one_hot(x, 4).requires_grad_()
    assert torch.equal(base.statistics(rows, context), counts)
    assert not base.statistics(rows, context).requires_grad


@pytest.mark.parametrize("learned", [True, False])
@torch.no_grad()
def test_initialize_takes_the_marginals(learned):
    base, marginals = Categorical(4, 3, learned=learned), torch.tensor([0.7, 0.3, 0.0])
    base.initialize(marginals, weight=1e6)
    law = base.log_law().exp()
    assert law.shape == (4, 3)
    torch.testing.assert_close(law, marginals.double().expand(4, 3), rtol=0, atol=1e-5)
    assert (law > 0).all()
    mixture = Mixture(4, 3, 2)
    mixture.initialize(marginals)
    assert torch.softmax(mixture.logits, -1)[..., 2].max() < 0.01
    assert not torch.equal(mixture.logits[0], mixture.logits[1])


def test_peak_draws_the_law_to_symbol_zero():
    base = Categorical(1, 5, learned=False)
    base.initialize(torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2]))
    laws = []
    for peak in (0.0, 0.25, 0.5, 1.0):
        base.peak = peak
        law = base.log_law().exp()[0]
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)
        laws.append(float(law[0]))
    assert laws == sorted(laws)
    assert laws[-1] == pytest.approx(0.5)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="peak"):
            base.peak = bad


def test_dtypes_of_results():
    x = torch.zeros(2, 3, dtype=torch.int64)
    for law in (Categorical(3, 4, learned=False), Categorical(3, 4), Mixture(3, 4, 2)):
        assert law.log_prob(x).dtype == torch.float32
        assert law.log_prob(one_hot(x, 4, torch.bfloat16)).dtype == torch.bfloat16
        assert law.bfloat16().log_prob(x).dtype == torch.float32
        assert law.double().log_prob(x).dtype == torch.float64


def test_conditional_law_follows_its_context():
    class Copy(nn.Module):
        def forward(self, kept, bonus=None):
            return 50 * one_hot(kept, 4)

    law = ConditionalCategorical(Copy())
    kept = torch.tensor([[0, 3], [2, 2]])
    assert law.num_calls == 1
    context = Context(given=(kept,))
    assert torch.equal(law.sample(2, context), kept)
    short = Context(given=(kept,), lengths=torch.tensor([2, 1]))
    assert torch.equal(law.sample(2, short), torch.tensor([[0, 3], [2, 0]]))
    assert law.log_prob(kept, context).abs().max() < 1e-12
    short = Context(given=(kept,), lengths=torch.tensor([1, 0]))
    assert float(law.log_prob(torch.tensor([[0, 1], [0, 0]]), short).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="context"):
        law.log_prob(kept)
    with pytest.raises(ValueError, match="3 draws"):
        law.sample(3, context)
    with pytest.raises(ValueError, match="1 rows"):
        law.log_prob(kept[:1], context)


def test_arguments_are_checked():
    for dim, K in ((0, 3), (3, 1)):
        with pytest.raises(ValueError, match=r"found (0|K=1)"):
            Categorical(dim, K)
        with pytest.raises(ValueError, match=r"found (0|K=1)"):
            Mixture(dim, K, 2)
    with pytest.raises(ValueError, match="components"):
        Mixture(2, 2, 0)
    for classes in (torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="classes"):
            Categorical(2, 3, classes)
    base = Categorical(2, 3, learned=False)
    for x in (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, 4), torch.zeros(1, 2).int()):
        for call in (base.log_prob, base.statistics, Mixture(2, 3, 2).log_prob):
            with pytest.raises(ValueError, match="expected int64"):
                call(x)
    with pytest.raises(ValueError, match="counts have shape"):
        base.assign(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="momentum"):
        base.update(base.counts, 1.5)
    for marginals in (
        torch.ones(3),
        torch.ones(2) / 2,
        torch.tensor([1.5, -0.5, 0.0]),
        torch.full((3,), torch.nan),
    ):
        with pytest.raises(ValueError, match="marginals"):
            base.initialize(marginals)
    with pytest.raises(ValueError, match="weight"):
        base.initialize(torch.ones(3) / 3, weight=0)
    with pytest.raises(ValueError, match="learned"):
        Categorical(2, 3, learned=True).assign(torch.zeros(2, 3))
    assert "learned=False" in repr(base)
    assert "components=2" in repr(Mixture(2, 3, 2))


def test_spectra_start_as_decreasing_laws_from_peaked_to_flat():
    law = Spectra(ModRank(5), nn.Identity(), 5, 3).log_spectra().exp()
    torch.testing.assert_close(law.sum(1), torch.ones(3))
    assert (law.diff(dim=1) < 0).all()
    assert (law[:, 0].diff() < 0).all()


@pytest.mark.parametrize("elementwise", [ModShift, ModAffine, ModRank])
@torch.no_grad()
def test_spectra_are_a_mixture_of_the_laws_of_the_latent(elementwise):
    K, rows = 4, 6
    family = elementwise(K)
    out = torch.randn(rows, 2, family.num_params + 3, dtype=torch.float64)
    law = Spectra(family, nn.Identity(), K, 3).double()
    nn.init.normal_(law.spectra, std=0.1)
    weights = torch.softmax(out[..., family.num_params :], -1)
    x = enumerate_all(K, 2)
    for row in range(rows):
        context = out[row].expand(len(x), -1, -1)
        z, _ = family.forward(x, context[..., : family.num_params])
        p = (weights[row] @ law.log_spectra().exp()).expand(len(x), -1, -1)
        expected = p.gather(-1, z[..., None]).prod(1).squeeze(-1)
        torch.testing.assert_close(law.log_prob(x, Context(given=(context,))).exp(), expected)
        assert float(expected.sum()) == pytest.approx(1)


def test_with_one_spectrum_the_law_is_that_of_a_coupling_over_a_factorized_base():
    K, dim = 5, 4
    mask = torch.arange(dim) % 2 == 0
    law = build_base("spectrum shift", K, dim)
    base = Categorical(dim, K, torch.tensor([0, 2, 1, 2]), learned=True).double()
    with torch.no_grad():
        base.logits.copy_(torch.cat([law.base.log_law(), law.conditional.log_spectra()]))
    coupling = Coupling(ModShift(K), law.conditional.net, mask)
    x = enumerate_all(K, dim)
    torch.testing.assert_close(Flow(coupling, base).log_prob(x), law.log_prob(x))


def test_arguments_of_spectra_are_checked():
    with pytest.raises(ValueError, match="components"):
        Spectra(ModRank(3), nn.Identity(), 3, 0)
    law = Spectra(ModRank(3), nn.Identity(), 3, 2)
    x, out = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 5)
    assert law.log_prob(x, Context(given=(out,))).shape == (2,)
    for bad, context, message in [
        (x, None, "needs a context"),
        (x, (out[..., 1:],), "the net gave"),
        (x[:, :2], (out,), "expected int64"),
        (x[:1], (out,), "1 rows of x"),
    ]:
        with pytest.raises(ValueError, match=message):
            law.log_prob(bad, context and Context(given=context))
    with pytest.raises(ValueError, match="3 draws"):
        law.sample(3, Context(given=(out,)))


def test_classes_may_depend_on_what_is_known_around():
    K = 3
    law = Categorical(4, K, None, False, lambda mask, first: mask.cumsum(0)[~mask].clamp(max=1), 2).double()
    law.assign(torch.tensor([[90.0, 9.0, 0.0], [0.0, 0.0, 0.0]]))
    # A class that never came is like all others together, and one that came is hardly changed.
    assert torch.equal(law.log_law()[1].argsort(), torch.tensor([2, 1, 0]))
    assert (law.log_law()[0].exp() - law.log_law()[1].exp()).abs().max() < 0.01
    assert law.log_law().exp().sum(1).tolist() == pytest.approx([1, 1])
    law.assign(torch.tensor([[90.0, 9.0, 0.0], [0.0, 9.0, 90.0]]))
    mask = torch.tensor([False, True, False, False])
    context = Context(around=Around(mask, torch.zeros(50, 4, dtype=torch.int64), 0, 3, 0))
    assert law.classes_in(context).tolist() == [0, 1, 1]
    x = torch.tensor([[0, 2, 1]])
    expected = law.log_law()[0, 0] + law.log_law()[1, 2] + law.log_law()[1, 1]
    assert torch.equal(law.log_prob(x, context), expected[None])
    assert law.statistics(x, context).tolist() == [[1, 0, 0], [0, 1, 1]]
    draws = law.sample(50, context, torch.Generator().manual_seed(0))
    assert draws.shape == (50, 3)
    assert (draws[:, 0] == 0).sum() > 30
    assert (draws[:, 2] == 2).sum() > 30
    with pytest.raises(ValueError, match="these classes are of a law of hidden entries"):
        law.log_prob(torch.zeros(1, 4, dtype=torch.int64))
