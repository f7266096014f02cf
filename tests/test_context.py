"""What models are conditioned on has a type: lengths, labels and features are never mistaken."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BASES,
    BIJECTORS,
    DIMS,
    Conditioner,
    Given,
    any_order,
    build_base,
    build_bijector,
    counted,
    enumerate_all,
    grouped,
    masked,
    randomize,
)
from folders import LENGTH, SETTINGS, make_model
from torch import nn

from dflow import objectives
from dflow.bijectors import ActNorm, Autoregressive, Chain, Conv1x1, Coupling
from dflow.coding import codec
from dflow.coding.coder import Coder
from dflow.config import InputError
from dflow.core import Context, Distribution
from dflow.distributions import (
    Categorical,
    ConditionalCategorical,
    ConditionalLogistic,
    Logistic,
    Normal,
    Ordered,
    SequenceCategorical,
    Spectra,
    StandardNormal,
)
from dflow.elementwise import Affine, ModAffine, ModRank, ModShift
from dflow.evaluate.labels import coverage, score
from dflow.flows import Flow, Split
from dflow.nn.classifier import Head
from dflow.nn.made import MADE
from dflow.nn.perceptron import InfillPerceptron, Perceptron
from dflow.ops.orders import lockstep

K = 3
#: What is no vector of lengths of a batch of three sequences.
UNFIT = {
    "int32": torch.tensor([3, 2, 3], dtype=torch.int32),
    "float": torch.tensor([3.0, 2.0, 3.0]),
    "column": torch.tensor([[3], [2], [3]]),
    "row": torch.tensor([[3, 2, 3]]),
    "single": torch.tensor([3]),
    "scalar": torch.tensor(3),
}
unfit = pytest.mark.parametrize("name", UNFIT)


def way(name):
    """What the refusal of `UNFIT` says: dtypes are converted, shapes are not."""
    return r"lengths.long\(\)" if UNFIT[name].dtype != torch.int64 else "one number for each row"


@unfit
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("family", SETTINGS)
def test_models_of_text_refuse_lengths_that_are_not_int64_of_the_batch(family, explicit, name):
    model = make_model(family, K, explicit_length=explicit)
    x = torch.randint(0, K, (3, LENGTH))
    for call in (model.log_prob, model.forward, model.round_trip):
        with pytest.raises(InputError, match=rf"lengths must be int64 \(3,\).*{way(name)}"):
            call(x, UNFIT[name])


@pytest.mark.parametrize("family", SETTINGS)
def test_int64_lengths_give_the_value_of_the_shorter_sequence(family):
    model = make_model(family, K, explicit_length=True)
    x, lengths = torch.randint(0, K, (3, LENGTH)), torch.tensor([3, 2, LENGTH])
    shorter = torch.stack([model.log_prob(x[i : i + 1, :n])[0] for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(model.log_prob(x, lengths), shorter)
    torch.testing.assert_close(model(x, lengths).log_prob, shorter)


@unfit
def test_objectives_and_laws_refuse_such_lengths_too(name):
    model = make_model("bipartite", K).distribution
    x = torch.randint(0, K, (3, LENGTH))
    with pytest.raises(InputError, match="lengths must be int64"):
        objectives.Objective(model, objectives.default_rule(model))(x, UNFIT[name])
    with pytest.raises(InputError, match="lengths must be int64"):
        objectives.refit(model, [(x, Context(lengths=UNFIT[name]))])
    labels = UNFIT[name]
    with pytest.raises(InputError, match=r"labels must be int64 \(3,\)"):
        Head("ce").loss(torch.zeros(3, 4), labels)
    with pytest.raises(InputError, match=r"labels must be int64 \(3,\)"):
        score("", torch.full((3, 4), 0.25), labels)
    with pytest.raises(InputError, match=r"labels must be int64 \(3,\)"):
        coverage(torch.full((2, 3, 4), 0.25), labels)


def test_a_context_is_checked_when_it_is_made():
    for name in ("int32", "float", "column", "row", "scalar"):
        with pytest.raises(InputError, match=rf"found {UNFIT[name].dtype}.*{way(name)}"):
            Context(lengths=UNFIT[name])
    for value in ([1, 2, 3], torch.tensor([1, 2, 3]).numpy()):
        with pytest.raises(InputError, match=r"found (list|ndarray); torch.as_tensor\(lengths\)"):
            Context(lengths=value)
        assert Context(lengths=torch.as_tensor(value)).lengths.tolist() == [1, 2, 3]
    for given in (torch.zeros(3, 2), [torch.zeros(3, 2)], (None,)):
        with pytest.raises(InputError, match=r"Context\(given=\(features,\)\)"):
            Context(given=given)
    context = Context(lengths=torch.tensor([2, 1, 0]), given=(torch.arange(3), torch.zeros(3, 2)))
    assert context.rows(1, 3).lengths.tolist() == [1, 0]
    assert [len(item) for item in context.rows(1, 3).given] == [2, 2]
    assert context.repeat(2).lengths.tolist() == [2, 1, 0, 2, 1, 0]
    assert [tuple(item.shape) for item in context.repeat(2).given] == [(6,), (6, 2)]


@pytest.mark.parametrize("bare", [torch.tensor([3, 2, 1]), torch.zeros(3, 2), (torch.zeros(3, 2),)])
def test_what_is_no_context_is_refused_with_the_way_out(bare):
    x, way = enumerate_all(K, DIMS[K])[:3], r"Context\(lengths=n\).*Context\(given=\(features,\)\)"
    for name in BASES:
        law = build_base(name, K).eval()
        for call in (
            lambda law=law: law.log_prob(x, bare),
            lambda law=law: law.sample(3, bare),
            lambda law=law: codec.push(law, x, Coder(), bare),
        ):
            with pytest.raises(InputError, match=way):
                call()
    for name in set(BIJECTORS) - {"empty chain"}:
        bijector = build_bijector(name, K)
        for move in (bijector.forward, bijector.inverse):
            with pytest.raises(InputError, match=way):
                move(x, bare)
    layers = [
        ActNorm((5, 1, 1)),
        Conv1x1((5, 1, 1)),
        Coupling(Affine(), Perceptron(2, 3, 2), torch.arange(5) < 2),
    ]
    for law in (Normal(5), StandardNormal(5), Logistic(5), Flow(Chain(layers), StandardNormal(5))):
        with pytest.raises(InputError, match=way):
            law.log_prob(x.float(), bare)


@pytest.mark.parametrize("lengths", [[2], [2, 2]])
def test_lengths_of_another_batch_are_refused_where_they_are_used(lengths):
    x, context = enumerate_all(K, DIMS[K])[:3], Context(lengths=torch.tensor(lengths))
    for name in BASES:
        law = build_base(name, K).eval()
        for call in (lambda law=law: law.log_prob(x, context), lambda law=law: law.sample(3, context)):
            with pytest.raises(InputError, match=r"lengths must be int64 \(3,\)"):
                call()
    for name in set(BIJECTORS) - {"empty chain"}:
        with pytest.raises(InputError, match=r"lengths must be int64 \(3,\)"):
            build_bijector(name, K).forward(x, context)


def test_laws_of_numbers_take_no_lengths():
    context = Context(lengths=torch.tensor([1, 2]), given=(torch.zeros(2, 1),))
    conditional = ConditionalLogistic(nn.Sequential(nn.Linear(1, 6), nn.Unflatten(1, (3, 2))), 3)
    for law in (Normal(3), StandardNormal(3), Logistic(3), conditional, Flow(ActNorm((3, 1, 1)), Normal(3))):
        with pytest.raises(InputError, match="all entries as present"):
            law.log_prob(torch.zeros(2, 3), context)


# -- class labels --------------------------------------------------------------------------------------------


class Labelled(nn.Module):
    """Any network, moved by a class label that is given last."""

    def __init__(self, net: nn.Module, num_params: int) -> None:
        super().__init__()
        self.net = net
        self.table = nn.Parameter(torch.zeros(3, num_params))

    def split(self, context: Context):
        *rest, labels = context.given
        return Context(given=tuple(rest), lengths=context.lengths), 5 * self.table[labels][:, None]

    def forward(self, x, *known_and_context):
        *known, context = known_and_context
        rest, shift = self.split(context)
        return self.net(x, *known, rest if rest.given else None) + shift

    def start(self, batch, context=None):
        rest, shift = self.split(context)
        return self.net.start(batch, rest), shift

    def step(self, x, state):
        return self.net.step(x, state[0]) + state[1]


DIM = 4
HALF = torch.tensor([True, False, True, False])


def coupling(elementwise) -> Coupling:
    net = Conditioner(torch.arange(2), 2, K, elementwise.num_params)
    return Coupling(elementwise, Labelled(net, elementwise.num_params), HALF)


def autoregressive(elementwise, inversion="loop") -> Autoregressive:
    net = MADE(DIM, K, elementwise.num_params, [8])
    return Autoregressive(elementwise, Labelled(net, elementwise.num_params), DIM, inversion)


def sequence(calls: int) -> SequenceCategorical:
    law = grouped(K, DIM, calls)
    law.net = Labelled(law.net, K)
    return law


def walk() -> Ordered:
    model = any_order(K, DIM)
    model.net = Labelled(model.net, K)
    return Ordered(model, lockstep(DIM, 2))


def spectra() -> Spectra:
    outputs = Spectra.num_outputs(ModRank(K), 2)
    return Spectra(ModRank(K), Labelled(Given(2, 2, K, outputs), outputs), K, 2)


LABELLED: dict[str, Distribution] = {
    "coupling": Flow(coupling(ModShift(K)), counted(K, DIM)),
    "coupling rank": Flow(coupling(ModRank(K)), counted(K, DIM)),
    "autoregressive": Flow(autoregressive(ModAffine(K)), counted(K, DIM)),
    "autoregressive jacobi": Flow(autoregressive(ModShift(K), "jacobi"), counted(K, DIM)),
    "chain": Flow(Chain([coupling(ModRank(K)), autoregressive(ModShift(K))]), sequence(2)),
    "split": Split(HALF, ConditionalCategorical(Labelled(Given(2, 2, K), K)), counted(K, 2)),
    "spectra": Split(HALF, spectra(), counted(K, 2)),
    "autoregressive sequence": sequence(DIM),
    "grouped sequence": sequence(2),
    "any order": walk(),
}


@pytest.mark.parametrize("name", LABELLED)
@torch.no_grad()
def test_each_label_has_a_law_of_its_own_that_adds_up_to_one(name):
    law, x = randomize(LABELLED[name], 3).eval(), enumerate_all(K, DIM)
    tables = []
    for label in range(3):
        context = Context(given=(torch.full((len(x),), label),))
        log_prob = law.log_prob(x, context)
        assert abs(float(log_prob.exp().sum()) - 1) < 1e-12
        tables.append(log_prob)
        coder = Coder()
        codec.push(law, x, coder, context)
        assert torch.equal(codec.pop(law, len(x), Coder(coder.to_bytes()), context), x)
    assert all((tables[i] - tables[j]).abs().max() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))
    # All labels in one batch: no row takes another's.
    labels = torch.arange(len(x)) % 3
    mixed = law.log_prob(x, Context(given=(labels,)))
    torch.testing.assert_close(mixed, torch.stack(tables).gather(0, labels[None])[0])
    n = 3000
    draws = law.sample(n, Context(given=(torch.full((n,), 1),)), torch.Generator().manual_seed(0))
    shares = torch.bincount((draws * K ** torch.arange(DIM - 1, -1, -1)).sum(1), minlength=len(x)) / n
    assert float((shares - tables[1].exp()).abs().sum()) < 2 * (len(x) / n) ** 0.5


@torch.no_grad()
def test_lengths_and_labels_go_together():
    law = randomize(Split(HALF, ConditionalCategorical(Labels(2)), counted(K, 2)), 3)
    for label in range(3):
        for T in range(DIM + 1):
            x = enumerate_all(K, DIM)
            x = x[(x[:, T:] == 0).all(1)]
            context = Context(given=(torch.full((len(x),), label),), lengths=torch.full((len(x),), T))
            assert abs(float(law.log_prob(x, context).exp().sum()) - 1) < 1e-12


class Labels(nn.Module):
    """Logits by label and by the first kept symbol, where there is one."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, K + 1, entries, K))

    def forward(self, x, context):
        labels, kept = context.given
        return self.table[labels, torch.where(kept > 0, x[:, 0], K)]


def test_networks_that_read_no_labels_refuse_them():
    x, context = enumerate_all(K, DIM)[:3], Context(given=(torch.tensor([0, 1, 2]),))
    infill = InfillPerceptron(K, K, torch.tensor([0, 2]), torch.tensor([1, 3]), hidden_size=8)
    for law in (
        Flow(Coupling(ModShift(K), infill, HALF), Categorical(DIM, K)),
        Flow(Autoregressive(ModShift(K), MADE(DIM, K, K, [8]), DIM), Categorical(DIM, K)),
        grouped(K, DIM, 2),
        Ordered(any_order(K, DIM), lockstep(DIM, 2)),
        *(make_model(family, K, DIM).distribution for family in SETTINGS),
    ):
        with pytest.raises(InputError, match="reads no given tensors"):
            law.log_prob(x, context)
    perceptron = Coupling(Affine(), Perceptron(2, 2, 2, context_features=3, zero_head=False), HALF)
    with pytest.raises(ValueError, match="one-hot"):
        perceptron(x.float(), context)
    onehot = nn.functional.one_hot(torch.tensor([0, 1, 2]), 3)
    z, _ = perceptron(x.float() * 0, Context(given=(onehot,)))
    assert len(z.unique(dim=0)) == 3
    conv = masked(Affine(), (4, 1, 1))
    with pytest.raises(ValueError, match="expected x"):
        conv(x.float(), context)
