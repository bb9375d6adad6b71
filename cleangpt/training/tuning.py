"""Learning-rate search by short runs: `cleangpt tune`.

Each rate gets its own run, with the same initial weights and the same samples in the same order. Its score is the mean
training loss over its last quarter, on samples that most short runs see for the first time; the validation split is
never used. Where `saving.best` names another metric, as for every policy, whose loss says nothing about its rewards,
that one is the score, of training in place of validation if it is a loss or the like. The rates form a grid, which the
search descends.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cleangpt.checkpoints.run_folder import difference, experiment_json
from cleangpt.config import EarlyStoppingConfig, SavingConfig, TrackingConfig, peak
from cleangpt.data.mixing import MixedDataset
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import DivergedError, RunFailedError, UserError
from cleangpt.experiment import Experiment
from cleangpt.files import read_json, write_json
from cleangpt.tracking.metrics import read_metrics
from cleangpt.tracking.numbers import show_number
from cleangpt.tracking.progress import ProgressBar
from cleangpt.training.build import open_trainer

RESULT = "tune.json"
PARTS = 4
"""Macro-batches of a short run; the training loss of the last one is its score."""
MOST_RATES = 20
"""Maximum number of rates that a search tries."""


class RunInterruptedError(Exception):
    """A signal stopped a run after it was saved."""


def search(loss: Callable[[int], float], most: int = MOST_RATES) -> dict[int, float]:
    """Losses by index on a grid: from index 0 downhill, until both neighbours of the lowest loss are known.

    Of two equal losses the lower index wins, so that a search that starts where every loss is infinite goes down. On a
    grid with a single valley the minimum is found, if `most` evaluations reach it.
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
    """Shortens the experiment to `steps` steps of the full batch size, with its schedules; optionally at another width.

    It saves snapshots and metrics, and nothing else. At another width, muP transfers the best rate to the experiment's
    own width: the base is `model.dim`, unless `optimizer.base_dim` is given.

    Raises:
        UserError: the model cannot have that width.
    """
    if width is not None:
        if experiment.init_from is not None:
            raise UserError(f"--width is {width}; allowed with init_from, whose weights have a width: None")
        model, base = experiment.model.at_width(width), getattr(experiment.model, "dim", width)
        optimizer = replace(experiment.optimizer, base_dim=experiment.optimizer.base_dim or base)
        experiment = replace(experiment, model=model, optimizer=optimizer)
    training = experiment.training
    batches = max(1, round(training.accumulation * peak(experiment.schedule.batch_size)))
    if experiment.objective.on_policy:  # whole rounds
        batches = math.lcm(batches, max(1, experiment.rollouts.samples // experiment.data.batch_size))
        steps = math.ceil(steps * training.accumulation / batches)
    direction, metric = experiment.saving.best.split()
    best = experiment.saving.best if metric == "val_loss" else f"{direction} {_of_training(metric)}"
    # Loss scaling for fp16 skips steps by design; anywhere else a single one means that the run has diverged.
    skipped = training.max_skipped_steps if training.precision == "fp16" else 1
    return replace(
        experiment,
        training=replace(
            training, macro_batches=PARTS, steps=None, tokens=None, epochs=None,
            batches_per_macro_batch=batches * math.ceil(steps / PARTS),
            max_skipped_steps=skipped,
        ),
        early_stopping=EarlyStoppingConfig(),
        saving=SavingConfig(keep_snapshots=1, best=best),
        tracking=TrackingConfig(
            progress=False, sample_tokens=0,
            score_samples=0 if "val_" in metric or "train_" in metric else experiment.tracking.score_samples,
        ),
        run_dir=None,
    )  # fmt: skip


def _of_training(metric: str) -> str:
    """The metric of training that has the name of one of validation; any other as it is."""
    return f"train_{metric.removeprefix('val_')}" if metric.startswith("val_") else metric


def score_of(experiment: Experiment) -> tuple[str, int]:
    """The metric by which the rates of a short run are compared, and 1 if it should be low, -1 if high."""
    direction, metric = experiment.saving.best.split()
    return _of_training(metric), 1 if direction == "lowest" else -1


def with_lr(experiment: Experiment, lr: float) -> Experiment:
    """The experiment with another `optimizer.lr`; Muon's rate keeps its ratio to it."""
    optimizer = experiment.optimizer
    muon_lr = optimizer.muon.lr and _short(optimizer.muon.lr * lr / optimizer.lr)
    return replace(experiment, optimizer=replace(optimizer, lr=lr, muon=replace(optimizer.muon, lr=muon_lr)))


class Tuning:
    """The rates tried so far, kept in a folder: tune.json, and a run for each rate.

    Args:
        experiment: from `short_run`, its vocabulary known.
        folder: an interrupted search continues from it.
        dataset: of the experiment's corpus.
        ranks: the processes; all call every method together.
        log: called with a line about each rate's loss.

    Raises:
        UserError: the folder belongs to another experiment, or its rates were tried on other data.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, dataset: MixedDataset, ranks: Ranks, log: Callable[[str], None]
    ) -> None:
        self.experiment, self.folder, self.dataset, self.ranks, self.log = experiment, folder, dataset, ranks, log
        self.data = {source.name: source.dataset.fingerprint()["sha256"] for source in dataset.sources}
        """Checksums of what the rates are tried on, by source."""
        self.metric, self.sign = score_of(experiment)
        self.losses: dict[float, float] = {}
        """Loss by rate, or another metric, negative where it should be high; infinite if the run diverged."""
        found = ranks.is_main and (folder / RESULT).is_file()
        kept = ranks.broadcast(read_json(folder / RESULT) if found else None)
        if kept is not None:
            if changed := difference(kept["experiment"], experiment_json(experiment)):
                raise UserError(f"{folder} holds the rates of another experiment: {changed}; give another --out")
            if kept.get("data", self.data) != self.data:
                raise UserError(f"{folder} holds rates that were tried on other data; give another --out")
            name = score_name(self.metric)
            self.losses = {row["lr"]: math.inf if row[name] is None else self.sign * row[name] for row in kept["rates"]}

    def grid(self, factor: float) -> dict[float, float]:
        """Searches over the experiment's rate times powers of `factor`; returns losses by rate, lowest rate first."""
        start = self.experiment.optimizer.lr
        rates: dict[int, float] = {}

        def loss(place: int) -> float:
            rates[place] = _short(start * factor**place)
            return self.loss(rates[place])

        found = search(loss)
        return {rates[place]: found[place] for place in sorted(found)}

    def loss(self, lr: float) -> float:
        """Final loss of the short run at this rate; reuses or resumes an earlier one; infinite if it diverges.

        Raises:
            RunInterruptedError: a signal stopped the run.
        """
        if lr not in self.losses:
            run = self.folder / f"lr_{lr:g}"
            loss = self.ranks.broadcast(self._train(lr, run))
            self.losses[lr] = loss if math.isfinite(loss) else math.inf
            if self.ranks.is_main:
                write_json(self.folder / RESULT, self.to_json())
                shutil.rmtree(run / "snapshots", ignore_errors=True)
        self.log(f"lr {lr:<10g} {format_score(self.experiment, self.losses[lr])}")
        return self.losses[lr]

    def _train(self, lr: float, run: Path) -> float:
        """Trains or resumes the run of a rate; returns its final loss."""
        experiment = replace(with_lr(self.experiment, lr), run_dir=str(run))
        progress = ProgressBar(progress=False)
        try:
            with open_trainer(experiment, run, self.dataset, progress, self.ranks, validate=False) as trainer:
                if trainer.train() == "interrupted":
                    raise RunInterruptedError
        except DivergedError:
            return math.inf
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return self.sign * float(read_metrics(run)[-1][self.metric])

    def to_json(self) -> dict[str, Any]:
        """The content of tune.json; an infinite loss is null."""
        name = score_name(self.metric)
        rates = [
            {"lr": lr, name: self.sign * loss if math.isfinite(loss) else None}
            for lr, loss in sorted(self.losses.items())
        ]
        return {"experiment": experiment_json(self.experiment), "data": self.data, "rates": rates}


def score_name(metric: str) -> str:
    """The name of a metric in tune.json and on the screen."""
    return "loss" if metric == "train_loss" else metric


def format_score(experiment: Experiment, loss: float) -> str:
    """A value of `Tuning.losses` for display."""
    metric, sign = score_of(experiment)
    return f"{score_name(metric)} {show_number(sign * loss, 4)}" if math.isfinite(loss) else "diverged"


def _short(rate: float) -> float:
    """Rounds a rate to its printed digits, so that the printed rate is the one tried."""
    return float(f"{rate:.6g}")


def advice(experiment: Experiment, losses: Mapping[float, float]) -> list[str]:
    """The result of a search: a table, and the options to train with.

    Raises:
        RunFailedError: all of them diverged.
    """
    best = min(losses, key=lambda lr: (losses[lr], lr))
    if not math.isfinite(losses[best]):
        raise RunFailedError(f"every rate diverged, from {min(losses):g} to {max(losses):g}; try lower --rates")
    word = "  lowest" if score_of(experiment)[1] > 0 else "  highest"
    lines = [f"{lr:<10g} {format_score(experiment, losses[lr])}{word if lr == best else ''}" for lr in sorted(losses)]
    if len(losses) > 1 and best in (min(losses), max(losses)):
        beyond = "lower" if best == min(losses) else "higher"
        lines.append(f"{best:g} is at the end of the rates tried; a {beyond} one may do better")
    chosen = with_lr(experiment, best).optimizer
    options = [("lr", chosen.lr), ("muon.lr", chosen.muon.lr)]
    words = [f"--optimizer.{name} {value:g}" for name, value in options if value is not None]
    return [*lines, f"train with: {' '.join(words)}"]
