"""``dflow plot``: density, coverage, progressive, training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflow.cli.flags import Verbs, argument, flag
from dflow.cli.shared import Machine, Results, Threads, show_file
from dflow.cli.source import Source
from dflow.config import InputError

_OUTPUT = "PNG file to write, whole or not at all"


@dataclass(kw_only=True)
class PlotDensity(Machine, Results):
    """Plot the density p(v) beside the dequantized data q(v).

    The model has two dimensions.
    """

    model: str = flag("folder of the model")
    output: str = flag(_OUTPUT, "density.png", short="-o")
    cells: int = flag("number of points of the plot a side", 400)


@dataclass(kw_only=True)
class PlotCoverage(Source, Machine, Results):
    """Plot the error of an ensemble where its members agree most.

    The members are networks that are drawn from a network of random signs.
    """

    model: str = flag("folder of the model, a network of random signs")
    output: str = flag(_OUTPUT, "coverage.png", short="-o")
    members: int = flag("number of networks of the ensemble", 16)
    seed: int = flag("seed of the draws of the networks", 0)


@dataclass(kw_only=True)
class PlotProgressive(Threads, Results):
    """Plot pictures of a .dfl file as seen after each level.

    The plot names the share of the file, and the PSNR.
    """

    file: str = argument(".dfl file")
    model: str = flag("folder of the model that compressed it")
    output: str = flag(_OUTPUT, "progressive.png", short="-o")
    rows: int = flag("number of pictures to show, the first ones", 6)


@dataclass(kw_only=True)
class PlotTraining(Results):
    """Plot the cost of validation data by steps and by minutes."""

    runs: list[str] = argument("folders of the models")
    output: str = flag(_OUTPUT, "training.png", short="-o")


def verb(draw: Callable[[Any], bytes]) -> Callable[[Any], int]:
    """The function of a verb that writes what ``draw`` makes of the flags, unless the output exists."""

    def run(flags: Any) -> int:
        from dflow.generate import check_output, write_whole

        output = Path(flags.output)
        if output.suffix.lower() != ".png":
            raise InputError(f"--output {output}: plots are PNG files; let the name end with .png")
        check_output(output)
        write_whole(output, draw(flags))
        return show_file(flags, output)

    return run


def draw_coverage(flags: PlotCoverage) -> bytes:
    """`dflow plot coverage`."""
    from dflow import plot
    from dflow.data import load_images
    from dflow.evaluate import evaluate_labels
    from dflow.hf import DflowClassifier, load

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
    return plot.coverage(result.coverage, {s.name: 1 - s.accuracy for s in result.scores})


def draw_density(flags: PlotDensity) -> bytes:
    """`dflow plot density`."""
    from dflow import plot
    from dflow.data import load_images
    from dflow.hf import DflowImageModel, load

    model = load(flags.model, flags.settle(), DflowImageModel)
    return plot.density(model, load_images(Source().images(flags.model)).train, flags.cells)


def draw_training(flags: PlotTraining) -> bytes:
    """`dflow plot training`."""
    from dflow import plot
    from dflow.train import history

    runs = {folder: history(folder) for folder in flags.runs}
    # Trainings of version 0.1.0 did not note their unit: plain "bits".
    units = {run.unit: folder for folder, run in runs.items() if run.unit != "bits"}
    if len(units) > 1:
        raise InputError("; ".join(f"{f} is measured in {u}" for u, f in units.items()) + ": plot them apart")
    return plot.training({folder: run.rows for folder, run in runs.items()}, next(iter(units), "bits"))


def draw_progressive(flags: PlotProgressive) -> bytes:
    """`dflow plot progressive`."""
    from dflow import plot
    from dflow.compress import stages

    flags.set_threads()
    if flags.rows < 1:
        raise InputError(f"--rows {flags.rows} must be at least 1")
    seen = stages(Path(flags.file).read_bytes(), flags.model, name=flags.file, progress=True)
    names = [picture.form.file for picture in seen[0].pictures][: flags.rows]
    return plot.progressive(
        names,
        [[stage.pictures[i].preview() for stage in seen] for i in range(len(names))],
        [stage.share for stage in seen],
        [[stage.psnr[i] for stage in seen] for i in range(len(names))],
    )


#: What these verbs are about.
GROUP = "pictures of a model: density, coverage, progressive, training"


VERBS: Verbs = (
    (
        "plot density",
        PlotDensity,
        verb(draw_density),
        "dflow plot density --model runs/images/checkerboard",
    ),
    (
        "plot coverage",
        PlotCoverage,
        verb(draw_coverage),
        "dflow plot coverage --model runs/binary/mnist_pbnet_s",
    ),
    (
        "plot progressive",
        PlotProgressive,
        verb(draw_progressive),
        "dflow plot progressive pictures.dfl --model runs/images/idf -o levels.png",
    ),
    (
        "plot training",
        PlotTraining,
        verb(draw_training),
        "dflow plot training runs/ptb/grouped16 runs/ptb/transformer -o curves.png",
    ),
)
