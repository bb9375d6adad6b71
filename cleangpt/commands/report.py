"""report RUN [RUN ...]: an HTML page with curves, metrics and samples; compares several runs"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from cleangpt.checkpoints.run_folder import find_run
from cleangpt.commands.options import parse
from cleangpt.errors import UserError
from cleangpt.experiment_files import find_experiment, load_experiment
from cleangpt.files import user_path
from cleangpt.planning.plan import resolve_if_prepared
from cleangpt.tracking.plots import schedule_preview
from cleangpt.tracking.report import write_report
from cleangpt.training.launch import check
from cleangpt.training.resolve import curves, macro_batches, with_length


@dataclasses.dataclass
class Options:
    """Options of `cleangpt report`."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of runs, or experiments' names for their newest runs."""
    schedule: str | None = None
    """Instead of a report, plot the schedules of an experiment (name or path) before training it."""
    out: str | None = None
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
    path = out or Path(f"{experiment.name}_schedule.png")
    return schedule_preview({key: (samples, values) for key, values in planned.items()}, path)
