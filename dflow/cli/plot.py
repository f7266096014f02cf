"""``dflow plot``: density, coverage, progressive, training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Machine, Results, set_threads, show_file
from dflow.cli.source import Source
from dflow.config import InputError


@dataclass(kw_only=True)
class PlotDensity(Machine, Results):
    """Density p(v) and dequantized data q(v), side by side.

    Pictures of a model of two dimensions.
    """

    model: str = flag("folder of the model")
    output: str = flag("PNG file to write, whole or not at all", "density.png", short="-o")
    cells: int = flag("points of the plot a side", 400)


@dataclass(kw_only=True)
class PlotCoverage(Source, Machine, Results):
    """Error of an ensemble where its members agree most.

    An ensemble of drawn networks, on the share of the data where they agree most.
    """

    model: str = flag("folder of the model, a network of random signs")
    output: str = flag("PNG file to write, whole or not at all", "coverage.png", short="-o")
    members: int = flag("networks of the ensemble", 16)
    seed: int = flag("seed of their draws", 0)


@dataclass(kw_only=True)
class PlotProgressive(Results):
    """Pictures of a .dfl file as they are seen after each level.

    With their share of the file and PSNR.
    """

    file: str = argument(".dfl file")
    model: str = flag("folder of the model that compressed it")
    output: str = flag("PNG file to write, whole or not at all", "progressive.png", short="-o")
    rows: int = flag("pictures to show, the first ones", 6)
    threads: int | None = flag("threads of torch on the CPU (default: one a processor)", None)


@dataclass(kw_only=True)
class PlotTraining(Results):
    """What the validation data cost while models were trained.

    By steps and by minutes.
    """

    runs: list[str] = field(metadata={"help": "folders of the models", "positional": True})
    output: str = flag("PNG file to write, whole or not at all", "training.png", short="-o")


def plot_output(name: str) -> Path:
    """Where a plot goes, if nothing is there."""
    from dflow.generate import check_output

    output = Path(name)
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {name}: plots are PNG files; let the name end with .png")
    check_output(output)
    return output


def plot_coverage(flags: PlotCoverage) -> int:
    """`dflow plot coverage`."""
    from dflow import plot
    from dflow.data import load_images
    from dflow.evaluate import evaluate_labels
    from dflow.generate import write_whole
    from dflow.hf import DflowClassifier, load

    output = plot_output(flags.output)
    if flags.members < 2:
        raise InputError(f"--members {flags.members} must be at least 2")
    model = load(flags.model, flags.settle(), DflowClassifier)
    images = load_images(flags.images(flags.model))
    result = evaluate_labels(
        model,
        images.split(flags.part(images, flags.model)),
        images.train,
        ensembles=(flags.members,),
        limit=flags.limit,
        seed=flags.seed,
        progress=True,
    )
    if result.coverage is None:
        raise InputError(f"{flags.model}: no weight is random, and so no ensemble; train kind probabilistic")
    propagated, binarized, ensemble = result.scores
    write_whole(
        output,
        plot.coverage(result.coverage, {s.name: 1 - s.accuracy for s in (propagated, binarized, ensemble)}),
    )
    return show_file(flags, output)


def plot_density(flags: PlotDensity) -> int:
    """`dflow plot density`."""
    from dflow import plot
    from dflow.data import load_images
    from dflow.generate import write_whole
    from dflow.hf import DflowImageModel, load

    output = plot_output(flags.output)
    model = load(flags.model, flags.settle(), DflowImageModel)
    data = load_images(Source().images(flags.model)).train
    write_whole(output, plot.density(model, data, flags.cells))
    return show_file(flags, output)


def plot_training(flags: PlotTraining) -> int:
    """`dflow plot training`."""
    from dflow import plot
    from dflow.generate import write_whole
    from dflow.train import history

    output = plot_output(flags.output)
    runs = {folder: history(folder) for folder in flags.runs}
    # Trainings of version 0.1.0 did not note their unit: plain "bits".
    units = {run.unit: folder for folder, run in runs.items() if run.unit != "bits"}
    if len(units) > 1:
        raise InputError("; ".join(f"{f} is measured in {u}" for u, f in units.items()) + ": plot them apart")
    data = plot.training({folder: run.rows for folder, run in runs.items()}, next(iter(units), "bits"))
    write_whole(output, data)
    return show_file(flags, output)


def plot_progressive(flags: PlotProgressive) -> int:
    """`dflow plot progressive`."""
    from dflow import plot
    from dflow.compress import stages
    from dflow.generate import write_whole

    set_threads(flags.threads)
    output = plot_output(flags.output)
    if flags.rows < 1:
        raise InputError(f"--rows {flags.rows} must be at least 1")
    found = stages(Path(flags.file).read_bytes(), flags.model, name=flags.file, progress=True)
    names = [picture.form.file for picture in found[0].pictures][: flags.rows]
    write_whole(
        output,
        plot.progressive(
            names,
            [[stage.pictures[i].preview() for stage in found] for i in range(len(names))],
            [stage.share for stage in found],
            [[stage.psnr[i] for stage in found] for i in range(len(names))],
        ),
    )
    return show_file(flags, output)


#: What these verbs are about.
GROUP = "pictures of a model: density, coverage, progressive, training"


VERBS: Verbs = (
    ("plot density", PlotDensity, plot_density, "dflow plot density --model runs/images/checkerboard"),
    ("plot coverage", PlotCoverage, plot_coverage, "dflow plot coverage --model runs/binary/mnist_pbnet_s"),
    (
        "plot progressive",
        PlotProgressive,
        plot_progressive,
        "dflow plot progressive pictures.dfl --model runs/images/idf -o levels.png",
    ),
    (
        "plot training",
        PlotTraining,
        plot_training,
        "dflow plot training runs/ptb/grouped16 runs/ptb/transformer -o curves.png",
    ),
)
