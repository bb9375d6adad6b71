"""The learning rate at which a short run of an experiment learns most: `cleangpt tune`.

Each rate gets a run of its own, by the trainer of all runs, with the same initial weights and the same samples in the
same order. It is judged by the mean training loss of its last quarter, on samples that most short runs see for the
first time; the validation split is never looked at. The rates form a grid, and the search walks it downhill.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cleangpt.checkpoints.run_folder import difference, experiment_json, open_run
from cleangpt.config import EarlyStoppingConfig, SavingConfig, TrackingConfig, peak
from cleangpt.data.mixing import Store
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import DivergedError, RunFailedError, UserError
from cleangpt.experiment import Experiment
from cleangpt.files import read_json, write_json
from cleangpt.tracking.metrics import read_metrics
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.trainer import Trainer

RESULT = "tune.json"
PARTS = 4
"""Macro-batches of a run, of which the last is judged."""
MOST_RATES = 20
"""Rates that a search tries before it gives up."""


class RunInterruptedError(Exception):
    """A signal stopped a run after it was saved."""


def search(loss: Callable[[int], float], most: int = MOST_RATES) -> dict[int, float]:
    """Losses by place on a grid: from place 0 downhill, until both neighbours of the lowest are known.

    Of two places that do equally well, the lower one counts as better; so a search that begins where all is infinite
    goes down. A grid with one valley has its lowest place found, if `most` evaluations reach it.
    """
    losses = {0: loss(0)}
    while len(losses) < most:
        lowest = min(losses, key=lambda place: (losses[place], place))
        unknown = [place for place in (lowest - 1, lowest + 1) if place not in losses]
        if not unknown:
            break
        losses[unknown[0]] = loss(unknown[0])
    return losses


def short_run(experiment: Experiment, steps: int, width: int | None) -> Experiment:
    """The experiment made `steps` steps of the full batch size long, its schedules with it; perhaps at another width.

    It saves snapshots, and nothing else but its figures. At another width it imitates the experiment's own by muP: the
    base is `model.dim`, unless `optimizer.base_dim` is given, and the rate that it finds is that of the experiment.

    Raises:
        UserError: the model cannot be had at that width.
    """
    if width is not None:
        if experiment.init_from is not None:
            raise UserError(f"--width is {width}; allowed with init_from, whose weights have a width: None")
        model, base = experiment.model.at_width(width), getattr(experiment.model, "dim", width)
        optimizer = replace(experiment.optimizer, base_dim=experiment.optimizer.base_dim or base)
        experiment = replace(experiment, model=model, optimizer=optimizer)
    training = experiment.training
    batches = max(1, round(training.accumulation * peak(experiment.schedule.batch_size)))
    # Scaling of the loss for fp16 skips steps of itself; anywhere else one is enough to be told.
    skipped = training.max_skipped_steps if training.precision == "fp16" else 1
    return replace(
        experiment,
        training=replace(
            training, macro_batches=PARTS, steps=None, tokens=None, epochs=None,
            batches_per_macro_batch=batches * math.ceil(steps / PARTS),
            max_skipped_steps=skipped,
        ),
        early_stopping=EarlyStoppingConfig(),
        saving=SavingConfig(keep_snapshots=1),
        tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0),
        run_dir=None,
    )  # fmt: skip


def with_lr(experiment: Experiment, lr: float) -> Experiment:
    """The experiment with another `optimizer.lr`; Muon's keeps its ratio to it."""
    optimizer = experiment.optimizer
    muon_lr = optimizer.muon.lr and _short(optimizer.muon.lr * lr / optimizer.lr)
    return replace(experiment, optimizer=replace(optimizer, lr=lr, muon=replace(optimizer.muon, lr=muon_lr)))


class Probe(Trainer):
    """A trainer that leaves the validation split alone."""

    def validate(self) -> float:
        """NaN, which is kept as no checkpoint."""
        return math.nan


class Tuning:
    """The rates tried on a short run, kept in a folder: tune.json, and a run for each rate.

    Args:
        experiment: from `short_run`, its vocabulary known.
        folder: where it goes on if it was interrupted.
        store: of the experiment's corpus.
        ranks: the processes, all of which call everything together.
        say: told of each rate as it is known.

    Raises:
        UserError: the folder holds the rates of another experiment.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, store: Store, ranks: Ranks, log: Callable[[str], None]
    ) -> None:
        self.experiment, self.folder, self.store, self.ranks, self.log = experiment, folder, store, ranks, log
        self.losses: dict[float, float] = {}
        """By rate; infinite where the run diverged."""
        found = ranks.is_main and (folder / RESULT).is_file()
        kept = ranks.from_main(read_json(folder / RESULT) if found else None)
        if kept is not None:
            if changed := difference(kept["experiment"], experiment_json(experiment)):
                raise UserError(f"{folder} holds the rates of another experiment: {changed}; give another --out")
            self.losses = {row["lr"]: math.inf if row["loss"] is None else row["loss"] for row in kept["rates"]}

    def grid(self, factor: float) -> dict[float, float]:
        """Losses by rate of a search over the experiment's rate times powers of `factor`, lowest rate first."""
        start = self.experiment.optimizer.lr
        rates: dict[int, float] = {}

        def loss(place: int) -> float:
            rates[place] = _short(start * factor**place)
            return self.loss(rates[place])

        found = search(loss)
        return {rates[place]: found[place] for place in sorted(found)}

    def loss(self, lr: float) -> float:
        """The loss at a rate: that of a run now, or gone on with, or before; infinite if it diverges.

        Raises:
            StoppedError: a signal stopped the run.
        """
        if lr not in self.losses:
            run = self.folder / f"lr_{lr:g}"
            loss = self.ranks.from_main(self._train(lr, run))
            self.losses[lr] = loss if math.isfinite(loss) else math.inf
            if self.ranks.is_main:
                write_json(self.folder / RESULT, self.to_json())
                shutil.rmtree(run / "snapshots", ignore_errors=True)
        self.log(f"lr {lr:<10g} {format_loss(self.losses[lr])}")
        return self.losses[lr]

    def _train(self, lr: float, run: Path) -> float:
        """The loss of a run in its folder."""
        experiment = replace(with_lr(self.experiment, lr), run_dir=str(run))
        if self.ranks.is_main:
            open_run(experiment, None, [])
        try:
            trainer = Probe(experiment, run, self.store, ProgressBar(run, progress=False), self.ranks)
            if trainer.train() == "interrupted":
                raise RunInterruptedError
        except DivergedError:
            return math.inf
        loss: float = read_metrics(run)[-1]["train_loss"]
        return loss

    def to_json(self) -> dict[str, Any]:
        """The content of tune.json; a loss that is infinite is null."""
        rates = [{"lr": lr, "loss": loss if math.isfinite(loss) else None} for lr, loss in sorted(self.losses.items())]
        return {"experiment": experiment_json(self.experiment), "rates": rates}


def format_loss(loss: float) -> str:
    """A loss for a reader."""
    return f"loss {loss:.4f}" if math.isfinite(loss) else "diverged"


def _short(rate: float) -> float:
    """A rate as it is printed, so that what is printed is what was tried."""
    return float(f"{rate:.6g}")


def advice(experiment: Experiment, losses: Mapping[float, float]) -> list[str]:
    """What rates tried on an experiment amount to: the table, and the options to train with.

    Raises:
        RunFailedError: all of them diverged.
    """
    best = min(losses, key=lambda lr: (losses[lr], lr))
    if not math.isfinite(losses[best]):
        raise RunFailedError(f"every rate diverged, from {min(losses):g} to {max(losses):g}; try lower --rates")
    lines = [f"{lr:<10g} {format_loss(losses[lr])}{'  lowest' if lr == best else ''}" for lr in sorted(losses)]
    if len(losses) > 1 and best in (min(losses), max(losses)):
        beyond = "lower" if best == min(losses) else "higher"
        lines.append(f"{best:g} is at the end of the rates tried; a {beyond} one may do better")
    chosen = with_lr(experiment, best).optimizer
    options = [("lr", chosen.lr), ("muon.lr", chosen.muon.lr)]
    words = [f"--optimizer.{name} {value:g}" for name, value in options if value is not None]
    return [*lines, f"train with: {' '.join(words)}"]
