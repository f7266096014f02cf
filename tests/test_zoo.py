from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import counting, enumerate_all, randomize
from folders import SETTINGS

from dflow import zoo
from dflow.config import InputError
from dflow.distributions import Categorical, SequenceCategorical
from dflow.elementwise import ModAffine
from dflow.flows import Flow, Split
from dflow.nn.embed import Neighbours
from dflow.nn.lstm import LSTM
from dflow.ops import masks

MISSING = [family for family in zoo.names("text") if family not in SETTINGS]
assert not MISSING, f"give the smallest settings of {MISSING} in SETTINGS of tests/folders.py"
VARIANTS = [(family, {}) for family in zoo.names("text")] + [
    ("grouped", {"order": "bit_reversed"}),
    ("any_order", {"order": "random", "schedule": "dp", "num_calls": 3}),
    ("any_order", {"order": "confidence", "schedule": "dp", "num_calls": 4}),
    ("any_order", {"order": "islands"}),
    ("bipartite", {"elementwise": "affine", "num_flows": 5}),
    ("bipartite", {"base": "mixture", "components": 2}),
    ("bipartite", {"masks": "halves", "num_flows": 3}),
    ("bipartite", {"masks": "single", "num_flows": 7, "conditioner": "table"}),
    ("bipartite", {"masks": "blocks", "num_flows": 3, "conditioner": "perceptron"}),
    ("autoregressive", {"num_flows": 2, "conditioner": "table", "base_classes": 3}),
    ("autoregressive", {"num_flows": 2, "elementwise": "shift"}),
    ("autoregressive", {"base": "autoregressive"}),
    ("autoregressive", {"num_flows": 2, "inversion": "jacobi"}),
    ("transformer", {"counts": 3}),
    ("grouped", {"counts": 3, "block": 2}),
    ("autoregressive", {"counts": 3, "num_flows": 2}),
    ("multiscale", {"num_spectra": 1, "elementwise": "shift"}),
    ("multiscale", {"num_levels": 1, "num_spectra": 3, "elementwise": "affine"}),
    ("multiscale", {"num_levels": 2, "conditional": "categorical"}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@torch.no_grad()
def test_every_family_is_normalised(family, changes):
    K, length = 3, 6
    config = zoo.settings(family, SETTINGS[family] | {"length": length} | changes)
    model = randomize(counting(zoo.build(family, config, K), K)).eval()
    x = enumerate_all(K, length)
    assert abs(float(model.log_prob(x).exp().sum()) - 1) < 1e-12
    if isinstance(model, Flow):
        z, _ = model.transform(x)
        assert len(torch.unique(z, dim=0)) == len(x)
        assert torch.equal(model.bijector.inverse(z)[0], x)
    elif isinstance(model, SequenceCategorical):
        torch.testing.assert_close(model.log_prob_by_steps(x), model.log_prob(x))


@pytest.mark.parametrize("family", zoo.names("text"))
@torch.no_grad()
def test_the_record_of_a_family_tells_what_its_law_does(family):
    record, K, length = zoo.find(family), 3, 6
    settings = zoo.settings(family, SETTINGS[family] | {"length": length})
    law = randomize(counting(zoo.build(family, settings, K), K)).eval()
    if record.left_to_right:
        # Shorter sequences have a law of their own, the one of the beginnings of longer ones.
        long, short = enumerate_all(K, length), enumerate_all(K, 2)
        beginnings = law.log_prob(long).exp().view(len(short), -1).sum(1)
        torch.testing.assert_close(law.log_prob(short).exp(), beginnings)
    if record.prompt != "no":
        prompt = torch.tensor([2, 0])
        x = law.sample(20, generator=torch.Generator().manual_seed(0), prompt=prompt, length=4)
        assert (x[:, :2] == prompt).all()
    assert law.round_trip(enumerate_all(K, length)[:50]) is True


@pytest.mark.parametrize("family", ["bipartite", "autoregressive"])
def test_flows_start_as_the_identity(family):
    config = zoo.settings(family, SETTINGS[family] | {"length": 8, "num_flows": 3})
    model = zoo.build(family, config, 5)
    x = torch.randint(0, 5, (20, 8))
    z, _ = model.transform(x)
    # Three autoregressive layers lie in alternating directions: the order is reversed twice.
    assert torch.equal(z, x)


def test_couplings_run_from_fine_to_coarse_and_condition_on_raw_symbols():
    for dim in (2, 5, 8, 13):
        levels = (dim - 1).bit_length()
        touched = torch.zeros(dim, dtype=torch.bool)
        for known, hidden in masks.strides(dim, levels):
            assert not (known & touched).any()
            touched |= hidden
        assert touched.tolist() == [False] + [True] * (dim - 1)
        assert len(masks.strides(dim, 2 * levels + 1)) == 2 * levels + 1


@pytest.mark.parametrize("name", masks.MASKS)
@pytest.mark.parametrize("dim", [2, 3, 8])
def test_masks_are_disjoint_and_neither_is_empty(name, dim):
    for flows in (1, dim - 1, dim, 2 * dim + 1):
        pairs = masks.MASKS[name](dim, flows)
        assert len(pairs) == flows
        for known, hidden in pairs:
            assert known.any()
            assert hidden.any()
            assert not (known & hidden).any()
            assert name not in ("halves", "single") or (known | hidden).all()


def test_single_masks_hide_every_position_in_turn_and_blocks_know_raw_symbols_only():
    hidden = torch.stack([h for _, h in masks.single(5, 5)])
    assert torch.equal(hidden, torch.eye(5, dtype=torch.bool).flip(0))
    assert torch.equal(torch.stack([h for _, h in masks.single(5, 7)])[5:], hidden[:2])
    touched = torch.zeros(16, dtype=torch.bool)
    sizes = []
    for known, hides in masks.blocks(16, 4):
        assert not (known & touched).any()
        touched |= hides
        sizes.append(int(hides.sum()))
    assert sizes == [3, 3, 3, 3]
    assert touched.tolist() == [False] * 4 + [True] * 12


def test_entries_have_laws_of_their_own_where_asked():
    def classes(family, **values):
        flow = zoo.build(family, zoo.settings(family, SETTINGS[family] | {"length": 6} | values), 3)
        return flow.base.classes.tolist()

    assert classes("bipartite", masks="single") == classes("bipartite", masks="halves") == [0, 1, 2, 3, 4, 5]
    assert classes("autoregressive", base_classes=3) == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("family", ["bipartite", "autoregressive"])
def test_a_table_that_is_too_large_is_refused(family):
    config = zoo.settings(family, SETTINGS[family] | {"length": 64, "conditioner": "table"})
    with pytest.raises(InputError, match="another conditioner"):
        zoo.build(family, config, 5)


def test_number_of_calls_is_what_the_settings_say():
    def calls(family, **values):
        return zoo.build(
            family, zoo.settings(family, SETTINGS[family] | {"length": 16} | values), 3
        ).num_calls

    assert calls("grouped", num_calls=4) == 4
    assert calls("any_order", num_calls=5) == calls("any_order", num_calls=5, order="confidence") == 5
    assert calls("bipartite", num_flows=4) == 4
    assert calls("transformer") == calls("lstm") == 16
    assert calls("autoregressive", num_flows=2) == 2 * 17
    assert calls("autoregressive", num_flows=1, base="autoregressive") == 17 + 16
    assert calls("multiscale") == 4
    assert calls("multiscale", num_levels=2) == calls("multiscale", num_levels=2, length=13) == 2


def test_bases_and_families_of_maps():
    config = zoo.settings("bipartite", {"length": 16, "hidden_size": 8, "num_attention_heads": 1})
    flow = zoo.build("bipartite", config, 5)
    assert isinstance(flow, Flow)
    assert isinstance(flow.base, Categorical)
    # One law a level: positions 2^l mod 2^(l+1) for l in 0..3, and position 0.
    assert flow.base.n_classes == 5
    affine = zoo.build("bipartite", dataclasses.replace(config, elementwise="affine"), 5)
    assert sum(isinstance(m, ModAffine) for m in affine.modules()) == 8
    grouped = zoo.settings(
        "grouped", {"length": 16, "num_calls": 5, "hidden_size": 8, "num_attention_heads": 1}
    )
    assert isinstance(zoo.build("grouped", grouped, 5), SequenceCategorical)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("grouped", {"num_cals": 3}, "did you mean 'num_calls'"),
        ("grouped", {"num_calls": 300}, r"1\.\.256"),
        ("grouped", {"order": "lockstepp"}, "did you mean 'lockstep'"),
        ("grouped", {"hidden_size": 100, "num_attention_heads": 3}, "hidden_size 100"),
        ("any_order", {"num_calls": 0}, r"1\.\.256"),
        ("any_order", {"order": "left"}, "lockstep"),
        ("any_order", {"schedule": "dp"}, "for random and confidence"),
        ("bipartite", {"length": 1}, "length 2 or more"),
        ("bipartite", {"elementwise": "ranks"}, "did you mean 'rank'"),
        ("bipartite", {"masks": "singles"}, "did you mean 'single'"),
        ("bipartite", {"masks": "blocks"}, "use conditioner 'perceptron'"),
        ("autoregressive", {"base_classes": 0}, "base_classes"),
        ("lstm", {"dropout": 1.5}, "dropout"),
        ("lstm", {"length": 0}, "length must be at least 1"),
        ("autoregressive", {"num_flows": 0}, "num_flows"),
        ("autoregressive", {"inversion": "jacobian"}, "did you mean 'jacobi'"),
        ("multiscale", {"length": 1}, "length 2 or more"),
        ("multiscale", {"num_levels": 9}, r"1\.\.8 for length 256, found 9"),
        ("multiscale", {"num_spectra": 0}, "num_spectra"),
        ("lstn", {}, "did you mean 'lstm'"),
        (7, {}, "unknown family 7"),
    ],
)
def test_wrong_settings_are_named(family, values, message):
    with pytest.raises(InputError, match=message):
        zoo.settings(family, values)


@pytest.mark.parametrize("length", [2, 7, 16])
def test_levels_of_a_multiscale_law_are_the_couplings_of_a_bipartite_flow(length):
    config = zoo.settings("multiscale", SETTINGS["multiscale"] | {"length": length, "window": 3})
    law, levels = zoo.build("multiscale", config, 3), (length - 1).bit_length()
    for known, hidden in masks.strides(length, levels):
        assert isinstance(law, Split)
        assert torch.equal(law.conditional.net.net.known, known.nonzero().flatten())
        assert torch.equal(law.conditional.net.net.hidden, hidden.nonzero().flatten())
        law = law.base
    assert isinstance(law, Categorical)
    assert law.dim == 1


RATES = {"dropout": 0.25, "ngram_dropout": 0.125, "ngram_rows": 9}


def rates(family):
    """Those of the rates that the family has."""
    return {name: rate for name, rate in RATES.items() if name in zoo.find(family).fields}


LSTM_RATES = {
    "dropout": 0.1, "dropout_hidden": 0.2, "dropout_input": 0.3, "dropout_embedding": 0.4, "weight_drop": 0.5
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *[
            (family, dropped)
            for family in zoo.names("text")
            if family != "lstm" and (dropped := rates(family))
        ],
        ("bipartite", {"dropout": 0.25, "conditioner": "perceptron"}),
        ("grouped", RATES | {"calls": [1, 4]}),
        ("multiscale", RATES | {"conditional": "categorical"}),
        ("autoregressive", RATES | {"base": "autoregressive"}),
        ("lstm", LSTM_RATES),
    ],
)
@torch.no_grad()
def test_every_network_drops_out_at_the_rates_of_the_settings_in_training_alone(family, changes):
    config = zoo.settings(family, SETTINGS[family] | {"length": 8} | changes)
    model = randomize(zoo.build(family, config, 3))
    modules = list(model.modules())
    if family == "lstm":
        [net] = [m for m in modules if isinstance(m, LSTM)]
        assert {name: getattr(net, name) for name in LSTM_RATES} == LSTM_RATES
    else:
        assert {m.p for m in modules if isinstance(m, torch.nn.Dropout)} == {0.25}
        tables = {m.ngram_dropout for m in modules if isinstance(m, Neighbours) and m.hash.shape[1]}
        assert tables == ({0.125} if "ngram_rows" in changes else set())
    for module in modules:
        if isinstance(module, Categorical) and not module.learned:
            # A uniform base costs the same at every latent.
            module.assign(20 * torch.rand(module.counts.shape, dtype=torch.float64))
    x = torch.randint(0, 3, (32, 8))
    once, again = model.eval().log_prob(x), model.log_prob(x)
    assert torch.equal(once, again)
    assert not torch.equal(model.train().log_prob(x), once)
    assert not torch.equal(model.log_prob(x), model.log_prob(x))


def test_nothing_is_dropped_unless_asked_for():
    for family in zoo.names("text"):
        settings = dataclasses.asdict(zoo.settings(family, {"length": 64}))
        assert not any(v for name, v in settings.items() if "drop" in name and name != "counts_dropout")
        # Nothing is counted unless asked for either.
        assert family == "ngram" or not settings.get("counts")
