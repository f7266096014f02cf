"""What the loop of training asks of a kind of data: its batches, model, objective, units and samples."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dflow import hf, objectives, zoo
from dflow.config import InputError
from dflow.core import Distribution
from dflow.data import Corpus, ImageConfig, ImageSet, Tokenizer, dealt, files, load, load_images, pictures
from dflow.dequantize import Iwbo, TruncatedNormal
from dflow.distributions import Categorical, Gaussian, Mixture
from dflow.flows.walk import innermost
from dflow.train.recipe import Recipe, Schedule

Batch = tuple[Tensor, Tensor | None]


class Task(ABC):
    """A model being trained on data.

    Attributes:
        recipe: what to train on what; settings that are those of the data are filled in.
        model: with fresh weights, but for what is set in closed form from the data.
        objective: loss in nats summed over a batch, and statistics for what has a closed form (or None).
        rule: the training rule.
        checksum: of the data.
        unit: of what is told, "bits a character".
        short: the same, short.
        things: what a rate counts.
        kind: of the figure told at an evaluation: "exact" or the name of a bound.
        shares: more of the last evaluation, by name, for its line of metrics.
    """

    recipe: Recipe
    model: PreTrainedModel
    objective: nn.Module
    rule: str
    checksum: str
    unit: str
    short: str
    things: str
    kind: str
    shares: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def batch(self, seed: int) -> Batch:
        """The whole batch that a seed gives: the same on every process."""

    @abstractmethod
    def entries(self, batch: Batch) -> int:
        """Entries (symbols, dimensions) over which the loss of a batch is averaged."""

    @abstractmethod
    def count(self, batch: Batch) -> float:
        """Things (characters, dimensions, data) over which the loss of a batch is told."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what belongs to the model beside its weights."""

    @abstractmethod
    def describe(self) -> str:
        """The model and the data in a line each; a line for each split, and one for each note on the data."""

    @abstractmethod
    def valid(self, device: torch.device, rank: int, world: int) -> tuple[Iterator[Batch], float]:
        """This process's share of the validation data, in batches; and the things in all of it."""

    @abstractmethod
    def nats(self, model: Any, batch: Batch) -> Tensor:
        """Minus the likelihood, or its bound, of a batch: summed, float64."""

    @abstractmethod
    def show(self, model: Any, step: int, device: torch.device) -> Iterator[str]:
        """Draw and show samples; yields lines to print."""

    @property
    def rank_unit(self) -> str:
        """Of `rank`."""
        return self.unit

    def rank(self, model: Any, found: float, device: torch.device) -> float:
        """What the best model has least of, the same on every process: what was told, ``found``."""
        return found

    def turn(self, step: int) -> int | None:
        """Of a model of several numbers of calls, the law that a step trains; None of other models."""
        return None

    def closed_form(self, model: Any) -> Any:
        """What has a closed form and is moved by statistics, or None."""
        return None

    def momentum(self, step: int, fraction: float) -> float:
        """Memory of what has a closed form, after a fraction of the training."""
        return self.recipe.train.base_momentum

    def schedule(self, step: int, fraction: float) -> None:
        """Move what moves with the training."""
        return

    def settle(self, model: Any, batches: Iterator[Batch]) -> Any:
        """Make a model ready to be evaluated; what `unsettle` needs to go on training."""
        return None

    def unsettle(self, model: Any, kept: Any) -> None:
        """Undo `settle`."""
        return


def task_of(recipe: Recipe, resume: bool) -> Task:
    """The task that a recipe describes, with its data read and its model built."""
    family = zoo.find(recipe.family)
    if not isinstance(recipe.data, ImageConfig):
        return _Text(recipe, load(recipe.data, Tokenizer.load(recipe.output) if resume else None))
    images = load_images(recipe.data)
    if family.kind == "labels":
        return _Labels(recipe, images, resume)
    if not family.exact:
        return _Bounded(recipe, images)
    return (_Modular if set(family.rules or ()) & set(zoo.MAPS) else _Exact)(recipe, images)


_Maps = hf.DflowModel | hf.DflowImageModel


class _Discrete(Task):
    """A law of symbols of Z/K, whose maps, orders and base move with the training."""

    model: Any

    def prepare(self, distribution: Distribution) -> None:
        """Set rule and objective, and find what has a schedule."""
        asked = self.recipe.train.rule
        self.rule = objectives.default_rule(distribution) if asked == "auto" else asked
        self.objective = objectives.Objective(distribution, cast(objectives.Rule, self.rule))
        self.estimators = objectives.estimators(distribution)
        self.turns = objectives.turns(distribution)

    def turn(self, step: int) -> int:
        # From the seed and the step, so that all processes and resumed runs take the same.
        return mix(self.recipe.train.seed + 2, step) % self.turns

    def closed_form(self, model: _Maps) -> Categorical | None:
        return objectives.closed_form(model.distribution)

    def schedule(self, step: int, fraction: float) -> None:
        config = self.recipe.train
        noise = config.noise or (Schedule(1.0, 0.0) if self.rule == "gumbel" else Schedule(0.0, 0.0))
        for estimator in self.estimators:
            estimator.temperature = config.temperature.at(fraction)
            estimator.noise = noise.at(fraction)
        base = self.closed_form(self.model)
        if base is not None:
            base.peak = config.peak.at(fraction) if config.peak and fraction < config.peak.until else 0.0

    def settle(self, model: _Maps, batches: Iterator[Batch]) -> Any:
        base, training = self.closed_form(model), self.closed_form(self.model)
        if base is None or training is None:
            return None
        kept = base.peak, training.counts.clone()
        base.peak = 0.0
        # The exact optimum for the weights at hand, where training had a running average of old ones.
        objectives.refit(model.distribution, batches)
        return kept

    def unsettle(self, model: _Maps, kept: Any) -> None:
        base, training = self.closed_form(model), self.closed_form(self.model)
        if base is None or training is None:
            return
        base.peak, counts = kept
        if model is self.model:
            training.counts.copy_(counts)


class _Text(_Discrete):
    """Sequences of symbols, scored exactly."""

    unit, short, things, kind = "bits a character", "bits/char", "chars", "exact"
    model: hf.DflowModel

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        config = recipe.train
        self.recipe, self.corpus, self.length = recipe, corpus, recipe.model.length
        self.checksum = corpus.checksum
        explicit = corpus.protocol == "sentence"
        for text in (corpus.train, corpus.valid):
            text.crops(1, self.length, torch.Generator().manual_seed(0))
        torch.manual_seed(config.seed)
        settings = hf.DflowConfig(
            family=recipe.family,
            vocab_size=corpus.tokenizer.size,
            explicit_length=explicit,
            **asdict(recipe.model),
        )
        self.model = hf.DflowModel(settings)
        distribution = self.model.distribution
        law = innermost(distribution)
        if isinstance(law, (Categorical, Mixture)):
            law.initialize(corpus.train.marginals(corpus.tokenizer.size))
        if explicit:
            self._check_lengths(corpus.tokenizer.size)
            self.model.set_length_counts(corpus.train.length_counts(self.length).float())
        self.prepare(distribution)

    @torch.no_grad()
    def _check_lengths(self, K: int) -> None:
        """Refuse a law that scores symbols beyond the end of a sentence: it would count them as text."""
        x = torch.zeros(3, self.length, dtype=torch.int64)
        x[1, 1:] = K - 1
        self.model.train(False)
        short, same, long = self.model.log_prob(x, torch.tensor([1, 1, self.length])).tolist()
        self.model.train()
        blind = self.length > 1 and math.isclose(short, long, rel_tol=1e-6)
        if blind or not math.isclose(short, same, rel_tol=1e-4, abs_tol=1e-4):
            raise InputError(
                f"family {self.recipe.family!r} scores symbols beyond the end of a sentence: let log_prob of "
                "its law heed the lengths in the context, or use data.protocol=stream"
            )

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        return self.corpus.train.crops(self.recipe.train.batch_size, self.length, generator)

    def entries(self, batch: Batch) -> int:
        x, lengths = batch
        return x.numel() if lengths is None else int(lengths.sum())

    def count(self, batch: Batch) -> float:
        return float(self.corpus.train.characters(*batch).sum())

    def save(self, folder: Path) -> None:
        self.corpus.tokenizer.save(folder)
        dealt.write(self.corpus.about(), folder)

    def describe(self) -> str:
        corpus = self.corpus
        parameters = sum(p.numel() for p in self.model.parameters())
        most = "at most " * (getattr(self.recipe.model, "inversion", "loop") == "jacobi")
        return (
            f"{self.recipe.family}: {parameters:,} parameters, rule {self.rule}, "
            f"{most}{self.model.num_calls} network calls to draw {self.length} symbols\n"
            f"{corpus.name} ({corpus.protocol}): {corpus.train.amount}, "
            f"{corpus.tokenizer.size} different\n" + "\n".join(dealt.lines(corpus.about()))
        )

    def valid(self, device: torch.device, rank: int, world: int) -> tuple[Iterator[Batch], float]:
        text = self.corpus.valid
        chunks = self.recipe.train.eval_chunks
        limit = None if chunks == 0 else _EVAL_CHUNKS if chunks is None else chunks
        ids, lengths = text.chunks(self.length, limit)
        size = max(1, self.recipe.train.batch_size // world)

        def batches() -> Iterator[Batch]:
            for start in range(rank * size, len(ids), world * size):
                rows = slice(start, start + size)
                yield ids[rows].to(device), None if lengths is None else lengths[rows].to(device)

        # The end of a sentence counts as a character.
        ends = 0 if lengths is None else len(lengths)
        return batches(), float(text.characters(ids, lengths).sum()) + ends

    def nats(self, model: hf.DflowModel, batch: Batch) -> Tensor:
        return -model.log_prob(*batch).double().sum()

    def show(self, model: hf.DflowModel, step: int, device: torch.device) -> Iterator[str]:
        config = self.recipe.train
        generator = torch.Generator(device).manual_seed(config.seed)
        for row in model.generate(config.samples, generator=generator):
            yield "  | " + self.corpus.tokenizer.decode(row.cpu()).replace("\n", "\n  | ")


class _Values(Task):
    """A model of images or tables, or of their labels, whose settings take from the data what is theirs."""

    def __init__(self, recipe: Recipe, images: ImageSet, **of_data: Any) -> None:
        config = recipe.train
        of_data["shape"] = list(images.shape)
        if images.unfit:
            raise InputError(images.unfit)
        # A recipe that has the levels of its data, and no units, continues a model of version 0.1.0.
        units = () if recipe.model.levels and not recipe.model.scale else ("loc", "scale")
        for name in ("levels", "lowest", "columns", *units):
            found = getattr(images, name)
            if found is not None:
                of_data[name] = list(found) if isinstance(found, tuple) else [found]
        for name, found in of_data.items():
            asked = getattr(recipe.model, name)
            if asked and asked != found:
                raise InputError(f"model.{name} is {asked} and the data's is {found}; leave it out")
        # What the data decide is kept in the recipe, so that it tells the whole.
        self.settings: zoo.ValuesConfig = replace(recipe.model, **of_data)
        self.recipe, self.images = replace(recipe, model=self.settings), images
        self.checksum = images.checksum
        torch.manual_seed(config.seed)
        self.model = self.fresh()
        chunks = _EVAL_ROWS if config.eval_chunks is None else config.eval_chunks
        self.rows = images.valid.subset(chunks or images.valid.num_rows)

    @abstractmethod
    def fresh(self) -> PreTrainedModel:
        """The model that `settings` describe."""

    def save(self, folder: Path) -> None:
        dealt.write(self.images.about(), folder)

    def mirrored(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Rows, half of them turned round where the recipe asks for it."""
        if not (isinstance(self.recipe.data, ImageConfig) and self.recipe.data.flip):
            return x
        turned = x.view(-1, *self.images.shape).flip(3).flatten(1)
        return torch.where(torch.rand(len(x), 1, generator=generator) < 0.5, turned, x)

    def describe(self) -> str:
        images = self.images
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.settings.about() or self.recipe.family}: {parameters:,} parameters, rule {self.rule}\n"
            f"{images.name} {'x'.join(map(str, images.shape))}: {images.train.amount}\n"
            + "\n".join(dealt.lines(images.about()))
        )


class _Images(_Values):
    """Images or a table of integers."""

    model: hf.DflowImageModel

    def __init__(self, recipe: Recipe, images: ImageSet) -> None:
        super().__init__(recipe, images)
        self.total = images.unit == "bits"
        self.unit = images.unit
        self.short, self.things = ("bits", "rows") if self.total else ("bits/dim", "dims")

    def fresh(self) -> PreTrainedModel:
        return hf.DflowImageModel(hf.DflowImageConfig(family=self.recipe.family, **asdict(self.settings)))

    def first(self, entries: int) -> Tensor:
        """Rows from which the model starts: a batch, or as many as have so many entries."""
        config, images = self.recipe.train, self.images
        rows = max(config.batch_size, min(_INITIAL_ROWS, entries // images.dim))
        return images.train.crops(rows, images.dim, torch.Generator().manual_seed(config.seed))[0]

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x, _ = self.images.train.crops(self.recipe.train.batch_size, self.images.dim, generator)
        return self.mirrored(x, generator), None

    def entries(self, batch: Batch) -> int:
        return batch[0].numel()

    def count(self, batch: Batch) -> float:
        return len(batch[0]) if self.total else batch[0].numel()

    def passes(self) -> int:
        """How often the rows of an evaluation are gone through."""
        return 1

    def valid(self, device: torch.device, rank: int, world: int) -> tuple[Iterator[Batch], float]:
        config, rows = self.recipe.train, self.rows
        limit = rows.num_rows
        total = limit * self.passes()
        size = max(1, config.batch_size // world, _EVAL_ENTRIES // self.images.dim)
        # The same noise at every evaluation, so that two of them compare.
        self.noise = torch.Generator(device).manual_seed(mix(config.seed, rank))

        def batches() -> Iterator[Batch]:
            for start in range(rank * size, total, world * size):
                yield rows.rows(torch.arange(start, min(total, start + size)) % limit).to(device), None

        return batches(), float(total if self.total else total * self.images.dim)

    def show(self, model: hf.DflowImageModel, step: int, device: torch.device) -> Iterator[str]:
        config, images = self.recipe.train, self.images
        generator = torch.Generator(device).manual_seed(config.seed)
        if images.shape[1:] == (1, 1):
            for row in model.law.sample(config.samples, generator=generator).tolist():
                yield f"  | {row}"
            return
        folder = self.recipe.output / "samples"
        folder.mkdir(exist_ok=True)
        levels = images.levels if isinstance(images.levels, int) else 2
        # A draw may lie outside what a picture can show.
        x = model.law.sample(max(config.samples, _PICTURES), generator=generator).clamp(0, levels - 1).cpu()
        path = folder / f"{step:07d}.png"
        files.write(path, pictures.grid(x, images.shape, levels))
        yield f"  | {path}"


class _Bounded(_Images):
    """Integers under a density: bounds of the likelihood."""

    def __init__(self, recipe: Recipe, images: ImageSet) -> None:
        super().__init__(recipe, images)
        config, law = recipe.train, self.model.dequantized
        self.bound = objectives.bound_of(config.rule, config.draws, config.alpha)
        self.rule = self.bound.name
        self.check = objectives.guaranteed(self.bound, config.eval_draws)
        self.kind = f"bound: {self.check.name}"
        self.objective = objectives.BoundObjective(law, self.bound)
        # A Gaussian of many entries needs many rows; layers of a flow are set channel by channel.
        x = self.first(_INITIAL if isinstance(law.density, Gaussian) else _INITIAL_FLOW)
        objectives.initialize(law, x, torch.Generator().manual_seed(config.seed))

    def passes(self) -> int:
        # Where rows are few, they are gone through again, each time with other noise.
        return 1 if self.recipe.train.eval_chunks else -(-_EVAL_ROWS // self.rows.num_rows)

    def nats(self, model: hf.DflowImageModel, batch: Batch) -> Tensor:
        # At once no more draws than a step of the training holds.
        found = model.dequantized.assess(batch[0], self.check.k, self.bound.k, self.noise)
        return -(found.iwbo if isinstance(self.check, Iwbo) else found.elbo).sum()

    def closed_form(self, model: hf.DflowImageModel) -> Any:
        return objectives.gaussian(model.dequantized)

    def momentum(self, step: int, fraction: float) -> float:
        momentum, dequantizer = self.recipe.train.base_momentum, self.model.dequantized.dequantizer
        if not isinstance(dequantizer, TruncatedNormal) and not any(True for _ in dequantizer.parameters()):
            return momentum
        # A dequantizer that still moves has moments of yesterday, and in the end it hardly does: the window
        # grows with the training.
        return min(momentum, 1 - 1 / (32 + step * (1 + 2 * fraction) / 4))


class _Exact(_Images):
    """Integers under an integer flow: the likelihood itself."""

    rule, kind = "likelihood", "exact"

    def __init__(self, recipe: Recipe, images: ImageSet) -> None:
        super().__init__(recipe, images)
        law = self.model.distribution
        self.objective = objectives.ExactObjective(law)
        objectives.initialize_integers(law, self.first(_INITIAL_FLOW))

    def nats(self, model: hf.DflowImageModel, batch: Batch) -> Tensor:
        return -model.log_prob(batch[0]).double().sum()


class _Modular(_Discrete, _Images):
    """Pixels as symbols under couplings on Z/K: the likelihood itself."""

    kind = "exact"
    model: hf.DflowImageModel

    def __init__(self, recipe: Recipe, images: ImageSet) -> None:
        super().__init__(recipe, images)
        law = self.model.distribution
        self.prepare(law)
        law.eval()  # No batch is to be averaged into the normalisations before the first step.
        objectives.refit(law, [(self.first(_INITIAL_FLOW), None)])
        law.train()

    def nats(self, model: hf.DflowImageModel, batch: Batch) -> Tensor:
        return -model.log_prob(batch[0]).double().sum()


class _Labels(_Values):
    """Labels of images under a classifier; what is told is the cost of the propagated law.

    The best model is that with the fewest errors, binarized where it can be: bits grow with the certainty
    of a few wrong answers while errors still fall.
    """

    model: hf.DflowClassifier
    rule, kind = "likelihood", "of the network as it is evaluated"
    unit, short, things = "bits a label", "bits/label", "images"

    def __init__(self, recipe: Recipe, images: ImageSet, resume: bool) -> None:
        if not images.classes:
            raise InputError(
                f"{images.name}: has no labels, and this trains a classifier; use mnist or cifar10"
            )
        super().__init__(recipe, images, classes=images.classes)
        init = self.network.init
        if init != zoo.UNIFORM and not resume:
            if not Path(init).is_dir():
                raise InputError(
                    f"model.init {init}: no such folder; train recipes/binary/mnist_float.yaml first, or "
                    "give the folder of a trained network of floats, or uniform"
                )
            start = hf.load(init, kind=hf.DflowClassifier)
            if start.config.kind != "float":
                raise InputError(
                    f"model.init {init}: kind {start.config.kind}, whose weights are no measure of "
                    "their certainty; give a network of kind float, or uniform"
                )
            zoo.transfer(self.model.net, start.net)
        self.objective = objectives.LabelObjective(self.model.net)
        self.rule = self.network.head

    @property
    def network(self) -> zoo.PBNetConfig:
        """Settings of the network."""
        return cast(zoo.PBNetConfig, self.settings)

    def fresh(self) -> PreTrainedModel:
        settings = hf.DflowClassifierConfig(family=self.recipe.family, **asdict(self.settings))
        return hf.DflowClassifier(settings)

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        x, labels = self.images.train.labelled(self.recipe.train.batch_size, generator)
        return self.mirrored(x, generator), labels

    def entries(self, batch: Batch) -> int:
        return len(batch[0])

    def count(self, batch: Batch) -> float:
        return len(batch[0])

    def valid(self, device: torch.device, rank: int, world: int) -> tuple[Iterator[Batch], float]:
        rows, size = self.rows, max(1, self.recipe.train.batch_size // world)
        # Pooling may draw: the same at every evaluation, so that two of them compare.
        torch.manual_seed(mix(self.recipe.train.seed, rank))

        def batches() -> Iterator[Batch]:
            for start in range(rank * size, rows.num_rows, world * size):
                part = slice(start, min(rows.num_rows, start + size))
                yield rows.rows(part).to(device), cast(Tensor, rows.labels)[part].to(device)

        return batches(), float(rows.num_rows)

    def nats(self, model: hf.DflowClassifier, batch: Batch) -> Tensor:
        x, labels = batch
        return nn.functional.nll_loss(model.log_prob(x).double(), cast(Tensor, labels), reduction="sum")

    rank_unit = "of the images wrong"

    @torch.no_grad()
    def rank(self, model: hf.DflowClassifier, found: float, device: torch.device) -> float:
        nets = {"as trained": model.net}
        if self.network.kind != "float":
            rows = self.images.train.subset(_REESTIMATED).rows(slice(None))
            nets["binarized"] = model.binarized(rows.to(device))
        wrong = dict.fromkeys(nets, 0)
        batches, count = self.valid(device, 0, 1)
        for x, labels in batches:
            for name, net in nets.items():
                wrong[name] += int((net(x).argmax(1) != labels).sum())
        self.shares = {f"valid_error {name}": n / count for name, n in wrong.items()}
        # Of those with as many errors the one of fewest bits: far less than an image more.
        return list(wrong.values())[-1] / count + 1e-9 * min(found, 100.0)

    def show(self, model: hf.DflowClassifier, step: int, device: torch.device) -> Iterator[str]:
        told = ", ".join(f"{name.split(' ', 1)[1]} {1 - n:.2%}" for name, n in self.shares.items())
        yield f"  | accuracy on the validation data: {told}"


#: Images on which normalisations are re-estimated to show how good the binarized network is.
_REESTIMATED = 2560
#: Chunks of text, and rows of images, of an evaluation during training where none is asked for.
_EVAL_CHUNKS, _EVAL_ROWS = 128, 2048
#: Most entries of the data from which a model of images starts, a Gaussian or a flow; and most rows.
_INITIAL, _INITIAL_FLOW, _INITIAL_ROWS = 1 << 22, 1 << 18, 1 << 17
#: Entries of a batch of images at an evaluation, where those of training have less.
_EVAL_ENTRIES = 1 << 14
#: Least number of pictures in a sample grid.
_PICTURES = 36


def mix(*numbers: int) -> int:
    """A seed that differs for every combination of ``numbers``."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
