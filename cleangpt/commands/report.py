"""report RUN [RUN ...]: an HTML page with curves, metrics and samples; compares several runs"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cleangpt.checkpoints.run_folder import find_run
from cleangpt.commands.fields import POSITIONAL
from cleangpt.commands.options import parse
from cleangpt.errors import UserError
from cleangpt.experiment import samples_per_macro_batch
from cleangpt.experiment_files import find_experiment, load_experiment
from cleangpt.files import user_path
from cleangpt.planning.plan import resolve_if_prepared
from cleangpt.tracking.plots import schedule_preview
from cleangpt.tracking.report import write_report
from cleangpt.training.launch import check
from cleangpt.training.resolve import curves, macro_batches, with_length
from cleangpt.validation import Metavar


@dataclasses.dataclass
class Options:
    """Options of `cleangpt report`."""

    runs: Annotated[tuple[str, ...], POSITIONAL, Metavar("RUN")] = ()
    """Folders of runs, or experiments' names for their newest runs."""
    schedule: Annotated[str, Metavar("EXPERIMENT")] | None = None
    """Instead of a report, plot the schedules of an experiment (name or path) before training it."""
    out: Annotated[str, Metavar("FOLDER|FILE")] | None = None
    """Folder of the report; None: the (first) run's. With --schedule, the PNG file; None: NAME_schedule.png."""


def command(words: Sequence[str]) -> None:
    """Writes a report, or the plot of a schedule."""
    about = "A self-contained HTML page and PNGs: curves, schedules, throughput, samples; compares several runs."
    options = parse(Options, words, program="cleangpt report", about=about)
    out = None if options.out is None else user_path(options.out)
    if bool(options.runs) == (options.schedule is not None):
        raise UserError("cleangpt report needs either runs or --schedule EXPERIMENT")
    if options.schedule is None:
        print(f"report: {write_report([find_run(run) for run in options.runs], out)}")
    else:
        print(f"schedules: {_plot_schedules(options.schedule, out)}")


def _plot_schedules(name: str, out: Path | None) -> Path:
    experiment = load_experiment(find_experiment(name))
    check(experiment)
    epochs = experiment.training.epochs is not None
    resolved = resolve_if_prepared(experiment) if epochs else with_length(experiment, macro_batches(experiment))
    samples, planned = curves(resolved)
    planned["training_batch_size"] = _means(samples, samples_per_macro_batch(resolved))
    path = out or Path(f"{experiment.name}_schedule.png")
    return schedule_preview({key: (samples, values) for key, values in planned.items()}, path)


def _means(samples: Sequence[int], size: int) -> list[float]:
    """For each step, the mean training batch size of its macro-batch, as in a run's metrics.

    Its steps may differ by a batch, since they divide the macro-batch; step by step, that would look like a comb.

    Args:
        samples: those before each step.
        size: samples in a macro-batch.
    """
    steps = Counter(before // size for before in samples)
    return [size / steps[before // size] for before in samples]
