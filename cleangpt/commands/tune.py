"""tune EXPERIMENT: find the best learning rate by short runs, optionally of a narrower model"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import tyro

from cleangpt.checkpoints.lock import lock_run
from cleangpt.commands.overrides import parse_experiment
from cleangpt.distributed.processes import join
from cleangpt.errors import UserError
from cleangpt.files import user_path
from cleangpt.output import say
from cleangpt.training.launch import check_here, prepare_dataset
from cleangpt.training.tuning import RunInterruptedError, Tuning, advice, short_run
from cleangpt.validation import Bounds, Count, Positive

Factor = Annotated[float, Bounds(above=1)]
Rates = tuple[Positive, ...]
FIELDS: list[tuple[str, Any, Any]] = [
    ("steps", Annotated[Count, tyro.conf.arg(help="Steps of a short run, with the full batch size.")], 200),
    ("width", Annotated[int | None, tyro.conf.arg(help="model.dim to try; None: the experiment's.")], None),
    ("rates", Annotated[Rates, tyro.conf.arg(help="Learning rates to try; empty: search.")], ()),
    ("factor", Annotated[Factor, tyro.conf.arg(help="Ratio of neighbouring learning rates in the search.")], 2.0),
    ("out", Annotated[str | None, tyro.conf.arg(help="Folder of the results; None: runs/NAME_tune.")], None),
]


def command(words: Sequence[str]) -> None:
    """Tries learning rates and prints the best; after an interruption, the same command continues."""
    chosen: Any = parse_experiment(words, "tune", "Best learning rate for {}, by short runs", FIELDS)
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
