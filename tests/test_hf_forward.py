"""`forward` of every model: its arguments, its loss in both modes, and gradients that reach everything."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from folders import LENGTH, SETTINGS, make_model, with_counts
from torch import Tensor

from dflow import hf, objectives, zoo
from dflow.config import InputError
from dflow.dequantize import Dequantized
from dflow.distributions import Categorical

K = 5

#: Further settings of families of text: other rules, bases in closed form, several numbers of calls.
TEXTS = [(family, {}) for family in zoo.names("text")] + [
    ("grouped", {"calls": [1, 4]}),
    ("grouped", {"block": 2}),
    ("any_order", {"order": "random", "schedule": "dp"}),
    ("bipartite", {"elementwise": "affine"}),
    ("bipartite", {"elementwise": "shift", "base": "mixture"}),
    ("autoregressive", {"num_flows": 2, "base": "autoregressive"}),
    ("multiscale", {"conditional": "categorical"}),
    ("multiscale", {"elementwise": "affine"}),
]
SMALL = {"num_flows": 2, "hidden_size": 8, "num_hidden_layers": 2}
FLOW = SMALL | {
    "spline_bins": 3, "context_size": 2, "dequantizer_flows": 2, "dequantizer_hidden_size": 8,
    "dequantizer_hidden_layers": 1,
}  # fmt: skip
IMAGES = [
    ("integer", SMALL | {"levels": [6], "components": 2, "num_levels": 2}),
    ("integer", {"levels": [6], "kept": "quarter", "prior_groups": 3, "num_flows": 0, "prior": "hurdle",
                 "num_levels": 2, "hidden_size": 8, "num_hidden_layers": 2}),
    ("modular", SMALL | {"levels": [2]}),
    ("modular", SMALL | {"levels": [3], "kind": "probabilistic", "elementwise": "shift"}),
    ("modular", SMALL | {"levels": [2], "kind": "binary"}),
    ("dequantized", FLOW | {"levels": [6], "density": "flow", "dequantizer": "bipartite"}),
    ("dequantized", FLOW | {"levels": [6], "density": "flow", "dequantizer": "uniform"}),
    ("dequantized", FLOW | {"levels": [2], "density": "covariance", "dequantizer": "autoregressive"}),
    ("dequantized", FLOW | {"levels": [2], "density": "diagonal", "dequantizer": "normal",
                            "partition": "orthant"}),
]  # fmt: skip
CLASSIFIERS: list[dict[str, Any]] = [{}, {"kind": "float"}, {"kind": "binary"}, {"head": "bce"}]


def text(family: str, changes: dict[str, Any], **config: Any) -> hf.DflowModel:
    torch.manual_seed(0)
    settings = SETTINGS[family] | {"length": LENGTH} | changes
    model = hf.DflowModel(hf.DflowConfig(family=family, vocab_size=K, **settings, **config))
    return shaken(with_counts(model, K))


def image(family: str, settings: dict[str, Any]) -> hf.DflowImageModel:
    torch.manual_seed(0)
    return shaken(hf.DflowImageModel(hf.DflowImageConfig(family=family, shape=[1, 4, 4], **settings)), 0.1)


def classifier(changes: dict[str, Any]) -> hf.DflowClassifier:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"shape": [1, 8, 8], "levels": [256], "lowest": [0], "classes": 3}
    settings |= {"channels": [4], "hidden": [6]} | changes
    return hf.DflowClassifier(hf.DflowClassifierConfig(**settings))


def shaken(model: Any, noise: float = 0.3) -> Any:
    """Off the start, where heads of zeros keep gradients from all below them."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def values(model: hf.DflowImageModel, n: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    top = model.config.levels[0]
    return torch.randint(0, top, (n, 1, 4, 4), generator=generator).cummax(2).values


def symbols(n: int = 32) -> Tensor:
    return torch.randint(0, K, (n, LENGTH), generator=torch.Generator().manual_seed(1)).cummax(1).values


def idle(model: torch.nn.Module) -> list[str]:
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0)
    ]


@pytest.mark.parametrize(("family", "changes"), TEXTS, ids=str)
def test_training_reaches_every_parameter_of_a_text_model(family: str, changes: dict[str, Any]) -> None:
    model = text(family, changes).train()
    out = model(input_ids=symbols())
    out.loss.backward()
    assert idle(model) == []
    base = objectives.closed_form(model.distribution)
    assert base is None or base.counts.sum() > 0
    # What is left as it was: the numbers of calls, the noise of the estimators.
    assert model.num_calls == text(family, changes).num_calls
    assert all(e.noise == 0 for e in objectives.estimators(model))


@pytest.mark.parametrize(("family", "settings"), IMAGES, ids=str)
def test_training_reaches_every_parameter_of_an_image_model(family: str, settings: dict[str, Any]) -> None:
    model = image(family, settings).train()
    x = values(model)
    model(x).loss.backward()
    # Several losses at once: what moves with the training is no part of a graph.
    (model(x).loss + model(x.flip(0)).loss).backward()
    assert idle(model) == []
    if isinstance(model.law, Dequantized):
        density = objectives.gaussian(model.law)
        assert density is None or density.moments.any()


@pytest.mark.parametrize("changes", CLASSIFIERS, ids=str)
def test_training_reaches_every_parameter_of_a_classifier(changes: dict[str, Any]) -> None:
    model = classifier(changes).train()
    x, labels = torch.randint(256, (40, 1, 8, 8)), torch.arange(40) % 3
    model(x, labels=labels).loss.backward()
    assert idle(model) == []


@pytest.mark.parametrize(("family", "changes"), TEXTS, ids=str)
def test_the_loss_of_evaluation_is_exact_and_is_told_where_it_trains_nothing(
    family: str, changes: dict[str, Any]
) -> None:
    model, x = text(family, changes).eval(), symbols()
    out = model(x)
    assert torch.equal(out.log_prob, model.log_prob(x))
    torch.testing.assert_close(out.loss, -model.log_prob(x).sum() / x.numel())
    if objectives.default_rule(model.distribution) in ("likelihood", "masked"):
        out.loss.backward()
        assert idle(model) == []
    elif out.loss.requires_grad:
        with pytest.raises(InputError, match=r"call model\.train"):
            out.loss.backward()
    state = copy.deepcopy(model.state_dict())
    model(x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("family", "settings"), IMAGES, ids=str)
def test_the_loss_of_an_image_model_in_evaluation(family: str, settings: dict[str, Any]) -> None:
    model = image(family, settings)
    model.initialize(values(model))
    model.eval()
    x = values(model)
    with torch.no_grad():
        out = model(x, generator=torch.Generator().manual_seed(3))
        if model.exact:
            expected = model.log_prob(x)
            assert out.elbo is None
            torch.testing.assert_close(out.log_prob, expected)
        else:
            expected = model.elbo(x, 1, torch.Generator().manual_seed(3)).values
            torch.testing.assert_close(out.elbo, expected)
    assert float(out.loss) == pytest.approx(-float(expected.double().mean()) / (16 * math.log(2)), rel=1e-5)


def test_a_base_in_closed_form_moves_only_while_gradients_are_recorded() -> None:
    model = text("bipartite", {}).train()
    base = objectives.closed_form(model.distribution)
    assert isinstance(base, Categorical)
    with torch.no_grad():
        model(symbols())
    assert not base.counts.any()
    model(symbols())
    assert base.counts.sum() > 0


def test_a_covariance_needs_rows_to_start_from() -> None:
    model = image("dequantized", FLOW | {"levels": [2], "density": "covariance", "dequantizer": "normal"})
    few, many = values(model, 8), values(model)
    with pytest.raises(InputError, match=r"more rows.*model\.initialize"):
        model(few)
    model.initialize(many)
    model(few).loss.backward()
    assert idle(model) == []


@pytest.mark.parametrize("family", ["grouped", "bipartite"])
def test_lengths_are_counted_in_training(family: str) -> None:
    model = text(family, {}, explicit_length=True).train()
    x, lengths = symbols(4), torch.tensor([8, 8, 3, 2])
    model(x, lengths=lengths).loss.backward()
    assert idle(model) == []
    assert model.length_counts.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_unknown_arguments_are_refused(family: str) -> None:
    model, x = make_model(family, K), symbols(2)
    with pytest.raises(InputError, match="no argument 'length'; did you mean 'lengths'"):
        model(x, length=torch.tensor([3, 3]))
    with pytest.raises(InputError, match="'attention_masks'; did you mean 'attention_mask'"):
        model(x, attention_masks=torch.ones_like(x))
    assert isinstance(model(x, return_dict=False), tuple)
    assert torch.equal(model(x, return_dict=False)[0], model(x).loss)
    assert model(x, return_loss=False).loss is None


def test_unknown_arguments_of_other_models_are_refused() -> None:
    density, labeller = image(*IMAGES[0]).eval(), classifier({}).eval()
    with pytest.raises(InputError, match="has no labels; leave out the column 'label'"):
        density(values(density), labels=torch.zeros(40))
    with pytest.raises(InputError, match="did you mean 'generator'"):
        density(values(density), generators=None)
    x = torch.randint(256, (4, 64))
    with pytest.raises(InputError, match="did you mean 'labels'"):
        labeller(x, label=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match=r"label -100 is not one of the classes 0\.\.2"):
        labeller(x, labels=torch.tensor([0, 1, 2, -100]))
    with pytest.raises(InputError, match=r"labels are int64 \(4,\)"):
        labeller(x, labels=torch.zeros(4))
    loss = labeller(x, labels=torch.tensor([0, 1, 2, 0])).loss
    torch.manual_seed(0)
    assert labeller(x, return_dict=False)[0].shape == (4, 3)
    assert loss.ndim == 0


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_masks_and_labels_are_lengths(family: str, mode: bool, explicit: bool) -> None:
    model = make_model(family, K, explicit_length=explicit).train(mode)
    base = objectives.closed_form(model.distribution)
    if base is not None:
        base.assign(torch.rand_like(base.counts) * 9)
    x, lengths = symbols(4), torch.tensor([8, 5, 2, 1])
    present = torch.arange(LENGTH) < lengths[:, None]

    def loss(x: Tensor, **arguments: Tensor) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return float(model(x, **arguments).loss)

    expected = loss(x, lengths=lengths)
    other = torch.where(present, x, (x + 1) % K)
    labels = x.masked_fill(~present, -100)
    for mask in (present, present.long(), present.float()):
        assert loss(x, attention_mask=mask) == expected
        assert loss(other, attention_mask=mask) == pytest.approx(expected)
    assert loss(x, labels=labels) == loss(x, labels=labels, attention_mask=present) == expected
    assert loss(x, labels=labels, lengths=lengths) == expected
    assert expected != pytest.approx(loss(x))
    whole = torch.ones_like(x)
    assert loss(x) == loss(x, labels=x) == loss(x, attention_mask=whole, labels=x)


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_what_lengths_cannot_say_is_refused(family: str) -> None:
    model, x = make_model(family, K), symbols(2)
    ones, left, last = torch.ones_like(x), torch.ones_like(x), x.clone()
    left[:, 0] = 0
    last[1, -1] = -100
    prompt = x.clone()
    prompt[:, :3] = -100
    for arguments, message in [
        ({"attention_mask": left}, "before others that are present; pad on the right"),
        ({"attention_mask": 2 * ones}, "other than 0 and 1"),
        ({"attention_mask": ones[:, :3]}, "attention_mask has shape"),
        ({"labels": (x + 1) % K}, r"labels are input_ids \(not shifted\)"),
        ({"labels": x[:, 1:]}, "labels have shape"),
        ({"labels": prompt}, "before others that are present; a whole sequence is scored"),
        ({"labels": last, "attention_mask": ones}, "attention_mask says that 8 symbols of row 1 are present"),
        ({"lengths": torch.tensor([8, 8]), "labels": last}, "lengths says that 8 .* labels that 7 are"),
        ({"attention_mask": 0 * ones}, "attention_mask: no symbol of row 0 is present; leave the row out"),
        ({"labels": -100 * ones}, "labels: no symbol of row 0 is present"),
    ]:
        with pytest.raises(InputError, match=message):
            model(x, **arguments)


def test_a_batch_tells_its_share_of_several() -> None:
    model, x = make_model("grouped", K, explicit_length=True), symbols(6)
    lengths = torch.tensor([8, 8, 8, 4, 2, 1])
    labels = x.masked_fill(torch.arange(LENGTH) >= lengths[:, None], -100)
    total = (labels != -100).sum()
    parts = [
        model(x[rows], labels=labels[rows], num_items_in_batch=total).loss
        for rows in (slice(0, 3), slice(3, 6))
    ]
    counts = [24 / 31, 7 / 31]
    means = [model(x[rows], labels=labels[rows]).loss for rows in (slice(0, 3), slice(3, 6))]
    expected = sum(c * m for c, m in zip(counts, means, strict=True))
    torch.testing.assert_close(sum(parts), expected)
    only = model(x, labels=labels, num_items_in_batch=total).loss
    torch.testing.assert_close(only, model(x, labels=labels).loss)
