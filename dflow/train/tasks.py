"""The task of a training: a model, its data, and the method by which it is trained on them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from transformers import PreTrainedModel

from dflow import hf, objectives, zoo
from dflow.config import InputError
from dflow.data import Corpus, ImageConfig, ImageSet, Tokenizer, load, load_images
from dflow.distributions import Categorical, Mixture
from dflow.flows.walk import innermost
from dflow.train import initial
from dflow.train.material import Images, Material, Texts
from dflow.train.methods import INITIAL_FLOW, Bounds, Classification, Likelihood, Method, Symbols
from dflow.train.recipe import Recipe


@final
@dataclass(frozen=True)
class Task:
    """A model that is trained on data.

    Attributes:
        recipe: what to train on what; settings of the model that follow from the data are filled in.
        model: with fresh weights, but for what is set in closed form from the data.
        data: batches, the rows of an evaluation, units and samples.
        method: objective, what moves with the steps, and the cost at an evaluation.
        description: the model in a line, and lines on its data.
    """

    recipe: Recipe
    model: PreTrainedModel
    data: Material
    method: Method
    description: str


def task_of(recipe: Recipe, resume: bool) -> Task:
    """The task that a recipe describes, with its data read and its model built.

    Raises:
        InputError: data that do not fit the model.
    """
    if isinstance(recipe.data, ImageConfig):
        if recipe.train.init is not None:
            raise InputError(f"train.init {recipe.train.init}: only models of text start from others")
        return _of_images(recipe, load_images(recipe.data), resume)
    init = None if resume else recipe.train.init
    if init is not None:
        return _of_text(recipe, initial.corpus_for(recipe.data, recipe, init), init)
    tokenizer = Tokenizer.load(recipe.output) if resume else None
    return _of_text(recipe, load(recipe.data, tokenizer, recipe.model.length))


def _task(
    recipe: Recipe, model: PreTrainedModel, data: Material, method: Method, name: str, calls: str = ""
) -> Task:
    parameters = sum(p.numel() for p in model.parameters())
    head = f"{name}: {parameters:,} parameters, rule {method.rule}{calls}"
    return Task(recipe, model, data, method, f"{head}\n{data.summary}")


def _of_text(recipe: Recipe, corpus: Corpus, init: str | None = None) -> Task:
    """A model of text, scored exactly; ``init`` is the model whose weights it starts from."""
    data = Texts(recipe, corpus)
    explicit = corpus.protocol != "stream"
    torch.manual_seed(recipe.train.seed)
    settings = hf.DflowConfig(
        family=recipe.family,
        vocab_size=corpus.tokenizer.size,
        explicit_length=explicit,
        **asdict(recipe.model),
    )
    model = hf.DflowModel(settings)
    data.count_text(model, recipe.model)
    base = innermost(model.distribution)
    if isinstance(base, (Categorical, Mixture)):
        base.initialize(corpus.train.marginals(corpus.tokenizer.size))
    if init is not None:
        initial.start(model, recipe, init)
    if explicit:
        _check_lengths(model, recipe.family)
        model.set_length_counts(corpus.train.length_counts(data.length).float())
    most = "at most " * (getattr(recipe.model, "inversion", "loop") == "jacobi")
    calls = f", {most}{model.num_calls} network calls to draw {data.length} symbols"
    return _task(recipe, model, data, Symbols(recipe.train, model), recipe.family, calls)


@torch.no_grad()
def _check_lengths(model: hf.DflowModel, family: str) -> None:
    """Refuse a law that scores symbols beyond the end of a sentence: it would count them as text."""
    length = model.config.length
    x = torch.zeros(3, length, dtype=torch.int64)
    x[1, 1:] = model.config.vocab_size - 1
    model.train(False)
    short, same, long = model.log_prob(x, torch.tensor([1, 1, length])).tolist()
    model.train()
    blind = length > 1 and math.isclose(short, long, rel_tol=1e-6)
    if blind or not math.isclose(short, same, rel_tol=1e-4, abs_tol=1e-4):
        raise InputError(
            f"family {family!r} scores symbols beyond the end of a sentence: let log_prob of "
            "its law heed the lengths in the context, or use data.protocol=stream"
        )


def _of_images(recipe: Recipe, images: ImageSet, resume: bool) -> Task:
    """A model of images or a table, or a classifier of images."""
    family = zoo.find(recipe.family)
    labelled = family.kind == "labels"
    if labelled and not images.classes:
        raise InputError(f"{images.name}: has no labels, and this trains a classifier; use mnist or cifar10")
    settings = _settings(recipe, images, labelled)
    recipe = replace(recipe, model=settings)
    name, values = settings.about() or recipe.family, {"family": recipe.family} | asdict(settings)
    data = Images(recipe, images, labelled, repeated=not (labelled or family.exact))
    torch.manual_seed(recipe.train.seed)
    if labelled:
        classifier = hf.DflowClassifier(hf.DflowClassifierConfig(**values))
        if not resume:
            _transfer(classifier)
        return _task(recipe, classifier, data, Classification(recipe.train, classifier, data), name)
    model = hf.DflowImageModel(hf.DflowImageConfig(**values))
    method: Method
    if not family.exact:
        method = Bounds(recipe.train, model, data)
    elif set(family.rules or ()) & set(zoo.MAPS):
        method = Symbols(recipe.train, model)
        model.distribution.eval()  # No batch is averaged into the normalisations before the first step.
        objectives.refit(model.distribution, [(data.initial(INITIAL_FLOW), None)])
        model.distribution.train()
    else:
        method = Likelihood(recipe.train, model, data)
    return _task(recipe, model, data, method, name)


def _settings(recipe: Recipe, images: ImageSet, labelled: bool) -> zoo.ValuesConfig:
    """The settings of the model, with those that follow from the data, so that the recipe has all of them."""
    if images.unfit:
        raise InputError(images.unfit)
    of_data: dict[str, Any] = {"classes": images.classes} if labelled else {}
    of_data["shape"] = list(images.shape)
    # A recipe that has the levels of its data, and no units, continues a model of version 0.1.0.
    units = () if recipe.model.levels and not recipe.model.scale else ("loc", "scale")
    for name in ("levels", "lowest", "columns", *units):
        value = getattr(images, name)
        if value is not None:
            of_data[name] = list(value) if isinstance(value, tuple) else [value]
    for name, value in of_data.items():
        in_recipe = getattr(recipe.model, name)
        if in_recipe and in_recipe != value:
            raise InputError(f"model.{name} is {in_recipe} and the data's is {value}; leave it out")
    settings: zoo.ValuesConfig = replace(recipe.model, **of_data)
    return settings


def _transfer(model: hf.DflowClassifier) -> None:
    """Start a network of random signs from the trained network that its setting ``init`` names."""
    init = model.config.settings().init
    if init == zoo.UNIFORM:
        return
    if not Path(init).is_dir():
        raise InputError(
            f"model.init {init}: no such folder; train the recipe binary/mnist_float first, or "
            "give the folder of a trained network of floats, or uniform"
        )
    start = hf.load(init, kind=hf.DflowClassifier)
    if start.config.kind != "float":
        raise InputError(
            f"model.init {init}: kind {start.config.kind}, whose weights are no measure of "
            "their certainty; give a network of kind float, or uniform"
        )
    zoo.transfer(model.net, start.net)
