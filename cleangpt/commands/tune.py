"""tune EXPERIMENT: find the best learning rate by short runs, optionally of a narrower model"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

from cleangpt.checkpoints.lock import lock_run
from cleangpt.commands.fields import FLAT
from cleangpt.commands.overrides import parse_experiment
from cleangpt.distributed.processes import join
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.files import user_path
from cleangpt.output import say
from cleangpt.training.launch import check_here, prepare_dataset
from cleangpt.training.tuning import RunInterruptedError, Tuning, advice, short_run
from cleangpt.validation import Bounds, Count, Folder, Positive


@dataclass
class Options:
    """Options of `cleangpt tune`."""

    experiment: Annotated[Experiment, FLAT]
    steps: Count = 200
    """Steps of a short run, with the full batch size."""
    width: int | None = None
    """model.dim to try; None: the experiment's."""
    rates: tuple[Positive, ...] = ()
    """Learning rates to try; empty: search."""
    factor: Annotated[float, Bounds(above=1)] = 2.0
    """Ratio of neighbouring learning rates in the search."""
    out: Folder | None = None
    """Folder of the results; None: runs/NAME_tune."""


def command(words: Sequence[str]) -> None:
    """Tries learning rates and prints the best; after an interruption, the same command continues."""
    chosen = parse_experiment(Options, words, "tune", "Best learning rate for {}, by short runs")
    if chosen.experiment.optimizer.lr == 0:
        raise UserError("optimizer.lr is 0; allowed: more than 0, the start of the search")
    experiment = short_run(chosen.experiment, chosen.steps, chosen.width)
    folder = user_path(chosen.out or f"runs/{experiment.name}_tune")
    check_here(experiment)
    with join(experiment.parallel.timeout) as ranks:
        experiment, dataset = prepare_dataset(experiment, ranks)
        folder.mkdir(parents=True, exist_ok=True)
        log: Callable[[str], None] = say if ranks.is_main else lambda line: None
        try:
            with lock_run(folder) if ranks.is_main else nullcontext():
                tuning = Tuning(experiment, folder, dataset, ranks, log)
                losses = {lr: tuning.loss(lr) for lr in chosen.rates} if chosen.rates else tuning.grid(chosen.factor)
        except RunInterruptedError:
            log("interrupted and saved; the same command continues")
            return
    for line in ["", *advice(experiment, losses)]:
        log(line)
